"""The provenance of a line in a story's branch: the proposal that it is part of, as stored."""

from __future__ import annotations

from typing import Any

from neo4j import AsyncDriver

from activities.graph.provenance import (
    CRITERIA,
    Checked,
    Objection,
    Passed,
    Proved,
    approved_since,
)
from activities.graph.values import MaybeReal, Number, Row, Text, Texts, TimeText
from workflows.models.workspace import BlamedLine

PROPOSALS = (
    """
MATCH (s:Story {id: $story_id})<-[:OF]-(p:Proposal {task_id: $task_id, agent_id: $agent_id})
OPTIONAL MATCH (c:Change)-[:FROM]->(p)
OPTIONAL MATCH (r:Report)-[:OF]->(c)
WITH s, p, head(collect(c)) AS c, head(collect(r)) AS r
RETURN p {.*} AS proposal, coalesce(c {.*}, {}) AS change, coalesce(r {.*}, {}) AS report,
  [(d:Decision)-[:FROM]->(p) | d {.*}] AS decisions,
  [(k:Critique)-[:OF]->(p) | k {.*}] AS critiques,
  [(k:Check)-[:OF]->(p) | k {.*}] AS checks,
  [(g:GateApproval)-[:OF]->(s) | g {.*}] AS approvals,
  """
    + CRITERIA
    + """
ORDER BY p.recorded_at DESC, p.id DESC
"""
)


class Decided(Row):
    """A decision of the proposal."""

    id: Text
    title: Text = ""
    rationale: Text = ""


class Measured(Row):
    """The fleet's report of the change. `score`: None if it was not measured."""

    score: MaybeReal = None
    gating_decision: Text = ""
    reasons: Texts = []


class ChangedBy(Row):
    """A proposal that changed files: who made it, how it was judged, and who approved it after.

    Attributes:
        commit: the change's last commit; empty if the graph does not have it.
        rank: 1: it won.
    """

    deliberation_id: Text = ""
    role: Text = ""
    approach: Text = ""
    score: MaybeReal = None
    rank: Number = 0
    revision: Number = 0
    judged: Text = ""
    recorded_at: TimeText = ""
    commit: Text = ""
    report: Measured = Measured()
    decisions: list[Decided] = []
    critiques: list[Objection] = []
    checks: list[Checked] = []
    passed_by: list[Passed] = []
    criteria: list[Proved] = []


class LineReason(Row):
    """A line of a story's branch, and the agent's commit that wrote it.

    Attributes:
        line: the line, and the commit with the fleet's trailers.
        change: the proposal that the commit is part of; None if the graph does not have it.
    """

    story_id: str
    line: BlamedLine
    change: ChangedBy | None = None


async def find_changes(
    driver: AsyncDriver, story_id: str, task_id: str, agent_id: str
) -> list[ChangedBy]:
    """Return an agent's proposals for a task, the newest first; may be empty.

    Args:
        driver: Neo4j.
        story_id: the story.
        task_id: its task.
        agent_id: the agent.
    """
    records, _, _ = await driver.execute_query(
        PROPOSALS, story_id=story_id, task_id=task_id, agent_id=agent_id, routing_="r"
    )
    return [_changed_by(record.data()) for record in records]


def _changed_by(row: dict[str, Any]) -> ChangedBy:
    found = ChangedBy.model_validate(
        row["proposal"]
        | {"commit": row["change"].get("commit"), "report": row["report"]}
        | {name: row[name] for name in ("decisions", "critiques", "checks", "criteria")}
        | {"passed_by": row["approvals"]}
    )
    return found.model_copy(
        update={
            "decisions": sorted(found.decisions, key=lambda each: each.id),
            "critiques": sorted(found.critiques, key=lambda each: (each.round, each.critic)),
            "checks": sorted(found.checks, key=lambda each: each.name),
            "passed_by": approved_since(found.passed_by, found.recorded_at),
            "criteria": sorted(found.criteria, key=lambda each: each.number),
        }
    )
