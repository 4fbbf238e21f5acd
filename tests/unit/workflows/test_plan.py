"""PlanWorkflow: the DAG, failures, plans from the bus."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from temporalio.client import Client, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError

from tests.support.polling import until
from tests.unit.conftest import World
from workflows.models.agents import DraftTask, PlannedTask
from workflows.models.ids import derivation_workflow_id, plan_workflow_id
from workflows.models.plan import PlanResult, StoredPlan
from workflows.models.readiness import StoryText

PlanHandle = WorkflowHandle[Any, PlanResult]


def task(
    world: World, name: str, *depends_on: str, role: str = "DEV", title: str = ""
) -> PlannedTask:
    return PlannedTask(
        task_id=f"{world.key}-{name}",
        role=role,
        title=title or f"Task {name}",
        description="Do it.",
        depends_on=[f"{world.key}-{other}" for other in depends_on],
    )


async def start(
    fleet: Client,
    world: World,
    tasks: list[PlannedTask] | None,
    task_queue: str = "story",
    **more: Any,
) -> PlanHandle:
    story_id, plan_id = f"US-{world.key}", "plan-1"
    return await fleet.start_workflow(
        "PlanWorkflow",
        {"story_id": story_id, "plan_id": plan_id, "tasks": tasks} | more,
        id=f"plan-{story_id}-{plan_id}",
        task_queue=task_queue,
        result_type=PlanResult,
    )


def created(world: World) -> list[str]:
    """Return the ids of the tasks that were announced, in order."""
    return [e.body["task_id"] for e in world.published if e.subject == "planning.task.created"]


async def until_asked(world: World, count: int) -> None:
    await until(lambda: len(world.calls) >= count)


async def test_what_does_not_depend_on_each_other_runs_at_once(fleet: Client, world: World) -> None:
    world.hold["propose"] = asyncio.Event()
    handle = await start(fleet, world, [task(world, "a"), task(world, "b"), task(world, "c", "a")])

    await until_asked(world, 6)
    running = {call.task.task_id for call in world.calls}
    world.hold["propose"].set()
    result = await handle.result()

    assert running == {f"{world.key}-a", f"{world.key}-b"}
    assert result.status == "COMPLETED"
    assert [outcome.status for outcome in result.outcomes] == ["done"] * 3


async def test_a_failed_task_stops_only_what_depends_on_it(fleet: Client, world: World) -> None:
    world.failing = {f"{world.key}-a": "no model"}
    tasks = [task(world, "a"), task(world, "b", "a"), task(world, "c", "b"), task(world, "d")]

    result = await (await start(fleet, world, tasks)).result()

    assert result.status == "PARTIAL"
    assert [outcome.status for outcome in result.outcomes] == [
        "failed",
        "not_run",
        "not_run",
        "done",
    ]
    assert "no model" in result.outcomes[0].error
    ends = {
        e.body["task_id"].removeprefix(f"{world.key}-"): (e.subject, e.body["status"])
        for e in world.published
        if e.subject.startswith("orchestration.task.") and "status" in e.body
    }
    failed = "orchestration.task.failed"
    assert ends == {
        "a": (failed, "failed"),
        "b": (failed, "not_run"),
        "c": (failed, "not_run"),
        "d": ("orchestration.task.completed", "done"),
    }
    (first,) = [e.body for e in world.published if e.body.get("status") == "failed"]
    assert (first["plan_id"], first["role"]) == ("plan-1", "DEV")
    assert "no model" in first["error"]
    (plan,) = [e.body for e in world.published if e.subject == "planning.plan.completed"]
    assert plan["status"] == "PARTIAL"
    assert (plan["done"], plan["failed"]) == ([f"{world.key}-d"], [f"{world.key}-a"])
    assert [e.subject for e in world.published][-1] == "planning.plan.completed"


async def test_a_task_gets_the_time_that_its_plan_was_given(fleet: Client, world: World) -> None:
    world.hold["propose"] = asyncio.Event()

    handle = await start(fleet, world, [task(world, "a")], task_timeout=0.3)

    assert "not done after 0.3 s" in (await handle.result()).outcomes[0].error


async def test_a_decision_of_one_task_reaches_the_next(fleet: Client, world: World) -> None:
    result = await (await start(fleet, world, [task(world, "a"), task(world, "b", "a")])).result()

    decided = [decision.title for decision in result.outcomes[0].decisions]
    of_b = [call for call in world.calls if call.task.task_id == f"{world.key}-b"]
    assert [decision.title for decision in of_b[0].late_decisions] == decided


def ends(world: World) -> list[tuple[str, str]]:
    """Return what each recorded end is of, without the world's key, and its status."""
    return [
        (
            (e.body.get("task_id") or e.body["plan_id"]).removeprefix(f"{world.key}-"),
            e.body["status"],
        )
        for e in world.recorded
        if e.kind in ("TaskCompleted", "TaskFailed", "PlanFinished")
    ]


async def test_a_cycle_is_refused_by_its_ids(fleet: Client, world: World) -> None:
    handle = await start(fleet, world, [task(world, "a", "b"), task(world, "b", "a")])

    with pytest.raises(WorkflowFailureError) as failed:
        await handle.result()

    cause = failed.value.cause
    assert isinstance(cause, ApplicationError)
    assert cause.type == "InvalidInput"
    assert "tasks" in cause.message
    assert f"{world.key}-a" in cause.message
    assert world.calls == []
    assert ends(world) == [("a", "cancelled"), ("b", "cancelled"), ("plan-1", "FAILED")]


async def test_a_plan_whose_tasks_cannot_be_derived_has_failed(fleet: Client, world: World) -> None:
    world.stored = StoredPlan(story=StoryText(title="Shorten links"))
    world.failing = {"derive_plan": "no model"}

    with pytest.raises(WorkflowFailureError):
        await (await start(fleet, world, None)).result()

    assert ends(world) == [("plan-1", "FAILED")]


async def test_a_plan_that_is_cancelled_while_its_tasks_are_derived_ends_cancelled(
    fleet: Client, world: World
) -> None:
    world.stored = StoredPlan(story=StoryText(title="Shorten links"))
    world.hold["derive_plan"] = asyncio.Event()
    handle = await start(fleet, world, None)
    await until(lambda: world.acts)

    await handle.cancel()
    with pytest.raises(WorkflowFailureError):
        await handle.result()

    assert ends(world) == [("plan-1", "CANCELLED")]


async def test_an_unknown_plan_ends_as_nothing_to_run(fleet: Client, world: World) -> None:
    result = await (await start(fleet, world, None)).result()

    assert (result.status, result.outcomes) == ("NOTHING_TO_RUN", [])
    assert [e.body["status"] for e in world.recorded if e.kind == "PlanFinished"] == [
        "NOTHING_TO_RUN"
    ]


async def test_a_plan_of_an_unknown_story_runs_one_deliberation_for_each_of_its_roles(
    fleet: Client, world: World
) -> None:
    handle = await start(fleet, world, None, roles=["DEV", "QA", "DEV"])

    result = await handle.result()

    assert result.status == "COMPLETED"
    assert [outcome.role for outcome in result.outcomes] == ["DEV", "QA"]
    ids = [f"US-{world.key}-plan-1-dev", f"US-{world.key}-plan-1-qa"]
    assert created(world) == [outcome.task_id for outcome in result.outcomes] == ids
    assert [e.body["plan_id"] for e in world.recorded if e.kind == "PlanDerived"] == ["plan-1"]


async def test_a_plan_of_a_story_with_an_odd_id_runs_under_the_encoded_id(
    fleet: Client, world: World
) -> None:
    story_id = f"US {world.key}.1:a"
    handle = await fleet.start_workflow(
        "PlanWorkflow",
        {"story_id": story_id, "plan_id": "plan 1", "roles": ["DEV"]},
        id=plan_workflow_id(story_id, "plan 1"),
        task_queue="story",
        result_type=PlanResult,
    )

    result = await handle.result()

    assert result.outcomes[0].task_id == f"{story_id}-plan 1-dev"
    assert {e.story_id for e in world.recorded} == {story_id}


async def test_a_plan_from_the_bus_takes_its_tasks_from_the_graph(
    fleet: Client, world: World
) -> None:
    world.stored = StoredPlan(tasks=[task(world, "a")])

    result = await (await start(fleet, world, None)).result()

    assert [outcome.task_id for outcome in result.outcomes] == [f"{world.key}-a"]
    assert created(world) == [f"{world.key}-a"]


async def test_a_plan_without_tasks_is_derived_from_its_storys_node(
    fleet: Client, world: World
) -> None:
    world.stored = StoredPlan(story=StoryText(title="Shorten links"))
    world.drafts = [DraftTask(role="DEV", title="Build", description="Do.")]
    story_id, plan_id = f"US-{world.key}", f"p-{world.key}"
    handle: PlanHandle = await fleet.start_workflow(
        "PlanWorkflow",
        {"story_id": story_id, "plan_id": plan_id},
        id=f"plan-{story_id}-{plan_id}",
        task_queue="story",
        result_type=PlanResult,
    )

    result = await handle.result()

    assert result.status == "COMPLETED"
    assert world.recorded[0].kind == "PlanDerived"
    assert created(world) == [f"{plan_id}-t1"]


@pytest.mark.parametrize("kind", ["plan", "derivation"])
async def test_a_derived_plan_names_only_roles_that_have_a_council(
    fleet: Client, world: World, kind: str
) -> None:
    world.stored = StoredPlan(story=StoryText(title="Shorten links"))
    world.drafts = [DraftTask(role="PLUMBER", title="Build", description="Do.")]
    story_id, plan_id = f"US-{world.key}", "plan-1"
    workflow_id = {"plan": plan_workflow_id, "derivation": derivation_workflow_id}[kind]

    with pytest.raises(WorkflowFailureError) as failed:
        await fleet.execute_workflow(
            f"{kind.capitalize()}Workflow",
            {"story_id": story_id, "plan_id": plan_id},
            id=workflow_id(story_id, plan_id),
            task_queue="story",
        )

    cause = failed.value.cause
    assert isinstance(cause, ApplicationError)
    assert (cause.type, "unknown role 'PLUMBER'" in cause.message) == ("InvalidPlan", True)
    assert created(world) == []
    assert ends(world) == ([("plan-1", "FAILED")] if kind == "plan" else [])


async def test_a_cancelled_plan_cancels_its_deliberations(fleet: Client, world: World) -> None:
    world.hold["propose"] = asyncio.Event()
    handle = await start(fleet, world, [task(world, "a"), task(world, "b")])
    await until_asked(world, 6)

    await handle.cancel()
    with pytest.raises(WorkflowFailureError):
        await handle.result()

    for name in ("a", "b"):
        child = fleet.get_workflow_handle(f"deliberation-{world.key}-{name}")
        description = await child.describe()
        assert description.status is not None
        assert description.status.name == "CANCELED"
    assert [e.body["status"] for e in world.recorded if e.kind == "PlanFinished"] == ["CANCELLED"]
    ends = [e.body for e in world.published if e.subject == "orchestration.task.failed"]
    assert [(end["task_id"], end["status"]) for end in ends] == [
        (f"{world.key}-a", "cancelled"),
        (f"{world.key}-b", "cancelled"),
    ]
