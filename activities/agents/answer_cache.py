"""Paid answers, kept in Valkey under their call's key (docs/design/0003-kept-answers.md)."""

from __future__ import annotations

from datetime import timedelta
from typing import cast

from redis.asyncio import Redis
from redis.exceptions import RedisError
from temporalio import activity

from activities.kept_text import TextCipher
from workflows.models.errors import ErrorType, application_error
from workflows.models.ids import encode_id

ANSWER_TTL = timedelta(days=7)
"""How long an answer is kept: longer than any call is retried."""


def answer_key(info: activity.Info, wave: int, act: str, agent_id: str) -> str:
    """Return the Valkey key of a call's answer: workflow, run, wave, act, agent."""
    return (
        f"swe:answer:{info.workflow_id}:{info.workflow_run_id}:{wave}:{act}:{encode_id(agent_id)}"
    )


async def kept_answer(valkey: Redis, key: str, cipher: TextCipher) -> bytes | None:
    """Return the JSON of a call's answer; None if there is none yet.

    Raises:
        ApplicationError: `StoreUnreachable`; the agent is not asked while Valkey is unreachable.
            `PayloadKeyMissing`: the answer is encrypted with a key that this process lacks.
        ValueError: the answer was altered after it was encrypted.
    """
    try:
        kept = cast("bytes | None", await valkey.get(key))
    except RedisError as error:
        raise application_error(
            ErrorType.STORE_UNREACHABLE, f"Valkey cannot be asked for a kept answer: {error}"
        ) from error
    return None if kept is None else cipher.decrypt(kept)
