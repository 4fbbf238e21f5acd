"""Readiness: the score of a story's text, and the advice in each finding."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workflows.models.readiness import Readiness, StoryText
from workflows.rules.readiness import score_story

TITLE = "Limit each client's requests"
BRIEF = (
    "As an API operator, I want each client's requests limited, so that one client cannot starve "
    "the others. Today a single client can use every worker."
)
CRITERIA = [
    "Given a client that used its 10 requests, when it sends another, then it is answered 429.",
    "A client within its limit is answered 200.",
]
CODES = {"AC_MISSING", "TITLE_VALUE", "SMALL", "AMBIGUOUS", "DEPS"}


def scored(
    title: str = TITLE, brief: str = BRIEF, acceptance_criteria: list[str] = CRITERIA
) -> Readiness:
    return score_story(StoryText(title=title, brief=brief, acceptance_criteria=acceptance_criteria))


def codes(readiness: Readiness) -> list[str]:
    return [finding.code for finding in readiness.findings]


# --- what the thresholds distinguish --------------------------------------------------------------


def test_a_well_written_story_scores_100() -> None:
    assert scored() == Readiness(total=100, findings=[])


def test_the_sample_story_is_ready_at_every_rigor() -> None:
    story = json.loads(
        (Path(__file__).parents[3] / "deploy/examples/ratelimit/story.json").read_text()
    )

    assert score_story(StoryText.model_validate(story)).total == 100


@pytest.mark.parametrize("title", ["Login", TITLE, "As a user, I want to log in, so that I am in"])
def test_a_bare_title_is_below_l0(title: str) -> None:
    assert scored(title, "", []).total < 50


def test_without_acceptance_criteria_a_story_is_ready_at_l0_and_not_at_l1() -> None:
    assert 50 <= scored(acceptance_criteria=[]).total < 75


def test_criteria_without_a_brief_are_ready_at_l0_and_not_at_l1() -> None:
    assert 50 <= scored(brief="").total < 75


def test_a_story_without_role_and_reason_is_ready_at_l2_and_not_at_l3() -> None:
    brief = "Today a single client can use every worker of the service, and all the others wait."

    assert 85 <= scored(brief=brief).total < 90


def test_l3_allows_one_vague_wording_but_not_three() -> None:
    assert scored(brief=f"{BRIEF} The answer comes quickly.").total >= 90
    assert scored(brief=f"{BRIEF} It is easy, robust and flexible to set up.").total < 90


# --- each finding ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ({"acceptance_criteria": []}, "AC_MISSING", "add at least two that a test can verify"),
        ({"acceptance_criteria": CRITERIA[:1]}, "AC_MISSING", "add at least one more"),
        (
            {"acceptance_criteria": [*CRITERIA, "It works", "The page loads fast for the user"]},
            "AC_MISSING",
            "acceptance criteria 3, 4;",
        ),
        ({"title": "Login"}, "TITLE_VALUE", "the title names no value"),
        ({"title": "Improve the system for all of them"}, "TITLE_VALUE", "names no value"),
        ({"title": "limit " * 21}, "TITLE_VALUE", "in 3 to 20 words"),
        (
            {"brief": BRIEF.replace("so that", "and then")},
            "TITLE_VALUE",
            "does not say why ('so that ...');",
        ),
        (
            {"brief": BRIEF.replace("As an", "The").replace("I want", "gets")},
            "TITLE_VALUE",
            "for whom ('As a ...'), what they want",
        ),
        ({"brief": BRIEF + " word" * 400}, "SMALL", "more than 400 words"),
        ({"acceptance_criteria": CRITERIA * 6}, "SMALL", "12 acceptance criteria"),
        ({"brief": f"{BRIEF} I want a log. I want a graph."}, "SMALL", "reads like an epic"),
        ({"title": "Rewrite the entire platform for speed"}, "SMALL", "reads like an epic"),
        ({"brief": "As a user, I want it, so that it is."}, "AMBIGUOUS", "10 words is too short"),
        ({"brief": f"{BRIEF} It is user-friendly."}, "AMBIGUOUS", "friendly: can be read"),
        ({"brief": f"{BRIEF} The limit is TBD."}, "AMBIGUOUS", "still to be decided"),
        ({"brief": f"{BRIEF} It depends on US-7."}, "DEPS", "(depends on)"),
        ({"acceptance_criteria": [*CRITERIA, "It is blocked by the proxy."]}, "DEPS", "blocked by"),
    ],
)
def test_a_finding_names_what_to_change(
    text: dict[str, str | list[str]], code: str, message: str
) -> None:
    readiness = score_story(
        StoryText.model_validate(
            {"title": TITLE, "brief": BRIEF, "acceptance_criteria": CRITERIA} | text
        )
    )

    [finding] = readiness.findings
    assert finding.code == code
    assert message in finding.message
    assert readiness.total == 100 - finding.weight


@pytest.mark.parametrize(
    "sentence",
    [
        "It is fast: 95 of 100 answers come within 200 ms.",
        "It does not depend on any other story.",
        "It is independent of the proxy.",
    ],
)
def test_what_is_precise_or_independent_costs_nothing(sentence: str) -> None:
    assert scored(brief=f"{BRIEF} {sentence}").total == 100


def test_two_dependencies_cost_more_than_one() -> None:
    one = scored(brief=f"{BRIEF} It depends on US-7.")
    two = scored(brief=f"{BRIEF} It depends on US-7 and is blocked by US-8.")

    assert two.total < one.total


def test_more_untestable_criteria_cost_more() -> None:
    totals = [scored(acceptance_criteria=[*CRITERIA, *["nice"] * n]).total for n in range(4)]

    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == 4


# --- laws -----------------------------------------------------------------------------------------

PHRASES = ["As a user", "I want", "so that", "fast", "depends on", "not", "epic", "TBD", "7.", "\n"]
PROSE = st.lists(st.sampled_from(PHRASES), max_size=40).map(" ".join) | st.text(max_size=80)


@given(PROSE, PROSE, st.lists(PROSE, max_size=12))
def test_a_score_is_what_the_findings_leave_of_100(
    title: str, brief: str, criteria: list[str]
) -> None:
    readiness = scored(title, brief, criteria)

    assert readiness.total == max(0, 100 - sum(f.weight for f in readiness.findings))
    assert set(codes(readiness)) <= CODES
    assert all(finding.weight > 0 and finding.message for finding in readiness.findings)
    assert scored(title, brief, criteria) == readiness


@given(PROSE, PROSE)
def test_removing_criteria_never_raises_the_score(title: str, brief: str) -> None:
    assert scored(title, brief, []).total <= scored(title, brief, CRITERIA).total


@pytest.mark.parametrize(
    "filler", ["a ", "so ", "depends on ", "fast. ", "?", "n't ", " ", "\n", "no longer ", "é"]
)
def test_a_megabyte_is_scored_at_once(filler: str) -> None:
    megabyte = filler * (1_000_000 // len(filler))
    started = time.process_time()

    readiness = scored(megabyte, BRIEF + megabyte, [megabyte[:4000]] * 100)

    assert time.process_time() - started < 2
    assert "SMALL" in codes(readiness)


# --- costs of the findings, and limits of the rules -----------------------------------------------


@pytest.mark.parametrize(
    ("text", "cost"),
    [
        ({"acceptance_criteria": []}, 45),
        ({"acceptance_criteria": CRITERIA[:1]}, 10),
        ({"acceptance_criteria": [CRITERIA[0], "It works"]}, 15),
        ({"acceptance_criteria": ["It works", "So it does"]}, 30),
        ({"title": "Login"}, 10),
        ({"brief": BRIEF.replace("so that", "and then")}, 5),
        ({"brief": BRIEF.replace("As an", "The").replace("I want", "gets")}, 10),
        ({"brief": BRIEF + " word" * 400}, 15),
        ({"acceptance_criteria": CRITERIA * 6}, 15),
        ({"brief": BRIEF + " It is an epic."}, 15),
        ({"brief": "As a user, I want in, so that I enter."}, 20),
        ({"brief": BRIEF + " It is easy."}, 4),
        ({"brief": BRIEF + " It is easy, robust, modern, nice, good and flexible."}, 20),
        ({"brief": BRIEF + " TBD"}, 10),
        ({"brief": BRIEF + " It depends on US-7."}, 10),
        ({"brief": BRIEF + " It depends on US-7 and is blocked by US-8."}, 15),
    ],
)
def test_a_finding_costs_what_its_rule_sets(text: dict[str, Any], cost: int) -> None:
    assert scored(**text).total == 100 - cost


@pytest.mark.parametrize(
    "text",
    [
        {"title": "Limit client requests"},
        {"title": " ".join(["limit"] * 20)},
        {"brief": "As a user, I want limits, so that each of us waits."},
        {"brief": BRIEF + " word" * (400 - len(BRIEF.split()))},
        {"acceptance_criteria": CRITERIA * 5},
        {"acceptance_criteria": ["A client gets 429", "Each client gets 200"]},
        {"brief": BRIEF + " I want them to be told."},
    ],
)
def test_a_rule_begins_at_its_threshold(text: dict[str, Any]) -> None:
    assert scored(**text) == Readiness(total=100, findings=[])


def test_a_long_list_is_cut_after_five() -> None:
    five, six = (scored(acceptance_criteria=["It works"] * number) for number in (5, 6))

    assert "criteria 1, 2, 3, 4, 5;" in five.findings[-1].message
    assert "criteria 1, 2, 3, 4, 5 and 1 more;" in six.findings[-1].message
