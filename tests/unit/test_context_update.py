"""An update of the context: stored once, answered at once, announced whatever happens."""

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

from tests.unit.conftest import StartStory, World
from workflows.context_update import ContextUpdateWorkflow, request_hash
from workflows.models import ContextAnswer, ContextUpdate, context_workflow_id
from workflows.models import TimelineEntry as Line


async def ask(client: Client, update: ContextUpdate, as_of: str = "") -> ContextAnswer:
    """As the service asks. as_of: the hash of another request under the same id."""
    return await client.execute_update_with_start_workflow(
        ContextUpdateWorkflow.stored,
        as_of or request_hash(update),
        start_workflow_operation=WithStartWorkflowOperation(
            ContextUpdateWorkflow.run,
            update,
            id=context_workflow_id(update.story_id, "1"),
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
    told = {"version": 3, "changed": ["DECISION", "MILESTONE"]}
    assert {name: entry.body[name] for name in told} == told


async def test_a_cancellation_does_not_keep_what_is_stored_from_being_announced(
    fleet: Client, world: World, update: ContextUpdate
) -> None:
    world.bus_open.clear()
    await ask(fleet, update)
    running = fleet.get_workflow_handle(context_workflow_id(update.story_id, "1"))

    await running.cancel()
    world.bus_open.set()
    await running.result()

    assert world.subjects() == ["context.updated"]


async def test_a_refusal_is_the_answer_and_nothing_is_announced(
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


async def test_a_story_that_runs_hears_of_decisions_and_milestones(
    fleet: Client, world: World, start_story: StartStory, update: ContextUpdate
) -> None:
    story = await start_story()
    await story.until(gate="approve_scope")

    await ask(fleet, update)
    await fleet.get_workflow_handle(context_workflow_id(update.story_id, "1")).result()

    lines = await story.handle.query("timeline", result_type=list[Line])
    assert "DEMO" in [line.event for line in lines]


async def test_without_a_time_of_its_own_an_update_is_of_now(
    fleet: Client, world: World, update: ContextUpdate
) -> None:
    await ask(fleet, update)

    (write,) = world.updates
    assert write.at.startswith("20")
    assert write.at.endswith("Z")
    assert write.update_id == context_workflow_id(update.story_id, "1")
