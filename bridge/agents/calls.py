"""Calls to external agents in Valkey: the question, its activity, and the outcome.

`swe:agent-call:{call_id}` is an OpenCall until one message settles it, once and atomically. It
remains as a SettledCall for as long as an answer may be on its way, which distinguishes a late or
double answer from one that no one asked for. See docs/design/0003-kept-answers.md.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Awaitable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Annotated, Any, Literal, cast

from pydantic import Field, TypeAdapter
from redis.asyncio import Redis

from activities.agents.answer_cache import ANSWER_TTL
from activities.agents.prompts import Prompt
from activities.agents.requests import AgentRequest, question
from activities.kept_text import TextCipher
from workflows.models.agent_messages import AgentCommand
from workflows.models.agents import CallUsage
from workflows.models.base import Model

CALL_TTL = timedelta(hours=1)
"""Time after the activity's start-to-close: how long AGENT_RESPONSES keeps a message."""

SETTLE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'KEEPTTL')
if KEYS[2] then redis.call('SET', KEYS[2], ARGV[3], 'PX', ARGV[4]) end
return 1
"""


class _Call(Model):
    """The identity of a call. task_token: of the activity's attempt, in base 64."""

    call_id: str
    task_id: str
    agent_id: str
    act: str
    task_token: str
    answer_key: str

    @property
    def token(self) -> bytes:
        return base64.b64decode(self.task_token)


class OpenCall(_Call):
    """A call that waits for its answer. request: the activity's input; prompt: the first one.

    The tokens are those of answers that could not be used and of earlier attempts, which asked
    `asked_before` times. ask: the number of this ask, 1 for the first of this attempt.
    """

    state: Literal["open"] = "open"
    command: AgentCommand
    subject: str
    source: str
    request: dict[str, Any]
    prompt: dict[str, Any]
    stays_ms: int
    silence_ms: int
    """How long the agent may be silent."""
    began_ms: int
    """When it was first asked, in milliseconds since 1970."""
    ask: int = 1
    asked_before: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def question(self) -> AgentRequest[Any]:
        return question(self.act, self.request)

    @property
    def first_prompt(self) -> Prompt:
        return Prompt(**self.prompt)

    def settled(self, outcome: Outcome, by: int, **details: Any) -> SettledCall:
        """Return the call as settled. by: the sequence of the message that settles it."""
        return SettledCall(
            **self.model_dump(include=set(_Call.model_fields)), outcome=outcome, by=by, **details
        )


Outcome = Literal["answered", "asked_again", "failed", "given_up"]


class SettledCall(_Call):
    """A call that is over. error, error_type, final, usage: of the failure if it failed."""

    state: Literal["settled"] = "settled"
    outcome: Outcome
    by: int
    next_call_id: str = ""
    """The call that asked again."""
    error: str = ""
    error_type: str = ""
    final: bool = False
    usage: CallUsage | None = None


_STATES: TypeAdapter[OpenCall | SettledCall] = TypeAdapter(
    Annotated[OpenCall | SettledCall, Field(discriminator="state")]
)


@dataclass(frozen=True)
class CallRecord:
    """A call as it was read; it is settled only if Valkey still holds `raw`."""

    raw: bytes
    call: OpenCall | SettledCall


class AgentCalls:
    """The calls in Valkey. Every method raises RedisError if Valkey fails."""

    def __init__(self, valkey: Redis, cipher: TextCipher) -> None:
        self._valkey = valkey
        self._cipher = cipher

    async def open(self, call: OpenCall) -> None:
        """Store a call; do so before its command is published, as the answer may come at once."""
        kept = self._cipher.encrypt(call.model_dump_json())
        await self._valkey.set(_key(call.call_id), kept, px=call.stays_ms)

    async def find(self, call_id: str) -> CallRecord | None:
        """Return the call, open or settled; None if it never existed or has expired."""
        raw = cast("bytes | None", await self._valkey.get(_key(call_id)))
        if raw is None:
            return None
        return CallRecord(raw, _STATES.validate_json(self._cipher.decrypt(raw)))

    async def answer(self, found: CallRecord, settled: SettledCall, answer: str) -> bool:
        """Settle the call and store its answer atomically; return as `settle`."""
        return await self._settle(found, settled, settled.answer_key, answer, ANSWER_TTL)

    async def ask_again(self, found: CallRecord, settled: SettledCall, following: OpenCall) -> bool:
        """Settle the call and open the one that follows it atomically; return as `settle`."""
        stays = timedelta(milliseconds=following.stays_ms)
        key = _key(following.call_id)
        return await self._settle(found, settled, key, following.model_dump_json(), stays)

    async def settle(self, found: CallRecord, settled: SettledCall) -> bool:
        """Settle the call; return False if another message has done so since it was read."""
        return await self._settle(found, settled)

    async def _settle(
        self,
        found: CallRecord,
        settled: SettledCall,
        other_key: str | None = None,
        other: str = "",
        other_for: timedelta = timedelta(),
    ) -> bool:
        keys = [_key(settled.call_id), *([other_key] if other_key else [])]
        values: list[bytes | int] = [
            found.raw,
            self._cipher.encrypt(settled.model_dump_json()),
            self._cipher.encrypt(other),
            other_for // timedelta(milliseconds=1),
        ]
        done = self._valkey.eval(SETTLE, len(keys), *keys, *values)
        return bool(await cast("Awaitable[int]", done))


def new_call_id() -> str:
    """Return a random id, which only the agents of the role receive: no one else can answer."""
    return secrets.token_hex(16)


def encoded(task_token: bytes) -> str:
    return base64.b64encode(task_token).decode()


def prompt_fields(prompt: Prompt) -> dict[str, Any]:
    """Convert a prompt to JSON fields; `Prompt(**fields)` converts it back."""
    return asdict(prompt)


def _key(call_id: str) -> str:
    return f"swe:agent-call:{call_id}"
