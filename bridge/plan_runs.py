"""Which plan a PlanWorkflow runs.

Its id `plan-{story_id}-{plan_id}` is a contract, and may stand for plans of two stories: `a-b` with
`c`, and `a` with `b-c`. So who finds a workflow under it looks at what it was started with.
"""

from __future__ import annotations

from temporalio.client import Client
from temporalio.exceptions import ApplicationError

from workflows.models import PlanInput, plan_workflow_id

OTHER_PLAN = "AlreadyExists"


async def require_plan(temporal: Client, story_id: str, plan_id: str) -> None:
    """See that the workflow under the plan's id runs, or ran, this plan.

    Raises:
        ApplicationError: `AlreadyExists`, not retryable: it is the plan of another story.
        RPCError: Temporal does not know it, or does not answer.
    """
    workflow_id = plan_workflow_id(story_id, plan_id)
    history = temporal.get_workflow_handle(workflow_id).fetch_history_events(page_size=1)
    async for event in history:
        payloads = event.workflow_execution_started_event_attributes.input.payloads
        (run,) = await temporal.data_converter.decode(payloads, [PlanInput])
        break
    if (run.story_id, run.plan_id) != (story_id, plan_id):
        raise ApplicationError(
            f"plan_id: {workflow_id} is the workflow of plan {run.plan_id} of {run.story_id}; "
            f"give the plan of {story_id} another id",
            type=OTHER_PLAN,
            non_retryable=True,
        )
