"""Plans that continue as new between two batches of tasks, and lose nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from temporalio import workflow
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowFailureError
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError
from temporalio.worker import Worker

from activities.children import Children
from deploy.local.ports import free_ports
from tests.support.branches import committing_councils
from tests.support.fleet import connect
from tests.support.polling import until
from tests.support.repositories import in_store
from tests.support.sandbox import sandboxed_runner
from tests.support.servers import EarlyTemporal, started
from tests.unit.conftest import StartStory, World, activities, instant_workers
from tests.unit.workflows.test_plan import PlanHandle, start, task
from tests.unit.workflows.test_repairs import dispatched
from tests.unit.workflows.test_story_branch import Repo
from workers.search_attributes import register
from workflows.batches import AT_ONCE
from workflows.models.agents import DraftTask, PlannedTask, Proposal
from workflows.models.deliberation import DeliberationInput, DeliberationResult
from workflows.models.ids import deliberation_workflow_id, plan_workflow_id
from workflows.plan import PlanWorkflow
from workflows.story import StoryWorkflow

pytestmark = pytest.mark.slow  # its server is its own

HELD = "Held"
"""How the title of a task begins whose council waits for the signal `go`."""


@workflow.defn(name="DeliberationWorkflow", sandboxed=False)
class PatientCouncil:
    """A council without agents, which is done at once or waits."""

    def __init__(self) -> None:
        self.may_go = False

    @workflow.signal
    def go(self) -> None:
        self.may_go = True

    @workflow.run
    async def run(self, input: DeliberationInput) -> DeliberationResult:
        """Wait if the task is to be held."""
        held = input.description.startswith(HELD)
        await workflow.wait_condition(lambda: self.may_go or not held)
        return DeliberationResult(
            task_id=input.task_id,
            deliberation_id=workflow.info().workflow_id,
            role=input.role,
            status="completed",
            winner_id="agent-1",
            score=1.0,
            winner=Proposal(approach="directly", content="Done."),
        )


@asynccontextmanager
async def patient_councils(client: Client, world: World) -> AsyncIterator[str]:
    """Run stories and plans with such councils; yield their task queue."""
    queue = f"patient-{world.key}"
    async with Worker(
        client,
        task_queue=queue,
        workflows=[StoryWorkflow, PlanWorkflow, PatientCouncil],
        activities=[*activities(), Children(client).follow],
        workflow_runner=sandboxed_runner(),
    ):
        yield queue


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Client]:
    """Return a client of a server that suggests continue-as-new after 40 events."""
    port, ui_port = free_ports(2)
    home = tmp_path_factory.mktemp("early") / "temporal"
    early = EarlyTemporal(home, port, ui_port, events=40)
    async with started(early, early.address, port=port):
        client = await connect(early.address)
        await register(client)
        async with instant_workers(client):
            yield client


def chain(world: World, length: int, held: Collection[int] = ()) -> list[PlannedTask]:
    """Return tasks each of which depends on the one before. `held`: numbers of those to hold."""
    names = [f"n{number}" for number in range(1, length + 1)]
    return [
        task(world, name, *names[:number][-1:], title=HELD if number + 1 in held else "")
        for number, name in enumerate(names)
    ]


def named(world: World, subject: str) -> list[str]:
    """Return the tasks of the events with this subject, in order."""
    return [e.body["task_id"] for e in world.published if e.subject == subject]


async def until_dispatched(world: World, task_id: str) -> None:
    await until(lambda: task_id in named(world, "orchestration.task.dispatched"))


async def let_go(client: Client, task_id: str) -> None:
    """Let a held council go, which may be only about to begin."""

    async def sent() -> bool:
        with suppress(RPCError):
            await client.get_workflow_handle(deliberation_workflow_id(task_id)).signal("go")
            return True
        return False

    await until(sent)


async def runs_later(client: Client, workflow_id: str) -> bool:
    """Return whether the workflow's run continues another one."""
    history = await client.get_workflow_handle(workflow_id).fetch_history()
    began = history.events[0].workflow_execution_started_event_attributes
    return bool(began.continued_execution_run_id)


async def held_in_a_later_run(
    client: Client, world: World, queue: str
) -> tuple[PlanHandle, list[str]]:
    """Return a plan of 10 tasks that has continued as new and whose eighth waits, and their ids."""
    tasks = chain(world, 10, held=[8])
    handle = await start(client, world, tasks, queue)
    ids = [each.task_id for each in tasks]
    await until_dispatched(world, ids[7])
    assert await runs_later(client, handle.id)
    return handle, ids


async def test_a_plan_continues_as_new_and_loses_nothing(server: Client, world: World) -> None:
    bad, left_out = task(world, "bad"), task(world, "left-out", "bad")
    world.failing = {bad.task_id: "no model"}
    tasks = [bad, left_out, *chain(world, 4)]

    handle = await start(server, world, tasks)
    result = await handle.result()
    progress = await server.get_workflow_handle(handle.id).query("progress")

    assert await runs_later(server, handle.id)
    assert [outcome.task_id for outcome in result.outcomes] == [each.task_id for each in tasks]
    assert [outcome.status for outcome in result.outcomes] == ["failed", "not_run", *["done"] * 4]
    ids = [each.task_id for each in tasks]
    assert sorted(named(world, "orchestration.task.dispatched")) == sorted([ids[0], *ids[2:]])
    assert named(world, "orchestration.task.completed") == ids[2:]
    assert Counter(named(world, "orchestration.task.failed")) == Counter(ids[:2])
    published = [entry.id for entry in world.published]
    assert len(set(published)) == len(published)
    assert published == [entry.id for entry in world.recorded if entry.subject]
    of_last = [call for call in world.calls if call.task.task_id == ids[-1]]
    decided = [decision.id for outcome in result.outcomes[:-1] for decision in outcome.decisions]
    assert [decision.decision_id for decision in of_last[0].late_decisions] == decided
    assert progress == {each.task_id: each.status for each in result.outcomes}


async def test_a_plan_that_is_cancelled_in_a_later_run_ends_every_task_once(
    server: Client, world: World
) -> None:
    async with patient_councils(server, world) as queue:
        handle, ids = await held_in_a_later_run(server, world, queue)

        await server.get_workflow_handle(handle.id).cancel()
        with pytest.raises(WorkflowFailureError):
            await handle.result()

    child = await server.get_workflow_handle(deliberation_workflow_id(ids[7])).describe()
    assert child.status == WorkflowExecutionStatus.CANCELED
    assert named(world, "orchestration.task.completed") == ids[:7]
    assert named(world, "orchestration.task.failed") == ids[7:]
    (end,) = [e.body for e in world.recorded if e.kind == "PlanFinished"]
    assert (end["status"], end["done"]) == ("CANCELLED", ids[:7])


async def test_another_worker_goes_on_with_a_later_run(server: Client, world: World) -> None:
    async with patient_councils(server, world) as queue:
        handle, ids = await held_in_a_later_run(server, world, queue)
    await let_go(server, ids[7])

    async with patient_councils(server, world):
        result = await handle.result()

    assert [outcome.task_id for outcome in result.outcomes] == ids
    assert result.status == "COMPLETED"
    assert named(world, "orchestration.task.dispatched") == ids
    assert named(world, "orchestration.task.completed") == ids


async def test_a_plan_that_outlives_its_storys_run_does_so_in_its_own_later_runs(
    server: Client, world: World
) -> None:
    async with patient_councils(server, world) as queue:
        tasks = chain(world, 9, held=[1, 8, 9])
        ids = [each.task_id for each in tasks]
        handle = await start(server, world, tasks, queue)
        await handle.signal("outlive")
        await until_dispatched(world, ids[0])
        await let_go(server, ids[0])
        await until_dispatched(world, ids[7])
        assert await runs_later(server, handle.id)

        await server.get_workflow_handle(handle.id).cancel()
        await let_go(server, ids[7])
        await until_dispatched(world, ids[8])
        await server.get_workflow_handle(handle.id).signal("stop")
        with pytest.raises(WorkflowFailureError):
            await handle.result()

    assert named(world, "orchestration.task.completed") == ids[:8]
    assert named(world, "orchestration.task.failed") == ids[8:]


async def test_the_next_run_merges_on_what_the_last_one_merged(
    server: Client, world: World, tmp_path: Path
) -> None:
    repo = Repo(world, tmp_path)
    names = [f"part-{number}" for number in range(1, 7)]
    world.drafts = [
        DraftTask(role="DEV", title=name, description="Do it.", depends_on=[number] * (number > 0))
        for number, name in enumerate(names)
    ]
    world.edits |= {name: {f"{name}.txt": "x\n"} for name in names}
    async with committing_councils(server, world) as queue:
        story = await StartStory(server, world, queue)(repository="sample", approvals="auto")
        result = await story.handle.result()

    plan = plan_workflow_id(story.story_id, f"{story.story_id}-plan-1")
    assert await runs_later(server, plan)
    assert result.branch is not None
    files = in_store(repo.store, "ls-tree", "--name-only", result.branch.head).split()
    assert {f"{name}.txt" for name in names} <= set(files)
    assert dispatched(world) == [f"t{number}" for number in range(1, 7)]


async def test_a_task_for_which_a_plan_has_no_room_begins_when_another_has_ended(
    fleet: Client, world: World
) -> None:
    ids = [f"{world.key}-n{number}" for number in range(AT_ONCE + 1)]
    tasks = [task(world, f"n{number}", title=HELD) for number in range(AT_ONCE + 1)]
    async with patient_councils(fleet, world) as queue:
        handle = await start(fleet, world, tasks, queue)
        await until_dispatched(world, ids[AT_ONCE - 1])
        progress: dict[str, str] = await handle.query("progress")
        await let_go(fleet, ids[0])
        await until_dispatched(world, ids[AT_ONCE])
        await handle.terminate()

    assert Counter(progress.values()) == {"running": AT_ONCE, "waiting": 1}


async def test_a_plan_cannot_be_started_with_the_progress_of_another(
    server: Client, world: World
) -> None:
    async with patient_councils(server, world) as queue:
        handle = await start(server, world, chain(world, 1), queue, carried={})
        with pytest.raises(WorkflowFailureError) as failed:
            await handle.result()

    cause = failed.value.cause
    assert isinstance(cause, ApplicationError)
    assert (cause.type, "carried: is set by" in cause.message) == ("InvalidInput", True)
