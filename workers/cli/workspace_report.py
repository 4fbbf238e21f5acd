"""Measure a Python project for a workspace report: build, test, coverage, lint and analysis.

Everything runs for real, with this interpreter and its packages, in the sandbox
(docs/design/0006-sandbox.md). Each step gets its own copy of the project, and sees neither the
original nor any other file of the user. Only the set-up command has the network.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import tomllib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from activities.checks.dry_run import failure
from activities.checks.sandbox import CannotRun, Limits, Sandbox, python_program
from workers.cli import report_step
from workers.cli.report_step import CONFIG, HOME, PACKAGES, PROJECT, RESULTS
from workflows.models.report import (
    BuildResult,
    E2EResult,
    SonarResult,
    StaticResult,
    Timings,
    UnitResult,
    WorkspaceReport,
)

SETUP_WITHIN_S = 900
BUILD_WITHIN_S = 300
TESTS_WITHIN_S = 900
LINT_WITHIN_S = 120

_MIB = 1024 * 1024
LIMITS = Limits(
    memory_bytes=8192 * _MIB,  # address space, of which a program may use little
    total_memory_bytes=2048 * _MIB,
    file_bytes=1024 * _MIB,
    tmp_bytes=1024 * _MIB,
    files=200_000,
    processes=256,
    open_files=1024,
    output_bytes=512 * _MIB,  # results, and what the set-up command installed
)
"""Limits of each step, except for its time."""

_TOOL_CHAIN = (
    *(sys.prefix, sys.base_prefix, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")),
    *("/usr", "/bin", "/sbin", "/etc/alternatives"),
)
"""What a step can read: this interpreter with its packages, and the system's programs."""

OK_WITH_MAJOR = 10
"""Major findings up to which the quality gate is OK; more are WARN, a critical one is ERROR."""

_JUNIT, _COVERAGE, _FINDINGS = "junit.xml", "coverage.json", "ruff.json"

_TOOLS = ("packaging", "pytest", "pytest_cov")
"""Modules of the extra `report`."""

TEST_FOLDERS = ("tests", "test")
E2E_FOLDERS = ("tests/e2e", "test/e2e", "e2e")
_NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "venv", ".tox", ".nox", "node_modules", "__pycache__", ".*_cache",
    ".coverage", "*.egg-info",
)  # fmt: skip
_BUILT = {"build", "dist"}
"""Top-level folders that a build creates; a package further down may have the same name."""
_REQUIRED_VERSION = re.compile(r"(?m)^[ \t]*required-version[ \t]*=[ \t]*[\"'][^\n]*$")
_NOT_SOURCE = {*TEST_FOLDERS, "e2e", "docs", "examples", "scripts"}
_NOT_MODULE = {"setup.py", "conftest.py", "noxfile.py"}

_MINOR_SECURITY = {"S101", "S110", "S112", "S311", "S404", "S603", "S606", "S607"}
"""Security rules that Bandit rates low: they are major findings, not critical ones."""

_BUILD = """
import importlib, os, sys
module, _, attributes = sys.argv[1].partition(":")
backend = importlib.import_module(module)
for attribute in filter(None, attributes.split(".")):
    backend = getattr(backend, attribute)
os.mkdir("/tmp/wheels")
backend.build_wheel("/tmp/wheels")
"""
"""A PEP 517 front end: the backend that pyproject.toml names builds the wheel."""


class CannotMeasure(Exception):
    """The project has nothing to measure, or a tool could not run.

    The message gives the reason and what to do.
    """


def measure(
    directory: Path, on_step: Callable[[str], None], setup: str = "", sandbox: Sandbox | None = None
) -> WorkspaceReport:
    """Measure the Python project in `directory`.

    Its code is in src/, or in packages and modules at the top; its unit tests in tests/ or test/,
    its end-to-end tests in tests/e2e/ or e2e/. All of its code counts as new.

    Args:
        directory: the project.
        on_step: called with a line as each step begins, and with one for a build or a unit run that
            fails.
        setup: a shell command that runs first, with the network. What it installs in the folder
            $PACKAGES can be imported in all steps; it leaves nothing else behind.
        sandbox: runs all steps; None: a new one.

    Raises:
        CannotMeasure: a tool is not installed; the directory does not exist, or has no code or
            no unit test; there is no sandbox; a step could not run or did not end in time.
    """
    if missing := [name for name in _TOOLS if importlib.util.find_spec(name) is None]:
        raise CannotMeasure(
            f"{' and '.join(missing)} not installed; install the extra `report`: "
            "pip install 'swe-ai-fleet[report]'"
        )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fleet-measure-") as scratch:
        project = _Project.copied(directory, Path(scratch), sandbox or Sandbox())
        if setup:
            on_step("set-up")
            project.set_up(setup)
        on_step("build")
        build = project.build()
        if not build.ok:
            on_step(f"build failed: {build.why}")
        on_step("unit tests")
        unit = project.unit_tests()
        if not unit.ok:
            on_step(f"unit tests failed: {unit.why}")
        on_step("end-to-end tests")
        e2e = project.e2e_tests()
        on_step("lint and static analysis")
        static = project.analyse()
        commit = _commit(directory, Path(scratch))
    return WorkspaceReport(
        job_id=f"measure-{uuid.uuid4().hex[:12]}",
        commit=commit,
        build=build,
        unit=unit,
        static=static,
        e2e=e2e,
        timings=Timings(total_ms=round(1000 * (time.monotonic() - started))),
    )


@dataclass(frozen=True)
class _Tests:
    """A run of pytest. ok: it was completed and no test failed; `why` is then empty."""

    ok: bool
    passed: int
    failed: int
    coverage: float
    why: str


@dataclass(frozen=True)
class _Step:
    """A step that has run. results: the content of each file that it wrote to RESULTS, by name."""

    exit_code: int
    output: str
    results: Mapping[str, str]


@dataclass(frozen=True)
class _Project:
    """A copy of the project. sources: folders and modules of its code, relative to it.

    inputs: the folder that each step gets a copy of.
    """

    inputs: Path
    sandbox: Sandbox
    name: str
    sources: list[Path]
    pyproject: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def copied(cls, directory: Path, scratch: Path, sandbox: Sandbox) -> _Project:
        if not directory.is_dir():
            raise CannotMeasure(f"{directory}: no such directory; name the project's own")
        inputs = scratch / "inputs"
        root = inputs / Path(PROJECT).name
        config = inputs / Path(CONFIG).name
        config.mkdir(parents=True)
        # Use a fixed configuration: every project's coverage is measured in the same way.
        (config / "coverage.ini").write_text(
            "[run]\nomit =\n    */tests/*\n    */test/*\n    */conftest.py\n"
        )
        try:
            shutil.copytree(directory, root, symlinks=True, ignore=_left_out(directory))
            pyproject = _read_settings(root)
            _make_readable(inputs)
        except tomllib.TOMLDecodeError as error:
            raise CannotMeasure(f"{directory / 'pyproject.toml'}: {error}; fix it") from error
        except (OSError, UnicodeDecodeError) as error:
            raise CannotMeasure(f"{directory}: cannot be copied: {error}") from error
        sources = _sources(root)
        if not sources:
            raise CannotMeasure(
                f"{directory}: no Python code; put it in src/, or in a package at the top"
            )
        name = pyproject.get("project", {}).get("name") or directory.resolve().name
        return cls(inputs, sandbox, name, sources, pyproject)

    @property
    def root(self) -> Path:
        """The copy that each step's own is made from."""
        return self.inputs / Path(PROJECT).name

    def set_up(self, command: str) -> None:
        """Run the set-up command with the network, and keep what it installs in PACKAGES."""
        step = self.run("set-up", ["/bin/sh", "-c", command], SETUP_WITHIN_S, keep_packages=True)
        if step.exit_code:
            raise CannotMeasure(
                f"set-up: it ended with exit code {step.exit_code}: {_tail(step.output)}"
            )

    def build(self) -> BuildResult:
        """Byte-compile the code; then build the wheel, if the build's packages are installed."""
        sources = [str(source) for source in self.sources]
        step = self.run(
            "build", [sys.executable, "-m", "compileall", "-q", *sources], BUILD_WITHIN_S
        )
        if step.exit_code == 0 and (backend := self.build_backend()):
            step = self.run("build", [sys.executable, "-c", _BUILD, backend], BUILD_WITHIN_S)
        ok = step.exit_code == 0
        return BuildResult(ok=ok, why="" if ok else _last_line(step.output))

    def build_backend(self) -> str | None:
        """Return the build backend; None without pyproject.toml or the packages that it needs."""
        if not self.pyproject:
            return None
        system = self.pyproject.get("build-system", {})
        backend: str = system.get("build-backend", "setuptools.build_meta")
        if importlib.util.find_spec(backend.partition(":")[0].partition(".")[0]) is None:
            return None
        return backend if all(map(_is_installed, system.get("requires", []))) else None

    def unit_tests(self) -> UnitResult:
        folders = [name for name in TEST_FOLDERS if _has(self.root, name)]
        cover = [f"--cov={source.stem if source.suffix else source}" for source in self.sources]
        tests = self.pytest(
            "unit tests",
            [
                *(folders or ["."]),
                *(f"--ignore={folder}" for folder in E2E_FOLDERS),
                *cover,
                f"--cov-config={CONFIG}/coverage.ini",
                f"--cov-report=json:{RESULTS}/{_COVERAGE}",
            ],
        )
        if tests is None:
            raise CannotMeasure(
                f"{self.name}: no unit tests; put them in tests/, in files named test_*.py"
            )
        return UnitResult(
            ok=tests.ok,
            passed=tests.passed,
            failed=tests.failed,
            coverage=round(tests.coverage, 2),
            why=tests.why,
        )

    def e2e_tests(self) -> E2EResult:
        """Run the end-to-end tests; without any: not ok, none passed, none failed."""
        folder = next((name for name in E2E_FOLDERS if _has(self.root, name)), None)
        tests = self.pytest("end-to-end tests", [folder]) if folder else None
        if tests is None:
            return E2EResult(ok=False, passed=0, failed=0)
        return E2EResult(ok=tests.ok, passed=tests.passed, failed=tests.failed)

    def pytest(self, step: str, arguments: Sequence[str]) -> _Tests | None:
        """Run pytest; return None if it finds no test."""
        run = self.run(
            step,
            [
                sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                "-o", "addopts=", "-p", "no:valkey",  # instead of the project's options
                *self.import_mode(), f"--rootdir={PROJECT}", f"--junitxml={RESULTS}/{_JUNIT}",
                *arguments,
            ],
            TESTS_WITHIN_S,
        )  # fmt: skip
        code = run.exit_code
        if code == 5:  # pytest's code for no test collected
            return None
        if code not in (0, 1, 2) or _JUNIT not in run.results:
            raise CannotMeasure(
                f"{step}: pytest did not run (exit code {code}): {_tail(run.output)}"
            )
        try:
            suites = list(ElementTree.fromstring(run.results[_JUNIT]).iter("testsuite"))  # noqa: S314  limited by the sandbox
            counts = {
                kind: sum(int(suite.get(kind, 0)) for suite in suites)
                for kind in ("tests", "failures", "errors", "skipped")
            }
            measured = json.loads(run.results.get(_COVERAGE, '{"totals": {"percent_covered": 0}}'))
            coverage = float(measured["totals"]["percent_covered"])
        except (ElementTree.ParseError, ValueError, LookupError, TypeError) as error:
            raise CannotMeasure(
                f"{step}: the project's code changed pytest's results: {error!r}"
            ) from error
        failed = counts["failures"] + counts["errors"]
        return _Tests(
            ok=code == 0,
            passed=max(0, counts["tests"] - failed - counts["skipped"]),
            failed=failed,
            coverage=coverage,
            why="" if code == 0 else _first_failure(suites) or _last_line(run.output),
        )

    def import_mode(self) -> list[str]:
        """Return the project's import mode for pytest, without which its tests may not be found."""
        options = self.pyproject.get("tool", {}).get("pytest", {}).get("ini_options", {})
        added = options.get("addopts", [])
        words = added.split() if isinstance(added, str) else added
        return [word for word in words if word.startswith("--import-mode=")]

    def analyse(self) -> StaticResult:
        """Lint by the project's ruff rules; check security and bugs by rules it cannot relax."""
        lint = self.ruff(["."])
        sources = [str(source) for source in self.sources]
        # Ruff's defaults exclude folders named build and dist, which may be packages.
        every_file = ["--config=exclude=[]", "--no-respect-gitignore"]
        found = self.ruff(["--isolated", "--select=S,B,F,E9", *every_file, *sources])
        critical = sum(_is_critical(finding["code"]) for finding in found)
        major = len(found) - critical
        gate: Literal["OK", "WARN", "ERROR"] = (
            "ERROR" if critical else "WARN" if major > OK_WITH_MAJOR else "OK"
        )
        return StaticResult(
            ok=gate != "ERROR",
            sonar=SonarResult(
                project_key=self.name, quality_gate=gate, new_critical=critical, new_major=major
            ),
            lint_errors=len(lint),
        )

    def ruff(self, arguments: Sequence[str]) -> list[dict[str, Any]]:
        step = self.run(
            "lint",
            [
                sys.executable, "-m", "ruff", "check", "--no-cache", "--exit-zero",
                "--output-format=json", f"--output-file={RESULTS}/{_FINDINGS}", *arguments,
            ],
            LINT_WITHIN_S,
        )  # fmt: skip
        if step.exit_code != 0 and "--isolated" not in arguments:
            # Its ruff settings do not fit this version of ruff (unknown rules).
            return self.ruff(["--isolated", *arguments])
        if step.exit_code != 0:
            raise CannotMeasure(
                f"lint: ruff did not run (exit code {step.exit_code}): {_tail(step.output)}"
            )
        parsed: list[dict[str, Any]] = json.loads(step.results[_FINDINGS])
        return parsed

    def run(
        self, step: str, command: Sequence[str], within_s: float, keep_packages: bool = False
    ) -> _Step:
        """Run a command in the sandbox to its end.

        Args:
            step: its name.
            command: its absolute path and its arguments.
            within_s: the time that it may take.
            keep_packages: whether it has the network, and what it installs stays.

        Raises:
            CannotMeasure: there is no sandbox, or the command exceeded a limit.
        """
        environment = {
            "PATH": os.pathsep.join(os.get_exec_path()),
            "HOME": HOME,
            "USER": "fleet",
            "LANG": "C.UTF-8",
            "PACKAGES": PACKAGES,
            "PYTHONPATH": os.pathsep.join([f"{PROJECT}/src", PROJECT, PACKAGES]),
        }
        asked = {
            "inputs": str(self.inputs),
            "command": command,
            "environment": environment,
            "within_s": within_s,
            "kept": PACKAGES if keep_packages else "",
        }
        # The program measures the time, to report the output; the sandbox's limits are for both.
        limits = replace(LIMITS, cpu_s=round(within_s) + 60, wall_s=within_s + 60)
        try:
            run = asyncio.run(
                self.sandbox.run(
                    python_program(Path(report_step.__file__)),
                    json.dumps(asked).encode(),
                    (*_TOOL_CHAIN, str(self.inputs)),
                    limits,
                    network=keep_packages,
                )
            )
        except CannotRun as error:
            raise CannotMeasure(
                f"{step}: a project is measured in the sandbox only, and {error}"
            ) from error
        if run.ended != "exit":
            raise CannotMeasure(f"{step}: {failure(run, limits)}")
        line, _, kept = run.output.partition(b"\n")
        try:
            report = json.loads(line)
        except ValueError:
            raise CannotMeasure(
                f"{step}: it was ended (exit code {run.exit_code}): "
                f"{_tail(run.output.decode(errors='replace'))}"
            ) from None
        if report["exit_code"] is None:
            raise CannotMeasure(
                f"{step}: still running after {within_s:g} s, and ended: {_tail(report['output'])}"
            )
        if keep_packages:
            try:
                with tarfile.open(fileobj=io.BytesIO(kept)) as tar:
                    tar.extractall(self.inputs / Path(PACKAGES).name, filter="data")
            except tarfile.TarError as error:
                raise CannotMeasure(f"{step}: what it installed cannot be kept: {error}") from error
        return _Step(**report)


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


def _left_out(top: Path) -> Callable[[str, list[str]], set[str]]:
    """Return a filter for files that are not copied.

    It matches some names, and sockets, FIFOs and devices anywhere.
    """

    def left_out(folder: str, names: list[str]) -> set[str]:
        special = {name for name in names if _is_special(Path(folder, name))}
        built = _BUILT if Path(folder) == top else set()
        return _NOT_COPIED(folder, names) | special | built

    return left_out


def _is_special(path: Path) -> bool:
    return not (path.is_symlink() or path.is_file() or path.is_dir())


def _make_readable(folder: Path) -> None:
    """Let the sandbox's user, who may be another one, read the files of a folder."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | (0o555 if path.is_dir() or mode & 0o100 else 0o444))


def _read_settings(root: Path) -> dict[str, Any]:
    """Make the copy's settings readable for pytest and ruff; return pyproject.toml's content.

    Neither reads a file with a byte order mark. A required version of ruff does not concern the
    code.
    """
    for file in (root / name for name in ("pyproject.toml", "ruff.toml", ".ruff.toml")):
        if not file.resolve().is_relative_to(root.resolve()):
            raise CannotMeasure(f"{file.name}: it links to a file outside the project; copy it")
        if file.exists():
            text = _REQUIRED_VERSION.sub("", file.read_text("utf-8-sig"))
            file.unlink()  # it may be a link to another file of the project
            file.write_text(text, "utf-8")
    if not _has(root, "pyproject.toml"):
        return {}
    return tomllib.loads((root / "pyproject.toml").read_text("utf-8"))


def _sources(root: Path) -> list[Path]:
    """Return src/, or the folders and modules of Python code at the top; relative to `root`."""
    if any((root / "src").rglob("*.py")):
        return [Path("src")]
    return sorted(
        entry.relative_to(root)
        for entry in root.iterdir()
        if not entry.name.startswith(".")
        and (
            (entry.is_dir() and entry.name not in _NOT_SOURCE and any(entry.rglob("*.py")))
            or (entry.suffix == ".py" and not _is_test_or_tooling(entry.name))
        )
    )


def _is_test_or_tooling(name: str) -> bool:
    return name in _NOT_MODULE or name.startswith("test_") or name.endswith("_test.py")


def _is_critical(code: str | None) -> bool:
    """Return whether a finding is about security, or about code that cannot work.

    Such code has syntax errors, undefined names or invalid comparisons.
    """
    if code is None or code == "invalid-syntax":
        return True
    if code.startswith("S"):
        return code not in _MINOR_SECURITY
    return code.startswith(("E9", "F63", "F7", "F82"))


def _commit(directory: Path, scratch: Path) -> str:
    """Return HEAD, with `-dirty` if the project differs from it; empty without git.

    git runs outside the sandbox, where it can read the repository, and with another repository's
    settings: its own may name programs to run.
    """
    if shutil.which("git") is None:
        return ""

    def git(*arguments: str, **environment: str) -> str | None:
        ended = subprocess.run(
            ["git", *arguments],
            cwd=directory,
            env={"PATH": os.pathsep.join(os.get_exec_path()), "HOME": str(scratch)} | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LINT_WITHIN_S,
            check=False,
        )
        return ended.stdout.strip() if ended.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    if head is None:
        return ""
    paths = ("--path-format=absolute", "--git-path", "objects", "--git-path", "index")
    objects, index, top = (git("rev-parse", *paths, "--show-toplevel") or "").splitlines()
    safe = scratch / "git"
    git("init", "--quiet", "--bare", "--template=", str(safe))
    (safe / "objects/info").mkdir(exist_ok=True)
    (safe / "objects/info/alternates").write_text(f"{objects}\n")
    shutil.copyfile(index, safe / "index")
    (safe / "HEAD").write_text(f"{head}\n")
    own = {"GIT_DIR": str(safe), "GIT_WORK_TREE": top}
    changed = git("status", "--porcelain", "--ignore-submodules", "--", ".", **own)
    return head if changed == "" else f"{head}-dirty"


def _has(root: Path, name: str) -> bool:
    return (root / name).exists()


def _first_failure(suites: Sequence[ElementTree.Element]) -> str:
    """Return the first test that failed, or file that could not be collected, and its message."""
    for case in (case for suite in suites for case in suite.iter("testcase")):
        for problem in (*case.iter("failure"), *case.iter("error")):
            name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
            words = problem.get("message", "")
            if words == "collection failure":  # the error itself is the last of its lines
                words = _last_line(problem.text or "").removeprefix("E ")
            return f"{name}: {words.strip().partition(chr(10))[0]}"[:600]
    return ""


def _last_line(output: str) -> str:
    return next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "")[:300]


def _tail(output: str) -> str:
    return " | ".join(line.strip() for line in output.splitlines() if line.strip())[-600:]
