"""Answers that say nothing are found in the fields that were read from them."""

from typing import Any

import pytest

from activities.agents.markdown_answers import Asked, proposal_draft
from activities.agents.non_answers import given_to, non_answer
from activities.agents.prompts import Prompts
from activities.agents.requests import criticise, propose, revise
from activities.config import CONFIG
from activities.substance import without_contained
from workflows.models.agents import (
    Agent,
    CriticiseInput,
    Critique,
    CritiquePoint,
    Decision,
    Proposal,
    ProposeInput,
    ReviseInput,
    Task,
)
from workflows.models.context import ContextPack

PROMPTS = Prompts.load(CONFIG / "prompts")
TASK = (
    "Design a rate limiter for a public HTTP API. Several server processes share one limit, and a "
    "client that is over it learns when to try again, without a wait in the server."
)
GOOD = (
    "Each request adds one to a counter in Valkey, which all processes of the API share. The "
    "counter expires after a minute. A request over the limit gets the status 429 and the header "
    "Retry-After with the seconds that are left."
)
CALL: dict[str, Any] = {
    "task": Task(task_id="t1", role="DEV", description=TASK),
    "agent": Agent(agent_id="dev-1", role="DEV", persona="Which tests show that it works at all?"),
    "pack": ContextPack(
        context="Decided: JetStream keeps every event for thirty days.",
        tools="You have no tools to call. What you write is checked, and Python is run.",
    ),
    "wave": 1,
}


def problem_of(content: str, *decisions: str) -> str:
    question = propose(ProposeInput.model_validate(CALL))
    proposal = Proposal(
        approach=content[:60],
        content=content,
        decisions=[Decision(title=title) for title in decisions],
    )
    prompt = question.prompt(PROMPTS, 8_192)
    return non_answer(question, prompt, PROMPTS.instructions["propose"], {"proposal": proposal})


@pytest.mark.parametrize("decisions", [(), ("The counter expires after a minute.",), (GOOD,) * 5])
def test_a_good_answer_is_one_also_if_its_decisions_repeat_its_sentences(
    decisions: tuple[str, ...],
) -> None:
    assert problem_of(GOOD, *decisions) == ""


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("A counter.", "too short"),
        (GOOD + " It goes on and on and on." * 60, "repeats itself"),
        (PROMPTS.instructions["propose"], "repeats the instructions"),
        ("Which tests show that it works at all? " * 2 + GOOD[:60], "repeats the instructions"),
        (f"{CALL['pack'].tools} {GOOD[:60]}", "instructions"),
        (TASK, "what you were given"),
        (
            "Rome was founded by two brothers on seven hills, says the legend. They were raised by "
            "a wolf, and one of them gave the town its name.",
            "something else",
        ),
    ],
)
def test_what_says_nothing_is_refused_with_the_reason(content: str, problem: str) -> None:
    assert problem in problem_of(content)


def test_a_critique_that_is_the_proposal_is_refused() -> None:
    proposal = Proposal(approach="", content=GOOD)
    request = CriticiseInput(**CALL, author_id="dev-2", proposal=proposal)
    question = criticise(request)
    critique = Critique(verdict="revise", points=[CritiquePoint(severity="low", text=GOOD)])

    problem = non_answer(
        question,
        question.prompt(PROMPTS, 8_192),
        PROMPTS.instructions["criticise"],
        {"critique": critique},
    )

    assert "what you were given" in problem


def test_a_revision_that_is_its_critique_is_refused_and_decides_nothing_of_it() -> None:
    critique = Critique(verdict="revise", points=[CritiquePoint(severity="high", text=GOOD)])
    proposal = Proposal(approach="", content="Count the requests of a client in the API.")
    question = revise(ReviseInput(**CALL, proposal=proposal, critiques=[critique]))
    prompt = question.prompt(PROMPTS, 8_192)

    draft = proposal_draft(f"high: {GOOD}", Asked(given_to(question, prompt), question.about))
    problem = non_answer(question, prompt, PROMPTS.instructions["revise"], draft.fields)

    assert "what you were given" in problem
    assert draft.missing is None


def test_of_texts_the_longest_are_kept() -> None:
    assert without_contained(["b", "a b\nc", "b  c", "d"]) == ["a b\nc", "d"]
