"""Neo4j, the context graph."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import urlsplit

import neo4j
from neo4j.exceptions import AuthError, DriverError, Neo4jError

from workers.clients.connection import (
    ANSWER_WITHIN_S,
    StartError,
    one_line,
    raise_if_not_trusted,
    redact_url,
    require_encryption,
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
    uri, security = _address(settings)
    driver = neo4j.AsyncGraphDatabase.driver(
        uri,
        **security,
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
            raise_if_not_trusted(where, error, "NEO4J_CA_FILE", "NEO4J_URI")
            raise StartError(f"{where} is not reachable. Start it, or set NEO4J_URI") from error
        yield driver


def _address(settings: Settings) -> tuple[str, dict[str, Any]]:
    """Return the driver's address, and what verifies the server.

    The driver takes a CA only with an address whose scheme does not ask for TLS already.
    """
    uri = urlsplit(settings.neo4j_uri)
    kind, _, tls = uri.scheme.partition("+")
    if settings.neo4j_ca_file:
        trusted = neo4j.TrustCustomCAs(str(settings.neo4j_ca_file))
        return uri._replace(scheme=kind).geturl(), {
            "encrypted": True,
            "trusted_certificates": trusted,
        }
    if not tls:
        remedy = f"use {kind}+s://, or set NEO4J_CA_FILE"
        require_encryption(settings, "NEO4J_URI", uri.hostname or "", remedy)
    return settings.neo4j_uri, {}


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
