"""Councils that are terminated: their parent announces the end that they cannot announce."""

from __future__ import annotations

import asyncio

from temporalio.client import Client

from tests.support.polling import until
from tests.unit.conftest import StartStory, World
from tests.unit.workflows.test_plan import start, task, until_asked
from workflows.early_ends import EARLY_END
from workflows.models.events import DeliberationFailed, PlanFinished, TaskFailed


def ends(world: World) -> list[tuple[str, str]]:
    """Return the tasks of the failed deliberations that were announced, and why they failed."""
    return [
        (str(entry.body["task_id"]), str(entry.body["error_type"]))
        for entry in world.published
        if entry.subject == DeliberationFailed.SUBJECT
    ]


async def test_a_plan_announces_the_end_of_a_terminated_council(
    fleet: Client, world: World
) -> None:
    world.hold["propose"] = asyncio.Event()
    plan = await start(fleet, world, [task(world, "a"), task(world, "b")])
    await until_asked(world, 6)

    await fleet.get_workflow_handle(f"deliberation-{world.key}-a").terminate()
    await until(lambda: ends(world))
    world.hold["propose"].set()
    result = await plan.result()

    assert ends(world) == [(f"{world.key}-a", "Terminated")]
    assert [outcome.status for outcome in result.outcomes] == ["failed", "done"]


async def test_a_story_announces_the_end_of_a_terminated_council(
    fleet: Client, world: World, start_story: StartStory
) -> None:
    world.hold["propose"] = asyncio.Event()
    story = await start_story()
    await story.to("DESIGN")
    await until_asked(world, 3)

    council = f"{story.story_id}-design-1"
    await fleet.get_workflow_handle(f"deliberation-{council}").terminate()

    await until(lambda: ends(world))
    assert ends(world) == [(council, "Terminated")]


async def test_a_plan_says_what_would_end_it_and_nothing_once_it_has_ended(
    fleet: Client, world: World
) -> None:
    world.hold["propose"] = asyncio.Event()
    plan = await start(fleet, world, [task(world, "a"), task(world, "b", "a")])
    await until_asked(world, 3)

    asked = await plan.query(EARLY_END, result_type=list[TaskFailed | PlanFinished])
    world.hold["propose"].set()
    await plan.result()

    assert [type(end).__name__ for end in asked] == ["TaskFailed", "TaskFailed", "PlanFinished"]
    assert {end.story_id for end in asked} == {f"US-{world.key}"}
    assert await plan.query(EARLY_END) == []


async def test_a_council_says_what_would_end_it_and_nothing_once_it_has_ended(
    fleet: Client, world: World
) -> None:
    world.hold["propose"] = asyncio.Event()
    plan = await start(fleet, world, [task(world, "a")])
    await until_asked(world, 3)
    council = fleet.get_workflow_handle(f"deliberation-{world.key}-a")

    (end,) = await council.query(EARLY_END, result_type=list[DeliberationFailed])
    world.hold["propose"].set()
    await plan.result()

    assert (end.task_id, end.role) == (f"{world.key}-a", "DEV")
    assert await council.query(EARLY_END) == []
