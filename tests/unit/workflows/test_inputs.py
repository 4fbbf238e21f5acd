"""Random updates and signals to running workflows: none stops one, and no refusal is silent."""

from __future__ import annotations

import asyncio
import json
import os
import random
from typing import Any

import pytest
from temporalio import workflow
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import EventType
from temporalio.client import Client, WorkflowHandle, WorkflowUpdateFailedError
from temporalio.common import RawValue
from temporalio.exceptions import ApplicationError

from tests.support.inputs import ENTRY, MILESTONE, SENT, STORY
from tests.support.mutations import encoded, mutated, reworded
from tests.support.polling import until
from tests.unit.conftest import StartStory, World
from workflows.context_update import ContextUpdateWorkflow
from workflows.deliberation import DeliberationWorkflow
from workflows.models.ids import context_workflow_id
from workflows.plan import PlanWorkflow
from workflows.story import StoryWorkflow

SEED = int(os.environ.get("SEED", "12"))
MESSAGES = int(os.environ.get("CALLS", "120"))


@pytest.mark.parametrize("kind", SENT)
def test_there_is_an_input_of_every_update_and_signal(kind: type) -> None:
    defn = workflow._Definition.must_from_class(kind)

    assert {*SENT[kind][1]} == {*defn.updates, *defn.signals}


async def attacked(handle: WorkflowHandle[Any, Any], kind: type, story_id: str) -> None:
    """Send random updates and signals to a workflow, and check that it takes or refuses each."""
    defn = workflow._Definition.must_from_class(kind)
    inputs = json.loads(json.dumps(SENT[kind][1]).replace(STORY, story_id))
    inputs = {name: value for name, value in inputs.items() if name not in ("stop", "precede")}
    if kind is not ContextUpdateWorkflow:
        inputs["skip_entry"] = {"entry_id": "e", "actor": "ana", "reason": "r"}
    for number in range(MESSAGES):
        chosen = random.Random(f"{SEED}/{kind.__name__}/{number}")
        name = chosen.choice(sorted(inputs))
        change = chosen.choice([mutated, reworded, reworded])
        data = encoded(chosen, change(chosen, inputs[name]))
        value = RawValue(Payload(metadata={"encoding": b"json/plain"}, data=data))
        if name in defn.signals and (name not in defn.updates or chosen.random() < 0.3):
            await handle.signal(name, value)
            continue
        try:
            await handle.execute_update(name, value)
        except WorkflowUpdateFailedError as refused:
            cause = refused.cause
            assert isinstance(cause, ApplicationError), number
            assert len(cause.message) > 3, number
    await require_alive(handle)


async def require_alive(handle: WorkflowHandle[Any, Any]) -> None:
    """Require that a workflow answers, and that none of its tasks has failed."""
    await handle.query("outbox")
    failed = [
        event.workflow_task_failed_event_attributes.failure.message
        async for event in handle.fetch_history_events()
        if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED
    ]
    assert failed == []


async def test_no_message_stops_a_story_or_its_council(
    fleet: Client, start_story: StartStory, world: World
) -> None:
    world.hold["propose"] = asyncio.Event()
    story = await start_story()
    await story.to("DESIGN")
    view = await until(story.state, lambda view: view.child)
    council = fleet.get_workflow_handle(view.child)
    await until(lambda: world.calls)

    await attacked(council, DeliberationWorkflow, story.story_id)
    await attacked(story.handle, StoryWorkflow, story.story_id)


async def test_no_message_stops_a_plan(
    fleet: Client, start_story: StartStory, world: World
) -> None:
    story = await start_story()
    await story.to("DESIGN")
    await story.until(gate="approve_design")
    world.hold["propose"] = asyncio.Event()
    before = len(world.calls)
    await story.approve("approve_design")
    view = await until(story.state, lambda view: view.child.startswith("plan-"))
    await until(lambda: len(world.calls) > before)  # the plan's council is at work, so it has begun

    await attacked(fleet.get_workflow_handle(view.child), PlanWorkflow, story.story_id)


async def test_no_message_stops_an_update_of_a_context(fleet: Client, world: World) -> None:
    story_id = f"US-{world.key}"
    world.bus_open.clear()
    update = await fleet.start_workflow(
        ContextUpdateWorkflow.run,
        args=[{"story_id": story_id, "actor": "ana"}],
        id=context_workflow_id(story_id, "1"),
        task_queue="story",
    )
    await until(lambda: world.updates)

    await attacked(update, ContextUpdateWorkflow, story_id)

    world.bus_open.set()
    await update.result()


HOSTILE: dict[str, Any] = {
    "request_wave": [
        {"workflow_id": workflow_id, "wave": "propose", "usage": []}
        for workflow_id in ("", " ", "x" * 70_000, "\x00")
    ],
    "hand_on": [
        [ENTRY | {"body": {}}],
        [ENTRY | {"body": {"duration_ms": "x"}}],
        [ENTRY | {"time": "never"}],
        [ENTRY | {"id": "x" * 70_000}],
        [ENTRY] * 1_000,
    ],
    "add_milestones": [{"milestones": [MILESTONE | {"description": "x" * 500_000}]}],
    "context_updated": [2**31 - 1],
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_no_signal_that_is_valid_by_its_form_stops_a_story(
    start_story: StartStory, name: str
) -> None:
    story = await start_story(token_budget=10_000)
    await story.until(gate="approve_scope")
    for value in HOSTILE[name]:
        own = json.loads(json.dumps(value).replace(STORY, story.story_id))
        await story.handle.signal(name, own)
        await require_alive(story.handle)

    await story.to("DONE")
    await require_alive(story.handle)


@pytest.mark.parametrize("follower", ["", "x" * 70_000])
async def test_no_follower_stops_an_update_of_a_context(
    fleet: Client, world: World, follower: str
) -> None:
    world.bus_open.clear()
    story_id = f"US-{world.key}"
    update = await fleet.start_workflow(
        ContextUpdateWorkflow.run,
        args=[{"story_id": story_id, "actor": "ana"}],
        id=context_workflow_id(story_id, "1"),
        task_queue="story",
    )
    await until(lambda: world.updates)
    await update.signal("follow", follower)

    world.bus_open.set()
    await update.result()
    await require_alive(update)
