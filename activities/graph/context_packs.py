"""Context packs: what an agent knows about a story, by role and phase.

scopes.yaml defines which scopes a role has in a phase. Each scope is one read of the graph,
rendered as lines of Markdown, most relevant first. A pack keeps as many lines as its budget allows,
and drops the last line of the least relevant scope first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, LiteralString, NamedTuple, Self, get_args

from neo4j import AsyncManagedTransaction
from pydantic import Field, model_validator

from activities.config import InvalidConfig, read_config
from activities.graph.values import Flag, Instant, Real, Row, Text, Texts
from workflows.models.base import Section, content_hash
from workflows.models.context import ContextPack, PackQuery
from workflows.models.ids import Role

BYTES_PER_TOKEN = 2.5
"""UTF-8 bytes per token; see `count_tokens`."""

LONGEST_SHARE = 4
"""One line takes at most a quarter of the budget, so that no text displaces all others."""

Scope = Literal[
    "CASE_HEADER",
    "PLAN_HEADER",
    "DECISIONS_GLOBAL",
    "DECISIONS_GLOBAL_MIN",
    "DECISIONS_RELEVANT_ROLE",
    "DEPS_DECISIONS",
    "DEPS_RELEVANT",
    "SUBTASKS_ALL",
    "SUBTASKS_ALL_MIN",
    "SUBTASKS_ROLE",
    "SUBTASKS_ROLE_MIN",
    "MILESTONES",
    "SUMMARY_LAST",
]

SCOPES: tuple[Scope, ...] = get_args(Scope)

DONE = ["DONE", "COMPLETED"]
"""Statuses of a subtask that is done: ours and those of other systems."""


class Scopes(Section):
    """The content of scopes.yaml.

    `token_budget` is a pack's default budget in tokens; `relevance` lists the most relevant scope
    first.
    """

    token_budget: Annotated[int, Field(gt=0)]
    aliases: dict[Role, Role] = {}
    headers: list[Scope]
    relevance: list[Scope]
    tools: str
    scopes: dict[Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")], dict[Role, list[Scope]]]

    @model_validator(mode="after")
    def _each_scope_once(self) -> Self:
        if sorted(self.relevance) != sorted(SCOPES):
            raise ValueError("relevance must name every scope once")
        for phase, roles in self.scopes.items():
            for role, scopes in roles.items():
                if len({*scopes, *self.headers}) != len(scopes) + len(self.headers):
                    raise ValueError(f"scopes.{phase}.{role} names a scope twice, or a header")
        return self

    @cached_property
    def version(self) -> str:
        """The content hash; a pack that was built with another one is stale."""
        return content_hash(self.model_dump())

    def role(self, name: str) -> str:
        """Return the role's canonical name: upper case, with aliases resolved."""
        role = name.strip().upper()
        return self.aliases.get(role, role)


def load_scopes(path: Path) -> Scopes:
    """Read and check scopes.yaml.

    Raises:
        ApplicationError: `InvalidConfig`, not retryable, with the file, the field and the rule.
    """
    try:
        return read_config(path, Scopes)
    except InvalidConfig as error:
        raise error.final() from error


def scopes_for(config: Scopes, role: str, phase: str) -> list[Scope]:
    """Return the scopes of a role in a phase; for an unknown role or phase, the headers."""
    table = config.scopes.get(phase.strip().upper(), {})
    return [*config.headers, *table.get(config.role(role), [])]


def has_scopes(config: Scopes, role: str, phase: str) -> bool:
    """Return whether the file has that role in that phase; if not, it has the headers only."""
    return config.role(role) in config.scopes.get(phase.strip().upper(), {})


def check_scopes(
    config: Scopes, role: str, phase: str, provided: Collection[str]
) -> tuple[list[str], list[str]]:
    """Return the scopes that `provided` lacks and those that it has in excess: (missing, extra)."""
    expected = scopes_for(config, role, phase)
    missing: list[str] = [scope for scope in expected if scope not in provided]
    return missing, sorted(set(provided).difference(expected))


def count_tokens(text: str) -> int:
    """Estimate the number of tokens without a tokenizer: UTF-8 bytes divided by 2.5.

    Measured with the tokenizer of SmolLM2: 3.0 bytes a token in packs like ours, 2.6 in Python and
    German, 2.4 in Russian, 2.0 in Chinese, 1.0 in bare digits. So the estimate is too high for
    packs in English; a larger vocabulary needs even fewer tokens.
    """
    return ceil(len(text.encode()) / BYTES_PER_TOKEN)


# --- reading --------------------------------------------------------------------------------------


class ScopeSection(NamedTuple):
    """The lines of a scope, most relevant first."""

    scope: Scope
    lines: list[str]


class ScopeQuery(NamedTuple):
    """How a scope is read, converted, sorted and shown.

    Attributes:
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
        """Convert the rows of a result, whatever types their properties have."""
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
RETURN t.id AS id, coalesce(t.title, '') AS title, coalesce(t.description, '') AS description,
       coalesce(t.role, '') AS role, t.status AS status,
       COLLECT { MATCH (t)-[:DEPENDS_ON]->(d:Subtask) RETURN d.id ORDER BY d.id } AS needs
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
    """
RETURN d.id AS id, d.title AS title, d.rationale AS rationale,
       coalesce(d.role, '') IN ['', 'ARCHITECT'] AS binding, """
    + f"{DECIDED_BY} AS decided_by, {DECIDED_AT} AS decided_at, d.recorded_by AS recorded_by"
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
RETURN row.id AS id, row.event_type AS event_type, row.description AS description,
       row.actor AS actor, row.from_phase AS from_phase, row.to_phase AS to_phase,
       row.reason AS reason, row.at AS at
"""
"""The milestones of the story `s`: our newest, and those that others wrote with other times."""

READS: dict[Scope, ScopeQuery] = {
    "CASE_HEADER": ScopeQuery(
        "Story",
        """
        MATCH (s:Case {id: $story})
        WHERE s.title IS NOT NULL AND NOT coalesce(s.status, '') IN ['UNKNOWN', 'DELETED']
        RETURN s.id AS id, s.title AS title, s.status AS status,
               coalesce(s.rigor, 'unknown') AS rigor, coalesce(s.description, '') AS brief,
               coalesce(s.acceptance_criteria, []) AS criteria
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
        RETURN p.id AS id, coalesce(p.version, 1) AS version, p.status AS status,
               count(t) AS total, count(CASE WHEN t.status IN $done THEN 1 END) AS done
        """,
        _PlanRow,
        _plan,
        none="There is no plan yet.",
    ),
    "DECISIONS_GLOBAL": ScopeQuery(
        "Decisions",
        _DECISIONS + _DECISION_FIELDS,
        _DecisionRow,
        _decision,
        by=lambda row: row.relevance,
    ),
    "DECISIONS_GLOBAL_MIN": ScopeQuery(
        "Decisions",
        _DECISIONS + _DECISION_FIELDS,
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
        """
        + _DECISION_FIELDS
        + ", on_this, on_role",
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
        """
        + _DECISION_FIELDS
        + ", coalesce(o.title, o.id) AS on, o.id AS on_id",
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
        RETURN t.id AS id, d.id AS on, coalesce(d.title, '') AS title, d.status AS status,
               coalesce(d.role, '') AS role
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
        RETURN p.role AS role, p.phase AS phase, p.agent_id AS agent, p.score AS score,
               p.approach AS approach
        ORDER BY p.recorded_at DESC, p.id LIMIT 1
        """,
        SummaryRow,
        _summary,
    ),
}


def with_summary(sections: Sequence[ScopeSection], summary: str) -> list[ScopeSection]:
    """Insert a summary of the story before the last answer of a council."""
    return [
        section._replace(lines=[summary, *section.lines])
        if summary and section.scope == "SUMMARY_LAST"
        else section
        for section in sections
    ]


NOISE = ["orchestration.round.completed", "orchestration.deliberation.started", "context.updated"]
"""Events that agents do not see as milestones."""


async def read_sections(
    tx: AsyncManagedTransaction, config: Scopes, query: PackQuery
) -> list[ScopeSection]:
    """Read the role's scopes with one query each, in the order of their relevance."""
    wanted = scopes_for(config, query.role, query.phase)
    sections = []
    for scope in sorted(wanted, key=config.relevance.index):
        read = READS[scope]
        result = await tx.run(
            read.cypher,
            story=query.story_id,
            role=config.role(query.role),
            subtask=query.subtask_id,
            noise=NOISE,
            done=DONE,
        )
        rows = read.rows(await result.data())
        lines = [line for row in rows for line in read.lines(row)]
        sections.append(ScopeSection(scope, lines or ([read.none] if read.none else [])))
    return sections


# --- assembling -----------------------------------------------------------------------------------


def assemble(
    config: Scopes,
    query: PackQuery,
    token_budget: int,
    sections: Sequence[ScopeSection],
    redact: Callable[[str], str] = str,
) -> ContextPack:
    """Build the largest pack of these sections, most relevant first, that fits the budget.

    The system block is always included, so a budget that is smaller is exceeded. The pack's
    `scopes` are those that kept a line, or had no lines.

    Args:
        config: the scopes file.
        query: the story, role and phase.
        token_budget: the pack's size in tokens.
        sections: the sections, most relevant first.
        redact: removes secrets from each line before it is cut, because no rule detects half of a
            secret.
    """
    role = config.role(query.role)
    of_story = f" It is about story {query.story_id}." if query.story_id else ""
    in_phase = f" Phase: {query.phase}." if query.phase else ""
    system = f"You are an agent of the {role} council.{of_story}{in_phase}"
    tools = config.tools if query.story_id else ""
    if count_tokens(system) + count_tokens(tools) > token_budget:
        tools = ""
    room = token_budget - count_tokens(system) - count_tokens(tools)
    longest = int(token_budget * BYTES_PER_TOKEN / LONGEST_SHARE)
    lines = [
        (section, _cut(redact(line), longest)) for section in sections for line in section.lines
    ]
    kept = bisect_right(
        range(1, len(lines) + 1), room, key=lambda count: count_tokens(_render(lines[:count]))
    )
    context = _render(lines[:kept])
    there = {section.scope for section, _ in lines[:kept]}
    return ContextPack(
        system=system,
        context=context,
        tools=tools,
        scopes=[
            section.scope for section in sections if section.scope in there or not section.lines
        ],
        token_count=sum(count_tokens(block) for block in (system, context, tools)),
        version=content_hash([system, context, tools]),
    )


def _render(lines: Sequence[tuple[ScopeSection, str]]) -> str:
    text: list[str] = []
    scope = ""
    for section, line in lines:
        if section.scope != scope:
            scope = section.scope
            text.append(f"## {READS[section.scope].heading}")
        text.append(line)
    return "\n".join(text)


def _cut(line: str, longest: int) -> str:
    """Join the line's words in one paragraph, and cut it to at most `longest` UTF-8 bytes."""
    text = " ".join(line.split())
    if len(text.encode()) <= longest:
        return text
    return text.encode()[: max(0, longest - 3)].decode(errors="ignore") + "…"
