"""The tokens that one actor's calls of gRPC may use in an hour.

They are counted in Valkey as models and agents report them, so that all replicas and workers share
the count. Each full hour begins a new one.
"""

from __future__ import annotations

import time
from datetime import timedelta

from redis.asyncio import Redis
from temporalio.exceptions import ApplicationError

from activities.cache_errors import cache_errors
from workflows.models.agents import TOKENS_PER_HOUR
from workflows.models.errors import ErrorType
from workflows.models.ids import encode_id

HOUR_S = 3_600


class TokenQuota:
    """What is left of an actor's tokens in this hour, and its count."""

    def __init__(self, valkey: Redis, tokens_per_hour: int = TOKENS_PER_HOUR) -> None:
        self._valkey = valkey
        self._limit = tokens_per_hour

    async def require_left(self, actor: str) -> None:
        """Refuse an actor who has used the tokens of this hour; empty: no quota applies.

        Raises:
            ApplicationError: `QuotaUsed`, not retryable, says when the next hour begins; or by
                `activities.cache_errors.TABLE`, if Valkey does not answer.
        """
        if not actor:
            return
        now = time.time()
        with cache_errors():
            used = int(await self._valkey.get(_key(actor, now)) or 0)
        if used < self._limit:
            return
        wait = timedelta(seconds=HOUR_S - now % HOUR_S)
        raise ApplicationError(
            f"{actor} has used {used} of {self._limit} tokens in this hour, 0 are left; go on in "
            f"{wait.seconds // 60 + 1} minutes, or raise GRPC_TOKENS_PER_HOUR",
            type=ErrorType.QUOTA_USED.value,
            non_retryable=True,
            next_retry_delay=wait,
        )

    async def count(self, actor: str, tokens: int) -> None:
        """Add tokens that were used; empty: for no one.

        Raises:
            RedisError: Valkey has not counted them.
        """
        if not actor or tokens <= 0:
            return
        key = _key(actor, time.time())
        async with self._valkey.pipeline(transaction=True) as both:
            both.incrby(key, tokens)
            both.expire(key, 2 * HOUR_S)
            await both.execute()


def _key(actor: str, now: float) -> str:
    return f"swe:tokens:{encode_id(actor)}:{int(now) // HOUR_S}"
