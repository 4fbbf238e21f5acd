"""Ranking: the same candidates always have the same winner."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workflows.models.agents import Critique, CritiquePoint, Proposal
from workflows.models.deliberation import Check, CheckReport
from workflows.rules import ranking
from workflows.rules.ranking import Candidate

WEIGHTS = {"policy": 0.4, "lint": 0.3, "dry_run": 0.3}


def check(name: str, score: float | None, blocking: bool = False) -> Check:
    outcome = "not_checked" if score is None else "passed" if score == 1 else "failed"
    return Check.model_validate(
        {"name": name, "outcome": outcome, "score": score, "blocking": blocking}
    )


def report(*checks: Check) -> CheckReport:
    return CheckReport(checks=list(checks), weights=WEIGHTS)


def candidate(
    agent_id: str, score: float, open_points: int = 0, *, barred: bool = False
) -> Candidate:
    return Candidate(agent_id, score, barred, open_points)


@st.composite
def councils(draw: st.DrawFn) -> list[Candidate]:
    scores = st.sampled_from([0.0, 0.5, 0.85, 0.9, 0.95, 1.0]) | st.floats(0, 1)
    ids = draw(st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1))
    return [
        Candidate(agent_id, draw(scores), draw(st.booleans()), draw(st.integers(0, 3)))
        for agent_id in ids
    ]


# --- scores ---------------------------------------------------------------------------------------


def test_a_score_is_the_weighted_mean_of_the_checks() -> None:
    checked = report(check("policy", 1.0), check("lint", 0.5), check("dry_run", 0.0))

    assert ranking.score(checked) == pytest.approx(0.55)


def test_a_check_that_did_not_apply_does_not_affect_the_score() -> None:
    checked = report(check("policy", 1.0), check("lint", 0.5), check("dry_run", None))

    assert ranking.score(checked) == pytest.approx((0.4 + 0.15) / 0.7)


def test_a_check_without_a_weight_does_not_count() -> None:
    checked = CheckReport(
        checks=[check("policy", 1.0), check("lint", 0.0)], weights={"policy": 0.4}
    )

    assert ranking.score(checked) == 1


def test_what_was_not_checked_has_not_passed() -> None:
    assert ranking.score(report(check("policy", None), check("lint", None))) == 0


@given(st.lists(st.none() | st.floats(0, 1), min_size=3, max_size=3))
def test_a_score_lies_between_its_worst_and_best_check(scores: list[float | None]) -> None:
    checks = [check(name, score) for name, score in zip(WEIGHTS, scores, strict=True)]
    applied = [score for score in scores if score is not None]

    score = ranking.score(report(*checks))

    assert min(applied, default=0) - 1e-9 <= score <= max(applied, default=0) + 1e-9


def test_a_blocking_finding_bars() -> None:
    assert ranking.barred(report(check("lint", 1.0), check("policy", 0.0, blocking=True)))
    assert not ranking.barred(report(check("policy", 0.0)))
    assert not ranking.barred(report(check("policy", 1.0, blocking=True)))


def test_points_of_an_accepting_critic_are_not_open() -> None:
    point = CritiquePoint(severity="low", text="a point")
    critiques = [
        Critique(verdict="accept", points=[point] * 5),
        Critique(verdict="revise", points=[point] * 2),
        Critique(verdict="reject", points=[point]),
    ]

    assert ranking.open_points(critiques) == 3
    assert ranking.open_points([]) == 0


@given(councils(), st.data())
def test_an_unchecked_proposal_never_outranks_a_verified_one(
    council: list[Candidate], data: st.DataObject
) -> None:
    states = st.sampled_from([(True, False), (False, True), (False, False)])
    candidates = [
        Candidate(c.agent_id, c.score, c.barred, c.open_points, *data.draw(states)) for c in council
    ]

    tied = ranking.near_tie(candidates)
    ranked = ranking.rank(candidates, data.draw(st.sampled_from(tied)) if tied else None)

    fit = [candidate for candidate in ranked if not candidate.barred]
    first_unchecked = next((n for n, c in enumerate(fit) if c.unchecked), len(fit))
    assert not any(candidate.verified for candidate in fit[first_unchecked:])


# --- near ties ------------------------------------------------------------------------------------


def test_exactly_five_hundredths_apart_is_a_near_tie() -> None:
    for best, other in [(1.0, 0.95), (0.95, 0.90), (0.35, 0.30)]:
        assert ranking.near_tie([candidate("a", best), candidate("b", other)]) == ["a", "b"]


def test_further_apart_is_not_a_tie() -> None:
    assert ranking.near_tie([candidate("b", 0.949), candidate("a", 1.0)]) == ["a"]


def test_a_near_tie_is_measured_from_the_best_and_not_in_steps() -> None:
    steps = [candidate("a", 1.0), candidate("b", 0.96), candidate("c", 0.92)]

    assert ranking.near_tie(steps) == ["a", "b"]


def test_a_barred_proposal_is_never_in_a_near_tie() -> None:
    tied = ranking.near_tie([candidate("a", 1.0, barred=True), candidate("b", 0.2)])

    assert tied == ["b"]


def test_all_barred_leaves_no_winner() -> None:
    candidates = [candidate("b", 0.2, barred=True), candidate("a", 0.1, barred=True)]

    assert ranking.near_tie(candidates) == []
    assert [c.agent_id for c in ranking.rank(candidates, None)] == ["b", "a"]


def test_without_a_judge_the_fewest_open_points_win_and_not_the_score() -> None:
    candidates = [candidate("a", 1.0, 2), candidate("b", 0.96, 1), candidate("c", 0.5, 0)]

    assert ranking.fewest_open_points(candidates, ranking.near_tie(candidates)) == "b"


def test_points_being_equal_the_agent_id_decides() -> None:
    candidates = [candidate("b", 1.0, 1), candidate("a", 0.96, 1)]

    assert ranking.fewest_open_points(candidates, ["b", "a"]) == "a"


# --- the final order ------------------------------------------------------------------------------


def test_the_others_follow_the_winner_by_score_and_barred_ones_come_last() -> None:
    candidates = [
        candidate("barred", 1.0, barred=True),
        candidate("low", 0.3),
        candidate("best", 0.9),
        candidate("more_points", 0.5, 2),
        candidate("fewer_points", 0.5, 1),
        candidate("chosen", 0.88),
    ]

    ranked = ranking.rank(candidates, "chosen")

    names = ["chosen", "best", "fewer_points", "more_points", "low", "barred"]
    assert [c.agent_id for c in ranked] == names


@pytest.mark.parametrize("winner", ["far", "barred", "stranger"])
def test_only_one_of_the_near_tie_can_win(winner: str) -> None:
    candidates = [
        candidate("best", 0.9),
        candidate("far", 0.5),
        candidate("barred", 0.9, barred=True),
    ]

    with pytest.raises(ValueError, match=winner):
        ranking.rank(candidates, winner)


@given(councils(), st.data())
def test_the_order_of_the_inputs_changes_nothing(
    candidates: list[Candidate], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(candidates))

    tied = ranking.near_tie(candidates)

    assert ranking.near_tie(shuffled) == tied
    winner = ranking.fewest_open_points(candidates, tied) if tied else None
    if tied:
        assert ranking.fewest_open_points(shuffled, data.draw(st.permutations(tied))) == winner
    assert ranking.rank(shuffled, winner) == ranking.rank(candidates, winner)


@given(councils())
def test_ranking_keeps_everyone_and_never_lets_a_barred_one_win(
    candidates: list[Candidate],
) -> None:
    tied = ranking.near_tie(candidates)
    ranked = ranking.rank(candidates, tied[-1] if tied else None)

    assert sorted(c.agent_id for c in ranked) == sorted(c.agent_id for c in candidates)
    assert bool(tied) == any(not c.barred for c in candidates)
    assert [c.barred for c in ranked] == sorted(c.barred for c in candidates)
    if tied:
        assert ranked[0].agent_id == tied[-1]


def test_a_judge_gets_the_score_and_the_proposal() -> None:
    proposal = Proposal(approach="short", content="text")

    shown = ranking.contender(candidate("a", 0.7), proposal)

    assert (shown.agent_id, shown.score, shown.proposal) == ("a", 0.7, proposal)
