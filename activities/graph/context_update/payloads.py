"""The payload of each kind of entity: its fields, and the properties for unknown fields."""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
)
from pydantic.alias_generators import to_camel
from temporalio.exceptions import ApplicationError

from activities.graph.changes import MAX_CLOCK_SKEW, Row, parse_timestamp
from workflows.models.base import Actor, Line, Rigor, Title
from workflows.models.ids import LongId, UpperWord
from workflows.timestamps import format_timestamp

PAYLOAD_CHARACTERS = 64 * 1024
WARNING_CHARACTERS = 300
NOT_LIVE = ("UNKNOWN", "DELETED")
"""Statuses of a node that is only a placeholder or that was deleted."""

Operation = Literal["CREATE", "UPDATE", "DELETE"]
EntityType = Literal["CASE", "PLAN", "SUBTASK", "DECISION", "MILESTONE"]

OPERATIONS: tuple[Operation, ...] = get_args(Operation)
ENTITY_TYPES: tuple[EntityType, ...] = get_args(EntityType)

Entity = tuple[str, str]
"""Type and id."""


# --- payloads -------------------------------------------------------------------------------------


def _live(status: str) -> str:
    if status in NOT_LIVE:
        raise ValueError(f"{status} is set by DELETE, or by none")
    return status


def _joined(status: Any) -> Any:
    return status.strip().replace("-", "_").replace(" ", "_") if isinstance(status, str) else status


def _or_absent(value: Any) -> Any:
    return None if isinstance(value, str) and not value.strip() else value


def _utc(text: str, info: ValidationInfo) -> str:
    """Return the time in the one format that the graph uses, because times are sorted as text."""
    try:
        at = parse_timestamp(text, "time")
    except ApplicationError:
        raise ValueError("is not ISO 8601, as in 2026-01-31T12:00:00Z") from None
    _require_come(at, info)
    return format_timestamp(at)


def _utc_ms(ms: int, info: ValidationInfo) -> int:
    _require_come(datetime.fromtimestamp(ms / 1000, UTC), info)
    return ms


def _require_come(at: datetime, info: ValidationInfo) -> None:
    assert info.context
    if at > info.context["now"] + MAX_CLOCK_SKEW:
        raise ValueError("is later than now; set your clock, or leave it out")


Status = Annotated[UpperWord, BeforeValidator(_joined), AfterValidator(_live)]
Text = Annotated[str, StringConstraints(max_length=20_000)]
Time = Annotated[str, StringConstraints(max_length=100), AfterValidator(_utc)]
Millis = Annotated[int, Field(ge=0, le=10**14), AfterValidator(_utc_ms)]
Number = Annotated[int, Field(ge=0, le=1_000_000)]
"""A number that is sent as an int32."""

T = TypeVar("T")
Maybe = Annotated[T | None, BeforeValidator(_or_absent)]
"""A value for which an empty text counts as absent."""


class Payload(BaseModel):
    """The fields of a change under our names, validated with the context {"now": datetime}.

    The fields are the properties of the node, except a subtask's `plan_id` and `depends_on`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    NEEDED: ClassVar[tuple[str, ...]] = ()
    """Fields that are required to create an entity."""

    ALSO: ClassVar[dict[str, str]] = {}
    """Names that other systems use -> our fields."""

    INSTEAD: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Field -> the names tried in turn if it is absent; otherwise they count as unknown fields."""


class CasePayload(Payload):
    """The text and status of a story."""

    NEEDED = ("title",)
    ALSO = {"brief": "description"}

    title: Title | None = None
    description: Text | None = None
    acceptance_criteria: list[Line] | None = Field(None, max_length=100)
    rigor: Maybe[Rigor] = None
    status: Maybe[Status] = None
    created_by: Maybe[Actor] = None
    created_at: Maybe[Time] = None


class PlanPayload(Payload):
    """A plan. A new plan without a version gets the story's next one."""

    version: Annotated[Number, Field(ge=1)] | None = None
    status: Maybe[Status] = None


class SubtaskPayload(Payload):
    """A task of the plan `plan_id`, or of the story's last plan."""

    ALSO = {"dependencies": "depends_on"}
    INSTEAD = {"status": ("last_status",)}

    title: Title | None = None
    description: Text | None = None
    role: Maybe[UpperWord] = None
    status: Maybe[Status] = None
    priority: Number | None = None
    assignee: Maybe[Actor] = None
    type: Maybe[UpperWord] = None
    plan_id: Maybe[LongId] = None
    depends_on: list[LongId] | None = Field(None, max_length=100)


class DecisionPayload(Payload):
    """A decision. `affects`: ids or titles of the subtasks and decisions that it affects."""

    NEEDED = ("title",)
    INSTEAD = {"rationale": ("description",)}

    title: Title | None = None
    rationale: Text | None = None
    type: Maybe[UpperWord] = None
    status: Maybe[Status] = None
    role: Maybe[UpperWord] = None
    decided_by: Maybe[Actor] = None
    decided_at: Maybe[Time] = None
    affects: list[Line] | None = Field(None, max_length=100)


class MilestonePayload(Payload):
    """An event in the life of a story."""

    NEEDED = ("event_type",)
    ALSO = {"ts_ms": "timestamp_ms"}
    INSTEAD = {"event_type": ("type", "event"), "description": ("title",)}

    event_type: Annotated[Line, StringConstraints(max_length=200)] | None = None
    description: Annotated[str, StringConstraints(max_length=2_000)] | None = None
    actor: Maybe[Actor] = None
    timestamp_ms: Millis | None = None


PAYLOADS: dict[EntityType, type[Payload]] = {
    "CASE": CasePayload,
    "PLAN": PlanPayload,
    "SUBTASK": SubtaskPayload,
    "DECISION": DecisionPayload,
    "MILESTONE": MilestonePayload,
}


def _names(kind: type[Payload]) -> dict[str, str]:
    plain = {name: name for name in kind.model_fields} | kind.ALSO
    return plain | {to_camel(name): ours for name, ours in plain.items()}


NAMES: dict[type[Payload], dict[str, str]] = {kind: _names(kind) for kind in PAYLOADS.values()}
"""Every accepted name of a field -> our name: ours, others', and the protobuf JSON form of both."""


# --- unknown fields -------------------------------------------------------------------------------

EXTRA_PREFIX = "x_"
"""Prefix of properties that hold unknown fields, so that they cannot clash with ours."""

EXTRAS_AT_MOST = 50
_EXTRA_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")
_INT64 = range(-(2**63), 2**63)


def extra_properties(others: Row) -> tuple[Row, list[str]]:
    """Convert unknown fields to node properties; also return the names that cannot be kept.

    Letters, digits and `_` in a name stay, anything else becomes `_`. A value that a property
    cannot hold (an object, a mixed list) is kept as JSON.
    """
    kept: Row = {}
    left_out = []
    for name, value in others.items():
        key = re.sub(r"[^A-Za-z0-9_]", "_", name)
        fits = _EXTRA_NAME.fullmatch(key) and EXTRA_PREFIX + key not in kept
        if fits and len(kept) < EXTRAS_AT_MOST:
            kept[EXTRA_PREFIX + key] = _property(value)
        else:
            left_out.append(name[:40])
    return kept, left_out


def _property(value: Any) -> Any:
    if _is_plain(value):
        return value
    if isinstance(value, list) and all(map(_is_plain, value)) and len(set(map(type, value))) == 1:
        return value
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _is_plain(value: Any) -> bool:
    match value:
        case bool() | str():
            return True
        case int():
            return value in _INT64
        case float():
            return math.isfinite(value)
    return False
