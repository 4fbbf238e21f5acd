"""Sessions of Neo4j that are spans of a trace."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from neo4j import AsyncDriver, AsyncSession
from opentelemetry import trace
from opentelemetry.semconv.attributes.db_attributes import DB_SYSTEM_NAME

tracer = trace.get_tracer(__name__)


@asynccontextmanager
async def open_session(driver: AsyncDriver) -> AsyncIterator[AsyncSession]:
    """Open a session; what is done in it is one span."""
    with tracer.start_as_current_span(
        "neo4j", kind=trace.SpanKind.CLIENT, attributes={DB_SYSTEM_NAME: "neo4j"}
    ):
        async with driver.session() as session:
            yield session
