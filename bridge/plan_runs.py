"""Runs of plans that were approved outside.

A PlanWorkflow's id `plan-{story_id}-{plan_id}` is a contract, but can belong to plans of two
stories: `a-b` with `c`, and `a` with `b-c`. Code that finds a workflow by this id therefore checks
its input.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from temporalio.client import Client
from temporalio.common import WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError

from bridge.executions import find_execution, summary
from workflows.models.errors import ErrorType, application_error
from workflows.models.ids import plan_workflow_id, story_workflow_id
from workflows.models.plan import PlanInput
from workflows.plan import PlanWorkflow
from workflows.stubs import STORY_QUEUE


async def run_approved_plan(
    temporal: Client,
    plan: PlanInput,
    approved: str,
    store_approval: Callable[[], Awaitable[object]] | None = None,
) -> bool:
    """Run an approved plan once, if its story has no workflow, which would run the plan itself.

    Args:
        temporal: The client.
        plan: The plan and its settings.
        approved: Where or by whom it was approved, for the workflow's summary.
        store_approval: Called before the plan starts, but not if it runs or has run already.

    Returns:
        False if the story has a workflow, running or ended: then nothing is started.

    Raises:
        ApplicationError: `AlreadyExists`: another story's plan has the workflow's id.
        RPCError: Temporal does not answer.
    """
    if await find_execution(temporal, story_workflow_id(plan.story_id)):
        return False
    workflow_id = plan_workflow_id(plan.story_id, plan.plan_id)
    if store_approval and not await find_execution(temporal, workflow_id):
        await store_approval()
    try:
        await temporal.start_workflow(
            PlanWorkflow.run,
            plan,
            id=workflow_id,
            task_queue=STORY_QUEUE,
            id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
            static_summary=summary(f"plan {plan.plan_id} of {plan.story_id}, approved {approved}"),
        )
    except WorkflowAlreadyStartedError:  # by an earlier request or message
        await require_plan(temporal, plan.story_id, plan.plan_id)
    return True


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
