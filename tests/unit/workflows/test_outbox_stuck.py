"""Outbox entries that can never be stored are shown, retried, and skipped by a person.

They do not delay a cancellation.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from temporalio import workflow
from temporalio.api.enums.v1 import EventType
from temporalio.api.sdk.v1 import WorkflowMetadata
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowFailureError, WorkflowHandle
from temporalio.client import WorkflowUpdateFailedError as UpdateFailed
from temporalio.exceptions import ApplicationError, CancelledError
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from tests.support.polling import WITHIN_S, until
from tests.unit.conftest import RunningStory, StartStory, World
from workflows.deliberation import DeliberationWorkflow
from workflows.models.deliberation import DeliberationInput
from workflows.models.entries import Entry
from workflows.models.events import StoryCreated
from workflows.models.ids import closure_workflow_id, deliberation_workflow_id
from workflows.models.outbox import OutboxState, OutboxStuck
from workflows.models.story import TimelineEntry
from workflows.outbox import Outbox


async def stuck_on(handle: WorkflowHandle[Any, Any] | RunningStory, kind: str) -> OutboxStuck:
    """Wait until an entry of that kind is stuck, and return it."""
    queried = handle.handle if isinstance(handle, RunningStory) else handle

    async def of_that_kind() -> list[OutboxStuck]:
        found = await queried.query("outbox_stuck", result_type=list[OutboxStuck])
        return [each for each in found if each.kind == kind]

    return (await until(of_that_kind))[0]


async def skip(handle: WorkflowHandle[Any, Any], stuck: OutboxStuck, **changes: str) -> OutboxStuck:
    request = {"entry_id": stuck.entry_id, "actor": "ana", "reason": "it never fits"} | changes
    answer: OutboxStuck = await handle.execute_update(
        "skip_entry", request, result_type=OutboxStuck
    )
    return answer


async def details(handle: WorkflowHandle[Any, Any]) -> str:
    metadata = await handle.query("__temporal_workflow_metadata", result_type=WorkflowMetadata)
    return str(metadata.current_details)


async def test_a_stuck_entry_is_shown_and_skipped_and_its_record_takes_its_place(
    start_story: StartStory, world: World
) -> None:
    world.failing = {"record/StoryCreated": "title: longer than the graph holds"}
    story = await start_story()
    stuck = await stuck_on(story, "StoryCreated")

    assert (stuck.step, stuck.error_type) == ("record", "InvalidEntry")
    assert stuck.error == "title: longer than the graph holds"
    assert [entry.kind for entry in world.recorded] == ["StorySpec"]
    shown = await details(story.handle)
    assert "longer than the graph holds" in shown
    assert "--name skip_entry" in shown
    assert json.dumps(stuck.entry_id) in shown
    await until(lambda: is_listed(start_story.client, story, "OutboxStuck = 'StoryCreated'"))

    assert await skip(story.handle, stuck) == stuck

    await story.to("DONE")
    await story.handle.result()
    kinds = [entry.kind for entry in world.recorded]
    assert kinds[:2] == ["StorySpec", "EntrySkipped"]
    assert "StoryCreated" not in kinds
    record = world.recorded[1].body
    assert (record["actor"], record["reason"]) == ("ana", "it never fits")
    assert json.loads(record["entry"])["id"] == stuck.entry_id
    letters = [entry for entry in world.published if entry.kind == "EntrySkipped"]
    assert [letter.subject for letter in letters] == ["deadletter.outbox"]
    timeline = await story.handle.query("timeline", result_type=list[TimelineEntry])
    (line,) = [entry for entry in timeline if entry.event == "EntrySkipped"]
    assert line.actor == "ana"
    assert "it never fits" in line.text
    assert "skip_entry" not in await details(story.handle)
    assert await story.handle.query("outbox_stuck") == []


async def is_listed(client: Client, story: RunningStory, query: str) -> bool:
    found = client.list_workflows(f"WorkflowId = '{story.handle.id}' AND {query}")
    return [each async for each in found] != []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"entry_id": "another"}, "EntryNotStuck"), ({"reason": ""}, "InvalidInput")],
)
async def test_only_a_stuck_entry_is_skipped_and_only_with_a_reason(
    start_story: StartStory, world: World, changes: dict[str, str], expected: str
) -> None:
    world.failing = {"record/StorySpec": "no"}
    story = await start_story()
    stuck = await stuck_on(story, "StorySpec")

    with pytest.raises(UpdateFailed) as caught:
        await skip(story.handle, stuck, **changes)

    assert isinstance(caught.value.cause, ApplicationError)
    assert caught.value.cause.type == expected
    if expected == "EntryNotStuck":
        assert stuck.entry_id in caught.value.cause.message
    await skip(story.handle, stuck)


async def test_an_entry_whose_cause_is_removed_is_stored_without_a_person(
    start_skipping_story: StartStory, world: World
) -> None:
    world.failing = {"record/StoryCreated": "no"}
    story = await start_skipping_story()
    await stuck_on(story, "StoryCreated")

    world.failing = {}
    async with story.skipping_time():
        await until(lambda: "planning.gate.opened" in world.subjects())

    assert [entry.kind for entry in world.recorded][:2] == ["StorySpec", "StoryCreated"]
    assert await story.handle.query("outbox_stuck") == []


async def test_an_entry_that_cannot_be_published_is_skipped_and_the_rest_is_published(
    start_story: StartStory, world: World
) -> None:
    world.failing = {"publish/StoryCreated": "larger than the bus takes"}
    story = await start_story()
    stuck = await stuck_on(story, "StoryCreated")
    assert stuck.step == "publish"

    await skip(story.handle, stuck)
    await story.to("DONE")
    await story.handle.result()

    assert "planning.story.created" not in world.subjects()
    assert world.subjects().count("planning.story.transitioned") >= 5
    kinds = [entry.kind for entry in world.recorded]
    assert "StoryCreated" in kinds
    assert "EntrySkipped" in kinds


async def test_a_story_is_cancelled_while_an_entry_is_stuck_and_what_is_left_goes_on(
    start_story: StartStory, world: World
) -> None:
    world.failing = {"record/StorySpec": "no"}
    story = await start_story()
    await stuck_on(story, "StorySpec")

    await story.handle.cancel()
    async with asyncio.timeout(WITHIN_S):
        with pytest.raises(WorkflowFailureError) as caught:
            await story.handle.result()
    assert isinstance(caught.value.cause, CancelledError)
    assert "planning.story.cancelled" not in world.subjects()

    run_id = story.handle.first_execution_run_id or ""
    closure = start_story.client.get_workflow_handle(closure_workflow_id(story.story_id, run_id))
    stuck = await stuck_on(closure, "StorySpec")
    await skip(closure, stuck)
    async with asyncio.timeout(WITHIN_S):
        await closure.result()
    assert world.subjects()[-1] == "planning.story.cancelled"
    assert "EntrySkipped" in [entry.kind for entry in world.recorded]


async def test_a_story_that_is_done_is_cancelled_while_its_last_entry_is_stuck(
    start_story: StartStory, world: World
) -> None:
    story = await start_story()
    await story.to("DOCS")
    await story.until(gate="docs_ready")
    world.failing = {"record/StoryTransitioned": "no"}
    await story.approve("docs_ready")
    await stuck_on(story, "StoryTransitioned")

    await story.handle.cancel()
    async with asyncio.timeout(WITHIN_S):
        with pytest.raises(WorkflowFailureError):
            await story.handle.result()

    run_id = story.handle.first_execution_run_id or ""
    closure = start_story.client.get_workflow_handle(closure_workflow_id(story.story_id, run_id))
    assert (await closure.describe()).status == WorkflowExecutionStatus.RUNNING
    await skip(closure, await stuck_on(closure, "StoryTransitioned"))
    async with asyncio.timeout(WITHIN_S):
        await closure.result()
    assert "planning.story.cancelled" not in world.subjects()


async def test_a_standalone_deliberation_is_cancelled_while_it_is_stuck(
    fleet: Client, world: World
) -> None:
    world.failing = {"record/DeliberationStarted": "no"}
    story_id, task_id = f"US-{world.key}", f"task-{world.key}"
    deliberation = await fleet.start_workflow(
        DeliberationWorkflow.run,
        DeliberationInput(task_id=task_id, story_id=story_id, role="DEV", description="Shorten"),
        id=deliberation_workflow_id(task_id),
        task_queue="story",
    )
    await until(
        lambda: deliberation.query(DeliberationWorkflow.result), lambda result: result is not None
    )
    await stuck_on(deliberation, "DeliberationStarted")
    assert "--name skip_entry" in await details(deliberation)

    await deliberation.cancel()
    async with asyncio.timeout(WITHIN_S):
        with pytest.raises(WorkflowFailureError):
            await deliberation.result()

    run_id = deliberation.first_execution_run_id or ""
    closure = fleet.get_workflow_handle(closure_workflow_id(story_id, run_id))
    await skip(closure, await stuck_on(closure, "DeliberationStarted"))
    async with asyncio.timeout(WITHIN_S):
        await closure.result()
    assert "orchestration.deliberation.completed" in world.subjects()
    assert "orchestration.deliberation.started" not in world.subjects()


async def test_a_story_that_is_not_stuck_waits_with_its_cancellation_for_the_stores(
    start_story: StartStory, world: World
) -> None:
    world.graph_open.clear()
    story = await start_story()
    await story.until(gate="approve_scope")
    await story.handle.cancel()
    await until(story.state, lambda view: view.cancelled)

    world.graph_open.set()
    with pytest.raises(WorkflowFailureError):
        await story.handle.result()

    assert world.subjects()[-1] == "planning.story.cancelled"
    history = await story.handle.fetch_history()
    assert EventType.EVENT_TYPE_START_CHILD_WORKFLOW_EXECUTION_INITIATED not in {
        event.event_type for event in history.events
    }


class Faulty(Outbox):
    """An outbox with a fault, until a new version of the code is deployed."""

    fault = True

    def _settled(self, batch: list[Entry]) -> None:
        if Faulty.fault:
            raise KeyError("a bug")
        super()._settled(batch)


@workflow.defn(name="WithAFault")
class WithAFault:
    """A workflow whose outbox has the fault."""

    def __init__(self) -> None:
        self.outbox = Faulty(OutboxState(), "US-1")

    @workflow.run
    async def run(self) -> None:
        self.outbox.start()
        self.outbox.append(StoryCreated(title="t", rigor="L1", created_by="ana"))
        await self.outbox.drained()


async def test_an_unexpected_error_in_the_outbox_fails_the_workflow_task_until_it_is_corrected(
    fleet: Client, world: World
) -> None:
    queue = f"faulty-{world.key}"
    async with Worker(
        fleet,
        task_queue=queue,
        workflows=[WithAFault],
        workflow_runner=UnsandboxedWorkflowRunner(),
        max_cached_workflows=0,
    ):
        handle = await fleet.start_workflow("WithAFault", id=queue, task_queue=queue)

        async def failed() -> list[str]:
            return [
                event.workflow_task_failed_event_attributes.failure.message
                async for event in handle.fetch_history_events()
                if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED
            ]

        messages = await until(failed)
        assert messages[0] == "outbox: record failed: KeyError('a bug')"

        Faulty.fault = False
        async with asyncio.timeout(WITHIN_S):
            await handle.result()
