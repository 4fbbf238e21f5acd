"""What a call to an agent had cost when it ended without an answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError
from temporalio.exceptions import ActivityError, ApplicationError, CancelledError
from temporalio.exceptions import TimeoutError as TimedOut

from workflows.models import CallUsage

CALL_CANCELLED = "Cancelled"
"""The type of a cancelled call's failure, whose detail is a CallUsage: Temporal's own has none."""


def failed_call(error: ActivityError) -> list[CallUsage]:
    """What an agent's call had cost when it failed, was cancelled or timed out; empty: nothing.

    Of a call that timed out: what it had cost at its last heartbeat.
    """
    match error.cause:
        case ApplicationError(details=[cost, *_]) | TimedOut(last_heartbeat_details=[cost, *_]):
            try:
                usage = CallUsage.model_validate(cost)
            except ValidationError:
                return []  # the details of something else
            return [usage] if usage.tokens else []
    return []


@contextmanager
def cancelled_as_such() -> Iterator[None]:
    """Raise CancelledError for a call that was cancelled, where its costs are not counted."""
    try:
        yield
    except ActivityError as error:
        if isinstance(error.cause, ApplicationError) and error.cause.type == CALL_CANCELLED:
            raise CancelledError("the call was cancelled") from error
        raise
