"""Neo4j, the context graph."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import neo4j
from neo4j.exceptions import AuthError, DriverError, Neo4jError

from workers.clients.connection import (
    ANSWER_WITHIN_S,
    StartError,
    one_line,
    redact_url,
    secret_value,
)
from workers.settings import Settings


@asynccontextmanager
async def open_neo4j(settings: Settings) -> AsyncIterator[neo4j.AsyncDriver]:
    """Open the driver and check that the server accepts the credentials.

    Raises:
        StartError: wrong address or credential.
    """
    where = f"Neo4j at {redact_url(settings.neo4j_uri)}"
    driver = neo4j.AsyncGraphDatabase.driver(
        settings.neo4j_uri,
        auth=(settings.neo4j_user, secret_value(settings.neo4j_password) or ""),
        connection_timeout=ANSWER_WITHIN_S,
        connection_acquisition_timeout=ANSWER_WITHIN_S,
        max_transaction_retry_time=ANSWER_WITHIN_S,  # less than the timeout of an activity
        notifications_min_severity="OFF",
    )
    async with driver:
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                await driver.verify_connectivity()
        except AuthError as error:
            raise StartError(
                f"{where}: authentication failed. Check NEO4J_USER and NEO4J_PASSWORD"
            ) from error
        except (TimeoutError, OSError, DriverError, Neo4jError, ValueError) as error:
            raise StartError(f"{where} is not reachable. Start it, or set NEO4J_URI") from error
        yield driver


@contextmanager
def schema_errors(settings: Settings) -> Iterator[None]:
    """Stop the process if Neo4j rejects a change while the graph is brought up to date.

    Raises:
        StartError: with Neo4j's own message.
    """
    try:
        yield
    except (Neo4jError, DriverError) as error:
        raise StartError(
            f"Neo4j at {redact_url(settings.neo4j_uri)} does not take the graph's schema: "
            f"{one_line(error)}. Correct what it names, then start again"
        ) from error
