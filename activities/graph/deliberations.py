"""Deliberations, plans and stories, read from the graph after their workflows have ended."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, LiteralString, NamedTuple

from neo4j import AsyncDriver, AsyncManagedTransaction, unit_of_work
from pydantic import ValidationError

from activities.graph.errors import store_errors
from activities.graph.scope_reads import DONE, NOISE, READS
from activities.graph.scopes import Scope
from activities.graph.stories import adopt
from activities.graph.tracing import open_session
from activities.graph.values import (
    Flag,
    Instant,
    MaybeNumber,
    MaybeReal,
    Number,
    Real,
    Row,
    Text,
    Texts,
    text,
)
from workflows.models.agents import Critique, Proposal
from workflows.models.context import PackQuery
from workflows.models.deliberation import (
    Check,
    DeliberationResult,
    FailedAgent,
    RankedProposal,
    RecordedDecision,
)
from workflows.models.plan import Plan

READ_S = 20.0

# The run that was recorded last represents the deliberation.
PROPOSALS = """
MATCH (last:Proposal {deliberation_id: $deliberation_id})
WITH last ORDER BY last.recorded_at DESC, last.run_id LIMIT 1
MATCH (p:Proposal {deliberation_id: $deliberation_id, run_id: last.run_id})
RETURN p {.*} AS proposal,
  COLLECT { MATCH (c:Critique)-[:OF]->(p) RETURN c {.*} ORDER BY c.round, c.id } AS critiques,
  COLLECT { MATCH (k:Check)-[:OF]->(p) RETURN k {.*} ORDER BY k.position, k.id } AS checks,
  COLLECT {
    MATCH (d:Decision)-[:FROM]->(p) RETURN d {.*} ORDER BY size(toStringOrNull(d.id)), d.id
  } AS decisions
ORDER BY p.rank
"""

LAST_PLAN = """
MATCH (:Case {id: $story_id})-[:HAS_PLAN]->(p:PlanVersion)
WHERE coalesce(p.status, '') <> 'DELETED'
RETURN p.id AS id ORDER BY coalesce(p.version, 0) DESC, p.id DESC LIMIT 1
"""

# The tasks as the story's workflow numbered them, regardless of their current state.
STORYS_PLAN = """
MATCH (:Story {id: $story_id})-[:HAS_PLAN]->(p:PlanVersion)
WHERE p.id STARTS WITH $prefix AND coalesce(p.status, '') <> 'DELETED'
WITH p ORDER BY coalesce(p.version, 0) DESC LIMIT 1
RETURN p.id AS plan_id, coalesce(p.version, 1) AS version,
  COLLECT {
    MATCH (p)-[:HAS_SUBTASK]->(t:Subtask)
    WHERE t.id STARTS WITH p.id + '-t' AND coalesce(t.status, '') <> 'DELETED'
    RETURN {
      task_id: t.id, role: t.role, title: coalesce(t.title, t.id),
      description: t.description, priority: coalesce(t.priority, 1),
      depends_on: COLLECT {
        MATCH (t)-[:DEPENDS_ON]->(d:Subtask)<-[:HAS_SUBTASK]-(p)
        RETURN d.id ORDER BY size(toStringOrNull(d.id)), d.id
      }
    } ORDER BY size(t.id), t.id
  } AS tasks
"""

FAILED = """
MATCH (d:Deliberation {id: $deliberation_id}) WHERE d.status = 'FAILED' RETURN d {.*} AS node
"""


class Ended(NamedTuple):
    """A stored deliberation. `ended_ms`: when it ended; `error_type`: why it failed, else empty."""

    result: DeliberationResult
    ended_ms: int
    error_type: str = ""


async def find_ended(driver: AsyncDriver, deliberation_id: str) -> Ended | None:
    """Return a completed deliberation, or else a failed one; None if the graph has neither.

    A failed one has its causes as `error`, and the agents that failed.

    Raises:
        ApplicationError: by `errors.TABLE`.
    """
    if found := await find_deliberation(driver, deliberation_id):
        return Ended(found, max(each.created_at_ms for each in found.ranked))
    rows = await _read(driver, FAILED, deliberation_id=deliberation_id)
    if not rows:
        return None
    node = _FailedRow.model_validate(rows[0]["node"])
    failed = DeliberationResult(
        task_id=node.task_id,
        deliberation_id=deliberation_id,
        story_id=node.story_id,
        role=node.role,
        status="failed",
        error=node.error,
        failed_agents=_failed_agents(node.failed_agents),
        duration_ms=node.duration_ms,
    )
    return Ended(
        failed, int(node.ended_at.timestamp() * 1000) if node.ended_at else 0, node.error_type
    )


async def find_deliberation(driver: AsyncDriver, deliberation_id: str) -> DeliberationResult | None:
    """Return a completed deliberation's result; None if the graph has none with that id.

    The graph, and thus the result, lacks the duration, the costs of the calls, and the decisions of
    proposals that did not win. A proposal's time is the time when it was recorded.

    Raises:
        ApplicationError: by `errors.TABLE`, as in every function here.
    """
    found = await _read(driver, PROPOSALS, deliberation_id=deliberation_id)
    if not found:
        return None
    rows = sorted((_RankedRow.model_validate(row) for row in found), key=lambda row: row.order)
    decisions = [_decision(each) for row in rows for each in row.decisions]
    ranked = [_ranked(row) for row in rows]
    first = rows[0].proposal
    return DeliberationResult(
        task_id=first.task_id,
        deliberation_id=deliberation_id,
        story_id=first.story_id,
        role=first.role,
        status="completed",
        winner_id=ranked[0].agent_id,
        score=ranked[0].score,
        winner=ranked[0].proposal,
        judged=first.judged,
        failed_agents=_failed_agents(first.failed_agents),
        decisions=decisions,
        ranked=ranked,
    )


async def find_plan(driver: AsyncDriver, story_id: str) -> Plan | None:
    """Return the last plan that the story's workflow derived, in its original form, or None."""
    rows = await _read(driver, STORYS_PLAN, story_id=story_id, prefix=f"{story_id}-plan-")
    if not rows or not rows[0]["tasks"]:
        return None
    return Plan(story_id=story_id, **_PlanRow.model_validate(rows[0]).model_dump())


async def last_plan(driver: AsyncDriver, story_id: str) -> str:
    """Return the id of the story's newest plan, or an empty text."""
    rows = await _read(driver, LAST_PLAN, story_id=story_id)
    return text(rows[0]["id"]) if rows else ""


async def history(
    driver: AsyncDriver, query: PackQuery, scopes: Sequence[Scope], most_events: int
) -> str:
    """Render the scopes of a story as Markdown, newest first.

    Args:
        driver: Neo4j.
        query: the story, role and subtask.
        scopes: the scopes to read.
        most_events: the maximum number of lines of MILESTONES.
    """
    parts = []
    for scope in scopes:
        read = READS[scope]
        found = await _read(
            driver,
            read.cypher,
            story=query.story_id,
            role=query.role,
            subtask=query.subtask_id,
            noise=NOISE,
            done=DONE,
        )
        rows = read.rows([each["row"] for each in found])
        if scope == "MILESTONES":
            rows = rows[:most_events]
        if lines := [line for row in rows for line in read.lines(row)]:
            parts.append("\n".join([f"## {read.heading}", *lines]))
    return "\n\n".join(parts)


class _PlannedRow(Row):
    task_id: Text
    role: Text
    title: Text
    description: Text
    priority: Number
    depends_on: Texts


class _PlanRow(Row):
    plan_id: Text
    version: Number
    tasks: list[_PlannedRow]


class _FailedRow(Row):
    task_id: Text = ""
    story_id: Text = ""
    role: Text = ""
    error: Text = ""
    error_type: Text = ""
    failed_agents: Texts = []
    duration_ms: Number = 0
    ended_at: Instant = None


class _ProposalRow(Row):
    id: Text
    task_id: Text = ""
    story_id: Text = ""
    agent_id: Text = ""
    role: Text = ""
    approach: Text = ""
    content: Text = ""
    drafts: Texts = []
    score: Real = 0.0
    rank: Number = 0
    barred: Flag = False
    prompt_hash: Text = ""
    model: Text = ""
    judged: Text = ""
    failed_agents: Texts = []
    recorded_at: Instant = None


class _CritiqueRow(Row):
    critic: Text = ""
    verdict: Text = ""
    points: Texts = []
    suggestion: Text = ""


class _DecisionRow(Row):
    id: Text
    type: Text = ""
    title: Text = ""
    rationale: Text = ""
    affects: Texts = []


class _CheckRow(Row):
    name: Text = ""
    outcome: Text = ""
    score: MaybeReal = None
    blocking: Flag = False
    findings: Texts = []
    errors: Number = 0
    warnings: Number = 0
    output: Text = ""
    exit_code: MaybeNumber = None


class _RankedRow(Row):
    proposal: _ProposalRow
    critiques: list[_CritiqueRow]
    checks: list[_CheckRow]
    decisions: list[_DecisionRow]

    @property
    def order(self) -> int:
        """Sort key: the winner first, proposals without a rank last."""
        return self.proposal.rank or 2**31


def _ranked(row: _RankedRow) -> RankedProposal:
    """Convert a proposal; skip critiques and checks in a form that this product does not write."""
    node = row.proposal
    critiques = [(each.critic, critique) for each in row.critiques if (critique := _critique(each))]
    checks = [check for each in row.checks if (check := _check(each))]
    return RankedProposal(
        proposal_id=node.id,
        agent_id=node.agent_id,
        role=node.role,
        proposal=Proposal(approach=node.approach, content=node.content),
        drafts=node.drafts,
        critiques=[critique for _, critique in critiques],
        critics=[critic for critic, _ in critiques],
        checks=checks,
        score=node.score,
        rank=node.rank,
        barred=node.barred,
        prompt_hash=node.prompt_hash,
        model=node.model,
        created_at_ms=int(node.recorded_at.timestamp() * 1000) if node.recorded_at else 0,
    )


def _critique(row: _CritiqueRow) -> Critique | None:
    points = [point.partition(": ") for point in row.points]
    try:
        return Critique.model_validate(
            {
                "verdict": row.verdict,
                "points": [{"severity": severity, "text": text} for severity, _, text in points],
                "suggestion": row.suggestion,
            }
        )
    except ValidationError:
        return None


def _check(row: _CheckRow) -> Check | None:
    try:
        return Check.model_validate(row.model_dump())
    except ValidationError:
        return None


def _failed_agents(entries: list[str]) -> list[FailedAgent]:
    """Parse the agents that failed; skip entries in a form that this product does not write."""
    found = []
    for each in entries:
        with suppress(ValidationError):
            found.append(FailedAgent.model_validate_json(each))
    return found


def _decision(row: _DecisionRow) -> RecordedDecision:
    return RecordedDecision(
        id=row.id,
        type=row.type or "DESIGN",
        title=row.title,
        rationale=row.rationale,
        affects=row.affects,
    )


async def _read(
    driver: AsyncDriver, cypher: LiteralString, **parameters: Any
) -> list[dict[str, Any]]:
    with store_errors():
        for name in ("story", "story_id"):
            if name in parameters:
                await adopt(driver, [parameters[name]])
        async with open_session(driver) as session:
            return await session.execute_read(_rows, cypher, parameters)


@unit_of_work(timeout=READ_S)
async def _rows(
    tx: AsyncManagedTransaction, cypher: LiteralString, parameters: dict[str, Any]
) -> list[dict[str, Any]]:
    return await (await tx.run(cypher, parameters)).data()
