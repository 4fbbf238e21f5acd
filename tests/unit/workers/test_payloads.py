"""Unreadable inputs: each is refused with its reason, and none fails a workflow task."""

from __future__ import annotations

import asyncio
import json
import re
from inspect import signature
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from temporalio.api.common.v1 import Payload
from temporalio.client import (
    Client,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowQueryFailedError,
    WorkflowUpdateFailedError,
)
from temporalio.common import RawValue
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.exceptions import ApplicationError
from temporalio.worker import Replayer

from tests.support.polling import WITHIN_S, until
from tests.support.sandbox import sandboxed_runner
from tests.unit.conftest import StartStory, World
from workers.processes.story import WORKFLOWS
from workflows.models.errors import ErrorType, invalid_input
from workflows.models.story import TimelineEntry

FIELD_NAME = re.compile(r'"(\w+)": \{')
DEEP = b"[" * 300 + b"]" * 300


def raw(data: bytes, encoding: str = "json/plain") -> RawValue:
    return RawValue(Payload(metadata={"encoding": encoding.encode()}, data=data))


UNREADABLE: dict[str, tuple[list[RawValue], str]] = {
    "none": ([], "0 were given"),
    "two": ([raw(b"{}"), raw(b"{}")], "2 were given"),
    "deep": ([raw(b'{"title": ' + DEEP + b"}")], "recursion limit"),
    "half a surrogate": ([raw(b'{"title": "\\ud83d x"}')], "send one JSON value in UTF-8"),
    "cp1252": ([raw('{"title": "caf\u00e9"}'.encode("cp1252"))], "send one JSON value in UTF-8"),
    "not JSON": ([raw(b"story_id: US-1")], "send one JSON value in UTF-8"),
    "null": ([raw(b"null")], "must be a JSON object"),
    "nil": ([raw(b"", "binary/null")], "must be a JSON object"),
    "bytes": ([raw(b"\x00\x01", "binary/plain")], "send json/plain"),
    "list": ([raw(b"[1]")], "must be a JSON object"),
    "number": ([raw(b"1e999")], "must be a JSON object"),
    "string": ([raw(b'"US-1"')], "must be a JSON object"),
}


async def replay(handle: WorkflowHandle[Any, Any]) -> None:
    """Replay the workflow, as a worker does that no longer has it in its cache."""
    replayer = Replayer(
        workflows=WORKFLOWS,
        workflow_runner=sandboxed_runner(),
        data_converter=pydantic_data_converter,
    )
    await replayer.replay_workflow(await handle.fetch_history())


async def refusal_of(handle: WorkflowHandle[Any, Any]) -> ApplicationError:
    async with asyncio.timeout(WITHIN_S):
        with pytest.raises(WorkflowFailureError) as failed:
            await handle.result()
    cause = failed.value.cause
    assert isinstance(cause, ApplicationError)
    return cause


@pytest.mark.parametrize("kind", [each.__name__ for each in WORKFLOWS])
async def test_a_start_that_cannot_be_read_fails_at_once_with_its_reason(
    fleet: Client, world: World, kind: str
) -> None:
    handles = {
        name: await fleet.start_workflow(
            kind, args=inputs, id=f"{kind}-{world.key}-{number}", task_queue="story"
        )
        for number, (name, (inputs, _)) in enumerate(UNREADABLE.items())
    }

    refusals = {name: await refusal_of(handle) for name, handle in handles.items()}

    for name, refusal in refusals.items():
        assert (refusal.type, refusal.non_retryable) == (ErrorType.INVALID_INPUT, True), name
        assert UNREADABLE[name][1] in refusal.message, (name, refusal.message)
    history = await handles["none"].fetch_history()
    assert not any(e.HasField("workflow_task_failed_event_attributes") for e in history.events)
    with pytest.raises(WorkflowQueryFailedError, match="0 were given"):
        await handles["none"].query("state" if kind == "StoryWorkflow" else "progress")
    await replay(handles["none"])
    await replay(handles["deep"])


async def test_a_byte_order_mark_is_skipped(fleet: Client, world: World) -> None:
    story = {"story_id": f"US-{world.key}", "title": "Shorten links"}
    handle = await fleet.start_workflow(
        "StoryWorkflow",
        raw(b"\xef\xbb\xbf" + json.dumps(story).encode()),
        id=f"story-US-{world.key}",
        task_queue="story",
    )

    state = await handle.query("state")

    assert state["title"] == "Shorten links"


REFUSED_SIGNALS: dict[str, tuple[str, list[RawValue], str]] = {
    "misspelt": ("aprove", [raw(b"{}")], "no signal has this name"),
    "malformed decision": ("add_decision", [raw(b"{}")], "decision_id: required"),
    "unreadable decision": ("add_decision", [raw(b"\xff")], "send one JSON value"),
    "one argument too many": ("grant_wave", [raw(b'"a"'), raw(b'"b"')], "no signal"),
    "entries that are none": ("hand_on", [raw(b'{"x": 1}')], "valid array"),
    "entries with one more": ("hand_on", [raw(b"[]"), raw(b"[]")], "2 were given"),
    "no wave": ("request_wave", [], "0 were given"),
    "unreadable approval": ("approve", [raw(b"{")], "send one JSON value"),
    "approvals": ("approve", [raw(b"{}"), raw(b"{}")], "2 were given"),
    "version": ("context_updated", [raw(b"-1")], "greater than or equal to 0"),
}


async def refusals(story: WorkflowHandle[Any, Any]) -> list[str]:
    lines = [TimelineEntry.model_validate(line) for line in await story.query("timeline")]
    return [line.text for line in lines if line.event == "RequestRefused"]


async def test_an_invalid_signal_leaves_a_line_and_the_story_goes_on(
    start_story: StartStory,
) -> None:
    story = await start_story()
    await story.until(gate="approve_scope")

    for name, inputs, _ in REFUSED_SIGNALS.values():
        await story.handle.signal(name, args=inputs)

    lines = await until(
        lambda: refusals(story.handle), lambda lines: len(lines) >= len(REFUSED_SIGNALS)
    )
    for line, (name, _, reason) in zip(lines, REFUSED_SIGNALS.values(), strict=True):
        assert line.startswith(f"{name} refused: ")
        assert reason in line
    await story.approve("approve_scope")
    await replay(story.handle)


async def test_an_update_or_query_that_cannot_be_read_is_refused_with_its_reason(
    start_story: StartStory,
) -> None:
    story = await start_story()
    await story.until(gate="approve_scope")

    for inputs, reason in UNREADABLE.values():
        with pytest.raises(WorkflowUpdateFailedError) as failed:
            await story.handle.execute_update("approve", args=inputs)
        assert isinstance(failed.value.cause, ApplicationError)
        assert failed.value.cause.type == ErrorType.INVALID_INPUT
        assert reason in failed.value.cause.message
    with pytest.raises(WorkflowQueryFailedError, match="1 were given"):
        await story.handle.query("state", raw(b"{"))
    await story.approve("approve_scope")


@pytest.mark.parametrize("revision", ["", "  ", None])
async def test_an_empty_revision_is_none(start_story: StartStory, revision: str | None) -> None:
    story = await start_story()
    await story.until(gate="approve_scope")

    view = await story.approve("approve_scope", revision=revision)

    assert view.state == "DESIGN"


async def test_whitespace_around_a_revision_is_ignored(start_story: StartStory) -> None:
    story = await start_story()
    shown = (await story.until(gate="approve_scope")).revision

    view = await story.approve("approve_scope", revision=f" {shown}\n")

    assert view.state == "DESIGN"


VALUE = "canary"

RECEIVED: dict[str, TypeAdapter[Any]] = {
    f"{workflow.__name__}.{function.__name__}": TypeAdapter(get_type_hints(function)[name])
    for workflow in WORKFLOWS
    for function in vars(workflow).values()
    if hasattr(function, "__temporal_workflow_run") or hasattr(function, "_defn")
    for name in list(signature(function).parameters)[1:]
}


def documents(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Generate JSON whose objects have the model's field names, and `canary` in every text."""
    names = st.sampled_from(sorted(FIELD_NAME.findall(json.dumps(schema))) or ["unknown"])
    leaves = st.sampled_from([VALUE, f"2026-{VALUE}", f"{VALUE} \n", 1, -1, 1e300, True, None])
    return st.recursive(
        leaves, lambda below: st.lists(below) | st.dictionaries(names, below, max_size=12)
    )


def refusal(name: str, document: Any) -> str:
    """Return the message by which the document is refused; empty if it is accepted."""
    try:
        RECEIVED[name].validate_json(json.dumps(document))
    except ApplicationError as error:
        return error.message
    except ValidationError as error:
        return invalid_input(name, error).message
    return ""


@pytest.mark.parametrize("name", RECEIVED)
@given(data=st.data())
def test_a_refusal_quotes_no_value(name: str, data: st.DataObject) -> None:
    document = data.draw(documents(RECEIVED[name].json_schema()))

    assert VALUE not in refusal(name, document)
