"""Real servers for the tests, started once per run on free ports.

`temporal`, `nats_server`, `neo4j_server` and `valkey` each yield a running server with the
address and credentials that a client needs. A test that breaks a server
(`await nats_server.kill()`) starts it again (`await nats_server.start()`), because the rest of the
run uses the same server.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import settings

from deploy.local.process import ServerProcess, free_ports
from deploy.local.servers import Nats, Neo4j, Server, Temporal, Valkey
from tests.support.llm_server import LlmServer

# No deadline for examples: a busy machine is slow, which is not a failure.
settings.register_profile("fleet", deadline=None)
settings.load_profile("fleet")

READY_WITHIN = timedelta(seconds=120)
"""A generous limit: the machine may be busy with other builds and servers."""


@dataclass(frozen=True)
class RunningServer:
    """A server under test; a client connects to `address`."""

    name: str
    address: str
    port: int
    host: str
    process: ServerProcess
    user: str | None = None
    password: str | None = None
    ui_url: str | None = None

    async def start(self) -> None:
        """Start the server again after `stop` or `kill`; its data is kept."""
        await self.process.start()

    async def stop(self) -> None:
        """Stop the server gracefully."""
        await self.process.stop()

    async def kill(self) -> None:
        """Kill the server, as a crash would."""
        await self.process.kill()


@pytest.fixture(scope="session")
def server_homes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


def _process(server: Server, homes: Path) -> ServerProcess:
    return ServerProcess(server, homes / f"{server.name}.log", READY_WITHIN)


@pytest.fixture(scope="session")
async def temporal(server_homes: Path) -> AsyncIterator[RunningServer]:
    """Start a Temporal development server with the namespace `default`."""
    port, ui_port = free_ports(2)
    server = Temporal(server_homes / "temporal", port, ui_port)
    process = _process(server, server_homes)
    await process.start()
    running = RunningServer(
        "temporal",
        server.address,
        port=port,
        host="127.0.0.1",
        ui_url=server.ui_url,
        process=process,
    )
    yield running
    await running.kill()  # its data is deleted with the folder


@pytest.fixture(scope="session")
async def nats_server(server_homes: Path) -> AsyncIterator[RunningServer]:
    """Start NATS with JetStream; its store is empty at the start of the run."""
    (port,) = free_ports(1)
    server = Nats(server_homes / "nats", port)
    process = _process(server, server_homes)
    await process.start()
    running = RunningServer(
        "nats",
        server.url,
        user=server.user,
        password=server.password,
        port=port,
        host="127.0.0.1",
        process=process,
    )
    yield running
    await running.kill()  # its data is deleted with the folder


@pytest.fixture(scope="session")
async def neo4j_server(server_homes: Path) -> AsyncIterator[RunningServer]:
    """Start Neo4j Community, empty at the start of the run."""
    (port,) = free_ports(1)
    server = Neo4j(server_homes / "neo4j", port)
    process = _process(server, server_homes)
    await process.start()
    running = RunningServer(
        "neo4j",
        server.uri,
        user=server.user,
        password=server.password,
        port=port,
        host="127.0.0.1",
        process=process,
    )
    yield running
    await running.kill()  # its data is deleted with the folder


@pytest.fixture(scope="session")
async def valkey(server_homes: Path) -> AsyncIterator[RunningServer]:
    """Start Valkey, empty at the start of the run; `address` is `host:port`."""
    (port,) = free_ports(1)
    server = Valkey(server_homes / "valkey", port)
    process = _process(server, server_homes)
    await process.start()
    running = RunningServer(
        "valkey",
        f"{server.host}:{port}",
        password=server.password,
        port=port,
        host=server.host,
        process=process,
    )
    yield running
    await running.kill()  # its data is deleted with the folder


@dataclass(frozen=True)
class Servers:
    """The four servers together, for tests of the whole fleet."""

    temporal: RunningServer
    nats: RunningServer
    neo4j: RunningServer
    valkey: RunningServer


@pytest.fixture(scope="session")
async def servers(
    temporal: RunningServer,
    nats_server: RunningServer,
    neo4j_server: RunningServer,
    valkey: RunningServer,
) -> Servers:
    return Servers(temporal, nats_server, neo4j_server, valkey)


@pytest.fixture
async def llm() -> AsyncIterator[LlmServer]:
    """Start a deterministic LLM behind real HTTP; a test can make it misbehave."""
    async with LlmServer() as server:
        yield server
