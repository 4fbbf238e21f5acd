"""An external agent: takes the fleet's commands from NATS and answers with a separate LLM.

It uses none of the fleet's code, only the two subjects (see README.md). Any number of agents of a
role share its commands. If an agent is killed during a call, its command goes to another after
ACK_WAIT_S; one that receives a signal to stop returns its command at once.

    python -m deploy.examples.external_agent.agent --role DEV
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import nats
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeout
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig
from nats.js.errors import NotFoundError
from openai import AsyncOpenAI, OpenAIError
from openai.types.shared_params import ResponseFormatJSONSchema, ResponseFormatText
from openai.types.shared_params.response_format_json_schema import JSONSchema

STREAM = "AGENT_COMMANDS"
INBOX = "_INBOX_agent"
"""Where the user `agent` may get replies; only agents can read commands there."""
ACK_WAIT_S = 20.0
"""A command whose agent has been silent for so long goes to the next agent of the role."""
BEAT_S = 5.0
"""How often the agent reports progress; the fleet gives it up after 60 s of silence."""
SILENT_LLM_S = 120.0
AGAIN_S = 1.0

COMMAND = (
    *("task_id", "agent_id", "call_id", "act", "prompt", "answer_format", "answer_schema"),
    *("max_tokens", "temperature", "seed"),
)
"""The fields that are read from a command; it may have more."""


@dataclass
class Written:
    """The LLM's output so far.

    tokens_out counts chunks until the LLM reports the exact number.
    """

    text: list[str] = field(default_factory=list)
    tokens_in: int = 0
    tokens_out: int = 0


class Agent:
    """An agent that takes one command after the other."""

    def __init__(self, connection: Nats, llm: AsyncOpenAI, model: str, name: str) -> None:
        self._jetstream = connection.jetstream()
        self._llm = llm
        self._model = model
        self._name = name

    async def run(self, role: str) -> None:
        """Work until cancelled."""
        commands = await bind(self._jetstream, role)
        print(f"{self._name} takes commands from agent.cmd.{role}", flush=True)
        while True:
            try:
                (message,) = await commands.fetch(1, timeout=30)
                await self._handle(message)
            except NatsTimeout:
                continue
            except NatsError as error:
                print(f"{self._name} waits for NATS: {error!r}", flush=True)
                await asyncio.sleep(AGAIN_S)

    async def _handle(self, message: Msg) -> None:
        """Answer one command, then acknowledge it; when cancelled, return it."""
        try:
            if expired(message):
                await message.ack()  # the fleet has asked another agent meanwhile
                return
            fields = json.loads(message.data)
            command = {name: fields[name] for name in COMMAND}
        except (ValueError, TypeError, KeyError) as error:
            print(f"{self._name} refuses what is not a command: {error!r}", flush=True)
            await message.term()
            return
        print(f"{self._name} takes {command['call_id']}: {command['act']}", flush=True)
        began = time.monotonic()
        written = Written()
        over = asyncio.Event()
        beating = asyncio.create_task(self._beat(message, command, written, over))
        try:
            answer = await self._ask(command, written)
        except asyncio.CancelledError:
            with contextlib.suppress(NatsError):
                await message.nak()
            raise
        finally:
            over.set()
            await beating
        duration = {"duration_ms": round((time.monotonic() - began) * 1000)}
        await self._report(command, written, **answer, **duration)
        await message.ack()
        print(f"{self._name} is done with {command['call_id']}: {answer['status']}", flush=True)

    async def _ask(self, command: dict[str, Any], written: Written) -> dict[str, Any]:
        """Return the LLM's answer, or its failure, as fields of a response."""
        try:
            stream = await self._llm.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": command["prompt"]}],
                response_format=decoding(command),
                temperature=command["temperature"],
                max_tokens=command["max_tokens"],
                seed=command["seed"],
                stream=True,
                stream_options={"include_usage": True},
            )
            async for chunk in stream:
                if chunk.usage:
                    written.tokens_in = chunk.usage.prompt_tokens
                    written.tokens_out = chunk.usage.completion_tokens
                for choice in chunk.choices:
                    if choice.delta.content:
                        written.text.append(choice.delta.content)
                        written.tokens_out += 1
        except (OpenAIError, OSError) as error:
            return {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        return {"status": "done", "content": "".join(written.text)}

    async def _beat(
        self, message: Msg, command: dict[str, Any], written: Written, over: asyncio.Event
    ) -> None:
        """Report to the fleet and JetStream that work is in progress; at once, then regularly."""
        while not over.is_set():
            with contextlib.suppress(NatsError):  # the next beat reports it
                await message.in_progress()
                await self._publish(command, written, {"status": "working"})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), BEAT_S)

    async def _report(self, command: dict[str, Any], written: Written, **answer: Any) -> None:
        """Publish the answer, with retries without limit: it is paid for."""
        while True:
            try:
                await self._publish(command, written, answer)
            except NatsError as error:
                print(f"{self._name} cannot answer yet: {error!r}", flush=True)
                await asyncio.sleep(AGAIN_S)
            else:
                return

    async def _publish(
        self, command: dict[str, Any], written: Written, fields: dict[str, Any]
    ) -> None:
        body = {
            "task_id": command["task_id"],
            "agent_id": command["agent_id"],
            "call_id": command["call_id"],
            "timestamp": datetime.now(UTC).isoformat(),
            "model": self._model,
            "tokens_in": written.tokens_in,
            "tokens_out": written.tokens_out,
            **fields,
        }
        headers = None
        if fields["status"] != "working":  # stored once, also if it is published again
            headers = {"Nats-Msg-Id": f"{self._name}/{command['call_id']}"}
        await self._jetstream.publish(
            f"agent.response.{token(command['task_id'])}",
            json.dumps(body).encode(),
            headers=headers,
        )


def decoding(command: dict[str, Any]) -> ResponseFormatText | ResponseFormatJSONSchema:
    """Return how the LLM has to write: as text, or as a document of the command's schema."""
    if command["answer_format"] == "markdown":
        return {"type": "text"}
    form: JSONSchema = {
        "name": command["act"],
        "strict": True,
        "schema": command["answer_schema"],
    }
    return {"type": "json_schema", "json_schema": form}


def token(task_id: str) -> str:
    """Return the task's id as one token of a subject: all but letters, digits, `-`, `_` encoded."""
    return quote(task_id, safe="").replace(".", "%2E").replace("~", "%7E")


def expired(message: Msg) -> bool:
    """Return whether the fleet has stopped waiting for an answer to this command."""
    until = (message.headers or {}).get("ce-expirytime")
    return until is not None and datetime.fromisoformat(until) < datetime.now(UTC)


async def bind(jetstream: JetStreamContext, role: str) -> JetStreamContext.PullSubscription:
    """Create the durable consumer that all agents of the role share, and subscribe to it."""
    name = f"agent-{role.lower()}"
    try:
        await jetstream.add_consumer(
            STREAM,
            ConsumerConfig(
                durable_name=name,
                ack_policy=AckPolicy.EXPLICIT,
                ack_wait=ACK_WAIT_S,
                filter_subject=f"agent.cmd.{role}",
            ),
        )
    except NotFoundError:
        raise SystemExit(f"NATS has no stream {STREAM}: start the fleet's bridge first") from None
    return await jetstream.pull_subscribe_bind(name, STREAM)


async def main(given: argparse.Namespace) -> None:
    """Connect, and work until SIGTERM or SIGINT."""
    password = os.environ.get("NATS_PASSWORD")
    key = os.environ.get("LLM_API_KEY", "none")
    connection = await nats.connect(
        given.nats_url,
        user=given.nats_user,
        password=password,
        name=given.name,
        inbox_prefix=INBOX,
        max_reconnect_attempts=-1,
    )
    llm = AsyncOpenAI(base_url=given.llm_url, api_key=key, max_retries=0, timeout=SILENT_LLM_S)
    working = asyncio.create_task(
        Agent(connection, llm, given.llm_model, given.name).run(given.role)
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, working.cancel)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await working
    finally:
        await llm.close()
        await connection.close()


def arguments() -> argparse.Namespace:
    """Read the command line and the environment; secrets come from the environment alone."""
    parser = argparse.ArgumentParser(
        description="An external agent of the fleet: takes commands from NATS and answers with an "
        "OpenAI-compatible LLM.",
        epilog="NATS_PASSWORD and LLM_API_KEY are read from the environment only.",
    )
    parser.add_argument("--role", required=True, help="the council's role, such as DEV")
    parser.add_argument(
        "--name", default=f"{socket.gethostname()}-{os.getpid()}", help="the agent's own name"
    )
    for name, default, words in (
        ("NATS_URL", "nats://127.0.0.1:4222", "the fleet's NATS"),
        ("NATS_USER", None, "user at NATS"),
        ("LLM_URL", "http://127.0.0.1:8000/v1", "the LLM's OpenAI-compatible API, with /v1"),
        ("LLM_MODEL", None, "the model"),
    ):
        value = os.environ.get(name, default)
        parser.add_argument(
            f"--{name.lower().replace('_', '-')}",
            default=value,
            required=name == "LLM_MODEL" and value is None,
            help=f"{words}; else ${name}" + (f", else {default}" if default else ""),
        )
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main(arguments()))
