"""Authentication by signed, expiring tokens (RFC 7519, HS256) in `authorization: Bearer …`.

A token names an actor and the roles in which it may act. `fleet token create` makes one; every
process that serves gRPC has the key that signs them. Health and reflection need no token: they
reveal only what the contracts contain.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from typing import NamedTuple

from activities.revoked import RevokedTokens
from activities.tokens import HOW, Caller, read_token
from workflows.models.errors import ErrorType, application_error

PUBLIC_METHODS = ("/grpc.health.", "/grpc.reflection.")
"""Prefixes of the methods that anyone may call."""

_caller: ContextVar[Caller] = ContextVar("caller")


def caller() -> Caller:
    """Return the caller of the current call."""
    return _caller.get()


class Budget(NamedTuple):
    """A caller's token bucket: the calls left in it, and the time of that count."""

    left: float
    at: float


class Access:
    """Authentication of callers, and a rate limit for each of them in this process.

    A limit that replicas share would be a write to Valkey in every call. A synced write takes
    longer than a GetContext from the cache.
    """

    def __init__(
        self, keys: Sequence[str], calls_per_second: float, revoked: RevokedTokens | None = None
    ) -> None:
        """Use these keys and this limit.

        Args:
            keys: the key of the tokens, and the former one while its tokens are still valid.
            calls_per_second: each actor's long-term limit; twice as many may come at once.
            revoked: the tokens that were revoked; None: none was.
        """
        self._keys = keys
        self._revoked = revoked
        self._rate = calls_per_second
        self._budgets: dict[str, Budget] = {}

    async def admit(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Return the caller, by the call's metadata; `caller()` returns it from now on.

        Raises:
            ApplicationError: `Unauthenticated`, or `RateLimit`; or why the revoked tokens are not
                known.
        """
        header = dict(metadata).get("authorization", "")
        scheme, _, token = (header if isinstance(header, str) else "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise application_error(ErrorType.UNAUTHENTICATED, f"no token. {HOW}")
        found = read_token(self._keys, token.strip())
        if self._revoked is not None:
            await self._revoked.require_valid(found)
        self._spend(found.actor)
        _caller.set(found)
        return found

    def _spend(self, actor: str) -> None:
        now, most = time.monotonic(), max(1.0, 2 * self._rate)
        before = self._budgets.get(actor, Budget(most, now))
        left = min(most, before.left + (now - before.at) * self._rate)
        if left < 1:
            raise application_error(
                ErrorType.RATE_LIMIT,
                f"{actor} makes more than {self._rate:g} calls a second; wait, then go on",
            )
        self._budgets[actor] = Budget(left - 1, now)
