"""A whole fleet whose processes can be killed: servers, and one worker of each kind."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import nats
import neo4j
import psutil
from dotenv import dotenv_values
from nats.aio.client import Client as NatsClient
from redis.asyncio import Redis
from temporalio.api.enums.v1 import EventType
from temporalio.client import WorkflowExecutionDescription, WorkflowHandle
from temporalio.common import SearchAttributeKey
from temporalio.service import RPCError, RPCStatusCode

from deploy.local.ports import free_ports
from deploy.local.server import Command, Server, ServerNotReady, write_private
from deploy.local.servers import Nats, Neo4j, Temporal, Valkey, Workers
from deploy.local.settings import GRPC_PORTS
from tests.support.checker import check
from tests.support.fleet import TOKEN_KEY, connect
from tests.support.server_process import ServerProcess
from tests.support.servers import READY_WITHIN
from workers.payload_codec import encrypting_converter
from workflows.models.report import WorkspaceReport
from workflows.models.story import StoryInput, StoryView
from workflows.search_attributes import STORY_STATE

SERVERS = ("temporal", "nats", "neo4j", "valkey")
WORKERS = ("story", "agents", "context", "bridge", "inbox")
SAMPLE_STORY = Path(__file__).parents[2] / "deploy" / "examples" / "ratelimit" / "story.json"

GOOD_REPORT = WorkspaceReport.model_validate(
    {
        "job_id": "job-1",
        "commit": "c0ffee1",
        "actor": "ana",
        "build": {"ok": True},
        "unit": {"ok": True, "passed": 10, "failed": 0, "coverage": 95.0},
        "static": {"ok": True, "sonar": {"quality_gate": "OK", "new_critical": 0, "new_major": 0}},
        "e2e": {"ok": True, "passed": 3, "failed": 0},
    }
)


@dataclass(frozen=True)
class SiteWorkers(Workers):
    """Workers with the settings of their site, also where this process's environment has others."""

    def prepare(self) -> Command:
        command = super().prepare()
        settings = {name: value or "" for name, value in dotenv_values(self.home / "env").items()}
        return replace(command, env={**command.env, **settings})


class Site:
    """A fleet that runs inside `async with`; on exit all its processes are killed.

    Its folder is deleted afterwards, so nothing needs a graceful stop.
    """

    def __init__(
        self,
        home: Path,
        llm_url: str,
        payload_key: bytes | None = None,
        workers: Sequence[str] = WORKERS,
        more: Mapping[str, str] | None = None,
    ) -> None:
        """Plan the fleet.

        Args:
            home: its folder.
            llm_url: the engine.
            payload_key: if given, payloads are encrypted.
            workers: the processes of the fleet.
            more: variables in addition.
        """
        self.home, self.llm_url = home, llm_url
        self.workers, self.more = tuple(workers), dict(more or {})
        self.payload_keys = [payload_key] if payload_key else []
        self.started: set[int] = set()
        """Process ids; each is also the session id of the process's children."""
        ports = iter(free_ports(len(self.workers) + 5 + len(GRPC_PORTS)))
        self.grpc_ports = {name: next(ports) for name in GRPC_PORTS}
        self.temporal = Temporal(home / "temporal", next(ports), next(ports))
        self.nats = Nats(home / "nats", next(ports))
        self.neo4j = Neo4j(home / "neo4j", next(ports))
        self.valkey = Valkey(home / "valkey", next(ports))
        servers: dict[str, Server] = {
            "temporal": self.temporal,
            "nats": self.nats,
            "neo4j": self.neo4j,
            "valkey": self.valkey,
            **{name: SiteWorkers(home, next(ports), name) for name in self.workers},
        }
        self.processes = {
            name: ServerProcess(server, home / "logs" / f"{name}.log", READY_WITHIN)
            for name, server in servers.items()
        }

    @property
    def env(self) -> dict[str, str]:
        return {
            "TEMPORAL_ADDRESS": self.temporal.address,
            "NATS_URL": self.nats.url,
            "NATS_USER": self.nats.user,
            "NATS_PASSWORD": self.nats.password,
            "NEO4J_URI": self.neo4j.uri,
            "NEO4J_USER": self.neo4j.user,
            "NEO4J_PASSWORD": self.neo4j.password,
            "REDIS_HOST": self.valkey.host,
            "REDIS_PORT": str(self.valkey.port),
            "REDIS_PASSWORD": self.valkey.password,
            "VLLM_URL": self.llm_url,
            "VLLM_MODEL": "",
            "DRAIN_SECONDS": "5",
            "GRPC_TOKEN_KEY": TOKEN_KEY,
            **({"PAYLOAD_KEYS": self.payload_keys[0].hex()} if self.payload_keys else {}),
            "STORY_SWEEP_SECONDS": "86400",  # so that tests of replays run before the sweep
            **{name.upper(): str(port) for name, port in self.grpc_ports.items()},
            **self.more,
        }

    async def __aenter__(self) -> Self:
        write_private(
            self.home / "env", "".join(f"{name}={value}\n" for name, value in self.env.items())
        )
        try:
            await self.start(*SERVERS)
            await self.start(*self.workers)
        except BaseException as error:
            await self.kill(*self.processes)
            if isinstance(error, ServerNotReady) and error.log:  # deleted with the folder
                error.add_note(error.log.read_text(errors="replace")[-2_000:])
            raise
        converter = encrypting_converter(self.payload_keys)
        self.client = await connect(self.temporal.address, converter=converter)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.kill(*self.processes)

    async def start(self, *names: str) -> None:
        await asyncio.gather(*(self.processes[name].start() for name in names))
        self.started |= {pid for process in self.processes.values() if (pid := process.pid)}

    async def stop(self, *names: str) -> None:
        await asyncio.gather(*(self.processes[name].stop() for name in names))

    async def kill(self, *names: str) -> None:
        await asyncio.gather(*(self.processes[name].kill() for name in names))

    async def kill_and_start(self, *names: str) -> None:
        """Kill the processes and start them again, servers before the workers that need them."""
        await self.kill(*names)
        await self.start(*(name for name in names if name in SERVERS))
        await self.start(*(name for name in names if name in self.workers))

    def orphans(self) -> list[str]:
        """Return the processes that outlived the worker or server that started them."""
        ours = {process.pid for process in self.processes.values()}
        return [
            f"{pid}: {name}"
            for pid, name, session in sessions()
            if session in self.started and session not in ours
        ]

    @asynccontextmanager
    async def clients(self) -> AsyncIterator[tuple[NatsClient, neo4j.AsyncDriver]]:
        auth = (self.neo4j.user, self.neo4j.password)
        async with neo4j.AsyncGraphDatabase.driver(
            self.neo4j.uri,
            auth=auth,
            notifications_min_severity="OFF",  # as the fleet's own driver
        ) as driver:
            connection = await nats.connect(
                self.nats.url, user=self.nats.user, password=self.nats.password
            )
            try:
                yield connection, driver
            finally:
                await connection.close()

    def valkey_client(self) -> Redis:
        """Return a client of Valkey that decodes responses to text."""
        return Redis(
            host=self.valkey.host,
            port=self.valkey.port,
            password=self.valkey.password,
            decode_responses=True,
        )

    async def kept_answers(self, workflow_id: str) -> list[str]:
        """Return the Valkey keys that hold a deliberation's kept answers."""
        async with self.valkey_client() as valkey:
            return [key async for key in valkey.scan_iter(f"swe:answer:{workflow_id}:*")]

    async def patient(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Repeat the call while servers are unavailable and return its answer.

        It is repeated until the test's timeout ends it.

        Raises:
            AssertionError: a process of the site has ended, and the test did not end it.
        """
        answer = asyncio.create_task(patient(call))
        try:
            while not answer.done():
                self.check_processes()
                await asyncio.wait({answer}, timeout=0.5)
            return answer.result()
        finally:
            answer.cancel()

    def check_processes(self) -> None:
        """Raise an error with the log's end if a process has ended that the test did not end."""
        for name, process in self.processes.items():
            if process.ended_by_itself:
                end_of_log = process.log.read_text(errors="replace")[-4_000:]
                raise AssertionError(
                    f"{name} has ended by itself. The end of its log:\n{end_of_log}"
                )

    # --- stories ----------------------------------------------------------------------------------

    async def begin(self, story_id: str, **fields: Any) -> WorkflowHandle[Any, Any]:
        """Start a story whose gates are opened by policy."""
        story = json.loads(SAMPLE_STORY.read_text())
        request = StoryInput.model_validate(
            story | {"story_id": story_id, "approvals": "auto"} | fields
        )
        started: WorkflowHandle[Any, Any] = await self.client.start_workflow(
            "StoryWorkflow", request, id=f"story-{story_id}", task_queue="story"
        )
        return started

    async def finish(self, story_id: str) -> str:
        """Send the report that BUILD waits for, wait for the end and return the final state."""
        handle = self.client.get_workflow_handle(f"story-{story_id}")
        while await self.attribute(story_id, STORY_STATE) not in ("BUILD", "TEST", "DOCS", "DONE"):
            await asyncio.sleep(0.5)
        await self.patient(
            lambda: handle.execute_update(
                "report", GOOD_REPORT, id=f"report-{story_id}", result_type=StoryView
            )
        )
        result = await self.patient(handle.result)
        return str(result["state"])

    async def attribute(self, story_id: str, key: SearchAttributeKey[str]) -> str | None:
        """Return a search attribute's value; unlike a query, this does not load the workflow."""
        handle = self.client.get_workflow_handle(f"story-{story_id}")
        description: WorkflowExecutionDescription = await self.patient(handle.describe)
        return description.typed_search_attributes.get(key)

    async def until_scheduled(self, workflow_id: str, activity: str) -> None:
        """Follow the workflow's history until it has scheduled that activity."""
        handle = self.client.get_workflow_handle(workflow_id)

        async def follow() -> str:
            last = ""
            async for event in handle.fetch_history_events(wait_new_event=True):
                last = str(event)
                if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED:
                    scheduled = event.activity_task_scheduled_event_attributes
                    if scheduled.activity_type.name == activity:
                        return ""
            return last

        last = await self.patient(follow)
        assert not last, f"{workflow_id} ended without {activity}: {last[:2_000]}"

    async def differences(self, *story_ids: str) -> list[str]:
        """Return the checker's differences for stories whose work is all done."""
        async with self.clients() as (connection, driver):
            return await check(self.client, connection, driver, story_ids)


def sessions() -> Iterator[tuple[int, str, int]]:
    """Yield the process id, name and session id of every process that is not a zombie."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):  # it has ended in the meantime
            if process.status() != psutil.STATUS_ZOMBIE:
                yield process.pid, process.name(), os.getsid(process.pid)


PASSING = (
    RPCStatusCode.UNAVAILABLE,
    RPCStatusCode.DEADLINE_EXCEEDED,
    RPCStatusCode.CANCELLED,
    RPCStatusCode.UNKNOWN,
    RPCStatusCode.INTERNAL,
    RPCStatusCode.NOT_FOUND,
    RPCStatusCode.FAILED_PRECONDITION,
    RPCStatusCode.RESOURCE_EXHAUSTED,
)


async def patient(call: Callable[[], Awaitable[Any]]) -> Any:
    """Repeat the call while servers are unavailable and return its answer."""
    while True:
        try:
            return await call()
        except RPCError as error:
            if error.status not in PASSING:
                raise
        await asyncio.sleep(0.2)
