"""The record of a deliberation: its proposals, critiques, checks, changes and decisions."""

from __future__ import annotations

import json
from typing import LiteralString

from activities.graph.changes import OF_STORY, Write, key, order_key, parse_timestamp
from activities.graph.decisions import decision_links, decision_write
from activities.graph.plans import plan_write
from workflows.models.deliberation import DeliberationRecord, RankedProposal
from workflows.models.ids import deliberation_workflow_id
from workflows.timestamps import format_timestamp

DIMENSIONS = ("build", "unit", "e2e", "coverage", "lint", "static")

PROPOSAL = (
    """
MERGE (n:Proposal {id: row.id}) ON CREATE SET n += row.node
MERGE (a:Agent {id: row.agent_id}) ON CREATE SET a.role = row.role
MERGE (n)-[:BY]->(a)
"""
    + OF_STORY
)

CRITIQUE = """
MATCH (p:Proposal {id: row.proposal_id})
MERGE (n:Critique {id: row.id}) ON CREATE SET n += row.node
MERGE (n)-[:OF]->(p)
"""

CHECK = """
MATCH (p:Proposal {id: row.proposal_id})
MERGE (n:Check {id: row.id}) ON CREATE SET n += row.node
MERGE (n)-[:OF]->(p)
"""

CHANGE = (
    """
MATCH (p:Proposal {id: row.proposal_id})
MERGE (n:Change {id: row.id}) ON CREATE SET n += row.node
MERGE (n)-[:FROM]->(p)
WITH n, row
"""
    + OF_STORY
)

REPORT = """
MATCH (c:Change {id: row.change_id})
MERGE (n:Report {id: row.id}) ON CREATE SET n += row.node
MERGE (n)-[:OF]->(c)
"""

_SUPERSEDED: LiteralString = """
WITH p ORDER BY p.recorded_at DESC, p.run_id
WITH collect(p)[1..] AS earlier UNWIND earlier AS p
MATCH (d:Decision {status: 'ACCEPTED'})-[:FROM]->(p) WHERE d.recorded_by IS NULL
SET d.status = 'SUPERSEDED'
"""

SUPERSEDED_OF_TASK = (
    """
MATCH (p:Proposal {deliberation_id: row.deliberation_id, story_id: row.story_id, rank: 1})
"""
    + _SUPERSEDED
)
"""Of a task that was tried again, only the last council's decisions count."""

SUPERSEDED_OF_STATE = (
    """
MATCH (p:Proposal {story_id: row.story_id, phase: row.phase, rank: 1})
WHERE p.deliberation_id STARTS WITH row.prefix
"""
    + _SUPERSEDED
)
"""Of a state that was entered again, only the last council's decisions count."""

DECISION_FROM = """
MATCH (d:Decision {case_id: row.story_id, id: row.id})
MATCH (p:Proposal {id: row.proposal_id})
MERGE (d)-[:FROM]->(p)
"""

PLAN_DECISION = """
MATCH (p:PlanVersion {case_id: row.story_id, id: row.plan_id})
MATCH (d:Decision {case_id: row.story_id, id: row.id})
MERGE (p)-[:CONTAINS_DECISION]->(d)
"""


def deliberation_writes(record: DeliberationRecord) -> list[Write]:
    """Return what a finished deliberation writes: proposals first, then the nodes attached to them.

    Agents are ordered by id, so that two deliberations of one council cannot deadlock.
    """
    story = key("story_id", record.story_id)
    at = parse_timestamp(record.timestamp, f"deliberation {record.deliberation_id}: timestamp")
    ranked = sorted(record.ranked, key=lambda each: each.agent_id)
    winner = next((each.proposal_id for each in record.ranked if each.rank == 1), "")
    found = [_proposal(record, each) for each in ranked]
    found += [write for each in ranked for write in _critiques(each)]
    found += [write for each in ranked for write in _checks(each)]
    found += [write for each in ranked for write in _change(record, each)]
    plan_id = key("plan_id", record.plan_id) if story else ""
    if plan_id:
        found.append(plan_write(story, plan_id))
    for decision in record.decisions:
        row = {"story_id": story, "id": decision.id}
        found.append(
            decision_write(
                story,
                decision,
                record.role,
                record.winner_id,
                format_timestamp(at),
                order_key(at, 0, 0),
            )
        )
        found.append(Write(DECISION_FROM, row | {"proposal_id": winner}))
        if plan_id:
            found.append(Write(PLAN_DECISION, row | {"plan_id": plan_id}))
    if story:
        found.append(_superseded(record))
    return found + decision_links(story, record.decisions)


def _superseded(record: DeliberationRecord) -> Write:
    """Return the write that lets a deliberation's decisions replace those of the ones before it."""
    row = {
        "story_id": record.story_id,
        "deliberation_id": record.deliberation_id,
        "phase": record.phase,
        "prefix": deliberation_workflow_id(f"{record.story_id}-{record.phase.lower()}-"),
    }
    of_state = not record.plan_id and record.deliberation_id.startswith(row["prefix"])
    return Write(SUPERSEDED_OF_STATE if of_state else SUPERSEDED_OF_TASK, row)


def _proposal(record: DeliberationRecord, ranked: RankedProposal) -> Write:
    node = ranked.model_dump(
        include={"agent_id", "role", "score", "rank", "barred", "prompt_hash", "model", "drafts"}
    ) | {
        "story_id": record.story_id,
        "deliberation_id": record.deliberation_id,
        "run_id": record.run_id,
        "task_id": record.task_id,
        "phase": record.phase,
        "revision": len(ranked.drafts),
        "approach": ranked.proposal.approach,
        "content": ranked.proposal.content,
        "judged": record.judged if ranked.rank == 1 else "",
        "failed_agents": [each.model_dump_json() for each in record.failed_agents]
        if ranked.rank == 1
        else [],
        "recorded_at": format_timestamp(parse_timestamp(record.timestamp, "timestamp")),
    }
    row = {
        "id": key("proposal_id", ranked.proposal_id),
        "story_id": record.story_id,
        "agent_id": key("agent_id", ranked.agent_id),
        "role": ranked.role,
        "node": node,
    }
    return Write(PROPOSAL, row)


def _critiques(ranked: RankedProposal) -> list[Write]:
    """Return a write for each critic and round; ids of a critic's second end in `/2`."""
    rounds: dict[str, int] = {}
    found = []
    critics = [*ranked.critics, *["unknown"] * len(ranked.critiques)]
    for critique, critic in zip(ranked.critiques, critics, strict=False):
        rounds[critic] = rounds.get(critic, 0) + 1
        suffix = f"/{rounds[critic]}" if rounds[critic] > 1 else ""
        node = {
            "critic": critic,
            "round": rounds[critic],
            "verdict": critique.verdict,
            "points": [f"{point.severity}: {point.text}" for point in critique.points],
            "suggestion": critique.suggestion,
        }
        row = {
            "id": f"{ranked.proposal_id}/critique/{critic}{suffix}",
            "proposal_id": ranked.proposal_id,
            "node": node,
        }
        found.append(Write(CRITIQUE, row))
    return found


def _checks(ranked: RankedProposal) -> list[Write]:
    return [
        Write(
            CHECK,
            {
                "id": f"{ranked.proposal_id}/check/{check.name}",
                "proposal_id": ranked.proposal_id,
                "node": check.model_dump() | {"position": position},
            },
        )
        for position, check in enumerate(ranked.checks)
    ]


def _change(record: DeliberationRecord, ranked: RankedProposal) -> list[Write]:
    """Return a write of what a proposal changes in a repository, and one of its measurement."""
    change, measurement, scored = ranked.change, ranked.measurement, ranked.scored
    if not (change and measurement and scored):
        return []
    change_id = f"{ranked.proposal_id}/change"
    node = change.model_dump(include={"commit", "base", "insertions", "deletions"}) | {
        "story_id": record.story_id,
        "files": [file.path for file in change.files],
    }
    report = scored.model_dump(include={"score", "rigor", "gating_decision", "reasons"}) | {
        "commit": measurement.commit,
        "base": measurement.base,
        "seconds": measurement.seconds,
        "measured_by": "fleet",
        "broken": measurement.broken,
        "dimensions": [
            json.dumps({"dimension": name} | getattr(measurement, name).model_dump(mode="json"))
            for name in DIMENSIONS
        ],
    }
    row = {"id": change_id, "proposal_id": ranked.proposal_id, "story_id": record.story_id}
    return [
        Write(CHANGE, row | {"node": node}),
        Write(
            REPORT,
            {"id": f"{ranked.proposal_id}/report", "change_id": change_id, "node": report},
        ),
    ]
