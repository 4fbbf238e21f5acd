"""What the graph tells of deliberations, plans and stories when no workflow does any more."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, LiteralString, NamedTuple

from neo4j import AsyncDriver, AsyncManagedTransaction, unit_of_work

from activities.context import DONE, NOISE, READS, Scope
from activities.graph.errors import store_errors
from workflows.models import (
    Check,
    Critique,
    CritiquePoint,
    DeliberationResult,
    PackQuery,
    Plan,
    Proposal,
    RankedProposal,
    RecordedDecision,
)

READ_S = 20.0

# A deliberation's last run stands for it: the one that was recorded last.
PROPOSALS = """
MATCH (last:Proposal {deliberation_id: $deliberation_id})
WITH last ORDER BY last.recorded_at DESC, last.run_id LIMIT 1
MATCH (p:Proposal {deliberation_id: $deliberation_id, run_id: last.run_id})
RETURN p {.*} AS proposal,
  COLLECT { MATCH (c:Critique)-[:OF]->(p) RETURN c {.*} ORDER BY c.round, c.id } AS critiques,
  COLLECT { MATCH (k:Check)-[:OF]->(p) RETURN k {.*} ORDER BY k.id } AS checks,
  COLLECT {
    MATCH (d:Decision)-[:FROM]->(p) RETURN d {.*} ORDER BY size(toStringOrNull(d.id)), d.id
  } AS decisions
ORDER BY p.rank
"""

STORY = """
MATCH (s:Story {id: $story_id}) WHERE coalesce(s.status, '') <> 'DELETED' RETURN s.id AS id
"""

LAST_PLAN = """
MATCH (:Case {id: $story_id})-[:HAS_PLAN]->(p:PlanVersion)
WHERE coalesce(p.status, '') <> 'DELETED'
RETURN p.id AS id ORDER BY coalesce(p.version, 0) DESC, p.id DESC LIMIT 1
"""

# The tasks as the story's workflow numbers them, whatever became of them since.
STORYS_PLAN = """
MATCH (:Story {id: $story_id})-[:HAS_PLAN]->(p:PlanVersion)
WHERE p.id STARTS WITH $prefix AND p.status <> 'DELETED'
WITH p ORDER BY coalesce(p.version, 0) DESC LIMIT 1
RETURN p.id AS plan_id, $story_id AS story_id, coalesce(p.version, 1) AS version,
  COLLECT {
    MATCH (p)-[:HAS_SUBTASK]->(t:Subtask)
    WHERE t.id STARTS WITH p.id + '-t' AND t.status <> 'DELETED'
    RETURN {
      task_id: t.id, role: coalesce(t.role, ''), title: coalesce(t.title, t.id),
      description: coalesce(t.description, ''), priority: coalesce(t.priority, 1),
      depends_on: COLLECT {
        MATCH (t)-[:DEPENDS_ON]->(d:Subtask)<-[:HAS_SUBTASK]-(p)
        RETURN d.id ORDER BY size(d.id), d.id
      }
    } ORDER BY size(t.id), t.id
  } AS tasks
"""

FAILED = """
MATCH (d:Deliberation {id: $deliberation_id}) WHERE d.status = 'FAILED' RETURN d {.*} AS node
"""

CHECKS = ("policy", "lint", "dry_run")
"""In the order that they are made in."""


class Ended(NamedTuple):
    """A deliberation that the graph knows. ended_ms: when. error_type: what it failed of."""

    result: DeliberationResult
    ended_ms: int
    error_type: str = ""


async def find_ended(driver: AsyncDriver, deliberation_id: str) -> Ended | None:
    """A deliberation that was completed, or else that failed; None: the graph knows none.

    Of one that failed: its causes, as `error`.

    Raises:
        ApplicationError: by `errors.TABLE`.
    """
    if found := await find_deliberation(driver, deliberation_id):
        return Ended(found, max(each.created_at_ms for each in found.ranked))
    rows = await _read(driver, FAILED, deliberation_id=deliberation_id)
    if not rows:
        return None
    node = rows[0]["node"]
    failed = DeliberationResult(
        task_id=node["task_id"],
        deliberation_id=deliberation_id,
        story_id=node.get("story_id") or "",
        role=node["role"],
        status="failed",
        error=node["error"],
        duration_ms=node["duration_ms"],
    )
    ended = datetime.fromisoformat(node["ended_at"])
    return Ended(failed, int(ended.timestamp() * 1000), node["error_type"])


async def find_deliberation(driver: AsyncDriver, deliberation_id: str) -> DeliberationResult | None:
    """A completed deliberation's result; None where the graph has none of that id.

    Not kept in the graph, and so not told: its duration, who failed in it, what its calls cost,
    what a proposal's decisions were unless it won. A proposal's time is when it was recorded.

    Raises:
        ApplicationError: by `errors.TABLE`, as in every function here.
    """
    rows = await _read(driver, PROPOSALS, deliberation_id=deliberation_id)
    if not rows:
        return None
    decisions = [_decision(each) for row in rows for each in row["decisions"]]
    ranked = [_ranked(row) for row in rows]
    first = rows[0]["proposal"]
    return DeliberationResult(
        task_id=first["task_id"],
        deliberation_id=deliberation_id,
        story_id=first.get("story_id") or "",
        role=first["role"],
        status="completed",
        winner_id=ranked[0].agent_id,
        score=ranked[0].score,
        winner=ranked[0].proposal,
        judged=first.get("judged") or "",
        decisions=decisions,
        ranked=ranked,
    )


async def find_plan(driver: AsyncDriver, story_id: str) -> Plan | None:
    """The last plan that the story's workflow derived, as it derived it; None: it has none."""
    rows = await _read(driver, STORYS_PLAN, story_id=story_id, prefix=f"{story_id}-plan-")
    return Plan.model_validate(rows[0]) if rows and rows[0]["tasks"] else None


async def has_story(driver: AsyncDriver, story_id: str) -> bool:
    """Whether the graph knows the story."""
    return bool(await _read(driver, STORY, story_id=story_id))


async def last_plan(driver: AsyncDriver, story_id: str) -> str:
    """The id of the story's newest plan; empty where it has none."""
    rows = await _read(driver, LAST_PLAN, story_id=story_id)
    return str(rows[0]["id"]) if rows else ""


async def history(
    driver: AsyncDriver, query: PackQuery, scopes: Sequence[Scope], most_events: int
) -> str:
    """The scopes of a story as Markdown, newest first; `most_events`: lines of MILESTONES."""
    parts = []
    for scope in scopes:
        read = READS[scope]
        rows = await _read(
            driver,
            read.cypher,
            story=query.story_id,
            role=query.role,
            subtask=query.subtask_id,
            noise=NOISE,
            done=DONE,
        )
        if scope == "MILESTONES":
            rows = rows[:most_events]
        if lines := [line for row in rows for line in read.lines(row)]:
            parts.append("\n".join([f"## {read.heading}", *lines]))
    return "\n\n".join(parts)


def _ranked(row: dict[str, Any]) -> RankedProposal:
    node = row["proposal"]
    recorded_at = datetime.fromisoformat(node["recorded_at"])
    return RankedProposal(
        proposal_id=node["id"],
        agent_id=node["agent_id"],
        role=node["role"],
        proposal=Proposal(approach=node["approach"], content=node["content"]),
        drafts=node.get("drafts") or [],
        critiques=[_critique(each) for each in row["critiques"]],
        critics=[each["critic"] for each in row["critiques"]],
        checks=sorted(
            (Check.model_validate(each) for each in row["checks"]),
            key=lambda check: CHECKS.index(check.name),
        ),
        score=node["score"],
        rank=node["rank"],
        barred=node["barred"],
        prompt_hash=node.get("prompt_hash") or "",
        model=node.get("model") or "",
        created_at_ms=int(recorded_at.timestamp() * 1000),
    )


def _critique(node: dict[str, Any]) -> Critique:
    points = [point.partition(": ") for point in node.get("points") or []]
    return Critique(
        verdict=node["verdict"],
        points=[
            CritiquePoint.model_validate({"severity": severity, "text": text})
            for severity, _, text in points
        ],
        suggestion=node.get("suggestion") or "",
    )


def _decision(node: dict[str, Any]) -> RecordedDecision:
    return RecordedDecision(
        id=node["id"],
        type=node.get("type") or "DESIGN",
        title=node["title"],
        rationale=node.get("rationale") or "",
        affects=node.get("affects") or [],
    )


async def _read(
    driver: AsyncDriver, cypher: LiteralString, **parameters: Any
) -> list[dict[str, Any]]:
    with store_errors():
        async with driver.session() as session:
            return await session.execute_read(_rows, cypher, parameters)


@unit_of_work(timeout=READ_S)
async def _rows(
    tx: AsyncManagedTransaction, cypher: LiteralString, parameters: dict[str, Any]
) -> list[dict[str, Any]]:
    return await (await tx.run(cypher, parameters)).data()
