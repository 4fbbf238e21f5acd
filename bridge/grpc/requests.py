"""Requests that have an `x-request-id`: an id stands for one request of its caller.

For REMEMBERED_S, Valkey keeps the request for which an id was first used. If that request is
repeated, its service gives it the same answer; the id with any other request is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager

from google.protobuf.message import Message
from grpc import StatusCode
from redis.asyncio import Redis

from activities.cache_errors import cache_errors
from bridge.grpc.calls import OF_STORY, REQUEST_ID, derived_id
from bridge.grpc.errors import code_of, status_of
from workflows.models.errors import ErrorType, application_error

REMEMBERED_S = 7 * 24 * 3_600
"""How long an id is kept: longer than any client repeats a request."""

READS = ("Get", "List", "Score", "Validate", "Rehydrate")
"""Prefixes of the names of methods that change nothing, and so take no request id."""

SAME = {"StreamDeliberation": "Deliberate"}
"""Methods whose requests count as those of another method."""

NOTHING_DONE = frozenset(
    {StatusCode.INVALID_ARGUMENT, StatusCode.PERMISSION_DENIED, StatusCode.NOT_FOUND}
)
"""Statuses after which a request may be corrected and sent again under its id."""


class Requests:
    """The request ids of all callers, shared by all replicas."""

    def __init__(self, valkey: Redis) -> None:
        self._valkey = valkey

    @asynccontextmanager
    async def claim(
        self, actor: str, method: str, metadata: Iterable[tuple[str, str | bytes]], request: Message
    ) -> AsyncIterator[None]:
        """Keep the id of the request that is carried out in the block.

        Args:
            actor: The caller.
            method: The full name, `/package.Service/Method`.
            metadata: The call's; without an `x-request-id` nothing is kept.
            request: The message, as received.

        Raises:
            ApplicationError: `RequestReused`: the caller used the id for another request; or by
                `activities.cache_errors.TABLE`, if Valkey does not answer.
        """
        given = dict(metadata).get(REQUEST_ID)
        name = method.rpartition("/")[2]
        if not isinstance(given, str) or not given or name.startswith(READS):
            yield
            return
        key = f"swe:request:{derived_id(actor, given)}"
        content = content_of(name, request, dict(metadata))
        with cache_errors():
            before = await self._valkey.set(key, content, nx=True, get=True, ex=REMEMBERED_S)
        if before is not None and before != content.encode():
            raise application_error(
                ErrorType.REQUEST_REUSED,
                f"x-request-id {given[:100]} was used for another request; send this one with "
                "its own",
            )
        try:
            yield
        except Exception as error:
            if before is None and code_of(status_of(error)) in NOTHING_DONE:
                with cache_errors():
                    await self._valkey.delete(key)
            raise


def content_of(name: str, request: Message, metadata: Mapping[str, str | bytes]) -> str:
    """Return the hash of a method's request, with the metadata that is a part of it."""
    digest = hashlib.sha256(f"{SAME.get(name, name)}\n".encode())
    digest.update(request.SerializeToString(deterministic=True))
    for key in OF_STORY.values():
        for given in (key, f"{key}-bin"):
            if value := metadata.get(given):
                digest.update(f"\n{given}: {value!r}".encode())
    return digest.hexdigest()
