"""Tool chains of projects, by the names that repositories.yaml uses: what this machine has.

A project's commands see the folders of its tool chain read-only, and the system's programs.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_SYSTEM = ("/usr", "/bin", "/sbin", "/etc/alternatives")
_OWN_FOLDERS = ("/usr/local/go/bin",)
"""Where tool chains install themselves, outside of most PATHs."""

_SYSTEM_PATH = ("/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin")


class MissingToolchain(Exception):
    """The tool chain is unknown or not installed; the message says what to do."""


@dataclass(frozen=True)
class Toolchain:
    """The programs of a language.

    Attributes:
        folders: what commands see of this machine, read-only.
        path: the folders of PATH, the most important first.
        environment: additional variables.
        preparing: additional variables of the set-up command.
        before: shell commands before each command.
    """

    name: str
    folders: tuple[str, ...]
    path: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    preparing: Mapping[str, str] = field(default_factory=dict)
    before: str = ""


def toolchain(image: str) -> Toolchain:
    """Return the tool chain that a repository's `image` names.

    Raises:
        MissingToolchain: it is unknown or not installed on this machine.
    """
    try:
        return _TOOLCHAINS[image]()
    except KeyError:
        raise MissingToolchain(
            f"image: {image} is not a tool chain; use {', '.join(_TOOLCHAINS)}"
        ) from None


def _python() -> Toolchain:
    """Return this interpreter with its packages: pytest, coverage, ruff and uv are among them."""
    packages = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    prefixes = dict.fromkeys((sys.prefix, sys.base_prefix))
    return Toolchain(
        name="python",
        folders=(*dict.fromkeys((*prefixes, *packages)), *_SYSTEM),
        path=(*(f"{prefix}/bin" for prefix in prefixes), *_SYSTEM_PATH),
        environment={
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            "UV_PYTHON_DOWNLOADS": "never",
            "UV_LINK_MODE": "copy",  # its cache is not kept
            "UV_OFFLINE": "1",  # commands run without network, on what was prepared
            "UV_NO_SYNC": "1",
        },
        preparing={"UV_OFFLINE": "0", "UV_NO_SYNC": "0"},
    )


def _node() -> Toolchain:
    node = _installed("node", "Node.js 20 or newer")
    return Toolchain(
        name="node",
        folders=(*dict.fromkeys((str(node.parent.parent), *_SYSTEM)),),
        path=(str(node.parent), *_SYSTEM_PATH),
        environment={"CI": "1", "NO_COLOR": "1", "npm_config_update_notifier": "false"},
    )


def _go() -> Toolchain:
    go = _installed("go", "Go 1.21 or newer")
    return Toolchain(
        name="go",
        folders=(*dict.fromkeys((str(go.parent.parent), *_SYSTEM)),),
        path=(str(go.parent), *_SYSTEM_PATH),
        environment={
            "GOROOT": str(go.parent.parent),
            "GOTOOLCHAIN": "local",  # it would download another one
            "GOFLAGS": "-buildvcs=false",  # the tree has no repository
            "GOTELEMETRY": "off",
            "GOPROXY": "off",  # commands run without network
            "GOMODCACHE": "/prepared/go/modules",
            "GOCACHE": "/tmp/go-build",  # noqa: S108  the sandbox's own
        },
        preparing={
            "GOPROXY": "https://proxy.golang.org,direct",
            "GOFLAGS": "-modcacherw",
            "GOCACHE": "/prepared/go/build",
        },
        # Go cannot build with a cache that is read-only.
        before='if [ -d /prepared/go/build ] && [ ! -d "$GOCACHE" ]; then '
        'cp -r /prepared/go/build "$GOCACHE"; fi',
    )


_TOOLCHAINS: Mapping[str, Callable[[], Toolchain]] = {
    "python": _python,
    "node": _node,
    "go": _go,
}

IMAGES = tuple(_TOOLCHAINS)
"""The names of all tool chains."""


def _installed(program: str, what: str) -> Path:
    """Return the resolved path of a program that the worker can execute."""
    path = os.pathsep.join((*os.get_exec_path(), *_OWN_FOLDERS))
    found = shutil.which(program, path=path)
    if found is None:
        raise MissingToolchain(
            f"image: {program} is not installed on this worker; install {what}, or start the "
            "worker with a PATH that has it"
        )
    return Path(found).resolve()
