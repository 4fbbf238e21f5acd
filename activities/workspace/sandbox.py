"""Commands of a project, run in the sandbox: its tree is writable, all else is read-only.

A command sees the tree at PROJECT, its tool chain, the prepared dependencies, and its own HOME and
/tmp, which are new in each run. It has no network, no input and no variable of the worker. Every
process that it started ends with it. See docs/design/0006-sandbox.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from activities.checks.base import printable
from activities.checks.sandbox import Limits as SandboxLimits
from activities.checks.sandbox import Mount, Sandbox, exceeded
from activities.workspace.metrics import COMMAND_SECONDS
from activities.workspace.toolchains import Toolchain
from workflows.models.workspace import CommandRun, Limits

PROJECT = "/project"
"""The tree, and the folder in which commands start."""

REPORTS = "/reports"
"""Where commands write their results, as $REPORTS says."""

PREPARED = "/prepared"
"""What the set-up command installed; the packages of Python are in PACKAGES."""

PACKAGES = f"{PREPARED}/packages"

DEPENDENCIES = (".venv", "node_modules", "vendor")
"""Folders of the tree in which tool chains install dependencies; prepared ones cover them."""

_MIB = 1024 * 1024
_CORES = os.cpu_count() or 1

OUTPUT_BYTES = 8 * 1024
"""How much of an output is kept, half of it from its start and half from its end."""

_HOME = "/tmp/home"  # noqa: S108  the sandbox's own


def sandbox_limits(limits: Limits) -> SandboxLimits:
    """Return the limits of one command of a repository."""
    return SandboxLimits(
        cpu_s=limits.seconds * _CORES + 60,
        wall_s=float(limits.seconds),
        memory_bytes=None,  # Node and Go reserve much more than they use
        total_memory_bytes=limits.memory_bytes,
        file_bytes=512 * _MIB,
        tmp_bytes=min(limits.memory_bytes // 2, 1024 * _MIB),
        files=100_000,
        processes=limits.processes,
        open_files=4096,
        output_bytes=256 * _MIB,
        written_bytes=2048 * _MIB,
        written_files=50_000,
        kept_bytes=OUTPUT_BYTES,
    )


async def run_in_project(
    command: str,
    tree: Path,
    *,
    limits: Limits,
    toolchain: Toolchain,
    prepared: Path | None = None,
    reports: Path | None = None,
    network: bool = False,
    on_output: Callable[[bytes], None] | None = None,
    sandbox: Sandbox | None = None,
    environment: Mapping[str, str] | None = None,
    preparing: bool = False,
) -> CommandRun:
    """Run a shell command in a project's tree.

    A tree that a command filled beyond its limits is left as it is: it must not be committed.

    Args:
        command: what /bin/sh runs.
        tree: the working tree; if the worker is root, it belongs to an unused user from then on.
        limits: `seconds`, `memory_bytes` and `processes` of the command with all that it starts.
        toolchain: what the command sees of this machine.
        prepared: the folder of the prepared dependencies.
        reports: the folder that $REPORTS names; without it there is none.
        network: whether it has this machine's network, as only set-up commands do.
        on_output: called with each part of the output as it is written.
        sandbox: limits how many commands run at once; None: a new one.
        environment: additional variables.
        preparing: whether it makes the prepared dependencies, and may write to their folder.

    Raises:
        CannotRun: the sandbox is not available on this machine.
    """
    mounts = [Mount(tree, PROJECT, writable=True)]
    if prepared:
        mounts.append(Mount(prepared, PREPARED, writable=preparing))
        mounts += () if preparing else _dependencies(tree, prepared)
    if reports:
        mounts.append(Mount(reports, REPORTS, writable=True))
    variables = _variables(toolchain, bool(reports)) | dict(environment or {})
    inner = sandbox_limits(limits)
    run = await (sandbox or Sandbox()).run(
        _shell(command, variables, toolchain.before),
        b"",
        toolchain.folders,
        inner,
        network,
        mounts=mounts,
        on_output=on_output,
        by_shell=True,
    )
    COMMAND_SECONDS.labels("set-up" if preparing else "command").observe(run.seconds)
    return CommandRun(
        command=command,
        exit_code=run.exit_code,
        stopped=exceeded(run, inner),
        seconds=round(run.seconds, 3),
        output=printable(run.output.decode(errors="replace")),
    )


def _shell(command: str, variables: Mapping[str, str], before: str) -> list[str]:
    """Return a program that runs a command with these variables only, in a new home."""
    given = [f"{name}={value}" for name, value in variables.items()]
    script = f'mkdir -p "$HOME"; cd {PROJECT} || exit; {before or ":"}; eval "$1"'
    return ["/usr/bin/env", "-i", *given, "/bin/sh", "-c", script, "sh", command]


def _variables(toolchain: Toolchain, reports: bool) -> dict[str, str]:
    local = (f"{PROJECT}/.venv/bin", f"{PROJECT}/node_modules/.bin", f"{PACKAGES}/bin")
    return {
        "PATH": os.pathsep.join((*local, *toolchain.path)),
        "HOME": _HOME,
        "USER": "fleet",
        "LANG": "C.UTF-8",
        "PACKAGES": PACKAGES,
        "PREPARED": PREPARED,
        **({"REPORTS": REPORTS} if reports else {}),
        **toolchain.environment,
    }


def _dependencies(tree: Path, prepared: Path) -> list[Mount]:
    """Return the mounts of prepared dependencies that belong into the tree.

    A link or file of the tree that has the name of one stays: a mount would follow the link.
    """
    return [
        Mount(prepared / "tree" / name, f"{PROJECT}/{name}")
        for name in DEPENDENCIES
        if (prepared / "tree" / name).is_dir()
        and not (tree / name).is_symlink()
        and not (tree / name).is_file()
    ]
