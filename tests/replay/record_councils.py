"""Councils that gather, check and announce in few steps, which tests/replay/record.py records."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from temporalio.api.enums.v1 import EventType
from temporalio.client import Client, WorkflowFailureError, WorkflowHandle

from tests.support.polling import until
from tests.unit.conftest import StartStory, World
from workflows.deliberation import DeliberationWorkflow
from workflows.models.deliberation import DeliberationInput
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


async def council_with_one_timer(client: Client, world: World) -> dict[str, str]:
    """Let all waves share a timer; the judge is asked before the round is announced."""
    return await _designed(client, world)


async def _alone(client: Client, world: World, **fields: Any) -> WorkflowHandle[Any, Any]:
    request = DeliberationInput(task_id=f"T-{world.key}", role="DEV", description="x", **fields)
    return await client.start_workflow(
        DeliberationWorkflow.run,
        request,
        id=deliberation_workflow_id(request.task_id),
        task_queue="story",
    )


async def council_alone(client: Client, world: World) -> dict[str, str]:
    """Record the proposals with the result: the council has no story."""
    handle = await _alone(client, world)
    await handle.result()
    return {"deliberation": handle.id}


async def council_out_of_time(client: Client, world: World) -> dict[str, str]:
    """End by the shared timer."""
    world.hold = {"revise": asyncio.Event()}
    handle = await _alone(client, world, timeout=1)
    with suppress(WorkflowFailureError):
        await handle.result()
    return {"deliberation": handle.id}


async def council_granted_late(client: Client, world: World) -> dict[str, str]:
    """Start the shared timer again, because the story granted a wave after it had ended."""
    story = await StartStory(client, world)(token_budget=50)
    await story.until(gate="approve_scope")
    asking = {"story_id": story.story_id, "outbox_workflow_id": story.handle.id}
    handle = await _alone(client, world, ask_for_budget=True, timeout=1, **asking)
    await story.until(gate="budget")
    await until(lambda: _timers(handle), lambda count: count > 1)
    await story.update("raise_budget", tokens=10_000, actor="ana", role="PO")
    await handle.result()
    await story.handle.terminate()
    return {"deliberation": handle.id}


async def _timers(handle: WorkflowHandle[Any, Any]) -> int:
    events = (await handle.fetch_history()).events
    return sum(event.event_type == EventType.EVENT_TYPE_TIMER_STARTED for event in events)


CALLS = (
    council_in_few_steps,
    council_checked_one_by_one,
    council_barred,
    council_with_one_timer,
    council_alone,
    council_out_of_time,
    council_granted_late,
)
