"""Why a decision was made, from the graph's provenance (design section 4)."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from workflows.models import Wire

if TYPE_CHECKING:
    from neo4j import AsyncDriver  # at run time it is the caller's: it is slow to import

PROVENANCE = """
MATCH (d:Decision {id: $decision_id}) WHERE $story_id = '' OR d.case_id = $story_id
OPTIONAL MATCH (d)-[:FROM]->(p:Proposal)
OPTIONAL MATCH (p)-[:BY]->(a:Agent)
RETURN d {.*} AS decision, p {.*} AS proposal, a {.*} AS agent,
  [(d)-[:AFFECTS]->(t:Subtask) | t.title] AS affects,
  [(c:Critique)-[:OF]->(p) | c {.*}] AS critiques,
  [(k:Check)-[:OF]->(p) | k {.*}] AS checks,
  [(d)-[:OF]->(:Story)<-[:OF]-(g:GateApproval) | g {.*}] AS approvals
ORDER BY d.case_id
"""


class Objection(Wire):
    """A critique of the proposal. points: `severity: text`."""

    critic: str = ""
    round: int = 1
    verdict: str = ""
    points: list[str] = []
    suggestion: str = ""


class Checked(Wire):
    """A check of the proposal."""

    name: str
    outcome: str
    score: float | None = None
    findings: list[str] = []


class Passed(Wire):
    """An approval of a gate after the decision. at: ISO 8601."""

    gate: str
    actor: str
    role: str
    comment: str = ""
    revision: str = ""
    at: str = ""


class Why(Wire):
    """A decision: who proposed it, on which prompt and model, what followed."""

    decision_id: str
    story_id: str = ""
    title: str
    rationale: str = ""
    decided_at: str = ""
    proposed_by: str = ""
    recorded_by: str = ""
    """Whose token it came with, where that is another name."""
    role: str = ""
    model: str = ""
    prompt_hash: str = ""
    deliberation_id: str = ""
    score: float | None = None
    revision: int = 0
    approach: str = ""
    judged: str = ""
    affects: list[str] = []
    critiques: list[Objection] = []
    checks: list[Checked] = []
    passed_by: list[Passed] = []


async def why(driver: AsyncDriver, decision_id: str, story_id: str = "") -> list[Why]:
    """Every decision of that id, one for each story that has it; none where there is none."""
    records, _, _ = await driver.execute_query(
        PROVENANCE,
        decision_id=decision_id,
        story_id=story_id,
        routing_="r",
    )
    return [_why(record.data()) for record in records]


def _recorded_by(decision: dict[str, Any]) -> str:
    recorded_by = decision.get("recorded_by") or ""
    return "" if recorded_by == decision.get("decided_by") else str(recorded_by)


def _why(row: dict[str, Any]) -> Why:
    decision, proposal, agent = row["decision"], row["proposal"] or {}, row["agent"] or {}
    decided_at = decision.get("decided_at") or ""
    return Why(
        decision_id=decision["id"],
        story_id=decision.get("case_id") or "",
        title=decision.get("title") or "",
        rationale=decision.get("rationale") or "",
        decided_at=decided_at,
        proposed_by=agent.get("id") or decision.get("decided_by") or "",
        recorded_by=_recorded_by(decision),
        role=decision.get("role") or agent.get("role") or "",
        model=proposal.get("model") or "",
        prompt_hash=proposal.get("prompt_hash") or "",
        deliberation_id=proposal.get("deliberation_id") or "",
        score=proposal.get("score"),
        revision=proposal.get("revision") or 0,
        approach=proposal.get("approach") or "",
        judged=proposal.get("judged") or "",
        affects=sorted(title for title in row["affects"] if title),
        critiques=sorted(
            (Objection.model_validate(each) for each in row["critiques"]),
            key=lambda each: (each.round, each.critic),
        ),
        checks=sorted(
            (Checked.model_validate(each) for each in row["checks"]), key=lambda each: each.name
        ),
        passed_by=sorted(
            (
                Passed.model_validate(each)
                for each in row["approvals"]
                if not _before(each.get("at"), decided_at)
            ),
            key=lambda each: each.at,
        ),
    )


def _before(at: str | None, decided_at: str) -> bool:
    """Whether an approval came before the decision: then it was not this that it let pass."""
    if not at or not decided_at:
        return False
    return datetime.fromisoformat(at) < datetime.fromisoformat(decided_at)
