"""Valkey as a process opens it: refused if it may lose payloads, reported before it is full."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from tests.support.polling import until
from tests.support.servers import RunningServer
from workers.clients.connection import StartError
from workers.clients.valkey import MEMORY, check_valkey, open_valkey, watch_memory
from workers.settings import Settings


@pytest.fixture
def settings(valkey: RunningServer) -> Settings:
    where = {"redis_host": valkey.host, "redis_port": valkey.port}
    return Settings.model_validate(where | {"redis_password": valkey.password})


@pytest.fixture
async def configured(client: Redis) -> AsyncIterator[Any]:
    """Change Valkey's configuration for the test."""
    names = ("appendfsync", "appendonly", "maxmemory-policy", "maxmemory")
    before: dict[str, Any] = {name: (await client.config_get(name))[name] for name in names}

    async def configure(name: str, value: str | int) -> None:
        await client.config_set(name, value)

    yield configure
    for name, value in before.items():
        await client.config_set(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("appendfsync", "everysec"),
        ("appendfsync", "no"),
        ("appendonly", "no"),
        ("maxmemory-policy", "allkeys-lru"),
    ],
)
async def test_a_valkey_that_may_lose_payloads_is_refused_with_the_command_that_fixes_it(
    settings: Settings, configured: Any, name: str, value: str
) -> None:
    await configured(name, value)

    with pytest.raises(StartError, match=f"{name} {value}") as refused:
        async with open_valkey(settings):
            pass

    assert f"valkey-cli CONFIG SET {name} " in str(refused.value)


async def test_memory_that_is_nearly_full_is_reported(client: Redis, configured: Any) -> None:
    assert await check_valkey(client) == ""
    used = (await client.info("memory"))["used_memory"]

    await configured("maxmemory", used + used // 10)

    assert (await check_valkey(client)).endswith("MiB are used: raise maxmemory")
    with capture_logs() as logs:
        async with watch_memory(client):
            await until(lambda: [line for line in logs if "short" in line["event"]])
    (metric,) = MEMORY.collect()
    assert metric.samples[0].value > 0.8
