"""Responses of external agents on `agent.response.{task_id}`, which complete the activities.

`working` is a heartbeat. `done` is an answer: it is stored in Valkey before the activity completes,
or asked for again if it cannot be used. `failed` fails the attempt. A late, double, forged or
malformed message becomes a dead letter with the reason.

A message is acknowledged when all this is done. If a replica dies before that, the message is
delivered again and the remaining steps are completed: a call is settled once, and stores which
message settled it. See docs/design/0003-kept-answers.md.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable
from datetime import timedelta
from typing import Any

import structlog
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeout
from pydantic import ValidationError
from redis.asyncio import Redis
from temporalio.client import AsyncActivityCancelledError, AsyncActivityHandle, Client
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from activities.agents.answer_cache import kept_answer
from activities.agents.llm_errors import LONGEST_MESSAGE
from activities.agents.metrics import count_request, count_tokens
from activities.agents.non_answers import non_answer
from activities.agents.openai_client import figure
from activities.agents.prompts import Prompts
from activities.agents.requests import ANSWERS, MAX_ATTEMPTS
from activities.kept_text import NOT_ENCRYPTED, TextCipher
from activities.quota import TokenQuota
from bridge.agents.activity import Commands, command
from bridge.agents.calls import AgentCalls, CallRecord, OpenCall, SettledCall, new_call_id
from bridge.jetstream import consumers, streams
from bridge.jetstream.consumers import AGENTS_RESPONSES, ConsumerError
from bridge.jetstream.dead_letters import DeadLetters
from bridge.jetstream.streams import StreamError
from bridge.outages import is_unavailable
from workflows.models.agent_messages import AgentResponse
from workflows.models.agents import CallUsage
from workflows.models.errors import ErrorType, invalid_input
from workflows.models.ids import encode_id

SUBJECT = "agent.response."

LARGEST_RESPONSE = 512 * 1024
"""Largest response in bytes: ten times the longest answer that a form accepts."""

FETCH_WITHIN_S = 1.0
TEMPORAL_WITHIN = timedelta(seconds=5)

AGAIN_AFTER_S = (0.5, 1.0, 2.0, 5.0)
"""Pauses of the job while a server is down, and delays of a message that could not be settled."""

LAST_DELIVERY = 8
"""Delivery at which a failed message is dead-lettered, unless a server is down."""


FIGURES = frozenset({"tokens_in", "tokens_out", "duration_ms"})

NEGATIVE = re.compile(r"\s*-")

GONE = RPCStatusCode.NOT_FOUND
"""Temporal's status for the task token of an attempt that is over."""

log = structlog.stdlib.get_logger(__name__)


class InvalidResponse(ValueError):
    """Rejection of a message that does not answer an open call.

    reason: why, in a few words. error: what exactly was wrong.
    """

    def __init__(self, reason: str, error: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.error = error


class Away(Exception):
    """Outage of a server: wait, and the message is delivered again."""


class AgentResponses:
    """A job next to the agents' worker; any number of replicas share the consumer."""

    def __init__(
        self,
        nats: Nats,
        nats_replicas: int,
        temporal: Client,
        valkey: Redis,
        prompts: Prompts,
        cipher: TextCipher = NOT_ENCRYPTED,
    ) -> None:
        self._nats = nats
        self._nats_replicas = nats_replicas
        self._temporal = temporal
        self._valkey = valkey
        self._prompts = prompts
        self._cipher = cipher
        self._calls = AgentCalls(valkey, cipher)
        self._quota = TokenQuota(valkey)
        self._commands = Commands(nats)
        self._dead_letters = DeadLetters(nats)
        self._stopping = asyncio.Event()
        self._running = False
        self._refused = False

    @property
    def is_running(self) -> bool:
        """Whether it consumes or waits for a server; False if a person has to fix something."""
        return self._running and not self._refused

    async def run(self) -> None:
        """Settle messages until `shutdown`; while a server is down, wait and try again."""
        self._running = True
        failures = 0
        try:
            while not self._stopping.is_set():
                try:
                    await self._consume()
                except (
                    *(Away, NatsError, OSError, TimeoutError),
                    *(StreamError, ConsumerError),
                ) as error:
                    self._refused = isinstance(error, StreamError | ConsumerError)
                    why = str(error) or type(error).__name__
                    log.warning("agents' answers wait", because=why[:LONGEST_MESSAGE])
                    await self._rest(AGAIN_AFTER_S[min(failures, len(AGAIN_AFTER_S) - 1)])
                    failures += 1
                else:
                    failures = 0
        finally:
            self._running = False

    async def shutdown(self) -> None:
        """Stop fetching; the message being settled is finished."""
        self._stopping.set()

    async def _rest(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return

    async def _consume(self) -> None:
        """Settle one message after the other until `shutdown`.

        Raises:
            Away, NatsError, OSError: a server is down.
            StreamError, ConsumerError: a stream or consumer that a person has to fix.
        """
        if not self._nats.is_connected:  # the connection logs the reason
            return await self._rest(AGAIN_AFTER_S[0])
        jetstream = self._nats.jetstream()
        await streams.reconcile(jetstream, self._nats_replicas)
        await consumers.reconcile(jetstream, [AGENTS_RESPONSES])
        self._refused = False
        responses = await jetstream.pull_subscribe_bind(
            consumer=AGENTS_RESPONSES.name, stream=AGENTS_RESPONSES.stream
        )
        try:
            while not self._stopping.is_set():
                try:
                    # One at a time: for more, the client would wait until so many are there.
                    (message,) = await responses.fetch(1, FETCH_WITHIN_S)
                except NatsTimeout:
                    if not self._nats.is_connected:
                        raise
                    # Raises if the consumer was removed: no messages come then either.
                    await jetstream.consumer_info(AGENTS_RESPONSES.stream, AGENTS_RESPONSES.name)
                    continue
                await self._settle(message)
        finally:
            if self._nats.is_connected:
                await responses.unsubscribe()

    async def _settle(self, message: Msg) -> None:
        """Process the message, or dead-letter it; then acknowledge it."""
        try:
            await self._take(message)
        except InvalidResponse as refused:
            await self._dead_letter(message, refused.reason, refused.error)
        except Exception as error:  # any error: delivered again, finally a dead letter
            delivered = message.metadata.num_delivered or 1
            away = is_unavailable(error)
            if away or delivered < LAST_DELIVERY:
                await message.nak(delay=AGAIN_AFTER_S[min(delivered, len(AGAIN_AFTER_S)) - 1])
                if away:
                    raise Away(str(error)) from error
                log.warning("an agent's answer is tried again", because=repr(error)[:1_000])
                return
            await self._dead_letter(message, "it has failed its last delivery", repr(error))
        await message.ack_sync()

    async def _dead_letter(self, message: Msg, reason: str, error: str) -> None:
        await self._dead_letters.store(
            message, consumer=AGENTS_RESPONSES.name, reason=reason, error=error
        )

    async def _take(self, message: Msg) -> None:
        """Apply the message to its call and its activity.

        Raises:
            Refused: the message does not answer an open call.
            Exception: as the servers' clients raise it.
        """
        response = parse_response(message.subject, message.data)
        by = message.metadata.sequence.stream
        while (found := await self._calls.find(response.call_id)) is not None:
            if (response.task_id, response.agent_id) != (found.call.task_id, found.call.agent_id):
                raise InvalidResponse(
                    "forged: the call is another agent's",
                    f"it is agent {found.call.agent_id}'s of task {found.call.task_id}",
                )
            settled = found.call
            if isinstance(settled, OpenCall):
                if not await self._alive(settled, response):
                    await self._calls.settle(found, settled.settled("given_up", by))
                    continue
                if response.status == "working":
                    return None
                made = await self._settle_call(found, settled, response, by)
                if made is None:
                    continue  # another message settled the call first: read its result
                count(settled, response, made.outcome)
                tokens = figure(response.tokens_in) + figure(response.tokens_out)
                await self._quota.count(settled.question.call.task.actor, tokens)
                settled = made
            if response.status == "working":
                return None  # overtaken by the answer, or for a call that was given up
            if settled.by != by or settled.outcome == "given_up":
                raise InvalidResponse(*late(settled))
            return await self._finish(settled)
        raise InvalidResponse(
            "forged or too late: no such call", f"call_id {response.call_id[:100]}"
        )

    async def _alive(self, call: OpenCall, response: AgentResponse) -> bool:
        """Send a heartbeat; return whether Temporal still waits for this attempt."""
        handle = self._handle(call)
        costs = usage_of(call, response)  # for the next attempt, in case this one times out
        progress = costs.model_dump(mode="json") | {
            "tokens": costs.tokens_out,
            "state": response.status,
        }
        try:
            await handle.heartbeat(progress, rpc_timeout=TEMPORAL_WITHIN)
        except AsyncActivityCancelledError as cancelled:
            if cancelled.details and cancelled.details.cancel_requested:
                await report_unless_over(handle.report_cancellation(rpc_timeout=TEMPORAL_WITHIN))
            return False
        except RPCError as error:
            if error.status != GONE:
                raise
            return False
        return True

    async def _settle_call(
        self, found: CallRecord, call: OpenCall, response: AgentResponse, by: int
    ) -> SettledCall | None:
        """Settle an open call by `done` or `failed`; None if another message already has."""
        if response.status == "failed":
            words = (response.error or "it gave no reason")[:LONGEST_MESSAGE]
            settled = call.settled(
                "failed",
                by,
                error=f"Agent {call.agent_id} failed: {words}",
                error_type=ErrorType.AGENT_FAILED,
                usage=usage_of(call, response),
            )
            return settled if await self._calls.settle(found, settled) else None
        question = call.question
        try:
            form, text = question.form_of(call.first_prompt), written(response)
            fields = form.read(text)
            instructions, is_document = self._prompts.instructions[call.act], form.is_whole(text)
            problem = non_answer(
                question, call.first_prompt, instructions, fields, is_document=is_document
            )
            if problem and call.ask < MAX_ATTEMPTS:  # a proposal that still says nothing is barred
                raise ValueError(problem)
        except ValueError as error:
            return await self._ask_again(found, call, response, by, str(error))
        settled = call.settled("answered", by)
        answer = question.answer(fields, usage_of(call, response)).model_dump_json()
        return settled if await self._calls.answer(found, settled, answer) else None

    async def _ask_again(
        self, found: CallRecord, call: OpenCall, response: AgentResponse, by: int, problem: str
    ) -> SettledCall | None:
        """Ask again under a new id, naming the problem; after the last ask, the call has failed."""
        if call.ask == MAX_ATTEMPTS:
            bad = call.question.unanswered(f"Agent {call.agent_id}", problem)
            settled = call.settled(
                "failed",
                by,
                error=bad.message,
                error_type=bad.type,
                final=bad.non_retryable,
                usage=usage_of(call, response),
            )
            return settled if await self._calls.settle(found, settled) else None
        written_before = response.content or ""
        prompt = self._prompts.ask_again(call.first_prompt, written_before, problem, call.ask + 1)
        call_id = new_call_id()
        following = call.model_copy(
            update={
                "call_id": call_id,
                "command": command(call.question, prompt, call_id, call.ask + 1),
                "ask": call.ask + 1,
                "tokens_in": call.tokens_in + figure(response.tokens_in),
                "tokens_out": call.tokens_out + figure(response.tokens_out),
            }
        )
        settled = call.settled("asked_again", by, next_call_id=call_id)
        return settled if await self._calls.ask_again(found, settled, following) else None

    async def _finish(self, call: SettledCall) -> None:
        """Complete the steps that follow from the settlement; a repetition has no effect."""
        handle = self._handle(call)
        match call.outcome:
            case "answered":
                kept = await kept_answer(self._valkey, call.answer_key, self._cipher)
                if kept is None:
                    raise LookupError(f"Valkey has lost {call.answer_key}")
                answer = ANSWERS[call.act].model_validate_json(kept)
                await report_unless_over(handle.complete(answer, rpc_timeout=TEMPORAL_WITHIN))
            case "asked_again":
                found = await self._calls.find(call.next_call_id)
                if found and isinstance(found.call, OpenCall):
                    await self._commands.publish(found.call)
            case "failed":
                costs = [call.usage] if call.usage and call.usage.tokens else []
                failure = ApplicationError(
                    call.error, *costs, type=call.error_type, non_retryable=call.final
                )
                await report_unless_over(handle.fail(failure, rpc_timeout=TEMPORAL_WITHIN))

    def _handle(self, call: OpenCall | SettledCall) -> AsyncActivityHandle:
        return self._temporal.get_async_activity_handle(task_token=call.token)


async def report_unless_over(report: Awaitable[None]) -> None:
    """Await a report to Temporal; ignore it if the attempt is over."""
    try:
        await report
    except RPCError as error:
        if error.status != GONE:
            raise


def parse_response(subject: str, data: bytes) -> AgentResponse:
    """Parse a response.

    Raises:
        Refused: it is malformed, or its subject is another task's.
    """
    if len(data) > LARGEST_RESPONSE:
        raise InvalidResponse(
            "malformed: too large", f"it has {len(data)} bytes, {LARGEST_RESPONSE} at most"
        )
    try:
        fields = json.loads(data)
        json.dumps(fields, ensure_ascii=False).encode()  # rejects half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise InvalidResponse("malformed: not JSON", str(error) or "nested too deeply") from None
    try:
        response = AgentResponse.model_validate(as_meant(fields))
    except ValidationError as error:
        what = invalid_input("AgentResponse", error).message
        raise InvalidResponse("malformed: not an agent's response", what) from None
    if subject not in (response_subject(response.task_id), f"{SUBJECT}{response.task_id}"):
        raise InvalidResponse(
            "forged: the subject is another task's", f"the body's task is {response.task_id[:200]}"
        )
    return response


def as_meant(fields: Any) -> Any:
    """Convert the fields to their types, however an agent's JSON library writes them.

    Null counts as missing, a document becomes its JSON text, and a number may have a fraction or
    be a string.
    """
    if not isinstance(fields, dict):
        return fields
    meant = {name: value for name, value in fields.items() if value is not None}
    for name in FIGURES & meant.keys():
        # A negative number stays: it would make up for what other calls have cost.
        negative = isinstance(meant[name], int | float | str) and NEGATIVE.match(f"{meant[name]}")
        meant[name] = -1 if negative else figure(meant[name])
    if isinstance(meant.get("content"), dict):
        meant["content"] = json.dumps(meant["content"])
    if isinstance(meant.get("timestamp"), int | float):
        meant["timestamp"] = str(meant["timestamp"])
    if isinstance(meant.get("status"), str):
        meant["status"] = meant["status"].strip().lower()
    return meant


def usage_of(call: OpenCall, response: AgentResponse) -> CallUsage:
    """Return the cost of a call including this response, as the agent states it."""
    return CallUsage(
        act=call.act,
        agent_id=call.agent_id,
        role=call.question.call.agent.role,
        model=response.model or call.question.call.agent.model or "unknown",
        tokens_in=call.tokens_in + figure(response.tokens_in),
        tokens_out=call.tokens_out + figure(response.tokens_out),
        latency_ms=max(time.time_ns() // 1_000_000 - call.began_ms, 0),
        seed=call.command.seed,
        asks=call.asked_before + call.ask,
        prompt_hash=call.first_prompt.hash,
    )


def count(call: OpenCall, response: AgentResponse, outcome: str) -> None:
    """Count one request to an external agent. Its model is the council's: an agent may name any."""
    model = call.question.call.agent.model or "external"
    count_request(model, call.act, outcome, max(time.time() - call.began_ms / 1000, 0))
    count_tokens(model, call.act, figure(response.tokens_in), figure(response.tokens_out))


def response_subject(task_id: str) -> str:
    """Return the subject of a task's answers.

    A task id with dots or colons is encoded; a response is also accepted with the id as it is.
    """
    return f"{SUBJECT}{encode_id(task_id)}"


def written(response: AgentResponse) -> str:
    """Return the answer's text.

    Raises:
        ValueError: the answer is empty.
    """
    if not (response.content or "").strip():
        raise ValueError("it was empty")
    return response.content or ""


def late(call: SettledCall) -> tuple[str, str]:
    """Return why an answer to a settled call is refused: the reason, and the call's outcome."""
    if call.outcome == "given_up":
        return (
            "late: the call was given up",
            "its agent was silent for too long, or the call was cancelled",
        )
    return (
        "double: the call has been answered",
        f"it was {call.outcome.replace('_', ' ')} by message {call.by} of "
        f"{AGENTS_RESPONSES.stream}",
    )
