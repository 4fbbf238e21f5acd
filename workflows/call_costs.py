"""The cost of a call to an agent that ended without an answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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


def summed_up(calls: Iterable[CallUsage]) -> list[CallUsage]:
    """Return one line for each act, agent, role and model: the costs of all its calls."""
    lines: dict[tuple[str, str, str, str], CallUsage] = {}
    for call in calls:
        kind = (call.act, call.agent_id, call.role, call.model)
        lines[kind] = _added(lines[kind], call) if kind in lines else call
    return list(lines.values())


def _added(one: CallUsage, other: CallUsage) -> CallUsage:
    """Return the sum of two lines; seed and prompt are those of the later one."""
    counts = ("tokens_in", "tokens_out", "cached_tokens", "latency_ms", "asks", "calls")
    return other.model_copy(
        update={name: getattr(one, name) + getattr(other, name) for name in counts}
        | {"estimated": one.estimated or other.estimated}
    )


@contextmanager
def cancelled_as_such() -> Iterator[None]:
    """Raise CancelledError for a cancelled call, for callers that do not count its cost."""
    try:
        yield
    except ActivityError as error:
        if isinstance(error.cause, ApplicationError) and error.cause.type == ErrorType.CANCELLED:
            raise CancelledError("the call was cancelled") from error
        raise
