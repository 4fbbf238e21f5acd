"""Measuring a commit: build, tests, coverage of new code, lint and analysis, each really run.

Every command runs in the sandbox, on a copy of the tree, with a new folder for its result files.
Results are counted from those files only, and compared with the base's: what a change does not
make worse is not held against it, and what was not measured never counts as passed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from activities.checks.sandbox import Sandbox
from activities.workspace.coverage import Coverage, NewCode, read_coverage
from activities.workspace.junit import Outcome, Outcomes, read_tests
from activities.workspace.python_project import (
    COVERAGE_INI,
    Commands,
    InvalidProject,
    is_critical,
    is_test_or_tooling,
    prepare_settings,
    python_commands,
)
from activities.workspace.results import InvalidResult, last_line
from activities.workspace.sandbox import run_in_project
from activities.workspace.sarif import read_findings
from activities.workspace.scratch import scratch
from activities.workspace.toolchains import Toolchain, toolchain
from activities.workspace.tree_copies import copy_tree
from workflows.models.measurement import (
    LISTED,
    BaseResults,
    CoverageResult,
    FailedTest,
    Finding,
    LintResult,
    Measurement,
    Step,
    SuiteResult,
    finding_key,
)
from workflows.models.workspace import CommandRun, Repository
from workflows.rules.globs import matches

TAIL_CHARACTERS = 2_000

PYTHON = "python"
"""The tool chain whose commands are detected, if a repository gives none."""

Suite = Literal["unit", "e2e"]
SUITES: tuple[Suite, ...] = ("unit", "e2e")

LOAD_ALL = {"PYTEST_ADDOPTS": "--continue-on-collection-errors"}
"""pytest runs no test at all if one file cannot be imported, unless it is given this."""


def quietly(step: str) -> None:
    """Ignore which step begins."""


async def measure(
    repository: Repository,
    tree: Path,
    base: BaseResults | None = None,
    *,
    diff: str | None = None,
    commit: str = "",
    prepared: Path | None = None,
    sandbox: Sandbox | None = None,
    on_step: Callable[[str], None] = quietly,
) -> Measurement:
    """Measure a tree. The tree is copied, and never changed.

    Args:
        repository: its commands and limits.
        tree: what is measured, without repository.
        base: the results of the commit that the change starts from; None: all counts as new.
        diff: from the base to the tree, in git's format; None: all code counts as new.
        commit: the tree's.
        prepared: the tree's prepared dependencies.
        sandbox: limits how many commands run at once; None: a new one.
        on_step: called with a name as each step begins.

    Raises:
        CannotRun: the sandbox is not available on this machine.
        MissingToolchain: the tool chain is not installed on it.
    """
    began = time.monotonic()
    with scratch() as folder:
        bench = await _bench(repository, tree, folder, prepared, sandbox)
        if isinstance(bench, str):
            return not_measured(bench, commit, base.commit if base else "")
        on_step("build")
        build = await bench.build()
        on_step("unit tests")
        unit, coverage = await bench.unit_tests(base, diff)
        on_step("end-to-end tests")
        e2e = await bench.e2e_tests(base)
        on_step("lint and static analysis")
        lint, static = await bench.analyse(base)
    return Measurement(
        commit=commit,
        base=base.commit if base else "",
        build=build,
        unit=unit,
        e2e=e2e,
        coverage=coverage,
        lint=lint,
        static=static,
        seconds=round(time.monotonic() - began, 3),
    )


async def measure_base(
    repository: Repository,
    tree: Path,
    *,
    commit: str = "",
    prepared: Path | None = None,
    sandbox: Sandbox | None = None,
) -> BaseResults:
    """Return what changes of a commit are compared with; it depends on nothing else.

    Args:
        repository: its commands and limits.
        tree: the commit's, without repository; it is copied, and never changed.
        commit: the tree's.
        prepared: the tree's prepared dependencies.
        sandbox: limits how many commands run at once; None: a new one.

    Raises:
        CannotRun: the sandbox is not available on this machine.
        MissingToolchain: the tool chain is not installed on it.
    """
    with scratch() as folder:
        bench = await _bench(repository, tree, folder, prepared, sandbox)
        if isinstance(bench, str):
            return BaseResults(commit=commit)
        build = await bench.build()
        unit, e2e = await bench.tests("unit"), await bench.tests("e2e")
        lint, static = await bench.lint("lint"), await bench.lint("static")
    linted = (lint.step, static.step)
    return BaseResults(
        commit=commit,
        unit=unit.found.outcomes if unit.found else None,
        e2e=e2e.found.outcomes if e2e.found else None,
        lint=_counted(lint.found),
        static=_counted(static.found),
        complete=not any(step.stopped for step in (build, unit.step, e2e.step, *linted)),
    )


async def run_suites(
    repository: Repository,
    tree: Path,
    *,
    prepared: Path | None = None,
    sandbox: Sandbox | None = None,
) -> dict[Suite, Tested]:
    """Build a tree, and run its tests; those of files that do not load keep no others from running.

    Args:
        repository: its commands and limits.
        tree: what is tested, without repository; it is copied, and never changed.
        prepared: the tree's prepared dependencies.
        sandbox: limits how many commands run at once; None: a new one.

    Raises:
        CannotRun: the sandbox is not available on this machine.
        MissingToolchain: the tool chain is not installed on it.
    """
    with scratch() as folder:
        bench = await _bench(repository, tree, folder, prepared, sandbox)
        if isinstance(bench, str):
            return {"unit": Tested(Step(not_measured=bench))}
        more = LOAD_ALL if repository.image == PYTHON else {}
        environment = bench.commands.environment | more
        bench.commands = replace(bench.commands, environment=environment)
        await bench.build()
        return {name: await bench.tests(name) for name in SUITES if getattr(bench.commands, name)}


async def run_unit_tests(
    repository: Repository, tree: Path, *, prepared: Path | None, sandbox: Sandbox
) -> Tested:
    """Build a tree, and run its unit tests once. The tree is copied, and never changed.

    Args:
        repository: its commands and limits.
        tree: the commit's, without repository.
        prepared: the tree's prepared dependencies.
        sandbox: limits how many commands run at once.

    Raises:
        CannotRun: the sandbox is not available on this machine.
        MissingToolchain: the tool chain is not installed on it.
    """
    with scratch() as folder:
        bench = await _bench(repository, tree, folder, prepared, sandbox)
        if isinstance(bench, str):
            return Tested(Step(not_measured=bench))
        if repository.build:
            await bench.build()
        else:
            bench.built = bench.tree
        return await bench.tests("unit")


@dataclass(frozen=True)
class Tested:
    """A run of tests. found: None if it was not measured, and `step` says why."""

    step: Step
    found: Outcomes | None = None
    coverage: Coverage | str = ""
    """Why there is none, if it is a text."""


@dataclass(frozen=True)
class _Linted:
    step: Step
    found: list[Finding] | None = None


@dataclass
class _Bench:
    """Where the commands of one tree run.

    Attributes:
        tree: a copy of the tree, which no command changes.
        built: what the tests run on: with the results of the build, if there is a command for it.
    """

    repository: Repository
    commands: Commands
    chain: Toolchain
    tree: Path
    scratch: Path
    prepared: Path | None
    sandbox: Sandbox
    built: Path = field(default_factory=Path)

    async def build(self) -> Step:
        """Build, and keep the result for the tests."""
        self.built = self.tree
        command = self.commands.build
        if not command:
            return Step(not_measured=self._missing("build"))
        tree, run, _ = await self._run("build", command, self.tree)
        if self.repository.build:
            self.built = tree
        return Step(**_step(run), not_measured=run.stopped)

    async def unit_tests(
        self, base: BaseResults | None, diff: str | None
    ) -> tuple[SuiteResult, CoverageResult]:
        """Run the unit tests, and measure coverage in the same run."""
        first = await self.tests("unit")
        return (
            await self._compared("unit", first, base.unit if base else None),
            self._coverage(first, diff),
        )

    async def e2e_tests(self, base: BaseResults | None) -> SuiteResult:
        """Run the end-to-end tests."""
        return await self._compared("e2e", await self.tests("e2e"), base.e2e if base else None)

    async def analyse(self, base: BaseResults | None) -> tuple[LintResult, LintResult]:
        """Lint; for Python, analyse with rules that the project cannot relax."""
        lint = _new_findings(await self.lint("lint"), base.lint if base else None)
        if not self.commands.static:
            return lint, lint
        return lint, _new_findings(await self.lint("static"), base.static if base else None)

    async def tests(self, name: str) -> Tested:
        """Run tests once, and count them."""
        command: str = getattr(self.commands, name)
        if not command:
            return Tested(Step(not_measured=self._missing(name)))
        _, run, reports = await self._run(name, command, self.built)
        try:
            found = None if run.stopped else await asyncio.to_thread(read_tests, reports)
        except InvalidResult as error:
            return Tested(Step(**_step(run), not_measured=str(error)))
        if found is None or not (found.passed or found.failed):
            why = run.stopped or self._why_no_tests(name, run, found)
            return Tested(Step(**_step(run), not_measured=why))
        coverage = await asyncio.to_thread(_coverage_of, reports) if name == "unit" else ""
        return Tested(Step(**_step(run)), found, coverage)

    async def lint(self, name: str) -> _Linted:
        """Run a linter, and read its findings."""
        command: str = getattr(self.commands, name)
        if not command:
            return _Linted(Step(not_measured=self._missing(name)))
        _, run, reports = await self._run(name, command, self.tree)
        try:
            found = None if run.stopped else await asyncio.to_thread(read_findings, reports)
            why = run.stopped or f"exit code {run.exit_code}: no SARIF file in $REPORTS"
        except InvalidResult as error:
            found, why = None, str(error)
        if found is None:
            return _Linted(Step(**_step(run), not_measured=why))
        if name == "static":
            found = [each.model_copy(update={"critical": is_critical(each.rule)}) for each in found]
        return _Linted(Step(**_step(run)), found)

    async def _compared(
        self, name: str, first: Tested, base: Mapping[str, Outcome] | None
    ) -> SuiteResult:
        """Count a run against the base; tests that fail only here run once more."""
        if first.found is None:
            return SuiteResult(**dict(first.step), base_tests=None if base is None else len(base))
        known = base or {}
        failing = first.found.names("failed")
        suspects = [each for each in failing if known.get(each) != "failed"]
        flaky: list[str] = []
        if suspects and base is not None:
            again = (await self.tests(name)).found
            outcomes = again.outcomes if again else {}
            flaky = [each for each in suspects if outcomes.get(each) == "passed"]
        return _test_run(first.step, first.found, base, flaky)

    def _coverage(self, tested: Tested, diff: str | None) -> CoverageResult:
        step = Step(command=tested.step.command, seconds=tested.step.seconds)
        if tested.found is None:
            return _no_coverage(step, tested.step.not_measured)
        if isinstance(tested.coverage, str):
            return _no_coverage(step, tested.coverage)
        try:
            found = (
                tested.coverage.of_all()
                if diff is None
                else tested.coverage.of_new_code(diff, self.tree, self._needs_tests)
            )
        except InvalidResult as error:
            return _no_coverage(step, str(error))
        return _coverage_result(step, found)

    def _needs_tests(self, path: str) -> bool:
        """Return whether a file's code is neither test nor documentation nor a tool's settings."""
        repository = self.repository
        outside = matches(path, [*repository.test_paths, *repository.docs_paths])
        return not outside and not is_test_or_tooling(Path(path).name)

    def _why_no_tests(self, name: str, run: CommandRun, found: Outcomes | None) -> str:
        if found is None:
            return f"exit code {run.exit_code}: no JUnit XML file in $REPORTS"
        if found.skipped:
            return "the report has no test that ran"
        return self.commands.why.get(name, "the report has no test")

    def _missing(self, name: str) -> str:
        return self.commands.why.get(name) or (
            f"no command; add `{name}` to the entry {self.repository.key} of repositories.yaml"
        )

    async def _run(self, name: str, command: str, tree: Path) -> tuple[Path, CommandRun, Path]:
        """Run a command on its own copy of a tree; return the copy, the run and its results."""
        place = self.scratch / f"{name}-{time.monotonic_ns()}"
        reports = place / "reports"
        reports.mkdir(parents=True)
        (reports / "coverage.ini").write_text(COVERAGE_INI)
        await asyncio.to_thread(copy_tree, tree, place / "tree")
        run = await run_in_project(
            command,
            place / "tree",
            limits=self.repository.limits,
            toolchain=self.chain,
            prepared=self.prepared,
            reports=reports,
            sandbox=self.sandbox,
            environment=self.commands.environment,
        )
        return place / "tree", run, reports


async def _bench(
    repository: Repository,
    tree: Path,
    scratch: Path,
    prepared: Path | None,
    sandbox: Sandbox | None,
) -> _Bench | str:
    """Return where a tree's commands run, or the reason why none can."""
    copy = scratch / "tree"
    try:
        chain = toolchain(repository.image)
        await asyncio.to_thread(copy_tree, tree, copy)
        commands = await asyncio.to_thread(_commands, repository, copy)
    except InvalidProject as error:
        return str(error)
    return _Bench(repository, commands, chain, copy, scratch, prepared, sandbox or Sandbox())


def _commands(repository: Repository, tree: Path) -> Commands:
    """Return the repository's commands; for Python, those that it lacks are detected."""
    given = {name: getattr(repository, name) for name in ("build", "unit", "e2e", "lint")}
    if repository.image != PYTHON:
        return Commands(**given)
    prepare_settings(tree)
    try:
        detected = python_commands(tree)
    except InvalidProject:
        if not (repository.build and repository.unit):
            raise
        return Commands(**given)
    return Commands(
        **{name: command or getattr(detected, name) for name, command in given.items()},
        static=detected.static,
        why={name: why for name, why in detected.why.items() if not given[name]},
        environment=detected.environment,
    )


def _step(run: CommandRun) -> dict[str, Any]:
    return {
        "command": run.command,
        "exit_code": run.exit_code,
        "stopped": run.stopped,
        "seconds": run.seconds,
        "tail": "" if run.ok else run.output[-TAIL_CHARACTERS:],
    }


def _coverage_of(reports: Path) -> Coverage | str:
    try:
        return read_coverage(reports) or "no Cobertura or LCOV file in $REPORTS"
    except InvalidResult as error:
        return str(error)


def _test_run(
    step: Step, found: Outcomes, base: Mapping[str, Outcome] | None, flaky: list[str]
) -> SuiteResult:
    known = base or {}
    failing = found.names("failed")
    on_base = [name for name in failing if known.get(name) == "failed"]
    excused = {*on_base, *flaky}
    failed = [name for name in failing if name not in excused]
    failures = [FailedTest(name=name, message=found.messages.get(name, "")) for name in failed]
    count = max(len(failed), found.failed - len(excused)) if failed else 0
    if step.exit_code and not failing:
        count, failures = 1, [_unexplained(step)]
    ran = {name for name, outcome in found.outcomes.items() if outcome != "skipped"}
    gone = [name for name, outcome in known.items() if outcome != "skipped" and name not in ran]
    return SuiteResult(
        **dict(step),
        passed=found.passed + len(flaky),
        failed=count,
        skipped=found.skipped,
        tests=len(found.outcomes),
        base_tests=None if base is None else len(base),
        failures=failures[:LISTED],
        failing_on_base=on_base[:LISTED],
        broken=[name for name in failed if known.get(name) == "passed"][:LISTED],
        flaky=flaky[:LISTED],
        missing=gone[:LISTED],
    )


def _unexplained(step: Step) -> FailedTest:
    """Return the failure of a run that says more than its report: code may have changed it."""
    return FailedTest(
        name="the whole run",
        message=f"exit code {step.exit_code}, though the report has no failed test: "
        f"{last_line(step.tail)}",
    )


def _no_coverage(step: Step, why: str) -> CoverageResult:
    return CoverageResult(**dict(step) | {"not_measured": why})


def _coverage_result(step: Step, found: NewCode) -> CoverageResult:
    return CoverageResult(
        **dict(step),
        percent=found.percent,
        lines=found.lines,
        covered=found.covered,
        uncovered=found.uncovered[:LISTED],
    )


def _new_findings(linted: _Linted, base: Mapping[str, int] | None) -> LintResult:
    """Return the findings that the base does not have; each of them excuses one."""
    if linted.found is None:
        return LintResult(**dict(linted.step))
    known = Counter(base or {})
    new: list[Finding] = []
    for finding in linted.found:
        key = finding_key(finding)
        if known[key] > 0:
            known[key] -= 1
        else:
            new.append(finding)
    return LintResult(
        **dict(linted.step),
        errors=sum(finding.error for finding in new),
        critical=sum(finding.critical for finding in new),
        known=len(linted.found) - len(new),
        findings=new[:LISTED],
    )


def _counted(findings: list[Finding] | None) -> dict[str, int] | None:
    return None if findings is None else dict(Counter(map(finding_key, findings)))


def not_measured(why: str, commit: str = "", base: str = "") -> Measurement:
    """Return the measurement of a commit that nothing ran on.

    Args:
        why: the reason.
        commit: what was to be measured.
        base: what it was to be compared with.
    """
    return Measurement(
        commit=commit,
        base=base,
        build=Step(not_measured=why),
        unit=SuiteResult(not_measured=why),
        e2e=SuiteResult(not_measured=why),
        coverage=CoverageResult(not_measured=why),
        lint=LintResult(not_measured=why),
        static=LintResult(not_measured=why),
    )
