"""Tokens that are revoked before they expire."""

from __future__ import annotations

import asyncio
import math
import time
from datetime import timedelta
from typing import cast

from redis.asyncio import Redis
from temporalio.exceptions import ApplicationError

from activities.cache_errors import cache_errors
from activities.tokens import HOW, Caller
from workflows.models.errors import ErrorType, application_error

REVOKED = "swe:revoked-tokens"
"""The key of the revoked tokens' ids; each one's score is the time at which it expires."""

READ_EVERY_S = 5.0
KEPT_S = 60.0
"""How long the list counts that was read last, while Valkey does not answer."""


class RevokedTokens:
    """The ids of the revoked tokens, in Valkey: every process reads them every READ_EVERY_S."""

    def __init__(self, valkey: Redis) -> None:
        self._valkey = valkey
        self._known: frozenset[str] = frozenset()
        self._read_at = self._tried_at = -math.inf
        self._failure: ApplicationError | None = None
        self._reading = asyncio.Lock()

    async def revoke(self, token_id: str, valid_for: timedelta) -> None:
        """Revoke the token with this id (`jti`), which expires after `valid_for` at the latest."""
        now = time.time()
        with cache_errors():
            await self._valkey.zremrangebyscore(REVOKED, 0, now)
            await self._valkey.zadd(REVOKED, {token_id: now + valid_for.total_seconds()})

    async def require_valid(self, caller: Caller) -> None:
        """Refuse a caller whose token was revoked.

        Raises:
            ApplicationError: `Unauthenticated`; or by `activities.cache_errors.TABLE`, if the list
                could not be read for KEPT_S.
        """
        if caller.token_id in await self._ids():
            raise application_error(
                ErrorType.UNAUTHENTICATED, f"the token of {caller.actor} was revoked. {HOW}"
            )

    async def _ids(self) -> frozenset[str]:
        if self._is_due():
            async with self._reading:
                if self._is_due():
                    await self._read()
        if self._failure and time.monotonic() - self._read_at > KEPT_S:
            raise self._failure
        return self._known

    def _is_due(self) -> bool:
        return time.monotonic() - self._tried_at >= READ_EVERY_S

    async def _read(self) -> None:
        try:
            with cache_errors():
                found = await self._valkey.zrangebyscore(REVOKED, time.time(), math.inf)
        except ApplicationError as error:
            self._failure = error
        else:
            self._known, self._failure = (
                frozenset(str(each, "ascii") for each in cast("list[bytes]", found)),
                None,
            )
            self._read_at = time.monotonic()
        self._tried_at = time.monotonic()
