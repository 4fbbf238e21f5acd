"""How the scopes of a context pack are read from the graph, and shown as lines of Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, LiteralString, NamedTuple

from neo4j import AsyncManagedTransaction

from activities.graph.context_update.payloads import NOT_LIVE
from activities.graph.scopes import Scope, Scopes, scopes_for
from activities.graph.stories import HAS_UNADOPTED
from activities.graph.values import Flag, Instant, Real, Row, Text, Texts
from workflows.models.context import PackQuery

DONE = ["DONE", "COMPLETED"]
"""Statuses of a subtask that is done: ours and those of other systems."""

NOISE = ["orchestration.round.completed", "orchestration.deliberation.started", "context.updated"]
"""Events that agents do not see as milestones."""


class ScopeSection(NamedTuple):
    """The lines of a scope, most relevant first."""

    scope: Scope
    lines: list[str]


class ScopeQuery(NamedTuple):
    """How a scope is read, converted, sorted and shown.

    Attributes:
        cypher: returns one column, `row`.
        none: shown if there are no rows.
        by: sort key for rows ordered by time, which the graph cannot compare as instants.
        at_most: the maximum number of rows that are shown.
    """

    heading: str
    cypher: LiteralString
    row: type[Row]
    lines: Callable[[Any], list[str]]
    none: str = ""
    by: Callable[[Any], tuple[Any, ...]] | None = None
    at_most: int | None = None

    def rows(self, found: Sequence[dict[str, Any]]) -> list[Any]:
        """Convert rows, whatever types their properties have."""
        rows = [self.row.model_validate(each) for each in found]
        return (sorted(rows, key=self.by) if self.by else rows)[: self.at_most]


_LAST_PLAN: LiteralString = """
MATCH (s:Case {id: $story})-[:HAS_PLAN]->(p:PlanVersion)
WHERE coalesce(p.status, '') <> 'DELETED'
WITH p ORDER BY coalesce(p.version, 0) DESC, p.id DESC LIMIT 1
"""

_TASKS: LiteralString = (
    "CALL () {"
    + _LAST_PLAN
    + """
MATCH (p)-[:HAS_SUBTASK]->(t:Subtask) RETURN t
UNION
MATCH (:Case {id: $story})<-[:OF]-(t:Subtask)
WHERE NOT EXISTS { (t)<-[:HAS_SUBTASK]-(:PlanVersion) } RETURN t
}
WITH t WHERE coalesce(t.status, '') <> 'DELETED'"""
)
"""The tasks of the last plan, and those without a plan."""

_OF_ROLE: LiteralString = " AND (t.role = $role OR t.id = $subtask)"

_TASK_FIELDS: LiteralString = """
RETURN t {
    .id, .title, .description, .role, .status,
    needs: COLLECT { MATCH (t)-[:DEPENDS_ON]->(d:Subtask) RETURN d.id ORDER BY d.id }
  } AS row
ORDER BY t.id <> $subtask, t.status IN $done, coalesce(t.priority, 1),
         size(toStringOrNull(t.id)), t.id
"""

_DECISIONS: LiteralString = """
MATCH (d:Decision {case_id: $story})
WHERE NOT coalesce(d.status, '') IN ['DELETED', 'SUPERSEDED']
"""

DECIDED_AT: LiteralString = "coalesce(d.decided_at, d.created_at_ms, d.created_at)"
DECIDED_BY: LiteralString = "coalesce(d.decided_by, d.approved_by, d.author_id)"
"""Who decided and when, also for decisions that other systems wrote."""

_DECISION_FIELDS: LiteralString = (
    "d {.id, .title, .rationale, .recorded_by, "
    "binding: coalesce(d.role, '') IN ['', 'ARCHITECT'], "
    f"decided_by: {DECIDED_BY}, decided_at: {DECIDED_AT}"
)


class _CaseRow(Row):
    id: Text
    title: Text
    status: Text
    rigor: Text
    brief: Text
    criteria: Texts


class _PlanRow(Row):
    id: Text
    version: Text
    status: Text
    total: int
    done: int


class _DecisionRow(Row):
    id: Text
    title: Text
    rationale: Text = ""
    decided_by: Text = ""
    recorded_by: Text = ""
    decided_at: Instant = None
    binding: bool = False
    on_this: Flag = False
    on_role: Flag = False
    on: Text = ""
    on_id: Text = ""

    @property
    def relevance(self) -> tuple[Any, ...]:
        """Sort key: binding decisions first, then the newest.

        Decisions of people and architects bind the whole story. The decisions of single tasks,
        which are later and numerous, do not push them out of a pack.
        """
        return (not self.binding, *newest(self.decided_at), self.id, self.on_id)

    @property
    def relevance_to_role(self) -> tuple[Any, ...]:
        """Sort key: decisions that affect the task first, then those that affect its role."""
        return (not self.on_this, not self.on_role, *newest(self.decided_at), self.id)


class _TaskRow(Row):
    id: Text
    title: Text
    role: Text
    status: Text
    description: Text = ""
    needs: Texts = []
    on: Text = ""


class MilestoneRow(Row):
    """A milestone of a story: an event, or a transition of its state machine."""

    id: Text
    event_type: Text = ""
    description: Text = ""
    actor: Text = ""
    from_phase: Text = ""
    to_phase: Text = ""
    reason: Text = ""
    at: Instant = None

    @property
    def kind(self) -> str:
        """The event's type, or the phases of the transition."""
        return self.event_type or f"{self.from_phase} -> {self.to_phase}"

    @property
    def text(self) -> str:
        """The description, with the reason if there is one."""
        return f"{self.description}: {self.reason}" if self.reason else self.description

    @property
    def recency(self) -> tuple[Any, ...]:
        """Sort key: the newest first; at the same time, the last id first."""
        return (*newest(self.at), *newest_text(self.id))


class SummaryRow(Row):
    """The proposal that won the last deliberation."""

    role: Text
    phase: Text
    agent: Text
    score: Real
    approach: Text


def newest(at: datetime | None) -> tuple[bool, float]:
    """Return a sort key that puts later times first and missing times last."""
    return (at is None, -at.timestamp() if at else 0.0)


def newest_text(text: str) -> tuple[int, ...]:
    """Return a sort key that reverses the order of texts."""
    return (*(-ord(character) for character in text), 1)


def _case(row: _CaseRow) -> list[str]:
    criteria = [f"- must hold: {criterion}" for criterion in row.criteria]
    about = ", ".join(each for each in (row.id, row.status, f"rigor {row.rigor}") if each)
    return [f"**{row.title}** ({about})", *criteria, *([row.brief] if row.brief else [])]


def _plan(row: _PlanRow) -> list[str]:
    return [
        f"Plan {row.id} version {row.version}: {row.status}, {row.done} of {row.total} tasks done"
    ]


def _decision(row: _DecisionRow) -> list[str]:
    other = row.recorded_by if row.recorded_by != row.decided_by else ""
    recorded = f", recorded by {other}" if other else ""
    by = f" ({row.decided_by}{recorded})" if row.decided_by else ""
    why = f": {row.rationale}" if row.rationale else ""
    return [f"- **{row.title}**{by}{why}"]


def _decision_min(row: _DecisionRow) -> list[str]:
    return [f"- {row.title}"]


def _decision_dependency(row: _DecisionRow) -> list[str]:
    return [f"- {row.title} depends on {row.on}"]


def _about(row: _TaskRow) -> str:
    return ", ".join(each for each in (row.role, row.status) if each)


def _task(row: _TaskRow) -> list[str]:
    needs = f" (after {', '.join(row.needs)})" if row.needs else ""
    about = f": {row.description}" if row.description else ""
    return [f"- {row.id} [{_about(row)}] **{row.title}**{needs}{about}"]


def _task_min(row: _TaskRow) -> list[str]:
    return [f"- {row.id} [{_about(row)}] {row.title}"]


def _task_dependency(row: _TaskRow) -> list[str]:
    return [f"- {row.id} comes after {row.on} [{_about(row)}] {row.title}"]


def _milestone(row: MilestoneRow) -> list[str]:
    by = f" ({row.actor})" if row.actor else ""
    return [f"- {row.kind}: {row.text}{by}"]


def _summary(row: SummaryRow) -> list[str]:
    return [f"{row.role} in {row.phase}, by {row.agent} (score {row.score:.2f}): {row.approach}"]


MILESTONES: LiteralString = """
CALL (s) {
  MATCH (s)<-[:OF]-(e:Event)
  WHERE coalesce(e.status, '') <> 'DELETED' AND NOT coalesce(e.event_type, '') IN $noise
  RETURN e {.id, .event_type, .description, .actor,
            at: coalesce(e.timestamp_ms, e.timestamp, e.created_at)} AS row
  UNION ALL
  MATCH (s)<-[:OF]-(t:PhaseTransition)
  RETURN t {.id, .from_phase, .to_phase, description: t.event, .actor, .reason,
            at: coalesce(t.timestamp_ms, t.timestamp)} AS row
}
WITH row ORDER BY row.at IS :: INTEGER NOT NULL, row.at DESC, row.id DESC LIMIT 200
RETURN row
"""
"""The milestones of the story `s`: our newest, and those that others wrote with other times."""

READS: dict[Scope, ScopeQuery] = {
    "CASE_HEADER": ScopeQuery(
        "Story",
        """
        MATCH (s:Case {id: $story})
        WHERE s.title IS NOT NULL AND NOT coalesce(s.status, '') IN ['UNKNOWN', 'DELETED']
        RETURN s {
            .id, .title, .status, rigor: coalesce(s.rigor, 'unknown'), brief: s.description,
            criteria: s.acceptance_criteria
          } AS row
        """,
        _CaseRow,
        _case,
        none="Nothing is recorded of this story.",
    ),
    "PLAN_HEADER": ScopeQuery(
        "Plan",
        _LAST_PLAN
        + """
        OPTIONAL MATCH (p)-[:HAS_SUBTASK]->(t:Subtask) WHERE coalesce(t.status, '') <> 'DELETED'
        WITH p, count(t) AS total, count(CASE WHEN t.status IN $done THEN 1 END) AS done
        RETURN p {.id, .status, version: coalesce(p.version, 1), total: total, done: done} AS row
        """,
        _PlanRow,
        _plan,
        none="There is no plan yet.",
    ),
    "DECISIONS_GLOBAL": ScopeQuery(
        "Decisions",
        _DECISIONS + "RETURN " + _DECISION_FIELDS + "} AS row",
        _DecisionRow,
        _decision,
        by=lambda row: row.relevance,
    ),
    "DECISIONS_GLOBAL_MIN": ScopeQuery(
        "Decisions",
        _DECISIONS + "RETURN " + _DECISION_FIELDS + "} AS row",
        _DecisionRow,
        _decision_min,
        by=lambda row: row.relevance,
    ),
    "DECISIONS_RELEVANT_ROLE": ScopeQuery(
        "Decisions that bear on your work",
        _DECISIONS
        + """
        WITH d, EXISTS { (d)-[:AFFECTS]->(:Subtask {id: $subtask}) } AS on_this,
             EXISTS { (d)-[:AFFECTS]->(:Subtask {role: $role}) } OR d.role = $role AS on_role,
             NOT EXISTS { (d)-[:AFFECTS]->(:Subtask) } AS on_all
        WHERE on_this OR on_role OR on_all
        RETURN """
        + _DECISION_FIELDS
        + ", on_this: on_this, on_role: on_role} AS row",
        _DecisionRow,
        _decision,
        by=lambda row: row.relevance_to_role,
    ),
    "DEPS_DECISIONS": ScopeQuery(
        "How decisions depend on each other",
        _DECISIONS
        + """
        MATCH (d)-[:DEPENDS_ON]->(o:Decision)
        WHERE NOT coalesce(o.status, '') IN ['DELETED', 'SUPERSEDED']
        RETURN """
        + _DECISION_FIELDS
        + ", on: coalesce(o.title, o.id), on_id: o.id} AS row",
        _DecisionRow,
        _decision_dependency,
        by=lambda row: (*newest(row.decided_at), row.id, row.on_id),
    ),
    "DEPS_RELEVANT": ScopeQuery(
        "What your tasks wait for",
        _TASKS
        + _OF_ROLE
        + """
        MATCH (t)-[:DEPENDS_ON]->(d:Subtask) WHERE coalesce(d.status, '') <> 'DELETED'
        RETURN d {id: t.id, on: d.id, .title, .status, .role} AS row
        ORDER BY t.id <> $subtask, d.status IN $done, coalesce(t.priority, 1), t.id, d.id
        """,
        _TaskRow,
        _task_dependency,
    ),
    "SUBTASKS_ALL": ScopeQuery("Tasks", _TASKS + _TASK_FIELDS, _TaskRow, _task),
    "SUBTASKS_ALL_MIN": ScopeQuery("Tasks", _TASKS + _TASK_FIELDS, _TaskRow, _task_min),
    "SUBTASKS_ROLE": ScopeQuery("Your tasks", _TASKS + _OF_ROLE + _TASK_FIELDS, _TaskRow, _task),
    "SUBTASKS_ROLE_MIN": ScopeQuery(
        "Your tasks", _TASKS + _OF_ROLE + _TASK_FIELDS, _TaskRow, _task_min
    ),
    "MILESTONES": ScopeQuery(
        "What happened, newest first",
        """
        MATCH (s:Case {id: $story})
        """
        + MILESTONES,
        MilestoneRow,
        _milestone,
        by=lambda row: row.recency,
        at_most=50,
    ),
    "SUMMARY_LAST": ScopeQuery(
        "The last summary",
        """
        MATCH (:Case {id: $story})<-[:OF]-(p:Proposal {rank: 1})
        RETURN p {.role, .phase, agent: p.agent_id, .score, .approach} AS row
        ORDER BY p.recorded_at DESC, p.id LIMIT 1
        """,
        SummaryRow,
        _summary,
    ),
}


PACK: LiteralString = (
    "WITH $story AS id\n"
    f"RETURN {HAS_UNADOPTED} AS unadopted,\n"
    "COLLECT { MATCH (s:Case {id: id}) RETURN coalesce(s.status, '') } AS statuses,\n"
    + ",\n".join(
        f"COLLECT {{ WITH id WHERE '{scope}' IN $scopes {read.cypher} }} AS {scope}"
        for scope, read in READS.items()
    )
)
"""All scopes in one round trip; those that are not in `$scopes` are not read.

One query for all roles and phases, because Neo4j takes a second to plan it for the first time.
"""


class Reading(NamedTuple):
    """What the graph has for a context pack.

    Attributes:
        sections: the role's scopes, most relevant first.
        known: whether the graph has the story.
        adopted: whether the fleet can read all that others wrote for the story; see `stories`.
    """

    sections: list[ScopeSection]
    known: bool
    adopted: bool


async def read_sections(tx: AsyncManagedTransaction, config: Scopes, query: PackQuery) -> Reading:
    """Read the role's scopes with one query."""
    wanted = sorted(scopes_for(config, query.role, query.phase), key=config.relevance.index)
    result = await tx.run(
        PACK,
        story=query.story_id,
        role=config.role(query.role),
        subtask=query.subtask_id,
        noise=NOISE,
        done=DONE,
        scopes=wanted,
    )
    found = await result.single(strict=True)
    sections = []
    for scope in wanted:
        read = READS[scope]
        lines = [line for row in read.rows(found[scope]) for line in read.lines(row)]
        sections.append(ScopeSection(scope, lines or ([read.none] if read.none else [])))
    known = any(status not in NOT_LIVE for status in found["statuses"])
    return Reading(sections, known, adopted=not found["unadopted"])
