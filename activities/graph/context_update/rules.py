"""The rules for a change: it is read, and compared with what the graph has. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel
from pydantic_core import from_json
from temporalio.exceptions import ApplicationError

from activities.graph.changes import Row, Write, order_key, parse_timestamp
from activities.graph.context_update.cypher import (
    CASE,
    DECISION_CHANGED,
    DELETE,
    MILESTONE,
    PLAN_CHANGED,
    SUBTASK,
)
from activities.graph.context_update.payloads import (
    ENTITY_TYPES,
    EXTRAS_AT_MOST,
    NAMES,
    OPERATIONS,
    PAYLOAD_CHARACTERS,
    PAYLOADS,
    WARNING_CHARACTERS,
    CasePayload,
    Entity,
    EntityType,
    Operation,
    Payload,
    extra_properties,
)
from activities.graph.decisions import DECISION_LINKS, TASK_LINKS
from workflows.models.context import ContextChange, ContextUpdate, ContextWrite
from workflows.models.errors import ErrorType, application_error, invalid_input
from workflows.models.ids import LongId
from workflows.timestamps import format_timestamp

# --- reading a change -----------------------------------------------------------------------------

_ENTITY_ID: TypeAdapter[str] = TypeAdapter(LongId)


class RejectedChange(ValueError):
    """The reason why a change is not stored.

    Attributes:
        problems: each wrong field of the payload with its rule, if it is the fields that are wrong.
    """

    def __init__(self, why: str, problems: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(why)
        self.problems = problems


@dataclass(frozen=True)
class ParsedChange:
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


def read_change(number: int, change: ContextChange, story_id: str, now: datetime) -> ParsedChange:
    """Parse a change.

    Raises:
        Refused: the operation or type is unknown, the id is invalid, or the payload breaks a rule
            or is about another entity.
    """
    operation = change.operation.strip().upper()
    entity_type = change.entity_type.strip().upper()
    if operation not in OPERATIONS:
        raise RejectedChange(f"operation: {operation[:40]!r} is not one of {', '.join(OPERATIONS)}")
    if entity_type not in ENTITY_TYPES:
        raise RejectedChange(
            f"entity_type: {entity_type[:40]!r} is not one of {', '.join(ENTITY_TYPES)}"
        )
    entity_id = change.entity_id or (story_id if entity_type == "CASE" else "")
    try:
        _ENTITY_ID.validate_python(entity_id)
    except ValidationError as error:
        raise RejectedChange(f"entity_id: {entity_id[:60]!r}: {error.errors()[0]['msg']}") from None
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
        return ParsedChange(number, operation, entity_type, entity_id, None, reason)
    payload, others = _payload(PAYLOADS[entity_type], others, now)
    extras, left_out = extra_properties(others)
    return ParsedChange(
        number, operation, entity_type, entity_id, payload, reason, extras, left_out
    )


def _payload_fields(text: str) -> Row:
    """Parse the payload as a JSON object; an empty text has no fields."""
    if len(text) > PAYLOAD_CHARACTERS:
        raise RejectedChange(f"payload: more than {PAYLOAD_CHARACTERS} characters; shorten it")
    try:
        fields = from_json(text, allow_inf_nan=False) if text.strip() else {}
    except ValueError as error:
        raise RejectedChange(f"payload: is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise RejectedChange("payload: is JSON, but not an object")
    if null := [name for name, value in fields.items() if _has_null_character([name, value])]:
        raise RejectedChange(
            "payload: a text contains U+0000; remove it",
            [(name, "contains U+0000; remove it") for name in null],
        )
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
                raise RejectedChange(
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
            raise RejectedChange(f"payload.{name}: is given under two names, with different values")
    for name, instead in kind.INSTEAD.items():
        for given in instead:
            found = next((each for each in (given, to_camel(given)) if each in others), None)
            if found and ours.get(name) in (None, ""):
                ours[name] = others.pop(found)
    try:
        return kind.model_validate(ours, context={"now": now}), others
    except ValidationError as error:
        refused = invalid_input("payload", error)
        raise RejectedChange(refused.message, refused.problems) from None


# --- validation against the graph -----------------------------------------------------------------


@dataclass(frozen=True)
class EntityState:
    """The state of an entity: as stored, or as earlier changes of the update left it."""

    live: bool
    status_order: str = ""
    text_order: str = ""
    extras: Sequence[str] = ()
    """Names of the properties that hold unknown fields."""
    status: str = ""
    name: str = ""
    """Who decided a decision, or reached a milestone."""


@dataclass
class StorySnapshot:
    """The stored state of a story, read under its lock."""

    story_live: bool
    story_deleted: bool = False
    version: int = 0
    version_by: str = ""
    """Workflow id of the update that created this version."""
    plans: dict[str, int] = field(default_factory=dict)
    """Plan id -> version, for plans that are not deleted."""
    entities: dict[Entity, EntityState] = field(default_factory=dict)
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
class JudgedChanges:
    """The stored and the refused changes. A change that is stored in part also has a warning."""

    writes: list[Write] = field(default_factory=list)
    applied: list[ParsedChange] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


ParsedChanges = Sequence[ParsedChange | RejectedChange]


def read_changes(write: ContextWrite) -> list[ParsedChange | RejectedChange]:
    """Parse every change; return a `RejectedChange` for each one that is invalid."""
    found: list[ParsedChange | RejectedChange] = []
    now = datetime.fromtimestamp(write.started_ms / 1000, UTC)
    for number, change in enumerate(write.update.changes):
        try:
            found.append(read_change(number, change, write.update.story_id, now))
        except RejectedChange as refusal:
            found.append(refusal)
        except Exception as error:  # any error refuses the change  # noqa: BLE001
            # A change that cannot be parsed now never can be: a retry would fail the same way.
            found.append(
                RejectedChange(f"cannot be read ({type(error).__name__}); write it otherwise")
            )
    return found


def judge(
    write: ContextWrite,
    read: ParsedChanges,
    found: StorySnapshot,
    role_of: Callable[[str], str] = str.upper,
) -> JudgedChanges:
    """Decide which changes are stored and what is written for them; update `found` accordingly."""
    judged = JudgedChanges()
    at = parse_timestamp(write.at, "timestamp")
    write = write.model_copy(update={"at": format_timestamp(at)})
    for number, parsed in enumerate(read):
        change = write.update.changes[number]
        try:
            if isinstance(parsed, RejectedChange):
                raise parsed
            fixed = _fixed(parsed, found)
            order = order_key(at, write.started_ms, number)
            judged.writes += _writes(write, parsed, fixed, found, order, role_of)
        except RejectedChange as refusal:
            judged.warnings.append(_warning(number, change, str(refusal)))
        else:
            judged.applied.append(parsed)
            left_out = [_never(fixed)] if fixed else []
            if parsed.left_out:
                left_out.append(f"payload.{', payload.'.join(parsed.left_out)}: {_TOO_MANY}")
            if left_out:
                judged.warnings.append(_warning(number, change, "; ".join(left_out)))
    return judged


def _warning(number: int, change: ContextChange, why: str) -> str:
    named = " ".join((change.operation[:20], change.entity_type[:20], change.entity_id))
    words = f"change {number} ({named[:120]}): {why}"
    return " ".join(words.split())[:WARNING_CHARACTERS]


def _fixed(parsed: ParsedChange, found: StorySnapshot) -> list[str]:
    """Return the immutable fields of the case for which the change has another value."""
    if not isinstance(parsed.payload, CasePayload) or not found.created:
        return []
    given = parsed.payload.model_dump(include={"created_at", "created_by"}, exclude_none=True)
    return [
        name for name, value in given.items() if not _same(found.created.get(name, value), value)
    ]


def _same(stored: str, given: str) -> bool:
    """Return whether both are the same text or the same time."""
    try:
        return stored == given or parse_timestamp(stored, "stored") == parse_timestamp(
            given, "given"
        )
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
    parsed: ParsedChange,
    fixed: Sequence[str],
    found: StorySnapshot,
    order: str,
    role_of: Callable[[str], str],
) -> list[Write]:
    """Return the statements that one change writes.

    Raises:
        Refused: the entity does not exist, the change is too old, or a field that a new entity
            requires is missing.
    """
    if found.closed and (parsed.operation, parsed.entity_type) != ("CREATE", "CASE"):
        raise RejectedChange("a change before this one has deleted the case; create it first")
    _require_there(parsed, found)
    known = found.entities.get(parsed.entity, EntityState(live=False))
    _require_stored_role(write.update, parsed, known)
    row: Row = {"story_id": write.update.story_id, "id": parsed.entity_id}
    if parsed.operation == "DELETE":
        _require_newer(known.status_order, order, write.at)
        found.entities[parsed.entity] = replace(known, live=False, status_order=order)
        match parsed.entity_type:
            case "CASE":
                found.closed, found.created = True, {}
            case "PLAN":
                found.plans.pop(parsed.entity_id, None)
            case "SUBTASK":
                found.needs.pop(parsed.entity_id, None)
        node = {"status": "DELETED", "status_order": order}
        return [Write(DELETE[parsed.entity_type], row | {"node": node})]

    assert parsed.payload is not None
    given = parsed.payload.model_dump(exclude_none=True, exclude=set(fixed))
    if not known.live:
        given = titled(parsed, given)
        lacking = [name for name in parsed.payload.NEEDED if name not in given]
        if lacking:
            raise RejectedChange(f"payload.{lacking[0]}: required; add it")
    elif not given and not parsed.extras:
        raise RejectedChange(_never(fixed) if fixed else "payload: names nothing to change")
    if plan_id := given.get("plan_id"):
        plan = found.entities.get(("PLAN", plan_id))
        if plan and not plan.live:
            raise RejectedChange(f"payload.plan_id: plan {plan_id} is deleted; create it first")
    if parsed.entity_id in given.get("depends_on", []):
        raise RejectedChange("payload.depends_on: a subtask cannot wait for itself")
    if parsed.entity_id in _waits_for(given.get("depends_on", []), found.needs):
        raise RejectedChange(
            "payload.depends_on: closes a ring of subtasks that wait for each other"
        )
    if "role" in given:
        given["role"] = role_of(given["role"])

    if not known.live:
        given = dict.fromkeys(known.extras) | _begun(write, parsed, found) | given
    name = given.get("decided_by") or given.get("actor") or ""
    if name or known.name not in ("", write.update.actor):
        given["recorded_by"] = write.update.actor
    orders: Row = {}
    if "status" in given:
        _require_newer(known.status_order, order, write.at)
        orders["status_order"] = order
    given |= parsed.extras
    if given.keys() - {"status"}:
        _require_newer(known.text_order, order, write.at)
        orders["text_order"] = order
    before = _named_plan(write, plan_id, found) if plan_id else []
    made = _ENTITY[parsed.entity_type](parsed, found, given, row | {"fresh": not known.live})
    made[0].row["node"].update(orders)
    extras = tuple(dict.fromkeys((*known.extras, *parsed.extras)))
    found.entities[parsed.entity] = replace(
        known,
        live=True,
        extras=extras,
        status=given.get("status", known.status),
        name=name or known.name,
        **orders,
    )
    return before + made


def _require_there(parsed: ParsedChange, found: StorySnapshot) -> None:
    """Refuse a change of a missing entity; UPDATE may create a plan, subtask or decision.

    UPDATE does not restore a deleted entity.
    """
    known = found.entities.get(parsed.entity)
    if parsed.operation == "CREATE" or (known and known.live):
        return
    if known and parsed.operation == "UPDATE":
        raise RejectedChange(f"{parsed.entity_type} {parsed.entity_id} is deleted; create it first")
    if parsed.operation == "UPDATE" and parsed.entity_type in ("PLAN", "SUBTASK", "DECISION"):
        return
    raise RejectedChange(f"this story has no {parsed.entity_type} {parsed.entity_id}")


def _require_stored_role(update: ContextUpdate, parsed: ParsedChange, known: EntityState) -> None:
    """Refuse a change of what is stored in another's name, or of an approved plan.

    The roles of the request's own fields were checked before; these depend on what is stored, so
    they are checked under the story's lock.

    Raises:
        ApplicationError: `Permission`: the whole update is refused.
    """
    if update.roles is None or not known.live or parsed.operation == "DELETE":
        return
    payload = parsed.payload
    named = getattr(payload, "decided_by", None) or getattr(payload, "actor", None)
    needed = ""
    if known.name not in ("", update.actor) and not named:
        needed, why = "OPERATOR", f"for it is in the name of {known.name[:60]}; or name yourself"
    if parsed.entity_type == "PLAN" and known.status not in ("", "DRAFT"):
        needed, why = "PO", f"for the plan is {known.status}"
    if needed and needed not in update.roles:
        has = ", ".join(sorted(update.roles)) or "none"
        raise application_error(
            ErrorType.PERMISSION,
            f"change {parsed.number} ({parsed}) needs the role {needed}, {why}; the token of "
            f"{update.actor} has {has}",
        )


def titled(parsed: ParsedChange, given: Row) -> Row:
    """Add a title to a new decision without one: its rationale's first line; for UPDATE, its id."""
    if parsed.entity_type != "DECISION" or given.get("title"):
        return given
    first_line = next(iter(given.get("rationale", "").strip().splitlines()), "")[:300].strip()
    title = first_line or (parsed.entity_id if parsed.operation == "UPDATE" else "")
    return given | {"title": title} if title else given


def _named_plan(write: ContextWrite, plan_id: str, found: StorySnapshot) -> list[Write]:
    """Create the plan that a subtask names, if it does not exist yet."""
    if ("PLAN", plan_id) in found.entities:
        return []
    version = max(found.plans.values(), default=0) + 1
    found.plans[plan_id] = version
    found.entities["PLAN", plan_id] = EntityState(live=True)
    node = {"status": "DRAFT", "version": version}
    return [Write(PLAN_CHANGED, {"story_id": write.update.story_id, "id": plan_id, "node": node})]


def _begun(write: ContextWrite, parsed: ParsedChange, found: StorySnapshot) -> Row:
    """Return the defaults of a new entity; None removes what a deleted entity left behind."""
    begun: Row = dict.fromkeys(PAYLOADS[parsed.entity_type].model_fields)
    match parsed.entity_type:
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
            at_ms = int(parse_timestamp(write.at, "timestamp").timestamp() * 1000)
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
        raise RejectedChange(f"what is stored is newer than {at}; it is kept")


def _case(parsed: ParsedChange, found: StorySnapshot, given: Row, row: Row) -> list[Write]:
    found.closed = False
    found.created |= {name: given[name] for name in ("created_at", "created_by") if name in given}
    return [Write(CASE, row | {"node": given})]


def _plan(parsed: ParsedChange, found: StorySnapshot, given: Row, row: Row) -> list[Write]:
    found.plans[parsed.entity_id] = given.get("version", found.plans.get(parsed.entity_id, 0))
    return [Write(PLAN_CHANGED, row | {"node": given})]


def _subtask(parsed: ParsedChange, found: StorySnapshot, given: Row, row: Row) -> list[Write]:
    plan_id, needs = given.pop("plan_id", ""), given.pop("depends_on", None)
    if needs is not None:
        found.needs[parsed.entity_id] = needs
    row = row | {"node": given, "plan_id": plan_id, "needs": needs}
    links = {"story_id": row["story_id"], "ids": [parsed.entity_id]}
    return [Write(SUBTASK, row), Write(TASK_LINKS, links)]


def _decision(parsed: ParsedChange, found: StorySnapshot, given: Row, row: Row) -> list[Write]:
    row = row | {"node": given, "plan_id": found.last_plan, "relink": "affects" in given}
    links = {"story_id": row["story_id"], "id": parsed.entity_id}
    return [Write(DECISION_CHANGED, row), Write(DECISION_LINKS, links)]


def _milestone(parsed: ParsedChange, found: StorySnapshot, given: Row, row: Row) -> list[Write]:
    return [Write(MILESTONE, row | {"node": given})]


_ENTITY: dict[EntityType, Callable[[ParsedChange, StorySnapshot, Row, Row], list[Write]]] = {
    "CASE": _case,
    "PLAN": _plan,
    "SUBTASK": _subtask,
    "DECISION": _decision,
    "MILESTONE": _milestone,
}
