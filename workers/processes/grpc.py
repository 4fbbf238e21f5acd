"""The process `grpc`: the five services, each on its port, or one of them alone."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog
from neo4j import AsyncDriver

from activities.graph import Graph
from bridge.grpc.server import Served
from workers.processes import Base, Running

log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True)
class Parts:
    """What servicers are made of."""

    base: Base
    driver: AsyncDriver
    graph: Graph


SERVICES: Mapping[str, Callable[[Parts], Served]] = {}
"""Name -> the service; its port is the setting `grpc_{name}_port`."""


@asynccontextmanager
async def process(base: Base) -> AsyncIterator[Running]:
    """Serve all five."""
    async with serving(base, list(SERVICES)) as running:
        yield running
