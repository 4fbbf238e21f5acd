"""Context updates: stored once, answered at once, and always announced."""

import asyncio

import pytest
from temporalio.client import (
    Client,
    WithStartWorkflowOperation,
    WorkflowFailureError,
    WorkflowUpdateFailedError,
)
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.exceptions import ApplicationError

from tests.support.polling import until
from tests.unit.conftest import StartStory, World
from workflows.context_update import ContextUpdateWorkflow, request_hash
from workflows.models.base import content_hash
from workflows.models.context import ContextAnswer, ContextUpdate, PhaseChange
from workflows.models.entries import Entry
from workflows.models.ids import context_workflow_id
from workflows.models.story import TimelineEntry as Line


async def ask(
    client: Client, update: ContextUpdate, as_of: str = "", request_id: str = "1"
) -> ContextAnswer:
    """Send an update as the service does; `as_of` is another request's hash under the same id."""
    return await client.execute_update_with_start_workflow(
        ContextUpdateWorkflow.stored,
        as_of or request_hash(update),
        start_workflow_operation=WithStartWorkflowOperation(
            ContextUpdateWorkflow.run,
            update,
            id=context_workflow_id(update.story_id, request_id),
            task_queue="story",
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        ),
    )


@pytest.fixture
def update(world: World) -> ContextUpdate:
    return ContextUpdate(story_id=f"US-{world.key}", actor="ana")


async def test_it_answers_when_it_is_stored_and_is_announced_when_the_bus_is_back(
    fleet: Client, world: World, update: ContextUpdate
) -> None:
    world.bus_open.clear()

    answer = await ask(fleet, update)

    assert answer.version == 3
    assert world.published == []
    world.bus_open.set()
    running = fleet.get_workflow_handle(context_workflow_id(update.story_id, "1"))
    await running.result()
    (entry,) = world.published
    assert entry.subject == "context.updated"
    expected = {"version": 3, "changed": ["DECISION", "MILESTONE"]}
    assert {name: entry.body[name] for name in expected} == expected


async def test_a_stored_update_is_announced_although_it_was_cancelled(
    fleet: Client, world: World, update: ContextUpdate
) -> None:
    world.bus_open.clear()
    await ask(fleet, update)
    running = fleet.get_workflow_handle(context_workflow_id(update.story_id, "1"))

    await running.cancel()
    world.bus_open.set()
    await running.result()

    assert world.subjects() == ["context.updated"]


async def test_a_refused_update_is_answered_and_not_announced(
    fleet: Client, world: World, update: ContextUpdate
) -> None:
    world.failing = {"update_context": "case not found"}

    with pytest.raises(WorkflowUpdateFailedError) as caught:
        await ask(fleet, update)

    assert isinstance(caught.value.cause, ApplicationError)
    assert caught.value.cause.type == "UnknownStory"
    with pytest.raises(WorkflowFailureError):
        await fleet.get_workflow_handle(context_workflow_id(update.story_id, "1")).result()
    assert world.recorded == []


async def test_another_request_under_the_same_id_is_refused(
    fleet: Client, world: World, update: ContextUpdate
) -> None:
    world.graph_open.clear()
    first = asyncio.create_task(ask(fleet, update))

    with pytest.raises(WorkflowUpdateFailedError) as caught:
        await ask(fleet, update, as_of="another")

    assert isinstance(caught.value.cause, ApplicationError)
    assert caught.value.cause.type == "RequestReused"
    world.graph_open.set()
    assert (await first).version == 3


async def test_a_story_that_runs_receives_decisions_and_milestones(
    fleet: Client, world: World, start_story: StartStory, update: ContextUpdate
) -> None:
    story = await start_story()
    await story.until(gate="approve_scope")

    await ask(fleet, update)
    await fleet.get_workflow_handle(context_workflow_id(update.story_id, "1")).result()

    lines = await story.handle.query("timeline", result_type=list[Line])
    assert "DEMO" in [line.event for line in lines]


def versions(entries: list[Entry]) -> list[int]:
    """Return the versions of a story's context that these entries announce."""
    return [entry.body["version"] for entry in entries if entry.subject == "context.updated"]


async def activities(client: Client, workflow_id: str) -> list[str]:
    """Return the activities that the workflow has scheduled."""
    history = await client.get_workflow_handle(workflow_id).fetch_history()
    return [
        event.activity_task_scheduled_event_attributes.activity_type.name
        for event in history.events
        if event.HasField("activity_task_scheduled_event_attributes")
    ]


async def signalled(client: Client, workflow_id: str, signal: str) -> None:
    """Wait until the workflow has received that signal."""

    async def names() -> list[str]:
        history = await client.get_workflow_handle(workflow_id).fetch_history()
        return [
            event.workflow_execution_signaled_event_attributes.signal_name
            for event in history.events
        ]

    await until(names, lambda found: signal in found)


async def test_updates_are_announced_in_the_order_of_their_versions(
    fleet: Client, world: World, update: ContextUpdate
) -> None:
    world.bus_open.clear()
    ids = [context_workflow_id(update.story_id, str(number)) for number in (1, 2, 3)]
    await ask(fleet, update, request_id="1")
    await ask(fleet, update, request_id="2")
    await ask(fleet, update, request_id="3")
    for preceding in ids[:2]:
        await signalled(fleet, preceding, "follow")

    await until(lambda: len(versions(world.recorded)) == 3)  # although NATS is unavailable
    publishing = [await activities(fleet, each) for each in ids]
    world.bus_open.set()
    for each in ids:
        await fleet.get_workflow_handle(each).result()

    assert ["publish" in names for names in publishing] == [True, False, False]
    assert versions(world.published) == [3, 4, 5]


async def test_an_update_whose_predecessor_was_terminated_is_announced(
    fleet: Client, world: World, update: ContextUpdate
) -> None:
    world.bus_open.clear()
    await ask(fleet, update, request_id="1")
    await fleet.get_workflow_handle(context_workflow_id(update.story_id, "1")).terminate()
    await ask(fleet, update, request_id="2")

    world.bus_open.set()
    await fleet.get_workflow_handle(context_workflow_id(update.story_id, "2")).result()

    assert versions(world.published)[-1] == 4


async def test_an_amendment_and_updates_have_versions_of_one_row_and_leave_in_order(
    fleet: Client, world: World, start_story: StartStory, update: ContextUpdate
) -> None:
    story = await start_story()
    await story.until(gate="approve_scope")
    world.bus_open.clear()

    await ask(fleet, update, request_id="1")
    await story.update("amend", title="Shorten all links")
    await until(lambda: len(world.updates) == 2)
    await ask(fleet, update, request_id="2")
    await until(lambda: len(versions(world.recorded)) == 3)
    world.bus_open.set()
    await until(lambda: len(versions(world.published)) == 3)

    assert versions(world.published) == [3, 4, 5]
    announced = [entry for entry in world.published if entry.subject == "context.updated"]
    assert [entry.body["changed"] for entry in announced][1] == ["CASE"]
    recorded = [entry.kind for entry in world.recorded]
    assert recorded.index("StorySpec", 2) < max(
        place for place, entry in enumerate(world.recorded) if entry.body.get("changed") == ["CASE"]
    )


async def test_what_was_there_already_is_neither_stored_nor_announced(
    fleet: Client, world: World, update: ContextUpdate
) -> None:
    world.known = True

    answer = await ask(fleet, update.model_copy(update={"if_absent": True}))
    await fleet.get_workflow_handle(context_workflow_id(update.story_id, "1")).result()

    assert (answer.version, answer.changed) == (2, [])
    assert world.recorded == []


async def test_a_change_of_phase_is_announced_before_the_version_that_has_it(
    fleet: Client, world: World, update: ContextUpdate
) -> None:
    moved = PhaseChange(from_phase="DESIGN", to_phase="BUILD", event="transition_phase")

    await ask(fleet, update.model_copy(update={"phase_change": moved}))
    await fleet.get_workflow_handle(context_workflow_id(update.story_id, "1")).result()

    assert world.subjects() == ["planning.story.transitioned", "context.updated"]
    assert world.transitions() == [("DESIGN", "transition_phase", "BUILD")]


def test_a_requests_hash_is_as_histories_hold_it_where_later_fields_say_nothing() -> None:
    update = ContextUpdate(story_id="US-1", actor="ana")
    before = {"story_id", "task_id", "role", "actor", "changes", "timestamp"}

    assert request_hash(update) == content_hash(update.model_dump(include=before))
    assert request_hash(update) != request_hash(update.model_copy(update={"if_absent": True}))


async def test_without_a_time_an_update_is_of_now(
    fleet: Client, world: World, update: ContextUpdate
) -> None:
    await ask(fleet, update)

    (write,) = world.updates
    assert write.at.startswith("20")
    assert write.at.endswith("Z")
    assert write.update_id == context_workflow_id(update.story_id, "1")
