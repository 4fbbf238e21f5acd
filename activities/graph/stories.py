"""A story's node: its one key, and the adoption of nodes that other systems wrote.

Other systems write the same story as `(:Case {id})`, `(:Story {id})` or `(:Case {case_id})`, before
the fleet starts and while it runs, and attach plans, subtasks, decisions and events without a
`case_id`. Every writer of the fleet uses `STORY`. Nodes that it cannot match are adopted: the nodes
of one story become one node with both labels, and the nodes attached to it get its `case_id`.
Adoption runs before a story is read, before a write that a uniqueness constraint refused is
repeated, and for all stories in a migration. It is repeatable. See
docs/design/0008-one-key-for-a-story.md.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, LiteralString

from neo4j import AsyncDriver, AsyncManagedTransaction, unit_of_work

from activities.graph.tracing import open_session

ADOPTION_S = 20.0

STORY: LiteralString = """
MERGE (s:Case {id: row.story_id}) ON CREATE SET s.status = 'UNKNOWN'
SET s:Story, s.case_id = row.story_id
"""
"""Matches or creates the story of `row` as `s`, and takes its lock."""

MERGE_NODES: LiteralString = """
WITH *, head(nodes) AS kept, tail(nodes) AS others, [n IN nodes | properties(n)] AS given,
     reduce(found = [], n IN nodes | found + labels(n)) AS marks
CALL (kept, others) {
  UNWIND others AS other
  CALL (kept, others, other) {
    MATCH (other)-[r]->(x) WHERE x <> kept AND NOT x IN others
    MERGE (kept)-[moved:$(type(r))]->(x) SET moved += properties(r)
  }
  CALL (kept, others, other) {
    MATCH (other)<-[r]-(x) WHERE x <> kept AND NOT x IN others
    MERGE (kept)<-[moved:$(type(r))]-(x) SET moved += properties(r)
  }
  DETACH DELETE other
}
FOREACH (one IN reverse(given) | SET kept += one)
SET kept:$(marks)
"""
"""Merges the list `nodes` into one node, `kept`; for each property, the first node's value wins.

Relationships move with their properties. Types and labels are those of the graph itself.
"""

ADOPT_STORY: LiteralString = (
    """
UNWIND $ids AS id
CALL (id) {
  MATCH (n:Case {id: id}) RETURN n
  UNION MATCH (n:Story {id: id}) RETURN n
  UNION MATCH (n:Case {case_id: id}) WHERE n.id IS NULL RETURN n
  UNION MATCH (n:Story {case_id: id}) WHERE n.id IS NULL RETURN n
  UNION MATCH (n:Story {story_id: id}) WHERE n.id IS NULL RETURN n
}
WITH id, n ORDER BY n.id IS NULL, NOT n:Story, NOT n:Case, elementId(n)
WITH id, collect(n) AS nodes
"""
    + MERGE_NODES
    + """
SET kept:Case:Story, kept.id = id, kept.case_id = id
WITH kept, [one IN given WHERE one.status <> 'UNKNOWN' | one.status] AS statuses
WHERE size(statuses) > 0
SET kept.status = head(statuses)
"""
)
"""A placeholder's status UNKNOWN never replaces a status from another system."""

LABELS: dict[str, LiteralString] = {
    "PlanVersion": "coalesce(n.id, n.plan_id)",
    "Subtask": "coalesce(n.id, n.sub_id, n.subtask_id, n.task_id)",
    "Decision": "coalesce(n.id, n.decision_id)",
    "Event": "coalesce(n.id, n.event_id, n.milestone_id)",
}
"""Labels of nodes attached to a story, and the properties that may hold the node's id."""


def _adopt_what_hangs(label: str, key: str) -> str:
    return (
        f"""
UNWIND $ids AS id
MATCH (s:Case {{id: id}})
CALL (s) {{
  MATCH (s)--(n:{label}) WHERE n.case_id IS NULL RETURN n
  UNION MATCH (s)--(:PlanVersion)--(n:{label}) WHERE n.case_id IS NULL RETURN n
}}
WITH s, toStringOrNull({key}) AS key, n WHERE key IS NOT NULL
WITH s, key, n ORDER BY elementId(n)
WITH s, key, collect(n) AS hanging
OPTIONAL MATCH (there:{label} {{case_id: s.id, id: key}})
WITH s, key, CASE WHEN there IS NULL THEN hanging ELSE [there] + hanging END AS nodes
"""
        + MERGE_NODES
        + "SET kept.case_id = s.id, kept.id = key\n"
    )


LINK: tuple[LiteralString, ...] = (
    "UNWIND $ids AS id MATCH (s:Case {id: id})--(n:PlanVersion) MERGE (s)-[:HAS_PLAN]->(n)",
    """
UNWIND $ids AS id MATCH (s:Case {id: id})--(n:Subtask)
WHERE NOT EXISTS { (n)<-[:HAS_SUBTASK]-(:PlanVersion) }
MERGE (n)-[:OF]->(s)
""",
    "UNWIND $ids AS id MATCH (s:Case {id: id})--(n:Decision) MERGE (n)-[:OF]->(s)",
    "UNWIND $ids AS id MATCH (s:Case {id: id})--(n:Event) MERGE (n)-[:OF]->(s)",
    """
UNWIND $ids AS id MATCH (s:Case {id: id})-[:HAS_PLAN]->(:PlanVersion)-[:CONTAINS_DECISION]->(n)
MERGE (n)-[:OF]->(s)
""",
)
"""Adds the relationships that the fleet reads; those that others wrote stay."""

READERS: tuple[LiteralString, ...] = (
    "MATCH (n:Decision) WHERE n.approved_by IS NULL AND n.decided_by IS NOT NULL "
    "WITH n LIMIT $limit SET n.approved_by = n.decided_by",
    "MATCH (n:PlanVersion) WHERE n.plan_id IS NULL AND n.id IS NOT NULL "
    "WITH n LIMIT $limit SET n.plan_id = n.id",
    "MATCH (n:Subtask) WHERE n.sub_id IS NULL AND n.id IS NOT NULL "
    "WITH n LIMIT $limit SET n.sub_id = n.id",
    "MATCH (n:Subtask) WHERE n.last_status IS NULL AND n.status IS NOT NULL "
    "WITH n LIMIT $limit SET n.last_status = n.status",
    "MATCH (n:Subtask) WHERE n.type IS NULL WITH n LIMIT $limit SET n.type = 'task'",
    "MATCH (p:PlanVersion)-[:HAS_SUBTASK]->(n:Subtask) "
    "WHERE n.plan_id IS NULL AND p.id IS NOT NULL "
    "WITH n, p ORDER BY p.version WITH n, last(collect(p.id)) AS plan_id LIMIT $limit "
    "SET n.plan_id = plan_id",
)
"""Adds properties that other systems read to nodes that were written without them."""

HAS_UNADOPTED: LiteralString = """(
  EXISTS { MATCH (n:Case {id: id}) WHERE NOT n:Story }
  OR EXISTS { MATCH (n:Story {id: id}) WHERE NOT n:Case }
  OR EXISTS { MATCH (n:Case {case_id: id}) WHERE n.id IS NULL }
  OR EXISTS { MATCH (n:Story {case_id: id}) WHERE n.id IS NULL }
  OR EXISTS { MATCH (n:Story {story_id: id}) WHERE n.id IS NULL }
  OR EXISTS {
    MATCH (:Case {id: id})--(n:PlanVersion|Subtask|Decision|Event) WHERE n.case_id IS NULL
  }
  OR EXISTS {
    MATCH (:Case {id: id})--(:PlanVersion)--(n:Subtask|Decision|Event) WHERE n.case_id IS NULL
  }
)"""
"""Whether others wrote something for the story `id` that the fleet cannot read yet."""

UNADOPTED: LiteralString = f"""
UNWIND $ids AS id
WITH id WHERE {HAS_UNADOPTED}
RETURN collect(id) AS ids
"""

ALL_UNADOPTED: LiteralString = """
CALL () {
  MATCH (n:Case) WHERE NOT n:Story OR n.id IS NULL RETURN coalesce(n.id, n.case_id) AS id
  UNION
  MATCH (n:Story) WHERE NOT n:Case OR n.id IS NULL
  RETURN coalesce(n.id, n.case_id, n.story_id) AS id
  UNION
  MATCH (n:PlanVersion|Subtask|Decision|Event) WHERE n.case_id IS NULL
  MATCH (n)--(s:Case|Story) RETURN coalesce(s.id, s.case_id, s.story_id) AS id
  UNION
  MATCH (n:Subtask|Decision|Event) WHERE n.case_id IS NULL
  MATCH (n)--(:PlanVersion)--(s:Case|Story) RETURN coalesce(s.id, s.case_id, s.story_id) AS id
}
WITH id WHERE id IS :: STRING NOT NULL
RETURN collect(DISTINCT id) AS ids
"""

ADOPT: tuple[str, ...] = (
    ADOPT_STORY,
    *(_adopt_what_hangs(label, key) for label, key in LABELS.items()),
    *LINK,
)


async def adopt(driver: AsyncDriver, story_ids: Collection[str]) -> None:
    """Adopt what others wrote for these stories; write nothing if nothing is new."""
    async with open_session(driver) as session:
        if unadopted := await session.execute_read(not_adopted, story_ids):
            await session.execute_write(adopt_all, unadopted)


@unit_of_work(timeout=ADOPTION_S)
async def not_adopted(tx: AsyncManagedTransaction, story_ids: Collection[str]) -> list[str]:
    """Return those of the stories for which others wrote something."""
    return await _ids(tx, UNADOPTED, {"ids": list(story_ids)})


@unit_of_work(timeout=ADOPTION_S)
async def adopt_all(tx: AsyncManagedTransaction, story_ids: Collection[str]) -> None:
    """Adopt what others wrote for these stories, in the caller's transaction."""
    for statement in ADOPT:
        await (await tx.run(statement, ids=sorted(story_ids))).consume()


async def _ids(
    tx: AsyncManagedTransaction, cypher: LiteralString, parameters: dict[str, Any]
) -> list[str]:
    row = await (await tx.run(cypher, parameters)).single(strict=True)
    return list(row["ids"])


async def all_unadopted(tx: AsyncManagedTransaction) -> list[str]:
    """Return the ids of all stories that others wrote or attached nodes to."""
    return await _ids(tx, ALL_UNADOPTED, {})
