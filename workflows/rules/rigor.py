"""Rigor: the strictness levels from deploy/config/rigor.yaml, and the scores of reports.

Pure. A failed build or a failed unit run scores 0; otherwise each dimension scores 0 to 100 against
its threshold, and the report's score is their weighted sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from workflows.models.base import Rigor
from workflows.models.process import RigorLevel
from workflows.models.report import ReportScore, WorkspaceReport

PASS = 90
WARN = 70
"""Points from which a report passes, and from which it warns; fewer points block."""

LEVELS: tuple[str, ...] = get_args(Rigor)
DIMENSIONS = ("build", "unit", "static", "e2e", "coverage", "lint")


class InvalidRigor(ValueError):
    """The document is not a valid rigor.yaml. `problems`: each names the place and the rule."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


_Share = Annotated[float, Field(ge=0, le=1)]
_Rate = Annotated[float, Field(gt=0, le=1)]
_Limit = Annotated[int, Field(ge=0, strict=True)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Weights(_Part):
    build: _Share
    unit: _Share
    static: _Share
    e2e: _Share
    coverage: _Share
    lint: _Share


class _Level(_Part):
    dor_threshold: Annotated[int, Field(ge=0, le=100, strict=True)]
    weights: _Weights
    unit_pass_rate: _Rate
    coverage: Annotated[float, Field(gt=0, le=100)]
    quality_gates: Annotated[list[Literal["OK", "WARN", "ERROR", "NONE"]], Field(min_length=1)]
    max_critical: _Limit
    max_major: _Limit | None
    e2e_pass_rate: _Rate
    max_lint_errors: _Limit


class _Document(_Part):
    L0: _Level
    L1: _Level
    L2: _Level
    L3: _Level


def parse_rigor(document: dict[str, Any]) -> dict[str, RigorLevel]:
    """Parse the content of a rigor.yaml into the levels L0 to L3.

    Raises:
        InvalidRigor: names every field that is missing, unknown or out of range, and then every
            level whose weights do not sum to 1.
    """
    try:
        content = _Document.model_validate(document).model_dump()
    except ValidationError as error:
        raise InvalidRigor(
            [
                f"{'.'.join(str(part) for part in problem['loc']) or 'the document'}: "
                f"{_REMEDIES.get(problem['type'], problem['msg'])}"
                for problem in error.errors(include_url=False, include_input=False)
            ]
        ) from None
    levels = {name: RigorLevel.model_validate(level) for name, level in content.items()}
    problems = [
        f"{name}.weights: sum to {total:g}; they must sum to 1"
        for name, level in levels.items()
        if not math.isclose(total := math.fsum(level.weights.values()), 1, abs_tol=1e-9)
    ]
    if problems:
        raise InvalidRigor(problems)
    return levels


_REMEDIES = {"missing": "required; add it", "extra_forbidden": "unknown key; remove or correct it"}


def score_report(level: RigorLevel, rigor: str, report: WorkspaceReport) -> ReportScore:
    """Score `report` by `level`, which is named `rigor`, with a reason for each lost point."""
    failed = [
        f"{name}: failed{result.why and f' ({result.why})'}; nothing else counts until it is ok"
        for name, result in (("build", report.build), ("unit", report.unit))
        if not result.ok
    ]
    if failed:
        return ReportScore(
            score=0,
            rigor=rigor,
            gating_decision="block",
            dimensions=dict.fromkeys(DIMENSIONS, 0.0),
            reasons=failed,
            notes=report.notes,
        )
    dimensions = dict.fromkeys(DIMENSIONS, 100.0)
    reasons: list[str] = []
    for name, points, reason in _measured(level, report):
        dimensions[name] = points
        if points < 100:
            reasons.append(f"{name}: {reason}: {points:.4g} of 100 points")
    score = round(math.fsum(level.weights[name] * dimensions[name] for name in DIMENSIONS))
    return ReportScore(
        score=score,
        rigor=rigor,
        gating_decision="pass" if score >= PASS else "warn" if score >= WARN else "block",
        dimensions=dimensions,
        reasons=reasons,
        notes=report.notes,
    )


def _measured(level: RigorLevel, report: WorkspaceReport) -> Iterator[tuple[str, float, str]]:
    """Yield each dimension except the build, its points, and the measured value and threshold."""
    unit, static, e2e = report.unit, report.static, report.e2e
    yield "unit", *_tests(unit.passed, unit.failed, level.unit_pass_rate)
    yield "static", *_static(level, report)
    # A run that is not ok counts as at least one failure; without tests there was no run.
    e2e_failed = max(e2e.failed, 1) if e2e.passed and not e2e.ok else e2e.failed
    yield "e2e", *_tests(e2e.passed, e2e_failed, level.e2e_pass_rate)
    yield (
        "coverage",
        _reached(unit.coverage, level.coverage),
        f"{unit.coverage:.4g} % of the new code is covered, the threshold is {level.coverage:g} %",
    )
    if static.lint_errors is None:
        yield "lint", 100.0 if static.ok else 0.0, "no linter ran and the static analysis is not ok"
    else:
        yield (
            "lint",
            _within(static.lint_errors, level.max_lint_errors),
            f"{static.lint_errors} errors, the limit is {level.max_lint_errors}",
        )


def _tests(passed: int, failed: int, pass_rate: float) -> tuple[float, str]:
    if passed + failed == 0:
        return 0.0, "none, no tests ran"
    rate = passed / (passed + failed)
    return (
        _reached(rate, pass_rate),
        f"{passed} of {passed + failed} tests passed ({100 * rate:.4g} %), "
        f"the threshold is {100 * pass_rate:g} %",
    )


def _static(level: RigorLevel, report: WorkspaceReport) -> tuple[float, str]:
    sonar = report.static.sonar
    if sonar.quality_gate not in level.quality_gates:
        allowed = " or ".join(level.quality_gates)
        return 0.0, f"the quality gate is {sonar.quality_gate}, the threshold is {allowed}"
    limits = [("critical", sonar.new_critical, level.max_critical)]
    if level.max_major is not None:
        limits.append(("major", sonar.new_major, level.max_major))
    return (
        min(_within(found, limit) for _, found, limit in limits),
        ", ".join(
            f"{found} new {severity} issues, the limit is {limit}"
            for severity, found, limit in limits
            if found > limit
        ),
    )


def _reached(measured: float, threshold: float) -> float:
    """Return 100 from the threshold on; below it, the percentage of the threshold."""
    return 100.0 if measured >= threshold else 100 * measured / threshold


def _within(count: int, limit: int) -> float:
    """Return 100 up to the limit; above it, the limit as a percentage of the count."""
    return 100.0 if count <= limit else 100 * limit / count
