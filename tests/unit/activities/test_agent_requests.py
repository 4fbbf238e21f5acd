"""Questions are the same for the agent that asks and for the reader of the answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from activities.agents import requests
from activities.agents.prompts import ACTS, Prompts
from activities.agents.requests import ANSWERS, AgentRequest
from bridge.agents.calls import prompt_fields
from workflows.models.agents import (
    Agent,
    Contender,
    CriticiseInput,
    Critique,
    DerivePlanInput,
    JudgeInput,
    Proposal,
    ProposeInput,
    ReviseInput,
    Task,
    WriteStoryInput,
)
from workflows.models.context import ContextPack
from workflows.models.implementation import NextActionInput, Outline
from workflows.models.readiness import StoryText

PROMPTS = Prompts.load(Path(__file__).parents[3] / "deploy" / "config" / "prompts")
ASKED: dict[str, Any] = {
    "task": Task(task_id="t1", role="DEV", description="Store every event."),
    "agent": Agent(agent_id="dev-1", role="DEV", agent_type="NATS", persona="You doubt."),
    "pack": ContextPack(context="Decided: JetStream."),
    "wave": 1,
}
PROPOSAL = Proposal(approach="an outbox", content="Append, then publish.")
CRITIQUE = Critique(verdict="revise", suggestion="name the stream")
CONTENDERS = [Contender(agent_id=name, score=0.9, proposal=PROPOSAL) for name in ("a", "b")]

Ask = Callable[[Any], AgentRequest[Any]]
REQUESTS: dict[str, tuple[Ask, Any]] = {
    "propose": (requests.propose, ProposeInput(**ASKED)),
    "criticise": (requests.criticise, CriticiseInput(**ASKED, author_id="b", proposal=PROPOSAL)),
    "revise": (requests.revise, ReviseInput(**ASKED, proposal=PROPOSAL, critiques=[CRITIQUE])),
    "judge": (requests.judge, JudgeInput(**ASKED, contenders=CONTENDERS)),
    "derive_plan": (requests.derive_plan, DerivePlanInput(**ASKED, design=PROPOSAL, roles=["DEV"])),
    "write_story": (requests.write_story, WriteStoryInput(**ASKED, story=StoryText(title="Undo"))),
    "next_action": (
        requests.next_action,
        NextActionInput(**ASKED, outline=Outline(text="a.py", editable=["a.py"])),
    ),
}


def test_every_act_has_a_question() -> None:
    assert set(REQUESTS) == set(ACTS) == set(ANSWERS)


@pytest.mark.parametrize("act", REQUESTS)
def test_a_request_survives_a_round_trip_through_json(act: str) -> None:
    ask, request = REQUESTS[act]
    direct = ask(request)

    read = requests.question(act, request.model_dump(mode="json"))

    prompt = direct.prompt(PROMPTS, 8_192)
    assert read.prompt(PROMPTS, 8_192) == prompt
    assert type(prompt)(**prompt_fields(prompt)).hash == prompt.hash
    assert (read.act, read.seed(2)) == (direct.act, direct.seed(2))
    assert read.form(1_000).schema == direct.form(1_000).schema
    assert read.answer_type is direct.answer_type is ANSWERS[act]


def test_an_unknown_act_is_refused() -> None:
    with pytest.raises(ValueError, match="'sing'"):
        requests.question("sing", {})
