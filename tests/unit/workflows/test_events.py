"""Every event describes itself, and its example is a body that the code emits."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from activities.agents import requests
from activities.agents.prompts import Prompts
from activities.graph.events import WRITERS
from bridge.agents.activity import command
from bridge.agents.calls import new_call_id
from workers.cli.event_line import headline
from workflows.models.agent_messages import AgentCommand, AgentResponse
from workflows.models.agents import Agent, ProposeInput, Task
from workflows.models.context import ContextPack
from workflows.models.entries import Entry
from workflows.models.events import BODIES, PUBLISHED, EventBody, example
from workflows.story import timeline_entry

ROOT = Path(__file__).parents[3]
HISTORIES = ROOT / "tests" / "replay" / "histories"
STORY = "US-101"

FREE = {
    *("timestamp", "duration_ms"),
    *("title", "brief", "acceptance_criteria", "rationale", "affects"),
    *("time", "EntrySkipped.reason", "PlanDerived.description"),
}
"""Fields whose values a person, an agent or a clock chooses: an example may have any."""

HASH = (
    r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b|\b[0-9a-f]{8}([0-9a-f]{8})?\b|\b[0-9a-f]{40}\b"
)
"""A run's id, the end of one, a content hash, or a commit."""

ADDED_LATER = {
    "TaskFinished": {"role"},  # which two other kinds have replaced
}
"""Fields that no recorded history has."""

TESTS_ADDED_LATER = {"CriteriaTested.flaky"}
"""Such fields of the tests in an event."""


def entries(value: Any) -> Iterator[Entry]:
    """Yield the outbox entries in a history; its payloads are JSON in base64."""
    match value:
        case {"id": _, "kind": str(), "source": _, "body": dict()}:
            yield Entry.model_validate(value)
        case {"metadata": _, "data": str(data)}:
            yield from entries(json.loads(base64.b64decode(data)))
        case dict():
            for each in value.values():
                yield from entries(each)
        case list():
            for each in value:
                yield from entries(each)


@cache
def recorded() -> dict[str, list[Entry]]:
    """Return the entries of all recorded histories by kind."""
    found: dict[str, list[Entry]] = {}
    for path in HISTORIES.glob("*.json"):
        for entry in entries(json.loads(path.read_text())):
            found.setdefault(entry.kind, []).append(entry)
    return found


def comparable(kind: str, body: Any, story: str) -> Any:
    """Return a body with one story id and person, `H` for hashes and runs, and no free fields."""
    match body:
        case {"entry": str(entry)}:
            inner = comparable("Entry", json.loads(entry), story)
            return comparable(kind, body | {"entry": list(inner.items())}, story)
        case dict():
            return {
                name: comparable(kind, value, story)
                for name, value in body.items()
                if not {name, f"{kind}.{name}"} & (FREE | TESTS_ADDED_LATER)
            }
        case list():
            return [comparable(kind, each, story) for each in body]
        case str():
            text = re.sub(rf"(?<!\w){re.escape(story)}(?!\w)", STORY, body)
            text = re.sub(r"\b(ana|unknown)\b", "ana", text)
            return re.sub(HASH, lambda found: "H" * len(found[0]), text)
        case _:
            return body


@pytest.mark.parametrize("kind", BODIES.values(), ids=BODIES)
def test_every_event_has_a_description_and_describes_its_fields(kind: type[EventBody]) -> None:
    for name, field in kind.model_fields.items():
        assert field.description, name
        assert field.examples, name
    body = kind.model_validate(example(kind))

    assert body.label
    assert body.summary()
    assert kind.__doc__


@pytest.mark.parametrize("kind", BODIES)
def test_the_example_of_an_event_has_been_emitted(kind: str) -> None:
    shown = comparable(kind, example(BODIES[kind]), STORY)
    shown = {name: value for name, value in shown.items() if name not in ADDED_LATER.get(kind, ())}

    emitted = [comparable(kind, entry.body, entry.story_id) for entry in recorded()[kind]]

    assert shown in emitted


def test_every_event_has_a_writer_of_the_graph() -> None:
    assert set(WRITERS) == set(BODIES.values())


@pytest.mark.parametrize("subject", PUBLISHED)
def test_an_event_reads_the_same_in_the_timeline_and_on_the_command_line(subject: str) -> None:
    kind = PUBLISHED[subject]
    body = kind.model_validate(example(kind))
    entry = Entry(
        id="1",
        kind=kind.__name__,
        source="story-US-101",
        time=body.timestamp,
        body=body.model_dump(mode="json", exclude_none=True),
    )

    line, _ = headline(subject, example(kind))
    shown = timeline_entry(entry)

    assert body.summary()[:300] in line
    assert (shown.event, shown.text, shown.actor) == (body.label, body.summary()[:300], body.by())


@pytest.mark.parametrize(
    ("subject", "body", "line"),
    [
        ("planning.gate.opened", {"story_id": "US-2"}, "gate ? waits for ?"),
        ("context.updated", {"version": "x"}, 'context.updated {"version": "x"}'),
        ("context.updated", "not JSON", 'context.updated "not JSON"'),
        ("planning.story.renamed", {"title": "T"}, 'planning.story.renamed {"title": "T"}'),
    ],
)
def test_a_foreign_body_is_shown_as_a_line(subject: str, body: Any, line: str) -> None:
    assert headline(subject, body)[0] == line


ODD: tuple[Any, ...] = ([], {}, [[]], True, -1, 1.5, 10**400, "", None, float("nan"))


@pytest.mark.parametrize("subject", PUBLISHED)
def test_a_foreign_body_with_a_field_of_any_type_is_shown(subject: str) -> None:
    body = example(PUBLISHED[subject])

    for name in body:
        for odd in ODD:
            assert headline(subject, body | {name: odd})[0]


def test_an_entry_of_a_newer_child_is_in_the_timeline_under_its_subject() -> None:
    entry = Entry(
        id="1", kind="Later", subject="planning.later", source="plan-1", time="now", body={}
    )

    assert timeline_entry(entry).event == "planning.later"


@cache
def propose() -> AgentCommand:
    """Build the command of the examples as the code does."""
    task = Task(task_id="US-101-design-1", story_id=STORY, role="ARCHITECT", description="Undo.")
    agent = Agent(agent_id="agent-architect-1", role="ARCHITECT", agent_type="NATS")
    question = requests.propose(
        ProposeInput(task=task, agent=agent, pack=ContextPack(context=""), wave=1)
    )
    prompts = Prompts.load(ROOT / "deploy" / "config" / "prompts")
    return command(question, question.prompt(prompts, 8_192), new_call_id())


def test_the_example_of_a_command_is_what_an_agent_receives() -> None:
    shown, sent = example(AgentCommand), propose().model_dump()

    assert re.fullmatch(f"[0-9a-f]{{{len(sent['call_id'])}}}", shown["call_id"])
    assert sent["prompt"].startswith(shown["prompt"].removesuffix(" …"))
    assert shown["answer_schema"].items() <= sent["answer_schema"].items()
    apart = {"call_id", "prompt", "answer_schema", "timestamp"}
    assert {name: value for name, value in shown.items() if name not in apart} == {
        name: value for name, value in sent.items() if name not in apart
    }


def test_the_example_of_a_response_answers_the_example_of_a_command() -> None:
    command, answered = example(AgentCommand), example(AgentResponse)

    for name in ("task_id", "agent_id", "call_id"):
        assert answered[name] == command[name]
    assert AgentResponse.model_validate(answered).status == "done"
