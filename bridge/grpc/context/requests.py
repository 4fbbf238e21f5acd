"""The service's requests: their rules, and their defaults."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StringConstraints
from temporalio.exceptions import ApplicationError

from activities.graph.changes import MAX_CLOCK_SKEW, parse_timestamp
from workflows.models.base import Actor, Request, Title
from workflows.models.errors import InvalidInput
from workflows.models.ids import Id, LongId, UpperWord

EVENTS = 50
EVENTS_AT_MOST = 500
KEPT_S = 3_600
KEPT_AT_MOST_S = 7 * 24 * 3_600
TOKENS_AT_MOST = 100_000
ROLES_AT_MOST = 20

Identifier = Annotated[
    str, StringConstraints(strip_whitespace=True, pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,31}$")
]
"""A role or a phase, known or unknown."""


Text = Annotated[str, StringConstraints(max_length=20_000)]
FIRST_PHASE = "DESIGN"
DEPTH = 2


def node_type_of(name: object) -> object:
    """Return a node type in capitals, with the graph's label replaced by the contract's name."""
    word = name.strip().upper() if isinstance(name, str) else name
    return {"CASE": "STORY", "SUBTASK": "TASK"}.get(str(word), word)


class PackFields(Request):
    """Checked fields of a GetContextRequest.

    `token_budget` 0 means the default of scopes.yaml.
    """

    story_id: Id
    role: Identifier
    phase: Annotated[Identifier, StringConstraints(to_upper=True)]
    subtask_id: LongId | None = None
    token_budget: int = Field(ge=0, le=TOKENS_AT_MOST)


class SessionFields(Request):
    """Checked fields of a RehydrateSessionRequest.

    Empty `roles` mean all roles of scopes.yaml.
    """

    case_id: Id
    roles: list[Identifier] = Field(max_length=ROLES_AT_MOST)
    timeline_events: int = Field(ge=0, le=EVENTS_AT_MOST)
    ttl_seconds: int = Field(ge=0, le=KEPT_AT_MOST_S)


class ScopeFields(Request):
    """Checked fields of a ValidateScopeRequest."""

    role: Identifier
    phase: Identifier
    provided_scopes: list[Annotated[str, StringConstraints(max_length=200)]] = Field(
        max_length=1_000
    )


class CaseFields(Request):
    """Checked fields of an InitializeProjectContextRequest or a CreateStoryRequest."""

    story_id: Id
    title: Title
    description: Text
    initial_phase: UpperWord


class TaskFields(Request):
    """Checked fields of a CreateTaskRequest.

    Empty texts and numbers that are 0 are treated as absent.
    """

    story_id: Id
    task_id: LongId
    title: Annotated[str, StringConstraints(strip_whitespace=True, max_length=300)]
    description: Text
    role: Identifier | Literal[""]
    dependencies: list[LongId] = Field(max_length=100)
    priority: int = Field(ge=0, le=1_000_000)
    estimated_hours: int = Field(ge=0)


class DecisionFields(Request):
    """Checked fields of an AddProjectDecisionRequest.

    `decision_type` is None for a decision without a type.
    """

    story_id: Id
    decision_type: UpperWord | None = None
    title: Annotated[str, StringConstraints(strip_whitespace=True, max_length=300)]
    rationale: Text
    alternatives_considered: Text
    decided_by: Actor
    metadata: dict[str, Text] = Field(max_length=100)


class PhaseFields(Request):
    """Checked fields of a TransitionPhaseRequest."""

    story_id: Id
    from_phase: UpperWord
    to_phase: UpperWord
    rationale: Annotated[str, StringConstraints(strip_whitespace=True, max_length=4_000)]


class NodeFields(Request):
    """Checked fields of a GetGraphRelationshipsRequest."""

    node_id: Annotated[str, StringConstraints(min_length=1, max_length=500)]
    node_type: Annotated[Literal["PROJECT", "EPIC", "STORY", "TASK"], BeforeValidator(node_type_of)]
    depth: int = Field(ge=1, le=3)


def require_time(timestamp: str) -> None:
    """Refuse a time that cannot be read or is in the future, because the latest time wins.

    Raises:
        InvalidInput: names the field `timestamp` of an UpdateContextRequest, and the rule.
    """
    if not timestamp:
        return
    try:
        at = parse_timestamp(timestamp, "timestamp")
    except ApplicationError as error:
        rule = error.message.removeprefix("timestamp: ")
        raise InvalidInput("UpdateContextRequest", [("timestamp", rule)]) from None
    now = datetime.now(UTC)
    if at > now + MAX_CLOCK_SKEW:
        rule = f"is later than now ({now:%Y-%m-%dT%H:%M:%SZ}); set your clock, or leave it out"
    elif at.year < 1970:
        rule = "is before 1970; leave it out"
    else:
        return
    raise InvalidInput("UpdateContextRequest", [("timestamp", rule)])
