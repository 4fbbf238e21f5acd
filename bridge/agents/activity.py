"""External agents: a call is a command on NATS, and the answer completes its activity.

The activity stores the call in Valkey, publishes the command on `agent.cmd.{role}`, where the
agents of a role share the work, and ends without an answer. `bridge.agents.responses` completes it
by its task token. See docs/design/0003-kept-answers.md.
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

from activities.agents.answer_cache import answer_key, kept_answer
from activities.agents.profiles import Profiles
from activities.agents.prompts import Prompt, Prompts
from activities.agents.requests import AgentRequest, AnswerT
from activities.kept_text import NOT_ENCRYPTED, TextCipher
from activities.quota import TokenQuota
from bridge.agents.calls import CALL_TTL, AgentCalls, OpenCall, encoded, new_call_id, prompt_fields
from bridge.mirror.publisher import ACK_WITHIN_S, PUBLISH_FAILURES, publish_error
from bridge.mirror.source import Source
from bridge.tracing import send_span
from workflows.models.agent_messages import AgentCommand
from workflows.models.agents import TOKENS_PER_HOUR
from workflows.models.base import Model
from workflows.models.errors import ErrorType, application_error
from workflows.models.ids import ROLE_PATTERN
from workflows.stubs import ANSWERED_WITHIN, MAX_SILENCE
from workflows.timestamps import format_timestamp

COMMANDS = "AGENT_COMMANDS"

EXPIRY = "ce-expirytime"
"""Header of a command: after this time the fleet asks another agent, so none needs to start."""


class NatsAgents:
    """Agents that receive commands from NATS; an activity that asks one completes asynchronously.

    `bridge.agents.responses` describes how a call ends.
    """

    def __init__(
        self,
        nats: Nats,
        valkey: Redis,
        prompts: Prompts,
        source: Source,
        profiles: Profiles,
        window: int,
        tokens_per_hour: int = TOKENS_PER_HOUR,
        cipher: TextCipher = NOT_ENCRYPTED,
    ) -> None:
        """Create the agents.

        Args:
            nats: the connection to the JetStream server.
            valkey: where calls and answers are stored.
            prompts: the builder of prompts.
            source: the fleet's identity on the bus.
            profiles: how models are sampled and asked.
            window: the tokens that prompt and answer together may have in the agents' models.
            tokens_per_hour: the setting GRPC_TOKENS_PER_HOUR.
            cipher: of calls and answers in Valkey.
        """
        self._commands = Commands(nats)
        self._valkey = valkey
        self._cipher = cipher
        self._calls = AgentCalls(valkey, cipher)
        self._prompts = prompts
        self._source = source
        self._profiles = profiles
        self._window = window
        self._quota = TokenQuota(valkey, tokens_per_hour)

    async def answer(self, question: AgentRequest[AnswerT]) -> AnswerT:
        """Return the stored answer; if there is none, ask an agent and complete asynchronously.

        Raises:
            ApplicationError: the types of `bridge.mirror.publisher.REFUSALS` if the command could
                not be published, `PromptTooLong` and `InvalidAgent` (not retryable),
                `StoreUnreachable` if Valkey does not store the call, `QuotaUsed` (not retryable).
        """
        call = question.call
        key = answer_key(activity.info(), call.wave, question.act, call.agent.agent_id)
        kept = await kept_answer(self._valkey, key, self._cipher)
        if kept is None:
            await self._quota.require_left(call.task.actor)
            await self._ask(question, key)
            activity.raise_complete_async()
        return question.answer_type.model_validate_json(kept)

    async def _ask(self, question: AgentRequest[AnswerT], key: str) -> None:
        call = self._call(question, activity.info(), key)
        try:
            await self._calls.open(call)
        except RedisError as error:
            raise application_error(
                ErrorType.STORE_UNREACHABLE,
                f"Valkey does not keep the call to agent {call.agent_id}: {error}",
            ) from error
        await self._commands.publish(call)

    def _call(self, question: AgentRequest[AnswerT], info: activity.Info, key: str) -> OpenCall:
        profile = self._profiles.of(question.call.agent.model)
        prompt = question.prompt(self._prompts, self._window, profile)
        call_id = new_call_id()
        before = costs_before(info)
        stays = (info.start_to_close_timeout or ANSWERED_WITHIN) + CALL_TTL
        silence = info.heartbeat_timeout or MAX_SILENCE
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


class CostsBefore(Model):
    """The cost of earlier attempts, as recorded in the heartbeat of the last answer."""

    asks: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


def costs_before(info: activity.Info) -> CostsBefore:
    """Read the cost from the heartbeat of the last attempt; asks that cost nothing do not count."""
    before = CostsBefore.model_validate(next(iter(info.heartbeat_details), {}))
    return before if before.tokens_in or before.tokens_out else CostsBefore()


class Commands:
    """Publisher of commands to external agents."""

    def __init__(self, nats: Nats) -> None:
        self._nats = nats
        self._jetstream = nats.jetstream(timeout=ACK_WITHIN_S)

    async def publish(self, call: OpenCall) -> None:
        """Publish the call's command on JetStream; a repetition stores nothing twice.

        Raises:
            ApplicationError: by `bridge.mirror.publisher.REFUSALS`.
        """
        try:
            if not self._nats.is_connected:
                raise nats_errors.OutboundBufferLimitError
            with send_span(call.subject, call.call_id):
                await self._jetstream.publish(
                    call.subject,
                    call.command.model_dump_json().encode(),
                    stream=COMMANDS,
                    headers=headers(call),
                )
        except PUBLISH_FAILURES as error:
            what = f"The command to agent {call.agent_id} on {call.subject} is not on JetStream"
            # Without the cause: its text is in the message, and Temporal cuts long chains.
            raise publish_error(what, error) from None


def command(
    question: AgentRequest[AnswerT], prompt: Prompt, call_id: str, ask: int = 1
) -> AgentCommand:
    """Build the command that the agent receives."""
    call, form = question.call, question.form_of(prompt)
    return AgentCommand(
        task_id=call.task.task_id,
        story_id=call.task.story_id,
        agent_id=call.agent.agent_id,
        act=question.act,
        prompt="\n\n".join(str(message.get("content")) for message in prompt.messages),
        timestamp=format_timestamp(datetime.now(UTC)),
        call_id=call_id,
        answer_format="markdown" if form.draft else "json",
        answer_schema=form.schema,
        max_tokens=prompt.max_tokens,
        temperature=prompt.temperature,
        seed=question.seed(ask),
    )


def command_subject(role: str) -> str:
    """Return the subject from which the agents of a role receive their commands.

    Raises:
        ApplicationError: `InvalidAgent`, not retryable: the graph has a malformed role.
    """
    if not re.fullmatch(ROLE_PATTERN, role):
        raise application_error(
            ErrorType.INVALID_AGENT,
            f"role {role!r} cannot be part of a subject: it must match {ROLE_PATTERN}",
        )
    return f"agent.cmd.{role}"


def headers(call: OpenCall) -> dict[str, str]:
    """Build the CloudEvents attributes, the id for JetStream's deduplication, and the trace."""
    sent_at = datetime.fromisoformat(call.command.timestamp)
    headers = {
        Header.MSG_ID.value: call.call_id,
        "Content-Type": "application/json",
        "ce-specversion": "1.0",
        "ce-id": call.call_id,
        "ce-source": call.source,
        "ce-type": call.subject,
        "ce-time": call.command.timestamp,
        "ce-subject": call.command.story_id,
        EXPIRY: format_timestamp(sent_at + timedelta(milliseconds=call.silence_ms)),
    }
    TraceContextTextMapPropagator().inject(headers)
    return {name: value for name, value in headers.items() if value}
