"""Agents that are LLMs: an OpenAI-compatible endpoint that gives structured answers.

An answer is paid for once: it is kept in Valkey under its call's key before the activity returns,
and a retry finds it there (docs/design/0003-kept-answers.md).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import httpx
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError
from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.agents import requests
from activities.agents.answer_cache import ANSWER_TTL, answer_key, kept_answer
from activities.agents.kept_packs import KeptPacks
from activities.agents.llm_errors import CallFailed
from activities.agents.markdown_answers import Asked, complete_part
from activities.agents.non_answers import given_to, non_answer, relevance
from activities.agents.openai_client import (
    BYTES_PER_TOKEN,
    LOOP,
    AnswerBroken,
    Message,
    Reply,
    not_served,
    served_models,
    sole_model,
    stream_reply,
    tokens_of,
    tokens_of_prompt,
)
from activities.agents.profiles import NO_PROFILES, Profiles
from activities.agents.prompts import Prompt, Prompts
from activities.agents.requests import MAX_ATTEMPTS, AgentRequest, AnswerT
from activities.agents.response_schemas import ResponseSchema, read_document, without_thoughts
from activities.agents.tracing import name_agent
from activities.heartbeats import heartbeats
from activities.kept_text import NOT_ENCRYPTED, TextCipher
from activities.quota import TokenQuota
from activities.substance import loops
from workflows.models.agents import (
    TOKENS_PER_HOUR,
    Agent,
    CallUsage,
    CriticiseInput,
    CritiqueAnswer,
    DerivePlanAnswer,
    DerivePlanInput,
    JudgeAnswer,
    JudgeInput,
    ProposalAnswer,
    ProposeInput,
    ReviseInput,
    WriteStoryAnswer,
    WriteStoryInput,
    refuse_mock,
)
from workflows.models.errors import ErrorType, application_error
from workflows.models.implementation import NextActionAnswer, NextActionInput
from workflows.stubs import AgentStub

FEWER_BYTES_PER_TOKEN = (BYTES_PER_TOKEN / 2, BYTES_PER_TOKEN / 4)
"""Ratios tried in turn if the engine counts more tokens than we did."""

KEEP_AGAIN = timedelta(seconds=1)

log = structlog.stdlib.get_logger(__name__)

CANCELLED = application_error(ErrorType.CANCELLED, "the call was cancelled")


class AgentBackend(Protocol):
    """A back end for agents of one type."""

    async def answer(self, question: AgentRequest[AnswerT]) -> AnswerT:
        """Answer the question; runs within the calling activity and may raise ApplicationError."""


class Agents(AgentStub):
    """The activities of the agents; each call goes to the back end of its agent's type.

    Raises:
        ApplicationError: in every activity, not retryable: `MockAgent`, `AgentTypeNotSupported`
            for a type without a back end, or `PackMissing`; otherwise the errors of the back end.
    """

    def __init__(self, by_type: Mapping[str, AgentBackend], packs: KeptPacks) -> None:
        """Create the activities.

        Args:
            by_type: `workflows.models.base.AgentType` -> its back end.
            packs: the context packs that calls refer to.
        """
        self._by_type, self._packs = by_type, packs

    @activity.defn
    async def propose(self, request: ProposeInput) -> ProposalAnswer:
        call = await self._packs.in_full(request)
        return await self._of(call.agent).answer(requests.propose(call))

    @activity.defn
    async def criticise(self, request: CriticiseInput) -> CritiqueAnswer:
        call = await self._packs.in_full(request)
        return await self._of(call.agent).answer(requests.criticise(call))

    @activity.defn
    async def revise(self, request: ReviseInput) -> ProposalAnswer:
        call = await self._packs.in_full(request)
        return await self._of(call.agent).answer(requests.revise(call))

    @activity.defn
    async def judge(self, request: JudgeInput) -> JudgeAnswer:
        call = await self._packs.in_full(request)
        return await self._of(call.agent).answer(requests.judge(call))

    @activity.defn
    async def derive_plan(self, request: DerivePlanInput) -> DerivePlanAnswer:
        call = await self._packs.in_full(request)
        return await self._of(call.agent).answer(requests.derive_plan(call))

    @activity.defn
    async def write_story(self, request: WriteStoryInput) -> WriteStoryAnswer:
        call = await self._packs.in_full(request)
        return await self._of(call.agent).answer(requests.write_story(call))

    @activity.defn
    async def next_action(self, request: NextActionInput) -> NextActionAnswer:
        call = await self._packs.in_full(request)
        return await self._of(call.agent).answer(requests.next_action(call))

    def _of(self, agent: Agent) -> AgentBackend:
        """Return the back end of an agent's type; there are no mock agents."""
        name_agent(agent)
        kind = refuse_mock(str(agent.agent_type))
        if kind in self._by_type:
            return self._by_type[kind]
        raise application_error(
            ErrorType.AGENT_TYPE_NOT_SUPPORTED,
            f"Agent {agent.agent_id} is of type {kind}, which this fleet does not run; "
            f"use one of {', '.join(self._by_type)}",
        )


CUT_OFF = ("length", "max_tokens", "model_length")
"""A finish_reason that means: the answer reached its most tokens before it was complete."""


@dataclass
class CallProgress:
    """The progress of a running call, as sent in heartbeats, with the costs of its asks so far.

    The next attempt starts with the costs of the previous one, because both were paid for. A
    heartbeat is also a CallUsage, which is used if the call times out.
    """

    act: str
    agent_id: str
    role: str
    tokens: int = 0
    state: str = "asking"
    model: str = ""
    seed: int = 0
    prompt_hash: str = ""
    asks: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cached_tokens: int = 0
    estimated: bool = False

    @classmethod
    def after(cls, act: str, agent: Agent, heartbeats: Sequence[Any]) -> CallProgress:
        """Start the progress of a new attempt.

        Args:
            act: the act.
            agent: the agent that is called.
            heartbeats: the details of the previous attempt's last heartbeat.
        """
        before = heartbeats[0] if heartbeats and isinstance(heartbeats[0], dict) else {}
        costs = {each.name: before[each.name] for each in fields(cls) if each.name in before}
        who = {"act": act, "agent_id": agent.agent_id, "role": agent.role}
        return cls(**(costs | who | {"tokens": 0, "state": "asking"}))

    def __post_init__(self) -> None:
        self._prompt: Sequence[Message] = ()
        self._written = ""

    def ask(self, prompt: Sequence[Message]) -> None:
        """Start an ask."""
        self._prompt, self._written = prompt, ""

    def count(self, text: str) -> None:
        """Add the text of a chunk of the current ask."""
        self.tokens += 1
        self._written += text

    def spent(self) -> CallProgress:
        """Return a copy that includes the current ask's costs, estimated from the text so far."""
        so_far = replace(self)
        if self._written:
            tokens_in, tokens_out = tokens_of_prompt(self._prompt), tokens_of(self._written)
            so_far.pay(Reply("", "", tokens_in, tokens_out, estimated=True))
        return so_far

    def pay(self, reply: Reply) -> None:
        """Add the costs of the current ask, whether its reply is usable or not."""
        self._written = ""
        self.asks += 1
        self.tokens_in += reply.tokens_in
        self.tokens_out += reply.tokens_out
        self.cached_tokens += reply.cached_tokens
        self.estimated = self.estimated or reply.estimated

    @property
    def paid(self) -> int:
        """The tokens of all asks so far."""
        return self.tokens_in + self.tokens_out

    def usage(self, began: float) -> CallUsage:
        """Return the usage of the call that started at `began`, by `time.monotonic`."""
        return CallUsage(
            act=self.act,
            agent_id=self.agent_id,
            role=self.role,
            model=self.model,
            tokens_in=self.tokens_in,
            tokens_out=self.tokens_out,
            cached_tokens=self.cached_tokens,
            latency_ms=round((time.monotonic() - began) * 1000),
            seed=self.seed,
            asks=self.asks,
            prompt_hash=self.prompt_hash,
            estimated=self.estimated,
        )


class VllmAgents:
    """Agents hosted by vLLM, with or without Ray Serve."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        valkey: Redis,
        default_model: str,
        prompts: Prompts,
        profiles: Profiles = NO_PROFILES,
        tokens_per_hour: int = TOKENS_PER_HOUR,
        cipher: TextCipher = NOT_ENCRYPTED,
    ) -> None:
        """Create the back end.

        Args:
            client: created by `activities.agents.openai_client.connect`.
            valkey: stores the answers.
            default_model: for agents that name none; empty: the one that is served.
            prompts: the prompt files.
            profiles: how models are sampled and asked.
            tokens_per_hour: the setting GRPC_TOKENS_PER_HOUR.
            cipher: of the answers.
        """
        self._client = client
        self._valkey = valkey
        self._default_model = default_model
        self._prompts = prompts
        self._profiles = profiles
        self._quota = TokenQuota(valkey, tokens_per_hour)
        self._cipher = cipher
        self._served: dict[str, int] = {}

    async def answer(self, question: AgentRequest[AnswerT]) -> AnswerT:
        """Return the kept answer if there is one; otherwise ask the engine.

        Raises:
            ApplicationError: the types of `activities.agents.llm_errors`; `BadAnswer` (not
                retryable) if no ask gave a usable answer; `StoreUnreachable` if Valkey cannot be
                asked for a kept answer; `QuotaUsed` (not retryable); `Cancelled` (not retryable)
                if a call was cancelled after it had cost tokens. Its detail is a CallUsage if the
                call has cost tokens.
        """
        call = question.call
        info = activity.info()
        key = answer_key(info, call.wave, question.act, call.agent.agent_id)
        progress = CallProgress.after(question.act, call.agent, info.heartbeat_details)
        began = time.monotonic()
        try:
            async with heartbeats(lambda: asdict(progress.spent())):
                if (kept := await kept_answer(self._valkey, key, self._cipher)) is not None:
                    return question.answer_type.model_validate_json(kept)
                fields = await self._write(question, progress)
                answer = question.answer(fields, progress.usage(began))
                kept = self._cipher.encrypt(answer.model_dump_json())
                await until_stored(progress, lambda: self._valkey.set(key, kept, ex=ANSWER_TTL))
                return answer
        except (ApplicationError, asyncio.CancelledError) as error:
            spent = progress.spent()
            if not spent.asks:
                raise
            await self._count_stopped(call.task.actor, spent.paid - progress.paid)
            activity.heartbeat(asdict(spent))  # for the next attempt
            if isinstance(error, ApplicationError):
                raise requests.charged(error, spent.usage(began)) from None
            details = activity.cancellation_details()
            if not (details and details.cancel_requested):
                raise  # timed out, or the worker stops: the costs are in the heartbeat
            raise requests.charged(CANCELLED, spent.usage(began)) from None

    async def _write(
        self, question: AgentRequest[Any], progress: CallProgress
    ) -> Mapping[str, Any]:
        """Get an answer; if the endpoint has renamed the model, from the new one."""
        try:
            return await self._write_within_window(question, progress)
        except CallFailed as error:
            is_renamed = error.is_unknown_model and error.type == ErrorType.LLM_REFUSED
            if not is_renamed or question.call.agent.model or self._default_model:
                raise
            self._served = await served_models(self._client)
            if progress.model in self._served:
                raise
        return await self._write_within_window(question, progress)

    async def _write_within_window(
        self, question: AgentRequest[Any], progress: CallProgress
    ) -> Mapping[str, Any]:
        """Get an answer to the prompt; cut it further if the engine rejects it as too long."""
        for bytes_per_token in (BYTES_PER_TOKEN, *FEWER_BYTES_PER_TOKEN):
            model, window = await self._model(question.call.agent)
            profile = self._profiles.of(model)
            prompt = question.prompt(self._prompts, window, profile, bytes_per_token)
            progress.model, progress.prompt_hash = model, prompt.hash
            try:
                return await self._ask(question, prompt, progress)
            except ApplicationError as error:
                if error.type != ErrorType.PROMPT_TOO_LONG:
                    raise
                refusal = error
                self._served.pop(model, None)  # the engine may have restarted with a shorter window
        raise refusal

    async def _ask(
        self, question: AgentRequest[Any], prompt: Prompt, progress: CallProgress
    ) -> Mapping[str, Any]:
        """Ask until an answer is complete, valid and says something, at most MAX_ATTEMPTS times.

        If none does, the check bars what says nothing, so the answer that is most about its task
        is returned. A revision that says nothing does not replace the proposal.
        """
        wanted = question.form_of(prompt)
        schema = None if wanted.draft else wanted.schema
        latest, was_cut = prompt, False
        best: tuple[float, Mapping[str, Any]] | None = None
        for ask in range(1, MAX_ATTEMPTS + 1):
            progress.seed = question.seed(ask)
            reply = await self._reply(question, latest, schema, wanted.is_whole, progress)
            is_cut, is_document = reply.finish_reason in CUT_OFF, wanted.is_whole(reply.text)
            is_last = ask == MAX_ATTEMPTS
            problem = flaw(reply)
            try:
                is_usable = is_document or is_last or (is_cut and was_cut)
                if problem and not schema and not is_usable:
                    raise ValueError(problem)
                fields = await self._fields(question, wanted, latest, reply, progress)
                instructions = self._prompts.instructions[question.act]
                problem = non_answer(
                    question, prompt, instructions, fields, is_document=is_document
                )
                if not problem:
                    return fields
                found = relevance(fields, question.about)
                if best is None or found >= best[0]:
                    best = found, fields
                raise ValueError(problem)
            except ValueError as error:
                problem = problem or str(error)
                if schema and is_cut:
                    # What was written had fewer characters per token than the form allows for.
                    schema = question.form(prompt.max_tokens // (ask + 1)).schema
                was_cut = was_cut or is_cut
                latest = (
                    self._prompts.ask_again(prompt, reply.text, problem, ask + 1)
                    if schema
                    else self._prompts.ask_for_another(prompt, problem, ask + 1)
                )
        if isinstance(question.call, ReviseInput):
            return {"proposal": question.call.proposal, "problem": problem}
        if best:
            return best[1]
        raise question.unanswered(progress.model, problem)

    async def _fields(
        self,
        question: AgentRequest[Any],
        wanted: ResponseSchema,
        asked: Prompt,
        reply: Reply,
        progress: CallProgress,
    ) -> Mapping[str, Any]:
        """Read a reply; what a text lacks, ask for in a short question that shares its prefix.

        Raises:
            ValueError: the problem of the reply, or of the answer to the question.
        """
        if wanted.draft is None:
            return wanted.read(reply.text)
        text = without_thoughts(reply.text)
        if reply.finish_reason in (*CUT_OFF, LOOP) and not wanted.is_whole(text):
            text = complete_part(text) or text
        draft = wanted.draft(text, Asked(given_to(question, asked), question.about))
        if draft.missing is None:
            return draft.fields
        missing = draft.missing
        prompt = self._prompts.follow(asked, text, missing.act, missing.material)

        def read(answer: str) -> Mapping[str, Any]:
            return read_document(answer, missing.complete)

        completed = await self._reply(
            question, prompt, missing.schema, partial(is_read, read), progress
        )
        return read(completed.text)

    async def _reply(
        self,
        question: AgentRequest[Any],
        prompt: Prompt,
        schema: dict[str, Any] | None,
        is_whole: Callable[[str], bool],
        progress: CallProgress,
    ) -> Reply:
        """Send one request, and count what it has cost."""
        actor = question.call.task.actor
        await self._quota.require_left(actor)
        progress.ask(prompt.messages)
        try:
            reply = await stream_reply(
                self._client,
                model=progress.model,
                messages=prompt.messages,
                act=question.act,
                schema=schema,
                temperature=prompt.temperature,
                max_tokens=prompt.max_tokens + prompt.thinking_tokens,
                seed=progress.seed,
                sampling=prompt.sampling,
                on_text=progress.count,
                is_whole=is_whole,
                loops=never if schema else loops,
            )
        except AnswerBroken as broken:
            await self._pay(progress, actor, broken.reply)
            raise
        await self._pay(progress, actor, reply)
        return reply

    async def _model(self, agent: Agent) -> tuple[str, int]:
        """Return the agent's model and its window in tokens.

        Raises:
            CallFailed: `LlmRefused` if the model is not served.
        """
        wanted = agent.model or self._default_model
        if not self._served or (wanted and wanted not in self._served):
            self._served = await served_models(self._client)
        model = wanted or sole_model(self._client, self._served)
        if model not in self._served:
            raise not_served(self._client, model, self._served)
        return model, self._served[model]

    async def _pay(self, progress: CallProgress, actor: str, reply: Reply) -> None:
        """Add the costs of the current ask, and count them for the caller."""
        progress.pay(reply)
        tokens = reply.tokens_in + reply.tokens_out
        await until_stored(progress, lambda: self._quota.count(actor, tokens))

    async def _count_stopped(self, actor: str, tokens: int) -> None:
        """Count an ask that was stopped: tried once, because nothing waits for a stopped call."""
        try:
            await self._quota.count(actor, tokens)
        except RedisError as error:
            log.warning("tokens are not counted", actor=actor, tokens=tokens, because=str(error))


async def until_stored(progress: CallProgress, write: Callable[[], Awaitable[object]]) -> None:
    """Store in Valkey what is paid for; retry until the activity's time-out."""
    while True:
        try:
            await write()
        except RedisError as error:
            progress.state = f"answered; waiting for Valkey to keep it: {error}"[:300]
            await asyncio.sleep(KEEP_AGAIN.total_seconds())
        else:
            return


def never(_: str) -> bool:
    """Return False: a document's own schema ends it."""
    return False


def is_read(read: Callable[[str], object], text: str) -> bool:
    """Return whether a form accepts the text as an answer."""
    try:
        read(text)
    except ValueError:
        return False
    return True


def flaw(reply: Reply) -> str:
    """Return the problem that the engine reports with its reply, or an empty text."""
    match reply.finish_reason:
        case reason if reason in CUT_OFF:
            return "it was cut off because it was too long; write less"
        case reason if reason == LOOP:
            return "it began to repeat itself; say each thing once"
        case "content_filter":
            return "the engine's content filter stopped it (finish_reason content_filter)"
        case "tool_calls" | "function_call":
            return f"it called a tool instead of answering (finish_reason {reply.finish_reason})"
    return "" if reply.text.strip() else "it was empty"
