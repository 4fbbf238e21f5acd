"""The provenance of a decision, as stored in the graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from neo4j import AsyncDriver

from activities.graph.values import MaybeReal, Number, Row, Text, Texts, TimeText, instant

CRITERIA = """[(criterion:Criterion)-[:OF]->(s) | criterion {.*, tests:
    [(proof:AcceptanceTest)-[:PROVES]->(criterion) WHERE proof.commit = criterion.commit
     | proof.name]}] AS criteria"""
"""The criteria of a story `s`, with the tests that prove them at the commit measured last."""

PROVENANCE = (
    """
MATCH (d:Decision {id: $decision_id}) WHERE $story_id = '' OR d.case_id = $story_id
OPTIONAL MATCH (d)-[:FROM]->(p:Proposal)
OPTIONAL MATCH (p)-[:BY]->(a:Agent)
OPTIONAL MATCH (d)-[:OF]->(s:Story)
RETURN d {.*} AS decision, coalesce(p {.*}, {}) AS proposal, coalesce(a {.*}, {}) AS agent,
  [(d)-[:AFFECTS]->(t:Subtask) | t.title] AS affects,
  [(c:Critique)-[:OF]->(p) | c {.*}] AS critiques,
  [(k:Check)-[:OF]->(p) | k {.*}] AS checks,
  [(s)<-[:OF]-(g:GateApproval) | g {.*}] AS approvals,
  """
    + CRITERIA
    + """
ORDER BY d.case_id, elementId(d)
"""
)


class Objection(Row):
    """A critique of the proposal. `points`: `severity: text`."""

    critic: Text = ""
    round: Number = 1
    verdict: Text = ""
    points: Texts = []
    suggestion: Text = ""


class Checked(Row):
    """A check of the proposal."""

    name: Text = ""
    outcome: Text = ""
    score: MaybeReal = None
    findings: Texts = []


class Proved(Row):
    """An acceptance criterion of the story, and the tests that prove it.

    Attributes:
        why: why it is not proved; empty if it is.
    """

    number: Number = 0
    text: Text = ""
    why: Text = ""
    tests: Texts = []


class Passed(Row):
    """An approval of a gate after the decision. `at`: ISO 8601. `via`: how the actor is known."""

    gate: Text = ""
    actor: Text = ""
    via: Text = ""
    role: Text = ""
    comment: Text = ""
    revision: Text = ""
    at: TimeText = ""


class Why(Row):
    """A decision: who proposed it, with which prompt and model, and what followed."""

    decision_id: Text
    story_id: Text = ""
    title: Text
    rationale: Text = ""
    decided_at: TimeText = ""
    proposed_by: Text = ""
    recorded_by: Text = ""
    """The owner of the token that it came with, if it is another name."""
    role: Text = ""
    model: Text = ""
    prompt_hash: Text = ""
    deliberation_id: Text = ""
    score: MaybeReal = None
    revision: Number = 0
    approach: Text = ""
    judged: Text = ""
    affects: Texts = []
    critiques: list[Objection] = []
    checks: list[Checked] = []
    passed_by: list[Passed] = []
    criteria: list[Proved] = []


async def find_why(driver: AsyncDriver, decision_id: str, story_id: str = "") -> list[Why]:
    """Return every decision with that id, one for each story that has it; may be empty."""
    records, _, _ = await driver.execute_query(
        PROVENANCE,
        decision_id=decision_id,
        story_id=story_id,
        routing_="r",
    )
    return [_why(record.data()) for record in records]


def _why(row: dict[str, Any]) -> Why:
    decision, proposal, agent = row["decision"], row["proposal"], row["agent"]
    why = Why(
        decision_id=decision["id"],
        story_id=decision.get("case_id"),
        title=decision.get("title"),
        rationale=decision.get("rationale"),
        decided_at=decision.get("decided_at"),
        proposed_by=agent.get("id") or decision.get("decided_by"),
        recorded_by=decision.get("recorded_by"),
        role=decision.get("role") or agent.get("role"),
        model=proposal.get("model"),
        prompt_hash=proposal.get("prompt_hash"),
        deliberation_id=proposal.get("deliberation_id"),
        score=proposal.get("score"),
        revision=proposal.get("revision"),
        approach=proposal.get("approach"),
        judged=proposal.get("judged"),
        affects=row["affects"],
        critiques=row["critiques"],
        checks=row["checks"],
        passed_by=row["approvals"],
        criteria=row["criteria"],
    )
    same_name = decision.get("recorded_by") == decision.get("decided_by")
    return why.model_copy(
        update={
            "recorded_by": "" if same_name else why.recorded_by,
            "affects": sorted(title for title in why.affects if title),
            "critiques": sorted(why.critiques, key=lambda each: (each.round, each.critic)),
            "checks": sorted(why.checks, key=lambda each: each.name),
            "passed_by": approved_since(why.passed_by, why.decided_at),
            "criteria": sorted(why.criteria, key=lambda each: each.number),
        }
    )


def approved_since(approvals: Iterable[Passed], at: str) -> list[Passed]:
    """Return the approvals that did not come before a time, in order."""
    since = (each for each in approvals if not _before(each.at, at))
    return sorted(since, key=lambda each: each.at)


def _before(at: str, decided_at: str) -> bool:
    """Return whether an approval came before the decision, and thus did not approve it.

    Returns False if a time cannot be parsed.
    """
    approved, decided = instant(at), instant(decided_at)
    return approved is not None and decided is not None and approved < decided
