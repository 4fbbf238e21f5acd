"""Who calls: signed, expiring tokens (RFC 7519, HS256) in `authorization: Bearer …`.

A token names an actor and the roles that it may act in. `fleet token create` makes one; every
process that serves gRPC has the key it was signed with. Health and reflection need none: they
tell nothing that the contracts do not.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import jwt
from temporalio.exceptions import ApplicationError

from bridge.grpc.errors import PERMISSION, RATE, UNAUTHENTICATED, refused
from workflows.ids import Role
from workflows.models import Actor, Request

ALGORITHM = "HS256"
ISSUER = "swe-ai-fleet"
LEEWAY = timedelta(seconds=5)
"""By which the clocks of those who make tokens and those who read them may differ."""

OPEN = ("/grpc.health.", "/grpc.reflection.")
"""Methods that anyone may call."""

HOW = "Send `authorization: Bearer TOKEN`; `fleet token create` makes one"


class Caller(Request):
    """Who calls, and the roles that the token lets them act in."""

    actor: Actor
    roles: frozenset[Role] = frozenset()

    def acting_as(self, *roles: str) -> str:
        """The first of these roles that the token has.

        Raises:
            ApplicationError: `Permission`: it has none of them.
        """
        for role in roles:
            if role in self.roles:
                return role
        has = ", ".join(sorted(self.roles)) or "none"
        raise refused(
            PERMISSION,
            f"this needs the role {' or '.join(roles)}; the token of {self.actor} has {has}",
        )


_caller: ContextVar[Caller] = ContextVar("caller")


def caller() -> Caller:
    """Who makes the call that runs here."""
    return _caller.get()


def create_token(key: str, caller: Caller, valid_for: timedelta) -> str:
    """A token of that caller's."""
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
    """Whose token it is. key None: for who only wants to know what it says.

    Raises:
        ApplicationError: `Unauthenticated`: forged, expired, or none of ours.
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
        raise refused(UNAUTHENTICATED, f"the token has expired. {HOW}") from None
    except (jwt.InvalidTokenError, ApplicationError, TypeError) as error:
        raise refused(UNAUTHENTICATED, f"the token is not one of ours: {error}. {HOW}") from None


class Budget(NamedTuple):
    """A caller's token bucket: what is left of it, and when that was."""

    left: float
    at: float


class Access:
    """Lets a call in, or refuses it. Callers are limited each by themselves."""

    def __init__(self, key: str, calls_per_second: float) -> None:
        """calls_per_second: of one actor, in the long run; twice as many at once."""
        self._key = key
        self._rate = calls_per_second
        self._budgets: dict[str, Budget] = {}

    def admit(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Who makes the call of this metadata; `caller()` tells it from now on.

        Raises:
            ApplicationError: `Unauthenticated`, or `RateLimit`.
        """
        said = dict(metadata).get("authorization", "")
        scheme, _, token = (said if isinstance(said, str) else "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise refused(UNAUTHENTICATED, f"no token. {HOW}")
        found = read_token(self._key, token.strip())
        self._spend(found.actor)
        _caller.set(found)
        return found

    def _spend(self, actor: str) -> None:
        now, most = time.monotonic(), max(1.0, 2 * self._rate)
        before = self._budgets.get(actor, Budget(most, now))
        left = min(most, before.left + (now - before.at) * self._rate)
        if left < 1:
            raise refused(
                RATE, f"{actor} makes more than {self._rate:g} calls a second; wait, then go on"
            )
        self._budgets[actor] = Budget(left - 1, now)
