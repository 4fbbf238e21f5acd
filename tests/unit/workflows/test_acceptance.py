"""Which criteria tests prove: names of tests, their outcomes before and after, and the verdict."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workflows.models.acceptance import AcceptanceRuns, AcceptanceTest, Status
from workflows.rules.acceptance import LISTED, evidence, judged, named, not_tested, status

STATUSES = st.sampled_from(get_args(Status))
TESTS = st.builds(
    AcceptanceTest,
    name=st.text("abc", min_size=1, max_size=3),
    criteria=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    before=STATUSES,
    after=STATUSES,
)
TEXTS = ["two and three are five", "zero and zero are zero", "a text is refused"]


def runs(*tests: AcceptanceTest, **fields: Any) -> AcceptanceRuns:
    return AcceptanceRuns(base="b" * 40, commit="c" * 40, tests=list(tests), **fields)


@pytest.mark.parametrize(
    ("test", "numbers"),
    [
        ("tests.test_sum::test_ac1_adds", [1]),
        ("tests.test_sum::test_ac_1", [1]),
        ("tests.test_sum::test_AC_02_refuses", [2]),
        ("tests.test_sum.TestSum::test_it_adds[ac3-x]", [3]),
        ("example.com/sum::TestAC1Adds", [1]),
        ("example.com/sum::TestAc2", [2]),
        ("sum::AC-1: adds two numbers", [1]),
        ("sum::adds (ac 3)", [3]),
        ("tests.test_sum::test_ac1_and_ac2", [1, 2]),
        ("tests.test_sum::test_ac12", []),
        ("tests.test_sum::test_ac0", []),
        ("tests.test_ac1::test_adds", []),
        ("tests.test_sum::test_mac1", []),
        ("tests.test_sum::test_MAC1", []),
        ("tests.test_sum::test_ac", []),
        ("test_ac1", [1]),
    ],
)
def test_a_test_names_criteria_in_its_own_name(test: str, numbers: list[int]) -> None:
    assert named(test, 3) == numbers


@pytest.mark.parametrize(
    ("test", "run", "other", "expected"),
    [
        ("t.a::ac1", {"t.a::ac1": "passed"}, {}, ("passed", "")),
        ("t.a::ac1", {"t.a::ac1": "skipped"}, {}, ("skipped", "")),
        ("t.a::ac1", None, {}, ("not run", "")),
        ("t.a::ac1", {"t.b::x": "failed"}, {}, ("missing", "")),
        ("t.a::ac1", {"t.a": "failed"}, {}, ("error", "t.a")),
        ("t.a.TestA::ac1", {"t.a": "failed"}, {}, ("error", "t.a")),
        ("t.ab::ac1", {"t.a": "failed"}, {}, ("missing", "")),
        ("go/sum::TestAC1", {"go/sum::[build]": "failed"}, {}, ("error", "go/sum::[build]")),
        ("sum::test::ac1", {"test::/a.js": "failed"}, {}, ("error", "test::/a.js")),
        ("sum::test::ac1", {"more::test::x": "failed"}, {}, ("missing", "")),
        ("t.a::ac1", {"t.a::x": "failed"}, {"t.a::x": "passed"}, ("missing", "")),
        ("t.a::ac1", {"t.a": "passed"}, {}, ("missing", "")),
        ("ac1", {"x": "failed"}, {}, ("missing", "")),
    ],
)
def test_a_missing_test_did_not_load_if_its_file_or_package_failed(
    test: str, run: Any, other: Any, expected: tuple[str, str]
) -> None:
    assert status(test, run, other) == expected


@given(st.lists(TESTS, max_size=8))
def test_a_criterion_is_proved_by_a_test_that_is_red_then_green_and_by_nothing_else(
    tests: list[AcceptanceTest],
) -> None:
    for criterion in judged(TEXTS, runs(*tests)).criteria:
        mine = [test for test in tests if criterion.number in test.criteria]
        red_then_green = [
            test for test in mine if test.before in ("failed", "error") and test.after == "passed"
        ]
        fails = [test for test in mine if test.after in ("failed", "error")]

        assert criterion.proved == (bool(red_then_green) and not fails)
        assert bool(criterion.why) == (not criterion.proved)


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("passed", "passed", "its tests pass on the base too"),
        ("failed", "failed", "test_ac1 fails on the branch"),
        ("error", "error", "test_ac1 fails on the branch"),
        ("not run", "passed", "its tests were not run on the base; unit tests on the base: slow"),
        ("missing", "passed", "none of its tests fails on the base and passes on the branch"),
        ("failed", "skipped", "none of its tests fails on the base and passes on the branch"),
    ],
)
def test_what_is_not_proved_says_why(before: Status, after: Status, why: str) -> None:
    test = AcceptanceTest(name="test_ac1", criteria=[1], before=before, after=after)

    found = judged(TEXTS, runs(test, not_run=["unit tests on the base: slow"]))

    assert found.criteria[0].why == why
    assert found.proved == 0


def test_of_many_tests_those_that_decide_are_kept() -> None:
    passing = [
        AcceptanceTest(name=f"ac1_{n}", criteria=[1], before="passed", after="passed")
        for n in range(2 * LISTED)
    ]
    proof = AcceptanceTest(name="ac1_new", criteria=[1], before="failed", after="passed")

    (criterion,) = judged(TEXTS[:1], runs(*passing, proof)).criteria

    assert criterion.proved
    assert len(criterion.tests) == LISTED
    assert criterion.tests[0] == proof


def test_the_table_has_a_row_for_each_test_and_for_each_criterion_without_one() -> None:
    proof = AcceptanceTest(name="test_ac1", criteria=[1], before="error", after="passed")
    other = proof.model_copy(update={"name": "test_ac1_more", "before": "passed"})

    rows = evidence(judged(TEXTS[:2], runs(proof, other)))

    assert rows == [
        ("AC-1", "two and three are five", "test_ac1", "error", "passed", "proved"),
        ("", "", "test_ac1_more", "passed", "passed", ""),
        ("AC-2", "zero and zero are zero", "none", "", "", "not proved: no test names it"),
    ]


def test_criteria_whose_tests_were_not_run_are_not_proved() -> None:
    found = not_tested(TEXTS, "b" * 40, "c" * 40, "the store is away")

    assert [each.why for each in found.criteria] == ["no test names it; the store is away"] * 3
