"""ImplementationWorkflow: what ends it, what its steps get, and what it refuses."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from temporalio.client import Client, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError, CancelledError

from tests.support.polling import until
from tests.unit.conftest import World
from workflows.current_details import implementation_details
from workflows.models.agents import Task
from workflows.models.ids import implementation_workflow_id, story_workflow_id
from workflows.models.implementation import (
    Finish,
    ImplementationProgress,
    ImplementationResult,
    NextActionInput,
    ReplaceText,
    RunCommand,
    WriteFile,
)
from workflows.models.workspace import ChangedFile

Handle = WorkflowHandle[Any, ImplementationResult]

BASE = "0" * 40


def written(name: str = "README.md") -> WriteFile:
    return WriteFile(path=name, content="hello")


async def start(client: Client, world: World, **fields: Any) -> Handle:
    task = {
        "task_id": f"T-{world.key}",
        "story_id": f"US-{world.key}",
        "role": "DEV",
        "description": "Add a section.",
    } | fields.pop("task", {})
    agent = {"agent_id": "agent-dev-1", "role": "DEV"}
    request = {"repository": "sample", "task": task, "agent": agent, "paths": ["README.md"]}
    return await client.start_workflow(
        "ImplementationWorkflow",
        request | fields,
        id=fields.get("id") or implementation_workflow_id(task["task_id"], agent["agent_id"]),
        task_queue="story",
        result_type=ImplementationResult,
    )


async def implemented(client: Client, world: World, **fields: Any) -> ImplementationResult:
    return await (await start(client, world, **fields)).result()


async def failure(handle: Handle) -> ApplicationError:
    with pytest.raises(WorkflowFailureError) as failed:
        await handle.result()
    error: BaseException = failed.value
    while error.__cause__ is not None:
        error = error.__cause__
    assert isinstance(error, ApplicationError)
    return error


def calls(world: World) -> list[NextActionInput]:
    return [call for call in world.calls if isinstance(call, NextActionInput)]


async def test_it_ends_with_the_commit_of_the_last_step(fleet: Client, world: World) -> None:
    world.actions = [RunCommand(command="ls"), written(), Finish(summary="A section is there.")]

    result = await implemented(fleet, world)

    assert (result.base, result.commit) == (BASE, f"{2:040x}")
    assert (result.ended_by, result.summary, result.steps) == ("finish", "A section is there.", 3)
    assert [file.path for file in result.changed] == ["README.md"]
    assert [(line.act, line.calls, line.tokens) for line in result.usage] == [
        ("next_action", 3, 60)
    ]


async def test_each_step_gets_the_steps_before_it(fleet: Client, world: World) -> None:
    world.actions = [RunCommand(command="pytest -q"), written("NEWS.md")]

    await implemented(fleet, world, paths=["*.md"])

    first, second, third = calls(world)
    assert first.steps == []
    assert [(step.step, step.exit_code) for step in second.steps] == [(1, 0)]
    assert second.steps[0].observation == "1 passed"
    assert [step.changed for step in third.steps] == [False, True]
    assert third.editable == ["README.md", "NEWS.md"]
    assert [call.steps_left for call in calls(world)] == [40, 39, 38]


async def test_commits_are_dated_a_second_a_step_from_its_start(
    fleet: Client, world: World
) -> None:
    world.actions = [written(), RunCommand(command="ls"), written("NEWS.md")]
    began = "2026-03-01T10:00:00Z"

    await implemented(fleet, world, began=began, first_step=1)

    assert [ran.at for ran in world.ran] == [
        datetime(2026, 3, 1, 10, 0, second, tzinfo=UTC) for second in (1, 2, 3)
    ]
    assert [ran.parent for ran in world.ran] == [BASE, f"{1:040x}", f"{1:040x}"]
    assert {ran.trailers.story for ran in world.ran} == {f"US-{world.key}"}
    assert {(ran.trailers.model, ran.trailers.prompt_hash) for ran in world.ran} == {
        ("instant", "p" * 8)
    }


async def test_a_revision_continues_its_commit_and_its_steps(fleet: Client, world: World) -> None:
    head = "7" * 40
    world.actions = [written()] * 3

    result = await implemented(
        fleet, world, head=head, first_step=3, feedback=["high: no test"], limits={"steps": 1}
    )

    (ran,) = world.ran
    assert (ran.parent, ran.trailers.step) == (head, 3)
    assert calls(world)[0].task.feedback == ["high: no test"]
    assert (result.ended_by, result.steps) == ("steps", 1)


async def test_a_single_step_can_only_edit(fleet: Client, world: World) -> None:
    world.actions = [written()]

    result = await implemented(fleet, world, limits={"steps": 1}, goal=["Say it"])

    (call,) = calls(world)
    assert call.allowed == ["write", "replace"]
    assert call.goal == ["Say it"]
    assert (result.ended_by, result.commit) == ("steps", f"{1:040x}")


async def test_the_third_same_step_ends_it_with_the_diff_so_far(
    fleet: Client, world: World
) -> None:
    world.actions = [written(), *[RunCommand(command="pytest -q")] * 9]

    result = await implemented(fleet, world)

    assert (result.ended_by, result.steps, result.commit) == ("loop", 4, f"{1:040x}")


async def test_its_tokens_are_limited(fleet: Client, world: World) -> None:
    world.actions = [ReplaceText(path="README.md", old=str(n), new="") for n in range(9)]

    result = await implemented(fleet, world, limits={"tokens": 50})

    assert (result.ended_by, result.steps) == ("tokens", 3)


async def test_its_time_is_limited_while_a_command_hangs(fleet: Client, world: World) -> None:
    world.actions = [RunCommand(command="sleep 99")]
    world.hold["run_action"] = asyncio.Event()

    result = await implemented(fleet, world, limits={"seconds": 1})

    assert (result.ended_by, result.commit) == ("seconds", BASE)


async def test_an_agent_that_fails_leaves_what_it_has_committed(
    fleet: Client, world: World
) -> None:
    world.actions = [written()]
    world.hold["next_action"] = asyncio.Event()
    handle = await start(fleet, world)
    await until(lambda: calls(world))
    world.hold["run_action"] = asyncio.Event()
    world.hold.pop("next_action").set()
    await until(lambda: _status(handle), lambda status: status == "acting")
    world.failing["next_action"] = "the engine is down"
    world.hold["run_action"].set()

    result = await handle.result()

    assert (result.ended_by, result.error) == ("failure", "LlmRefused: the engine is down")
    assert result.commit == f"{1:040x}"


async def test_an_agent_that_fails_before_any_change_fails_it(fleet: Client, world: World) -> None:
    world.failing["next_action"] = "the engine is down"

    error = await failure(await start(fleet, world))

    assert (error.type, error.message) == ("LlmRefused", "the engine is down")


async def test_an_unknown_repository_fails_it(fleet: Client, world: World) -> None:
    world.failing["begin_work"] = "no repository is named sample"

    error = await failure(await start(fleet, world))

    assert error.type == "UnknownRepository"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no task": ({"task": None}, "task"),
    "a path outside": ({"paths": ["../x"]}, "'../x' must be a glob relative"),
    "an absolute path": ({"paths": ["/etc/passwd"]}, "relative to the repository's root"),
    "an unknown field": ({"step": 1}, "step: unknown field; remove it"),
    "a short commit": ({"base": "c0ffee"}, "base: must match"),
    "no steps": ({"limits": {"steps": 0}}, "limits.steps"),
    "a task id for no ref": ({"task": {"task_id": "a/b"}, "id": "implementation-x"}, "task_id"),
    "a mock": ({"agent": {"agent_id": "a", "role": "DEV", "agent_type": "MOCK"}}, "agent_type"),
    "another id": ({"id": "implementation-mine"}, "give --workflow-id implementation-T"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_start_that_cannot_be_meant_is_refused(
    fleet: Client, world: World, name: str
) -> None:
    fields, words = REFUSED[name]
    fields = dict(fields)
    workflow_id = fields.pop("id", f"implementation-T-{world.key}-agent-dev-1")
    task = {"task_id": f"T-{world.key}", "role": "DEV", "description": "d"}
    if isinstance(fields.get("task"), dict):
        fields["task"] = task | fields["task"]
    request = {
        "repository": "sample",
        "task": task,
        "agent": {"agent_id": "agent-dev-1", "role": "DEV"},
    }

    handle = await fleet.start_workflow(
        "ImplementationWorkflow",
        {key: value for key, value in (request | fields).items() if value is not None},
        id=workflow_id,
        task_queue="story",
    )

    error = await failure(handle)
    assert error.type == "InvalidInput"
    assert words in error.message


async def test_a_decision_reaches_the_next_step(fleet: Client, world: World) -> None:
    world.actions = [RunCommand(command="ls")]
    world.hold["next_action"] = asyncio.Event()
    handle = await start(fleet, world)
    await until(lambda: calls(world))
    decision = {"decision_id": "D-9", "title": "No SMS", "decided_by": "bo"}
    await handle.signal("add_decision", decision)
    await handle.signal("add_milestone", {"milestone_id": "M-1", "event_type": "DEMO"})
    world.hold.pop("next_action").set()

    await handle.result()

    first, second = calls(world)
    assert first.late_decisions == []
    assert [each.title for each in second.late_decisions] == ["No SMS"]
    assert [each.milestone_id for each in second.late_milestones] == ["M-1"]


async def test_cancelling_stops_the_call(fleet: Client, world: World) -> None:
    world.hold["next_action"] = asyncio.Event()
    handle = await start(fleet, world)
    await until(lambda: calls(world))

    await handle.cancel()

    with pytest.raises(WorkflowFailureError) as failed:
        await handle.result()
    assert isinstance(failed.value.cause, CancelledError)


async def _status(handle: Handle) -> str:
    progress: ImplementationProgress = await handle.query(
        "progress", result_type=ImplementationProgress
    )
    return progress.status


async def test_its_progress_shows_the_last_command(fleet: Client, world: World) -> None:
    world.actions = [written(), RunCommand(command="pytest -q"), Finish(summary="done")]
    handle = await start(fleet, world)
    await handle.result()

    progress = await handle.query("progress", result_type=ImplementationProgress)

    assert (progress.status, progress.ended_by) == ("ended", "finish")
    assert (progress.last_command, progress.exit_code) == ("pytest -q", 0)
    assert (progress.step, progress.steps, progress.tokens) == (3, 40, 60)
    assert [file.path for file in progress.changed] == ["README.md"]
    assert progress.commit == f"{1:040x}"


async def test_a_signal_that_is_not_understood_is_shown(fleet: Client, world: World) -> None:
    world.hold["next_action"] = asyncio.Event()
    handle = await start(fleet, world)
    await until(lambda: calls(world))

    await handle.signal("sing", "x")

    progress = await until(
        lambda: handle.query("progress", result_type=ImplementationProgress),
        lambda progress: progress.refused,
    )
    assert progress.refused[0].startswith("sing: no signal has this name")
    world.hold.pop("next_action").set()


async def test_a_long_work_continues_as_new_and_counts_on(fleet: Client, world: World) -> None:
    world.actions = [RunCommand(command=f"cat {n}.py") for n in range(104)]
    handle = await start(fleet, world, limits={"steps": 103}, decisions=[])
    first = (await handle.describe()).run_id

    result = await handle.result()

    last = await fleet.get_workflow_handle(handle.id).describe()
    assert last.run_id != first
    assert (result.ended_by, result.steps) == ("steps", 103)
    assert [call.wave for call in calls(world)] == list(range(1, 104))
    assert [(line.calls, line.tokens) for line in result.usage] == [(103, 2_060)]
    assert [step.step for step in calls(world)[-1].steps] == list(range(1, 103))


async def test_each_step_waits_for_the_budget_of_its_story(
    fleet: Client, world: World, start_story: Any
) -> None:
    world.actions = [RunCommand(command="ls"), written()]
    story = await start_story(token_budget=25)
    await story.until(gate="approve_scope")

    handle = await start(
        fleet, world, ask_for_budget=True, outbox_workflow_id=story_workflow_id(story.story_id)
    )

    await story.until(gate="budget")
    assert await _status(handle) == "waiting for budget"
    assert len(calls(world)) == 2
    await story.update("raise_budget", tokens=10_000, actor="ana", role="PO")
    assert (await handle.result()).ended_by == "finish"
    assert (await story.state()).tokens_used == 40


def test_the_current_details_show_step_command_files_and_tokens() -> None:
    progress = ImplementationProgress(
        status="acting",
        step=3,
        steps=40,
        last="run: pytest -q",
        last_command="pytest -q `x`",
        exit_code=1,
        changed=[ChangedFile(path="README.md", status="modified", insertions=2, deletions=1)],
        tokens=60,
        commit="c" * 40,
    )

    text = implementation_details(Task(task_id="t", role="DEV", description="Add"), progress)

    assert "acting · step 3 of 40 · 60 tokens" in text
    first = ImplementationProgress(status="starting", step=1)
    assert "starting · 0 tokens" in implementation_details(
        Task(task_id="t", role="DEV", description="Add"), first
    )
    assert "`pytest -q 'x'` · exit 1" in text
    assert "- `README.md` modified +2 -1" in text
