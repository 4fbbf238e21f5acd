"""The fleet's processes: what each needs, and the worker it runs.

A process opens its own clients, brings what it owns up to date, and yields its worker with the
checks of the servers it needs. Tests build the same workers.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypedDict

import structlog
from activities.planning import Planning
from nats.aio.client import Client as Nats
from nats.errors import ConnectionReconnectingError
from neo4j import AsyncDriver
from neo4j.exceptions import DriverError, Neo4jError
from redis.asyncio import Redis
from temporalio.client import Client
from temporalio.common import VersioningBehavior, WorkerDeploymentVersion
from temporalio.exceptions import ApplicationError
from temporalio.worker import Interceptor, Worker, WorkerDeploymentConfig

from activities.agents import VllmAgents
from activities.cache import Cache
from activities.checks import Checks
from activities.context import load_scopes
from activities.graph import Graph, seed_councils
from activities.migrations import migrate
from activities.prompts import InvalidPrompt, Prompts
from bridge.mirror import Mirror
from bridge.streams import reconcile
from workers import search_attributes
from workers.clients import StartError, words
from workers.clients.engine import Engine, open_engine
from workers.clients.nats import open_nats
from workers.clients.neo4j import open_neo4j
from workers.health import Check
from workers.settings import Settings
from workers.telemetry import LogContext
from workers.workflow_runner import workflow_runner
from workflows.deliberation import DeliberationWorkflow
from workflows.plan import PlanWorkflow
from workflows.story import StoryWorkflow
from workflows.stubs import AGENTS_QUEUE, BRIDGE_QUEUE, CONTEXT_QUEUE, STORY_QUEUE

DEPLOYMENT = "swe-ai-fleet"
UNVERSIONED = "unversioned"

STICKY_FOR = timedelta(seconds=5)
"""How long a story waits for the worker that has it in its cache, before any other takes it."""

HEARTBEATS_AT_MOST = timedelta(seconds=2)
"""Tokens are shown, and a cancellation reaches the engine, within this time."""

log = structlog.stdlib.get_logger("workers")


@dataclass(frozen=True)
class Base:
    """What every process has: Temporal, and Valkey for the payloads of its data converter.

    `lost` gets the error of a connection that is closed for good.
    """

    settings: Settings
    temporal: Client
    valkey: Redis
    lost: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def checks(self) -> dict[str, Check]:
        """The checks of its servers, by server."""
        return {
            "temporal": self.temporal.service_client.check_health,
            "valkey": self.valkey.ping,
        }


@dataclass(frozen=True)
class Running:
    """A process's worker, and the checks of the servers that it alone needs."""

    worker: Worker
    checks: Mapping[str, Check] = field(default_factory=dict)


Process = Callable[[Base], AbstractAsyncContextManager[Running]]


# --- workers --------------------------------------------------------------------------------------


def story_worker(client: Client, settings: Settings) -> Worker:
    """Runs the workflows."""
    return Worker(
        client,
        task_queue=STORY_QUEUE,
        workflows=[StoryWorkflow, PlanWorkflow, DeliberationWorkflow],
        workflow_runner=workflow_runner(),
        sticky_queue_schedule_to_start_timeout=STICKY_FOR,
        **_options(settings),
    )


def agents_worker(client: Client, settings: Settings, engine: Engine, valkey: Redis) -> Worker:
    """Runs LLM calls and checks, no more at once than the engine can."""
    agents = VllmAgents(
        engine.client, valkey, engine.model, Prompts.load(settings.fleet_config / "prompts")
    )
    checks = Checks(settings.fleet_config / "checks.yaml")
    return Worker(
        client,
        task_queue=AGENTS_QUEUE,
        activities=[
            agents.propose,
            agents.criticise,
            agents.revise,
            agents.judge,
            agents.derive_plan,
            checks.check_proposal,
        ],
        max_concurrent_activities=settings.llm_concurrency,
        max_heartbeat_throttle_interval=HEARTBEATS_AT_MOST,
        **_options(settings),
    )


def context_worker(
    client: Client, settings: Settings, driver: AsyncDriver, valkey: Redis
) -> Worker:
    """Reads and writes the graph and the cache, and reads the process's configuration."""
    graph = Graph(driver, Cache(valkey), load_scopes(settings.fleet_config / "scopes.yaml"))
    planning = Planning(settings.fleet_config)
    return Worker(
        client,
        task_queue=CONTEXT_QUEUE,
        activities=[
            graph.record,
            graph.record_deliberation,
            graph.load_council,
            graph.load_plan,
            graph.build_pack,
            planning.load_process,
            planning.score_story,
        ],
        **_options(settings),
    )


def bridge_worker(client: Client, settings: Settings, nats: Nats) -> Worker:
    """Publishes events."""
    mirror = Mirror(nats, client.namespace)
    return Worker(
        client,
        task_queue=BRIDGE_QUEUE,
        activities=[mirror.publish],
        **_options(settings),
    )


class _Options(TypedDict):
    interceptors: list[Interceptor]
    graceful_shutdown_timeout: timedelta
    deployment_config: WorkerDeploymentConfig


def _options(settings: Settings) -> _Options:
    return _Options(
        interceptors=[LogContext()],
        graceful_shutdown_timeout=settings.drain_seconds,
        deployment_config=_deployment(settings.worker_build_id),
    )


def _deployment(build_id: str | None) -> WorkerDeploymentConfig:
    """Versioned only with a build id: without one, a worker takes every story there is."""
    return WorkerDeploymentConfig(
        version=WorkerDeploymentVersion(DEPLOYMENT, build_id or UNVERSIONED),
        use_worker_versioning=build_id is not None,
        default_versioning_behavior=(
            VersioningBehavior.AUTO_UPGRADE if build_id else VersioningBehavior.UNSPECIFIED
        ),
    )


# --- processes ------------------------------------------------------------------------------------


@asynccontextmanager
async def story(base: Base) -> AsyncIterator[Running]:
    """Workflows, once the search attributes that they set are there."""
    added = await search_attributes.register(base.temporal)
    log.info("search attributes registered", added=added)
    yield Running(story_worker(base.temporal, base.settings))


@asynccontextmanager
async def agents(base: Base) -> AsyncIterator[Running]:
    """LLM calls and checks."""
    async with open_engine(base.settings) as engine:
        with _valid_config():
            worker = agents_worker(base.temporal, base.settings, engine, base.valkey)
        yield Running(worker, {"llm": engine.client.models.list})


@asynccontextmanager
async def context(base: Base) -> AsyncIterator[Running]:
    """Graph and cache, once the graph's schema and councils are there."""
    async with open_neo4j(base.settings) as driver:
        with _valid_config():
            worker = context_worker(base.temporal, base.settings, driver, base.valkey)
            try:
                versions = await migrate(driver)
                await seed_councils(driver, base.settings.fleet_config / "councils.yaml")
            except (Neo4jError, DriverError) as error:
                raise StartError(
                    f"Neo4j at {base.settings.neo4j_uri} does not take the graph's schema: "
                    f"{words(error)}. Mend what it names, then start again"
                ) from error
        log.info("graph is up to date", migrations=versions)
        yield Running(worker, {"neo4j": driver.verify_connectivity})


@asynccontextmanager
async def bridge(base: Base) -> AsyncIterator[Running]:
    """The mirror, once its streams are as they are declared."""
    async with open_nats(base.settings, base.lost) as nats:
        changes = await reconcile(nats.jetstream(), base.settings.nats_replicas)
        log.info("streams are as declared", changes=changes)

        async def connected() -> None:
            if not nats.is_connected:
                raise ConnectionReconnectingError
            await nats.jetstream().account_info()

        yield Running(bridge_worker(base.temporal, base.settings, nats), {"nats": connected})


@contextmanager
def _valid_config() -> Iterator[None]:
    """A configuration file that does not hold together stops the process with the file's words."""
    try:
        yield
    except ApplicationError as error:
        raise StartError(f"{error.message}. Mend it in FLEET_CONFIG") from error
    except InvalidPrompt as error:
        raise StartError(f"{error}. Mend it in FLEET_CONFIG") from error


PROCESSES: dict[str, Process] = {
    "story": story,
    "agents": agents,
    "context": context,
    "bridge": bridge,
}
"""Name -> process. `all` is each of them in one."""
