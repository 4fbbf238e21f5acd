"""DeliberationWorkflow: waves, quorum, near ties, late decisions, timeouts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from temporalio.client import Client, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError

from tests.support.polling import until
from tests.unit.conftest import World
from workflows.models.deliberation import DeliberationResult, Progress

Deliberation = WorkflowHandle[Any, DeliberationResult]


async def start(fleet: Client, world: World, **fields: Any) -> Deliberation:
    task_id = f"T-{world.key}"
    request = {"task_id": task_id, "role": "DEV", "description": "Do it"} | fields
    return await fleet.start_workflow(
        "DeliberationWorkflow",
        request,
        id=f"deliberation-{task_id}",
        task_queue="story",
        result_type=DeliberationResult,
    )


async def failure(handle: Deliberation) -> ApplicationError:
    with pytest.raises(WorkflowFailureError) as failed:
        await handle.result()
    cause = failed.value.cause
    assert isinstance(cause, ApplicationError), cause
    return cause


async def test_a_council_of_three_takes_nine_calls_in_three_waves(
    fleet: Client, world: World
) -> None:
    result = await (await start(fleet, world)).result()

    waves = [[a for a in world.acts if a.startswith(act)] for act in ("propose", "crit", "revise")]
    assert [len(wave) for wave in waves] == [3, 3, 3]
    assert [call.wave for call in world.calls if call.wave <= 3] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert result.status == "completed"
    assert [ranked.rank for ranked in result.ranked] == [1, 2, 3]
    assert result.winner_id == result.ranked[0].agent_id


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({}, "task"),
        ({"story_id": "US-1"}, "US-1"),
        ({"actor": "eve"}, "eve"),
        ({"actor": "eve", "story_id": "US-1"}, "eve"),
    ],
)
async def test_calls_share_the_agents_by_caller_or_story(
    fleet: Client, world: World, fields: dict[str, str], key: str
) -> None:
    handle = await start(fleet, world, **fields)
    await handle.result()

    history = await handle.fetch_history()
    keys = {
        scheduled.priority.fairness_key
        for event in history.events
        if (scheduled := event.activity_task_scheduled_event_attributes).task_queue.name == "agents"
        and scheduled.activity_type.name in ("propose", "criticise", "revise", "judge")
    }
    assert keys == {f"T-{world.key}" if key == "task" else key}
    assert {call.task.actor for call in world.calls} == {fields.get("actor", "")}


async def test_criticism_goes_in_a_ring(fleet: Client, world: World) -> None:
    result = await (await start(fleet, world)).result()

    critics = {r.agent_id: r.critics for r in result.ranked}
    assert critics == {
        "agent-dev-1": ["agent-dev-3"],
        "agent-dev-2": ["agent-dev-1"],
        "agent-dev-3": ["agent-dev-2"],
    }


async def test_the_best_score_wins_without_a_judge(fleet: Client, world: World) -> None:
    world.scores = {"agent-dev-1": 0.2, "agent-dev-2": 0.9, "agent-dev-3": 0.5}

    result = await (await start(fleet, world)).result()

    assert result.winner_id == "agent-dev-2"
    assert result.judged == ""
    assert not [act for act in world.acts if act.startswith("judge")]


async def test_a_near_tie_is_judged_by_an_architect_with_a_reason(
    fleet: Client, world: World
) -> None:
    world.scores = {"agent-dev-1": 0.90, "agent-dev-2": 0.88, "agent-dev-3": 0.5}

    result = await (await start(fleet, world)).result()

    assert result.winner_id == "agent-dev-2"
    assert result.judged == "agent-architect-9: it is simpler"


async def test_an_unchecked_proposal_comes_after_the_verified_ones(
    fleet: Client, world: World
) -> None:
    world.judge = False
    world.scores = {"agent-dev-1": 1.0, "agent-dev-2": 0.8, "agent-dev-3": 0.5}
    world.unchecked = {"agent-dev-1"}

    result = await (await start(fleet, world)).result()

    assert [r.agent_id for r in result.ranked] == ["agent-dev-2", "agent-dev-3", "agent-dev-1"]


async def test_without_a_judge_a_tie_goes_by_points_then_by_id(fleet: Client, world: World) -> None:
    world.judge = False

    result = await (await start(fleet, world)).result()

    assert result.winner_id == "agent-dev-1"
    assert "near tie" in result.judged


async def test_a_failed_agent_is_left_out_and_named(fleet: Client, world: World) -> None:
    world.failing = {"criticise/agent-dev-2": "the model said no"}

    result = await (await start(fleet, world)).result()

    assert [(f.agent_id, f.act, f.cause) for f in result.failed_agents] == [
        ("agent-dev-2", "criticise", "LlmRefused: the model said no")
    ]
    assert {r.agent_id for r in result.ranked} == {"agent-dev-1", "agent-dev-3"}


@pytest.mark.parametrize("failing", ["propose", "criticise", "revise", "judge"])
async def test_a_failed_call_is_counted_with_what_it_has_cost(
    fleet: Client, world: World, failing: str
) -> None:
    world.failures_cost = True
    agent_id = "agent-architect-9" if failing == "judge" else "agent-dev-2"
    world.failing = {f"{failing}/{agent_id}": "the model said no"}

    result = await (await start(fleet, world)).result()

    assert [failed.act for failed in result.failed_agents] == [failing]
    assert len(result.usage) == len(world.calls)
    assert f"{failing}/{agent_id}" in {f"{each.act}/{each.agent_id}" for each in result.usage}


async def test_the_proposal_stands_if_its_revision_says_nothing(
    fleet: Client, world: World
) -> None:
    world.problems = {"agent-dev-2": "it repeats itself; say each thing once"}

    result = await (await start(fleet, world)).result()

    revised = {
        each.agent_id: each.proposal.content.startswith("revision") for each in result.ranked
    }
    assert revised == {"agent-dev-1": True, "agent-dev-2": False, "agent-dev-3": True}
    assert len(result.usage) == len(world.calls)


async def test_its_calls_refer_to_one_pack_that_is_kept(fleet: Client, world: World) -> None:
    await (await start(fleet, world, background="Once upon a time.")).result()

    (query,) = world.packs
    assert query.background == "Once upon a time."
    assert {call.pack.kept_at for call in world.calls} == {"pack-1"}
    assert not any(call.pack.context for call in world.calls)


async def test_a_pack_that_is_lost_is_built_again(fleet: Client, world: World) -> None:
    world.lost_packs = {"pack-1"}

    result = await (await start(fleet, world)).result()

    assert result.status == "completed"
    assert len(world.packs) > 1
    assert "pack-1" not in {call.pack.kept_at for call in world.calls}


async def test_below_a_quorum_it_fails_with_every_cause(fleet: Client, world: World) -> None:
    world.failing = {"agent-dev-1": "out of memory", "agent-dev-2": "no such model"}

    error = await failure(await start(fleet, world))

    assert error.type == "QuorumLost"
    assert "out of memory" in error.message
    assert "no such model" in error.message
    assert "orchestration.deliberation.failed" in world.subjects()


async def test_a_barred_proposal_cannot_win(fleet: Client, world: World) -> None:
    world.blocking = {"agent-dev-1"}
    world.scores = {"agent-dev-2": 0.1, "agent-dev-3": 0.2}

    result = await (await start(fleet, world)).result()

    assert result.winner_id == "agent-dev-3"
    assert result.ranked[-1].agent_id == "agent-dev-1"
    assert result.ranked[-1].barred


async def test_all_barred_fails_with_the_reason(fleet: Client, world: World) -> None:
    world.blocking = {"agent-dev-1", "agent-dev-2", "agent-dev-3"}

    error = await failure(await start(fleet, world))

    assert error.type == "AllBarred"
    assert "secret" in error.message


async def test_an_unknown_council_is_refused(fleet: Client, world: World) -> None:
    with pytest.raises(WorkflowFailureError) as failed:
        await (await start(fleet, world, role="POET")).result()

    cause = failed.value.cause.__cause__
    assert isinstance(cause, ApplicationError)
    assert cause.type == "UnknownCouncil"


async def test_a_hanging_agent_times_the_deliberation_out(fleet: Client, world: World) -> None:
    world.hold["revise"] = asyncio.Event()

    error = await failure(await start(fleet, world, timeout=10))

    assert error.type == "DeliberationTimeout"
    assert "agent-dev-1" in error.message


async def test_a_late_decision_and_a_milestone_reach_the_next_wave(
    fleet: Client, world: World
) -> None:
    world.hold["propose"] = asyncio.Event()
    handle = await start(fleet, world)
    await until(lambda: len(world.acts) >= 3)

    await handle.signal("add_decision", {"decision_id": "d1", "title": "Use UTC"})
    demo = {"milestone_id": "m1", "event_type": "DEMO", "description": "shown"}
    await handle.signal("add_milestone", demo)
    await handle.signal("add_milestone", demo)
    await until(
        lambda: handle.query("progress", result_type=Progress),
        lambda progress: progress.wave == "propose",
    )
    world.hold["propose"].set()
    await handle.result()

    by_wave = {call.wave: [d.title for d in call.late_decisions] for call in world.calls}
    assert by_wave[1] == []
    assert by_wave[2] == ["Use UTC"]
    milestones = {call.wave: [m.event_type for m in call.late_milestones] for call in world.calls}
    assert (milestones[1], milestones[2]) == ([], ["DEMO"])


async def test_events_are_recorded_then_published_in_order(fleet: Client, world: World) -> None:
    handle = await start(fleet, world, story_id="US-1", rounds=2)

    result = await handle.result()

    mine = [e for e in world.published if e.source == handle.id]
    assert [e.subject for e in mine] == [
        "orchestration.deliberation.started",
        "orchestration.round.completed",
        "orchestration.round.completed",
        "orchestration.deliberation.completed",
        "context.decision.added",
    ]
    assert len({e.id for e in mine}) == len(mine)
    assert mine[3].body["decisions"][0]["id"] == result.decisions[0].id
    assert [record.task_id for record in world.deliberations] == [result.task_id]


async def test_a_deliberation_under_another_id_is_refused(fleet: Client) -> None:
    handle = await fleet.start_workflow(
        "DeliberationWorkflow",
        {"task_id": "T-1", "role": "DEV", "description": "x"},
        id="my-own-id",
        task_queue="story",
    )

    with pytest.raises(WorkflowFailureError) as failed:
        await handle.result()

    assert "deliberation-T-1" in str(failed.value.cause)


async def test_a_corrected_or_withdrawn_decision_reaches_the_next_wave(
    fleet: Client, world: World
) -> None:
    world.hold["propose"] = asyncio.Event()
    handle = await start(
        fleet,
        world,
        decisions=[
            {"decision_id": "d1", "title": "Use UTC", "rationale": "one clock"},
            {"decision_id": "d2", "title": "No SMS"},
        ],
    )
    await until(lambda: len(world.acts) >= 3)

    corrections = [
        {"decision_id": "d1", "title": "Use TAI"},
        {"decision_id": "d2", "title": "d2", "withdrawn": True},
        {"decision_id": "d3", "title": "No cookies"},
    ]
    await handle.signal("add_decisions", {"decisions": corrections})
    world.hold["propose"].set()
    await handle.result()

    late = {call.wave: call.late_decisions for call in world.calls}
    assert [(d.title, d.withdrawn) for d in late[1]] == [("Use UTC", False), ("No SMS", False)]
    assert [(d.title, d.rationale, d.withdrawn) for d in late[2]] == [
        ("Use TAI", "one clock", False),
        ("No SMS", "", True),
        ("No cookies", "", False),
    ]
