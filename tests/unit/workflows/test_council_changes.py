"""DeliberationWorkflow in a repository: implementations, measured commits, and who wins."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from temporalio.client import Client, WorkflowFailureError
from temporalio.exceptions import ApplicationError, CancelledError

from tests.support.polling import until
from tests.unit.conftest import StartStory, World
from tests.unit.workflows.test_deliberation import Deliberation, failure, start
from workflows.models.agents import CriticiseInput, JudgeInput
from workflows.models.deliberation import Progress
from workflows.models.ids import implementation_workflow_id, story_workflow_id
from workflows.models.implementation import NextActionInput, RunCommand, WriteFile

BASE = "0" * 40


def written(*paths: str) -> list[Any]:
    return [WriteFile(path=path, content="text") for path in paths]


async def started(fleet: Client, world: World, **fields: Any) -> Deliberation:
    work = {
        "repository": {"key": "sample", "url": "file:///r"},
        "story_id": f"US-{world.key}",
        "base": BASE,
    } | fields.pop("work", {})
    return await start(fleet, world, work=work, **fields)


def prompts(world: World) -> list[NextActionInput]:
    return [call for call in world.calls if isinstance(call, NextActionInput)]


async def test_the_measured_change_wins_and_the_others_are_barred(
    fleet: Client, world: World
) -> None:
    world.actions_of = {
        "agent-dev-1": written("core.py"),
        "agent-dev-2": [RunCommand(command="ls")],
        "agent-dev-3": written("README.md"),
    }
    world.broken = {"core.py"}

    result = await (await started(fleet, world)).result()

    winner, *others = result.ranked
    assert result.winner_id == winner.agent_id == "agent-dev-3"
    assert result.change == winner.change
    assert result.change is not None
    assert [file.path for file in result.change.files] == ["README.md"]
    assert result.measurement is not None
    assert result.measurement.commit == result.change.commit
    assert winner.scored is not None
    assert winner.score == winner.scored.score / 100 > 0
    assert {each.agent_id: each.barred for each in others} == {
        "agent-dev-1": True,
        "agent-dev-2": True,
    }
    findings = {each.agent_id: each.checks[0].findings for each in others}
    assert findings == {
        "agent-dev-1": ["breaks what passed on the base: core.py"],
        "agent-dev-2": ["changes nothing"],
    }


async def test_a_killed_worker_holds_its_implementations_up_for_five_seconds(
    fleet: Client, world: World
) -> None:
    """At most for the time limit of the workflow task that it had begun."""
    world.actions_of = {f"agent-dev-{n}": written(f"f{n}.md") for n in (1, 2, 3)}

    result = await (await started(fleet, world)).result()

    for ranked in result.ranked:
        child = fleet.get_workflow_handle(
            implementation_workflow_id(result.task_id, ranked.agent_id)
        )
        begun = (await child.fetch_history()).events[0].workflow_execution_started_event_attributes
        assert begun.workflow_task_timeout.ToTimedelta() == timedelta(seconds=5)


async def test_critics_read_the_diff_and_what_was_measured(fleet: Client, world: World) -> None:
    world.actions_of = {f"agent-dev-{n}": written(f"f{n}.md") for n in (1, 2, 3)}

    result = await (await started(fleet, world)).result()

    read = {
        call.author_id: call.proposal for call in world.calls if isinstance(call, CriticiseInput)
    }
    assert "+++ b/f2.md" in read["agent-dev-2"].content
    assert "unit tests: 3 passed, 0 failed" in read["agent-dev-2"].content
    assert {each.agent_id: each.critics for each in result.ranked} == {
        "agent-dev-1": ["agent-dev-3"],
        "agent-dev-2": ["agent-dev-1"],
        "agent-dev-3": ["agent-dev-2"],
    }


async def test_a_revision_continues_the_commit_with_the_critique(
    fleet: Client, world: World
) -> None:
    world.actions_of = {f"agent-dev-{n}": written("a.md", "b.md") for n in (1, 2, 3)}

    work = {"steps": 1, "goal": ["Say it", "It is said."]}
    result = await (await started(fleet, world, work=work, role="DEV")).result()

    mine = [call for call in prompts(world) if call.agent.agent_id == "agent-dev-1"]
    assert [call.wave for call in mine] == [1, 2]
    assert mine[1].task.feedback == ["low: of agent-dev-1"]
    assert [call.goal for call in mine] == [work["goal"]] * 2
    first, second = (ran for ran in world.ran if ran.trailers.agent == "agent-dev-1")
    assert second.parent.endswith("01")
    assert second.at > first.at
    assert {ran.trailers.story for ran in world.ran} == {f"US-{world.key}"}
    ranked = next(each for each in result.ranked if each.agent_id == "agent-dev-1")
    assert ranked.change is not None
    assert ranked.change.commit.endswith("02")
    assert len(ranked.drafts) == 1
    assert ranked.drafts[0].startswith(f"Commit {second.parent}")


async def test_each_commit_is_measured_once(fleet: Client, world: World) -> None:
    world.actions_of = {f"agent-dev-{n}": written("a.md") for n in (1, 2, 3)}

    await (await started(fleet, world)).result()

    commits = [each.commit for each in world.measured_commits]
    assert len(commits) == len(set(commits)) == 3


async def test_all_calls_are_counted_once(fleet: Client, world: World) -> None:
    world.actions_of = {f"agent-dev-{n}": written("a.md") for n in (1, 2, 3)}

    result = await (await started(fleet, world)).result()

    assert sum(each.calls for each in result.usage) == len(world.calls)
    assert sum(each.tokens for each in result.usage) == 20 * len(world.calls)


async def test_equal_changes_go_to_a_judge(fleet: Client, world: World) -> None:
    world.actions_of = {f"agent-dev-{n}": written("a.md") for n in (1, 2, 3)}

    result = await (await started(fleet, world)).result()

    (judged,) = (call for call in world.calls if isinstance(call, JudgeInput))
    assert [each.agent_id for each in judged.contenders] == [f"agent-dev-{n}" for n in (1, 2, 3)]
    assert result.judged == "agent-architect-9: it is simpler"


async def test_of_two_equal_ones_the_smaller_change_wins(fleet: Client, world: World) -> None:
    world.actions_of = {
        "agent-dev-1": written("a.md", "b.md"),
        "agent-dev-2": written("a.md"),
        "agent-dev-3": written("a.md", "b.md", "c.md"),
    }

    result = await (await started(fleet, world, rounds=0)).result()

    assert [each.agent_id for each in result.ranked] == [f"agent-dev-{n}" for n in (2, 1, 3)]
    assert not result.judged


async def test_an_agent_that_fails_is_left_out_with_its_cost(fleet: Client, world: World) -> None:
    world.actions_of = {f"agent-dev-{n}": written("a.md") for n in (1, 2, 3)}
    world.failures_cost = True
    world.failing = {"next_action/agent-dev-2": "the engine is down"}

    result = await (await started(fleet, world, rounds=0)).result()

    assert [(each.agent_id, each.act, each.cause) for each in result.failed_agents] == [
        ("agent-dev-2", "propose", "LlmRefused: the engine is down")
    ]
    assert {each.agent_id for each in result.ranked} == {"agent-dev-1", "agent-dev-3"}
    assert "agent-dev-2" in {each.agent_id for each in result.usage}


async def test_below_a_quorum_a_council_of_changes_fails(fleet: Client, world: World) -> None:
    world.failing = {f"next_action/agent-dev-{n}": "no such model" for n in (1, 2)}

    error = await failure(await started(fleet, world))

    assert error.type == "QuorumLost"
    assert "no such model" in error.message


async def test_when_all_are_barred_the_findings_say_why(fleet: Client, world: World) -> None:
    error = await failure(await started(fleet, world, rounds=0))

    assert error.type == "AllBarred"
    assert error.message.count("changes nothing") == 3


async def test_time_ends_the_work_with_the_change_so_far(fleet: Client, world: World) -> None:
    world.actions_of = {f"agent-dev-{n}": written("a.md") for n in (1, 2, 3)}
    world.actions_of["agent-dev-1"] = [*written("a.md"), *[RunCommand(command="ls")] * 2]
    world.hold["run_action/agent-dev-1/2"] = asyncio.Event()

    result = await (await started(fleet, world, rounds=0, timeout=20)).result()

    assert len(result.ranked) == 3
    assert all(each.change and each.change.files for each in result.ranked)


async def test_cancelling_a_council_ends_its_implementations(fleet: Client, world: World) -> None:
    world.hold["next_action"] = asyncio.Event()
    handle = await started(fleet, world)
    await until(lambda: len(prompts(world)) == 3)

    await handle.cancel()

    with pytest.raises(WorkflowFailureError) as failed:
        await handle.result()
    assert isinstance(failed.value.cause, CancelledError)
    for number in (1, 2, 3):
        work = fleet.get_workflow_handle(f"implementation-T-{world.key}-agent-dev-{number}")
        described = await work.describe()
        assert described.status is not None
        assert described.status.name == "CANCELED"


async def test_news_reach_the_agents_at_work(fleet: Client, world: World) -> None:
    world.actions_of = {f"agent-dev-{n}": written("a.md") for n in (1, 2, 3)}
    world.hold["next_action"] = asyncio.Event()
    handle = await started(fleet, world, rounds=0)
    await until(lambda: len(prompts(world)) == 3)

    await handle.signal("add_decision", {"decision_id": "D-9", "title": "No SMS"})
    await handle.signal("add_milestone", {"milestone_id": "M-1", "event_type": "DEMO"})
    await until(
        lambda: handle.query("progress", result_type=Progress),
        lambda progress: progress.wave == "propose",
    )
    await until(lambda: signalled(fleet, world))
    world.hold.pop("next_action").set()
    await handle.result()

    second = [call for call in prompts(world) if call.wave == 2]
    assert [[each.title for each in call.late_decisions] for call in second] == [["No SMS"]] * 3
    assert [len(call.late_milestones) for call in second] == [1, 1, 1]


async def signalled(fleet: Client, world: World) -> bool:
    """Return whether each implementation has its two signals."""
    for number in (1, 2, 3):
        work = fleet.get_workflow_handle(f"implementation-T-{world.key}-agent-dev-{number}")
        history = await work.fetch_history()
        signals = [
            e for e in history.events if e.HasField("workflow_execution_signaled_event_attributes")
        ]
        if len(signals) < 2:
            return False
    return True


async def test_each_step_waits_for_the_budget_and_is_counted_once(
    fleet: Client, world: World, start_story: StartStory
) -> None:
    world.actions_of = {f"agent-dev-{n}": written("a.md") for n in (1, 2, 3)}
    story = await start_story(token_budget=50)
    await story.until(gate="approve_scope")
    handle = await started(
        fleet,
        world,
        story_id=story.story_id,
        rounds=0,
        ask_for_budget=True,
        outbox_workflow_id=story_workflow_id(story.story_id),
    )

    await story.until(gate="budget")
    await story.update("raise_budget", tokens=10_000, actor="ana", role="PO")
    result = await handle.result()

    used = sum(each.tokens for each in result.usage)
    assert used == 20 * len(world.calls)
    assert (await story.state()).tokens_used <= used


REFUSED = {
    "an unknown repository's key": (
        {"repository": {"key": "Sample!", "url": "x"}},
        "repository.key",
    ),
    "a short base": ({"base": "c0ffee"}, "base"),
    "no steps": ({"steps": 0}, "steps"),
    "an unknown rigor": ({"rigor": "L9"}, "rigor"),
    "a path outside": ({"paths": ["../x"]}, "'../x'"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_work_that_cannot_be_meant_is_refused(fleet: Client, world: World, name: str) -> None:
    fields, words = REFUSED[name]

    error: BaseException = await failure(await started(fleet, world, work=fields))

    assert isinstance(error, ApplicationError)
    assert error.type == "InvalidInput"
    assert words in error.message
