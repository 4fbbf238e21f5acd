"""Every error that the fleet raises has a gRPC status, and every status has its details."""

import ast
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode
from pydantic import ValidationError
from temporalio.client import WorkflowFailureError, WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError, CancelledError, TerminatedError, TimeoutType
from temporalio.exceptions import TimeoutError as TimedOut
from temporalio.service import RPCError, RPCStatusCode

from bridge.grpc.errors import STATUS, code_of, status_of
from workers.environment import ROOT
from workflows.models.errors import ErrorType, application_error, invalid_input
from workflows.models.story import StoryInput

TIMED_OUT = TimedOut("x", type=TimeoutType.START_TO_CLOSE, last_heartbeat_details=[])


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for folder in ("workflows", "activities", "bridge", "workers", "deploy"):
        for path in (ROOT / folder).rglob("*.py"):
            if "wire" not in path.parts:
                yield path.relative_to(ROOT), ast.parse(path.read_text())


def name_of(node: ast.expr) -> str:
    """Return the last part of a dotted name; empty for other expressions."""
    return getattr(node, "attr", "") or getattr(node, "id", "")


def is_type_of(node: ast.expr | None) -> bool:
    """Return whether an expression is the type of another error."""
    return isinstance(node, ast.Call) and name_of(node.func) == "type_of"


def test_every_type_of_error_has_a_status() -> None:
    assert set(STATUS) == set(ErrorType)


def test_every_error_has_a_type_of_the_enumeration() -> None:
    """A call of ApplicationError may pass on the type of another error, but name none itself."""
    wrong = []
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and name_of(node.func) == "ApplicationError":
                kind = next((each.value for each in node.keywords if each.arg == "type"), None)
                if not (isinstance(kind, ast.Attribute) or is_type_of(kind)):
                    wrong.append(f"{path}:{node.lineno}: {ast.unparse(node)}")

    assert wrong == []


def test_a_client_gets_the_time_after_which_it_may_try_again() -> None:
    error = ApplicationError(
        "no tokens are left",
        type=ErrorType.QUOTA_USED.value,
        next_retry_delay=timedelta(minutes=7),
    )

    status = status_of(error)

    assert code_of(status) is StatusCode.RESOURCE_EXHAUSTED
    retry = RetryInfo()
    assert next(each for each in status.details if each.Unpack(retry))
    assert retry.retry_delay.ToTimedelta() == timedelta(minutes=7)


def test_every_type_of_error_is_raised() -> None:
    raised = {
        node.attr
        for path, tree in sources()
        if path.name != "errors.py" or path.parts[0] == "activities"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and name_of(node.value) == "ErrorType"
    }

    assert set(ErrorType.__members__) - raised == set()


def details(status: Status) -> dict[str, object]:
    found = {}
    for packed in status.details:
        for kind in (ErrorInfo, BadRequest, RetryInfo):
            if packed.Is(kind.DESCRIPTOR):
                detail = kind()
                packed.Unpack(detail)
                found[kind.DESCRIPTOR.name] = detail
    return found


def test_a_wrong_field_is_a_field_violation_with_its_rule() -> None:
    with pytest.raises(ApplicationError) as refusal:
        StoryInput(story_id="no/such", title="")

    status = status_of(refusal.value)

    assert code_of(status) == StatusCode.INVALID_ARGUMENT
    bad = details(status)["BadRequest"]
    assert isinstance(bad, BadRequest)
    assert [violation.field for violation in bad.field_violations] == ["story_id", "title"]
    assert "1 to 100 letters" in bad.field_violations[0].description


NOT_FOUND = [
    *(
        application_error(ErrorType(kind), "no such thing")
        for kind, code in STATUS.items()
        if code.name == "NOT_FOUND"
    ),
    RPCError("workflow execution is gone", RPCStatusCode.NOT_FOUND, b""),
    application_error(ErrorType.NOT_FOUND, "x" * 10_000),
]


@pytest.mark.parametrize("error", NOT_FOUND)
def test_every_not_found_error_says_not_found(error: Exception) -> None:
    status = status_of(error)

    assert code_of(status) == StatusCode.NOT_FOUND
    assert "not found" in status.message
    assert (
        status_of(application_error(ErrorType.NOT_FOUND, "story x not found")).message
        == "story x not found"
    )


@pytest.mark.parametrize("kind", [k for k, code in STATUS.items() if code.name == "UNAVAILABLE"])
def test_an_outage_gives_the_time_to_retry(kind: str) -> None:
    retry = details(status_of(application_error(ErrorType(kind), "away")))["RetryInfo"]

    assert isinstance(retry, RetryInfo)
    assert retry.retry_delay.seconds == 1


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (application_error(ErrorType.GATE_ROLE, "not QA"), "PERMISSION_DENIED", "not QA"),
        (
            WorkflowUpdateFailedError(application_error(ErrorType.ILLEGAL_MOVE, "no")),
            "FAILED_PRECONDITION",
            "no",
        ),
        (
            WorkflowFailureError(cause=application_error(ErrorType.QUORUM_LOST, "1 of 3")),
            "ABORTED",
            "1 of 3",
        ),
        (WorkflowFailureError(cause=CancelledError("x")), "CANCELLED", "cancelled"),
        (RPCError("gone", RPCStatusCode.NOT_FOUND, b""), "NOT_FOUND", "gone"),
        (RPCError("down", RPCStatusCode.UNAVAILABLE, b""), "UNAVAILABLE", "down"),
        (RPCError("?", RPCStatusCode.PERMISSION_DENIED, b""), "UNAVAILABLE", "?"),
        (WorkflowFailureError(cause=TerminatedError("x")), "ABORTED", "terminated"),
        (WorkflowFailureError(cause=TIMED_OUT), "DEADLINE_EXCEEDED", "may still be done"),
        (TimeoutError(), "DEADLINE_EXCEEDED", "may still be done"),
        (
            ApplicationError("secret", type="KeyError"),
            "INTERNAL",
            "an internal error; it is logged",
        ),
        (KeyError("secret"), "INTERNAL", "an internal error; it is logged"),
    ],
)
def test_what_a_call_raises_becomes_a_status(error: Exception, code: str, words: str) -> None:
    status = status_of(error)

    assert code_of(status).name == code
    assert words in status.message
    assert "secret" not in status.message
    assert isinstance(details(status)["ErrorInfo"], ErrorInfo)


def test_a_status_stays_small_enough_for_trailers() -> None:
    wrong = StoryInput.model_fields | {f"{number}-{'é' * 300}": "x" for number in range(500)}
    with pytest.raises(ApplicationError) as refusal:
        StoryInput.model_validate(wrong)

    status = status_of(refusal.value)

    assert status.ByteSize() < 8_000
    assert status_of(application_error(ErrorType.UNKNOWN_STORY, "世" * 5_000)).ByteSize() < 1_000


def test_what_was_sent_is_not_a_template() -> None:
    """Messages of pydantic contain the input, so braces in them have no meaning."""
    for text in ('{"story_id": "US-1" "title": "x"}', '{"title": "{0.__class__}"}', '{"a": }'):
        with pytest.raises((ApplicationError, ValidationError)) as refusal:
            StoryInput.model_validate_json(text)
        if isinstance(refusal.value, ValidationError):
            assert invalid_input("story", refusal.value).problems
