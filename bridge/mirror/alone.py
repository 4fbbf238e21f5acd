"""Plans, deliberations and updates without a story that ended early, and why a workflow ended.

A plan from the bus, a deliberation that a person or a caller of gRPC started, and an update of a
context publish by themselves. If one is terminated, its remaining entries and its end would be
lost. The parent of a child that is terminated announces the child's end (workflows/early_ends.py).
"""

from __future__ import annotations

from datetime import timedelta

from temporalio.api.enums.v1 import EventType
from temporalio.client import (
    WorkflowExecution,
    WorkflowExecutionStatus,
    WorkflowHandle,
    WorkflowHistoryEventFilterType,
)
from temporalio.converter import DataConverter
from temporalio.exceptions import FailureError

from workflows.early_ends import EARLY_END, TERMINATED, TIMED_OUT
from workflows.models.events import DeliberationFailed, PlanFinished, TaskFailed
from workflows.models.outbox import OutboxState, StoryClosure
from workflows.outbox import OUTBOX_QUERY
from workflows.timestamps import format_timestamp

ALONE_ENDED_EARLY = (
    "WorkflowType IN ('PlanWorkflow', 'DeliberationWorkflow', 'DerivationWorkflow', "
    "'ContextUpdateWorkflow') AND ExecutionStatus IN ('Terminated', 'TimedOut') "
    "AND ParentWorkflowId IS NULL"
)
"""One that failed or was cancelled has announced it."""

ANSWER_WITHIN = timedelta(seconds=60)
"""How long a query may take. A worker replays the whole history for it, thousands of events."""


async def closure_alone(
    run: WorkflowExecution, handle: WorkflowHandle[object, object], converter: DataConverter
) -> StoryClosure | None:
    """Return what a run without a parent has not published; None: nothing.

    Raises:
        WorkflowQueryFailedError: its history cannot be replayed.
    """
    outbox = await handle.query(OUTBOX_QUERY, result_type=OutboxState, rpc_timeout=ANSWER_WITHIN)
    plan: list[TaskFailed | PlanFinished] = []
    councils: list[DeliberationFailed] = []
    if run.workflow_type == "PlanWorkflow":
        plan = await handle.query(
            EARLY_END, result_type=list[TaskFailed | PlanFinished], rpc_timeout=ANSWER_WITHIN
        )
    if run.workflow_type == "DeliberationWorkflow":
        councils = await handle.query(
            EARLY_END, result_type=list[DeliberationFailed], rpc_timeout=ANSWER_WITHIN
        )
    stories = [each.story_id for each in (*outbox.entries, *plan, *councils)]
    if not stories:
        return None
    assert run.close_time
    when = {"timestamp": format_timestamp(run.close_time)}
    _, reason = await why_ended(handle, converter)
    terminated = run.status == WorkflowExecutionStatus.TERMINATED
    failed = when | {"error": reason, "error_type": TERMINATED if terminated else TIMED_OUT}
    return StoryClosure(
        story_id=stories[0],
        run_id=run.run_id,
        outbox=outbox,
        owner=run.id,
        plan=[end.model_copy(update=when) for end in plan],
        deliberation=councils[0].model_copy(update=failed) if councils else None,
    )


async def why_ended(
    handle: WorkflowHandle[object, object], converter: DataConverter
) -> tuple[str, str]:
    """Return who ended the run, and why."""
    closing = handle.fetch_history_events(
        event_filter_type=WorkflowHistoryEventFilterType.CLOSE_EVENT
    )
    async for event in closing:
        match event.event_type:
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TERMINATED:
                ended = event.workflow_execution_terminated_event_attributes
                reason = f"terminated: {ended.reason}" if ended.reason else "terminated"
                return ended.identity or "unknown", reason[:2_000]
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED:
                failure = event.workflow_execution_failed_event_attributes.failure
                error = await converter.decode_failure(failure)
                message = error.message if isinstance(error, FailureError) else error
                return "temporal", f"failed: {message}"[:2_000]
    return "temporal", "timed out"
