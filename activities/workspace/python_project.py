"""A Python project needs no commands: they follow from its folders and its pyproject.toml.

Its code is in src/, or in packages and modules at the top; its unit tests are in tests/ or test/,
its end-to-end tests in tests/e2e/ or e2e/.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from activities.workspace.sandbox import PACKAGES, PROJECT, REPORTS

TOOLS = ("packaging", "pytest", "pytest_cov")
"""Modules of the extra `report`."""

TEST_FOLDERS = ("tests", "test")
E2E_FOLDERS = ("tests/e2e", "test/e2e", "e2e")

COVERAGE_INI = "[run]\nomit =\n    */tests/*\n    */test/*\n    */conftest.py\n"
"""The configuration of coverage: every project's is measured in the same way."""

_REQUIRED_VERSION = re.compile(r"(?m)^[ \t]*required-version[ \t]*=[ \t]*[\"'][^\n]*$")
_NOT_SOURCE = {*TEST_FOLDERS, "e2e", "docs", "examples", "scripts", "node_modules", "venv"}
_NOT_MODULE = {"setup.py", "conftest.py", "noxfile.py"}

_MINOR_SECURITY = {"S101", "S110", "S112", "S311", "S404", "S603", "S606", "S607"}
"""Security rules that Bandit rates low: they are major findings, not critical ones."""

_BUILD = """import importlib, os, sys
module, _, attributes = sys.argv[1].partition(":")
backend = importlib.import_module(module)
for attribute in filter(None, attributes.split(".")):
    backend = getattr(backend, attribute)
os.mkdir("/tmp/wheels")
backend.build_wheel("/tmp/wheels")"""
"""A PEP 517 front end: the backend that pyproject.toml names builds the wheel."""


class InvalidProject(Exception):
    """The project cannot be measured; the message has the reason and the remedy."""


@dataclass(frozen=True)
class Commands:
    """The commands of each dimension; empty: there is none, and `why` has the reason."""

    build: str
    unit: str
    e2e: str
    lint: str
    static: str = ""
    why: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def python_commands(root: Path) -> Commands:
    """Return the commands for a Python project, whose settings read_settings has read.

    Raises:
        InvalidProject: a tool is not installed, or the project has no code.
    """
    if missing := [name for name in TOOLS if importlib.util.find_spec(name) is None]:
        raise InvalidProject(
            f"{' and '.join(missing)} not installed; install the extra `report`: "
            "pip install 'swe-ai-fleet[report]'"
        )
    settings = read_settings(root)
    sources = find_sources(root)
    if not sources:
        raise InvalidProject("no Python code; put it in src/, or in a package at the top")
    e2e = next((name for name in E2E_FOLDERS if (root / name).exists()), "")
    folders = [name for name in TEST_FOLDERS if (root / name).exists()]
    cover = [f"--cov={source.stem if source.suffix else source}" for source in sources]
    return Commands(
        build=_build(settings, sources),
        unit=_pytest(
            settings,
            [
                *(folders or ["."]),
                *(f"--ignore={folder}" for folder in E2E_FOLDERS),
                *cover,
                f"--cov-config={REPORTS}/coverage.ini",
                f"--cov-report=xml:{REPORTS}/coverage.xml",
            ],
        ),
        e2e=_pytest(settings, [e2e]) if e2e else "",
        lint=_lint(),
        # Ruff's defaults exclude folders named build and dist, which may be packages.
        static=_ruff(
            "static",
            *("--isolated", "--select=S,B,F,E9", "--config=exclude=[]", "--no-respect-gitignore"),
            *map(str, sources),
        ),
        why={
            "unit": "no unit tests; put them in tests/, in files named test_*.py",
            "e2e": "no end-to-end tests; put them in tests/e2e/",
        },
        environment={"PYTHONPATH": os.pathsep.join(_PYTHONPATH)},
    )


_SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
_PYTHONPATH = (f"{PROJECT}/src", PROJECT, PACKAGES, f"{PROJECT}/.venv/{_SITE}")


def command_of_tests(root: Path, files: Sequence[str]) -> str:
    """Return the command that runs the tests of some files, without coverage.

    Args:
        root: the project, whose settings `prepare_settings` has read.
        files: relative to `root`.
    """
    return _pytest(read_settings(root), ["--continue-on-collection-errors", *files])


def project_name(root: Path) -> str:
    """Return the project's name in pyproject.toml; empty without one."""
    name = read_settings(root).get("project", {}).get("name", "")
    return name if isinstance(name, str) else ""


def is_critical(code: str) -> bool:
    """Return whether a rule of ruff is about security, or about code that cannot work.

    Such code has syntax errors, undefined names or invalid comparisons.
    """
    if code in ("?", "invalid-syntax"):
        return True
    if code.startswith("S"):
        return code not in _MINOR_SECURITY
    return code.startswith(("E9", "F63", "F7", "F82"))


def prepare_settings(root: Path) -> None:
    """Make a copy's settings readable for pytest and ruff.

    Neither reads a file with a byte order mark. A required version of ruff does not concern the
    code.

    Raises:
        InvalidProject: a file links to one outside the project, or is not UTF-8.
    """
    for file in (root / name for name in ("pyproject.toml", "ruff.toml", ".ruff.toml")):
        if not file.resolve().is_relative_to(root.resolve()):
            raise InvalidProject(f"{file.name}: it links to a file outside the project; copy it")
        if file.is_file():
            try:
                text = _REQUIRED_VERSION.sub("", file.read_text("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise InvalidProject(f"{file.name}: is not UTF-8 ({error}); fix it") from error
            file.unlink()  # it may be a link to another file of the project
            file.write_text(text, "utf-8")


def read_settings(root: Path) -> dict[str, Any]:
    """Return the content of pyproject.toml; empty without it.

    Raises:
        InvalidProject: it is not TOML.
    """
    file = root / "pyproject.toml"
    if not file.is_file():
        return {}
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidProject(f"{file.name}: {error}; fix it") from error


def find_sources(root: Path) -> list[Path]:
    """Return src/, or the folders and modules of Python code at the top; relative to `root`."""
    if any((root / "src").rglob("*.py")):
        return [Path("src")]
    return sorted(
        entry.relative_to(root)
        for entry in root.iterdir()
        if not entry.name.startswith(".")
        and not entry.is_symlink()
        and (
            (entry.is_dir() and entry.name not in _NOT_SOURCE and any(entry.rglob("*.py")))
            or (entry.suffix == ".py" and not is_test_or_tooling(entry.name))
        )
    )


def is_test_or_tooling(name: str) -> bool:
    """Return whether a file's name is that of a test, or of a tool's settings."""
    return name in _NOT_MODULE or name.startswith("test_") or name.endswith("_test.py")


def _build(settings: dict[str, Any], sources: list[Path]) -> str:
    """Byte-compile the code; then build the wheel, if the build's packages are installed."""
    compiled = shlex.join([sys.executable, "-m", "compileall", "-q", *map(str, sources)])
    backend = _build_backend(settings)
    if backend is None:
        return compiled
    return f"{compiled} && {shlex.join([sys.executable, '-c', _BUILD, backend])}"


def _build_backend(settings: dict[str, Any]) -> str | None:
    """Return the build backend; None without pyproject.toml or the packages that it needs."""
    if not settings:
        return None
    system = settings.get("build-system", {})
    backend: str = system.get("build-backend", "setuptools.build_meta")
    if importlib.util.find_spec(backend.partition(":")[0].partition(".")[0]) is None:
        return None
    return backend if all(map(_is_installed, system.get("requires", []))) else None


def _is_installed(requirement: str) -> bool:
    """Return whether a requirement of the build is met, or does not apply to this interpreter."""
    from packaging.requirements import InvalidRequirement, Requirement  # of the extra `report`

    try:
        wanted = Requirement(requirement)
        if wanted.marker and not wanted.marker.evaluate():
            return True
        version = importlib.metadata.version(wanted.name)
    except (InvalidRequirement, importlib.metadata.PackageNotFoundError):
        return False
    return wanted.specifier.contains(version, prereleases=True)


def _pytest(settings: dict[str, Any], arguments: list[str]) -> str:
    return shlex.join(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
            "-o", "addopts=", "-p", "no:valkey",  # instead of the project's options
            *_import_mode(settings), f"--rootdir={PROJECT}", f"--junitxml={REPORTS}/tests.xml",
            *arguments,
        ]
    )  # fmt: skip


def _import_mode(settings: dict[str, Any]) -> list[str]:
    """Return the project's import mode for pytest, without which its tests may not be found."""
    options = settings.get("tool", {}).get("pytest", {}).get("ini_options", {})
    added = options.get("addopts", [])
    words = added.split() if isinstance(added, str) else added
    return [word for word in words if word.startswith("--import-mode=")]


def _lint() -> str:
    """Lint by the project's rules; if they do not fit this version of ruff, by its defaults."""
    return f"{_ruff('lint', '.')} || {_ruff('lint', '--isolated', '.')}"


def _ruff(name: str, *arguments: str) -> str:
    return shlex.join(
        [
            sys.executable, "-m", "ruff", "check", "--no-cache", "--exit-zero",
            "--output-format=sarif", f"--output-file={REPORTS}/{name}.sarif", *arguments,
        ]
    )  # fmt: skip
