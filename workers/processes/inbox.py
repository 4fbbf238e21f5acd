"""The process `inbox`: messages from the bus, once its consumers match their declaration."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from nats.aio.client import Client as Nats

from activities.config import InvalidConfig
from activities.graph.activities import Graph
from activities.graph.migrations import migrate
from activities.planning import load_config
from bridge.fleet_metrics import FleetMetrics
from bridge.inbox.inbox import Inbox
from bridge.jetstream import consumers, streams
from bridge.jetstream.consumers import ConsumerError
from bridge.jetstream.streams import StreamError
from bridge.mirror.story_sweep import StorySweep
from workers.clients.connection import StartError
from workers.clients.graph import open_graph
from workers.clients.nats import open_nats
from workers.clients.neo4j import open_neo4j, schema_errors
from workers.processes.process import ProcessContext, RunningProcess, valid_config

log = structlog.stdlib.get_logger(__name__)


def inbox(base: ProcessContext, nats: Nats, graph: Graph) -> Inbox:
    """Return the inbox: it stores messages as the workflows' outbox does, and notifies stories."""
    settings = base.settings
    return Inbox(
        nats,
        graph,
        base.temporal,
        settings.nats_replicas,
        settings.deliberation_timeout,
        settings.plan_max_tasks,
    )


@asynccontextmanager
async def process(base: ProcessContext) -> AsyncIterator[RunningProcess]:
    """Bring graph, streams and consumers up to date, then run."""
    async with open_neo4j(base.settings) as driver, open_nats(base.settings, base.lost) as nats:
        with valid_config(InvalidConfig):
            graph = open_graph(base.settings, driver, base.valkey)
            machine = load_config(base.settings.fleet_config).machine
        job = inbox(base, nats, graph)
        sweep = StorySweep(base.temporal, graph, base.settings.story_sweep_seconds)
        with schema_errors(base.settings):
            await migrate(driver)
        jetstream = nats.jetstream()
        metrics = FleetMetrics(base.temporal, jetstream, machine)
        try:
            await streams.reconcile(jetstream, base.settings.nats_replicas)
            changes = await consumers.reconcile(jetstream)
        except (StreamError, ConsumerError) as error:
            raise StartError(str(error)) from error
        log.info("consumers are as declared", changes=changes)
        yield RunningProcess(
            {"inbox": job, "story-sweep": sweep, "fleet-metrics": metrics},
            {"neo4j": driver.verify_connectivity, "nats": jetstream.account_info},
        )
