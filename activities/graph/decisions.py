"""Decisions in the graph: their text with its revisions, and links by what they name."""

from __future__ import annotations

from typing import LiteralString

from activities.graph.changes import OF_STORY, Write, key
from workflows.models.deliberation import RecordedDecision

KEEP_REVISION: LiteralString = """
  MERGE (r:DecisionRevision {case_id: n.case_id, decision_id: n.id, order: kept.order})
    ON CREATE SET r += kept {.title, .rationale, .decided_by, .decided_at}
  MERGE (n)-[:HAS_REVISION]->(r)
"""
"""Stores `kept`, an earlier text of the decision `n`, with its order key."""

# A repeated text changes nothing: a deliberation's record and its event carry the same one.
DECISION = (
    """
MERGE (n:Decision {case_id: row.story_id, id: row.id})
  ON CREATE SET n += row.node, n.text_order = row.order
WITH n, row, row.order > coalesce(n.text_order, '') AS newer,
     coalesce(n.title <> row.node.title OR n.rationale <> row.node.rationale, true) AS other
CALL (n, row, newer, other) {
  WITH n, row, row.node AS node, newer, other
  WITH n, row, other, CASE WHEN newer
         THEN n {.title, .rationale, .decided_by, .decided_at, order: coalesce(n.text_order, '')}
         ELSE node {.title, .rationale, .decided_by, .decided_at, order: row.order} END AS kept
  WHERE other AND kept.title IS NOT NULL
"""
    + KEEP_REVISION
    + """
}
CALL (n, row, newer, other) {
  WITH n, row.node AS node, newer, other WHERE newer AND other
  SET n += node {.title, .rationale, .decided_by, .approved_by, .decided_at}
}
CALL (n, row, newer) {
  WITH n, row WHERE newer
  SET n.text_order = row.order
  WITH n, row WHERE size(row.node.affects) > 0 AND coalesce(n.affects <> row.node.affects, true)
  SET n.affects = row.node.affects
  WITH n MATCH (n)-[old:AFFECTS|DEPENDS_ON]->() DELETE old
}
"""
    + OF_STORY
)


def _names(decision: LiteralString) -> LiteralString:
    """Return Cypher for the names in the decision's `affects` (a list or a text), in lower case."""
    return (
        "[name IN CASE WHEN "
        + decision
        + ".affects IS :: LIST<ANY> THEN "
        + decision
        + ".affects ELSE ["
        + decision
        + ".affects] END | toLower(trim(toStringOrNull(name)))]"
    )


def _is_named(node: LiteralString) -> LiteralString:
    """Return Cypher that tests whether `names` has the node's id or title.

    Others may have stored an id or title as a number.
    """
    return (
        "(toLower(toStringOrNull("
        + node
        + ".id)) IN names OR toLower(toStringOrNull("
        + node
        + ".title)) IN names)"
    )


DECISION_LINKS: LiteralString = (
    """
MATCH (d:Decision {case_id: row.story_id, id: row.id})
CALL (d) {
  WITH d, """
    + _names("d")
    + """ AS names
  MATCH (t:Subtask {case_id: d.case_id}) WHERE """
    + _is_named("t")
    + """
  MERGE (d)-[:AFFECTS]->(t)
}
CALL (d) {
  WITH d, """
    + _names("d")
    + """ AS names
  MATCH (o:Decision {case_id: d.case_id}) WHERE o <> d AND """
    + _is_named("o")
    + """
  MERGE (d)-[:DEPENDS_ON]->(o)
}
CALL (d) {
  MATCH (o:Decision {case_id: d.case_id})
  WITH d, o, """
    + _names("o")
    + """ AS names
  WHERE o <> d AND """
    + _is_named("d")
    + """
  MERGE (o)-[:DEPENDS_ON]->(d)
}
"""
)

TASK_LINKS: LiteralString = (
    """
MATCH (d:Decision {case_id: row.story_id})
WITH row, d, """
    + _names("d")
    + """ AS names WHERE size(names) > 0
UNWIND row.ids AS id
MATCH (t:Subtask {case_id: row.story_id, id: id}) WHERE """
    + _is_named("t")
    + """
MERGE (d)-[:AFFECTS]->(t)
"""
)


def decision_write(
    story: str,
    decision: RecordedDecision,
    role: str,
    decided_by: str,
    decided_at: str,
    order: str,
) -> Write:
    """Return the write of a decision.

    Args:
        story: The story's id; may be empty.
        decision: The decision.
        role: The council's role; empty if no council decided.
        decided_by: The agent or person that decided.
        decided_at: ISO 8601.
        order: The order key of its text.
    """
    affects = [decision.affected_subtask] if decision.affected_subtask else []
    node = {
        "title": decision.title,
        "rationale": decision.rationale,
        "type": decision.type,
        "status": "ACCEPTED",
        "role": role,
        "decided_by": decided_by,
        "approved_by": decided_by,
        "decided_at": decided_at,
        "affects": list(dict.fromkeys(affects + decision.affects)),
    }
    row = {"id": key("decision id", decision.id), "story_id": story}
    return Write(DECISION, row | {"node": node, "order": order})


def decision_links(story: str, decisions: list[RecordedDecision]) -> list[Write]:
    """Return the writes that link decisions by name within a story; none without a story."""
    if not story:
        return []
    return [Write(DECISION_LINKS, {"story_id": story, "id": decision.id}) for decision in decisions]
