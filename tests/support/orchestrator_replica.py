"""An Orchestrator replica in its own process, for a test to kill: prints its port, then serves."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from activities.cache import Cache
from activities.graph.activities import Graph
from activities.graph.scopes import load_scopes
from bridge.grpc.auth import Access
from bridge.grpc.orchestrator.servicer import OrchestratorServicer
from bridge.grpc.server import GrpcServer, Served
from bridge.grpc.wire import orchestrator_pb2_grpc
from tests.support.fleet import TOKEN_KEY
from workers.clients.neo4j import open_neo4j
from workers.clients.temporal import open_temporal
from workers.clients.valkey import open_valkey
from workers.external_storage import data_converter
from workers.settings import load


async def serve() -> None:
    settings = load()
    async with open_valkey(settings) as valkey, open_neo4j(settings) as driver:
        temporal = await open_temporal(
            settings, data_converter(valkey, keys=settings.encryption_keys)
        )
        graph = Graph(driver, Cache(valkey), load_scopes(settings.fleet_config / "scopes.yaml"))
        served = Served(
            "orchestrator.v1.OrchestratorService",
            OrchestratorServicer(temporal, graph, driver, settings.agent_type),
            orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server,
        )
        access = Access([TOKEN_KEY], calls_per_second=1_000)
        server = GrpcServer(served, "127.0.0.1", 0, access, drain=timedelta())
        print(server.port, flush=True)
        await server.run()


if __name__ == "__main__":
    asyncio.run(serve())
