"""EvaluationWorkflow: what agents get of a task, and what its result says."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from temporalio.client import Client, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import CancelledError

from tests.replay.record_evaluation import request
from tests.support.polling import until
from tests.unit.conftest import World
from workers.cli.eval_runs import asked
from workflows.evaluation import EvaluationWorkflow
from workflows.models.evaluation import EvaluationInput, EvaluationResult
from workflows.models.ids import evaluation_workflow_id
from workflows.models.implementation import RunCommand, WriteFile

ADDS = WriteFile(path="adder.py", content="+")


async def start(client: Client, task: EvaluationInput) -> WorkflowHandle[Any, EvaluationResult]:
    return await client.start_workflow(
        EvaluationWorkflow.run,
        task,
        id=evaluation_workflow_id(task.task_id),
        task_queue="story",
    )


async def result_of(client: Client, task: EvaluationInput) -> EvaluationResult:
    return await (await start(client, task)).result()


async def test_one_agent_works_and_its_commit_is_evaluated(fleet: Client, world: World) -> None:
    world.actions, world.repairs = [RunCommand(command="ls"), ADDS], "adder.py"
    task = request(world)

    result = await result_of(fleet, task)

    assert (result.resolved, result.ended_by, result.error) == (True, "finish", "")
    assert result.asked == asked(task)
    assert result.evaluated
    assert result.evaluated.change.commit == result.commit
    assert (result.calls, result.agents) == (3, ["agent-dev-1"])


async def test_a_council_works_and_the_winner_is_evaluated(fleet: Client, world: World) -> None:
    edit = WriteFile(path="README.md", content="x")
    world.actions_of = {f"agent-dev-{number}": [edit] for number in (1, 2, 3)}
    world.repairs = "adder.py"

    result = await result_of(fleet, request(world, "council:3x1"))

    assert (result.resolved, result.ended_by) == (False, "completed")
    assert len(result.agents) == 3
    assert result.evaluated
    assert result.calls > 9


async def test_agents_do_not_get_the_tests_of_a_task(fleet: Client, world: World) -> None:
    world.actions = [ADDS]
    task = request(world)
    task = task.model_copy(
        update={"task": task.task.model_copy(update={"test_patch": "+def test_secret():"})}
    )

    await result_of(fleet, task)

    assert world.calls
    assert all("secret" not in str(call) for call in world.calls)


@pytest.mark.parametrize(
    ("configuration", "ended_by", "words"),
    [("one", "finish", "nothing was changed"), ("best-of:2", "AllBarred", "barred")],
)
async def test_a_task_that_nothing_is_changed_for_is_not_resolved(
    fleet: Client, world: World, configuration: str, ended_by: str, words: str
) -> None:
    world.actions = [RunCommand(command="ls")]

    result = await result_of(fleet, request(world, configuration))

    assert (result.resolved, result.evaluated, result.ended_by) == (False, None, ended_by)
    assert words in result.error
    assert result.calls > 0


@pytest.mark.parametrize("failing", ["begin_work", "evaluate_commit"])
async def test_a_failure_that_is_not_the_agents_fails_the_evaluation(
    fleet: Client, world: World, failing: str
) -> None:
    world.actions, world.failing[failing] = [ADDS], "it is broken"

    with pytest.raises(WorkflowFailureError):
        await result_of(fleet, request(world))


@pytest.mark.parametrize("configuration", ["one", "best-of:2"])
async def test_cancelling_an_evaluation_cancels_its_agents(
    fleet: Client, world: World, configuration: str
) -> None:
    world.actions, world.hold["run_action"] = [ADDS], asyncio.Event()
    handle = await start(fleet, request(world, configuration))
    await until(lambda: world.calls)

    await handle.cancel()

    with pytest.raises(WorkflowFailureError) as failed:
        await handle.result()
    assert isinstance(failed.value.cause, CancelledError)


async def test_another_workflow_id_is_refused(fleet: Client, world: World) -> None:
    task = request(world)

    with pytest.raises(WorkflowFailureError) as failed:
        await fleet.execute_workflow(
            EvaluationWorkflow.run, task, id=f"other-{world.key}", task_queue="story"
        )

    assert evaluation_workflow_id(task.task_id) in str(failed.value.cause)
