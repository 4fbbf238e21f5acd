"""Requests that arrive while people look at the story: the history replays."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import Any

from temporalio.client import Client, WorkflowFailureError
from temporalio.worker import Replayer

from tests.support.polling import until
from tests.support.sandbox import sandboxed_runner
from tests.unit.conftest import StartStory, World
from workers.processes.story import WORKFLOWS

STORIES = 5
LOOKS = 20


async def test_a_story_replays_whose_requests_were_checked_while_people_looked(
    fleet: Client, start_story: StartStory, world: World
) -> None:
    """A query can end the workflow task in which a request waits."""
    replayer = Replayer(
        workflows=WORKFLOWS,
        data_converter=fleet.data_converter,
        workflow_runner=sandboxed_runner(),
    )

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

        await replayer.replay_workflow(await story.handle.fetch_history())
