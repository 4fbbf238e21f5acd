"""Real servers for the tests, started once per run on free ports.

`temporal`, `nats_server`, `neo4j_server` and `valkey` each yield a running server with the
address and credentials that a client needs. A test that breaks a server
(`await nats_server.kill()`) starts it again (`await nats_server.start()`), because the rest of the
run uses the same server.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from deploy.local.ports import free_ports
from deploy.local.servers import Nats, Neo4j, Temporal, Valkey
from tests.support.llm_server import LlmServer
from tests.support.servers import RunningServer, Servers, started

# No limits of time for examples: a busy machine is slow, which is not a failure. `fleet` tries the
# same examples in each run, because a run of CI must not fail for an input that no change caused;
# `make fuzz` looks for such inputs with `random`.
settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fleet", settings.get_profile("random"), derandomize=True, database=None)
settings.register_profile("dev", settings.get_profile("fleet"), max_examples=10)
settings.load_profile("fleet")

STARTS_A_SERVER = {"temporal", "nats_server", "neo4j_server", "valkey", "skipping_fleet"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that start a server as slow: `make dev` leaves them out."""
    for item in items:
        if isinstance(item, pytest.Function) and STARTS_A_SERVER.intersection(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def server_homes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
async def temporal(server_homes: Path) -> AsyncIterator[RunningServer]:
    """Start a Temporal development server with the namespace `default`."""
    port, ui_port = free_ports(2)
    server = Temporal(server_homes / "temporal", port, ui_port)
    async with started(server, server.address, port=port) as running:
        yield running


@pytest.fixture(scope="session")
async def nats_server(server_homes: Path) -> AsyncIterator[RunningServer]:
    """Start NATS with JetStream; its store is empty at the start of the run."""
    (port,) = free_ports(1)
    server = Nats(server_homes / "nats", port)
    async with started(
        server, server.url, port=port, user=server.user, password=server.password
    ) as running:
        yield running


@pytest.fixture(scope="session")
async def neo4j_server(server_homes: Path) -> AsyncIterator[RunningServer]:
    """Start Neo4j Community, empty at the start of the run."""
    (port,) = free_ports(1)
    server = Neo4j(server_homes / "neo4j", port)
    async with started(
        server, server.uri, port=port, user=server.user, password=server.password
    ) as running:
        yield running


@pytest.fixture(scope="session")
async def valkey(server_homes: Path) -> AsyncIterator[RunningServer]:
    """Start Valkey, empty at the start of the run; `address` is `host:port`."""
    (port,) = free_ports(1)
    server = Valkey(server_homes / "valkey", port)
    async with started(
        server,
        f"{server.host}:{port}",
        port=port,
        host=server.host,
        password=server.password,
    ) as running:
        yield running


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
