"""Clients of the real servers, opened as the workers open them."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client as Nats
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from bridge.streams import STREAMS
from tests.conftest import RunningServer
from workers.clients.nats import open_nats
from workers.settings import Settings


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
