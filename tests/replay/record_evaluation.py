"""Evaluations that tests/replay/record.py records."""

from __future__ import annotations

from contextlib import suppress

from temporalio.client import Client, WorkflowFailureError

from tests.unit.conftest import World
from workflows.evaluation import EvaluationWorkflow
from workflows.models.evaluation import EvaluationInput, EvaluationTask, parse_configuration
from workflows.models.ids import deliberation_workflow_id, evaluation_workflow_id
from workflows.models.implementation import RunCommand, WriteFile
from workflows.models.workspace import Repository


def request(world: World, configuration: str = "one") -> EvaluationInput:
    """Return a task of the world."""
    return EvaluationInput(
        run=world.key,
        task=EvaluationTask(
            instance_id="adder-1",
            problem_statement="Let it add",
            fail_to_pass=["tests/test_adder.py::test_it_adds"],
        ),
        configuration=parse_configuration(configuration),
        repository=Repository(key="sample", url="file:///r"),
        base="0" * 40,
    )


async def _evaluated(client: Client, asked: EvaluationInput) -> str:
    workflow_id = evaluation_workflow_id(asked.task_id)
    with suppress(WorkflowFailureError):
        await client.execute_workflow(
            EvaluationWorkflow.run, asked, id=workflow_id, task_queue="story"
        )
    return workflow_id


async def evaluated(client: Client, world: World) -> dict[str, str]:
    """Evaluate what one agent commits."""
    world.actions = [RunCommand(command="ls"), WriteFile(path="adder.py", content="+")]
    world.repairs = "adder.py"
    return {"evaluation": await _evaluated(client, request(world))}


async def evaluated_best_of_three(client: Client, world: World) -> dict[str, str]:
    """Evaluate the best of three, all of which change another file."""
    edit = WriteFile(path="README.md", content="hello")
    world.actions_of = {f"agent-dev-{number}": [edit] for number in (1, 2, 3)}
    world.repairs = "adder.py"
    asked = request(world, "best-of:3")
    return {
        "evaluation": await _evaluated(client, asked),
        "deliberation": deliberation_workflow_id(asked.task_id),
    }


async def evaluated_nothing(client: Client, world: World) -> dict[str, str]:
    """End without tests when a council is barred, because it changes nothing."""
    world.actions = [RunCommand(command="ls")]
    return {"evaluation": await _evaluated(client, request(world, "best-of:3"))}


async def evaluation_failed(client: Client, world: World) -> dict[str, str]:
    """Fail when the repository cannot be used."""
    world.failing["begin_work"] = "the repository is unknown"
    return {"evaluation": await _evaluated(client, request(world))}


CALLS = (evaluated, evaluated_best_of_three, evaluated_nothing, evaluation_failed)
