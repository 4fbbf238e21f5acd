"""The servers that the fleet needs, started for tests."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from deploy.local.server import Command, Server
from deploy.local.servers import Temporal
from tests.support.server_process import ServerProcess

READY_WITHIN = timedelta(seconds=300)
"""A generous limit: the machine may be busy with other builds and servers."""


@dataclass(frozen=True)
class RunningServer:
    """A server under test; a client connects to `address`."""

    name: str
    address: str
    port: int
    process: ServerProcess
    host: str = "127.0.0.1"
    user: str | None = None
    password: str | None = None

    async def start(self) -> None:
        """Start the server again after `stop` or `kill`; its data is kept."""
        await self.process.start()

    async def stop(self) -> None:
        """Stop the server gracefully."""
        await self.process.stop()

    async def kill(self) -> None:
        """Kill the server, as a crash would."""
        await self.process.kill()


@dataclass(frozen=True)
class Servers:
    """The four servers together, for tests of the whole fleet."""

    temporal: RunningServer
    nats: RunningServer
    neo4j: RunningServer
    valkey: RunningServer


@dataclass(frozen=True)
class EarlyTemporal(Temporal):
    """A server that suggests continue-as-new after `events` events; by default it is 4,096."""

    events: int = 60

    def prepare(self) -> Command:
        command = super().prepare()
        early = f"limit.historyCount.suggestContinueAsNew={self.events}"
        return replace(command, argv=(*command.argv, "--dynamic-config-value", early))


@asynccontextmanager
async def started(server: Server, address: str, **details: Any) -> AsyncIterator[RunningServer]:
    """Run the server; at the end kill it, because its data is deleted with its folder."""
    log = server.home.with_suffix(".log")
    process = ServerProcess(server, log, READY_WITHIN)
    await process.start()
    running = RunningServer(server.name, address, process=process, **details)
    yield running
    await running.kill()
