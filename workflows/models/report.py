"""Workspace reports: what was measured of a branch, and its score."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workflows.models.access import Proof
from workflows.models.base import Count, Line, Model, Request, Section


class BuildResult(Section):
    """The result of the workspace's build. `why`: what failed, in one line."""

    ok: bool
    why: str = Field(default="", max_length=1000)


class UnitResult(Section):
    """The results of the unit tests.

    Attributes:
        coverage: coverage of the new code, in percent.
        why: the first failure, in one line.
    """

    ok: bool
    passed: Count
    failed: Count
    coverage: float = Field(ge=0, le=100)
    why: str = Field(default="", max_length=1000)


class SonarResult(Section):
    """The findings of static analysis in the new code."""

    project_key: str = ""
    quality_gate: Literal["OK", "WARN", "ERROR", "NONE"]
    new_critical: Count
    new_major: Count


class StaticResult(Section):
    """The results of static analysis and linting.

    Attributes:
        lint_errors: None if no linter ran; `ok` then decides.
    """

    ok: bool
    sonar: SonarResult
    lint_errors: Count | None = None


class E2EResult(Section):
    """The results of the end-to-end tests; both counts are 0 if there are none."""

    ok: bool
    passed: Count
    failed: Count


class PRResult(Section):
    """The pull request, if there is one."""

    url: str = ""


class Timings(Section):
    """The time that the workspace took."""

    total_ms: Count = 0


class WorkspaceReport(Request):
    """The measurements of a workspace: bridge/grpc/protos/workspace.proto as JSON.

    Attributes:
        commit: what was measured; a story requires it, and one in a repository requires 7 to 40
            hexadecimal digits. Histories have other texts.
        actor: who sends it to a story, which requires it.
        measured_by: `fleet` if the story measured it by itself; empty: its actor did. Refused in
            what a person sends.
        notes: what a person has to look at, such as changed tests; they do not count.
    """

    job_id: Line
    commit: str = Field(default="", max_length=200)
    actor: str = Field(default="", max_length=200)
    proof: Proof = ""
    measured_by: str = Field(default="", max_length=200)
    build: BuildResult
    unit: UnitResult
    static: StaticResult
    e2e: E2EResult
    pr: PRResult = PRResult()
    timings: Timings = Timings()
    notes: list[Line] = Field(default=[], max_length=20)


class ReportScore(Model):
    """The score of a workspace report by rigor. `score`: 0 to 100; `notes`: the report's."""

    score: int
    rigor: str
    gating_decision: Literal["pass", "warn", "block"]
    dimensions: dict[str, float] = {}
    reasons: list[str] = []
    notes: list[str] = []
