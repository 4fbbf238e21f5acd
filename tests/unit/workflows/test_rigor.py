"""Rigor: thresholds from YAML, and the score that they give a workspace report."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from workflows.models.report import ReportScore, WorkspaceReport
from workflows.rules.rigor import DIMENSIONS, LEVELS, InvalidRigor, parse_rigor, score_report

DOCUMENT: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parents[3] / "deploy/config/rigor.yaml").read_text()
)
RIGOR = parse_rigor(DOCUMENT)


def report(**changes: Any) -> WorkspaceReport:
    """Return a perfect report except for `changes`, which are written as `unit__failed=1`."""
    document: dict[str, Any] = {
        "job_id": "job-1",
        "build": {"ok": True},
        "unit": {"ok": True, "passed": 20, "failed": 0, "coverage": 100.0},
        "static": {
            "ok": True,
            "sonar": {"quality_gate": "OK", "new_critical": 0, "new_major": 0},
            "lint_errors": 0,
        },
        "e2e": {"ok": True, "passed": 10, "failed": 0},
    }
    for path, value in changes.items():
        *steps, last = path.split("__")
        place = document
        for step in steps:
            place = place[step]
        place[last] = value
    return WorkspaceReport.model_validate(document)


def scored(level: str, **changes: Any) -> ReportScore:
    return score_report(RIGOR[level], level, report(**changes))


counts = st.integers(0, 50)
percents = st.floats(0, 100)
REPORTS = st.fixed_dictionaries(
    {
        "build__ok": st.booleans(),
        "unit__ok": st.booleans(),
        "unit__passed": counts,
        "unit__failed": counts,
        "unit__coverage": percents,
        "static__ok": st.booleans(),
        "static__sonar__quality_gate": st.sampled_from(["OK", "WARN", "ERROR", "NONE"]),
        "static__sonar__new_critical": counts,
        "static__sonar__new_major": counts,
        "static__lint_errors": st.none() | counts,
        "e2e__ok": st.booleans(),
        "e2e__passed": counts,
        "e2e__failed": counts,
    }
)


# --- the shipped levels ---------------------------------------------------------------------------


def test_the_shipped_levels_are_the_design_s_table() -> None:
    table = {
        name: [
            level.dor_threshold,
            [level.weights[dimension] for dimension in DIMENSIONS],
            level.unit_pass_rate,
            level.coverage,
            " ".join(sorted(level.quality_gates)),
            level.max_critical,
            level.max_major,
            level.e2e_pass_rate,
            level.max_lint_errors,
        ]
        for name, level in RIGOR.items()
    }

    assert table == {
        "L0": [50, [0.40, 0.30, 0.10, 0.10, 0.05, 0.05], 0.70, 50, "OK WARN", 999, None, 0.60, 20],
        "L1": [75, [0.35, 0.25, 0.20, 0.10, 0.05, 0.05], 0.95, 70, "OK", 5, 20, 0.85, 5],
        "L2": [85, [0.30, 0.25, 0.25, 0.12, 0.05, 0.03], 0.98, 80, "OK", 2, 10, 0.95, 2],
        "L3": [90, [0.25, 0.25, 0.30, 0.15, 0.03, 0.02], 1.0, 90, "OK", 0, 5, 1.0, 0],
    }  # fmt: skip


FAULTS: dict[str, tuple[Any, str]] = {
    "a level that is missing": (lambda d: d.pop("L2"), r"^L2: required; add it"),
    "a fifth level": (lambda d: d.update(L4=d["L3"]), r"^L4: unknown key"),
    "an unknown key": (lambda d: d["L1"].update(coverag=1), r"^L1.coverag: unknown key"),
    "a key that is missing": (lambda d: d["L1"].pop("max_major"), r"^L1.max_major: required"),
    "a weight that is missing": (lambda d: d["L1"]["weights"].pop("e2e"), r"^L1.weights.e2e: req"),
    "weights of 1.05": (
        lambda d: d["L1"]["weights"].update(lint=0.10),
        r"^L1.weights: sum to 1.05; they must sum to 1",
    ),
    "a negative weight": (
        lambda d: d["L0"]["weights"].update(lint=-0.05),
        r"^L0.weights.lint: Input should be greater than or equal to 0",
    ),
    "a threshold above 100": (
        lambda d: d["L3"].update(dor_threshold=101),
        r"^L3.dor_threshold: Input should be less than or equal to 100",
    ),
    "a pass rate in percent": (
        lambda d: d["L3"].update(unit_pass_rate=95),
        r"^L3.unit_pass_rate: Input should be less than or equal to 1",
    ),
    "a coverage of more than all": (
        lambda d: d["L3"].update(coverage=100.5),
        r"^L3.coverage: Input should be less than or equal to 100",
    ),
    "a coverage of nothing": (
        lambda d: d["L3"].update(coverage=0),
        r"^L3.coverage: Input should be greater than 0",
    ),
    "a negative limit": (
        lambda d: d["L3"].update(max_critical=-1),
        r"^L3.max_critical: Input should be greater than or equal to 0",
    ),
    "an unknown quality gate": (
        lambda d: d["L3"].update(quality_gates=["GREEN"]),
        r"^L3.quality_gates.0: Input should be 'OK'",
    ),
    "no quality gate": (lambda d: d["L3"].update(quality_gates=[]), r"^L3.quality_gates: List"),
    "text for a number": (lambda d: d["L3"].update(coverage="high"), r"^L3.coverage: Input"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_document_is_refused(fault: str) -> None:
    document = copy.deepcopy(DOCUMENT)
    change, reason = FAULTS[fault]
    change(document)

    with pytest.raises(InvalidRigor) as refusal:
        parse_rigor(document)

    assert re.search(reason, "\n".join(refusal.value.problems), re.MULTILINE)


def test_every_faulty_field_is_named_at_once() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["L0"]["coverage"] = 0
    document["L3"]["max_major"] = "none"

    with pytest.raises(InvalidRigor) as refusal:
        parse_rigor(document)

    assert [problem.split(":")[0] for problem in refusal.value.problems] == [
        "L0.coverage",
        "L3.max_major",
    ]


@pytest.mark.parametrize("document", [{}, [], None, "L1"])
def test_an_invalid_rigor_is_refused(document: Any) -> None:
    with pytest.raises(InvalidRigor):
        parse_rigor(document)


# --- the score of a report ------------------------------------------------------------------------


def test_the_shipped_document_is_consistent() -> None:
    assert parse_rigor(DOCUMENT) == RIGOR


@pytest.mark.parametrize("level", LEVELS)
def test_a_perfect_report_is_worth_100_at_each_rigor(level: str) -> None:
    perfect = scored(level)

    assert perfect == ReportScore(
        score=100,
        rigor=level,
        gating_decision="pass",
        dimensions=dict.fromkeys(DIMENSIONS, 100.0),
        reasons=[],
    )


@pytest.mark.parametrize("failed", ["build", "unit"])
def test_a_failed_build_or_unit_run_scores_zero(failed: str) -> None:
    score = scored("L0", **{f"{failed}__ok": False})

    assert (score.score, score.gating_decision) == (0, "block")
    assert set(score.dimensions.values()) == {0}
    assert [reason.split(":")[0] for reason in score.reasons] == [failed]


@pytest.mark.parametrize(
    ("changes", "dimension", "points", "reason"),
    [
        (
            {"unit__failed": 20},
            "unit",
            100 * 0.5 / 0.95,
            "20 of 40 tests passed (50 %), the threshold is 95 %",
        ),
        ({"unit__passed": 0}, "unit", 0, "no tests ran"),
        ({"unit__coverage": 35.0}, "coverage", 50, "35 % of the new code is covered"),
        ({"e2e__failed": 10}, "e2e", 100 * 0.5 / 0.85, "10 of 20 tests passed (50 %)"),
        ({"e2e__passed": 0}, "e2e", 0, "none, no tests ran"),
        ({"e2e__ok": False, "e2e__passed": 0}, "e2e", 0, "none, no tests ran"),
        ({"e2e__ok": False, "e2e__passed": 1}, "e2e", 100 * 0.5 / 0.85, "1 of 2 tests passed"),
        ({"static__sonar__quality_gate": "WARN"}, "static", 0, "the quality gate is WARN"),
        ({"static__sonar__new_critical": 10}, "static", 50, "10 new critical issues"),
        ({"static__sonar__new_major": 80}, "static", 25, "80 new major issues"),
        ({"static__lint_errors": 20}, "lint", 25, "20 errors, the limit is 5"),
        ({"static__lint_errors": None, "static__ok": False}, "lint", 0, "no linter ran"),
    ],
)
def test_a_dimension_below_its_threshold_gets_its_share_and_a_reason(
    changes: dict[str, Any], dimension: str, points: float, reason: str
) -> None:
    score = scored("L1", **changes)

    others = {name: value for name, value in score.dimensions.items() if name != dimension}
    assert score.dimensions[dimension] == pytest.approx(points)
    assert set(others.values()) == {100}
    assert score.score == round(100 - RIGOR["L1"].weights[dimension] * (100 - points))
    [reason_found] = score.reasons
    assert reason_found.startswith(f"{dimension}: ")
    assert reason in reason_found


def test_the_more_severe_of_critical_and_major_counts() -> None:
    both = {"static__sonar__new_critical": 10, "static__sonar__new_major": 80}

    assert scored("L1", **both).dimensions["static"] == 25


def test_only_what_is_over_its_limit_is_a_reason() -> None:
    at_the_limit = {"static__sonar__new_critical": 5, "static__sonar__new_major": 40}

    [reason] = scored("L1", **at_the_limit).reasons

    assert reason == "static: 40 new major issues, the limit is 20: 50 of 100 points"


def test_a_limit_of_none_does_not_limit_and_a_limit_of_zero_allows_nothing() -> None:
    assert scored("L0", static__sonar__new_major=10_000).score == 100
    assert scored("L3", static__lint_errors=1).dimensions["lint"] == 0


def test_without_a_linter_the_static_analysis_stands_for_it() -> None:
    assert scored("L3", static__lint_errors=None).score == 100


@pytest.mark.parametrize(
    ("coverage", "score", "decision"),
    [(90.0, 90, "pass"), (89.4, 89, "warn"), (70.0, 70, "warn"), (69.4, 69, "block")],
)
def test_ninety_passes_seventy_warns_and_less_blocks(
    coverage: float, score: int, decision: str
) -> None:
    all_on_coverage = RIGOR["L3"].model_copy(
        update={"coverage": 100.0, "weights": dict.fromkeys(DIMENSIONS, 0.0) | {"coverage": 1.0}}
    )

    found = score_report(all_on_coverage, "L3", report(unit__coverage=coverage))

    assert (found.score, found.gating_decision) == (score, decision)


@given(st.sampled_from(LEVELS), REPORTS)
def test_a_score_is_0_to_100_and_every_lost_point_has_a_reason(
    level: str, changes: dict[str, Any]
) -> None:
    score = scored(level, **changes)

    assert 0 <= score.score <= 100
    assert set(score.dimensions) == set(DIMENSIONS)
    assert all(0 <= points <= 100 for points in score.dimensions.values())
    if report(**changes).build.ok and report(**changes).unit.ok:
        lost = {name for name, points in score.dimensions.items() if points < 100}
        assert lost == {reason.split(":")[0] for reason in score.reasons}


BETTER: dict[str, Any] = {
    "build__ok": lambda v: True,
    "unit__ok": lambda v: True,
    "unit__passed": lambda v: v + 1,
    "unit__failed": lambda v: max(0, v - 1),
    "unit__coverage": lambda v: min(100, v + 1),
    "static__ok": lambda v: True,
    "static__sonar__quality_gate": lambda v: {"ERROR": "WARN", "NONE": "WARN"}.get(v, "OK"),
    "static__sonar__new_critical": lambda v: max(0, v - 1),
    "static__sonar__new_major": lambda v: max(0, v - 1),
    "static__lint_errors": lambda v: None if v is None else max(0, v - 1),
    "e2e__ok": lambda v: True,
    "e2e__passed": lambda v: v + 1,
    "e2e__failed": lambda v: max(0, v - 1),
}


@given(st.sampled_from(LEVELS), REPORTS, st.sampled_from(sorted(BETTER)))
def test_a_better_measure_never_lowers_the_score(
    level: str, changes: dict[str, Any], measure: str
) -> None:
    better = changes | {measure: BETTER[measure](changes[measure])}

    assert scored(level, **better).score >= scored(level, **changes).score


def test_notes_are_passed_on_and_do_not_count() -> None:
    notes = ["changed test configuration: conftest.py"]

    for unit_ok in (True, False):
        noted = scored("L3", unit__ok=unit_ok, notes=notes)
        assert noted.notes == notes
        assert noted.model_copy(update={"notes": []}) == scored("L3", unit__ok=unit_ok)
