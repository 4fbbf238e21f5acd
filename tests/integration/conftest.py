"""Clients of the real servers, opened as the workers open them."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client as Nats
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError
from neo4j import AsyncDriver, AsyncGraphDatabase
from redis.asyncio import Redis

from activities.cache import Cache
from activities.context import load_scopes
from activities.graph import Graph
from activities.migrations import migrate
from bridge.streams import STREAMS
from tests.conftest import RunningServer
from workers.clients.nats import open_nats
from workers.settings import ROOT, Settings


@pytest.fixture(autouse=True)
def no_settings_of_a_local_stack(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Settings come from the tests alone, whatever stack this checkout runs."""
    home = tmp_path_factory.getbasetemp() / "no-stack"
    monkeypatch.setenv("FLEET_HOME", str(home))
    return home


def nats_settings(server: RunningServer) -> dict[str, Any]:
    return {
        "nats_url": server.address,
        "nats_user": server.user,
        "nats_password": server.password,
    }


@pytest.fixture
async def nats_client(nats_server: RunningServer) -> AsyncIterator[Nats]:
    """A connection to a JetStream without any of the fleet's streams."""
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
    """A driver of a Neo4j that has the fleet's schema."""
    auth = (neo4j_server.user or "neo4j", neo4j_server.password or "")
    async with AsyncGraphDatabase.driver(neo4j_server.address, auth=auth) as driver:
        await migrate(driver)
        yield driver


@pytest.fixture(scope="session")
async def client(valkey: RunningServer) -> AsyncIterator[Redis]:
    """A client of Valkey."""
    client = Redis(host=valkey.host, port=valkey.port, password=valkey.password)
    yield client
    await client.aclose()


@pytest.fixture(scope="session")
def graph(driver: AsyncDriver, client: Redis) -> Graph:
    """The activities that read and write the graph, with the configuration that ships."""
    return Graph(driver, Cache(client), load_scopes(ROOT / "deploy" / "config" / "scopes.yaml"))
