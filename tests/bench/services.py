"""The cost of the gRPC services: against a health check, against bare Cypher, under load."""

from __future__ import annotations

import asyncio
import statistics
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc as grpc_client
import neo4j
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis.asyncio import Redis

from activities.cache import Cache
from activities.graph.scope_reads import DONE, NOISE, READS
from activities.graph.scopes import Scopes, load_scopes, scopes_for
from activities.tokens import Caller, create_token
from bridge.grpc.wire import (
    context_pb2,
    context_pb2_grpc,
    orchestrator_pb2,
    orchestrator_pb2_grpc,
    workspace_pb2,
    workspace_pb2_grpc,
)
from deploy.local.parts import DEVELOPER_ROLES
from deploy.local.ports import free_ports
from deploy.local.servers import Workers
from tests.bench.figures import Figure, at_most
from tests.support.fleet import TOKEN_KEY
from tests.support.llm_server import LlmServer
from tests.support.server_process import ServerProcess
from tests.support.servers import READY_WITHIN
from tests.support.site import Site
from workers.environment import ROOT
from workflows.models.ids import called_deliberation_workflow_id
from workflows.search_attributes import PENDING_GATE

PAIRS = 300
DELIBERATIONS = 10
CLIENTS = 200
LOAD_S = 60.0
SETTLED_S = 20.0
"""Seconds until growth is counted: by then every client has made a call."""

STORY = "US-1"
ASKED = context_pb2.GetContextRequest(story_id=STORY, role="DEV", phase="DESIGN")

REPORT = workspace_pb2.WorkspaceReport(
    job_id="job-1",
    build=workspace_pb2.BuildResult(ok=True),
    unit=workspace_pb2.UnitResult(ok=True, passed=10, failed=0, coverage=95.0),
    static=workspace_pb2.StaticResult(ok=True, sonar=workspace_pb2.SonarResult(quality_gate="OK")),
    e2e=workspace_pb2.E2EResult(ok=True, passed=3, failed=0),
)

# Any, because the stubs are typed for synchronous channels only.
Health: Any = health_pb2_grpc.HealthStub


async def grpc(folder: Path) -> list[Figure]:
    """Measure all figures of the services on one stack."""
    async with (
        LlmServer() as engine,
        Site(folder, engine.url) as site,
        site.clients() as (_, driver),
    ):
        await site.begin(STORY, approvals="human")
        while not await site.attribute(STORY, PENDING_GATE):
            await asyncio.sleep(0.1)
        (port,) = free_ports(1)
        process = ServerProcess(
            Workers(site.home, port, "grpc"), site.home / "logs" / "grpc.log", READY_WITHIN
        )
        await process.start()
        valkey = Redis(host=site.valkey.host, port=site.valkey.port, password=site.valkey.password)
        try:
            figures = [
                *await packs(site, driver, Cache(valkey)),
                await deliberations(site),
                *await load(site, process),
            ]
        finally:
            await valkey.aclose()
            await process.kill()
    return figures


@asynccontextmanager
async def channel(site: Site, service: str) -> AsyncIterator[grpc_client.aio.Channel]:
    address = f"127.0.0.1:{site.grpc_ports[f'grpc_{service}_port']}"
    async with grpc_client.aio.insecure_channel(address) as open_channel:
        yield open_channel


def bearer(actor: str = "bench") -> tuple[tuple[str, str], ...]:
    token = create_token(
        TOKEN_KEY, Caller(actor=actor, roles=frozenset(DEVELOPER_ROLES)), timedelta(hours=1)
    )
    return (("authorization", f"Bearer {token}"),)


async def seconds(work: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


async def packs(site: Site, driver: neo4j.AsyncDriver, cache: Cache) -> list[Figure]:
    """Compare GetContext from the cache with a health check, and from the graph with Cypher."""
    scopes, metadata = load_scopes(ROOT / "deploy" / "config" / "scopes.yaml"), bearer()
    checks, cached, bare, built = [], [], [], []
    async with channel(site, "context") as open_channel:
        stub: Any = context_pb2_grpc.ContextServiceStub(open_channel)
        health = Health(open_channel)

        async def ask() -> None:
            await stub.GetContext(ASKED, metadata=metadata)

        async def check() -> None:
            await health.Check(health_pb2.HealthCheckRequest())

        async def read() -> None:
            async with driver.session() as session:
                await session.execute_read(_read, scopes)

        for _ in range(PAIRS):
            checks.append(await seconds(check))
            cached.append(await seconds(ask))
        for _ in range(PAIRS):
            bare.append(await seconds(read))
            await cache.drop_packs([STORY])
            built.append(await seconds(ask))
    from_cache, beside = statistics.median(cached), statistics.median(checks)
    from_graph, cypher = statistics.median(built), statistics.median(bare)
    return [
        at_most(
            "GetContext from the cache / a health check",
            from_cache / beside,
            "x",
            3,
            f"medians of {PAIRS}: {from_cache * 1000:.2f} and {beside * 1000:.2f} ms",
        ),
        at_most(
            "GetContext from the graph / its Cypher alone",
            from_graph / cypher,
            "x",
            1.3,
            f"medians of {PAIRS}: {from_graph * 1000:.2f} and {cypher * 1000:.2f} ms, a query for "
            "each scope",
        ),
    ]


async def _read(tx: neo4j.AsyncManagedTransaction, scopes: Scopes) -> None:
    """Read each scope of the pack with its own query, as a client of the graph would."""
    for scope in scopes_for(scopes, "DEV", "DESIGN"):
        result = await tx.run(
            READS[scope].cypher, story=STORY, role="DEV", subtask="", noise=NOISE, done=DONE
        )
        await result.value()


async def deliberations(site: Site) -> Figure:
    """Measure the time that Deliberate takes beyond its workflow's own duration."""
    over = []
    async with channel(site, "orchestrator") as open_channel:
        stub: Any = orchestrator_pb2_grpc.OrchestratorServiceStub(open_channel)
        for _ in range(DELIBERATIONS):
            began = time.perf_counter()
            answer = await stub.Deliberate(
                orchestrator_pb2.DeliberateRequest(task_description="Add two numbers.", role="DEV"),
                metadata=bearer(),
            )
            handle = site.client.get_workflow_handle(
                called_deliberation_workflow_id(answer.metadata.tags["task_id"])
            )
            whole = time.perf_counter() - began
            description = await handle.describe()
            assert description.close_time
            over.append(whole - (description.close_time - description.start_time).total_seconds())
    return at_most(
        "Deliberate, beyond its workflow's duration",
        statistics.median(over) * 1000,
        "ms",
        50,
        f"median of {DELIBERATIONS}, instant endpoint",
    )


async def load(site: Site, process: ServerProcess) -> list[Figure]:
    """Run many clients at once and measure errors and the memory growth of the process."""
    failed: Counter[str] = Counter()
    done: Counter[str] = Counter()
    until = time.monotonic() + LOAD_S

    async def score(open_channel: grpc_client.aio.Channel, number: int) -> None:
        stub: Any = workspace_pb2_grpc.WorkspaceServiceStub(open_channel)
        request = workspace_pb2.ScoreWorkspaceRequest(report=REPORT, rigor_level="L1")
        metadata = bearer(f"score-{number}")  # each caller has a limit of calls a second
        await calls("ScoreWorkspace", lambda: stub.ScoreWorkspace(request, metadata=metadata))

    async def update(open_channel: grpc_client.aio.Channel, number: int) -> None:
        stub: Any = context_pb2_grpc.ContextServiceStub(open_channel)
        metadata = bearer(f"update-{number}")

        def change() -> Awaitable[object]:
            decision = context_pb2.ContextChange(
                operation="CREATE",
                entity_type="DECISION",
                entity_id=f"d-{uuid.uuid4().hex[:12]}",
                payload='{"title": "Keep it", "rationale": "it works"}',
            )
            request = context_pb2.UpdateContextRequest(
                story_id=f"US-load-{number}", changes=[case(number), decision]
            )
            answer: Awaitable[object] = stub.UpdateContext(request, metadata=metadata)
            return answer

        await calls("UpdateContext", change)

    async def calls(name: str, call: Callable[[], Awaitable[object]]) -> None:
        while time.monotonic() < until:
            try:
                await call()
                done[name] += 1
            except grpc_client.aio.AioRpcError as error:
                failed[f"{name}: {error.code().name} {error.details()}"[:120]] += 1

    async def grown() -> float:
        await asyncio.sleep(SETTLED_S)
        before = mib(process)
        await asyncio.sleep(until - time.monotonic())
        return mib(process) - before

    async with channel(site, "workspace") as scores, channel(site, "context") as updates:
        growth = asyncio.create_task(grown())
        await asyncio.gather(
            *(score(scores, number) for number in range(CLIENTS // 2)),
            *(update(updates, number) for number in range(CLIENTS // 2)),
        )
    how = f"{CLIENTS} clients for {LOAD_S:g} s: " + ", ".join(
        f"{count / LOAD_S:.0f} {name}/s" for name, count in sorted(done.items())
    )
    errors = "; ".join(f"{count} x {what}" for what, count in failed.most_common(3))
    return [
        at_most("calls that failed under load", sum(failed.values()), "", 0, errors or how),
        Figure(f"memory grown by after {SETTLED_S:g} s of load", await growth, "MiB", how=how),
    ]


def case(number: int) -> context_pb2.ContextChange:
    return context_pb2.ContextChange(
        operation="CREATE",
        entity_type="CASE",
        entity_id=f"US-load-{number}",
        payload='{"title": "A story under load"}',
    )


def mib(process: ServerProcess) -> float:
    return psutil.Process(process.pid).memory_info().rss / 2**20
