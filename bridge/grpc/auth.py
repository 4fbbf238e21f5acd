"""Authentication by signed, expiring tokens (RFC 7519, HS256) in `authorization: Bearer …`.

A token names an actor and the roles in which it may act. `fleet token create` makes one; every
process that serves gRPC has the key that signs them. Health and reflection need no token: they
reveal only what the contracts contain.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import jwt
from temporalio.exceptions import ApplicationError

from workflows.models.base import Actor, Request
from workflows.models.errors import ErrorType, application_error
from workflows.models.ids import Role

ALGORITHM = "HS256"
ISSUER = "swe-ai-fleet"
LEEWAY = timedelta(seconds=5)
"""Maximum difference between the clocks of those who make tokens and those who read them."""

PUBLIC_METHODS = ("/grpc.health.", "/grpc.reflection.")
"""Prefixes of the methods that anyone may call."""

HOW = "Send `authorization: Bearer TOKEN`; `fleet token create` makes one"


class Caller(Request):
    """The actor of a call, and the roles that its token allows."""

    actor: Actor
    roles: frozenset[Role] = frozenset()

    def require_role(self, *roles: str) -> str:
        """Return the first of these roles that the token has.

        Raises:
            ApplicationError: `Permission`: it has none of them.
        """
        for role in roles:
            if role in self.roles:
                return role
        has = ", ".join(sorted(self.roles)) or "none"
        raise application_error(
            ErrorType.PERMISSION,
            f"this needs the role {' or '.join(roles)}; the token of {self.actor} has {has}",
        )


_caller: ContextVar[Caller] = ContextVar("caller")


def caller() -> Caller:
    """Return the caller of the current call."""
    return _caller.get()


def create_token(key: str, caller: Caller, valid_for: timedelta) -> str:
    """Create a token for that caller."""
    now = datetime.now(UTC)
    claims = {
        "iss": ISSUER,
        "sub": caller.actor,
        "roles": sorted(caller.roles),
        "iat": now,
        "exp": now + valid_for,
    }
    return jwt.encode(claims, key, algorithm=ALGORITHM)


def read_token(key: str | None, token: str) -> Caller:
    """Return the caller that the token names.

    Without a `key`, the signature is not checked: only for reading a token's content.

    Raises:
        ApplicationError: `Unauthenticated`: forged, expired, or not from this fleet.
    """
    try:
        claims = jwt.decode(
            token,
            key or "",
            algorithms=[ALGORITHM],
            issuer=ISSUER,
            leeway=LEEWAY,
            options={
                "require": ["sub", "exp", "iat"],
                "verify_signature": key is not None,
                "verify_exp": True,
                "verify_iss": True,
            },
        )
        return Caller(actor=claims["sub"], roles=claims.get("roles", []))
    except jwt.ExpiredSignatureError:
        raise application_error(
            ErrorType.UNAUTHENTICATED, f"the token has expired. {HOW}"
        ) from None
    except (jwt.InvalidTokenError, ApplicationError, TypeError) as error:
        raise application_error(
            ErrorType.UNAUTHENTICATED, f"the token is not one of ours: {error}. {HOW}"
        ) from None


class Budget(NamedTuple):
    """A caller's token bucket: the calls left in it, and the time of that count."""

    left: float
    at: float


class Access:
    """Authentication of callers, and a rate limit for each of them in this process.

    A limit that replicas share would be a write to Valkey in every call. A synced write takes
    longer than a GetContext from the cache.
    """

    def __init__(self, key: str, calls_per_second: float) -> None:
        """Use this key and this limit.

        `calls_per_second` is each actor's long-term limit; twice as many may come at once.
        """
        self._key = key
        self._rate = calls_per_second
        self._budgets: dict[str, Budget] = {}

    def admit(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Return the caller, by the call's metadata; `caller()` returns it from now on.

        Raises:
            ApplicationError: `Unauthenticated`, or `RateLimit`.
        """
        header = dict(metadata).get("authorization", "")
        scheme, _, token = (header if isinstance(header, str) else "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise application_error(ErrorType.UNAUTHENTICATED, f"no token. {HOW}")
        found = read_token(self._key, token.strip())
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
