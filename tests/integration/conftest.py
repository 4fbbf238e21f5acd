"""Clients and worker processes on the real servers, started as a person or supervisor would."""

import asyncio
import contextlib
import json
import os
import sys
import uuid
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from nats.aio.client import Client as Nats
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError
from neo4j import AsyncDriver, AsyncGraphDatabase
from redis.asyncio import Redis
from temporalio.api.workflowservice.v1 import RegisterNamespaceRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from activities.cache import Cache
from activities.graph.activities import Graph
from activities.graph.context_packs import load_scopes
from activities.graph.migrations import migrate
from bridge.grpc.auth import Access, Caller, create_token
from bridge.grpc.requests import Requests
from bridge.grpc.server import GrpcServer, Served
from bridge.jetstream.streams import STREAMS
from deploy.local.process import free_ports
from deploy.local.settings import GRPC_PORTS
from tests.conftest import RunningServer, Servers
from tests.support.llm_server import LlmServer
from tests.support.polling import WITHIN_S, until
from tests.support.site import TOKEN_KEY
from tests.support.stories import batch, deliberation, new_story, one_of_each
from workers.clients.nats import open_nats
from workers.settings import ALIASES, ROOT, Settings

Environment = dict[str, str]
Metadata = tuple[tuple[str, str], ...]


@pytest.fixture(autouse=True, scope="session")
def no_settings_of_a_local_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Take settings from the tests alone, even if this checkout runs a local stack."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEET_HOME", str(tmp_path_factory.mktemp("no-stack")))
        yield


def nats_settings(server: RunningServer) -> dict[str, Any]:
    return {
        "nats_url": server.address,
        "nats_user": server.user,
        "nats_password": server.password,
    }


@pytest.fixture
async def nats_client(nats_server: RunningServer) -> AsyncIterator[Nats]:
    """Connect to a JetStream without any of the fleet's streams."""
    async with open_nats(Settings.model_validate(nats_settings(nats_server))) as client:
        await remove_streams(client.jetstream())
        yield client
        await remove_streams(client.jetstream())


@pytest.fixture
def jetstream(nats_client: Nats) -> JetStreamContext:
    return nats_client.jetstream()


async def remove_streams(jetstream: JetStreamContext) -> None:
    for stream in STREAMS:
        with contextlib.suppress(NotFoundError):
            await jetstream.delete_stream(stream.name)


@pytest.fixture(scope="session")
async def driver(neo4j_server: RunningServer) -> AsyncIterator[AsyncDriver]:
    """Open a driver to a Neo4j that has the fleet's schema."""
    auth = (neo4j_server.user or "neo4j", neo4j_server.password or "")
    async with AsyncGraphDatabase.driver(neo4j_server.address, auth=auth) as driver:
        await migrate(driver)
        yield driver


@pytest.fixture(scope="session")
async def client(valkey: RunningServer) -> AsyncIterator[Redis]:
    """Open a Valkey client."""
    client = Redis(host=valkey.host, port=valkey.port, password=valkey.password)
    yield client
    await client.aclose()


@pytest.fixture(scope="session")
async def graph(driver: AsyncDriver, client: Redis) -> Graph:
    """Return the activities that read and write the graph, with the shipped configuration."""
    graph = Graph(driver, Cache(client), load_scopes(ROOT / "deploy" / "config" / "scopes.yaml"))
    # A new server plans each statement at its first use, which takes longer than the statement.
    # One transaction of each kind does this here, so that no test has to wait for it.
    story = new_story()
    for number, body in enumerate(one_of_each(story)):
        await graph.record(batch(story, body, first=number))
    await graph.record_deliberation(deliberation(story))
    return graph


# --- worker processes -----------------------------------------------------------------------------


def variables(servers: Servers, llm: LlmServer) -> Environment:
    """Return the variables of a worker on these servers, without any other fleet variables."""
    ports = free_ports(len(GRPC_PORTS))
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.lower() not in {*Settings.model_fields, *ALIASES}
    }
    return kept | {
        "TEMPORAL_ADDRESS": servers.temporal.address,
        "NATS_URL": servers.nats.address,
        "NATS_USER": servers.nats.user or "",
        "NATS_PASSWORD": servers.nats.password or "",
        "NEO4J_URI": servers.neo4j.address,
        "NEO4J_USER": servers.neo4j.user or "",
        "NEO4J_PASSWORD": servers.neo4j.password or "",
        "REDIS_HOST": servers.valkey.host,
        "REDIS_PORT": str(servers.valkey.port),
        "REDIS_PASSWORD": servers.valkey.password or "",
        "VLLM_URL": llm.url,
        "GRPC_TOKEN_KEY": TOKEN_KEY,
        **{name.upper(): str(port) for name, port in zip(GRPC_PORTS, ports, strict=True)},
    }


async def a_namespace(servers: Servers) -> str:
    """Register a new namespace, so that workers take no work left by other tests."""
    client = await Client.connect(servers.temporal.address)
    name = f"test-{uuid.uuid4().hex[:8]}"
    await client.workflow_service.register_namespace(
        RegisterNamespaceRequest(
            namespace=name, workflow_execution_retention_period=Duration(seconds=86_400)
        )
    )
    there = await Client.connect(servers.temporal.address, namespace=name)

    async def known() -> bool:
        try:
            await there.count_workflows()
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            return False
        return True

    await until(known)  # the server knows it everywhere only after some time
    return name


@pytest.fixture
async def namespace(servers: Servers) -> str:
    return await a_namespace(servers)


@pytest.fixture
def environment(servers: Servers, llm: LlmServer, namespace: str) -> Environment:
    return variables(servers, llm) | {"TEMPORAL_NAMESPACE": namespace}


async def launch(name: str, environment: Environment, *more: str) -> Process:
    arguments = ("-m", "workers", name, *more)
    return await asyncio.create_subprocess_exec(
        sys.executable, *arguments, env=environment, cwd=ROOT, stdout=PIPE, stderr=PIPE
    )


class Log:
    """The JSON lines that a process writes to stdout."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []

    async def until(self, event: str) -> dict[str, Any]:
        """Read up to the first line whose event begins with `event`, and return that line."""
        assert self.process.stdout
        async with asyncio.timeout(WITHIN_S):
            while line := await self.process.stdout.readline():
                self.lines.append(json.loads(line))
                if self.lines[-1]["event"].startswith(event):
                    return self.lines[-1]
        raise AssertionError(f"it ended without {event!r}: {self.lines[-3:]}")

    async def drain(self) -> None:
        """Read up to the end, because a process blocks on a pipe that no one reads."""
        assert self.process.stdout
        while await self.process.stdout.readline():
            pass


@asynccontextmanager
async def running(name: str, environment: Environment, *more: str) -> AsyncIterator[Log]:
    """Run a worker process; kill it at the end if the test did not stop it."""
    process = await launch(name, environment, *more)
    try:
        log = Log(process)
        await log.until("workers run")
        yield log
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


# --- gRPC -----------------------------------------------------------------------------------------


def bearer(actor: str = "ana", *roles: str, valid_for: timedelta = timedelta(hours=1)) -> Metadata:
    """Return the metadata of a call with a token for that actor."""
    token = create_token(TOKEN_KEY, Caller(actor=actor, roles=frozenset(roles)), valid_for)
    return (("authorization", f"Bearer {token}"),)


@asynccontextmanager
async def serving(
    served: Served,
    calls_per_second: float = 10_000,
    port: int = 0,
    requests: Requests | None = None,
    options: Sequence[tuple[str, int]] = (),
) -> AsyncIterator[grpc.aio.Channel]:
    """Serve the service until the block ends; yield a channel to it, with `options`."""
    access = Access(TOKEN_KEY, calls_per_second)
    server = GrpcServer(
        served, "127.0.0.1", port, access, drain=timedelta(seconds=5), requests=requests
    )
    runs = asyncio.create_task(server.run())
    address = f"127.0.0.1:{server.port}"
    try:
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            yield channel
    finally:
        await server.shutdown()
        await runs


def problem(error: grpc.aio.AioRpcError) -> tuple[str, list[Any]]:
    """Return the reason in a failed call's google.rpc.ErrorInfo, and all its details unpacked."""
    trailers = dict(error.trailing_metadata())
    status = Status.FromString(trailers["grpc-status-details-bin"])
    assert status.message == error.details()
    details = []
    for packed in status.details:
        kind = {each.DESCRIPTOR.full_name: each for each in (ErrorInfo, BadRequest, RetryInfo)}[
            packed.TypeName()
        ]
        detail = kind()
        packed.Unpack(detail)
        details.append(detail)
    return details[0].reason, details
