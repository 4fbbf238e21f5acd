"""Proposals and critiques that are Markdown, as models write them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from activities.agents.markdown_answers import (
    MAX_DECISIONS,
    Asked,
    Draft,
    complete_part,
    critique_draft,
    proposal_draft,
    talks_about_answer,
    without_preamble,
)
from workflows.models.agents import Critique, Decision, Proposal

PROPOSAL = """\
Requests over the limit are refused, because a queue would only move the overload.

## Storage
The counter is kept in Valkey. Every replica sees the same number.

```python
# Decisions
used = 1
```

## Decisions
- **Refuse instead of queueing**: the caller can decide (affects the API, its clients)
2. Keep the counter in Valkey: replicas share it
* Count per tenant
"""
CRITIQUE = """\
- high: two requests race for the last place
- **Low**: the name says nothing

Suggestion: count and compare in one statement.

Verdict: revise
"""


def proposal(draft: Draft) -> Proposal:
    found = draft.fields["proposal"]
    assert isinstance(found, Proposal)
    return found


def critique(draft: Draft) -> Critique:
    found = draft.fields["critique"]
    assert isinstance(found, Critique)
    return found


def test_a_proposal_is_read_from_its_headings_and_lists() -> None:
    draft = proposal_draft(PROPOSAL)

    read = proposal(draft)
    assert draft.missing is None
    assert read.approach.startswith("Requests over the limit are refused")
    assert read.decisions == [
        Decision(
            title="Refuse instead of queueing",
            rationale="the caller can decide",
            affects=["the API", "its clients"],
        ),
        Decision(title="Keep the counter in Valkey", rationale="replicas share it"),
        Decision(title="Count per tenant"),
    ]
    assert "## Storage" in read.content
    assert "# Decisions\nused = 1" in read.content
    assert "Refuse instead" not in read.content


@pytest.mark.parametrize(
    "heading",
    ["### Decisions", "**Decisions:**", "Decisions:", "## Key decisions ##", "# 5. Decisions"],
)
def test_the_heading_of_the_decisions_may_be_written_in_many_ways(heading: str) -> None:
    draft = proposal_draft(f"An outbox holds events.\n\n{heading}\n\n- Use an outbox\n")

    assert [decision.title for decision in proposal(draft).decisions] == ["Use an outbox"]


def test_a_section_with_the_approach_is_the_approach() -> None:
    draft = proposal_draft(
        "# Approach\nCount them.\n\n# Solution\nIn Valkey.\n\n# Decisions\n- Yes"
    )

    assert proposal(draft).approach == "Count them."
    assert proposal(draft).content == "# Solution\nIn Valkey."


def test_a_fence_around_the_whole_answer_and_copied_fences_are_left_out() -> None:
    draft = proposal_draft("```markdown\n<data>\nAn outbox holds events.\n</data>\n```")

    assert proposal(draft).content == "An outbox holds events."


def test_without_a_list_decisions_are_chosen_from_the_sentences_of_the_answer() -> None:
    text = (
        "An outbox holds events. They are published later by a job.\n\n"
        "```\nThis is no sentence of the text.\n```\n\n"
        "Is it fast enough for us? It keeps the order of all events!"
    )

    draft = proposal_draft(text)

    assert draft.missing is not None
    assert draft.missing.material["sentences"].splitlines() == [
        "1. They are published later by a job.",
        "2. It keeps the order of all events!",
    ]
    whole = proposal(Draft(draft.missing.complete({"decisions": [2, 1, 2]})))
    assert [decision.title for decision in whole.decisions] == [
        "It keeps the order of all events!",
        "They are published later by a job.",
    ]
    assert whole.content == text


def test_neither_chatter_nor_sentences_of_the_task_are_offered_as_decisions() -> None:
    task = "Design a health endpoint that reports whether the queue is reachable."
    text = f"Sure, here is the solution for you. {task} It answers with the status 503 if not."

    missing = proposal_draft(text, Asked(given=task)).missing

    assert missing is not None
    assert missing.material["sentences"] == "1. It answers with the status 503 if not."


@pytest.mark.parametrize(
    ("about", "offered"),
    [
        ("Limit the requests of each client.", ["1. Each client has a bucket of tokens."]),
        (
            "Paint the garden shed.",
            ["1. My name is Alex, an engineer.", "2. Each client has a bucket of tokens."],
        ),
    ],
)
def test_sentences_about_something_else_are_decisions_only_if_there_are_no_others(
    about: str, offered: list[str]
) -> None:
    text = "My name is Alex, an engineer. Each client has a bucket of tokens."

    missing = proposal_draft(f"{text}\n\n{text}", Asked(about=about)).missing

    assert missing is not None
    assert missing.material["sentences"].splitlines() == offered


@pytest.mark.parametrize(
    "sentence",
    [
        "You're not sure if you can do this today.",
        "Your improved solution is more effective than mine.",
        "I'm glad to hear that it helped you.",
        "The task is well-defined and it is clear.",
        "The first suggestion is to prioritize these tasks.",
        "The previous response was correct and a good answer.",
    ],
)
def test_a_sentence_about_the_answer_or_to_its_reader_is_not_a_decision(sentence: str) -> None:
    text = f"{sentence} Each client has a bucket of tokens. A request takes one token of it."

    missing = proposal_draft(text).missing

    assert missing is not None
    assert missing.material["sentences"].splitlines() == [
        "1. Each client has a bucket of tokens.",
        "2. A request takes one token of it.",
    ]


@pytest.mark.parametrize(
    "answer", [{}, [], {"decisions": []}, {"decisions": [3]}, {"decisions": "1"}]
)
def test_a_choice_of_what_is_not_there_is_refused(answer: Any) -> None:
    missing = proposal_draft("They are published by a job. It keeps the order of events.").missing

    assert missing is not None
    with pytest.raises(ValueError, match="numbers from 1 to 2"):
        missing.complete(answer)


def test_an_answer_that_is_only_code_has_no_decisions_and_is_whole() -> None:
    draft = proposal_draft("```python\nprint('the answer is in the code.')\n```")

    assert draft.missing is None
    assert proposal(draft).decisions == []


def test_a_critique_is_read_from_its_list_suggestion_and_verdict() -> None:
    draft = critique_draft(CRITIQUE)

    read = critique(draft)
    assert draft.missing is None
    assert [(point.severity, point.text) for point in read.points] == [
        ("high", "two requests race for the last place"),
        ("low", "the name says nothing"),
    ]
    assert (read.suggestion, read.verdict) == ("count and compare in one statement.", "revise")


def test_a_critique_without_severities_is_rated_by_a_short_question() -> None:
    draft = critique_draft(
        "It misses a test for the limit.\n\nThe error says nothing about a remedy."
    )

    assert draft.missing is not None
    rules = Draft202012Validator(draft.missing.schema)
    assert rules.is_valid({"severities": ["high", "low"], "verdict": "revise"})
    assert not rules.is_valid({"severities": ["high", "low"], "verdict": "accept"})
    assert not rules.is_valid({"severities": ["low"], "verdict": "accept"})
    rated = critique(
        Draft(draft.missing.complete({"severities": ["high", "low"], "verdict": "revise"}))
    )
    assert [point.severity for point in rated.points] == ["high", "low"]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({"severities": ["high", "low"], "verdict": "accept"}, "contradicts"),
        ({"severities": ["high"], "verdict": "revise"}, "2 values"),
        ({"severities": ["high", "dire"], "verdict": "revise"}, "severity"),
        ({"severities": ["high", "low"], "verdict": "maybe"}, "verdict"),
        ({"severities": ["high", "low"]}, "verdict"),
        ("high", "severities"),
    ],
)
def test_a_rating_that_cannot_be_used_is_refused(answer: Any, problem: str) -> None:
    missing = critique_draft("It misses a test for it.\n\nThe error says nothing at all.").missing

    assert missing is not None
    with pytest.raises(ValueError, match=problem):
        missing.complete(answer)


def test_a_verdict_that_contradicts_a_severe_point_is_refused() -> None:
    with pytest.raises(ValueError, match=r"accept.*contradicts.*two requests race"):
        critique_draft(CRITIQUE.replace("revise", "accept"))


@pytest.mark.parametrize("text", ["", "Verdict: revise", "Good.", "```python\nx = 1\n```"])
def test_a_critique_without_points_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="names no point"):
        critique_draft(text)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("It works. It also", "It works."),
        ("It works.\n- one item\n- two it", "It works.\n- one item"),
        ("It works.\n\n```python\nx = ", "It works."),
        ("It works.\n\n```python\nx = 1\n```", "It works.\n\n```python\nx = 1\n```"),
        ("It works.\n\n## Decisions\n", "It works."),
        ("no end", ""),
        ("", ""),
    ],
)
def test_of_a_text_that_was_cut_off_the_complete_part_is_kept(text: str, kept: str) -> None:
    assert complete_part(text) == kept


@given(st.text(max_size=300))
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in (proposal_draft, critique_draft):
        try:
            draft = read(text)
        except ValueError:
            continue
        if draft.missing is None:
            found = draft.fields.get("proposal") or draft.fields["critique"]
            assert not isinstance(found, Proposal) or len(found.decisions) <= MAX_DECISIONS
    assert complete_part(text) == complete_part(text).strip()


@pytest.mark.parametrize(
    "preamble",
    [
        "Your improved solution is indeed more effective than my original solution.",
        "I'm glad to hear that you liked it. Here's a revised version of your proposal:",
        "Sure, here is the design:\n\nMy solution follows the critique.",
    ],
)
def test_paragraphs_that_only_introduce_an_answer_are_left_out(preamble: str) -> None:
    body = "A token bucket holds the requests that a client may still send."

    assert proposal_draft(f"{preamble}\n\n{body}").fields["proposal"].content == body


@pytest.mark.parametrize(
    "text",
    [
        "The proposed solution holds requests in a bucket.\n\nIt is filled once a second.",
        "## Your answer\n\nA bucket holds the requests.",
        "Your improved solution is good.",
    ],
)
def test_other_first_paragraphs_stay(text: str) -> None:
    assert without_preamble(text) == text


def test_a_text_about_an_answer_is_not_a_solution() -> None:
    praise = (
        "Your improved solution is a great example of teamwork. I made a few changes to your "
        "original proposal. The revised version is clear and simple."
    )
    solution = "A bucket holds the requests of a client. It is filled once a second."

    assert talks_about_answer(praise)
    assert not talks_about_answer(f"{praise}\n\n{solution} It never overflows. Code counts.")
    assert not talks_about_answer(f"{praise}\n\n```python\nprint(1)\n```")
    assert not talks_about_answer(solution)


def critique_of(text: str) -> Critique:
    draft = critique_draft(text)
    assert draft.missing is None
    critique: Critique = draft.fields["critique"]
    return critique


@pytest.mark.parametrize(
    "text",
    [
        "1. low: naming\n   - Suggestion: rename it\n2. medium: data is lost\n"
        "   - Suggestion: keep it\n\nVerdict: revise",
        "# Critique\n\n## Suggestions\n\nKeep it.\n\n- Rename it.\n\n## Points\n\n- low: naming\n"
        "- medium: data is lost\n\nVerdict: revise",
        "- low: naming\n- medium: data is lost\n\nSuggestion: keep it\nand rename it.\n\n"
        "Verdict: revise",
    ],
)
def test_points_around_a_suggestion_are_kept(text: str) -> None:
    critique = critique_of(text)

    points = [(point.severity, point.text) for point in critique.points]
    assert points == [("low", "naming"), ("medium", "data is lost")]
    assert "rename it" in critique.suggestion.lower()
    assert "verdict" not in critique.suggestion.lower()


def test_a_severe_point_after_a_suggestion_contradicts_an_accepting_verdict() -> None:
    text = "1. low: naming\n   - Suggestion: rename it\n2. high: data is lost\n\nVerdict: accept"

    with pytest.raises(ValueError, match="contradicts the point of high severity"):
        critique_draft(text)


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        ("**Verdict** (accept / revise / reject): reject", "reject"),
        ("Verdict (accept, revise or reject): **reject**", "reject"),
        ("## Verdict\n\nRevise.", "revise"),
        ("Verdict: accepted", "accept"),
    ],
)
def test_a_verdict_is_not_one_of_the_options_that_are_repeated(line: str, verdict: str) -> None:
    assert critique_of(f"- medium: data is lost\n\n{line}").verdict == verdict


def test_a_verdict_that_names_two_is_asked_for() -> None:
    draft = critique_draft("- low: naming\n\n## Verdict\n\nAccept is not possible; revise")

    assert draft.missing
    assert draft.missing.act == "rate"


@pytest.mark.parametrize(
    "points",
    [
        ["High test coverage makes this safe to change.", "Low coupling between the modules."],
        ["High availability is not covered.", "Low-latency needs are not met."],
    ],
)
def test_a_sentence_that_begins_with_high_states_no_severity(points: list[str]) -> None:
    draft = critique_draft("".join(f"- {point}\n" for point in points) + "\nVerdict: accept")

    assert draft.missing
    assert draft.missing.act == "rate"
    done = draft.missing.complete({"severities": ["low", "low"], "verdict": "accept"})
    assert [point.text for point in done["critique"].points] == points


@pytest.mark.parametrize(
    "lines",
    [
        "1. **Use Redis**\n   - Rationale: it is fast\n   - Affects: cache\n2. **Use Lua**\n"
        "   - Rationale: it is fast\n   - Affects: cache",
        "1. **Use Redis**\n\n   It is fast.\n   Affects: cache\n\n2. **Use Lua**\n\n"
        "   It is fast. Affects: cache",
        "1. **Use Redis**\nIt is fast. Affects: cache\n2. **Use Lua**\nIt is fast. Affects: cache",
        "- **Use Redis**: it is fast (affects: cache)\n- **Use Lua**: it is fast (affects: cache)",
    ],
)
def test_a_decision_has_its_reasons_however_its_list_is_indented(lines: str) -> None:
    decisions = proposal_draft(f"Do it.\n\n## Decisions\n\n{lines}").fields["proposal"].decisions

    assert [each.title for each in decisions] == ["Use Redis", "Use Lua"]
    assert {each.rationale.lower().strip(" .") for each in decisions} == {"it is fast"}
    assert [each.affects for each in decisions] == [["cache"], ["cache"]]


@pytest.mark.parametrize("before", ["", "Here it is:\n\n"])
@pytest.mark.parametrize("fence", ["```", "````", "~~~"])
def test_a_fence_around_an_answer_is_removed(fence: str, before: str) -> None:
    text = (
        f"{before}{fence}markdown\n# Limit\n\nDo it.\n\n## Decisions\n\n- Use Redis: fast\n{fence}"
    )

    proposal = proposal_draft(text).fields["proposal"]

    assert [each.title for each in proposal.decisions] == ["Use Redis"]
    assert "markdown" not in proposal.content


def test_long_lines_of_spaces_are_read_in_linear_time() -> None:
    spaces = " " * 20_000

    proposal_draft(f"# a{spaces}b\n\nDo it.\n\n## Decisions\n\n- Use it{spaces}(b) now\n")


def test_a_chinese_paragraph_is_a_point_and_its_sentences_are_statements() -> None:
    text = "设计没有说明网关重启以后计数如何保持。令牌桶的容量也没有限制！"

    rated, proposed = critique_draft(f"{text}\n\nVerdict: revise"), proposal_draft(text)

    assert rated.missing
    assert rated.missing.act == "rate"
    assert proposed.missing
    assert proposed.missing.act == "decide"
    assert proposed.missing.material["sentences"].count("\n") == 1
