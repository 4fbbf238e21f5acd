"""Agents outside the fleet: a call is a command on NATS, and its activity completes by its answer.

The activity keeps the call in Valkey, publishes the command on `agent.cmd.{role}`, where the
agents of a role share the work, and ends without an answer; `bridge.agent_responses` completes it
by its task token (design sections 3 and 5).
"""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta

from nats import errors as nats_errors
from nats.aio.client import Client as Nats
from nats.js.api import Header
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from redis.asyncio import Redis
from redis.exceptions import RedisError
from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.acts import AnswerT, Question
from activities.kept import STORE_UNREACHABLE, answer_key, kept_answer
from activities.prompts import Prompt, Prompts
from bridge.agent_calls import STAYS_FOR, AgentCalls, OpenCall, encoded, new_call_id, prompt_fields
from bridge.mirror import ACK_WITHIN_S, PUBLISH_FAILURES, refused
from bridge.source import Source
from workflows.clock import iso
from workflows.events import AgentCommand
from workflows.models import Wire
from workflows.stubs import ANSWERED_WITHIN, SILENT_AT_MOST

COMMANDS = "AGENT_COMMANDS"

EXPIRY = "ce-expirytime"
"""Header of a command: after this time the fleet asks another, and an agent need not begin."""

INVALID_AGENT = "InvalidAgent"
ROLE = re.compile(r"[A-Z][A-Z0-9_-]{0,31}")


class NatsAgents:
    """Agents that take commands from NATS. An activity that asks one completes asynchronously.

    How a call ends: `bridge.agent_responses`.
    """

    def __init__(
        self, nats: Nats, valkey: Redis, prompts: Prompts, source: Source, window: int
    ) -> None:
        """window: the tokens that prompt and answer may have together in the agents' models."""
        self._commands = Commands(nats)
        self._valkey = valkey
        self._calls = AgentCalls(valkey)
        self._prompts = prompts
        self._source = source
        self._window = window

    async def answer(self, question: Question[AnswerT]) -> AnswerT:
        """The answer that is kept already; where there is none, an agent is asked for one.

        Raises:
            ApplicationError: the types of `bridge.mirror.REFUSALS` where the command could not be
                published, `PromptTooLong` and `InvalidAgent` (not retryable), `StoreUnreachable`
                where Valkey does not keep the call.
        """
        call = question.call
        key = answer_key(activity.info(), call.wave, question.act, call.agent.agent_id)
        kept = await kept_answer(self._valkey, key)
        if kept is None:
            await self._ask(question, key)
            activity.raise_complete_async()
        return question.answer_type.model_validate_json(kept)

    async def _ask(self, question: Question[AnswerT], key: str) -> None:
        call = self._call(question, activity.info(), key)
        try:
            await self._calls.open(call)
        except RedisError as error:
            raise ApplicationError(
                f"Valkey does not keep the call to agent {call.agent_id}: {error}",
                type=STORE_UNREACHABLE,
            ) from error
        await self._commands.publish(call)

    def _call(self, question: Question[AnswerT], info: activity.Info, key: str) -> OpenCall:
        prompt = question.prompt(self._prompts, self._window)
        call_id = new_call_id()
        before = costs_before(info)
        stays = (info.start_to_close_timeout or ANSWERED_WITHIN) + STAYS_FOR
        silence = info.heartbeat_timeout or SILENT_AT_MOST
        return OpenCall(
            call_id=call_id,
            task_id=question.call.task.task_id,
            agent_id=question.call.agent.agent_id,
            act=question.act,
            task_token=encoded(info.task_token),
            answer_key=key,
            command=command(question, prompt, call_id),
            subject=command_subject(question.call.agent.role),
            source=self._source.of(info.workflow_id or ""),
            request=question.call.model_dump(mode="json"),
            prompt=prompt_fields(prompt),
            stays_ms=stays // timedelta(milliseconds=1),
            silence_ms=silence // timedelta(milliseconds=1),
            began_ms=time.time_ns() // 1_000_000,
            asked_before=before.asks,
            tokens_in=before.tokens_in,
            tokens_out=before.tokens_out,
        )


class CostsBefore(Wire):
    """What the attempts before this one have cost, as the last answer's heartbeat has it."""

    asks: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


def costs_before(info: activity.Info) -> CostsBefore:
    """Of the heartbeat that the attempt before has left; asks that cost nothing do not count."""
    before = CostsBefore.model_validate(next(iter(info.heartbeat_details), {}))
    return before if before.tokens_in or before.tokens_out else CostsBefore()


class Commands:
    """Publishes commands to external agents."""

    def __init__(self, nats: Nats) -> None:
        self._nats = nats
        self._jetstream = nats.jetstream(timeout=ACK_WITHIN_S)

    async def publish(self, call: OpenCall) -> None:
        """Put the call's command on JetStream; a command that is there already is stored once.

        Raises:
            ApplicationError: by `bridge.mirror.REFUSALS`.
        """
        try:
            if not self._nats.is_connected:
                raise nats_errors.OutboundBufferLimitError
            await self._jetstream.publish(
                call.subject,
                call.command.model_dump_json().encode(),
                stream=COMMANDS,
                headers=headers(call),
            )
        except PUBLISH_FAILURES as error:
            what = f"The command to agent {call.agent_id} on {call.subject} is not on JetStream"
            raise refused(what, error) from None  # told in full; Temporal cuts long chains


def command(
    question: Question[AnswerT], prompt: Prompt, call_id: str, ask: int = 1
) -> AgentCommand:
    """What the agent is told."""
    call = question.call
    return AgentCommand(
        task_id=call.task.task_id,
        story_id=call.task.story_id,
        agent_id=call.agent.agent_id,
        act=question.act,
        prompt="\n\n".join(str(message.get("content")) for message in prompt.messages),
        timestamp=iso(datetime.now(UTC)),
        call_id=call_id,
        answer_schema=question.form(prompt.max_tokens).schema,
        max_tokens=prompt.max_tokens,
        temperature=prompt.temperature,
        seed=question.seed(ask),
    )


def command_subject(role: str) -> str:
    """The subject that the agents of a role take their commands from.

    Raises:
        ApplicationError: `InvalidAgent`, not retryable: the graph has a role that is none.
    """
    if not ROLE.fullmatch(role):
        raise ApplicationError(
            f"role {role!r} cannot be part of a subject: it must match {ROLE.pattern}",
            type=INVALID_AGENT,
            non_retryable=True,
        )
    return f"agent.cmd.{role}"


def headers(call: OpenCall) -> dict[str, str]:
    """The CloudEvents attributes, the id that JetStream deduplicates by, and the trace."""
    asked = datetime.fromisoformat(call.command.timestamp)
    told = {
        Header.MSG_ID.value: call.call_id,
        "Content-Type": "application/json",
        "ce-specversion": "1.0",
        "ce-id": call.call_id,
        "ce-source": call.source,
        "ce-type": call.subject,
        "ce-time": call.command.timestamp,
        "ce-subject": call.command.story_id,
        EXPIRY: iso(asked + timedelta(milliseconds=call.silence_ms)),
    }
    TraceContextTextMapPropagator().inject(told)
    return {name: value for name, value in told.items() if value}
