"""Errors: their types, which of them are retried, and refusals of what comes from outside.

Histories, the graph's records and gRPC's answers have the types; `bridge/grpc/errors.py` gives each
its gRPC status.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import ValidationError
from temporalio.exceptions import ApplicationError

from workflows.models.ids import ID_RULE

MESSAGE_CHARACTERS = 2_000
"""Maximum length of an error's message; histories keep every message."""


class ErrorType(StrEnum):
    """The `type` of an ApplicationError. Histories hold the values, so they never change."""

    # the request
    INVALID_INPUT = "InvalidInput"
    INVALID_ENTRY = "InvalidEntry"
    TOO_LARGE = "TooLarge"
    REQUEST_REUSED = "RequestReused"
    # the caller
    UNAUTHENTICATED = "Unauthenticated"
    PERMISSION = "Permission"
    GATE_ROLE = "GateRole"
    RATE_LIMIT = "RateLimit"
    QUOTA_USED = "QuotaUsed"
    # what exists
    NOT_FOUND = "NotFound"
    UNKNOWN_COUNCIL = "UnknownCouncil"
    UNKNOWN_STORY = "UnknownStory"
    ALREADY_EXISTS = "AlreadyExists"
    # what is not legal now
    UNKNOWN_GATE = "UnknownGate"
    GATE_NOT_OPEN = "GateNotOpen"
    GUARD_BLOCKED = "GuardBlocked"
    STALE_REVISION = "StaleRevision"
    ILLEGAL_MOVE = "IllegalMove"
    STORY_RUNS = "StoryRuns"
    STORY_UNREADABLE = "StoryUnreadable"
    NO_BUDGET = "NoBudget"
    NO_PLAN = "NoPlan"
    INVALID_PLAN = "InvalidPlan"
    ENTRY_NOT_STUCK = "EntryNotStuck"
    # agents and configuration
    MOCK_AGENT = "MockAgent"
    AGENT_TYPE_NOT_SUPPORTED = "AgentTypeNotSupported"
    INVALID_AGENT = "InvalidAgent"
    COUNCIL_TOO_SMALL = "CouncilTooSmall"
    INVALID_CONFIG = "InvalidConfig"
    # what ended without a result
    ALL_BARRED = "AllBarred"
    QUORUM_LOST = "QuorumLost"
    DELIBERATION_TIMEOUT = "DeliberationTimeout"
    PLAN_PARTIAL = "PlanPartial"
    MERGE_CONFLICT = "MergeConflict"
    BAD_ANSWER = "BadAnswer"
    AGENT_FAILED = "AgentFailed"
    CHILD_ENDED = "ChildEnded"
    CANCELLED = "Cancelled"
    """Of a call, with its cost as a detail, which Temporal's own CancelledError cannot carry."""
    WORKER_DRAINS = "WorkerDrains"
    # LLM endpoints (activities/agents/llm_errors.py)
    LLM_UNREACHABLE = "LlmUnreachable"
    LLM_TIMEOUT = "LlmTimeout"
    LLM_OVERLOADED = "LlmOverloaded"
    LLM_SERVER_ERROR = "LlmServerError"
    LLM_PROTOCOL = "LlmProtocol"
    LLM_REFUSED = "LlmRefused"
    PROMPT_TOO_LONG = "PromptTooLong"
    # commands of repositories (activities/workspace/)
    NO_SANDBOX = "NoSandbox"
    PREPARATION_FAILED = "PreparationFailed"
    # Neo4j and Valkey (activities/graph/errors.py)
    GRAPH_UNAVAILABLE = "GraphUnavailable"
    GRAPH_CREDENTIALS = "GraphCredentials"
    GRAPH_SETTINGS = "GraphSettings"
    GRAPH_BUSY = "GraphBusy"
    GRAPH_ERROR = "GraphError"
    GRAPH_STATEMENT = "GraphStatement"
    GRAPH_CONSTRAINT = "GraphConstraint"
    GRAPH_VALUE = "GraphValue"
    GRAPH_LOST = "GraphLost"
    UNKNOWN_KIND = "UnknownKind"
    CACHE_UNAVAILABLE = "CacheUnavailable"
    CACHE_CREDENTIALS = "CacheCredentials"
    CACHE_FULL = "CacheFull"
    CACHE_ERROR = "CacheError"
    CACHE_VALUE = "CacheValue"
    STORE_UNAVAILABLE = "StoreUnavailable"
    STORE_UNREACHABLE = "StoreUnreachable"
    PACK_MISSING = "PackMissing"
    # repositories and their stores (activities/workspace/)
    UNKNOWN_REPOSITORY = "UnknownRepository"
    REPOSITORY_AWAY = "RepositoryAway"
    BASE_MISSING = "BaseMissing"
    PUSH_REFUSED = "PushRefused"
    GIT_STORE_AWAY = "GitStoreAway"
    GIT_FAILED = "GitFailed"
    REF_MOVED = "RefMoved"
    TREE_REFUSED = "TreeRefused"
    # payloads in Temporal (workers/payload_codec.py)
    PAYLOAD_KEY_MISSING = "PayloadKeyMissing"
    # NATS (bridge/mirror/publisher.py)
    NATS_AWAY = "NatsAway"
    NATS_ERROR = "NatsError"
    NO_ACK = "NoAck"
    NO_STREAM = "NoStream"
    STREAM_REFUSED = "StreamRefused"
    EVENT_TOO_LARGE = "EventTooLarge"
    INVALID_EVENT = "InvalidEvent"
    EVENT_ID_TAKEN = "EventIdTaken"


RETRYABLE = frozenset(
    {
        ErrorType.AGENT_FAILED,
        ErrorType.WORKER_DRAINS,
        ErrorType.LLM_UNREACHABLE,
        ErrorType.LLM_TIMEOUT,
        ErrorType.LLM_OVERLOADED,
        ErrorType.LLM_SERVER_ERROR,
        ErrorType.LLM_PROTOCOL,
        ErrorType.NO_SANDBOX,
        ErrorType.GRAPH_UNAVAILABLE,
        ErrorType.GRAPH_CREDENTIALS,
        ErrorType.GRAPH_SETTINGS,
        ErrorType.GRAPH_BUSY,
        ErrorType.GRAPH_ERROR,
        ErrorType.UNKNOWN_KIND,
        ErrorType.CACHE_UNAVAILABLE,
        ErrorType.CACHE_CREDENTIALS,
        ErrorType.CACHE_FULL,
        ErrorType.CACHE_ERROR,
        ErrorType.STORE_UNAVAILABLE,
        ErrorType.STORE_UNREACHABLE,
        ErrorType.REPOSITORY_AWAY,
        ErrorType.GIT_STORE_AWAY,
        ErrorType.GIT_FAILED,
        ErrorType.PAYLOAD_KEY_MISSING,
        ErrorType.NATS_AWAY,
        ErrorType.NATS_ERROR,
        ErrorType.NO_ACK,
        ErrorType.NO_STREAM,
        ErrorType.STREAM_REFUSED,
        ErrorType.EVENT_TOO_LARGE,
        ErrorType.EVENT_ID_TAKEN,
    }
)
"""The types for which another attempt may succeed. Storing and publishing retry them without limit:
a server, a credential or a setting can be fixed while the activity retries."""


UNAVAILABLE = frozenset(
    {
        ErrorType.GRAPH_UNAVAILABLE,
        ErrorType.GRAPH_CREDENTIALS,
        ErrorType.GRAPH_SETTINGS,
        ErrorType.CACHE_UNAVAILABLE,
        ErrorType.CACHE_CREDENTIALS,
        ErrorType.CACHE_FULL,
        ErrorType.STORE_UNAVAILABLE,
        ErrorType.STORE_UNREACHABLE,
        ErrorType.REPOSITORY_AWAY,
        ErrorType.GIT_STORE_AWAY,
        ErrorType.PAYLOAD_KEY_MISSING,
        ErrorType.NATS_AWAY,
        ErrorType.NATS_ERROR,
        ErrorType.NO_ACK,
        ErrorType.NO_STREAM,
        ErrorType.STREAM_REFUSED,
    }
)
"""The types that no request causes: a server is down, or its credentials or settings are wrong."""


def application_error(kind: ErrorType, message: str, *details: Any) -> ApplicationError:
    """Build an error of a type; RETRYABLE decides whether Temporal retries.

    Args:
        kind: its type.
        message: which field or thing, the rule, the remedy; cut to 2,000 characters.
        details: models that the receiver reads, such as the cost of a failed call.
    """
    return ApplicationError(
        message[:MESSAGE_CHARACTERS],
        *details,
        type=kind.value,
        non_retryable=kind not in RETRYABLE,
    )


NOT_UNDERSTOOD = "not_understood"
"""The signal that replaces an unknown or malformed one, with its name and the reason."""


_REMEDIES = {
    "extra_forbidden": "unknown field; remove it or correct its name",
    "json_invalid": "is not JSON ({error}); send one JSON value in UTF-8",
    "model_type": "must be a JSON object; send {{...}}",
    "missing": "required; add it",
    "string_pattern_mismatch": f"must match {{pattern}}; an id is {ID_RULE}",
}


class InvalidInput(ApplicationError):
    """A rejected request.

    Attributes:
        problems: each wrong field with its rule; lost when Temporal serialises the error.
    """

    def __init__(self, what: str, problems: list[tuple[str, str]]) -> None:
        lines = "; ".join(f"{field}: {rule}" for field, rule in problems)
        super().__init__(
            f"{what} refused. {lines}"[:MESSAGE_CHARACTERS],
            type=ErrorType.INVALID_INPUT.value,
            non_retryable=True,
        )
        self.problems = problems


def invalid_input(what: str, error: ValidationError) -> InvalidInput:
    """Build a rejected request's error: each wrong field with its rule, cut to 2,000 characters."""
    problems = []
    for problem in error.errors(include_url=False, include_input=False):
        field = ".".join(str(part) for part in problem["loc"]) or "(the whole)"
        # Only our own texts are templates: pydantic's messages contain what was sent.
        remedy = _REMEDIES.get(problem["type"])
        said = problem["msg"].removeprefix("Value error, ")
        rule = remedy.format(**problem.get("ctx", {})) if remedy else said
        problems.append((field, rule))
    return InvalidInput(what, problems)
