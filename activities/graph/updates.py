"""An update of a story's context: each change is judged by itself, all are stored as one.

A change that breaks a rule is refused with one warning, and the others are stored. What a payload
lacks is left as it is; nothing is invented for it. An older change never replaces what is newer:
every text and status carries the order key of `statements`, and the story's lock is held from
before the first comparison to the commit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, LiteralString, NamedTuple, get_args

from neo4j import AsyncManagedTransaction
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from temporalio.exceptions import ApplicationError

from activities.graph.statements import (
    DECISION_LINKS,
    TASK_LINKS,
    Row,
    Write,
    moment,
    order_key,
)
from workflows.models import (
    REQUEST_REUSED,
    UNKNOWN_STORY,
    Actor,
    ContextAnswer,
    ContextChange,
    ContextWrite,
    DecisionAdded,
    Line,
    LongId,
    MilestoneReached,
    Rigor,
    Title,
    content_hash,
    invalid_input,
)

PAYLOAD_BYTES = 64 * 1024
WARNING_CHARACTERS = 300
NOT_LIVE = ("UNKNOWN", "DELETED")
"""Statuses of a node that stands for nothing: not known yet, or no more."""

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


def _iso(text: str) -> str:
    try:
        moment(text, "time")
    except ApplicationError as error:
        raise ValueError(error.message) from None
    return text


Word = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True, to_upper=True, pattern=r"^[A-Za-z][A-Za-z0-9_]{0,31}$"
    ),
]
Status = Annotated[Word, AfterValidator(_live)]
Text = Annotated[str, StringConstraints(max_length=20_000)]
Time = Annotated[str, StringConstraints(max_length=100), AfterValidator(_iso)]


class Payload(BaseModel):
    """What a change says of its entity. Fields that are not ours are other people's: left out."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    NEEDED: ClassVar[tuple[str, ...]] = ()
    """What an entity cannot be made without."""

    ALSO: ClassVar[dict[str, str]] = {}
    """Names that others use for our fields."""

    @model_validator(mode="before")
    @classmethod
    def _by_our_names(cls, told: Any) -> Any:
        if not isinstance(told, dict):
            return told
        return {cls.ALSO.get(name, name): value for name, value in told.items()}


class CasePayload(Payload):
    """The story's text and status."""

    NEEDED = ("title",)
    ALSO = {"brief": "description"}

    title: Title | None = None
    description: Text | None = None
    acceptance_criteria: list[Line] | None = Field(None, max_length=100)
    rigor: Rigor | None = None
    status: Status | None = None
    created_by: Actor | None = None
    created_at: Time | None = None


class PlanPayload(Payload):
    """A plan; a new one without a version is the story's next."""

    version: int | None = Field(None, ge=1, le=1_000_000)
    status: Status | None = None


class SubtaskPayload(Payload):
    """A task of `plan_id`, or of the story's last plan."""

    ALSO = {"dependencies": "depends_on"}

    title: Title | None = None
    description: Text | None = None
    role: Word | None = None
    status: Status | None = None
    priority: int | None = Field(None, ge=0, le=1_000_000)
    assignee: Actor | None = None
    plan_id: LongId | None = None
    depends_on: list[LongId] | None = Field(None, max_length=100)


class DecisionPayload(Payload):
    """A decision. affects: ids or titles of the subtasks and decisions that it touches."""

    NEEDED = ("title",)

    title: Title | None = None
    rationale: Text | None = None
    type: Word | None = None
    status: Status | None = None
    role: Word | None = None
    decided_by: Actor | None = None
    decided_at: Time | None = None
    affects: list[Line] | None = Field(None, max_length=100)


class MilestonePayload(Payload):
    """Something that happened."""

    NEEDED = ("event_type",)
    ALSO = {"ts_ms": "timestamp_ms"}

    event_type: Annotated[Line, StringConstraints(max_length=200)] | None = None
    description: Annotated[str, StringConstraints(max_length=2_000)] | None = None
    actor: Actor | None = None
    timestamp_ms: int | None = Field(None, ge=0, le=10**14)


PAYLOADS: dict[EntityType, type[Payload]] = {
    "CASE": CasePayload,
    "PLAN": PlanPayload,
    "SUBTASK": SubtaskPayload,
    "DECISION": DecisionPayload,
    "MILESTONE": MilestonePayload,
}


# --- reading a change -----------------------------------------------------------------------------

_ENTITY_ID: TypeAdapter[str] = TypeAdapter(LongId)


class Refused(ValueError):
    """Why a change is not stored."""


@dataclass(frozen=True)
class Asked:
    """A change that can be read. `number`: its place in the request. DELETE has no payload."""

    number: int
    operation: Operation
    entity_type: EntityType
    entity_id: str
    payload: Payload | None
    reason: str

    @property
    def entity(self) -> Entity:
        """What it is about."""
        return self.entity_type, self.entity_id

    def __str__(self) -> str:
        return f"{self.operation} {self.entity_type} {self.entity_id}"


def read_change(number: int, change: ContextChange, story_id: str) -> Asked:
    """The change, understood.

    Raises:
        Refused: an unknown operation or type, an id that is none, a payload that breaks a rule.
    """
    operation = change.operation.strip().upper()
    entity_type = change.entity_type.strip().upper()
    if operation not in OPERATIONS:
        raise Refused(f"operation: {operation[:40]!r} is none of {', '.join(OPERATIONS)}")
    if entity_type not in ENTITY_TYPES:
        raise Refused(f"entity_type: {entity_type[:40]!r} is none of {', '.join(ENTITY_TYPES)}")
    entity_id = change.entity_id
    if entity_type == "CASE":
        if entity_id not in ("", story_id):
            raise Refused(f"entity_id: {entity_id[:60]!r} is another case; this one is {story_id}")
        entity_id = story_id
    try:
        _ENTITY_ID.validate_python(entity_id)
    except ValidationError as error:
        raise Refused(f"entity_id: {entity_id[:60]!r}: {error.errors()[0]['msg']}") from None
    if len(change.payload.encode()) > PAYLOAD_BYTES:
        raise Refused(f"payload: more than {PAYLOAD_BYTES} bytes; shorten it")
    payload: Payload | None = None
    if operation != "DELETE":
        payload = _payload(PAYLOADS[entity_type], change.payload)
    elif change.payload.strip():
        _payload(Payload, change.payload)
    return Asked(number, operation, entity_type, entity_id, payload, change.reason.strip()[:500])


def _payload(kind: type[Payload], text: str) -> Payload:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise Refused(invalid_input("payload", error).message) from None


# --- judging them against the graph ---------------------------------------------------------------


@dataclass
class Known:
    """An entity as the graph has it, or as the changes before have left it."""

    live: bool
    status_order: str = ""
    text_order: str = ""


@dataclass
class Found:
    """What the graph has of a story, under its lock."""

    story_live: bool
    version: int = 0
    plans: dict[str, int] = field(default_factory=dict)
    """The versions of the plans that are not deleted."""
    entities: dict[Entity, Known] = field(default_factory=dict)

    @property
    def last_plan(self) -> str:
        """The newest plan's id, or empty."""
        return max(self.plans, key=lambda plan: (self.plans[plan], plan), default="")


@dataclass
class Judged:
    """What is stored and what is refused."""

    writes: list[Write] = field(default_factory=list)
    applied: list[Asked] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


Read = Sequence[Asked | Refused]


def read_changes(changes: Sequence[ContextChange], story_id: str) -> list[Asked | Refused]:
    """Every change, understood or refused."""
    found: list[Asked | Refused] = []
    for number, change in enumerate(changes):
        try:
            found.append(read_change(number, change, story_id))
        except Refused as refusal:
            found.append(refusal)
    return found


def judge(
    write: ContextWrite, read: Read, found: Found, role_of: Callable[[str], str] = str.upper
) -> Judged:
    """Which changes are stored, and what is written for them. `found` is left as they leave it."""
    judged = Judged()
    at = moment(write.at, "timestamp")
    for number, asked in enumerate(read):
        change = write.update.changes[number]
        try:
            if isinstance(asked, Refused):
                raise asked
            order = order_key(at, write.started_ms, number)
            judged.writes += _writes(write, asked, found, order, role_of)
        except Refused as refusal:
            named = " ".join((change.operation[:20], change.entity_type[:20], change.entity_id))
            words = f"change {number} ({named[:120]}): {refusal}"
            judged.warnings.append(" ".join(words.split())[:WARNING_CHARACTERS])
        else:
            judged.applied.append(asked)
    return judged


def _writes(
    write: ContextWrite, asked: Asked, found: Found, order: str, role_of: Callable[[str], str]
) -> list[Write]:
    """What one change writes.

    Raises:
        Refused: it is about what is not there, is too old, or lacks what a new one needs.
    """
    known = found.entities.setdefault(asked.entity, Known(live=False))
    if asked.operation != "CREATE" and not known.live:
        raise Refused(f"this story has no {asked.entity_type} {asked.entity_id}")
    row: Row = {"story_id": write.update.story_id, "id": asked.entity_id}
    if asked.operation == "DELETE":
        _require_newer(known.status_order, order, write.at)
        known.live, known.status_order = False, order
        if asked.entity_type == "PLAN":
            found.plans.pop(asked.entity_id, None)
        node = {"status": "DELETED", "status_order": order}
        return [Write(DELETE[asked.entity_type], row | {"node": node})]

    assert asked.payload is not None
    given = asked.payload.model_dump(exclude_none=True)
    if not known.live:
        lacking = [name for name in asked.payload.NEEDED if name not in given]
        if lacking:
            raise Refused(f"payload.{lacking[0]}: required; add it")
    elif not given:
        raise Refused("payload: names nothing to change")
    if plan_id := given.get("plan_id"):
        plan = found.entities.get(("PLAN", plan_id))
        if plan is None or not plan.live:
            raise Refused(f"payload.plan_id: this story has no plan {plan_id}")
    if asked.entity_id in given.get("depends_on", []):
        raise Refused("payload.depends_on: a subtask cannot wait for itself")
    if "role" in given:
        given["role"] = role_of(given["role"])

    if "status" in given or not known.live:
        _require_newer(known.status_order, order, write.at)
    if given.keys() - {"status"}:
        _require_newer(known.text_order, order, write.at)
    made = _ENTITY[asked.entity_type](write, asked, found, known, given, row)
    node = made[0].row["node"]
    if "status" in node:
        node["status_order"] = known.status_order = order
    if given.keys() - {"status"}:
        node["text_order"] = known.text_order = order
    known.live = True
    return made


def _require_newer(stored: str, order: str, at: str) -> None:
    if order <= stored:
        raise Refused(f"what is stored is newer than {at}; it is kept")


def _case(
    write: ContextWrite, asked: Asked, found: Found, known: Known, given: Row, row: Row
) -> list[Write]:
    if not known.live:
        given.setdefault("status", "DRAFT")
    begun = {
        "created_at": given.pop("created_at", write.at),
        "created_by": given.pop("created_by", write.update.actor),
    }
    return [Write(CASE, row | {"node": given, "begun": begun})]


def _plan(
    write: ContextWrite, asked: Asked, found: Found, known: Known, given: Row, row: Row
) -> list[Write]:
    if not known.live:
        given.setdefault("status", "DRAFT")
        given.setdefault("version", max(found.plans.values(), default=0) + 1)
    found.plans[asked.entity_id] = given.get("version", found.plans.get(asked.entity_id, 0))
    return [Write(PLAN_CHANGED, row | {"node": given})]


def _subtask(
    write: ContextWrite, asked: Asked, found: Found, known: Known, given: Row, row: Row
) -> list[Write]:
    plan_id = given.pop("plan_id", "")
    needs = given.pop("depends_on", None)
    if not known.live:
        given.setdefault("status", "PENDING")
        plan_id = plan_id or found.last_plan
    row = row | {"node": given, "plan_id": plan_id, "needs": needs}
    links = {"story_id": row["story_id"], "ids": [asked.entity_id]}
    return [Write(SUBTASK, row), Write(TASK_LINKS, links)]


def _decision(
    write: ContextWrite, asked: Asked, found: Found, known: Known, given: Row, row: Row
) -> list[Write]:
    if not known.live:
        given.setdefault("status", "ACCEPTED")
    begun = {
        "type": "CONTEXT",
        "role": "",
        "rationale": "",
        "affects": [],
        "decided_by": write.update.actor,
        "decided_at": write.at,
    }
    row = row | {
        "node": given,
        "begun": begun,
        "plan_id": found.last_plan,
        "anew": "affects" in given,
    }
    links = {"story_id": row["story_id"], "id": asked.entity_id}
    return [Write(DECISION_CHANGED, row), Write(DECISION_LINKS, links)]


def _milestone(
    write: ContextWrite, asked: Asked, found: Found, known: Known, given: Row, row: Row
) -> list[Write]:
    begun = {
        "description": "",
        "actor": write.update.actor,
        "timestamp_ms": int(moment(write.at, "timestamp").timestamp() * 1000),
    }
    if not known.live:
        given["status"] = "REACHED"
    return [Write(MILESTONE, row | {"node": given, "begun": begun})]


_ENTITY: dict[EntityType, Callable[[ContextWrite, Asked, Found, Known, Row, Row], list[Write]]] = {
    "CASE": _case,
    "PLAN": _plan,
    "SUBTASK": _subtask,
    "DECISION": _decision,
    "MILESTONE": _milestone,
}


# --- statements -----------------------------------------------------------------------------------

FOUND: LiteralString = """
MERGE (s:Story {id: $story_id}) ON CREATE SET s.status = 'UNKNOWN'
SET s:Case, s.case_id = $story_id
WITH s
RETURN s {.status, .status_order, .text_order, .context_version} AS story,
  COLLECT {
    MATCH (s)-[:HAS_PLAN]->(p:PlanVersion) WHERE p.status <> 'DELETED'
    RETURN p {.id, version: coalesce(p.version, 0)}
  } AS plans,
  COLLECT {
    MATCH (n:PlanVersion {case_id: $story_id}) WHERE n.id IN $ids.PLAN
    RETURN n {.id, .status, .status_order, .text_order}
  } AS plan,
  COLLECT {
    MATCH (n:Subtask {case_id: $story_id})
    WHERE n.id IN $ids.SUBTASK
      AND (EXISTS { (n)<-[:HAS_SUBTASK]-(:PlanVersion) } OR EXISTS { (n)-[:OF]->(s) })
    RETURN n {.id, .status, .status_order, .text_order}
  } AS subtask,
  COLLECT {
    MATCH (n:Decision {case_id: $story_id}) WHERE n.id IN $ids.DECISION
    RETURN n {.id, .status, .status_order, .text_order}
  } AS decision,
  COLLECT {
    MATCH (n:Event {case_id: $story_id}) WHERE n.id IN $ids.MILESTONE
    RETURN n {.id, .status, .status_order, .text_order}
  } AS milestone,
  [update IN COLLECT { MATCH (u:ContextUpdate {id: $update_id}) RETURN u } | properties(update)]
    AS kept
"""
"""Takes the story's lock before it looks; a story that is made here and refused is rolled back."""

CASE: LiteralString = """
MATCH (n:Story {id: row.story_id})
SET n.created_at = coalesce(n.created_at, row.begun.created_at),
    n.created_by = coalesce(n.created_by, row.begun.created_by)
SET n += row.node
"""

PLAN_CHANGED: LiteralString = """
MATCH (s:Story {id: row.story_id})
MERGE (n:PlanVersion {case_id: row.story_id, id: row.id})
MERGE (s)-[:HAS_PLAN]->(n)
SET n += row.node
WITH s, n
MATCH (s)<-[:OF]-(t:Subtask) WHERE NOT EXISTS { (t)<-[:HAS_SUBTASK]-(:PlanVersion) }
MERGE (n)-[:HAS_SUBTASK]->(t)
"""
"""Subtasks that came before any plan are the first plan's."""

SUBTASK: LiteralString = """
MATCH (s:Story {id: row.story_id})
MERGE (n:Subtask {case_id: row.story_id, id: row.id})
SET n += row.node
WITH s, n, row
CALL (s, n, row) {
  WITH s, n, row WHERE row.plan_id = '' AND NOT EXISTS { (n)<-[:HAS_SUBTASK]-(:PlanVersion) }
  MERGE (n)-[:OF]->(s)
}
CALL (n, row) {
  MATCH (p:PlanVersion {case_id: row.story_id, id: row.plan_id})
  MERGE (p)-[:HAS_SUBTASK]->(n)
}
CALL (n, row) {
  WITH n, row WHERE row.needs IS NOT NULL
  MATCH (n)-[old:DEPENDS_ON]->(d:Subtask) WHERE NOT d.id IN row.needs
  DELETE old
}
CALL (n, row) {
  UNWIND coalesce(row.needs, []) AS needed
  MERGE (d:Subtask {case_id: row.story_id, id: needed}) ON CREATE SET d.status = 'PENDING'
  MERGE (n)-[:DEPENDS_ON]->(d)
}
"""

DECISION_CHANGED: LiteralString = """
MATCH (s:Story {id: row.story_id})
MERGE (n:Decision {case_id: row.story_id, id: row.id}) ON CREATE SET n += row.begun
MERGE (n)-[:OF]->(s)
SET n += row.node
WITH n, row
CALL (n, row) {
  MATCH (p:PlanVersion {case_id: row.story_id, id: row.plan_id})
  WHERE NOT EXISTS { (n)<-[:CONTAINS_DECISION]-(:PlanVersion) }
  MERGE (p)-[:CONTAINS_DECISION]->(n)
}
CALL (n, row) {
  WITH n, row WHERE row.anew
  MATCH (n)-[old:AFFECTS|DEPENDS_ON]->()
  DELETE old
}
"""

MILESTONE: LiteralString = """
MATCH (s:Story {id: row.story_id})
MERGE (n:Event {case_id: row.story_id, id: row.id}) ON CREATE SET n += row.begun
MERGE (n)-[:OF]->(s)
SET n += row.node
"""

DELETE: dict[EntityType, LiteralString] = {
    "CASE": "MATCH (n:Story {id: row.story_id}) SET n += row.node",
    "PLAN": "MATCH (n:PlanVersion {case_id: row.story_id, id: row.id}) SET n += row.node",
    "SUBTASK": "MATCH (n:Subtask {case_id: row.story_id, id: row.id}) SET n += row.node",
    "DECISION": "MATCH (n:Decision {case_id: row.story_id, id: row.id}) SET n += row.node",
    "MILESTONE": "MATCH (n:Event {case_id: row.story_id, id: row.id}) SET n += row.node",
}
"""Soft: the node stays, with status DELETED."""

KEPT: LiteralString = """
MATCH (s:Story {id: row.story_id}) SET s.context_version = row.node.version
MERGE (n:ContextUpdate {id: row.id}) SET n += row.node
MERGE (n)-[:OF]->(s)
"""
"""The update itself: a retry after the commit finds its answer here."""


# --- in one transaction ---------------------------------------------------------------------------


class Update(NamedTuple):
    """What an update came to: the answer, and what is written for it (nothing, if it was there)."""

    answer: ContextAnswer
    writes: list[Write]


async def judge_update(
    tx: AsyncManagedTransaction, write: ContextWrite, role_of: Callable[[str], str]
) -> Update:
    """Judge an update under its story's lock, which the caller's transaction holds then.

    Raises:
        ApplicationError: not retryable: `UnknownStory`, or `RequestReused` where another update
            was stored under its id.
    """
    update = write.update
    read = read_changes(update.changes, update.story_id)
    looked = await tx.run(
        FOUND, story_id=update.story_id, update_id=write.update_id, ids=_looked_for(read)
    )
    row = await looked.single(strict=True)
    request = content_hash(update.model_dump())
    if row["kept"]:
        return Update(_as_kept(row["kept"][0], request, read), [])
    found = _found(row.data(), update.story_id)
    known = found.story_live
    judged = judge(write, read, found, role_of)
    if not known and all(
        (asked.operation, asked.entity_type) != ("CREATE", "CASE") for asked in judged.applied
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
        "at": write.at,
    }
    kept = Write(KEPT, {"story_id": update.story_id, "id": write.update_id, "node": node})
    return Update(_as_kept(node, request, read), [*judged.writes, kept])


def unknown_story(story_id: str, warnings: Sequence[str] = ()) -> ApplicationError:
    """The graph has no such story."""
    why = f"; {'; '.join(warnings)}" if warnings else ""
    return ApplicationError(
        f"case not found: {story_id}{why}"[:2_000], type=UNKNOWN_STORY, non_retryable=True
    )


def _looked_for(read: Read) -> dict[str, list[str]]:
    """Ids to look for, by type; plans are also looked for where a payload names one."""
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
        version=story["context_version"] or 0,
        plans={plan["id"]: plan["version"] for plan in row["plans"]},
        entities=entities,
    )


def _known(node: Row) -> Known:
    return Known(
        live=node["status"] not in NOT_LIVE,
        status_order=node["status_order"] or "",
        text_order=node["text_order"] or "",
    )


def _content(applied: Sequence[Asked]) -> list[Any]:
    return [
        [str(asked), asked.payload.model_dump(exclude_none=True) if asked.payload else None]
        for asked in applied
    ]


def _as_kept(node: Row, request: str, read: Read) -> ContextAnswer:
    if node["request"] != request:
        raise ApplicationError(
            "another update was sent with this x-request-id; send this one with its own",
            type=REQUEST_REUSED,
            non_retryable=True,
        )
    applied = [asked for number in node["applied"] if isinstance(asked := read[number], Asked)]
    made = [asked for asked in applied if asked.operation == "CREATE"]
    return ContextAnswer(
        version=node["version"],
        hash=node["hash"],
        warnings=node["warnings"],
        changed=list(dict.fromkeys(asked.entity_type for asked in applied)),
        decisions=[
            DecisionAdded(
                decision_id=asked.entity_id,
                title=asked.payload.title,
                rationale=asked.payload.rationale or "",
                decided_by=asked.payload.decided_by or node["actor"],
            )
            for asked in made
            if isinstance(asked.payload, DecisionPayload) and asked.payload.title
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
