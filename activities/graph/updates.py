"""An update of a story's context: each change is validated separately, all are stored together.

A change that breaks a rule is refused with one warning, and the others are stored. Fields that a
payload lacks stay unchanged; no values are invented. An UPDATE of a plan, subtask or decision that
does not exist creates it, and a subtask creates the plan that it names. Only CREATE brings back a
deleted entity, without any field of the deleted one. Unknown fields are kept as properties with
the prefix `x_`. An older change never replaces newer values: every text and status carries the
order key of `changes`, and the story's lock is held from before the first comparison until the
commit.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    LiteralString,
    NamedTuple,
    TypeVar,
    get_args,
)

from neo4j import AsyncManagedTransaction
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)
from pydantic.alias_generators import to_camel
from pydantic_core import from_json
from temporalio.exceptions import ApplicationError

from activities.graph.changes import AHEAD_AT_MOST, Row, Write, moment, order_key
from activities.graph.decisions import DECISION_LINKS, KEEP_REVISION, TASK_LINKS
from activities.graph.plans import PLACEHOLDER, READ_AS_SUBTASK, TAKE_UNPLANNED
from activities.graph.stories import STORY
from workflows.models.base import Actor, Line, Rigor, Title, content_hash
from workflows.models.context import (
    ContextAnswer,
    ContextChange,
    ContextWrite,
    DecisionAdded,
    MilestoneReached,
    request_hash,
)
from workflows.models.error_types import ErrorType, application_error
from workflows.models.errors import invalid_input
from workflows.models.ids import LongId
from workflows.timestamps import iso

PAYLOAD_BYTES = 64 * 1024
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
        at = moment(text, "time")
    except ApplicationError:
        raise ValueError("is not ISO 8601, as in 2026-01-31T12:00:00Z") from None
    _require_come(at, info)
    return iso(at)


def _utc_ms(ms: int, info: ValidationInfo) -> int:
    _require_come(datetime.fromtimestamp(ms / 1000, UTC), info)
    return ms


def _require_come(at: datetime, info: ValidationInfo) -> None:
    assert info.context
    if at > info.context["now"] + AHEAD_AT_MOST:
        raise ValueError("is later than now; set your clock, or leave it out")


Word = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True, to_upper=True, pattern=r"^[A-Za-z][A-Za-z0-9_]{0,31}$"
    ),
]
Status = Annotated[Word, BeforeValidator(_joined), AfterValidator(_live)]
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
    role: Maybe[Word] = None
    status: Maybe[Status] = None
    priority: Number | None = None
    assignee: Maybe[Actor] = None
    type: Maybe[Word] = None
    plan_id: Maybe[LongId] = None
    depends_on: list[LongId] | None = Field(None, max_length=100)


class DecisionPayload(Payload):
    """A decision. `affects`: ids or titles of the subtasks and decisions that it affects."""

    NEEDED = ("title",)
    INSTEAD = {"rationale": ("description",)}

    title: Title | None = None
    rationale: Text | None = None
    type: Maybe[Word] = None
    status: Maybe[Status] = None
    role: Maybe[Word] = None
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


def _extras(others: Row) -> tuple[Row, list[str]]:
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


# --- reading a change -----------------------------------------------------------------------------

_ENTITY_ID: TypeAdapter[str] = TypeAdapter(LongId)


class Refused(ValueError):
    """The reason why a change is not stored."""


@dataclass(frozen=True)
class Asked:
    """A change that was parsed. DELETE has no payload.

    Attributes:
        number: position in the request.
        extras: unknown fields as node properties.
        left_out: names of unknown fields that cannot be kept.
    """

    number: int
    operation: Operation
    entity_type: EntityType
    entity_id: str
    payload: Payload | None
    reason: str
    extras: Row = field(default_factory=dict)
    left_out: Sequence[str] = ()

    @property
    def entity(self) -> Entity:
        """The type and id of the entity that the change is about."""
        return self.entity_type, self.entity_id

    def __str__(self) -> str:
        return f"{self.operation} {self.entity_type} {self.entity_id}"


def read_change(number: int, change: ContextChange, story_id: str, now: datetime) -> Asked:
    """Parse a change.

    Raises:
        Refused: the operation or type is unknown, the id is invalid, or the payload breaks a rule
            or is about another entity.
    """
    operation = change.operation.strip().upper()
    entity_type = change.entity_type.strip().upper()
    if operation not in OPERATIONS:
        raise Refused(f"operation: {operation[:40]!r} is not one of {', '.join(OPERATIONS)}")
    if entity_type not in ENTITY_TYPES:
        raise Refused(f"entity_type: {entity_type[:40]!r} is not one of {', '.join(ENTITY_TYPES)}")
    entity_id = change.entity_id or (story_id if entity_type == "CASE" else "")
    try:
        _ENTITY_ID.validate_python(entity_id)
    except ValidationError as error:
        raise Refused(f"entity_id: {entity_id[:60]!r}: {error.errors()[0]['msg']}") from None
    fields = _payload_fields(change.payload)
    own: dict[str, tuple[str, ...]] = dict.fromkeys(
        ("id", f"{entity_type.lower()}_id"), (entity_id,)
    )
    own["case_id"] = (story_id, entity_id) if entity_type == "CASE" else (story_id,)
    others = _without_ids(fields, own)
    reason = change.reason.replace("\0", "").strip()[:500]
    if entity_type == "CASE" and entity_id != story_id:
        # A story is one case, whatever id the sender uses for it.
        others |= {"entity_id": entity_id}
        entity_id = story_id
    if operation == "DELETE":
        return Asked(number, operation, entity_type, entity_id, None, reason)
    payload, others = _payload(PAYLOADS[entity_type], others, now)
    extras, left_out = _extras(others)
    return Asked(number, operation, entity_type, entity_id, payload, reason, extras, left_out)


def _payload_fields(text: str) -> Row:
    """Parse the payload as a JSON object; an empty text has no fields."""
    if len(text.encode()) > PAYLOAD_BYTES:
        raise Refused(f"payload: more than {PAYLOAD_BYTES} bytes; shorten it")
    try:
        fields = from_json(text, allow_inf_nan=False) if text.strip() else {}
    except ValueError as error:
        raise Refused(f"payload: is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise Refused("payload: is JSON, but not an object")
    if _has_null_character(fields):
        raise Refused("payload: a text contains U+0000; remove it")
    return fields


def _has_null_character(value: Any) -> bool:
    match value:
        case str():
            return "\0" in value
        case list():
            return any(map(_has_null_character, value))
        case dict():
            return any(map(_has_null_character, (*value, *value.values())))
    return False


def _without_ids(fields: Row, own: dict[str, tuple[str, ...]]) -> Row:
    """Remove the ids of the change's entity from the fields, after checking that they match it."""
    for name, right in own.items():
        for given in (fields.get(name), fields.get(to_camel(name))):
            if given not in (None, "", *right):
                raise Refused(
                    f"payload.{name}: {str(given)[:60]!r} is not {right[0]}, which this is about"
                )
    names = {*own, *map(to_camel, own)}
    return {given: value for given, value in fields.items() if given not in names}


def _payload(kind: type[Payload], fields: Row, now: datetime) -> tuple[Payload, Row]:
    """Split the fields into a payload of the known ones and the unknown ones."""
    ours: Row = {}
    others: Row = {}
    for given, value in fields.items():
        name = NAMES[kind].get(given)
        if value is None:
            continue
        if name is None:
            others[given] = value
        elif ours.setdefault(name, value) != value:
            raise Refused(f"payload.{name}: is given under two names, with different values")
    for name, instead in kind.INSTEAD.items():
        for given in instead:
            found = next((each for each in (given, to_camel(given)) if each in others), None)
            if found and ours.get(name) in (None, ""):
                ours[name] = others.pop(found)
    try:
        return kind.model_validate(ours, context={"now": now}), others
    except ValidationError as error:
        raise Refused(invalid_input("payload", error).message) from None


# --- validation against the graph -----------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """The state of an entity: as stored, or as earlier changes of the update left it."""

    live: bool
    status_order: str = ""
    text_order: str = ""
    extras: Sequence[str] = ()
    """Names of the properties that hold unknown fields."""


@dataclass
class Found:
    """The stored state of a story, read under its lock."""

    story_live: bool
    story_deleted: bool = False
    version: int = 0
    version_by: str = ""
    """Workflow id of the update that created this version."""
    plans: dict[str, int] = field(default_factory=dict)
    """Plan id -> version, for plans that are not deleted."""
    entities: dict[Entity, Known] = field(default_factory=dict)
    needs: dict[str, list[str]] = field(default_factory=dict)
    """Subtask id -> the subtasks that it depends on; empty if no change sets dependencies."""
    created: Row = field(default_factory=dict)
    """The case's created_at and created_by, if present."""
    closed: bool = False
    """Whether an earlier change of the update deleted the case."""

    @property
    def last_plan(self) -> str:
        """The id of the newest plan, or empty."""
        return max(self.plans, key=lambda plan: (self.plans[plan], plan), default="")


@dataclass
class Judged:
    """The stored and the refused changes. A change that is stored in part also has a warning."""

    writes: list[Write] = field(default_factory=list)
    applied: list[Asked] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


Read = Sequence[Asked | Refused]


def read_changes(write: ContextWrite) -> list[Asked | Refused]:
    """Parse every change; return a `Refused` for each one that is invalid."""
    found: list[Asked | Refused] = []
    now = datetime.fromtimestamp(write.started_ms / 1000, UTC)
    for number, change in enumerate(write.update.changes):
        try:
            found.append(read_change(number, change, write.update.story_id, now))
        except Refused as refusal:
            found.append(refusal)
        except Exception as error:  # any error refuses the change  # noqa: BLE001
            # A change that cannot be parsed now never can be: a retry would fail the same way.
            found.append(Refused(f"cannot be read ({type(error).__name__}); write it otherwise"))
    return found


def judge(
    write: ContextWrite, read: Read, found: Found, role_of: Callable[[str], str] = str.upper
) -> Judged:
    """Decide which changes are stored and what is written for them; update `found` accordingly."""
    judged = Judged()
    at = moment(write.at, "timestamp")
    write = write.model_copy(update={"at": iso(at)})
    for number, asked in enumerate(read):
        change = write.update.changes[number]
        try:
            if isinstance(asked, Refused):
                raise asked
            fixed = _fixed(asked, found)
            order = order_key(at, write.started_ms, number)
            judged.writes += _writes(write, asked, fixed, found, order, role_of)
        except Refused as refusal:
            judged.warnings.append(_warning(number, change, str(refusal)))
        else:
            judged.applied.append(asked)
            left_out = [_never(fixed)] if fixed else []
            if asked.left_out:
                left_out.append(f"payload.{', payload.'.join(asked.left_out)}: {_TOO_MANY}")
            if left_out:
                judged.warnings.append(_warning(number, change, "; ".join(left_out)))
    return judged


def _warning(number: int, change: ContextChange, why: str) -> str:
    named = " ".join((change.operation[:20], change.entity_type[:20], change.entity_id))
    words = f"change {number} ({named[:120]}): {why}"
    return " ".join(words.split())[:WARNING_CHARACTERS]


def _fixed(asked: Asked, found: Found) -> list[str]:
    """Return the immutable fields of the case for which the change has another value."""
    if not isinstance(asked.payload, CasePayload) or not found.created:
        return []
    given = asked.payload.model_dump(include={"created_at", "created_by"}, exclude_none=True)
    return [
        name for name, value in given.items() if not _same(found.created.get(name, value), value)
    ]


def _same(stored: str, given: str) -> bool:
    """Return whether both are the same text or the same time."""
    try:
        return stored == given or moment(stored, "stored") == moment(given, "given")
    except ApplicationError:
        return False


_TOO_MANY = (
    f"is left out: at most {EXTRAS_AT_MOST} unknown fields are kept, with names of up to "
    "64 characters"
)


def _never(fixed: Sequence[str]) -> str:
    return f"payload.{', payload.'.join(fixed)}: never changes; it is left out"


def _writes(
    write: ContextWrite,
    asked: Asked,
    fixed: Sequence[str],
    found: Found,
    order: str,
    role_of: Callable[[str], str],
) -> list[Write]:
    """Return the statements that one change writes.

    Raises:
        Refused: the entity does not exist, the change is too old, or a field that a new entity
            requires is missing.
    """
    if found.closed and (asked.operation, asked.entity_type) != ("CREATE", "CASE"):
        raise Refused("a change before this one has deleted the case; create it first")
    _require_there(asked, found)
    known = found.entities.get(asked.entity, Known(live=False))
    row: Row = {"story_id": write.update.story_id, "id": asked.entity_id}
    if asked.operation == "DELETE":
        _require_newer(known.status_order, order, write.at)
        found.entities[asked.entity] = replace(known, live=False, status_order=order)
        match asked.entity_type:
            case "CASE":
                found.closed, found.created = True, {}
            case "PLAN":
                found.plans.pop(asked.entity_id, None)
            case "SUBTASK":
                found.needs.pop(asked.entity_id, None)
        node = {"status": "DELETED", "status_order": order}
        return [Write(DELETE[asked.entity_type], row | {"node": node})]

    assert asked.payload is not None
    given = asked.payload.model_dump(exclude_none=True, exclude=set(fixed))
    if not known.live:
        given = _titled(asked, given)
        lacking = [name for name in asked.payload.NEEDED if name not in given]
        if lacking:
            raise Refused(f"payload.{lacking[0]}: required; add it")
    elif not given and not asked.extras:
        raise Refused(_never(fixed) if fixed else "payload: names nothing to change")
    if plan_id := given.get("plan_id"):
        plan = found.entities.get(("PLAN", plan_id))
        if plan and not plan.live:
            raise Refused(f"payload.plan_id: plan {plan_id} is deleted; create it first")
    if asked.entity_id in given.get("depends_on", []):
        raise Refused("payload.depends_on: a subtask cannot wait for itself")
    if asked.entity_id in _waits_for(given.get("depends_on", []), found.needs):
        raise Refused("payload.depends_on: closes a ring of subtasks that wait for each other")
    if "role" in given:
        given["role"] = role_of(given["role"])

    if not known.live:
        given = dict.fromkeys(known.extras) | _begun(write, asked, found) | given
    if given.get("decided_by") or given.get("actor"):
        given["recorded_by"] = write.update.actor
    orders: Row = {}
    if "status" in given:
        _require_newer(known.status_order, order, write.at)
        orders["status_order"] = order
    given |= asked.extras
    if given.keys() - {"status"}:
        _require_newer(known.text_order, order, write.at)
        orders["text_order"] = order
    before = _named_plan(write, plan_id, found) if plan_id else []
    made = _ENTITY[asked.entity_type](asked, found, given, row | {"fresh": not known.live})
    made[0].row["node"].update(orders)
    extras = tuple(dict.fromkeys((*known.extras, *asked.extras)))
    found.entities[asked.entity] = replace(known, live=True, extras=extras, **orders)
    return before + made


def _require_there(asked: Asked, found: Found) -> None:
    """Refuse a change of a missing entity; UPDATE may create a plan, subtask or decision.

    UPDATE does not restore a deleted entity.
    """
    known = found.entities.get(asked.entity)
    if asked.operation == "CREATE" or (known and known.live):
        return
    if known and asked.operation == "UPDATE":
        raise Refused(f"{asked.entity_type} {asked.entity_id} is deleted; create it first")
    if asked.operation == "UPDATE" and asked.entity_type in ("PLAN", "SUBTASK", "DECISION"):
        return
    raise Refused(f"this story has no {asked.entity_type} {asked.entity_id}")


def _titled(asked: Asked, given: Row) -> Row:
    """Add a title to a new decision without one: its rationale's first line; for UPDATE, its id."""
    if asked.entity_type != "DECISION" or given.get("title"):
        return given
    first_line = next(iter(given.get("rationale", "").strip().splitlines()), "")[:300].strip()
    title = first_line or (asked.entity_id if asked.operation == "UPDATE" else "")
    return given | {"title": title} if title else given


def _named_plan(write: ContextWrite, plan_id: str, found: Found) -> list[Write]:
    """Create the plan that a subtask names, if it does not exist yet."""
    if ("PLAN", plan_id) in found.entities:
        return []
    version = max(found.plans.values(), default=0) + 1
    found.plans[plan_id] = version
    found.entities["PLAN", plan_id] = Known(live=True)
    node = {"status": "DRAFT", "version": version}
    return [Write(PLAN_CHANGED, {"story_id": write.update.story_id, "id": plan_id, "node": node})]


def _begun(write: ContextWrite, asked: Asked, found: Found) -> Row:
    """Return the defaults of a new entity; None removes what a deleted entity left behind."""
    begun: Row = dict.fromkeys(PAYLOADS[asked.entity_type].model_fields)
    match asked.entity_type:
        case "CASE":
            begun |= {"status": "DRAFT", "revision": None}
            begun |= {"created_at": write.at, "created_by": write.update.actor}
        case "PLAN":
            begun |= {"status": "DRAFT", "version": max(found.plans.values(), default=0) + 1}
        case "SUBTASK":
            begun |= {"status": "PENDING", "plan_id": found.last_plan, "depends_on": []}
        case "DECISION":
            begun |= {"status": "ACCEPTED", "type": "CONTEXT", "role": "", "rationale": ""}
            begun |= {"affects": [], "decided_by": write.update.actor, "decided_at": write.at}
        case "MILESTONE":
            begun |= {"status": "REACHED", "description": "", "actor": write.update.actor}
            at_ms = int(moment(write.at, "timestamp").timestamp() * 1000)
            begun |= {"timestamp_ms": at_ms, "entry_id": None}
    return begun


def _waits_for(needed: Sequence[str], needs: dict[str, list[str]]) -> set[str]:
    """Return all direct and indirect dependencies of these subtasks, themselves included."""
    found: set[str] = set()
    left = list(needed)
    while left:
        subtask = left.pop()
        if subtask not in found:
            found.add(subtask)
            left += needs.get(subtask, [])
    return found


def _require_newer(stored: str, order: str, at: str) -> None:
    if order <= stored:
        raise Refused(f"what is stored is newer than {at}; it is kept")


def _case(asked: Asked, found: Found, given: Row, row: Row) -> list[Write]:
    found.closed = False
    found.created |= {name: given[name] for name in ("created_at", "created_by") if name in given}
    return [Write(CASE, row | {"node": given})]


def _plan(asked: Asked, found: Found, given: Row, row: Row) -> list[Write]:
    found.plans[asked.entity_id] = given.get("version", found.plans.get(asked.entity_id, 0))
    return [Write(PLAN_CHANGED, row | {"node": given})]


def _subtask(asked: Asked, found: Found, given: Row, row: Row) -> list[Write]:
    plan_id, needs = given.pop("plan_id", ""), given.pop("depends_on", None)
    if needs is not None:
        found.needs[asked.entity_id] = needs
    row = row | {"node": given, "plan_id": plan_id, "needs": needs}
    links = {"story_id": row["story_id"], "ids": [asked.entity_id]}
    return [Write(SUBTASK, row), Write(TASK_LINKS, links)]


def _decision(asked: Asked, found: Found, given: Row, row: Row) -> list[Write]:
    row = row | {"node": given, "plan_id": found.last_plan, "relink": "affects" in given}
    links = {"story_id": row["story_id"], "id": asked.entity_id}
    return [Write(DECISION_CHANGED, row), Write(DECISION_LINKS, links)]


def _milestone(asked: Asked, found: Found, given: Row, row: Row) -> list[Write]:
    return [Write(MILESTONE, row | {"node": given})]


_ENTITY: dict[EntityType, Callable[[Asked, Found, Row, Row], list[Write]]] = {
    "CASE": _case,
    "PLAN": _plan,
    "SUBTASK": _subtask,
    "DECISION": _decision,
    "MILESTONE": _milestone,
}


# --- statements -----------------------------------------------------------------------------------

FOUND: LiteralString = (
    "WITH {story_id: $story_id} AS row "
    + STORY
    + """
WITH s
RETURN s {.status, .status_order, .text_order, .context_version, .context_by,
    .created_at, .created_by,
    extras: [key IN keys(s) WHERE key STARTS WITH 'x_']} AS story,
  COLLECT {
    MATCH (s)-[:HAS_PLAN]->(p:PlanVersion) WHERE coalesce(p.status, '') <> 'DELETED'
    RETURN p {.id, version: coalesce(p.version, 0)}
  } AS plans,
  COLLECT {
    MATCH (n:PlanVersion {case_id: $story_id}) WHERE n.id IN $ids.PLAN
    RETURN n {.id, .status, .status_order, .text_order,
      extras: [key IN keys(n) WHERE key STARTS WITH 'x_']}
  } AS plan,
  COLLECT {
    MATCH (n:Subtask {case_id: $story_id})
    WHERE n.id IN $ids.SUBTASK
      AND (EXISTS { (n)<-[:HAS_SUBTASK]-(:PlanVersion) } OR EXISTS { (n)--(s) })
    RETURN n {.id, .status, .status_order, .text_order,
      extras: [key IN keys(n) WHERE key STARTS WITH 'x_']}
  } AS subtask,
  COLLECT {
    MATCH (n:Decision {case_id: $story_id}) WHERE n.id IN $ids.DECISION
    RETURN n {.id, .status, .status_order, .text_order,
      extras: [key IN keys(n) WHERE key STARTS WITH 'x_']}
  } AS decision,
  COLLECT {
    MATCH (n:Event {case_id: $story_id}) WHERE n.id IN $ids.MILESTONE
    RETURN n {.id, .status, .status_order, .text_order,
      extras: [key IN keys(n) WHERE key STARTS WITH 'x_']}
  } AS milestone,
  COLLECT {
    MATCH (t:Subtask {case_id: $story_id})-[:DEPENDS_ON]->(d:Subtask)
    WHERE $linked AND coalesce(t.status, '') <> 'DELETED'
    WITH t.id AS id, collect(d.id) AS needed
    RETURN {id: id, needed: needed}
  } AS needs,
  [update IN COLLECT { MATCH (u:ContextUpdate {id: $update_id}) RETURN u } | properties(update)]
    AS kept
"""
)
"""Takes the story's lock before it reads; a story created here is rolled back if it is refused."""

CASE: LiteralString = """
MATCH (n:Case {id: row.story_id}) SET n += row.node
"""

PLAN_CHANGED: LiteralString = (
    """
MATCH (s:Case {id: row.story_id})
MERGE (p:PlanVersion {case_id: row.story_id, id: row.id})
MERGE (s)-[:HAS_PLAN]->(p)
SET p += row.node, p.plan_id = p.id
WITH s, p
"""
    + TAKE_UNPLANNED
)

SUBTASK: LiteralString = (
    """
MATCH (s:Case {id: row.story_id})
MERGE (n:Subtask {case_id: row.story_id, id: row.id})
SET n += row.node
WITH s, n, row
CALL (n, row) {
  WITH n, row WHERE row.fresh
  MATCH (n)-[old:OF|HAS_SUBTASK|AFFECTS]-()
  DELETE old
}
CALL (s, n, row) {
  WITH s, n, row WHERE row.plan_id = '' AND NOT EXISTS { (n)<-[:HAS_SUBTASK]-(:PlanVersion) }
  MERGE (n)-[:OF]->(s)
}
CALL (n, row) {
  MATCH (p:PlanVersion {case_id: row.story_id, id: row.plan_id})
  MERGE (p)-[:HAS_SUBTASK]->(n)
  SET n.plan_id = p.id
}
CALL (n) {
  WITH n AS t
"""
    + READ_AS_SUBTASK
    + """
}
CALL (n, row) {
  WITH n, row WHERE row.needs IS NOT NULL
  MATCH (n)-[old:DEPENDS_ON]->(d:Subtask) WHERE NOT d.id IN row.needs
  DELETE old
}
CALL (n, row) {
  UNWIND coalesce(row.needs, []) AS needed
"""
    + PLACEHOLDER
    + """
  MERGE (n)-[:DEPENDS_ON]->(d)
}
"""
)

DECISION_CHANGED: LiteralString = (
    """
MATCH (s:Case {id: row.story_id})
MERGE (n:Decision {case_id: row.story_id, id: row.id})
MERGE (n)-[:OF]->(s)
WITH n, row
CALL (n, row) {
  WITH n, row, n {.title, .rationale, .decided_by, .decided_at,
                  order: coalesce(n.text_order, '')} AS kept
  WHERE NOT row.fresh AND (row.node.title <> n.title OR row.node.rationale <> n.rationale)
"""
    + KEEP_REVISION
    + """
}
SET n += row.node, n.approved_by = coalesce(row.node.decided_by, n.approved_by, n.decided_by)
WITH n, row
CALL (n, row) {
  WITH n, row WHERE row.fresh
  MATCH (n)-[old:AFFECTS|DEPENDS_ON|CONTAINS_DECISION|FROM]-()
  DELETE old
}
CALL (n, row) {
  MATCH (p:PlanVersion {case_id: row.story_id, id: row.plan_id})
  WHERE NOT EXISTS { (n)<-[:CONTAINS_DECISION]-(:PlanVersion) }
  MERGE (p)-[:CONTAINS_DECISION]->(n)
}
CALL (n, row) {
  WITH n, row WHERE row.relink
  MATCH (n)-[old:AFFECTS|DEPENDS_ON]->()
  DELETE old
}
"""
)

MILESTONE: LiteralString = """
MATCH (s:Case {id: row.story_id})
MERGE (n:Event {case_id: row.story_id, id: row.id})
MERGE (n)-[:OF]->(s)
SET n += row.node
"""

DELETE: dict[EntityType, LiteralString] = {
    "CASE": "MATCH (n:Case {id: row.story_id}) SET n += row.node",
    "PLAN": "MATCH (n:PlanVersion {case_id: row.story_id, id: row.id}) SET n += row.node",
    "SUBTASK": "MATCH (n:Subtask {case_id: row.story_id, id: row.id}) "
    "SET n += row.node, n.last_status = row.node.status",
    "DECISION": "MATCH (n:Decision {case_id: row.story_id, id: row.id}) SET n += row.node",
    "MILESTONE": "MATCH (n:Event {case_id: row.story_id, id: row.id}) SET n += row.node",
}
"""Soft deletes: the node stays, with status DELETED."""

KEPT: LiteralString = """
MATCH (s:Case {id: row.story_id})
SET s.context_version = row.node.version, s.context_by = row.id
MERGE (n:ContextUpdate {id: row.id}) SET n += row.node
MERGE (n)-[:OF]->(s)
"""
"""The update itself. A retry after the commit finds its answer here, and the next update finds the
update whose event precedes its own."""


# --- in one transaction ---------------------------------------------------------------------------


class Update(NamedTuple):
    """The result of an update: the answer and its writes (none if it was stored before)."""

    answer: ContextAnswer
    writes: list[Write]


async def judge_update(
    tx: AsyncManagedTransaction, write: ContextWrite, role_of: Callable[[str], str]
) -> Update:
    """Validate an update under its story's lock, which the caller's transaction keeps.

    Raises:
        ApplicationError: not retryable: `UnknownStory`, or `RequestReused` if another update
            was stored under its id.
    """
    update = write.update
    read = read_changes(write)
    linked = any(
        isinstance(asked, Asked)
        and isinstance(asked.payload, SubtaskPayload)
        and bool(asked.payload.depends_on)
        for asked in read
    )
    looked = await tx.run(
        FOUND,
        story_id=update.story_id,
        update_id=write.update_id,
        ids=_looked_for(read),
        linked=linked,
    )
    row = await looked.single(strict=True)
    request = request_hash(update)
    if row["kept"]:
        return Update(_as_kept(row["kept"][0], request, read), [])
    found = _found(row.data(), update.story_id)
    if update.if_absent and found.story_live:
        return Update(ContextAnswer(version=found.version, hash=""), [])
    known = found.story_live or (bool(found.plans) and not found.story_deleted)
    judged = judge(write, read, found, role_of)
    if (
        not known
        and not update.changed
        and not any(_makes_story(asked, found) for asked in judged.applied)
    ):
        raise unknown_story(update.story_id, judged.warnings)
    version = found.version + 1
    applied = [asked.number for asked in judged.applied]
    node = {
        "story_id": update.story_id,
        "version": version,
        "hash": content_hash([update.story_id, version, judged.warnings, _content(judged.applied)]),
        "warnings": judged.warnings,
        "applied": applied,
        "changes": [f"{asked}: {asked.reason}".rstrip(": ") for asked in judged.applied],
        "request": request,
        "actor": update.actor,
        "role": update.role,
        "task_id": update.task_id or "",
        "after": found.version_by,
        "changed": update.changed,
        "at": iso(moment(write.at, "timestamp")),
    }
    kept = Write(KEPT, {"story_id": update.story_id, "id": write.update_id, "node": node})
    return Update(_as_kept(node, request, read), [*judged.writes, kept])


def _makes_story(asked: Asked, found: Found) -> bool:
    """Return whether the change creates an unknown story: plans and subtasks do."""
    if asked.entity_type == "CASE":
        return asked.operation == "CREATE"
    return asked.entity_type in ("PLAN", "SUBTASK") and not found.story_deleted


def unknown_story(story_id: str, warnings: Sequence[str] = ()) -> ApplicationError:
    """Return the error for a story that the graph does not have."""
    why = f"; {'; '.join(warnings)}" if warnings else ""
    return application_error(ErrorType.UNKNOWN_STORY, f"case not found: {story_id}{why}")


def _looked_for(read: Read) -> dict[str, list[str]]:
    """Return the ids to look up, by type; includes plans that payloads name."""
    ids: dict[str, set[str]] = {entity_type: set() for entity_type in ENTITY_TYPES}
    for asked in read:
        if isinstance(asked, Asked):
            ids[asked.entity_type].add(asked.entity_id)
            if isinstance(asked.payload, SubtaskPayload) and asked.payload.plan_id:
                ids["PLAN"].add(asked.payload.plan_id)
    return {entity_type: sorted(found) for entity_type, found in ids.items()}


def _found(row: Row, story_id: str) -> Found:
    story = row["story"]
    case = _known(story)
    entities: dict[Entity, Known] = {("CASE", story_id): case}
    for entity_type in ("PLAN", "SUBTASK", "DECISION", "MILESTONE"):
        for node in row[entity_type.lower()]:
            entities[entity_type, node["id"]] = _known(node)
    return Found(
        story_live=case.live,
        story_deleted=story["status"] == "DELETED",
        version=story["context_version"] or 0,
        version_by=story["context_by"] or "",
        plans={plan["id"]: plan["version"] for plan in row["plans"]},
        entities=entities,
        needs={each["id"]: each["needed"] for each in row["needs"]},
        created={name: story[name] for name in ("created_at", "created_by") if story[name]}
        if case.live
        else {},
    )


def _known(node: Row) -> Known:
    return Known(
        live=node["status"] not in NOT_LIVE,
        status_order=node["status_order"] or "",
        text_order=node["text_order"] or "",
        extras=node["extras"],
    )


def _content(applied: Sequence[Asked]) -> list[Any]:
    return [
        [
            str(asked),
            (asked.payload.model_dump(exclude_none=True) | asked.extras) if asked.payload else None,
        ]
        for asked in applied
    ]


def _as_news(asked: Asked, actor: str) -> DecisionAdded | None:
    """Return the decision as running agents receive it; None for a new one without a title.

    A correction without a title carries the id instead, so that the known title stays.
    """
    if asked.operation == "DELETE":
        return DecisionAdded(
            decision_id=asked.entity_id, title=asked.entity_id, decided_by=actor, withdrawn=True
        )
    if not isinstance(asked.payload, DecisionPayload):
        return None
    title = asked.payload.title
    if asked.operation == "CREATE":
        title = _titled(asked, asked.payload.model_dump(exclude_none=True)).get("title")
        if not title:
            return None
    return DecisionAdded(
        decision_id=asked.entity_id,
        title=title or asked.entity_id,
        rationale=asked.payload.rationale or "",
        decided_by=asked.payload.decided_by or actor,
    )


def _as_kept(node: Row, request: str, read: Read) -> ContextAnswer:
    if node["request"] != request:
        raise application_error(
            ErrorType.REQUEST_REUSED,
            "another update was sent with this x-request-id; send this one with its own",
        )
    applied = [asked for number in node["applied"] if isinstance(asked := read[number], Asked)]
    made = [asked for asked in applied if asked.operation == "CREATE"]
    return ContextAnswer(
        version=node["version"],
        hash=node["hash"],
        warnings=node["warnings"],
        changed=list(
            dict.fromkeys((*(asked.entity_type for asked in applied), *node.get("changed", [])))
        ),
        after=node.get("after", ""),
        decisions=[
            decision
            for asked in applied
            if asked.entity_type == "DECISION" and (decision := _as_news(asked, node["actor"]))
        ],
        milestones=[
            MilestoneReached(
                milestone_id=asked.entity_id,
                event_type=asked.payload.event_type,
                description=asked.payload.description or "",
            )
            for asked in made
            if isinstance(asked.payload, MilestonePayload) and asked.payload.event_type
        ],
    )
