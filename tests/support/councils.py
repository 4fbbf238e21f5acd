"""The councils of a graph that tests share."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from neo4j import AsyncDriver

from tests.support.stories import rows

SEATED = "MATCH (c:Council)-[:HAS_AGENT]->(a:Agent) RETURN c.id, a.id"
LEAVE_ONLY = """
MATCH (c:Council) OPTIONAL MATCH (c)-[:HAS_AGENT]->(a:Agent)
WITH c, a UNWIND [c, a] AS each
WITH DISTINCT each WHERE NOT each.id IN $ids
DETACH DELETE each
"""


@asynccontextmanager
async def councils_kept(driver: AsyncDriver) -> AsyncIterator[None]:
    """At the end, remove the councils and agents that were not there at the beginning."""
    there = await rows(driver, SEATED)
    yield
    await rows(driver, LEAVE_ONLY, ids=[each for seat in there for each in seat])
