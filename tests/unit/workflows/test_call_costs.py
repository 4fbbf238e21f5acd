"""The cost of a call without an answer, read from the failure that its workflow receives."""

from __future__ import annotations

from typing import Any

import pytest
from temporalio.exceptions import (
    ActivityError,
    ApplicationError,
    CancelledError,
    RetryState,
    TimeoutType,
)
from temporalio.exceptions import TimeoutError as TimedOut

from workflows.call_costs import cancelled_as_such, failed_call, summed_up
from workflows.models.agents import CallUsage
from workflows.models.errors import ErrorType

USAGE = CallUsage(act="propose", agent_id="a", role="DEV", model="m", tokens_in=700, tokens_out=9)
BEAT = USAGE.model_dump(mode="json") | {"tokens": 9, "state": "asking"}


def failure(cause: BaseException) -> ActivityError:
    error = ActivityError(
        "activity failed",
        scheduled_event_id=5,
        started_event_id=6,
        identity="worker",
        activity_type="propose",
        activity_id="1",
        retry_state=RetryState.TIMEOUT,
    )
    error.__cause__ = cause
    return error


def timed_out(*details: Any) -> TimedOut:
    return TimedOut("silent", type=TimeoutType.HEARTBEAT, last_heartbeat_details=details)


@pytest.mark.parametrize(
    "cause",
    [
        ApplicationError("no answer", USAGE.model_dump(mode="json"), type="BadAnswer"),
        ApplicationError("stopped", USAGE.model_dump(mode="json"), type=ErrorType.CANCELLED),
        timed_out(BEAT),
    ],
)
def test_a_call_that_failed_was_cancelled_or_timed_out_is_counted(cause: BaseException) -> None:
    assert failed_call(failure(cause)) == [USAGE]


@pytest.mark.parametrize(
    "cause",
    [
        ApplicationError("refused"),
        ApplicationError("refused", {"another": "detail"}),
        timed_out(),
        timed_out(BEAT | {"tokens_in": 0, "tokens_out": 0}),
        CancelledError("cancelled"),
    ],
)
def test_a_call_that_cost_nothing_is_not_counted(cause: BaseException) -> None:
    assert failed_call(failure(cause)) == []


def test_a_cancelled_call_is_a_cancellation_where_its_costs_are_not_counted() -> None:
    with pytest.raises(CancelledError), cancelled_as_such():
        raise failure(ApplicationError("stopped", type=ErrorType.CANCELLED))
    with pytest.raises(ActivityError), cancelled_as_such():
        raise failure(ApplicationError("no answer", type="BadAnswer"))


def test_calls_of_one_act_and_model_are_summed_up() -> None:
    call = CallUsage(act="next_action", agent_id="a", role="DEV", model="m", tokens_in=5)
    other = call.model_copy(update={"model": "n"})
    estimated = call.model_copy(update={"tokens_out": 2, "estimated": True, "prompt_hash": "p"})

    lines = summed_up([*summed_up([call, other]), estimated])

    assert [(line.model, line.calls, line.tokens, line.estimated) for line in lines] == [
        ("m", 2, 12, True),
        ("n", 1, 5, False),
    ]
    assert lines[0].prompt_hash == "p"
