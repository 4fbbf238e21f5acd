"""The statements of an update."""

from __future__ import annotations

from typing import LiteralString

from activities.graph.context_update.payloads import EntityType
from activities.graph.decisions import KEEP_REVISION
from activities.graph.plans import PLACEHOLDER, READ_AS_SUBTASK, TAKE_UNPLANNED
from activities.graph.stories import STORY

# --- statements -----------------------------------------------------------------------------------

FOUND: LiteralString = (
    "WITH {story_id: $story_id} AS row "
    + STORY
    + """
WITH s
RETURN s {.status, .status_order, .text_order, .context_version, .context_by,
    .created_at, .created_by,
    extras: [key IN keys(s) WHERE key STARTS WITH 'x_']} AS story,
  COLLECT {
    MATCH (s)-[:HAS_PLAN]->(p:PlanVersion) WHERE coalesce(p.status, '') <> 'DELETED'
    RETURN p {.id, version: coalesce(p.version, 0)}
  } AS plans,
  COLLECT {
    MATCH (n:PlanVersion {case_id: $story_id}) WHERE n.id IN $ids.PLAN
    RETURN n {.id, .status, .status_order, .text_order,
      extras: [key IN keys(n) WHERE key STARTS WITH 'x_']}
  } AS plan,
  COLLECT {
    MATCH (n:Subtask {case_id: $story_id})
    WHERE n.id IN $ids.SUBTASK
      AND (EXISTS { (n)<-[:HAS_SUBTASK]-(:PlanVersion) } OR EXISTS { (n)--(s) })
    RETURN n {.id, .status, .status_order, .text_order,
      extras: [key IN keys(n) WHERE key STARTS WITH 'x_']}
  } AS subtask,
  COLLECT {
    MATCH (n:Decision {case_id: $story_id}) WHERE n.id IN $ids.DECISION
    RETURN n {.id, .status, .status_order, .text_order, name: n.decided_by,
      extras: [key IN keys(n) WHERE key STARTS WITH 'x_']}
  } AS decision,
  COLLECT {
    MATCH (n:Event {case_id: $story_id}) WHERE n.id IN $ids.MILESTONE
    RETURN n {.id, .status, .status_order, .text_order, name: n.actor,
      extras: [key IN keys(n) WHERE key STARTS WITH 'x_']}
  } AS milestone,
  COLLECT {
    MATCH (t:Subtask {case_id: $story_id})-[:DEPENDS_ON]->(d:Subtask)
    WHERE $linked AND coalesce(t.status, '') <> 'DELETED'
    WITH t.id AS id, collect(d.id) AS needed
    RETURN {id: id, needed: needed}
  } AS needs,
  [update IN COLLECT { MATCH (u:ContextUpdate {id: $update_id}) RETURN u } | properties(update)]
    AS kept
"""
)
"""Takes the story's lock before it reads; a story created here is rolled back if it is refused."""

CASE: LiteralString = """
MATCH (n:Case {id: row.story_id}) SET n += row.node
"""

PLAN_CHANGED: LiteralString = (
    """
MATCH (s:Case {id: row.story_id})
MERGE (p:PlanVersion {case_id: row.story_id, id: row.id})
MERGE (s)-[:HAS_PLAN]->(p)
SET p += row.node, p.plan_id = p.id
WITH s, p
"""
    + TAKE_UNPLANNED
)

SUBTASK: LiteralString = (
    """
MATCH (s:Case {id: row.story_id})
MERGE (n:Subtask {case_id: row.story_id, id: row.id})
SET n += row.node
WITH s, n, row
CALL (n, row) {
  WITH n, row WHERE row.fresh
  MATCH (n)-[old:OF|HAS_SUBTASK|AFFECTS]-()
  DELETE old
}
CALL (s, n, row) {
  WITH s, n, row WHERE row.plan_id = '' AND NOT EXISTS { (n)<-[:HAS_SUBTASK]-(:PlanVersion) }
  MERGE (n)-[:OF]->(s)
}
CALL (n, row) {
  MATCH (p:PlanVersion {case_id: row.story_id, id: row.plan_id})
  MERGE (p)-[:HAS_SUBTASK]->(n)
  SET n.plan_id = p.id
}
CALL (n) {
  WITH n AS t
"""
    + READ_AS_SUBTASK
    + """
}
CALL (n, row) {
  WITH n, row WHERE row.needs IS NOT NULL
  MATCH (n)-[old:DEPENDS_ON]->(d:Subtask) WHERE NOT d.id IN row.needs
  DELETE old
}
CALL (n, row) {
  UNWIND coalesce(row.needs, []) AS needed
"""
    + PLACEHOLDER
    + """
  MERGE (n)-[:DEPENDS_ON]->(d)
}
"""
)

DECISION_CHANGED: LiteralString = (
    """
MATCH (s:Case {id: row.story_id})
MERGE (n:Decision {case_id: row.story_id, id: row.id})
MERGE (n)-[:OF]->(s)
WITH n, row
CALL (n, row) {
  WITH n, row, n {.title, .rationale, .decided_by, .decided_at,
                  order: coalesce(n.text_order, '')} AS kept
  WHERE NOT row.fresh AND (row.node.title <> n.title OR row.node.rationale <> n.rationale)
"""
    + KEEP_REVISION
    + """
}
SET n += row.node, n.approved_by = coalesce(row.node.decided_by, n.approved_by, n.decided_by)
WITH n, row
CALL (n, row) {
  WITH n, row WHERE row.fresh
  MATCH (n)-[old:AFFECTS|DEPENDS_ON|CONTAINS_DECISION|FROM]-()
  DELETE old
}
CALL (n, row) {
  MATCH (p:PlanVersion {case_id: row.story_id, id: row.plan_id})
  WHERE NOT EXISTS { (n)<-[:CONTAINS_DECISION]-(:PlanVersion) }
  MERGE (p)-[:CONTAINS_DECISION]->(n)
}
CALL (n, row) {
  WITH n, row WHERE row.relink
  MATCH (n)-[old:AFFECTS|DEPENDS_ON]->()
  DELETE old
}
"""
)

MILESTONE: LiteralString = """
MATCH (s:Case {id: row.story_id})
MERGE (n:Event {case_id: row.story_id, id: row.id})
MERGE (n)-[:OF]->(s)
SET n += row.node
"""

DELETE: dict[EntityType, LiteralString] = {
    "CASE": "MATCH (n:Case {id: row.story_id}) SET n += row.node",
    "PLAN": "MATCH (n:PlanVersion {case_id: row.story_id, id: row.id}) SET n += row.node",
    "SUBTASK": "MATCH (n:Subtask {case_id: row.story_id, id: row.id}) "
    "SET n += row.node, n.last_status = row.node.status",
    "DECISION": "MATCH (n:Decision {case_id: row.story_id, id: row.id}) SET n += row.node",
    "MILESTONE": "MATCH (n:Event {case_id: row.story_id, id: row.id}) SET n += row.node",
}
"""Soft deletes: the node stays, with status DELETED."""

KEPT: LiteralString = """
MATCH (s:Case {id: row.story_id})
SET s.context_version = row.node.version, s.context_by = row.id
MERGE (n:ContextUpdate {id: row.id}) SET n += row.node
MERGE (n)-[:OF]->(s)
"""
"""The update itself. A retry after the commit finds its answer here, and the next update finds the
update whose event precedes its own."""
