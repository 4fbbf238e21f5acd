"""Removal of stories that ended long ago from the graph, with everything that belongs to them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, LiteralString

from neo4j import AsyncDriver, AsyncManagedTransaction, unit_of_work

from activities.graph.errors import store_errors
from activities.graph.tracing import open_session
from workflows.timestamps import format_timestamp

AT_ONCE = 1_000
TRANSACTION_S = 60.0

_LAST: LiteralString = """
COLLECT {
  MATCH (s)<-[:OF]-(e:Event) RETURN max(toIntegerOrNull(toStringOrNull(e.timestamp_ms)))
}[0]
"""

ENDED: LiteralString = f"""
MATCH (s:Story) WHERE s.status IN $over AND {_LAST} < $before_ms
RETURN s.id AS id ORDER BY id
"""

# A write takes the story's lock, so that it does not begin again meanwhile.
PRUNE: LiteralString = f"""
MATCH (s:Story {{id: $id}})
SET s.pruned = true REMOVE s.pruned
WITH s WHERE s.status IN $over AND {_LAST} < $before_ms
WITH [s]
   + COLLECT {{ MATCH (s)<-[:OF]-(n) RETURN n }}
   + COLLECT {{ MATCH (s)<-[:OF]-()<-[:OF]-(n) RETURN n }}
   + COLLECT {{ MATCH (s)-[:HAS_PLAN]->(n) RETURN n }}
   + COLLECT {{ MATCH (s)-[:HAS_PLAN]->()-[:HAS_SUBTASK]->(n) RETURN n }}
   + COLLECT {{ MATCH (s)-[:HAS_PLAN]->()-[:CONTAINS_DECISION]->(n) RETURN n }} AS nodes
UNWIND nodes AS node
WITH DISTINCT node DETACH DELETE node RETURN count(*) AS count
"""

PRUNE_ALONE: LiteralString = """
CALL () {
  MATCH (n:Proposal) WHERE coalesce(n.story_id, '') = '' AND n.recorded_at < $before RETURN n
  UNION
  MATCH (n:Deliberation) WHERE coalesce(n.story_id, '') = '' AND n.ended_at < $before RETURN n
}
WITH n WHERE NOT (n)-[:OF]->(:Case)
WITH n LIMIT $limit
WITH collect(n) AS found
UNWIND found AS n
OPTIONAL MATCH (n)<-[:OF|FROM]-(part) WHERE NOT (part)-[:OF]->(:Case)
OPTIONAL MATCH (part:Change)<-[:OF]-(report:Report)
WITH found, collect(part) + collect(report) AS parts
UNWIND found + parts AS node
WITH DISTINCT node DETACH DELETE node RETURN count(*) AS count
"""


async def ended_before(driver: AsyncDriver, over: Sequence[str], before: datetime) -> list[str]:
    """Return the ids of the stories that have ended, and whose last event is before `before`."""
    with store_errors():
        async with open_session(driver) as session:
            parameters = {"over": list(over), "before_ms": int(before.timestamp() * 1000)}
            rows = await session.execute_read(_rows, ENDED, parameters)
    return [row["id"] for row in rows]


async def prune(driver: AsyncDriver, story_id: str, over: Sequence[str], before: datetime) -> int:
    """Remove a story and what belongs to it, unless it lives again; return how many nodes."""
    with store_errors():
        async with open_session(driver) as session:
            before_ms = int(before.timestamp() * 1000)
            parameters = {"id": story_id, "over": list(over), "before_ms": before_ms}
            [row] = await session.execute_write(_rows, PRUNE, parameters)
    return int(row["count"])


async def prune_without_story(driver: AsyncDriver, before: datetime) -> int:
    """Remove deliberations and proposals of no story that are older; return how many nodes."""
    total = 0
    parameters = {"before": format_timestamp(before), "limit": AT_ONCE}
    with store_errors():
        async with open_session(driver) as session:
            while True:
                [row] = await session.execute_write(_rows, PRUNE_ALONE, parameters)
                if not row["count"]:
                    return total
                total += int(row["count"])


@unit_of_work(timeout=TRANSACTION_S)
async def _rows(
    tx: AsyncManagedTransaction, cypher: LiteralString, parameters: dict[str, Any]
) -> list[dict[str, Any]]:
    return await (await tx.run(cypher, parameters)).data()
