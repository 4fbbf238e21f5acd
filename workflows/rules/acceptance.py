"""Which acceptance criteria are proved, by tests that fail on the base and pass on the branch.

Pure. What was not run never counts as passed, and never as failed either: it proves nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from workflows.models.acceptance import (
    Acceptance,
    AcceptanceRuns,
    AcceptanceTest,
    Criterion,
    Status,
)

LISTED = 5
"""How many tests of a criterion are kept: those that decide come first."""

FILES_LISTED = 50

_SEPARATOR = "::"
"""Between the parts of a test's name, as activities/workspace/junit.py writes it."""

_NAMED = re.compile(r"(?:(?<![A-Za-z0-9])[Aa]|(?<=[a-z0-9])A)[Cc][ _-]?0*([0-9]{1,3})(?![0-9])")
"""`ac1`, `ac_1`, `AC-1`, and `AC1` within a name such as `TestAC1Refuses`."""

FAILING: tuple[Status, ...] = ("failed", "error")

Run = Mapping[str, Literal["passed", "failed", "skipped"]]
"""The outcome of each test of a run, by its name."""


def numbered(texts: Sequence[str]) -> str:
    """Return the criteria with the numbers that tests name them by."""
    return "\n".join(f"AC-{number}: {text}" for number, text in enumerate(texts, 1))


def named(test: str, criteria: int) -> list[int]:
    """Return the numbers of the criteria that a test's own name bears.

    Args:
        test: its name; what is before the last `::` is that of its file or class.
        criteria: how many there are; other numbers name none.
    """
    numbers = {int(found) for found in _NAMED.findall(test.rpartition(_SEPARATOR)[2])}
    return sorted(number for number in numbers if 1 <= number <= criteria)


def status(test: str, run: Run | None, other_run: Run | None) -> tuple[Status, str]:
    """Return the outcome of a test, and the name of the failure if it did not load.

    A test that is missing did not load if its file or package failed as a whole: such a failure has
    their name, or stands in the place of the tests, and is only in this run.

    Args:
        test: its name.
        run: on one of the two commits; None: there was none.
        other_run: on the other one.
    """
    if run is None:
        return "not run", ""
    if test in run:
        return run[test], ""
    for other, outcome in run.items():
        if outcome == "failed" and other not in (other_run or {}) and _whole(other, test):
            return "error", other
    return "missing", ""


def _whole(failure: str, test: str) -> bool:
    """Return whether a failure is that of a test's whole file or package, by their names.

    It has the name of the file (pytest), or stands beside its tests (Go, Node), where the names of
    tests may have those of groups before them.
    """
    place, beside = test.rpartition(_SEPARATOR)[0], failure.rpartition(_SEPARATOR)[0]
    if place == failure or place.startswith((f"{failure}.", f"{failure}{_SEPARATOR}")):
        return True
    return bool(beside) and (place == beside or place.endswith(f"{_SEPARATOR}{beside}"))


def judged(texts: Sequence[str], runs: AcceptanceRuns) -> Acceptance:
    """Return each criterion with its tests, and whether it is proved.

    Args:
        texts: the criteria, in the story's order.
        runs: what was run.
    """
    return Acceptance(
        base=runs.base,
        commit=runs.commit,
        criteria=[
            _criterion(number, text, [t for t in runs.tests if number in t.criteria], runs.not_run)
            for number, text in enumerate(texts, 1)
        ],
        changed_tests=runs.changed_tests[:FILES_LISTED],
        not_run=runs.not_run,
    )


def not_tested(texts: Sequence[str], base: str, commit: str, why: str) -> Acceptance:
    """Return the criteria as not proved, because nothing was run.

    Args:
        texts: the criteria.
        base: the branch's.
        commit: its head.
        why: the reason.
    """
    return judged(texts, AcceptanceRuns(base=base, commit=commit, not_run=[why]))


def _criterion(
    number: int, text: str, tests: Sequence[AcceptanceTest], not_run: Sequence[str]
) -> Criterion:
    why = _why_not_proved(tests, not_run)
    return Criterion(number=number, text=text, proved=not why, why=why, tests=listed(tests))


def _why_not_proved(tests: Sequence[AcceptanceTest], not_run: Sequence[str]) -> str:
    """Return why a criterion is not proved by its tests; empty if it is."""
    failing = [test.name for test in tests if test.after in FAILING]
    if failing:
        return f"{failing[0]} fails on the branch"
    if any(test.proves for test in tests):
        return ""
    if not tests:
        return "; ".join(["no test names it", *not_run])
    if any(test.before == "not run" for test in tests):
        return "; ".join(["its tests were not run on the base", *not_run])
    if any(test.before == test.after == "passed" for test in tests):
        return "its tests pass on the base too"
    return "none of its tests fails on the base and passes on the branch"


def evidence(acceptance: Acceptance) -> list[tuple[str, str, str, str, str, str]]:
    """Return the rows of a table: number, criterion, test, before, after, and the verdict.

    A criterion has a row for each of its tests; the first one also has number, text and verdict.
    """
    rows = []
    for criterion in acceptance.criteria:
        name = (f"AC-{criterion.number}", criterion.text)
        verdict = "proved" if criterion.proved else f"not proved: {criterion.why}"
        tests = [(test.name, test.before, test.after) for test in criterion.tests]
        for number, test in enumerate(tests or [("none", "", "")]):
            rows.append(("", "", *test, "") if number else (*name, *test, verdict))
    return rows


def listed(tests: Iterable[AcceptanceTest]) -> list[AcceptanceTest]:
    """Return the first LISTED tests: those that fail on the branch, then those that prove."""
    by_weight = sorted(tests, key=lambda test: (test.after not in FAILING, not test.proves))
    return by_weight[:LISTED]
