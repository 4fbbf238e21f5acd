"""Agents that are LLMs: an OpenAI-compatible endpoint asked for structured answers.

An answer is paid for once: it is kept in Valkey under its call's key before the activity returns,
and a retry finds it there (design section 3, Agents).
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TypeVar

from openai import AsyncOpenAI
from redis.asyncio import Redis
from redis.exceptions import RedisError
from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.answers import Form, critique_form, plan_form, proposal_form, verdict_form
from activities.llm import LONGEST_MESSAGE, PROMPT_TOO_LONG, Reply, model_window, stream_reply
from activities.prompts import BYTES_PER_TOKEN, Prompt, Prompts, Values
from workflows.models import (
    Agent,
    AgentCall,
    CallUsage,
    CriticiseInput,
    Critique,
    CritiqueAnswer,
    DerivePlanAnswer,
    DerivePlanInput,
    JudgeAnswer,
    JudgeInput,
    Proposal,
    ProposalAnswer,
    ProposeInput,
    ReviseInput,
)
from workflows.stubs import AgentStub

ASKS = 3
"""An answer that cannot be used is asked again at most twice."""

KEPT_FOR = timedelta(days=7)
"""Longer than a call is ever retried."""

FEWER_BYTES_PER_TOKEN = (BYTES_PER_TOKEN / 2, BYTES_PER_TOKEN / 4)
"""Tried in turn where the engine counts more tokens than we did."""

KEEP_AGAIN = timedelta(seconds=1)
UNTOLD_HEARTBEAT_TIMEOUT = timedelta(seconds=5)

BAD_ANSWER = "BadAnswer"
AGENT_TYPE_NOT_SUPPORTED = "AgentTypeNotSupported"
STORE_UNREACHABLE = "StoreUnreachable"

MOCK_REFUSED = "Mock agents not allowed in production"

AnswerT = TypeVar("AnswerT", ProposalAnswer, CritiqueAnswer, JudgeAnswer, DerivePlanAnswer)


@dataclass
class CallProgress:
    """What a heartbeat says of a call under way."""

    act: str
    agent_id: str
    tokens: int = 0
    state: str = "asking"

    def count(self) -> None:
        self.tokens += 1


class VllmAgents(AgentStub):
    """Agents hosted by vLLM, behind Ray Serve or alone.

    Every activity raises ApplicationError: the types of `activities.llm.failure`, `BadAnswer`
    (not retryable) where no ask brought a usable answer, `AgentTypeNotSupported` (not retryable),
    `StoreUnreachable` where Valkey cannot be asked for a kept answer.
    """

    def __init__(
        self, client: AsyncOpenAI, valkey: Redis, default_model: str, prompts: Prompts
    ) -> None:
        """client: made by `activities.llm.connect`."""
        self._client = client
        self._valkey = valkey
        self._default_model = default_model
        self._prompts = prompts
        self._windows: dict[str, int] = {}

    @activity.defn
    async def propose(self, request: ProposeInput) -> ProposalAnswer:
        return await self._answer(request, "propose", {}, proposal_form, ProposalAnswer)

    @activity.defn
    async def criticise(self, request: CriticiseInput) -> CritiqueAnswer:
        material = {"proposal": proposal_text(request.proposal)}
        return await self._answer(request, "criticise", material, critique_form, CritiqueAnswer)

    @activity.defn
    async def revise(self, request: ReviseInput) -> ProposalAnswer:
        material = {
            "proposal": proposal_text(request.proposal),
            "critiques": "\n\n".join(critique_text(critique) for critique in request.critiques),
        }
        return await self._answer(request, "revise", material, proposal_form, ProposalAnswer)

    @activity.defn
    async def judge(self, request: JudgeInput) -> JudgeAnswer:
        material = {
            "contenders": [
                f"id: {contender.agent_id}\n{proposal_text(contender.proposal)}"
                for contender in request.contenders
            ]
        }
        form = verdict_form([contender.agent_id for contender in request.contenders])
        return await self._answer(request, "judge", material, form, JudgeAnswer)

    @activity.defn
    async def derive_plan(self, request: DerivePlanInput) -> DerivePlanAnswer:
        material = {"design": proposal_text(request.design), "roles": ", ".join(request.roles)}
        form = plan_form(request.roles)
        return await self._answer(request, "derive_plan", material, form, DerivePlanAnswer)

    async def _answer(
        self,
        call: AgentCall,
        act: str,
        material: Values,
        form: Callable[[int], Form],
        answer_type: type[AnswerT],
    ) -> AnswerT:
        refuse_other_types(call.agent)
        key = answer_key(activity.info(), call.wave, act, call.agent.agent_id)
        progress = CallProgress(act, call.agent.agent_id)
        async with heartbeats(progress):
            if (kept := await self._kept(key)) is not None:
                return answer_type.model_validate_json(kept)
            answer = await self._write(call, material, form, answer_type, progress)
            await self._keep(key, answer.model_dump_json(), progress)
        return answer

    async def _write(
        self,
        call: AgentCall,
        material: Values,
        form: Callable[[int], Form],
        answer_type: type[AnswerT],
        progress: CallProgress,
    ) -> AnswerT:
        """An answer to the prompt, which is cut further where the engine finds it too long."""
        model = call.agent.model or self._default_model
        shared, material = shared_values(call), {**material, "persona": call.agent.persona}
        for bytes_per_token in (BYTES_PER_TOKEN, *FEWER_BYTES_PER_TOKEN):
            window = await self._window(model)
            prompt = self._prompts.render(progress.act, shared, material, window, bytes_per_token)
            try:
                return await self._ask(call, model, prompt, form, answer_type, progress)
            except ApplicationError as error:
                if error.type != PROMPT_TOO_LONG:
                    raise
                refusal = error
                self._windows.pop(model, None)  # the engine may be back with a shorter one
        raise refusal

    async def _ask(
        self,
        call: AgentCall,
        model: str,
        prompt: Prompt,
        form: Callable[[int], Form],
        answer_type: type[AnswerT],
        progress: CallProgress,
    ) -> AnswerT:
        """Ask until an answer is whole and valid, at most ASKS times."""
        wanted = form(prompt.max_tokens)
        started = time.monotonic()
        replies: list[Reply] = []
        asked = prompt
        for ask in range(1, ASKS + 1):
            seed = call_seed(call.task.task_id, call.agent.agent_id, call.wave, ask)
            reply = await stream_reply(
                self._client,
                model=model,
                messages=asked.messages,
                schema_name=progress.act,
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
                act=progress.act,
                agent_id=call.agent.agent_id,
                role=call.agent.role,
                model=model,
                tokens_in=sum(reply.tokens_in for reply in replies),
                tokens_out=sum(reply.tokens_out for reply in replies),
                cached_tokens=sum(reply.cached_tokens for reply in replies),
                latency_ms=round((time.monotonic() - started) * 1000),
                seed=seed,
                asks=ask,
                prompt_hash=prompt.hash,
            )
            return answer_type.model_validate({**fields, "usage": usage})
        raise ApplicationError(
            f"{model} was asked {ASKS} times to {progress.act.replace('_', ' ')} "
            f"and gave no usable answer; the last: {problem[:LONGEST_MESSAGE]}",
            type=BAD_ANSWER,
            non_retryable=True,
        )

    async def _window(self, model: str) -> int:
        if model not in self._windows:
            self._windows[model] = await model_window(self._client, model)
        return self._windows[model]

    async def _kept(self, key: str) -> bytes | str | None:
        try:
            kept: bytes | str | None = await self._valkey.get(key)
        except RedisError as error:
            raise ApplicationError(
                f"Valkey cannot be asked for a kept answer: {error}", type=STORE_UNREACHABLE
            ) from error
        return kept

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


def refuse_other_types(agent: Agent) -> None:
    """Only LLMs are asked here: nothing stands in for one (design section 3, Agents)."""
    kind = str(agent.agent_type)
    if kind in ("RAY_VLLM", "VLLM"):
        return
    if kind.upper().startswith("MOCK"):
        message = MOCK_REFUSED
    else:
        message = (
            f"Agent {agent.agent_id} is of type {kind}, which this fleet does not run yet; "
            "use RAY_VLLM or VLLM"
        )
    raise ApplicationError(message, type=AGENT_TYPE_NOT_SUPPORTED, non_retryable=True)


def answer_key(info: activity.Info, wave: int, act: str, agent_id: str) -> str:
    """Valkey's key of a call's answer: workflow, run, wave, act, agent."""
    return f"swe:answer:{info.workflow_id}:{info.workflow_run_id}:{wave}:{act}:{agent_id}"


def call_seed(task_id: str, agent_id: str, wave: int, ask: int) -> int:
    """0 to 2^31 - 1: other for every agent, wave and ask, the same when a run is repeated."""
    digest = hashlib.sha256(f"{task_id}/{agent_id}/{wave}/{ask}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


def whole(reply: Reply) -> str:
    """The reply's text. Raises ValueError where there is none, or not all of it."""
    if reply.cut_off:
        raise ValueError("it was cut off because it was too long")
    if not reply.text.strip():
        raise ValueError("it was empty")
    return reply.text


# --- what the prompts are filled with -----------------------------------------------------------


def shared_values(call: AgentCall) -> dict[str, str]:
    """What every agent of a deliberation is told, in every act."""
    task, pack = call.task, call.pack
    return {
        "role": task.role,
        "system": pack.system,
        "context": pack.context,
        "tools": pack.tools,
        "description": task.description,
        "rubric": task.rubric,
        "requirements": _bullets(task.requirements),
        "feedback": _bullets(task.feedback),
        "late_decisions": _bullets(
            f"{decision.title}: {decision.rationale} ({decision.decided_by})"
            for decision in call.late_decisions
        ),
    }


def proposal_text(proposal: Proposal) -> str:
    decisions = _bullets(
        f"{decision.title}: {decision.rationale}"
        + (f" (affects {', '.join(decision.affects)})" if decision.affects else "")
        for decision in proposal.decisions
    )
    return f"Approach: {proposal.approach}\n\n{proposal.content}\n\nDecisions:\n{decisions}"


def critique_text(critique: Critique) -> str:
    points = _bullets(f"{point.severity}: {point.text}" for point in critique.points)
    return f"Verdict: {critique.verdict}\n{points}\nSuggestion: {critique.suggestion}"


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
