"""Paths of plans that continue as new (see record.py)."""

from __future__ import annotations

from temporalio.client import Client

from tests.unit.conftest import World
from workflows.models.agents import PlannedTask
from workflows.models.ids import plan_workflow_id
from workflows.models.plan import PlanInput
from workflows.plan import PlanWorkflow


async def continued_between_batches(client: Client, world: World) -> dict[str, str]:
    """Run a chain of tasks on a server that suggests continue-as-new early."""
    story_id, plan_id = f"US-{world.key}", f"p-{world.key}"
    tasks = [
        PlannedTask(
            task_id=f"{plan_id}-t{number}",
            role="DEV",
            title=f"Part {number}",
            description="Do it.",
            depends_on=[f"{plan_id}-t{number - 1}"] if number > 1 else [],
        )
        for number in range(1, 6)
    ]
    workflow_id = plan_workflow_id(story_id, plan_id)
    request = PlanInput(story_id=story_id, plan_id=plan_id, tasks=tasks)
    await client.execute_workflow(PlanWorkflow.run, request, id=workflow_id, task_queue="story")
    return {"plan": workflow_id}
