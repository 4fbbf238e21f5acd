"""The steps of a deliberation: one to gather, one to check, and few signals to its story."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from temporalio.api.enums.v1 import EventType
from temporalio.client import Client, WorkflowHandle
from temporalio.converter import DataConverter
from temporalio.worker import Worker

from tests.support.polling import until
from tests.unit.conftest import QUEUES, InstantMirror, StartStory, World, instant_workers
from tests.unit.workflows.test_deliberation import Deliberation, start
from workflows.models.deliberation import Progress
from workflows.models.entries import Entry
from workflows.models.outbox import OutboxState, StoryClosure
from workflows.outbox import FORWARD_EVENTS

CALLS = [*["propose"] * 3, *["criticise"] * 3, *["revise"] * 3]
COMPLETED = ["DeliberationCompleted", "ContextDecisionAdded"]


async def activities_of(handle: WorkflowHandle[Any, Any]) -> list[str]:
    """Return the names of the scheduled activities."""
    names = [
        event.activity_task_scheduled_event_attributes.activity_type.name
        for event in (await handle.fetch_history()).events
    ]
    return [name for name in names if name]


async def handed_on(handle: WorkflowHandle[Any, Any], converter: DataConverter) -> list[list[str]]:
    """Return the kinds of the entries in each signal to the story."""
    sent = []
    for event in (await handle.fetch_history()).events:
        signal = event.signal_external_workflow_execution_initiated_event_attributes
        if signal.signal_name == FORWARD_EVENTS:
            (entries,) = await converter.decode(signal.input.payloads, [list[Entry]])
            sent.append([entry.kind for entry in entries])
    return sent


async def test_council_context_and_checks_take_one_activity_each(
    fleet: Client, world: World
) -> None:
    world.scores = {"agent-dev-1": 0.2, "agent-dev-2": 0.9, "agent-dev-3": 0.5}
    handle = await start(fleet, world)
    await handle.result()

    acts = [name for name in await activities_of(handle) if not name.startswith("announce")]
    assert acts == ["gather", *CALLS, "check_council"]


async def test_a_council_of_no_story_is_recorded_with_its_result(
    fleet: Client, world: World
) -> None:
    """One activity for the start, and one for the round, the proposals and the result."""
    handle = await start(fleet, world)
    result = await handle.result()

    announced = [name for name in await activities_of(handle) if name.startswith("announce")]
    assert announced == ["announce", "announce_outcome"]
    assert [record.winner_id for record in world.deliberations] == [result.winner_id]
    assert [entry.kind for entry in world.published] == [
        "DeliberationStarted",
        "RoundCompleted",
        *COMPLETED,
    ]


async def test_a_council_of_a_story_is_recorded_before_its_story_gets_the_result(
    fleet: Client, world: World, start_story: StartStory
) -> None:
    story = await start_story()
    await story.to("DESIGN")
    await story.until(gate="approve_design")

    council = fleet.get_workflow_handle(f"deliberation-{story.story_id}-design-1")
    assert (await activities_of(council))[-1] == "record_deliberation"
    assert council.id in {record.deliberation_id for record in world.deliberations}


async def complete_without_graph(fleet: Client, world: World) -> Deliberation:
    """Return a council that has its result, while nothing can be recorded."""
    world.graph_open.clear()
    handle = await start(fleet, world)
    await until(
        lambda: handle.query("progress", result_type=Progress),
        lambda progress: progress.status == "complete",
    )
    return handle


async def test_a_result_is_recorded_although_an_earlier_batch_is_under_way(
    fleet: Client, world: World
) -> None:
    handle = await complete_without_graph(fleet, world)

    world.graph_open.set()
    result = await handle.result()

    assert [record.winner_id for record in world.deliberations] == [result.winner_id]


async def test_while_nats_is_away_a_result_is_recorded_and_its_events_follow(
    fleet: Client, world: World
) -> None:
    world.bus_open.clear()
    handle = await start(fleet, world)
    await until(lambda: "DeliberationCompleted" in [entry.kind for entry in world.recorded])
    assert [record.deliberation_id for record in world.deliberations] == [handle.id]
    assert world.published == []

    world.bus_open.set()
    await handle.result()

    assert [entry.kind for entry in world.published][-2:] == COMPLETED


async def test_the_proposals_that_a_terminated_council_has_not_recorded_are_recorded_by_its_closure(
    fleet: Client, world: World
) -> None:
    handle = await complete_without_graph(fleet, world)
    await handle.terminate()
    outbox = await handle.query("outbox", result_type=OutboxState)

    world.graph_open.set()
    closure = StoryClosure(story_id="", run_id="1", outbox=outbox, owner=handle.id)
    await fleet.execute_workflow(
        "StoryClosureWorkflow", closure, id=f"closure-{world.key}", task_queue="story"
    )

    assert [record.deliberation_id for record in world.deliberations] == [handle.id]
    assert "DeliberationCompleted" in [entry.kind for entry in world.published]


async def test_a_bridge_of_an_earlier_version_loses_no_proposals(
    fleet_without_workers: Client, world: World
) -> None:
    """It fails for the activity, which a newer one takes."""
    client, earlier = fleet_without_workers, InstantMirror()
    known: list[Callable[..., Any]] = [earlier.announce, earlier.publish]
    async with instant_workers(client, queues=[queue for queue in QUEUES if queue != "bridge"]):
        async with Worker(client, task_queue="bridge", activities=known):
            handle = await start(client, world)
            await until(lambda: tries_of(handle, "announce_outcome"), lambda tries: tries > 1)
        async with instant_workers(client, queues=["bridge"]):
            result = await handle.result()

    assert [record.winner_id for record in world.deliberations] == [result.winner_id]


async def tries_of(handle: WorkflowHandle[Any, Any], activity: str) -> int:
    """Return the number of the current try of a pending activity."""
    pending = (await handle.describe()).raw_description.pending_activities
    return max((each.attempt for each in pending if each.activity_type.name == activity), default=0)


async def timers_of(handle: WorkflowHandle[Any, Any]) -> list[str]:
    """Return what happened to the workflow's timers."""
    kinds = [EventType.Name(event.event_type) for event in (await handle.fetch_history()).events]
    return [
        kind.removeprefix("EVENT_TYPE_TIMER_")
        for kind in kinds
        if kind.startswith("EVENT_TYPE_TIM")
    ]


@pytest.mark.parametrize("actor", ["a" * 200, "я" * 33, "中" * 200])
async def test_a_council_answers_a_caller_whatever_its_name(
    fleet: Client, world: World, actor: str
) -> None:
    """Temporal takes keys of fairness of up to 64 bytes."""
    handle = await start(fleet, world, actor=actor)

    assert (await handle.result()).status == "completed"


async def test_all_waves_of_a_council_share_a_timer(fleet: Client, world: World) -> None:
    handle = await start(fleet, world)
    await handle.result()

    assert await timers_of(handle) == ["STARTED"]


async def test_the_shared_timer_does_not_count_the_time_until_a_wave_is_granted(
    fleet: Client, world: World, start_story: StartStory
) -> None:
    story = await start_story(token_budget=50)
    await story.until(gate="approve_scope")
    asking = {"story_id": story.story_id, "outbox_workflow_id": story.handle.id}
    handle = await start(fleet, world, ask_for_budget=True, timeout=15, **asking)
    await story.until(gate="budget")
    await until(lambda: timers_of(handle), lambda timers: timers[-1] == "FIRED")

    await story.update("raise_budget", tokens=10_000, actor="ana", role="PO")

    assert (await handle.result()).status == "completed"
    assert await timers_of(handle) == ["STARTED", "FIRED", "STARTED"]


async def test_a_round_is_announced_while_its_judge_waits_for_a_budget(
    world: World, start_story: StartStory
) -> None:
    story = await start_story(token_budget=150)  # three waves of three calls take 180
    await story.to("DESIGN")
    await story.until(gate="budget")

    await until(lambda: "RoundCompleted" in [entry.kind for entry in world.published])
    assert "DeliberationCompleted" not in [entry.kind for entry in world.published]

    await story.update("raise_budget", tokens=10_000, actor="ana", role="PO")
    await story.until(gate="approve_design")


async def test_if_the_check_of_all_fails_only_the_cause_is_left_out(
    fleet: Client, world: World
) -> None:
    world.failing = {"check_council": "it broke", "check/agent-dev-2": "it breaks the worker"}

    handle = await start(fleet, world)
    result = await handle.result()

    assert [(failed.agent_id, failed.act, failed.cause) for failed in result.failed_agents] == [
        ("agent-dev-2", "check", "Unexpected: it breaks the worker")
    ]
    assert {ranked.agent_id for ranked in result.ranked} == {"agent-dev-1", "agent-dev-3"}
    checks = [name for name in await activities_of(handle) if name.startswith("check")]
    assert checks == ["check_council", *["check_proposal"] * 3]


@pytest.mark.parametrize("second", [0.5, 0.9], ids=["without a judge", "with a judge"])
async def test_a_council_sends_its_story_one_signal_with_the_round_and_the_result(
    fleet: Client, world: World, start_story: StartStory, second: float
) -> None:
    world.scores = {"agent-architect-1": 0.9, "agent-architect-2": second, "agent-architect-3": 0}
    story = await start_story()
    await story.to("DESIGN")
    await story.until(gate="approve_design")

    council = fleet.get_workflow_handle(f"deliberation-{story.story_id}-design-1")
    assert await handed_on(council, fleet.data_converter) == [["RoundCompleted", *COMPLETED]]


async def test_each_council_is_announced_once_and_before_its_rounds(
    world: World, start_story: StartStory
) -> None:
    story = await start_story()
    await story.finish()

    of_councils = [
        (str(entry.body["task_id"]), entry.kind)
        for entry in world.published
        if entry.kind in ("DeliberationStarted", "RoundCompleted", "DeliberationCompleted")
    ]
    councils = dict.fromkeys(task_id for task_id, _ in of_councils)
    assert len(councils) > 3  # of the states, and of the plan's tasks
    for council in councils:
        assert [kind for task_id, kind in of_councils if task_id == council] == [
            "DeliberationStarted",
            "RoundCompleted",
            "DeliberationCompleted",
        ]


async def test_a_round_is_announced_with_the_failure_that_follows_it(
    fleet: Client, world: World, start_story: StartStory
) -> None:
    world.blocking = {f"agent-architect-{number}" for number in (1, 2, 3)}
    story = await start_story()
    await story.to("DESIGN")
    await until(story.state, lambda view: view.working_on.startswith("DESIGN failed"))

    council = fleet.get_workflow_handle(f"deliberation-{story.story_id}-design-1")
    assert await handed_on(council, fleet.data_converter) == [
        ["RoundCompleted", "DeliberationFailed"],
    ]
