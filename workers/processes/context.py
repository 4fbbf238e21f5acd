"""The process `context`: graph, cache and configuration."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from neo4j import AsyncDriver
from redis.asyncio import Redis
from temporalio.client import Client
from temporalio.worker import Worker

from activities.config import InvalidConfig
from activities.graph.activities import seed_councils
from activities.graph.councils import load_councils
from activities.graph.migrations import migrate
from activities.heartbeats import Heartbeats
from activities.outbox_metrics import OutboxMetrics
from activities.planning import Planning, load_config
from workers.clients.graph import open_graph
from workers.clients.neo4j import open_neo4j, schema_errors
from workers.processes.process import ProcessContext, RunningProcess, options, valid_config
from workers.settings import Settings
from workflows.stubs import CONTEXT_QUEUE

CALLS_AT_ONCE = 20
"""How many activities of a process run at the same time; the others wait in Temporal's queue.

Writes about one story take its lock in turn. With a hundred of them in the graph at once, the last
ones wait longer than a transaction may, are rolled back, and are all tried again.
"""

log = structlog.stdlib.get_logger(__name__)


def context_worker(
    client: Client, settings: Settings, driver: AsyncDriver, valkey: Redis
) -> Worker:
    """Return the worker of the graph and the cache.

    It also reads the process's configuration.
    """
    graph = open_graph(settings, driver, valkey)
    planning = Planning(
        settings.fleet_config,
        settings.deliberation_timeout,
        settings.story_text_bytes,
        settings.plan_max_tasks,
    )
    return Worker(
        client,
        task_queue=CONTEXT_QUEUE,
        activities=[
            graph.record,
            graph.record_deliberation,
            graph.load_council,
            graph.gather,
            graph.load_plan,
            graph.story_runs,
            graph.build_pack,
            graph.keep_pack,
            graph.update_context,
            planning.load_process,
            planning.score_story,
        ],
        max_concurrent_activities=CALLS_AT_ONCE,
        **options(settings, OutboxMetrics(), Heartbeats()),
    )


@asynccontextmanager
async def process(base: ProcessContext) -> AsyncIterator[RunningProcess]:
    """Bring the graph's schema and councils up to date, then run."""
    config = base.settings.fleet_config
    with valid_config(InvalidConfig):
        load_config(config)
        load_councils(config / "councils.yaml")
    async with open_neo4j(base.settings) as driver:
        with valid_config(InvalidConfig):
            worker = context_worker(base.temporal, base.settings, driver, base.valkey)
        with schema_errors(base.settings):
            versions = await migrate(driver)
            await seed_councils(driver, config / "councils.yaml", base.settings.agent_type)
        log.info("graph is up to date", migrations=versions)
        yield RunningProcess({CONTEXT_QUEUE: worker}, {"neo4j": driver.verify_connectivity})
