"""Workspace reports from measurements: what was not measured never counts as passed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from activities.workspace.results import last_line
from workflows.models.measurement import LintResult, Measurement, Step, SuiteResult
from workflows.models.report import (
    BuildResult,
    E2EResult,
    SonarResult,
    StaticResult,
    Timings,
    UnitResult,
    WorkspaceReport,
)

OK_WITH_MAJOR = 10
"""Major findings up to which the quality gate is OK; more are WARN, a critical one is ERROR."""

MEASURED_BY_FLEET = "fleet"


def workspace_report(
    measurement: Measurement,
    job_id: str,
    project: str,
    measured_by: str = MEASURED_BY_FLEET,
    notes: Sequence[str] = (),
) -> WorkspaceReport:
    """Return the report of a measurement, which rigor scores.

    Args:
        measurement: what the fleet measured.
        job_id: the report's.
        project: the name of what was measured.
        measured_by: empty if a person sends the report.
        notes: what a person has to look at.
    """
    build, unit, e2e = measurement.build, measurement.unit, measurement.e2e
    return WorkspaceReport(
        job_id=job_id,
        commit=measurement.commit,
        measured_by=measured_by,
        build=BuildResult(ok=build.ran, why="" if build.ran else _why(build)),
        unit=UnitResult(
            ok=unit.ok,
            passed=unit.passed,
            failed=unit.failed,
            coverage=measurement.coverage.percent,
            why="" if unit.ok else _first_failure(unit),
        ),
        static=_static(measurement, project),
        e2e=E2EResult(ok=e2e.ok, passed=e2e.passed, failed=e2e.failed),
        timings=Timings(total_ms=round(1000 * measurement.seconds)),
        notes=list(notes),
    )


def _static(measurement: Measurement, project: str) -> StaticResult:
    static, lint = measurement.static, measurement.lint
    gate = _quality_gate(static)
    return StaticResult(
        # Without a linter's count, this decides: what was not measured has not passed.
        ok=gate in ("OK", "WARN") and not lint.not_measured,
        sonar=SonarResult(
            project_key=project,
            quality_gate=gate,
            new_critical=static.critical,
            new_major=static.errors - static.critical,
        ),
        lint_errors=None if lint.not_measured else lint.errors,
    )


def _quality_gate(static: LintResult) -> Literal["OK", "WARN", "ERROR", "NONE"]:
    if static.not_measured:
        return "NONE"
    if static.critical:
        return "ERROR"
    return "WARN" if static.errors - static.critical > OK_WITH_MAJOR else "OK"


def _why(step: Step) -> str:
    if step.not_measured:
        return f"not measured: {step.not_measured}"[:1000]
    return step.stopped or last_line(step.tail) or f"exit code {step.exit_code}"


def _first_failure(tests: SuiteResult) -> str:
    if tests.not_measured:
        return _why(tests)
    if not tests.failures:
        return "no test passed"
    first = tests.failures[0]
    return f"{first.name}: {first.message}"[:600]
