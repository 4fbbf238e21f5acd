"""The fleet's worker processes on the real servers, started as a person or supervisor would."""

import asyncio
import json
import os
import sys
import uuid
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from google.protobuf.duration_pb2 import Duration
from neo4j import AsyncGraphDatabase
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import (
    DescribeTaskQueueRequest,
    RegisterNamespaceRequest,
)
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.converter import DataConverter
from temporalio.service import RPCError, RPCStatusCode

from activities.graph.councils import load_councils
from deploy.local.ports import free_ports
from deploy.local.settings import GRPC_PORTS
from tests.support.llm_server import LlmServer
from tests.support.polling import until
from tests.support.servers import RunningServer, Servers
from workers.clients.queries import RepeatedQueries
from workers.environment import ALIASES, ROOT
from workers.settings import Settings

Environment = dict[str, str]

LONGEST_LINE = 16 * 1024 * 1024
"""Bytes of a line that a process may write: the logs quote what was sent."""

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
    """Return the variables of a worker on these servers, without any other fleet variables.

    Its coverage is not measured: most of its code runs in other tests' own process, and a traced
    worker takes a quarter more of the processor.
    """
    codec_port, *ports = free_ports(1 + len(GRPC_PORTS))
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.lower() not in {*Settings.model_fields, *ALIASES}
        and not name.startswith("COVERAGE_")
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
            await there.workflow_service.describe_task_queue(
                DescribeTaskQueueRequest(namespace=name, task_queue=TaskQueue(name="story"))
            )
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            return False
        return True

    await until(known)  # each of the server's services knows it only after some time
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
        sys.executable,
        *arguments,
        env=environment,
        cwd=ROOT,
        stdout=PIPE,
        stderr=PIPE,
        limit=LONGEST_LINE,
    )


class Log:
    """What a process writes: JSON lines on stdout, and texts on stderr."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.ready: dict[str, Any] = {}
        """The line that says that the workers run."""
        self._found = 0
        # A process blocks on a pipe that no one reads.
        self._reading = asyncio.gather(self._read_lines(), self._read_errors())

    async def until(self, event: str) -> dict[str, Any]:
        """Wait for the next line whose event begins with `event`, and return it."""

        def found() -> dict[str, Any] | None:
            ended = self._reading.done()
            while self._found < len(self.lines):
                self._found += 1
                line = self.lines[self._found - 1]
                if line["event"].startswith(event):
                    return line
            assert not ended, f"it ended without {event!r}: {self.lines[-3:]} {self.errors[-9:]}"
            return None

        line = await until(found)
        assert line
        return line

    async def ended(self) -> int:
        """Wait until the process has ended and all it wrote is read; return its exit code."""
        await self._reading
        return await self.process.wait()

    async def _read_lines(self) -> None:
        assert self.process.stdout
        async for line in self.process.stdout:
            if line.startswith(b"{"):
                self.lines.append(json.loads(line))
            else:  # the Temporal SDK's core does not log in JSON
                self.errors.append(line.decode(errors="replace"))

    async def _read_errors(self) -> None:
        assert self.process.stderr
        async for line in self.process.stderr:
            self.errors.append(line.decode(errors="replace"))


@asynccontextmanager
async def running(name: str, environment: Environment, *more: str) -> AsyncIterator[Log]:
    """Run a worker process; kill it at the end if the test did not stop it.

    Its last lines are printed, and pytest shows them if the test fails.
    """
    process = await launch(name, environment, *more)
    log = Log(process)
    try:
        log.ready = await log.until("workers run")
        yield log
    finally:
        if process.returncode is None:
            process.kill()
        await log.ended()
        print(f"The last lines of {name}:", *log.lines[-40:], *log.errors[-40:], sep="\n")


async def new_environment(servers: Servers, llm: LlmServer, **more: str) -> Environment:
    """Return the variables of a worker in a new namespace, with the variables in `more`."""
    return variables(servers, llm) | {"TEMPORAL_NAMESPACE": await a_namespace(servers)} | more


@asynccontextmanager
async def whole_fleet(environment: Environment, *names: str) -> AsyncIterator[Client]:
    """Run these worker processes, or one with all; yield a client in their namespace."""
    async with AsyncExitStack() as stack:
        await asyncio.gather(
            *(stack.enter_async_context(running(name, environment)) for name in names or ["all"])
        )
        yield await connect(environment["TEMPORAL_ADDRESS"], environment["TEMPORAL_NAMESPACE"])
