"""Errors of calls as gRPC clients need them: a status, its message, and google.rpc details.

One table maps errors to statuses; `tests/unit/test_grpc_errors.py` checks that it is complete. See
https://grpc.io/docs/guides/status-codes/ and google/rpc/error_details.proto.
"""

from __future__ import annotations

from datetime import timedelta

from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode
from temporalio.client import RPCError, WorkflowFailureError, WorkflowUpdateFailedError
from temporalio.client import WorkflowUpdateRPCTimeoutOrCancelledError as UpdateUnanswered
from temporalio.exceptions import (
    ApplicationError,
    CancelledError,
    FailureError,
    TerminatedError,
)
from temporalio.exceptions import TimeoutError as TimedOut
from temporalio.service import RPCStatusCode

from workflows.models import InvalidInput

NOT_FOUND = "NotFound"
ALREADY_EXISTS = "AlreadyExists"
UNAUTHENTICATED = "Unauthenticated"
PERMISSION = "Permission"
RATE = "RateLimit"
TOO_LARGE = "TooLarge"
STORY_RUNS = "StoryRuns"
CANCELLED = "Cancelled"

NOT_FOUND_WORDS = "not found"
"""Words that clients look for in the details of every NOT_FOUND."""

DOMAIN = "swe-ai-fleet"
"""The `domain` of ErrorInfo: the owner of its `reason`."""

MESSAGE_BYTES = 500
VIOLATIONS = 20
VIOLATION_CHARACTERS = 120
"""Maximum length of one violation's field and of its rule, in characters.

These three limits keep a status small. It is sent in the trailers, twice, and clients lose trailers
of more than 8 KiB at random.
"""

RETRY_AFTER = timedelta(seconds=1)
"""The retry delay that clients receive if a server is unavailable."""

STATUS: dict[str, StatusCode] = {
    # the request
    "InvalidInput": StatusCode.INVALID_ARGUMENT,
    "InvalidEntry": StatusCode.INVALID_ARGUMENT,
    "GraphValue": StatusCode.INVALID_ARGUMENT,
    "GraphConstraint": StatusCode.FAILED_PRECONDITION,
    "CacheValue": StatusCode.INVALID_ARGUMENT,
    "PromptTooLong": StatusCode.INVALID_ARGUMENT,
    # the caller
    UNAUTHENTICATED: StatusCode.UNAUTHENTICATED,
    PERMISSION: StatusCode.PERMISSION_DENIED,
    "GateRole": StatusCode.PERMISSION_DENIED,
    RATE: StatusCode.RESOURCE_EXHAUSTED,
    TOO_LARGE: StatusCode.RESOURCE_EXHAUSTED,
    # what exists
    NOT_FOUND: StatusCode.NOT_FOUND,
    "UnknownCouncil": StatusCode.NOT_FOUND,
    "UnknownStory": StatusCode.NOT_FOUND,
    "RequestReused": StatusCode.ALREADY_EXISTS,
    ALREADY_EXISTS: StatusCode.ALREADY_EXISTS,
    # what is not legal now
    "UnknownGate": StatusCode.FAILED_PRECONDITION,
    "GateNotOpen": StatusCode.FAILED_PRECONDITION,
    "GuardBlocked": StatusCode.FAILED_PRECONDITION,
    "StaleRevision": StatusCode.FAILED_PRECONDITION,
    "IllegalMove": StatusCode.FAILED_PRECONDITION,
    STORY_RUNS: StatusCode.FAILED_PRECONDITION,
    "NoBudget": StatusCode.FAILED_PRECONDITION,
    "StoryUnreadable": StatusCode.FAILED_PRECONDITION,
    "MockAgent": StatusCode.FAILED_PRECONDITION,
    "AgentTypeNotSupported": StatusCode.FAILED_PRECONDITION,
    "CouncilTooSmall": StatusCode.FAILED_PRECONDITION,
    "InvalidAgent": StatusCode.FAILED_PRECONDITION,
    "InvalidConfig": StatusCode.FAILED_PRECONDITION,
    "NoPlan": StatusCode.FAILED_PRECONDITION,
    "InvalidPlan": StatusCode.FAILED_PRECONDITION,
    "AllBarred": StatusCode.FAILED_PRECONDITION,
    "EntryNotStuck": StatusCode.FAILED_PRECONDITION,
    "GraphLost": StatusCode.FAILED_PRECONDITION,
    # what ended without a result
    "QuorumLost": StatusCode.ABORTED,
    "BadAnswer": StatusCode.ABORTED,
    "AgentFailed": StatusCode.ABORTED,
    "PlanPartial": StatusCode.ABORTED,
    "ChildEnded": StatusCode.ABORTED,
    "DeliberationTimeout": StatusCode.DEADLINE_EXCEEDED,
    CANCELLED: StatusCode.CANCELLED,
    # what is unavailable for a time
    "WorkerDrains": StatusCode.UNAVAILABLE,
    "LlmUnreachable": StatusCode.UNAVAILABLE,
    "LlmTimeout": StatusCode.UNAVAILABLE,
    "LlmOverloaded": StatusCode.UNAVAILABLE,
    "LlmServerError": StatusCode.UNAVAILABLE,
    "LlmProtocol": StatusCode.UNAVAILABLE,
    "LlmRefused": StatusCode.FAILED_PRECONDITION,
    "StoreUnreachable": StatusCode.UNAVAILABLE,
    "StoreUnavailable": StatusCode.UNAVAILABLE,
    "GraphUnavailable": StatusCode.UNAVAILABLE,
    "GraphBusy": StatusCode.UNAVAILABLE,
    "GraphCredentials": StatusCode.UNAVAILABLE,
    "GraphSettings": StatusCode.UNAVAILABLE,
    "CacheUnavailable": StatusCode.UNAVAILABLE,
    "CacheCredentials": StatusCode.UNAVAILABLE,
    "CacheFull": StatusCode.UNAVAILABLE,
    "NatsAway": StatusCode.UNAVAILABLE,
    "NatsError": StatusCode.UNAVAILABLE,
    "NoAck": StatusCode.UNAVAILABLE,
    "NoStream": StatusCode.UNAVAILABLE,
    "StreamRefused": StatusCode.UNAVAILABLE,
    "UnknownKind": StatusCode.UNAVAILABLE,
    # faults to fix in the fleet
    "GraphError": StatusCode.INTERNAL,
    "GraphStatement": StatusCode.INTERNAL,
    "CacheError": StatusCode.INTERNAL,
    "EventTooLarge": StatusCode.INTERNAL,
    "InvalidEvent": StatusCode.INTERNAL,
}
"""The type of an ApplicationError -> the status."""

_TEMPORAL: dict[RPCStatusCode, StatusCode] = {
    RPCStatusCode.NOT_FOUND: StatusCode.NOT_FOUND,
    RPCStatusCode.ALREADY_EXISTS: StatusCode.ALREADY_EXISTS,
    RPCStatusCode.INVALID_ARGUMENT: StatusCode.INVALID_ARGUMENT,
    RPCStatusCode.DEADLINE_EXCEEDED: StatusCode.DEADLINE_EXCEEDED,
    RPCStatusCode.CANCELLED: StatusCode.CANCELLED,
}
"""Temporal's statuses about the request itself; all others become UNAVAILABLE."""


def refused(kind: str, message: str) -> ApplicationError:
    """Build the error that a servicer raises; `kind` is one of STATUS."""
    return ApplicationError(message, type=kind, non_retryable=True)


def status_of(error: BaseException) -> Status:
    """Return the google.rpc.Status of an error that a call raised; INTERNAL if it is unknown."""
    cause = _cause(error)
    match cause:
        case ApplicationError(type=str(kind)) if kind in STATUS:
            return _status(STATUS[kind], cause.message, kind, cause)
        case CancelledError():
            return _status(StatusCode.CANCELLED, "it was cancelled", CANCELLED, cause)
        case TerminatedError():
            return _status(StatusCode.ABORTED, "it was terminated", "Terminated", cause)
        case UpdateUnanswered() | TimedOut() | TimeoutError():
            words = "no answer in time; what was asked may still be done"
            return _status(StatusCode.DEADLINE_EXCEEDED, words, "Deadline", cause)
        case RPCError():
            code = _TEMPORAL.get(cause.status, StatusCode.UNAVAILABLE)
            return _status(code, f"Temporal: {cause.message}", cause.status.name, cause)
    return _status(StatusCode.INTERNAL, "an internal error; it is logged", "Internal", cause)


def code_of(status: Status) -> StatusCode:
    """Return grpc's code of the status."""
    return next(code for code in StatusCode if code.value[0] == status.code)


def _cause(error: BaseException) -> BaseException:
    """Return the error inside those in which Temporal wraps it."""
    while isinstance(error, WorkflowFailureError | WorkflowUpdateFailedError | FailureError):
        if isinstance(error, ApplicationError | CancelledError) or error.__cause__ is None:
            return error
        error = error.__cause__
    return error


def _status(code: StatusCode, message: str, reason: str, cause: BaseException) -> Status:
    details: list[Message] = [ErrorInfo(reason=reason, domain=DOMAIN)]
    if isinstance(cause, InvalidInput):
        details.append(
            BadRequest(
                field_violations=[
                    BadRequest.FieldViolation(
                        field=field[:VIOLATION_CHARACTERS], description=rule[:VIOLATION_CHARACTERS]
                    )
                    for field, rule in cause.problems[:VIOLATIONS]
                ]
            )
        )
    if code in (StatusCode.UNAVAILABLE, StatusCode.RESOURCE_EXHAUSTED):
        wait = Duration()
        wait.FromTimedelta(RETRY_AFTER)
        details.append(RetryInfo(retry_delay=wait))
    if code is StatusCode.NOT_FOUND and NOT_FOUND_WORDS not in message:
        message = f"{NOT_FOUND_WORDS}: {message}"
    words = message.encode()[:MESSAGE_BYTES].decode(errors="ignore")
    return Status(code=code.value[0], message=words, details=[_any(d) for d in details])


def _any(detail: Message) -> Any:
    packed = Any()
    packed.Pack(detail)
    return packed
