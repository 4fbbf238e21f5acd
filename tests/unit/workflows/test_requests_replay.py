"""Requests that arrive while people look at the story: the history replays."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from temporalio.client import Client, WorkflowFailureError
from temporalio.worker import Replayer, Worker

from tests.support.polling import until
from tests.support.sandbox import sandboxed_runner
from tests.unit.conftest import RunningStory, StartStory, World, activities
from workers.processes.story import WORKFLOWS
from workflows import actors

STORIES = 5
LOOKS = 20


def replayer(client: Client) -> Replayer:
    return Replayer(
        workflows=WORKFLOWS,
        data_converter=client.data_converter,
        workflow_runner=sandboxed_runner(),
    )


def test_only_histories_of_older_releases_have_local_activities() -> None:
    using = {
        path.name
        for path in Path(actors.__file__).parent.rglob("*.py")
        if "execute_local_activity" in path.read_text()
    }

    assert using == {"actors.py"}


async def test_a_story_replays_whose_requests_were_checked_while_people_looked(
    fleet: Client, start_story: StartStory, world: World
) -> None:
    """A query can end the workflow task in which a request waits."""

    def amended(text: dict[str, Any]) -> bool:
        return bool(text["brief"])

    for number in range(STORIES):
        story = await start_story(story_id=f"US-{world.key}-{number}")
        await story.until(gate="approve_scope")
        looks = [asyncio.create_task(story.state()) for _ in range(LOOKS)]
        await story.handle.signal("amend", {"brief": "Another one.", "actor": "ana"})
        await asyncio.gather(*looks, *(story.state() for _ in range(LOOKS)))
        await until(partial(story.handle.query, "text"), amended)
        await story.handle.cancel()
        with suppress(WorkflowFailureError):
            await story.handle.result()

        await replayer(fleet).replay_workflow(await story.handle.fetch_history())


@pytest.mark.parametrize(("cached", "pause"), [(0, 0.5), (200, 0.01)])
async def test_a_story_that_is_looked_at_all_the_time_reaches_its_end_and_replays(
    fleet: Client, world: World, cached: int, pause: float
) -> None:
    """With no cache, each workflow task and each query replays the history."""
    queue = f"looked-at-{world.key}"
    async with Worker(
        fleet,
        task_queue=queue,
        workflows=WORKFLOWS,
        activities=activities(),
        workflow_runner=sandboxed_runner(),
        max_cached_workflows=cached,
    ):
        story = await StartStory(fleet, world, queue)(token_budget=1_000_000)
        looking = asyncio.create_task(look(story, pause))
        await story.until(gate="approve_scope")
        await story.handle.signal("amend", {"brief": "Another one.", "actor": "ana"})
        await story.until(gate="approve_scope")
        await story.update("raise_budget", tokens=5, actor="ana", role="PO")
        await story.finish()
        looking.cancel()

    await replayer(fleet).replay_workflow(await story.handle.fetch_history())


async def look(story: RunningStory, pause: float) -> None:
    while True:
        await story.state()
        await asyncio.sleep(pause)
