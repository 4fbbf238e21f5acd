"""Councils that gather, check and announce in few steps, which tests/replay/record.py records."""

from __future__ import annotations

from temporalio.client import Client

from tests.support.polling import until
from tests.unit.conftest import StartStory, World
from workflows.models.ids import deliberation_workflow_id, story_workflow_id


async def _designed(client: Client, world: World) -> dict[str, str]:
    """Let the architects deliberate, then end the story."""
    story = await StartStory(client, world)()
    await story.to("DESIGN")
    await until(
        story.state,
        lambda view: view.pending_gate == "approve_design" or "failed" in view.working_on,
    )
    council = deliberation_workflow_id(f"{story.story_id}-design-1")
    await client.get_workflow_handle(story_workflow_id(story.story_id)).terminate()
    return {"deliberation": council}


async def council_in_few_steps(client: Client, world: World) -> dict[str, str]:
    """Announce the round with the result."""
    world.scores = {f"agent-architect-{number}": number / 4 for number in (1, 2, 3)}
    return await _designed(client, world)


async def council_checked_one_by_one(client: Client, world: World) -> dict[str, str]:
    """Check each proposal alone after all, then announce the round before the judge is asked."""
    world.failing = {"check_council": "it broke", "check/agent-architect-2": "it breaks"}
    return await _designed(client, world)


async def council_barred(client: Client, world: World) -> dict[str, str]:
    """Announce the round with the failure."""
    world.blocking = {f"agent-architect-{number}" for number in (1, 2, 3)}
    return await _designed(client, world)


CALLS = (council_in_few_steps, council_checked_one_by_one, council_barred)
