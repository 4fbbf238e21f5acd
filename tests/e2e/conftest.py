"""One complete stack for the run: every server, Ray Serve with vLLM, and the workers."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats
import neo4j
import psutil
import pytest
from dotenv import dotenv_values
from temporalio.client import Client
from temporalio.service import RPCError

from deploy.local.settings import StackSettings
from deploy.local.stack import Stack
from tests.support.checker import check
from tests.support.fleet import connect
from tests.support.polling import until
from workers.payload_codec import encrypting_converter

GATES = {"approve_scope": "PO", "approve_design": "PO", "qa_passed": "QA", "docs_ready": "PO"}


@dataclass(frozen=True)
class Ended:
    """The result of a command."""

    code: int
    out: str
    err: str

    @property
    def output(self) -> str:
        return self.out + self.err


def answer_of(query: Ended) -> Any:
    return json.loads(query.out)["queryResult"][0]


@dataclass(frozen=True)
class Fleet:
    """The stack under test, controlled through its commands as subprocesses."""

    stack: Stack

    @property
    def env(self) -> dict[str, str]:
        values = dotenv_values(self.stack.env_file)
        return {name: value for name, value in values.items() if value is not None}

    async def run(self, program: str, *arguments: str) -> Ended:
        binary = Path(sys.executable).with_name(program)
        process = await asyncio.create_subprocess_exec(
            str(binary),
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | self.env | {"FLEET_HOME": str(self.stack.home)},
        )
        out, err = await asyncio.wait_for(process.communicate(), 900)
        return Ended(process.returncode or 0, out.decode(), err.decode())

    async def temporal(self, *arguments: str) -> Ended:
        return await self.run("temporal", *arguments, "--address", self.env["TEMPORAL_ADDRESS"])

    async def client(self) -> Client:
        """Open a Temporal client that reads the stack's encrypted payloads."""
        keys = [bytes.fromhex(self.env["PAYLOAD_KEYS"])]
        return await connect(self.env["TEMPORAL_ADDRESS"], converter=encrypting_converter(keys))

    async def start(self, folder: Path, **story: Any) -> Ended:
        file = folder / "story.json"
        file.write_text(json.dumps(story))
        return await self.temporal(
            "workflow", "start", "--type", "StoryWorkflow", "--task-queue", "story",
            "--workflow-id", f"story-{story['story_id']}", "--input-file", str(file),
        )  # fmt: skip

    async def update(self, story_id: str, name: str, request: dict[str, Any]) -> Ended:
        return await self.temporal(
            "workflow", "update", "execute", "--workflow-id", f"story-{story_id}",
            "--name", name, "--input", json.dumps(request),
        )  # fmt: skip

    async def ask(self, story_id: str, name: str) -> Ended:
        return await self.temporal(
            "workflow", "query", "--workflow-id", f"story-{story_id}", "--type", name,
            "--output", "json",
        )  # fmt: skip

    async def query(self, story_id: str, name: str) -> Any:
        ended = await self.ask(story_id, name)
        assert ended.code == 0, ended.output
        return answer_of(ended)

    async def result(self, story_id: str) -> Ended:
        return await self.temporal("workflow", "result", "--workflow-id", f"story-{story_id}")

    async def until(
        self, story_id: str, holds: Callable[[dict[str, Any]], bool], within_s: float = 1200
    ) -> dict[str, Any]:
        """Poll the query `state` until `holds` returns true, and return the state.

        A poll starts the CLI and wakes a worker. The model needs the processor, so polls are rare,
        and one may fail: `holds` then gets a dict with `failed` alone.
        """

        async def state() -> Any:
            ended = await self.ask(story_id, "state")
            return answer_of(ended) if ended.code == 0 else {"failed": ended.output}

        view: dict[str, Any] = await until(state, holds, within_s=within_s, every_s=5)
        return view

    async def writing(self, deliberation_id: str) -> None:
        """Wait until an agent of the deliberation is in the middle of its answer."""
        client = await self.client()
        handle = client.get_workflow_handle(deliberation_id)

        async def tokens() -> int:
            try:
                description = (await handle.describe()).raw_description
            except RPCError:  # it may not have started yet
                return 0
            beats = [
                beat
                for pending in description.pending_activities
                for beat in await client.data_converter.decode(pending.heartbeat_details.payloads)
            ]
            return max((beat["tokens"] for beat in beats), default=0)

        await until(tokens, lambda written: written > 20, within_s=1200, every_s=0.5)

    def processes(self, name: str, argument: str = "") -> list[int]:
        """Return the ids of the stack's processes with that name prefix and command line text."""
        mark = f"FLEET_HOME={self.stack.home}".encode()
        return [
            process.pid
            for process in psutil.process_iter(["name", "cmdline"])
            if process.info["name"].startswith(name)
            and any(argument in word for word in process.info["cmdline"] or [])
            # psutil's `environ` may be empty for a process that has renamed itself.
            and mark in Path("/proc", str(process.pid), "environ").read_bytes()
        ]

    async def differences(self, *story_ids: str) -> list[str]:
        """Return the differences that the checker finds in these stories."""
        env = self.env
        auth = (env["NEO4J_USER"], env["NEO4J_PASSWORD"])
        client = await self.client()
        async with neo4j.AsyncGraphDatabase.driver(env["NEO4J_URI"], auth=auth) as driver:
            bus = await nats.connect(
                env["NATS_URL"], user=env["NATS_USER"], password=env["NATS_PASSWORD"]
            )
            try:
                return await check(client, bus, driver, story_ids)
            finally:
                await bus.close()

    async def gate(self, story_id: str, gate: str) -> dict[str, Any]:
        return await self.until(story_id, lambda view: view.get("pending_gate") == gate)


@pytest.fixture(scope="session")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    home = tmp_path_factory.mktemp("fleet")
    fleet = Fleet(Stack(StackSettings.load(home=home, pick_free_ports=True)))
    try:
        await fleet.stack.up()
        yield fleet
    finally:
        await fleet.stack.down()
