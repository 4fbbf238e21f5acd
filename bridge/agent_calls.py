"""Calls to external agents in Valkey: what is asked, of which activity, and what became of it.

`swe:agent-call:{call_id}` is an OpenCall until one message settles it, for good and atomically; it
stays as a SettledCall for as long as an answer may be on its way, so that what comes late or twice
is known from what was never asked.
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

from activities.acts import Question, question
from activities.kept import KEPT_FOR
from activities.prompts import Prompt
from workflows.events import AgentCommand
from workflows.models import CallUsage, Wire

STAYS_FOR = timedelta(hours=1)
"""Beyond the activity's start-to-close: the age that AGENT_RESPONSES keeps a message."""

SETTLE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'KEEPTTL')
if KEYS[2] then redis.call('SET', KEYS[2], ARGV[3], 'PX', ARGV[4]) end
return 1
"""


class _Call(Wire):
    """Whose call it is. task_token: of the activity's attempt, in base 64."""

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
    """A call that waits for its answer. request: the activity's input; prompt: as first asked.

    The tokens are those of the answers that could not be used, and of earlier attempts, which
    asked `asked_before` times; ask: 1 for this attempt's first.
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
    """When it was first asked, since 1970."""
    ask: int = 1
    asked_before: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def question(self) -> Question[Any]:
        return question(self.act, self.request)

    @property
    def first_prompt(self) -> Prompt:
        return Prompt(**self.prompt)

    def settled(self, outcome: Outcome, by: int, **details: Any) -> SettledCall:
        """What becomes of it. by: the sequence of the message that settles it."""
        return SettledCall(
            **self.model_dump(include=set(_Call.model_fields)), outcome=outcome, by=by, **details
        )


Outcome = Literal["answered", "asked_again", "failed", "given_up"]


class SettledCall(_Call):
    """A call that is over. error, error_type, final, usage: of the failure where it failed."""

    state: Literal["settled"] = "settled"
    outcome: Outcome
    by: int
    next_call_id: str = ""
    """The call by which it was asked again."""
    error: str = ""
    error_type: str = ""
    final: bool = False
    usage: CallUsage | None = None


_STATES: TypeAdapter[OpenCall | SettledCall] = TypeAdapter(
    Annotated[OpenCall | SettledCall, Field(discriminator="state")]
)


@dataclass(frozen=True)
class Found:
    """A call as it was read: `raw` is what it is settled against."""

    raw: bytes | str
    call: OpenCall | SettledCall


class AgentCalls:
    """The calls in Valkey. Every method raises RedisError where Valkey did not do it."""

    def __init__(self, valkey: Redis) -> None:
        self._valkey = valkey

    async def open(self, call: OpenCall) -> None:
        """Keep a call before its command is published: the answer may come at once."""
        await self._valkey.set(_key(call.call_id), call.model_dump_json(), px=call.stays_ms)

    async def find(self, call_id: str) -> Found | None:
        """The call, open or settled; None where it never was, or long ago."""
        raw: bytes | str | None = await self._valkey.get(_key(call_id))
        return None if raw is None else Found(raw, _STATES.validate_json(raw))

    async def answer(self, found: Found, settled: SettledCall, answer: str) -> bool:
        """Settle the call and keep its answer, both or neither; see `settle`."""
        return await self._settle(found, settled, settled.answer_key, answer, KEPT_FOR)

    async def ask_again(self, found: Found, settled: SettledCall, following: OpenCall) -> bool:
        """Settle the call and open the one that follows it, both or neither; see `settle`."""
        stays = timedelta(milliseconds=following.stays_ms)
        key = _key(following.call_id)
        return await self._settle(found, settled, key, following.model_dump_json(), stays)

    async def settle(self, found: Found, settled: SettledCall) -> bool:
        """Settle the call; False where another message has done so since it was read."""
        return await self._settle(found, settled)

    async def _settle(
        self,
        found: Found,
        settled: SettledCall,
        other_key: str | None = None,
        other: str = "",
        other_for: timedelta = timedelta(),
    ) -> bool:
        keys = [_key(settled.call_id), *([other_key] if other_key else [])]
        values = [
            found.raw,
            settled.model_dump_json(),
            other,
            other_for // timedelta(milliseconds=1),
        ]
        done = self._valkey.eval(SETTLE, len(keys), *keys, *values)
        return bool(await cast("Awaitable[int]", done))


def new_call_id() -> str:
    """Told to nobody but the agents of the role: who does not know it cannot answer."""
    return secrets.token_hex(16)


def encoded(task_token: bytes) -> str:
    return base64.b64encode(task_token).decode()


def prompt_fields(prompt: Prompt) -> dict[str, Any]:
    """A prompt as JSON holds it; `Prompt(**fields)` is the same again."""
    return asdict(prompt)


def _key(call_id: str) -> str:
    return f"swe:agent-call:{call_id}"
