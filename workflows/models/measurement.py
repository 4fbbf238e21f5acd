"""What the fleet measured of a commit, by running the repository's own commands."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workflows.models.base import Model

LISTED = 50
"""How many tests, findings or files a list names; counts are always complete."""


class Finding(Model):
    """One finding of a linter. `line`: 0 if it belongs to the whole file or project."""

    rule: str
    path: str = ""
    line: int = 0
    message: str = ""
    error: bool = True
    critical: bool = False

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule} {self.message}"


class Step(Model):
    """One dimension: what ran for it, and how it ended.

    Attributes:
        command: empty if nothing ran.
        exit_code: None if nothing ran, or if it was stopped at the limit that `stopped` names.
        tail: the end of the output, if it failed.
        not_measured: why there is no result; empty if there is one. It never counts as passed.
    """

    command: str = ""
    exit_code: int | None = None
    stopped: str = ""
    seconds: float = 0.0
    tail: str = ""
    not_measured: str = ""

    @property
    def ran(self) -> bool:
        """Whether it ran to its end with exit code 0."""
        return not self.not_measured and self.exit_code == 0


class FailedTest(Model):
    """A test that failed, and the first line of the reason."""

    name: str
    message: str = ""


class SuiteResult(Step):
    """A run of tests, counted from JUnit XML.

    Attributes:
        failed: without those that also fail on the base, as is `failures`.
        failing_on_base: tests that fail, and failed on the base: not held against the change.
        broken: tests that passed on the base and fail now; a change with one is barred.
        flaky: tests that failed, and passed when they ran once more: they count as passed.
        missing: tests that the base has and this run has not.
        tests: how many there are, with skipped ones.
        base_tests: how many the base has; None if it was not measured.
    """

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    tests: int = 0
    base_tests: int | None = None
    failures: list[FailedTest] = []
    failing_on_base: list[str] = []
    broken: list[str] = []
    flaky: list[str] = []
    missing: list[str] = []

    @property
    def ok(self) -> bool:
        """Whether it was measured, something passed, and nothing failed that counts."""
        return not self.not_measured and self.passed > 0 and self.failed == 0


class CoverageResult(Step):
    """The coverage of the code that the change adds; of all code, where there is no base.

    Attributes:
        lines: the new lines that can be covered.
        uncovered: files with their new lines that no test reaches.
    """

    percent: float = Field(default=0.0, ge=0, le=100)
    lines: int = 0
    covered: int = 0
    uncovered: list[str] = []


class LintResult(Step):
    """Findings of a linter, from SARIF, that the base does not have.

    Attributes:
        errors: how many of them are errors.
        critical: how many of them concern security or code that cannot work.
        known: how many findings the base has too.
    """

    errors: int = 0
    critical: int = 0
    known: int = 0
    findings: list[Finding] = []


class Measurement(Model):
    """Everything that was measured of a commit.

    Attributes:
        commit: empty for a folder that is not under version control.
        base: the commit that it was compared with; empty if there is none.
        static: the fleet's own analysis of Python; for other languages what `lint` found.
    """

    commit: str = ""
    base: str = ""
    build: Step
    unit: SuiteResult
    e2e: SuiteResult
    coverage: CoverageResult
    lint: LintResult
    static: LintResult
    seconds: float = 0.0

    @property
    def broken(self) -> list[str]:
        """The tests that passed on the base and fail now: they bar the change."""
        return [*self.unit.broken, *self.e2e.broken]


class BaseResults(Model):
    """What a change is compared with: the results of its base.

    Attributes:
        unit: outcome of each test by its name; None if it was not measured, as are all others.
        lint: how often each finding occurs, by finding_key.
        complete: False if a command was stopped at a limit, so that another run may say more.
    """

    commit: str = ""
    unit: dict[str, Literal["passed", "failed", "skipped"]] | None = None
    e2e: dict[str, Literal["passed", "failed", "skipped"]] | None = None
    lint: dict[str, int] | None = None
    static: dict[str, int] | None = None
    complete: bool = True


def finding_key(finding: Finding) -> str:
    """Return what a finding has in common with the same one of another commit: not its line."""
    return f"{finding.path}\n{finding.rule}\n{finding.message}"
