"""Valkey: answers, context packs, and the payloads that are too large for histories."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import Redis
from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    RedisError,
    ResponseError,
)

from workers.clients.connection import ANSWER_WITHIN_S, StartError, secret_value
from workers.settings import Settings

KEEPS_EVERYTHING = ("noeviction", "volatile-lru", "volatile-lfu", "volatile-random", "volatile-ttl")


def valkey_client(settings: Settings) -> Redis:
    """Return the client, not connected yet."""
    return Redis(
        host=settings.redis_host,
        port=settings.redis_port,
        password=secret_value(settings.redis_password),
        ssl=settings.redis_tls,
        socket_connect_timeout=ANSWER_WITHIN_S,
        socket_timeout=ANSWER_WITHIN_S,  # less than the timeout of an activity
        health_check_interval=30,
    )


@asynccontextmanager
async def open_valkey(settings: Settings) -> AsyncIterator[Redis]:
    """Connect, and check that the server keeps what it stores.

    Raises:
        StartError: wrong address or credential, or a server that would lose payloads.
    """
    where = f"Valkey at {settings.redis_host}:{settings.redis_port}"
    client = valkey_client(settings)
    try:
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                await client.ping()
                await _keeps_everything(client, where)
        except (AuthenticationError, NoPermissionError) as error:
            raise StartError(f"{where}: authentication failed. Check REDIS_PASSWORD") from error
        except (TimeoutError, OSError, RedisError) as error:
            raise StartError(
                f"{where} is not reachable. Start it, or set REDIS_HOST and REDIS_PORT"
            ) from error
        yield client
    finally:
        await client.aclose()


async def _keeps_everything(client: Redis, where: str) -> None:
    """Raise StartError if the server may lose keys.

    Histories refer to payloads that are stored here, so a server that evicts them breaks stories.
    """
    try:
        policy = (await client.config_get("maxmemory-policy"))["maxmemory-policy"]
        append_only = (await client.config_get("appendonly"))["appendonly"]
    except (NoPermissionError, ResponseError, KeyError):
        return  # a managed server does not show it; its operator is responsible
    if policy not in KEEPS_EVERYTHING:
        raise StartError(
            f"{where} evicts keys that have no TTL (maxmemory-policy {policy}). "
            "Set it: valkey-cli CONFIG SET maxmemory-policy noeviction"
        )
    if append_only != "yes":
        raise StartError(
            f"{where} loses its last writes in a crash (appendonly {append_only}). "
            "Set it: valkey-cli CONFIG SET appendonly yes"
        )
