"""Measure a Python project for a workspace report: build, test, coverage, lint and analysis.

Everything runs for real, with this interpreter and its packages, on a copy of the project, so that
the files which a build or a test leaves behind do not reach the original. The environment contains
only PATH, so that the project's code finds none of the fleet's credentials.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from workflows.models.report import (
    BuildResult,
    E2EResult,
    SonarResult,
    StaticResult,
    Timings,
    UnitResult,
    WorkspaceReport,
)

BUILD_WITHIN_S = 300
TESTS_WITHIN_S = 900
LINT_WITHIN_S = 120

OK_WITH_MAJOR = 10
"""Major findings up to which the quality gate is OK; more are WARN, a critical one is ERROR."""

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
import importlib, sys
module, _, attributes = sys.argv[1].partition(":")
backend = importlib.import_module(module)
for attribute in filter(None, attributes.split(".")):
    backend = getattr(backend, attribute)
backend.build_wheel(sys.argv[2])
"""
"""A PEP 517 front end: the backend that pyproject.toml names builds the wheel."""


class CannotMeasure(Exception):
    """The project has nothing to measure, or a tool could not run.

    The message gives the reason and what to do.
    """


def measure(directory: Path, on_step: Callable[[str], None]) -> WorkspaceReport:
    """Measure the Python project in `directory`.

    Its code is in src/, or in packages and modules at the top; its unit tests in tests/ or test/,
    its end-to-end tests in tests/e2e/ or e2e/. All of its code counts as new. `on_step` is called
    with a line as each step begins, and with one for a build or a unit run that fails.

    Raises:
        CannotMeasure: a tool is not installed; the directory does not exist, or has no code or
            no unit test; a step could not run or did not end in time.
    """
    if missing := [name for name in _TOOLS if importlib.util.find_spec(name) is None]:
        raise CannotMeasure(
            f"{' and '.join(missing)} not installed; install the extra `report`: "
            "pip install 'swe-ai-fleet[report]'"
        )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fleet-measure-") as scratch:
        project = _Project.copied(directory, Path(scratch))
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
        commit = _commit(directory, project)
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
    why: str


@dataclass(frozen=True)
class _Project:
    """A copy of the project at `root`. sources: folders and modules of its code, within root."""

    root: Path
    scratch: Path
    name: str
    sources: list[Path]
    pyproject: dict[str, Any]

    @classmethod
    def copied(cls, directory: Path, scratch: Path) -> _Project:
        if not directory.is_dir():
            raise CannotMeasure(f"{directory}: no such directory; name the project's own")
        root = scratch / "project"
        try:
            shutil.copytree(directory, root, symlinks=True, ignore=_left_out(directory))
            pyproject = _read_settings(root)
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
        return cls(root, scratch, name, sources, pyproject)

    def build(self) -> BuildResult:
        """Byte-compile the code; then build the wheel, if the build's packages are installed."""
        sources = [str(source) for source in self.sources]
        code, output = self.run(
            "build", [sys.executable, "-m", "compileall", "-q", *sources], BUILD_WITHIN_S
        )
        if code == 0 and (backend := self.build_backend()):
            # In another copy: the files that a build leaves behind are not code to test or lint.
            folder = self.scratch / "build"
            shutil.copytree(self.root, folder, symlinks=True)
            wheels = self.scratch / "wheels"
            wheels.mkdir()
            code, output = self.run(
                "build",
                [sys.executable, "-c", _BUILD, backend, str(wheels)],
                BUILD_WITHIN_S,
                folder,
            )
        return BuildResult(ok=code == 0, why="" if code == 0 else _last_line(output))

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
        covered = self.scratch / "coverage.json"
        # Use a fixed configuration: every project's coverage is measured in the same way.
        config = self.scratch / "coverage.ini"
        config.write_text("[run]\nomit =\n    */tests/*\n    */test/*\n    */conftest.py\n")
        cover = [f"--cov={source.stem if source.suffix else source}" for source in self.sources]
        tests = self.pytest(
            "unit tests",
            [
                *(folders or ["."]),
                *(f"--ignore={folder}" for folder in E2E_FOLDERS),
                *cover,
                f"--cov-config={config}",
                f"--cov-report=json:{covered}",
            ],
        )
        if tests is None:
            raise CannotMeasure(
                f"{self.name}: no unit tests; put them in tests/, in files named test_*.py"
            )
        percent = 0.0
        if covered.exists():
            percent = json.loads(covered.read_text())["totals"]["percent_covered"]
        return UnitResult(
            ok=tests.ok,
            passed=tests.passed,
            failed=tests.failed,
            coverage=round(percent, 2),
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
        results = self.scratch / f"{step.replace(' ', '-')}.xml"
        code, output = self.run(
            step,
            [
                sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                "-o", "addopts=", "-p", "no:valkey",  # instead of the project's options
                *self.import_mode(), f"--rootdir={self.root}", f"--junitxml={results}", *arguments,
            ],
            TESTS_WITHIN_S,
        )  # fmt: skip
        if code == 5:  # pytest's code for no test collected
            return None
        if code not in (0, 1, 2) or not results.exists():
            raise CannotMeasure(f"{step}: pytest did not run (exit code {code}): {_tail(output)}")
        suites = list(ElementTree.parse(results).getroot().iter("testsuite"))  # noqa: S314  pytest's

        def count(*kinds: str) -> int:
            return sum(int(suite.get(kind, 0)) for suite in suites for kind in kinds)

        failed = count("failures", "errors")
        passed = max(0, count("tests") - failed - count("skipped"))
        why = "" if code == 0 else _first_failure(suites) or _last_line(output)
        return _Tests(ok=code == 0, passed=passed, failed=failed, why=why)

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
        findings = self.scratch / "ruff.json"
        code, output = self.run(
            "lint",
            [
                sys.executable, "-m", "ruff", "check", "--no-cache", "--exit-zero",
                "--output-format=json", f"--output-file={findings}", *arguments,
            ],
            LINT_WITHIN_S,
        )  # fmt: skip
        if code != 0 and "--isolated" not in arguments:
            # Its ruff settings do not fit this version of ruff (unknown rules).
            return self.ruff(["--isolated", *arguments])
        if code != 0:
            raise CannotMeasure(f"lint: ruff did not run (exit code {code}): {_tail(output)}")
        parsed: list[dict[str, Any]] = json.loads(findings.read_text())
        return parsed

    def run(
        self, step: str, command: Sequence[str], within_s: float, cwd: Path | None = None
    ) -> tuple[int, str]:
        """Run a command to its end, then end every process that it left running.

        Returns:
            The exit code and the output.
        """
        home = self.scratch / "home"
        home.mkdir(exist_ok=True)
        log = self.scratch / "output.txt"
        environment = {
            "PATH": os.pathsep.join(os.get_exec_path()),
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "PYTHONPATH": os.pathsep.join([str(self.root / "src"), str(self.root)]),
        }
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=cwd or self.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            code = process.wait(within_s)
        except subprocess.TimeoutExpired as error:
            raise CannotMeasure(
                f"{step}: still running after {within_s:g} s, and ended: "
                f"{_tail(log.read_text(errors='replace'))}"
            ) from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return code, log.read_text(errors="replace")


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


def _read_settings(root: Path) -> dict[str, Any]:
    """Make the copy's settings readable for pytest and ruff; return pyproject.toml's content.

    Neither reads a file with a byte order mark. A required version of ruff does not concern the
    code.
    """
    for file in (root / name for name in ("pyproject.toml", "ruff.toml", ".ruff.toml")):
        if file.exists():
            text = _REQUIRED_VERSION.sub("", file.read_text("utf-8-sig"))
            file.unlink()  # it may be a link to the project's own
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


def _commit(directory: Path, project: _Project) -> str:
    """Return HEAD, with `-dirty` if the project differs from it; empty without git."""
    if shutil.which("git") is None:
        return ""
    code, head = project.run("git", ["git", "rev-parse", "HEAD"], LINT_WITHIN_S, directory)
    if code != 0:
        return ""
    _, changed = project.run(
        "git", ["git", "status", "--porcelain", "--", "."], LINT_WITHIN_S, directory
    )
    return f"{head.strip()}-dirty" if changed.strip() else head.strip()


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
