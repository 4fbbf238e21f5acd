"""The process `bridge`: records and publishes, once graph and streams are as declared."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from nats.aio.client import Client as Nats
from nats.errors import ConnectionReconnectingError
from temporalio.client import Client
from temporalio.worker import Worker

from activities.config import InvalidConfig
from activities.graph.activities import Graph
from activities.graph.migrations import migrate
from activities.heartbeats import Heartbeats
from activities.outbox_metrics import OutboxMetrics
from bridge.jetstream.streams import StreamError, reconcile
from bridge.mirror.announcer import Announcer
from bridge.mirror.publisher import Mirror
from bridge.mirror.source import Source, read_source
from workers.clients.connection import StartError
from workers.clients.graph import open_graph
from workers.clients.nats import open_nats
from workers.clients.neo4j import open_neo4j, schema_errors
from workers.processes.process import ProcessContext, RunningProcess, options, valid_config
from workers.settings import Settings
from workflows.stubs import BRIDGE_QUEUE

log = structlog.stdlib.get_logger(__name__)


def bridge_worker(
    client: Client, settings: Settings, nats: Nats, source: Source, graph: Graph
) -> Worker:
    """Return the worker that records and publishes events."""
    mirror = Mirror(nats, source)
    announcer = Announcer(graph, mirror)
    return Worker(
        client,
        task_queue=BRIDGE_QUEUE,
        activities=[announcer.announce, announcer.announce_outcome, mirror.publish],
        **options(settings, OutboxMetrics(), Heartbeats()),
    )


@asynccontextmanager
async def process(base: ProcessContext) -> AsyncIterator[RunningProcess]:
    """Bring graph and streams up to date, then run."""
    async with open_neo4j(base.settings) as driver, open_nats(base.settings, base.lost) as nats:
        with valid_config(InvalidConfig):
            graph = open_graph(base.settings, driver, base.valkey)
        with schema_errors(base.settings):
            await migrate(driver)
        try:
            changes = await reconcile(nats.jetstream(), base.settings.nats_replicas)
        except StreamError as error:
            raise StartError(str(error)) from error
        log.info("streams are as declared", changes=changes)

        async def connected() -> None:
            if not nats.is_connected:
                raise ConnectionReconnectingError
            await nats.jetstream().account_info()

        source = await read_source(base.temporal)
        worker = bridge_worker(base.temporal, base.settings, nats, source, graph)
        yield RunningProcess(
            {BRIDGE_QUEUE: worker}, {"neo4j": driver.verify_connectivity, "nats": connected}
        )
