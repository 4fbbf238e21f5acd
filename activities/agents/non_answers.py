"""Answers that say nothing: they repeat themselves, or the prompt, or are about something else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from activities import substance
from activities.agents.markdown_answers import talks_about_answer
from activities.agents.prompts import Prompt
from activities.agents.requests import AgentRequest
from workflows.models.agents import ReviseInput
from workflows.models.implementation import ReplaceText

SOLUTIONS = ("propose", "revise", "next_action")
"""Acts whose answer, as text, is about the task."""

SHORTEST = {
    **dict.fromkeys(SOLUTIONS, substance.MIN_SOLUTION_CHARACTERS),
    "criticise": substance.MIN_CHARACTERS,
}
"""Act -> characters that its answer has at least."""


def non_answer(
    request: AgentRequest[Any],
    prompt: Prompt,
    instructions: str,
    fields: Mapping[str, Any],
    *,
    is_document: bool = False,
) -> str:
    """Return why an answer says nothing, as the agent is asked again; empty if it is an answer.

    Args:
        request: the question.
        prompt: as it was asked.
        instructions: the fixed words of the prompt.
        fields: the answer.
        is_document: whether it was written by a schema, which asks for little more than words.
    """
    text = "\n".join(substance.without_contained(texts_in(list(fields.values()))))
    shortest = 0 if is_document else SHORTEST.get(request.act, 0)
    if substance.size(text) < shortest:
        return f"it is too short: write at least {shortest} characters"
    if substance.repeats_itself(text):
        return "it repeats itself; say each thing once"
    call = request.call
    fixed = [instructions, call.agent.persona, call.pack.system, call.pack.tools]
    if substance.copied(text, fixed) > substance.MAX_COPIED_OF_PROMPT:
        return "it repeats the instructions; write about the task instead"
    given = [given_to(request, prompt), *_criticised(request)]
    if substance.copied(text, [*given, instructions]) > substance.MAX_COPIED_OF_ALL:
        return "it repeats what you were given; write your own answer"
    if request.act not in SOLUTIONS or is_document:
        return ""
    found = relevance(fields, request.about)
    if not found:
        return "it is about something else; write about the task"
    if talks_about_answer(text):
        return "it talks about a solution; write the solution itself"
    proposed = {"proposal": call.proposal} if isinstance(call, ReviseInput) else {}
    if found < relevance(proposed, request.about):
        return "it is less about the task than your proposal; write about the task"
    return ""


def relevance(fields: Mapping[str, Any], about: str) -> float:
    """Return how much an answer is about a text, 0 to 1."""
    return substance.relevance("\n".join(texts_in(list(fields.values()))), about)


def given_to(request: AgentRequest[Any], prompt: Prompt) -> str:
    """Return what an agent knows, its task, and the critiques of its proposal."""
    known, critiques = prompt.messages[0]["content"], request.material.get("critiques", "")
    return f"{known}\n\n{request.call.task.description}\n\n{request.about}\n\n{critiques}"


def texts_in(value: Any) -> Iterator[str]:
    """Yield the texts of a field of an answer, at any depth."""
    match value:
        case str():
            yield value
        case ReplaceText():
            yield value.new.removeprefix(value.old)
        case BaseModel():
            for name in type(value).model_fields:
                yield from texts_in(getattr(value, name))
        case list():
            for each in value:
                yield from texts_in(each)


def _criticised(request: AgentRequest[Any]) -> list[str]:
    """Return the proposal that a critique is about, which it must not only repeat."""
    proposal = request.material.get("proposal") if request.act == "criticise" else None
    return [proposal] if isinstance(proposal, str) else []
