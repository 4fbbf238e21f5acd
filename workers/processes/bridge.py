"""The process `bridge`: the mirror, run once its streams match their declaration."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from nats.aio.client import Client as Nats
from nats.errors import ConnectionReconnectingError
from temporalio.client import Client
from temporalio.worker import Worker

from activities.heartbeats import Heartbeats
from activities.outbox_metrics import OutboxMetrics
from bridge.jetstream.streams import StreamError, reconcile
from bridge.mirror.publisher import Mirror
from bridge.mirror.source import Source, read_source
from workers.clients.connection import StartError
from workers.clients.nats import open_nats
from workers.processes.process import ProcessContext, RunningProcess, options
from workers.settings import Settings
from workflows.stubs import BRIDGE_QUEUE

log = structlog.stdlib.get_logger(__name__)


def bridge_worker(client: Client, settings: Settings, nats: Nats, source: Source) -> Worker:
    """Return the worker that publishes events."""
    mirror = Mirror(nats, source)
    return Worker(
        client,
        task_queue=BRIDGE_QUEUE,
        activities=[mirror.publish],
        **options(settings, OutboxMetrics(), Heartbeats()),
    )


@asynccontextmanager
async def process(base: ProcessContext) -> AsyncIterator[RunningProcess]:
    """Reconcile the streams, then run."""
    async with open_nats(base.settings, base.lost) as nats:
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
        worker = bridge_worker(base.temporal, base.settings, nats, source)
        yield RunningProcess({BRIDGE_QUEUE: worker}, {"nats": connected})
