"""Agents that are LLMs: an OpenAI-compatible endpoint asked for structured answers.

An answer is paid for once: it is kept in Valkey under its call's key before the activity returns,
and a retry finds it there (design section 3, Agents).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Protocol

from openai import AsyncOpenAI
from redis.asyncio import Redis
from redis.exceptions import RedisError
from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities import acts
from activities.acts import ASKS, AnswerT, Question
from activities.kept import KEPT_FOR, answer_key, kept_answer
from activities.llm import PROMPT_TOO_LONG, Reply, model_window, stream_reply
from activities.prompts import BYTES_PER_TOKEN, Prompt, Prompts
from workflows.models import (
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
)
from workflows.stubs import AgentStub

FEWER_BYTES_PER_TOKEN = (BYTES_PER_TOKEN / 2, BYTES_PER_TOKEN / 4)
"""Tried in turn where the engine counts more tokens than we did."""

KEEP_AGAIN = timedelta(seconds=1)
UNTOLD_HEARTBEAT_TIMEOUT = timedelta(seconds=5)

AGENT_TYPE_NOT_SUPPORTED = "AgentTypeNotSupported"

MOCK_REFUSED = "Mock agents not allowed in production"


class Answering(Protocol):
    """Agents of one type."""

    async def answer(self, question: Question[AnswerT]) -> AnswerT:
        """Their answer; runs within the activity that asks, and may raise ApplicationError."""


class Agents(AgentStub):
    """The activities of the agents: each call goes to the agents of its agent's type.

    Every activity raises ApplicationError `AgentTypeNotSupported` (not retryable) for a type that
    nobody serves, a mock among them; else what the agents of the type raise.
    """

    def __init__(self, by_type: Mapping[str, Answering]) -> None:
        """by_type: `workflows.models.AgentType` -> who serves it."""
        self._by_type = by_type

    @activity.defn
    async def propose(self, request: ProposeInput) -> ProposalAnswer:
        return await self._of(request.agent).answer(acts.propose(request))

    @activity.defn
    async def criticise(self, request: CriticiseInput) -> CritiqueAnswer:
        return await self._of(request.agent).answer(acts.criticise(request))

    @activity.defn
    async def revise(self, request: ReviseInput) -> ProposalAnswer:
        return await self._of(request.agent).answer(acts.revise(request))

    @activity.defn
    async def judge(self, request: JudgeInput) -> JudgeAnswer:
        return await self._of(request.agent).answer(acts.judge(request))

    @activity.defn
    async def derive_plan(self, request: DerivePlanInput) -> DerivePlanAnswer:
        return await self._of(request.agent).answer(acts.derive_plan(request))

    @activity.defn
    async def write_story(self, request: WriteStoryInput) -> WriteStoryAnswer:
        return await self._of(request.agent).answer(acts.write_story(request))

    def _of(self, agent: Agent) -> Answering:
        """Nothing stands in for an agent (design section 3, Agents)."""
        kind = str(agent.agent_type)
        if kind in self._by_type:
            return self._by_type[kind]
        if kind.upper().startswith("MOCK"):
            message = MOCK_REFUSED
        else:
            message = (
                f"Agent {agent.agent_id} is of type {kind}, which this fleet does not run; "
                f"use one of {', '.join(self._by_type)}"
            )
        raise ApplicationError(message, type=AGENT_TYPE_NOT_SUPPORTED, non_retryable=True)


@dataclass
class CallProgress:
    """What a heartbeat says of a call under way."""

    act: str
    agent_id: str
    tokens: int = 0
    state: str = "asking"

    def count(self) -> None:
        self.tokens += 1


class VllmAgents:
    """Agents hosted by vLLM, behind Ray Serve or alone."""

    def __init__(
        self, client: AsyncOpenAI, valkey: Redis, default_model: str, prompts: Prompts
    ) -> None:
        """client: made by `activities.llm.connect`."""
        self._client = client
        self._valkey = valkey
        self._default_model = default_model
        self._prompts = prompts
        self._windows: dict[str, int] = {}

    async def answer(self, question: Question[AnswerT]) -> AnswerT:
        """The answer that is kept already; where there is none, the engine's.

        Raises:
            ApplicationError: the types of `activities.llm.failure`, `BadAnswer` (not retryable)
                where no ask brought a usable answer, `StoreUnreachable` where Valkey cannot be
                asked for a kept answer.
        """
        call = question.call
        key = answer_key(activity.info(), call.wave, question.act, call.agent.agent_id)
        progress = CallProgress(question.act, call.agent.agent_id)
        async with heartbeats(progress):
            if (kept := await kept_answer(self._valkey, key)) is not None:
                return question.answer_type.model_validate_json(kept)
            answer = await self._write(question, progress)
            await self._keep(key, answer.model_dump_json(), progress)
        return answer

    async def _write(self, question: Question[AnswerT], progress: CallProgress) -> AnswerT:
        """An answer to the prompt, which is cut further where the engine finds it too long."""
        model = question.call.agent.model or self._default_model
        for bytes_per_token in (BYTES_PER_TOKEN, *FEWER_BYTES_PER_TOKEN):
            window = await self._window(model)
            prompt = question.prompt(self._prompts, window, bytes_per_token)
            try:
                return await self._ask(question, model, prompt, progress)
            except ApplicationError as error:
                if error.type != PROMPT_TOO_LONG:
                    raise
                refusal = error
                self._windows.pop(model, None)  # the engine may be back with a shorter one
        raise refusal

    async def _ask(
        self, question: Question[AnswerT], model: str, prompt: Prompt, progress: CallProgress
    ) -> AnswerT:
        """Ask until an answer is whole and valid, at most ASKS times."""
        wanted = question.form(prompt.max_tokens)
        agent = question.call.agent
        started = time.monotonic()
        replies: list[Reply] = []
        asked = prompt
        for ask in range(1, ASKS + 1):
            seed = question.seed(ask)
            reply = await stream_reply(
                self._client,
                model=model,
                messages=asked.messages,
                schema_name=question.act,
                schema=wanted.schema,
                temperature=asked.temperature,
                max_tokens=asked.max_tokens,
                seed=seed,
                on_token=progress.count,
            )
            replies.append(reply)
            try:
                fields = wanted.read(whole(reply))
            except ValueError as error:
                problem = str(error)
                asked = self._prompts.ask_again(prompt, reply.text, problem)
                continue
            usage = CallUsage(
                act=question.act,
                agent_id=agent.agent_id,
                role=agent.role,
                model=model,
                tokens_in=sum(reply.tokens_in for reply in replies),
                tokens_out=sum(reply.tokens_out for reply in replies),
                cached_tokens=sum(reply.cached_tokens for reply in replies),
                latency_ms=round((time.monotonic() - started) * 1000),
                seed=seed,
                asks=ask,
                prompt_hash=prompt.hash,
            )
            return question.answer(fields, usage)
        raise question.unanswered(model, problem)

    async def _window(self, model: str) -> int:
        if model not in self._windows:
            self._windows[model] = await model_window(self._client, model)
        return self._windows[model]

    async def _keep(self, key: str, answer: str, progress: CallProgress) -> None:
        """Store the answer however long it takes, for it is paid for: the time-out ends it."""
        while True:
            try:
                await self._valkey.set(key, answer, ex=KEPT_FOR)
            except RedisError as error:
                progress.state = f"answered; waiting for Valkey to keep it: {error}"[:300]
                await asyncio.sleep(KEEP_AGAIN.total_seconds())
            else:
                return


@asynccontextmanager
async def heartbeats(progress: CallProgress) -> AsyncIterator[None]:
    """Heartbeat with the progress, thrice in every heartbeat time-out."""
    every = (activity.info().heartbeat_timeout or UNTOLD_HEARTBEAT_TIMEOUT) / 3

    async def beat() -> None:
        while True:
            await asyncio.sleep(every.total_seconds())
            activity.heartbeat(asdict(progress))

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()


def whole(reply: Reply) -> str:
    """The reply's text. Raises ValueError where there is none, or not all of it."""
    if reply.cut_off:
        raise ValueError("it was cut off because it was too long")
    if not reply.text.strip():
        raise ValueError("it was empty")
    return reply.text
