"""A session: what each role is told of a story as its agents take it up again.

The graph is read once, in one transaction, for all roles; what of it is a role's is a rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, LiteralString, NamedTuple

from neo4j import AsyncManagedTransaction

from activities.context import DONE, NOISE, READS, Scopes

Row = dict[str, Any]

ALL_DECISIONS = frozenset({"DECISIONS_GLOBAL", "DECISIONS_GLOBAL_MIN"})

CASE: LiteralString = """
MATCH (s:Story {id: $story}) WHERE NOT coalesce(s.status, '') IN ['UNKNOWN', 'DELETED']
RETURN s {case_id: s.id, title: coalesce(s.title, ''), description: coalesce(s.description, ''),
          .status, created_at: coalesce(s.created_at, ''), created_by: coalesce(s.created_by, '')}
         AS case,
  COLLECT {
    MATCH (s)-[:HAS_PLAN]->(p:PlanVersion) WHERE coalesce(p.status, '') <> 'DELETED'
    RETURN p {plan_id: p.id, version: coalesce(p.version, 1), .status}
    ORDER BY coalesce(p.version, 0) DESC, p.id DESC LIMIT 1
  } AS plan
"""

TASKS: LiteralString = """
MATCH (s:Story {id: $story})
CALL (s) {
  MATCH (s)-[:HAS_PLAN]->(p:PlanVersion {id: $plan})-[:HAS_SUBTASK]->(t:Subtask)
  RETURN t, true AS planned
  UNION
  MATCH (s)<-[:OF]-(t:Subtask) WHERE NOT EXISTS { (t)<-[:HAS_SUBTASK]-(:PlanVersion) }
  RETURN t, false AS planned
}
WITH t, planned WHERE coalesce(t.status, '') <> 'DELETED'
RETURN planned, t {
    subtask_id: t.id, title: coalesce(t.title, ''), description: coalesce(t.description, ''),
    role: coalesce(t.role, ''), .status, priority: coalesce(t.priority, 1),
    dependencies: COLLECT {
      MATCH (t)-[:DEPENDS_ON]->(d:Subtask) WHERE coalesce(d.status, '') <> 'DELETED'
      RETURN d.id ORDER BY d.id
    }
  } AS task
ORDER BY coalesce(t.priority, 1), size(toStringOrNull(t.id)), t.id
"""

DECISIONS: LiteralString = """
MATCH (d:Decision {case_id: $story}) WHERE coalesce(d.status, '') <> 'DELETED'
RETURN coalesce(d.role, '') AS role, EXISTS { (d)-[:AFFECTS]->(:Subtask) } AS bound,
  d {.id, title: coalesce(d.title, ''), rationale: coalesce(d.rationale, ''), .status,
     decided_by: coalesce(d.decided_by, ''), decided_at: coalesce(d.decided_at, '')} AS decision,
  COLLECT {
    MATCH (d)-[:AFFECTS]->(t:Subtask) WHERE coalesce(t.status, '') <> 'DELETED'
    RETURN t {subtask_id: t.id, title: coalesce(t.title, ''), role: coalesce(t.role, '')}
    ORDER BY t.id
  } AS affects,
  COLLECT {
    MATCH (d)-[:DEPENDS_ON]->(o:Decision) WHERE coalesce(o.status, '') <> 'DELETED'
    RETURN o.id ORDER BY o.id
  } AS depends_on
ORDER BY coalesce(d.role, '') IN ['', 'ARCHITECT'] DESC, d.decided_at DESC, d.id
"""

MILESTONES: LiteralString = """
MATCH (s:Story {id: $story})
CALL (s) {
  MATCH (s)<-[:OF]-(e:Event)
  WHERE coalesce(e.status, '') <> 'DELETED' AND NOT e.event_type IN $noise
  RETURN e.event_type AS event_type, coalesce(e.description, '') AS description,
         coalesce(e.actor, '') AS actor, coalesce(e.timestamp_ms, 0) AS ts_ms, e.id AS id
  UNION ALL
  MATCH (s)<-[:OF]-(t:PhaseTransition)
  RETURN t.from_phase + ' -> ' + t.to_phase AS event_type,
         t.event + CASE coalesce(t.reason, '') WHEN '' THEN '' ELSE ': ' + t.reason END
           AS description,
         coalesce(t.actor, '') AS actor, coalesce(t.timestamp_ms, 0) AS ts_ms, t.id AS id
}
RETURN event_type, description, actor, ts_ms ORDER BY ts_ms DESC, id DESC LIMIT $limit
"""


class Decided(NamedTuple):
    """A decision and what hangs on it. `bound`: it affects subtasks, if only deleted ones."""

    decision: Row
    role: str
    bound: bool
    affects: list[Row]
    depends_on: list[str]


class Session(NamedTuple):
    """A story as the graph has it. Rows bear the names of the wire; milestones: newest first."""

    case: Row
    plan: Row | None
    tasks: list[Row]
    decisions: list[Decided]
    milestones: list[Row]
    summary: str


class RoleShare(NamedTuple):
    """What of a session is one role's."""

    tasks: list[Row]
    decisions: list[Row]
    edges: list[tuple[str, str]]
    """(decision, the decision that it depends on)"""
    impacts: list[tuple[str, Row]]
    """(decision, a subtask that it affects)"""


async def read_session(
    tx: AsyncManagedTransaction, story_id: str, events: int, summary: bool
) -> Session | None:
    """Read a story for all roles; None where the graph does not know it."""
    found = await (await tx.run(CASE, story=story_id)).single()
    if found is None:
        return None
    plan = found["plan"][0] if found["plan"] else None
    tasks = await (await tx.run(TASKS, story=story_id, plan=plan["plan_id"] if plan else "")).data()
    decisions = await (await tx.run(DECISIONS, story=story_id)).data()
    milestones: list[Row] = []
    if events:
        result = await tx.run(MILESTONES, story=story_id, noise=NOISE, limit=events)
        milestones = await result.data()
    last = None
    if summary:
        last = await (await tx.run(READS["SUMMARY_LAST"].cypher, story=story_id)).single()
    if plan is not None:
        planned = [row["task"]["status"] for row in tasks if row["planned"]]
        done = sum(status in DONE for status in planned)
        plan = plan | {"total_subtasks": len(planned), "completed_subtasks": done}
    return Session(
        case=found["case"],
        plan=plan,
        tasks=[row["task"] for row in tasks],
        decisions=[Decided(**row) for row in decisions],
        milestones=milestones,
        summary=last["approach"] if last else "",
    )


def redacted(session: Session, redact: Callable[[str], str]) -> Session:
    """The session without the secrets that its texts hold."""

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


def share_of(session: Session, config: Scopes, role: str) -> RoleShare:
    """What of the session is this role's; of an unknown role: nothing but the headers.

    A role that has all decisions in some phase has them all here. Any other has those that affect
    its subtasks, that it made, or that name no subtask; and, in turn, what they depend on.
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
    """Whether the scopes file has that role."""
    return any(role in roles for roles in config.scopes.values())


def known_roles(config: Scopes) -> list[str]:
    """Every role of the scopes file."""
    return sorted({role for roles in config.scopes.values() for role in roles})
