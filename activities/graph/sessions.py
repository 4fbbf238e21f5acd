"""A session: the parts of a story that each role gets when its agents resume it.

The graph is read once, in one transaction, for all roles; a rule selects each role's part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, LiteralString, NamedTuple

from neo4j import AsyncManagedTransaction

from activities.graph.scope_reads import (
    DECIDED_AT,
    DECIDED_BY,
    DONE,
    NOISE,
    READS,
    MilestoneRow,
    newest,
)
from activities.graph.scopes import Scopes
from activities.graph.values import Number, Row, Text, Texts, TimeText, instant

Fields = dict[str, Any]

ALL_DECISIONS = frozenset({"DECISIONS_GLOBAL", "DECISIONS_GLOBAL_MIN"})

CASE: LiteralString = """
MATCH (s:Case {id: $story}) WHERE NOT coalesce(s.status, '') IN ['UNKNOWN', 'DELETED']
RETURN s {case_id: s.id, .title, .description, .status, .created_at, .created_by} AS case,
  COLLECT {
    MATCH (s)-[:HAS_PLAN]->(p:PlanVersion) WHERE coalesce(p.status, '') <> 'DELETED'
    RETURN p {plan_id: p.id, version: coalesce(p.version, 1), .status}
    ORDER BY coalesce(p.version, 0) DESC, p.id DESC LIMIT 1
  } AS plan
"""

TASKS: LiteralString = """
MATCH (s:Case {id: $story})
CALL (s) {
  MATCH (s)-[:HAS_PLAN]->(p:PlanVersion {id: $plan})-[:HAS_SUBTASK]->(t:Subtask)
  RETURN t, true AS planned
  UNION
  MATCH (s)<-[:OF]-(t:Subtask) WHERE NOT EXISTS { (t)<-[:HAS_SUBTASK]-(:PlanVersion) }
  RETURN t, false AS planned
}
WITH t, planned WHERE coalesce(t.status, '') <> 'DELETED'
RETURN planned, t {
    subtask_id: t.id, .title, .description, .role, .status, priority: coalesce(t.priority, 1),
    dependencies: COLLECT {
      MATCH (t)-[:DEPENDS_ON]->(d:Subtask) WHERE coalesce(d.status, '') <> 'DELETED'
      RETURN d.id ORDER BY d.id
    }
  } AS task
ORDER BY coalesce(t.priority, 1), size(toStringOrNull(t.id)), t.id
"""

DECISIONS: LiteralString = (
    """
MATCH (d:Decision {case_id: $story}) WHERE coalesce(d.status, '') <> 'DELETED'
RETURN d.role AS role, EXISTS { (d)-[:AFFECTS]->(:Subtask) } AS bound,
  coalesce(d.role, '') IN ['', 'ARCHITECT'] AS binding,
  d {.id, .title, .rationale, .status, decided_by: """
    + f"{DECIDED_BY}, decided_at: {DECIDED_AT}"
    + """} AS decision,
  COLLECT {
    MATCH (d)-[:AFFECTS]->(t:Subtask) WHERE coalesce(t.status, '') <> 'DELETED'
    RETURN t {subtask_id: t.id, .title, .role} ORDER BY t.id
  } AS affects,
  COLLECT {
    MATCH (d)-[:DEPENDS_ON]->(o:Decision) WHERE coalesce(o.status, '') <> 'DELETED'
    RETURN o.id ORDER BY o.id
  } AS depends_on
"""
)


class _CaseRow(Row):
    case_id: Text
    title: Text
    description: Text
    status: Text
    created_at: TimeText
    created_by: Text


class _PlanRow(Row):
    plan_id: Text
    version: Number
    status: Text


class _TaskRow(Row):
    subtask_id: Text
    title: Text
    description: Text
    role: Text
    status: Text
    priority: Number
    dependencies: Texts


class _AffectedRow(Row):
    subtask_id: Text
    title: Text
    role: Text


class _DecisionRow(Row):
    id: Text
    title: Text
    rationale: Text
    status: Text
    decided_by: Text
    decided_at: TimeText


class _DecidedRow(Row):
    decision: _DecisionRow
    role: Text
    bound: bool
    binding: bool
    affects: list[_AffectedRow]
    depends_on: Texts

    @property
    def relevance(self) -> tuple[Any, ...]:
        """Sort key, as in context packs: decisions that bind the whole story first, then newest."""
        decided_at = instant(self.decision.decided_at)
        return (not self.binding, *newest(decided_at), self.decision.id)


class Decided(NamedTuple):
    """A decision and its relations. `bound`: it affects subtasks, possibly only deleted ones."""

    decision: Fields
    role: str
    bound: bool
    affects: list[Fields]
    depends_on: list[str]


class Session(NamedTuple):
    """A story as stored in the graph, with the field names of the API; milestones newest first."""

    case: Fields
    plan: Fields | None
    tasks: list[Fields]
    decisions: list[Decided]
    milestones: list[Fields]
    summary: str


class RoleShare(NamedTuple):
    """The part of a session that belongs to one role."""

    tasks: list[Fields]
    decisions: list[Fields]
    edges: list[tuple[str, str]]
    """(decision, the decision that it depends on)"""
    impacts: list[tuple[str, Fields]]
    """(decision, a subtask that it affects)"""


async def read_session(
    tx: AsyncManagedTransaction, story_id: str, events: int, summary: bool
) -> Session | None:
    """Read a story for all roles; return None if the graph does not know it."""
    found = await (await tx.run(CASE, story=story_id)).single()
    if found is None:
        return None
    case = _CaseRow.model_validate(found["case"]).model_dump()
    plan = _PlanRow.model_validate(found["plan"][0]).model_dump() if found["plan"] else None
    key = found["plan"][0]["plan_id"] if plan else ""
    rows = await (await tx.run(TASKS, story=story_id, plan=key)).data()
    tasks = [_TaskRow.model_validate(row["task"]).model_dump() for row in rows]
    decided = [
        _DecidedRow.model_validate(row)
        for row in await (await tx.run(DECISIONS, story=story_id)).data()
    ]
    milestones: list[Fields] = []
    if events:
        read = READS["MILESTONES"]
        result = await tx.run(read.cypher, story=story_id, noise=NOISE)
        milestones = [_milestone(row) for row in read.rows(await result.value())[:events]]
    last = []
    if summary:
        read = READS["SUMMARY_LAST"]
        last = read.rows(await (await tx.run(read.cypher, story=story_id)).value())
    if plan is not None:
        planned = [task["status"] for task, row in zip(tasks, rows, strict=True) if row["planned"]]
        done = sum(status in DONE for status in planned)
        plan |= {"total_subtasks": len(planned), "completed_subtasks": done}
    return Session(
        case=case,
        plan=plan,
        tasks=tasks,
        decisions=[
            Decided(
                each.decision.model_dump(),
                each.role,
                each.bound,
                [affected.model_dump() for affected in each.affects],
                each.depends_on,
            )
            for each in sorted(decided, key=lambda each: each.relevance)
        ],
        milestones=milestones,
        summary=last[0].approach if last else "",
    )


def redacted(session: Session, redact: Callable[[str], str]) -> Session:
    """Remove secrets from the texts of a session."""

    def safe(value: Any) -> Any:
        match value:
            case str():
                return redact(value)
            case list():
                return [safe(each) for each in value]
            case dict():
                return {name: safe(each) for name, each in value.items()}
        return value

    return Session(
        case=safe(session.case),
        plan=safe(session.plan),
        tasks=safe(session.tasks),
        decisions=[
            each._replace(decision=safe(each.decision), affects=safe(each.affects))
            for each in session.decisions
        ],
        milestones=safe(session.milestones),
        summary=redact(session.summary),
    )


def _milestone(row: MilestoneRow) -> Fields:
    return {
        "event_type": row.kind,
        "description": row.text,
        "actor": row.actor,
        "ts_ms": int(row.at.timestamp() * 1000) if row.at else 0,
    }


def share_of(session: Session, config: Scopes, role: str) -> RoleShare:
    """Return the role's part of the session; an unknown role gets the headers only.

    A role that has all decisions in some phase gets all of them. Any other role gets those that
    affect its subtasks, that it made, or that name no subtask, and all decisions that these depend
    on, directly or indirectly.
    """
    granted = {scope for roles in config.scopes.values() for scope in roles.get(role, [])}
    if not known_role(config, role):
        return RoleShare([], [], [], [])
    by_id = {each.decision["id"]: each for each in session.decisions}
    relevant = [
        name
        for name, each in by_id.items()
        if granted & ALL_DECISIONS
        or each.role == role
        or not each.bound
        or any(task["role"] == role for task in each.affects)
    ]
    listed = set(relevant)
    while relevant:
        more = {on for name in relevant for on in by_id[name].depends_on if on in by_id} - listed
        listed |= more
        relevant = sorted(more)
    decisions = [each for name, each in by_id.items() if name in listed]
    return RoleShare(
        tasks=[task for task in session.tasks if task["role"] == role],
        decisions=[each.decision for each in decisions],
        edges=[
            (each.decision["id"], on) for each in decisions for on in each.depends_on if on in by_id
        ],
        impacts=[(each.decision["id"], task) for each in decisions for task in each.affects],
    )


def known_role(config: Scopes, role: str) -> bool:
    """Return whether the scopes file has that role."""
    return any(role in roles for roles in config.scopes.values())


def known_roles(config: Scopes) -> list[str]:
    """Return every role of the scopes file."""
    return sorted({role for roles in config.scopes.values() for role in roles})
