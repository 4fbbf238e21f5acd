"""The fleet's worker processes on the real servers, started as a person or supervisor would."""

import asyncio
import json
import os
import sys
import uuid
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from google.protobuf.duration_pb2 import Duration
from neo4j import AsyncGraphDatabase
from temporalio.api.workflowservice.v1 import RegisterNamespaceRequest
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.converter import DataConverter
from temporalio.service import RPCError, RPCStatusCode

from activities.graph.councils import load_councils
from deploy.local.ports import free_ports
from deploy.local.settings import GRPC_PORTS
from tests.support.llm_server import LlmServer
from tests.support.polling import WITHIN_S, until
from tests.support.servers import RunningServer, Servers
from workers.clients.queries import RepeatedQueries
from workers.settings import ALIASES, ROOT, Settings

Environment = dict[str, str]

TOKEN_KEY = "a key of the tests, of 32 bytes or more"


async def connect(
    address: str, namespace: str = "default", converter: DataConverter = pydantic_data_converter
) -> Client:
    """Open a Temporal client like the product's; by default without its external storage."""
    return await Client.connect(
        address,
        namespace=namespace,
        data_converter=converter,
        interceptors=[RepeatedQueries()],
    )


def variables(servers: Servers, llm: LlmServer) -> Environment:
    """Return the variables of a worker on these servers, without any other fleet variables."""
    codec_port, *ports = free_ports(1 + len(GRPC_PORTS))
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
        "CODEC_PORT": str(codec_port),
        **{name.upper(): str(port) for name, port in zip(GRPC_PORTS, ports, strict=True)},
    }


async def a_namespace(servers: Servers) -> str:
    """Register a new namespace, so that workers take no work left by other tests.

    Councils left by other tests are removed, because plans may choose their roles.
    """
    await _remove_other_councils(servers.neo4j)
    client = await connect(servers.temporal.address)
    name = f"test-{uuid.uuid4().hex[:8]}"
    await client.workflow_service.register_namespace(
        RegisterNamespaceRequest(
            namespace=name, workflow_execution_retention_period=Duration(seconds=86_400)
        )
    )
    there = await connect(servers.temporal.address, name)

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


async def _remove_other_councils(neo4j: RunningServer) -> None:
    auth = (neo4j.user or "", neo4j.password or "")
    async with AsyncGraphDatabase.driver(neo4j.address, auth=auth) as driver:
        await driver.execute_query(
            "MATCH (c:Council) WHERE NOT c.role IN $shipped DETACH DELETE c",
            shipped=list(load_councils(ROOT / "deploy" / "config" / "councils.yaml").councils),
        )


async def launch(name: str, environment: Environment, *more: str) -> Process:
    arguments = ("-m", "workers", name, *more)
    return await asyncio.create_subprocess_exec(
        sys.executable, *arguments, env=environment, cwd=ROOT, stdout=PIPE, stderr=PIPE
    )


class Log:
    """What a process writes: JSON lines on stdout, and errors on stderr."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self.last: deque[str] = deque(maxlen=40)

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
        """Read both pipes up to the end, because a process blocks on a pipe that no one reads."""
        assert self.process.stdout
        assert self.process.stderr
        await asyncio.gather(self._read(self.process.stdout), self._read(self.process.stderr))

    async def _read(self, pipe: asyncio.StreamReader) -> None:
        while line := await pipe.readline():
            self.last.append(line.decode(errors="replace").rstrip())


@asynccontextmanager
async def running(name: str, environment: Environment, *more: str) -> AsyncIterator[Log]:
    """Run a worker process; kill it at the end if the test did not stop it.

    A failure within the block shows the last lines that the process wrote.
    """
    process = await launch(name, environment, *more)
    log = Log(process)
    try:
        await log.until("workers run")
        yield log
    except Exception as failure:
        failure.add_note("\n".join([f"The last lines of {name}:", *log.last]))
        raise
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def new_environment(servers: Servers, llm: LlmServer, **more: str) -> Environment:
    """Return the variables of a worker in a new namespace, with the variables in `more`."""
    return variables(servers, llm) | {"TEMPORAL_NAMESPACE": await a_namespace(servers)} | more


@asynccontextmanager
async def whole_fleet(environment: Environment, *names: str) -> AsyncIterator[Client]:
    """Run these worker processes, or one with all; yield a client in their namespace."""
    async with AsyncExitStack() as stack:
        logs = await asyncio.gather(
            *(stack.enter_async_context(running(name, environment)) for name in names or ["all"])
        )
        readers = [asyncio.create_task(log.drain()) for log in logs]
        yield await connect(environment["TEMPORAL_ADDRESS"], environment["TEMPORAL_NAMESPACE"])
        for reader in readers:
            reader.cancel()
