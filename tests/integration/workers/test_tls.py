"""TLS to each server, with a CA of the tests; and plain text to another machine, refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis

from deploy.local.ports import free_ports
from deploy.local.servers import Nats
from tests.support.authority import Authority
from tests.support.llm_server import LlmServer
from tests.support.servers import RunningServer, Servers, started
from tests.support.tls_proxy import tls_proxy
from workers.clients.connection import StartError
from workers.clients.engine import open_engine
from workers.clients.nats import open_nats
from workers.clients.neo4j import open_neo4j
from workers.clients.temporal import open_temporal
from workers.clients.valkey import open_valkey
from workers.payload_codec import encrypting_converter
from workers.settings import Settings

ELSEWHERE = "127.1"
"""Another machine by its name, and this one to the system: nothing leaves the machine."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("stranger"), "stranger")


@asynccontextmanager
async def connected(kind: str, settings: Settings) -> AsyncIterator[Any]:
    """Open the client of one server, as processes do."""
    if kind == "temporal":
        yield await open_temporal(settings, encrypting_converter([]))
        return
    openers: dict[str, Callable[[Settings], AbstractAsyncContextManager[Any]]] = {
        "valkey": open_valkey,
        "neo4j": open_neo4j,
        "nats": open_nats,
        "llm": open_engine,
    }
    async with openers[kind](settings) as client:
        yield client


@pytest.fixture(scope="module")
async def nats_with_tls(
    authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningServer]:
    """Run NATS with a certificate; its configuration is that of the local stack with TLS added."""
    pair = authority.issue("nats")

    class NatsWithTls(Nats):
        @property
        def url(self) -> str:
            return f"tls://localhost:{self.port}"

        def prepare(self) -> Any:
            command = super().prepare()
            conf = self.home / "nats.conf"
            files = json.dumps({"cert_file": str(pair.cert), "key_file": str(pair.key)})
            conf.write_text(conf.read_text() + f"\ntls {files}\n")
            return command

        async def check(self) -> None:
            settings = Settings(
                nats_url=self.url,
                nats_user=self.user,
                nats_password=SecretStr(self.password),
                nats_ca_file=authority.ca,
            )
            async with open_nats(settings):
                pass

    (port,) = free_ports(1)
    server = NatsWithTls(tmp_path_factory.mktemp("nats") / "nats", port)
    async with started(
        server, server.url, port=port, user=server.user, password=server.password
    ) as running:
        yield running


async def secured(
    stack: AsyncExitStack,
    kind: str,
    servers: Servers,
    nats_with_tls: RunningServer,
    authority: Authority,
) -> tuple[dict[str, Any], str]:
    """Return the settings of a connection with TLS, and the name of the CA's setting."""
    pair = authority.issue()

    async def through(port: int, **options: Any) -> int:
        return await stack.enter_async_context(tls_proxy(port, pair, **options))

    match kind:
        case "temporal":
            port = await through(servers.temporal.port)
            return {
                "temporal_address": f"localhost:{port}",
                "temporal_tls": True,
            }, "temporal_tls_server_ca_cert_path"
        case "valkey":
            port = await through(servers.valkey.port)
            return {
                "redis_host": "localhost",
                "redis_port": port,
                "redis_password": servers.valkey.password,
                "redis_tls": True,
            }, "redis_ca_file"
        case "neo4j":
            port = await through(servers.neo4j.port)
            return {
                "neo4j_uri": f"bolt+s://localhost:{port}",
                "neo4j_user": servers.neo4j.user,
                "neo4j_password": servers.neo4j.password,
            }, "neo4j_ca_file"
        case "nats":
            return {
                "nats_url": nats_with_tls.address,
                "nats_user": nats_with_tls.user,
                "nats_password": nats_with_tls.password,
            }, "nats_ca_file"
    llm = await stack.enter_async_context(LlmServer())
    port = await through(int(llm.url.rpartition(":")[2].partition("/")[0]))
    return {"vllm_url": f"https://localhost:{port}/v1"}, "vllm_ca_file"


@pytest.mark.parametrize("kind", ["temporal", "valkey", "neo4j", "nats", "llm"])
async def test_a_server_is_reached_by_tls_only_with_its_ca(
    kind: str,
    servers: Servers,
    nats_with_tls: RunningServer,
    authority: Authority,
    stranger: Authority,
) -> None:
    async with AsyncExitStack() as stack:
        settings, ca = await secured(stack, kind, servers, nats_with_tls, authority)

        async with connected(kind, Settings.model_validate(settings | {ca: authority.ca})):
            pass
        for wrong in ({}, {ca: stranger.ca}):
            with pytest.raises(StartError):
                async with connected(kind, Settings.model_validate(settings | wrong)):
                    pass


async def test_temporal_takes_a_client_certificate(
    servers: Servers, authority: Authority, tmp_path: Path
) -> None:
    pair, mine = authority.issue(), authority.issue("fleet")
    async with tls_proxy(servers.temporal.port, pair, str(authority.ca)) as port:
        settings: dict[str, Any] = {
            "temporal_address": f"localhost:{port}",
            "temporal_tls_server_ca_cert_path": authority.ca,
        }
        with pytest.raises(StartError):
            async with connected("temporal", Settings.model_validate(settings)):
                pass
        with_certificate = settings | {
            "temporal_tls_client_cert_path": mine.cert,
            "temporal_tls_client_key_path": mine.key,
        }
        async with connected("temporal", Settings.model_validate(with_certificate)):
            pass


async def test_valkey_takes_a_user_of_its_access_list(
    servers: Servers, client: Redis, authority: Authority
) -> None:
    await client.acl_setuser("fleet", enabled=True, passwords="+fleets", categories=["+@all"])
    async with tls_proxy(servers.valkey.port, authority.issue()) as port:
        settings = {
            "redis_host": "localhost",
            "redis_port": port,
            "redis_user": "fleet",
            "redis_ca_file": authority.ca,
        }
        right = Settings.model_validate(settings | {"redis_password": "fleets"})
        async with connected("valkey", right) as valkey:
            assert await valkey.acl_whoami() == "fleet"
        wrong = Settings.model_validate(settings | {"redis_password": "fleet"})
        with pytest.raises(StartError, match="REDIS_USER and REDIS_PASSWORD"):
            async with connected("valkey", wrong):
                pass
    await client.acl_deluser("fleet")


PLAIN = {
    "temporal": ({"temporal_address": f"{ELSEWHERE}:{{temporal}}"}, "TEMPORAL_TLS=true"),
    "valkey": (
        {"redis_host": ELSEWHERE, "redis_port": "{valkey}", "redis_password": "{password}"},
        "REDIS_TLS=true",
    ),
    "neo4j": ({"neo4j_uri": f"bolt://{ELSEWHERE}:1"}, "bolt+s://"),
    "nats": ({"nats_url": f"nats://{ELSEWHERE}:1"}, "tls://"),
    "llm": ({"vllm_url": f"http://{ELSEWHERE}:1/v1"}, "https://"),
}


@pytest.mark.parametrize("kind", PLAIN)
async def test_plain_text_to_another_machine_is_refused_unless_it_is_allowed(
    kind: str, servers: Servers
) -> None:
    given, remedy = PLAIN[kind]
    values = {
        name: value.format(
            temporal=servers.temporal.port,
            valkey=servers.valkey.port,
            password=servers.valkey.password,
        )
        for name, value in given.items()
    }
    with pytest.raises(StartError, match="would be in plain text") as refused:
        async with connected(kind, Settings.model_validate(values)):
            pass
    assert remedy in str(refused.value)
    assert "ALLOW_PLAIN_TEXT=true" in str(refused.value)

    allowed = Settings.model_validate(values | {"allow_plain_text": True})
    if kind in ("temporal", "valkey"):
        async with connected(kind, allowed):
            return
    with pytest.raises(StartError, match="is not reachable"):
        async with connected(kind, allowed):
            pass


async def test_a_ca_does_not_make_nats_without_tls_safe(authority: Authority) -> None:
    settings = Settings(nats_url=f"nats://{ELSEWHERE}:1", nats_ca_file=authority.ca)

    with pytest.raises(StartError, match="would be in plain text"):
        async with open_nats(settings):
            pass
