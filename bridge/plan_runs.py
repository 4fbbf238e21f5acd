"""Check of which plan a PlanWorkflow runs.

Its id `plan-{story_id}-{plan_id}` is a contract, but can belong to plans of two stories: `a-b` with
`c`, and `a` with `b-c`. Code that finds a workflow by this id therefore checks its input.
"""

from __future__ import annotations

from temporalio.client import Client

from workflows.models.error_types import ErrorType, application_error
from workflows.models.ids import plan_workflow_id
from workflows.models.plan import PlanInput


async def require_plan(temporal: Client, story_id: str, plan_id: str) -> None:
    """Check that the workflow with the plan's id runs, or ran, this plan.

    Raises:
        ApplicationError: `AlreadyExists`, not retryable: it is the plan of another story.
        RPCError: Temporal does not know the workflow, or does not answer.
    """
    workflow_id = plan_workflow_id(story_id, plan_id)
    history = temporal.get_workflow_handle(workflow_id).fetch_history_events(page_size=1)
    async for event in history:
        payloads = event.workflow_execution_started_event_attributes.input.payloads
        (run,) = await temporal.data_converter.decode(payloads, [PlanInput])
        break
    if (run.story_id, run.plan_id) != (story_id, plan_id):
        raise application_error(
            ErrorType.ALREADY_EXISTS,
            f"plan_id: {workflow_id} is the workflow of plan {run.plan_id} of {run.story_id}; "
            f"give the plan of {story_id} another id",
        )
