"""TLS to each server, with a CA of the tests; and plain text to another machine, refused."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from deploy.local.ports import free_ports
from deploy.local.server import Command
from deploy.local.servers import Nats
from deploy.local.settings import StackSettings
from deploy.local.stack import Stack
from tests.support import nats_keys
from tests.support.authority import Authority, Pair
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
from workers.telemetry import traced

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


@dataclass(frozen=True)
class NatsWithTls(Nats):
    """NATS as in the local stack, with a certificate and perhaps other users."""

    pair: Pair | None = None
    users: str = ""
    """The configuration of users, instead of that of the local stack."""
    login: Mapping[str, Any] = field(default_factory=dict)
    """The settings with which the server's readiness is checked."""

    @property
    def url(self) -> str:
        return f"tls://localhost:{self.port}"

    def prepare(self) -> Command:
        command = super().prepare()
        conf = self.home / "nats.conf"
        text = conf.read_text()
        if self.users:
            text = re.sub(r"(?s)authorization .*^jetstream", "jetstream", text, flags=re.M)
        assert self.pair
        files = json.dumps({"cert_file": str(self.pair.cert), "key_file": str(self.pair.key)})
        conf.write_text(f"{text}\ntls {files}\n{self.users}\n")
        return command

    async def check(self) -> None:
        password = {"nats_user": self.user, "nats_password": self.password}
        login = self.login or password
        async with open_nats(Settings.model_validate({"nats_url": self.url, **login})):
            pass


@pytest.fixture(scope="module")
async def nats_with_tls(
    authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningServer]:
    """Run NATS with a certificate; its configuration is that of the local stack with TLS added."""
    (port,) = free_ports(1)
    home = tmp_path_factory.mktemp("nats") / "nats"
    own = {"nats_user": Nats.user, "nats_password": Nats(home).password}
    server = NatsWithTls(
        home, port, pair=authority.issue("nats"), login={"nats_ca_file": authority.ca, **own}
    )
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
            with pytest.raises(StartError, match=f"certificate is refused: .*{ca.upper()}"):
                async with connected(kind, Settings.model_validate(settings | wrong)):
                    pass


PARTS = {"nats": "nats", "valkey": "valkey", "neo4j": "neo4j", "temporal": "temporal", "llm": "ray"}


@pytest.mark.parametrize("kind", PARTS)
async def test_the_local_stack_checks_a_server_elsewhere_as_the_workers_do(
    kind: str,
    servers: Servers,
    nats_with_tls: RunningServer,
    authority: Authority,
    stranger: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with AsyncExitStack() as stack:
        settings, ca = await secured(stack, kind, servers, nats_with_tls, authority)
        found = {}
        for trusted in (authority, stranger):
            for name, value in (settings | {ca: trusted.ca}).items():
                monkeypatch.setenv(name.upper(), str(value))
            status = await Stack(StackSettings.load(home=tmp_path)).status()
            found[trusted] = next(part for part in status if part.name == PARTS[kind])

    assert found[authority].state == "elsewhere"
    assert found[authority].healthy, found[authority].why
    assert not found[stranger].healthy
    assert "certificate is refused: " in found[stranger].why
    assert f"Check {ca.upper()}, and the name in" in found[stranger].why


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


@pytest.mark.parametrize("setting", ["nats_nkey_seed_file", "nats_creds_file"])
async def test_nats_takes_a_user_with_a_key(
    setting: str, authority: Authority, tmp_path: Path
) -> None:
    """The server knows public keys only: no password is on it, or crosses the network."""
    operator, account, user, other = (nats_keys.new_key(kind) for kind in "OAUU")
    if setting == "nats_creds_file":
        users = nats_keys.server_configuration(operator, account)
        right = nats_keys.credentials(user, account)
        wrong = nats_keys.credentials(other, nats_keys.new_key("A"))
    else:
        users = f"authorization {{ users: [{{ nkey: {nats_keys.public(user)} }}] }}"
        right, wrong = nats_keys.seed(user), nats_keys.seed(other)
    file = tmp_path / "right"
    file.write_text(right)
    (tmp_path / "wrong").write_text(wrong)
    common = {"nats_ca_file": authority.ca}
    (port,) = free_ports(1)
    server = NatsWithTls(
        tmp_path / "nats",
        port,
        pair=authority.issue("nats"),
        users=users,
        login=common | {setting: file},
    )
    async with started(server, server.url, port=port):
        given = common | {"nats_url": server.url}
        async with open_nats(Settings.model_validate(given | {setting: file})) as client:
            await client.jetstream().account_info()
        for login in ({}, {setting: tmp_path / "wrong"}):
            with pytest.raises(StartError, match="authentication failed") as refused:
                async with open_nats(Settings.model_validate(given | login)):
                    pass
            assert (setting.upper() in str(refused.value)) == bool(login)


def test_traces_go_to_another_machine_by_tls_only() -> None:
    plain = {"otel_exporter_otlp_endpoint": f"http://{ELSEWHERE}:4317"}

    with (
        pytest.raises(StartError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT names .*use https://"),
        traced(Settings.model_validate(plain), "story"),
    ):
        pass


async def test_a_ca_does_not_make_nats_without_tls_safe(authority: Authority) -> None:
    settings = Settings(nats_url=f"nats://{ELSEWHERE}:1", nats_ca_file=authority.ca)

    with pytest.raises(StartError, match="would be in plain text"):
        async with open_nats(settings):
            pass
