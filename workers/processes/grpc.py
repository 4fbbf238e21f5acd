"""The process `grpc`: the five services, each on its port, or one of them alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import grpc
import structlog
from neo4j import AsyncDriver

from activities.cache import Cache
from activities.config import InvalidConfig
from activities.graph.activities import Graph
from activities.graph.migrations import migrate
from activities.graph.scopes import load_scopes
from activities.planning import load_config
from activities.quota import TokenQuota
from activities.redaction import load_redaction
from activities.revoked import RevokedTokens
from activities.workspace.repositories import repository_keys
from bridge.grpc.auth import Access
from bridge.grpc.context.servicer import ContextServicer
from bridge.grpc.limits import Limits
from bridge.grpc.orchestrator.servicer import OrchestratorServicer
from bridge.grpc.planning import PlanningServicer
from bridge.grpc.requests import Requests
from bridge.grpc.server import CannotListen, GrpcServer, Served
from bridge.grpc.storycoach import StoryCoachServicer
from bridge.grpc.wire import (
    context_pb2_grpc,
    orchestrator_pb2_grpc,
    planning_pb2_grpc,
    storycoach_pb2_grpc,
    workspace_pb2_grpc,
)
from bridge.grpc.workspace import WorkspaceServicer
from workers.clients.connection import StartError
from workers.clients.engine import DefaultModel
from workers.clients.neo4j import open_neo4j, schema_errors
from workers.environment import SERVICES
from workers.health import Check
from workers.processes.process import (
    ProcessContext,
    RunningProcess,
    certificate,
    token_keys,
    valid_config,
)
from workers.settings import Settings

log = structlog.stdlib.get_logger(__name__)


WITH_GRAPH = frozenset({"orchestrator", "context", "planning"})


class Stores(NamedTuple):
    """The stores that the services of WITH_GRAPH read and write."""

    driver: AsyncDriver
    graph: Graph


@asynccontextmanager
async def process(base: ProcessContext) -> AsyncIterator[RunningProcess]:
    """Serve `base.service`, or all five."""
    settings = base.settings
    names = [base.service] if base.service else SERVICES
    access = Access(
        token_keys(settings), settings.grpc_calls_per_second, RevokedTokens(base.valkey)
    )
    credentials = tls(settings)
    checks: dict[str, Check] = {}
    async with AsyncExitStack() as opened:
        stores: Stores | None = None
        if WITH_GRAPH.intersection(names):
            driver = await opened.enter_async_context(open_neo4j(settings))
            with schema_errors(settings):
                await migrate(driver)
            checks["neo4j"] = driver.verify_connectivity
            with valid_config(InvalidConfig):
                scopes = load_scopes(settings.fleet_config / "scopes.yaml")
                redaction = load_redaction(settings.fleet_config)
            cache = Cache(base.valkey, settings.context_cache_ttl)
            stores = Stores(driver, Graph(driver, cache, scopes, redaction))
        jobs = {}
        for name in names:
            port = getattr(settings, f"grpc_{name}_port")
            try:
                job = GrpcServer(
                    served(name, base, stores),
                    settings.grpc_host,
                    port,
                    access,
                    settings.drain_seconds,
                    credentials,
                    Requests(base.valkey),
                )
            except CannotListen as error:
                raise StartError(f"{error}: set GRPC_HOST and GRPC_{name.upper()}_PORT") from error
            log.info("serves", service=name, host=settings.grpc_host, port=job.port)
            jobs[f"grpc-{name}"] = job
        yield RunningProcess(jobs, checks)


def limits(base: ProcessContext) -> Limits:
    """Return the limits of what calls may ask of agents."""
    settings = base.settings
    return Limits(
        quota=TokenQuota(base.valkey, settings.grpc_tokens_per_hour),
        agents=settings.grpc_max_agents,
        rounds=settings.grpc_max_rounds,
        text_bytes=settings.story_text_bytes,
        max_tasks=settings.plan_max_tasks,
    )


def planning(base: ProcessContext, stores: Stores) -> PlanningServicer:
    """Return the Planning service.

    Raises:
        StartError: repositories.yaml is not valid.
    """
    settings = base.settings
    with valid_config(InvalidConfig):
        known = repository_keys(settings.fleet_config / "repositories.yaml")
    return PlanningServicer(base.temporal, stores.driver, settings.story_text_bytes, known)


def served(name: str, base: ProcessContext, stores: Stores | None) -> Served:
    """Return the service of that name.

    Raises:
        StartError: the configuration is not valid.
    """
    match name:
        case "orchestrator":
            assert stores
            return Served(
                "orchestrator.v1.OrchestratorService",
                OrchestratorServicer(
                    base.temporal,
                    stores.graph,
                    stores.driver,
                    base.settings.agent_type,
                    base.settings.deliberation_timeout,
                    DefaultModel(base.settings),
                    limits(base),
                ),
                orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server,
            )
        case "context":
            assert stores
            return Served(
                "fleet.context.v1.ContextService",
                ContextServicer(base.temporal, stores.graph),
                context_pb2_grpc.add_ContextServiceServicer_to_server,
            )
        case "planning":
            assert stores
            return Served(
                "fleet.planning.v1.PlanningService",
                planning(base, stores),
                planning_pb2_grpc.add_PlanningServiceServicer_to_server,
            )
        case "storycoach":
            return Served(
                "fleet.storycoach.v1.StoryCoachService",
                StoryCoachServicer(base.temporal, limits(base)),
                storycoach_pb2_grpc.add_StoryCoachServiceServicer_to_server,
            )
        case "workspace":
            with valid_config(InvalidConfig):
                levels = load_config(base.settings.fleet_config).rigor
            return Served(
                "fleet.workspace.v1.WorkspaceService",
                WorkspaceServicer(levels),
                workspace_pb2_grpc.add_WorkspaceServiceServicer_to_server,
            )
    raise AssertionError(f"no service is named {name}")


def tls(settings: Settings) -> grpc.ServerCredentials | None:
    """Return the server's credentials; None on loopback, where they are optional.

    Raises:
        StartError: as `certificate`.
    """
    pair = certificate("GRPC", settings.grpc_host, settings.grpc_tls_cert, settings.grpc_tls_key)
    if pair is None:
        return None
    cert, key = pair
    return grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
