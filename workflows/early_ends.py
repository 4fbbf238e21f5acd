"""Ends that a workflow cannot announce itself, because it was terminated or timed out."""

from __future__ import annotations

from temporalio.exceptions import ChildWorkflowError, TerminatedError
from temporalio.exceptions import TimeoutError as TimedOut

from workflows.models.events import DeliberationFailed

EARLY_END = "early_end"
"""The query of a plan or a deliberation for the events of its end that it has not announced."""

TERMINATED = "Terminated"
TIMED_OUT = "TimedOut"
"""What a deliberation failed of."""


def cut_off(error: BaseException, task_id: str, role: str) -> DeliberationFailed | None:
    """Return the end of a child deliberation that could not announce it; None if it could."""
    cause = error.__cause__ if isinstance(error, ChildWorkflowError) else None
    match cause:
        case TerminatedError():
            why, error_type = "terminated", TERMINATED
        case TimedOut():
            why, error_type = "timed out", TIMED_OUT
        case _:
            return None
    return DeliberationFailed(
        task_id=task_id, role=role, error=why, error_type=error_type, duration_ms=0
    )
