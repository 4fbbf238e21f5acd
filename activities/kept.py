"""Answers that were paid for, kept in Valkey under their call's key (design section 3, Agents)."""

from __future__ import annotations

from datetime import timedelta

from redis.asyncio import Redis
from redis.exceptions import RedisError
from temporalio import activity
from temporalio.exceptions import ApplicationError

from workflows.ids import encode_id

KEPT_FOR = timedelta(days=7)
"""Longer than a call is ever retried."""

STORE_UNREACHABLE = "StoreUnreachable"


def answer_key(info: activity.Info, wave: int, act: str, agent_id: str) -> str:
    """Valkey's key of a call's answer: workflow, run, wave, act, agent."""
    return (
        f"swe:answer:{info.workflow_id}:{info.workflow_run_id}:{wave}:{act}:{encode_id(agent_id)}"
    )


async def kept_answer(valkey: Redis, key: str) -> bytes | str | None:
    """The JSON of a call's answer; None while it has none.

    Raises:
        ApplicationError: `StoreUnreachable`: without Valkey nobody knows, and nothing is asked.
    """
    try:
        kept: bytes | str | None = await valkey.get(key)
    except RedisError as error:
        raise ApplicationError(
            f"Valkey cannot be asked for a kept answer: {error}", type=STORE_UNREACHABLE
        ) from error
    return kept
