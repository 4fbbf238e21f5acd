"""Context packs: what an agent is told of a story, by role and phase (design section 4).

scopes.yaml says which scopes a role has in a phase. Each scope is one read of the graph, rendered
as lines of Markdown, what matters most first. A pack keeps as many of the lines as its budget
holds, and loses the last line of the least relevant scope first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, LiteralString, NamedTuple, Self, get_args

import yaml
from neo4j import AsyncManagedTransaction
from pydantic import Field, ValidationError, model_validator
from temporalio.exceptions import ApplicationError

from workflows.ids import Role
from workflows.models import ContextPack, PackQuery, Part, content_hash, invalid_input

INVALID_CONFIG = "InvalidConfig"

BYTES_PER_TOKEN = 2.5
"""See `count_tokens`."""

LONGEST_SHARE = 4
"""One line takes a quarter of the budget at most, so that no text shuts out all others."""

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
"""Statuses of a subtask that is done: ours, and others'."""


class Scopes(Part):
    """scopes.yaml. token_budget: tokens of a pack by default. relevance: most relevant first."""

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
        """The content hash: a pack that was built with another is stale."""
        return content_hash(self.model_dump())

    def role(self, name: str) -> str:
        """The role that callers mean: in capitals, by its alias where it has one."""
        role = name.strip().upper()
        return self.aliases.get(role, role)


def load_scopes(path: Path) -> Scopes:
    """Read and check scopes.yaml.

    Raises:
        ApplicationError: `InvalidConfig`, not retryable, with the file, the field and the rule.
    """
    try:
        return Scopes.model_validate(yaml.safe_load(path.read_text()))
    except ValidationError as error:
        what = invalid_input(str(path), error).message
    except (OSError, yaml.YAMLError) as error:
        what = f"{path} cannot be read: {error}"
    raise ApplicationError(what, type=INVALID_CONFIG, non_retryable=True)


def scopes_for(config: Scopes, role: str, phase: str) -> list[Scope]:
    """The scopes of a role in a phase; for an unknown role or phase, the headers."""
    table = config.scopes.get(phase.strip().upper(), {})
    return [*config.headers, *table.get(config.role(role), [])]


def has_scopes(config: Scopes, role: str, phase: str) -> bool:
    """Whether the file has that role in that phase; where not, the headers are all there is."""
    return config.role(role) in config.scopes.get(phase.strip().upper(), {})


def check_scopes(
    config: Scopes, role: str, phase: str, provided: Collection[str]
) -> tuple[list[str], list[str]]:
    """What `provided` lacks, and what it has too much: (missing, extra)."""
    expected = scopes_for(config, role, phase)
    missing: list[str] = [scope for scope in expected if scope not in provided]
    return missing, sorted(set(provided).difference(expected))


def count_tokens(text: str) -> int:
    """An estimate without a tokenizer: UTF-8 bytes by 2.5.

    Measured with SmolLM2's: 3.0 bytes a token in packs like ours, 2.6 in Python and German, 2.4 in
    Russian, 2.0 in Chinese, 1.0 in bare digits. So it errs on the side of more for packs in
    English; a larger vocabulary needs fewer still.
    """
    return ceil(len(text.encode()) / BYTES_PER_TOKEN)


# --- reading --------------------------------------------------------------------------------------

Row = dict[str, Any]


class Section(NamedTuple):
    """A scope's lines, what matters most first."""

    scope: Scope
    lines: list[str]


class Read(NamedTuple):
    """How a scope is read and shown. `none`: said where there is nothing."""

    heading: str
    cypher: LiteralString
    lines: Callable[[Row], list[str]]
    none: str = ""


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
"""The last plan's tasks, and those that are in no plan."""

_OWN: LiteralString = " AND (t.role = $role OR t.id = $subtask)"

_TASK_FIELDS: LiteralString = """
RETURN t.id AS id, coalesce(t.title, '') AS title, coalesce(t.description, '') AS description,
       coalesce(t.role, '') AS role, t.status AS status,
       COLLECT { MATCH (t)-[:DEPENDS_ON]->(d:Subtask) RETURN d.id ORDER BY d.id } AS needs
ORDER BY t.id <> $subtask, t.status IN $done, coalesce(t.priority, 1),
         size(toStringOrNull(t.id)), t.id
"""

_DECISIONS: LiteralString = """
MATCH (d:Decision {case_id: $story}) WHERE coalesce(d.status, '') <> 'DELETED'
"""

# What people and architects decided binds the whole story: the decisions of single tasks, which
# come later and are many, do not push it out of a pack.
_DECISION_FIELDS: LiteralString = """
RETURN d.title AS title, d.rationale AS rationale, d.decided_by AS decided_by
ORDER BY coalesce(d.role, '') IN ['', 'ARCHITECT'] DESC, d.decided_at DESC, d.id
"""


def _case(row: Row) -> list[str]:
    criteria = [f"- must hold: {criterion}" for criterion in row["criteria"]]
    title = f"**{row['title']}** ({row['id']}, {row['status']}, rigor {row['rigor']})"
    return [title, *criteria, *([row["brief"]] if row["brief"] else [])]


def _plan(row: Row) -> list[str]:
    return [
        f"Plan {row['id']} version {row['version']}: {row['status']}, "
        f"{row['done']} of {row['total']} tasks done"
    ]


def _decision(row: Row) -> list[str]:
    why = f": {row['rationale']}" if row["rationale"] else ""
    return [f"- **{row['title']}** ({row['decided_by']}){why}"]


def _decision_min(row: Row) -> list[str]:
    return [f"- {row['title']}"]


def _decision_dependency(row: Row) -> list[str]:
    return [f"- {row['title']} depends on {row['on']}"]


def _task(row: Row) -> list[str]:
    needs = f" (after {', '.join(row['needs'])})" if row["needs"] else ""
    said = f": {row['description']}" if row["description"] else ""
    return [f"- {row['id']} [{row['role']}, {row['status']}] **{row['title']}**{needs}{said}"]


def _task_min(row: Row) -> list[str]:
    return [f"- {row['id']} [{row['role']}, {row['status']}] {row['title']}"]


def _task_dependency(row: Row) -> list[str]:
    return [
        f"- {row['id']} comes after {row['on']} [{row['role']}, {row['status']}] {row['title']}"
    ]


def _milestone(row: Row) -> list[str]:
    by = f" ({row['actor']})" if row["actor"] else ""
    return [f"- {row['event_type']}: {row['description']}{by}"]


def _summary(row: Row) -> list[str]:
    return [
        f"{row['role']} in {row['phase']}, by {row['agent']} (score {row['score']:.2f}): "
        f"{row['approach']}"
    ]


READS: dict[Scope, Read] = {
    "CASE_HEADER": Read(
        "Story",
        """
        MATCH (s:Story {id: $story})
        WHERE s.title IS NOT NULL AND NOT coalesce(s.status, '') IN ['UNKNOWN', 'DELETED']
        RETURN s.id AS id, s.title AS title, s.status AS status,
               coalesce(s.rigor, 'unknown') AS rigor, coalesce(s.description, '') AS brief,
               coalesce(s.acceptance_criteria, []) AS criteria
        """,
        _case,
        none="Nothing is recorded of this story.",
    ),
    "PLAN_HEADER": Read(
        "Plan",
        _LAST_PLAN
        + """
        OPTIONAL MATCH (p)-[:HAS_SUBTASK]->(t:Subtask) WHERE coalesce(t.status, '') <> 'DELETED'
        RETURN p.id AS id, coalesce(p.version, 1) AS version, p.status AS status,
               count(t) AS total, count(CASE WHEN t.status IN $done THEN 1 END) AS done
        """,
        _plan,
        none="There is no plan yet.",
    ),
    "DECISIONS_GLOBAL": Read("Decisions", _DECISIONS + _DECISION_FIELDS, _decision),
    "DECISIONS_GLOBAL_MIN": Read("Decisions", _DECISIONS + _DECISION_FIELDS, _decision_min),
    "DECISIONS_RELEVANT_ROLE": Read(
        "Decisions that bear on your work",
        _DECISIONS
        + """
        WITH d, EXISTS { (d)-[:AFFECTS]->(:Subtask {id: $subtask}) } AS on_this,
             EXISTS { (d)-[:AFFECTS]->(:Subtask {role: $role}) } OR d.role = $role AS on_role,
             NOT EXISTS { (d)-[:AFFECTS]->(:Subtask) } AS on_all
        WHERE on_this OR on_role OR on_all
        RETURN d.title AS title, d.rationale AS rationale, d.decided_by AS decided_by
        ORDER BY on_this DESC, on_role DESC, d.decided_at DESC, d.id
        """,
        _decision,
    ),
    "DEPS_DECISIONS": Read(
        "How decisions depend on each other",
        _DECISIONS
        + """
        MATCH (d)-[:DEPENDS_ON]->(o:Decision) WHERE coalesce(o.status, '') <> 'DELETED'
        RETURN d.title AS title, o.title AS on ORDER BY d.decided_at DESC, d.id, o.id
        """,
        _decision_dependency,
    ),
    "DEPS_RELEVANT": Read(
        "What your tasks wait for",
        _TASKS
        + _OWN
        + """
        MATCH (t)-[:DEPENDS_ON]->(d:Subtask) WHERE coalesce(d.status, '') <> 'DELETED'
        RETURN t.id AS id, d.id AS on, coalesce(d.title, '') AS title, d.status AS status,
               coalesce(d.role, '') AS role
        ORDER BY t.id <> $subtask, d.status IN $done, coalesce(t.priority, 1), t.id, d.id
        """,
        _task_dependency,
    ),
    "SUBTASKS_ALL": Read("Tasks", _TASKS + _TASK_FIELDS, _task),
    "SUBTASKS_ALL_MIN": Read("Tasks", _TASKS + _TASK_FIELDS, _task_min),
    "SUBTASKS_ROLE": Read("Your tasks", _TASKS + _OWN + _TASK_FIELDS, _task),
    "SUBTASKS_ROLE_MIN": Read("Your tasks", _TASKS + _OWN + _TASK_FIELDS, _task_min),
    "MILESTONES": Read(
        "What happened, newest first",
        """
        MATCH (s:Story {id: $story})
        CALL (s) {
          MATCH (s)<-[:OF]-(e:Event)
          WHERE coalesce(e.status, '') <> 'DELETED' AND NOT e.event_type IN $noise
          RETURN e.event_type AS event_type, e.description AS description, e.actor AS actor,
                 e.timestamp_ms AS at, e.id AS id
          UNION ALL
          MATCH (s)<-[:OF]-(t:PhaseTransition)
          RETURN t.from_phase + ' -> ' + t.to_phase AS event_type,
                 t.event + CASE t.reason WHEN '' THEN '' ELSE ': ' + t.reason END AS description,
                 t.actor AS actor, t.timestamp_ms AS at, t.id AS id
        }
        RETURN event_type, description, actor ORDER BY at DESC, id DESC LIMIT 50
        """,
        _milestone,
    ),
    "SUMMARY_LAST": Read(
        "The last answer of a council",
        """
        MATCH (:Story {id: $story})<-[:OF]-(p:Proposal {rank: 1})
        RETURN p.role AS role, p.phase AS phase, p.agent_id AS agent, p.score AS score,
               p.approach AS approach
        ORDER BY p.recorded_at DESC, p.id LIMIT 1
        """,
        _summary,
    ),
}

NOISE = ["orchestration.round.completed", "orchestration.deliberation.started", "context.updated"]
"""Events that are no milestones to an agent."""


async def read_sections(
    tx: AsyncManagedTransaction, config: Scopes, query: PackQuery
) -> list[Section]:
    """Read the role's scopes, one query each, in the order of their relevance."""
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
        rows = await result.data()
        lines = [line for row in rows for line in read.lines(row)]
        sections.append(Section(scope, lines or ([read.none] if read.none else [])))
    return sections


# --- assembling -----------------------------------------------------------------------------------


def assemble(
    config: Scopes,
    query: PackQuery,
    token_budget: int,
    sections: Sequence[Section],
    redact: Callable[[str], str] = str,
) -> ContextPack:
    """The pack of these sections, most relevant first, that the budget holds.

    `redact` takes secrets out of each line, before it is cut: half of a secret is none by any rule.

    The system block is always there, so a budget smaller than it is exceeded. `scopes` are those
    that kept a line, or had none to lose.
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


def _render(lines: Sequence[tuple[Section, str]]) -> str:
    text: list[str] = []
    scope = ""
    for section, line in lines:
        if section.scope != scope:
            scope = section.scope
            text.append(f"## {READS[section.scope].heading}")
        text.append(line)
    return "\n".join(text)


def _cut(line: str, longest: int) -> str:
    """The line in one paragraph, cut to so many UTF-8 bytes."""
    text = " ".join(line.split())
    if len(text.encode()) <= longest:
        return text
    return text.encode()[: max(0, longest - 3)].decode(errors="ignore") + "…"
