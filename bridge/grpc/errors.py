"""Errors of calls as gRPC clients need them: a status, its message, and google.rpc details.

One table maps errors to statuses; `tests/unit/bridge/test_grpc_errors.py` checks that it is whole.
See https://grpc.io/docs/guides/status-codes/ and google/rpc/error_details.proto.
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

from workflows.models.errors import ErrorType, InvalidInput

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
    ErrorType.INVALID_INPUT: StatusCode.INVALID_ARGUMENT,
    ErrorType.INVALID_ENTRY: StatusCode.INVALID_ARGUMENT,
    ErrorType.GRAPH_VALUE: StatusCode.INVALID_ARGUMENT,
    ErrorType.GRAPH_CONSTRAINT: StatusCode.FAILED_PRECONDITION,
    ErrorType.CACHE_VALUE: StatusCode.INVALID_ARGUMENT,
    ErrorType.PROMPT_TOO_LONG: StatusCode.INVALID_ARGUMENT,
    # the caller
    ErrorType.UNAUTHENTICATED: StatusCode.UNAUTHENTICATED,
    ErrorType.PERMISSION: StatusCode.PERMISSION_DENIED,
    ErrorType.GATE_ROLE: StatusCode.PERMISSION_DENIED,
    ErrorType.RATE_LIMIT: StatusCode.RESOURCE_EXHAUSTED,
    ErrorType.QUOTA_USED: StatusCode.RESOURCE_EXHAUSTED,
    ErrorType.TOO_LARGE: StatusCode.RESOURCE_EXHAUSTED,
    # what exists
    ErrorType.NOT_FOUND: StatusCode.NOT_FOUND,
    ErrorType.UNKNOWN_COUNCIL: StatusCode.NOT_FOUND,
    ErrorType.UNKNOWN_STORY: StatusCode.NOT_FOUND,
    ErrorType.UNKNOWN_REPOSITORY: StatusCode.NOT_FOUND,
    ErrorType.REQUEST_REUSED: StatusCode.ALREADY_EXISTS,
    ErrorType.ALREADY_EXISTS: StatusCode.ALREADY_EXISTS,
    # what is not legal now
    ErrorType.UNKNOWN_GATE: StatusCode.FAILED_PRECONDITION,
    ErrorType.GATE_NOT_OPEN: StatusCode.FAILED_PRECONDITION,
    ErrorType.GUARD_BLOCKED: StatusCode.FAILED_PRECONDITION,
    ErrorType.STALE_REVISION: StatusCode.FAILED_PRECONDITION,
    ErrorType.ILLEGAL_MOVE: StatusCode.FAILED_PRECONDITION,
    ErrorType.STORY_RUNS: StatusCode.FAILED_PRECONDITION,
    ErrorType.NO_BUDGET: StatusCode.FAILED_PRECONDITION,
    ErrorType.STORY_UNREADABLE: StatusCode.FAILED_PRECONDITION,
    ErrorType.MOCK_AGENT: StatusCode.FAILED_PRECONDITION,
    ErrorType.AGENT_TYPE_NOT_SUPPORTED: StatusCode.FAILED_PRECONDITION,
    ErrorType.COUNCIL_TOO_SMALL: StatusCode.FAILED_PRECONDITION,
    ErrorType.INVALID_AGENT: StatusCode.FAILED_PRECONDITION,
    ErrorType.INVALID_CONFIG: StatusCode.FAILED_PRECONDITION,
    ErrorType.NO_PLAN: StatusCode.FAILED_PRECONDITION,
    ErrorType.INVALID_PLAN: StatusCode.FAILED_PRECONDITION,
    ErrorType.ALL_BARRED: StatusCode.FAILED_PRECONDITION,
    ErrorType.PREPARATION_FAILED: StatusCode.FAILED_PRECONDITION,
    ErrorType.ENTRY_NOT_STUCK: StatusCode.FAILED_PRECONDITION,
    ErrorType.GRAPH_LOST: StatusCode.FAILED_PRECONDITION,
    ErrorType.BASE_MISSING: StatusCode.FAILED_PRECONDITION,
    ErrorType.PUSH_REFUSED: StatusCode.FAILED_PRECONDITION,
    ErrorType.TREE_REFUSED: StatusCode.FAILED_PRECONDITION,
    # what ended without a result
    ErrorType.QUORUM_LOST: StatusCode.ABORTED,
    ErrorType.BAD_ANSWER: StatusCode.ABORTED,
    ErrorType.AGENT_FAILED: StatusCode.ABORTED,
    ErrorType.PLAN_PARTIAL: StatusCode.ABORTED,
    ErrorType.CHILD_ENDED: StatusCode.ABORTED,
    ErrorType.REF_MOVED: StatusCode.ABORTED,
    ErrorType.MERGE_CONFLICT: StatusCode.FAILED_PRECONDITION,
    ErrorType.DELIBERATION_TIMEOUT: StatusCode.DEADLINE_EXCEEDED,
    ErrorType.CANCELLED: StatusCode.CANCELLED,
    # what is unavailable for a time
    ErrorType.WORKER_DRAINS: StatusCode.UNAVAILABLE,
    ErrorType.LLM_UNREACHABLE: StatusCode.UNAVAILABLE,
    ErrorType.LLM_TIMEOUT: StatusCode.UNAVAILABLE,
    ErrorType.LLM_OVERLOADED: StatusCode.UNAVAILABLE,
    ErrorType.LLM_SERVER_ERROR: StatusCode.UNAVAILABLE,
    ErrorType.LLM_PROTOCOL: StatusCode.UNAVAILABLE,
    ErrorType.LLM_REFUSED: StatusCode.FAILED_PRECONDITION,
    ErrorType.NO_SANDBOX: StatusCode.UNAVAILABLE,
    ErrorType.STORE_UNREACHABLE: StatusCode.UNAVAILABLE,
    ErrorType.PACK_MISSING: StatusCode.UNAVAILABLE,
    ErrorType.STORE_UNAVAILABLE: StatusCode.UNAVAILABLE,
    ErrorType.REPOSITORY_AWAY: StatusCode.UNAVAILABLE,
    ErrorType.GIT_STORE_AWAY: StatusCode.UNAVAILABLE,
    ErrorType.PAYLOAD_KEY_MISSING: StatusCode.UNAVAILABLE,
    ErrorType.GRAPH_UNAVAILABLE: StatusCode.UNAVAILABLE,
    ErrorType.GRAPH_BUSY: StatusCode.UNAVAILABLE,
    ErrorType.GRAPH_CREDENTIALS: StatusCode.UNAVAILABLE,
    ErrorType.GRAPH_SETTINGS: StatusCode.UNAVAILABLE,
    ErrorType.CACHE_UNAVAILABLE: StatusCode.UNAVAILABLE,
    ErrorType.CACHE_CREDENTIALS: StatusCode.UNAVAILABLE,
    ErrorType.CACHE_FULL: StatusCode.UNAVAILABLE,
    ErrorType.NATS_AWAY: StatusCode.UNAVAILABLE,
    ErrorType.NATS_ERROR: StatusCode.UNAVAILABLE,
    ErrorType.NO_ACK: StatusCode.UNAVAILABLE,
    ErrorType.NO_STREAM: StatusCode.UNAVAILABLE,
    ErrorType.STREAM_REFUSED: StatusCode.UNAVAILABLE,
    ErrorType.UNKNOWN_KIND: StatusCode.UNAVAILABLE,
    # faults to fix in the fleet
    ErrorType.GRAPH_ERROR: StatusCode.INTERNAL,
    ErrorType.GIT_FAILED: StatusCode.INTERNAL,
    ErrorType.GRAPH_STATEMENT: StatusCode.INTERNAL,
    ErrorType.CACHE_ERROR: StatusCode.INTERNAL,
    ErrorType.EVENT_TOO_LARGE: StatusCode.INTERNAL,
    ErrorType.EVENT_ID_TAKEN: StatusCode.UNAVAILABLE,
    ErrorType.INVALID_EVENT: StatusCode.INTERNAL,
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


def status_of(error: BaseException) -> Status:
    """Return the google.rpc.Status of an error that a call raised; INTERNAL if it is unknown."""
    cause = _cause(error)
    match cause:
        case ApplicationError(type=str(kind)) if kind in STATUS:
            return _status(STATUS[kind], cause.message, kind, cause)
        case CancelledError():
            return _status(StatusCode.CANCELLED, "it was cancelled", ErrorType.CANCELLED, cause)
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
        given = cause.next_retry_delay if isinstance(cause, ApplicationError) else None
        wait.FromTimedelta(given or RETRY_AFTER)
        details.append(RetryInfo(retry_delay=wait))
    if code is StatusCode.NOT_FOUND and NOT_FOUND_WORDS not in message:
        message = f"{NOT_FOUND_WORDS}: {message}"
    words = message.encode()[:MESSAGE_BYTES].decode(errors="ignore")
    return Status(code=code.value[0], message=words, details=[_any(d) for d in details])


def _any(detail: Message) -> Any:
    packed = Any()
    packed.Pack(detail)
    return packed
