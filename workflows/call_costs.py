"""The cost of a call to an agent that ended without an answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError
from temporalio.exceptions import ActivityError, ApplicationError, CancelledError
from temporalio.exceptions import TimeoutError as TimedOut

from workflows.models.agents import CallUsage
from workflows.models.errors import ErrorType


def failed_call(error: ActivityError) -> list[CallUsage]:
    """Return the cost of a call that failed, was cancelled or timed out; empty if none is known.

    For a call that timed out: the cost at its last heartbeat.
    """
    match error.cause:
        case ApplicationError(details=[cost, *_]) | TimedOut(last_heartbeat_details=[cost, *_]):
            try:
                usage = CallUsage.model_validate(cost)
            except ValidationError:
                return []  # The details of something else.
            return [usage] if usage.tokens else []
    return []


@contextmanager
def cancelled_as_such() -> Iterator[None]:
    """Raise CancelledError for a cancelled call, for callers that do not count its cost."""
    try:
        yield
    except ActivityError as error:
        if isinstance(error.cause, ApplicationError) and error.cause.type == ErrorType.CANCELLED:
            raise CancelledError("the call was cancelled") from error
        raise
