"""Temporal's workflow executions: whether one exists, and the summary of a new one."""

from __future__ import annotations

from typing import Any

from temporalio.client import (
    Client,
    WorkflowExecutionDescription,
    WorkflowExecutionStatus,
    WorkflowHandle,
)
from temporalio.service import RPCError, RPCStatusCode

SUMMARY_BYTES = 200


async def find_execution(temporal: Client, workflow_id: str) -> WorkflowExecutionDescription | None:
    """Return the newest execution with the id, running or ended; None if Temporal knows none.

    Raises:
        RPCError: Temporal does not answer.
    """
    try:
        return await temporal.get_workflow_handle(workflow_id).describe()
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise
        return None


async def require_no_failure(workflow: WorkflowHandle[Any, Any]) -> WorkflowExecutionDescription:
    """Return the workflow's execution, which has not failed.

    Raises:
        WorkflowFailureError: it has failed; its cause says why.
        RPCError: Temporal does not answer, or knows no such workflow.
    """
    found = await workflow.describe()
    if found.status is WorkflowExecutionStatus.FAILED:
        await workflow.result()
    return found


def summary(text: str) -> str:
    """Return a workflow's static summary: one line, cut to Temporal's limit (SUMMARY_BYTES)."""
    return " ".join(text.split()).encode()[:SUMMARY_BYTES].decode(errors="ignore")
