"""What every workflow needs to run: its id, the end of its tasks, and the causes of failures."""

from __future__ import annotations

import asyncio
from typing import Any

from temporalio import workflow
from temporalio.exceptions import ApplicationError

from workflows.models.errors import ErrorType, application_error


def require_id(expected: str, *others: str) -> None:
    """Reject a workflow started under another id, so that at most one runs for each item.

    Args:
        expected: the id that the workflow must have.
        others: ids that it may have instead: those of earlier versions, or of callers.
    """
    actual = workflow.info().workflow_id
    if actual not in (expected, *others):
        raise application_error(
            ErrorType.INVALID_INPUT,
            f"workflow id: must be {expected!r}, is {actual!r}; give --workflow-id {expected}",
        )


async def stopped(work: asyncio.Task[Any]) -> None:
    """Cancel the task, and return when its children and calls have ended.

    Do not call it in a `finally`: a worker that drops a workflow closes its coroutines, and
    these cannot wait.
    """
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


def cause_of(error: BaseException) -> str:
    """Return the innermost cause's text, cut to 1,000 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or type(error).__name__)[:1000]


def type_of(error: BaseException) -> str:
    """Return the type of the innermost error; its class name if it has no type."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (error.type if isinstance(error, ApplicationError) else "") or type(error).__name__
