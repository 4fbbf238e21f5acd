"""Clients of the real servers, and the variables with which worker processes find them."""

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from nats.aio.client import Client as Nats
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError
from neo4j import AsyncDriver, AsyncGraphDatabase
from redis.asyncio import Redis

from activities.cache import Cache
from activities.graph.activities import Graph
from activities.graph.migrations import migrate
from activities.graph.scopes import load_scopes
from bridge.jetstream.streams import STREAMS
from tests.support.fleet import Environment, a_namespace, variables
from tests.support.llm_server import LlmServer
from tests.support.servers import RunningServer, Servers
from tests.support.stories import batch, deliberation, new_story, one_of_each
from workers.clients.nats import open_nats
from workers.environment import ROOT
from workers.settings import Settings


@pytest.fixture(autouse=True, scope="session")
def no_settings_of_a_local_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Take settings from the tests alone, even if this checkout runs a local stack."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEET_HOME", str(tmp_path_factory.mktemp("no-stack")))
        patch.setenv("COLUMNS", "250")  # for commands that run in this process
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


@pytest.fixture
async def namespace(servers: Servers) -> str:
    return await a_namespace(servers)


@pytest.fixture
def environment(servers: Servers, llm: LlmServer, namespace: str) -> Environment:
    return variables(servers, llm) | {"TEMPORAL_NAMESPACE": namespace}
