"""Valkey: answers, context packs, and the payloads that are too large for histories."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

import structlog
from prometheus_client import Gauge
from redis.asyncio import Redis
from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    RedisError,
    ResponseError,
)

from workers.clients.connection import (
    ANSWER_WITHIN_S,
    StartError,
    raise_if_not_trusted,
    require_encryption,
    secret_value,
)
from workers.settings import Settings

MEMORY_WARNING = 0.8
"""Part of Valkey's memory from which on it is reported: at its limit, it refuses payloads."""

MEMORY_EVERY_S = 15.0

MEMORY = Gauge("fleet_valkey_memory_ratio", "Used part of Valkey's memory; 1: writes are refused")

log = structlog.stdlib.get_logger(__name__)

KEEPS_EVERYTHING = ("noeviction", "volatile-lru", "volatile-lfu", "volatile-random", "volatile-ttl")


def valkey_client(settings: Settings) -> Redis:
    """Return the client, not connected yet.

    Raises:
        StartError: plain text to another machine.
    """
    tls = settings.redis_tls or settings.redis_ca_file is not None
    if not tls:
        require_encryption(settings, "REDIS_HOST", settings.redis_host, "set REDIS_TLS=true")
    return Redis(
        host=settings.redis_host,
        port=settings.redis_port,
        username=settings.redis_user,
        password=secret_value(settings.redis_password),
        ssl=tls,
        ssl_ca_certs=str(settings.redis_ca_file) if settings.redis_ca_file else None,
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
            raise StartError(
                f"{where}: authentication failed. Check REDIS_USER and REDIS_PASSWORD"
            ) from error
        except (TimeoutError, OSError, RedisError) as error:
            raise_if_not_trusted(where, error, "REDIS_CA_FILE", "REDIS_HOST")
            raise StartError(
                f"{where} is not reachable. Start it, or set REDIS_HOST and REDIS_PORT"
            ) from error
        yield client
    finally:
        await client.aclose()


class Memory(NamedTuple):
    """Valkey's memory in bytes. limit: maxmemory, else the machine's memory; 0: not known."""

    used: int
    limit: int

    @property
    def is_short(self) -> bool:
        """Whether MEMORY_WARNING is reached."""
        return self.limit > 0 and self.used >= MEMORY_WARNING * self.limit

    def __str__(self) -> str:
        limit = f" of {self.limit / 2**20:.0f} MiB" if self.limit else ""
        return f"{self.used / 2**20:.0f} MiB{limit}"


async def read_memory(client: Redis) -> Memory:
    """Read how much memory Valkey uses."""
    info = await client.info("memory")
    limit = info.get("maxmemory") or info.get("total_system_memory") or 0
    return Memory(info["used_memory"], limit)


async def check_valkey(client: Redis) -> str:
    """Return a warning if Valkey's memory is short; raise its error if it does not answer."""
    memory = await read_memory(client)
    return f"{memory} are used: raise maxmemory" if memory.is_short else ""


@asynccontextmanager
async def watch_memory(client: Redis) -> AsyncIterator[None]:
    """Keep the metric MEMORY up to date, and log when the memory becomes short."""

    async def watch() -> None:
        was_short = False
        while True:
            with suppress(RedisError, OSError, TimeoutError):  # /health reports it
                memory = await read_memory(client)
                MEMORY.set(memory.used / memory.limit if memory.limit else 0)
                if memory.is_short and not was_short:
                    log.warning("Valkey's memory is short", memory=str(memory))
                was_short = memory.is_short
            await asyncio.sleep(MEMORY_EVERY_S)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        while not watching.done():  # the client may miss a cancellation
            watching.cancel()
            await asyncio.wait([watching], timeout=1)


async def _keeps_everything(client: Redis, where: str) -> None:
    """Raise StartError if the server may lose keys.

    Histories refer to payloads that are stored here, so a server that evicts them breaks stories.
    """
    try:
        policy = (await client.config_get("maxmemory-policy"))["maxmemory-policy"]
        append_only = (await client.config_get("appendonly"))["appendonly"]
        sync = (await client.config_get("appendfsync"))["appendfsync"]
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
    if sync != "always":
        raise StartError(
            f"{where} loses the last second of its writes in a crash (appendfsync {sync}), and "
            "histories refer to them. Set it: valkey-cli CONFIG SET appendfsync always"
        )
