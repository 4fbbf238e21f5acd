"""The parts of the stack: which are started here, which run elsewhere, and in which order."""

import getpass
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from temporalio.converter import DataConverter

from activities.tokens import Caller, create_token
from deploy.local.sample import REPOSITORY
from deploy.local.server import LOOPBACK, Server, credential
from deploy.local.servers import Nats, Neo4j, Prometheus, RayServe, Temporal, Valkey, WebUi, Workers
from deploy.local.settings import StackSettings, given_settings
from deploy.local.web_ui import CODEC_PATH
from workers.clients.connection import redact_url
from workers.clients.engine import open_engine
from workers.clients.nats import open_nats
from workers.clients.neo4j import open_neo4j
from workers.clients.temporal import open_temporal
from workers.clients.valkey import open_valkey
from workers.payload_codec import KEY_BYTES
from workers.settings import Settings

SAMPLE_VARIABLE = "SAMPLE_REPOSITORY"

DEVELOPER_ROLES = ("PO", "QA", "OPERATOR")
DEVELOPER_TOKEN_FOR = timedelta(days=365)
"""The lifetime of the developer's token; each start of the stack creates another."""


@dataclass(frozen=True)
class Elsewhere:
    """A server that others run: it is probed, never started or stopped."""

    name: str
    client: Callable[[], AbstractAsyncContextManager[object]]
    """Opens a client, which checks the server as it does for a worker."""

    async def check(self) -> None:
        """Return if the server serves; raise the error of its client otherwise."""
        async with self.client():
            pass


@dataclass(frozen=True)
class Part:
    """One line of `status`: a server, where it is, and how long it may take to be ready."""

    server: Server | Elsewhere
    where: str
    ready_within: timedelta
    stops_within: timedelta = timedelta(seconds=30)
    tries: int = 1
    """How often its process may end before it is ready.

    More than once only for what is known to fail on a busy machine.
    """

    @property
    def name(self) -> str:
        """Its name in the supervisor, and of its log."""
        return self.server.name

    @property
    def ours(self) -> Server | None:
        """The server, if this stack starts it."""
        return self.server if isinstance(self.server, Server) else None


@dataclass(frozen=True)
class Parts:
    """All parts, and the settings that a client needs to reach them."""

    servers: tuple[Part, ...]
    """The parts that start first, all at once."""
    workers: Part
    """The part that starts when every server is ready, and stops before any of them."""
    env: Mapping[str, str]
    """The lines of the stack's `env` file, with which a client connects."""

    @property
    def all(self) -> tuple[Part, ...]:
        """All parts, in the order of their start."""
        return (*self.servers, self.workers)


def parts(settings: StackSettings) -> Parts:
    """Decide for each part whether it is started here or runs elsewhere."""
    env = _codec(settings)
    servers = tuple(
        decide(settings, env) for decide in (_temporal, _nats, _valkey, _neo4j, _language_model)
    )
    if isinstance(temporal := servers[0].server, Temporal):
        ui = WebUi(settings.home / "data" / "ui", temporal, settings.home)
        servers = (servers[0], Part(ui, ui.url, servers[0].ready_within), *servers[1:])
    env["HEALTH_PORT"] = str(settings.health_port)
    env |= _sample()
    ports = settings.grpc_ports | {"codec": settings.codec_port}
    if settings.observe:
        ports |= {"temporal-metrics": settings.temporal_metrics_port}
        env["TEMPORAL_METRICS_PORT"] = str(settings.temporal_metrics_port)
        prometheus = Prometheus(
            settings.home / "data" / "prometheus", settings.prometheus_port, settings.health_port
        )
        servers = (*servers, Part(prometheus, prometheus.url, timedelta(minutes=1)))
    env |= _grpc(settings)
    env["TEMPORAL_CODEC_AUTH"] = f"Bearer {env['FLEET_TOKEN']}"
    workers = Workers(settings.home, settings.health_port, other_ports=ports)
    health = f"http://{LOOPBACK}:{settings.health_port}/health"
    return Parts(servers, Part(workers, health, timedelta(minutes=3), timedelta(seconds=60)), env)


def _temporal(settings: StackSettings, env: dict[str, str]) -> Part:
    within = timedelta(minutes=2)
    if given := settings.temporal_address:
        return _elsewhere("temporal", given, within, "temporal_", _open_temporal, env)
    server = Temporal(
        settings.home / "data" / "temporal",
        settings.temporal_port,
        settings.temporal_ui_port,
        codec_path=CODEC_PATH,
    )
    env |= {"TEMPORAL_ADDRESS": server.address, "TEMPORAL_NAMESPACE": "default"}
    return Part(server, server.address, within)


def _nats(settings: StackSettings, env: dict[str, str]) -> Part:
    within = timedelta(minutes=2)
    if given := settings.nats_url:
        return _elsewhere("nats", given, within, "nats_", open_nats, env)
    server = Nats(settings.home / "data" / "nats", settings.nats_port)
    env |= {"NATS_URL": server.url, "NATS_USER": server.user, "NATS_PASSWORD": server.password}
    return Part(server, server.url, within)


def _valkey(settings: StackSettings, env: dict[str, str]) -> Part:
    within = timedelta(minutes=2)
    if given := settings.redis_host:
        return _elsewhere("valkey", given, within, "redis_", open_valkey, env)
    server = Valkey(settings.home / "data" / "valkey", settings.valkey_port)
    env |= {
        "REDIS_HOST": server.host,
        "REDIS_PORT": str(server.port),
        "REDIS_PASSWORD": server.password,
    }
    return Part(server, f"{server.host}:{server.port}", within)


def _neo4j(settings: StackSettings, env: dict[str, str]) -> Part:
    within = timedelta(minutes=3)
    if given := settings.neo4j_uri:
        return _elsewhere("neo4j", given, within, "neo4j_", open_neo4j, env)
    server = Neo4j(settings.home / "data" / "neo4j", settings.neo4j_port)
    env |= {
        "NEO4J_URI": server.uri,
        "NEO4J_USER": server.user,
        "NEO4J_PASSWORD": server.password,
    }
    return Part(server, server.uri, within, timedelta(seconds=60))


def _language_model(settings: StackSettings, env: dict[str, str]) -> Part:
    within = timedelta(minutes=15)
    if given := settings.vllm_url:
        return _elsewhere("ray", given, within, "vllm_", open_engine, env)
    server = RayServe(
        settings.home / "ray", settings.serve_port, settings.model, settings.ray_address
    )
    env |= {"VLLM_URL": server.url, "VLLM_MODEL": server.model}
    # Ray gives its node 30 s to start, and ends if the machine is too busy for that.
    return Part(server, f"{server.url} ({server.model})", within, timedelta(seconds=60), tries=3)


def _elsewhere(
    name: str,
    where: str,
    within: timedelta,
    prefix: str,
    client: Callable[[Settings], AbstractAsyncContextManager[object]],
    env: dict[str, str],
) -> Part:
    """Probe a server as the workers connect to it, and pass on the settings with this prefix."""
    settings, variables = given_settings(prefix, "allow_plain_text")
    env |= variables
    return Part(Elsewhere(name, partial(client, settings)), redact_url(where), within)


@asynccontextmanager
async def _open_temporal(settings: Settings) -> AsyncIterator[object]:
    yield await open_temporal(settings, DataConverter.default)


def _sample() -> dict[str, str]:
    """Return the variable that repositories.yaml has for the sample project, if set-up made it."""
    return {SAMPLE_VARIABLE: REPOSITORY.as_uri()} if REPOSITORY.exists() else {}


def _grpc(settings: StackSettings) -> dict[str, str]:
    """Return the services' ports, the key of their tokens, and a developer's token."""
    key = credential(settings.home / "data" / "grpc" / "key")
    developer = Caller(actor=getpass.getuser(), roles=frozenset(DEVELOPER_ROLES))
    ports = {name.upper(): str(port) for name, port in settings.grpc_ports.items()}
    token = create_token(key, developer, DEVELOPER_TOKEN_FOR)
    return {**ports, "GRPC_TOKEN_KEY": key, "FLEET_TOKEN": token}


def _codec(settings: StackSettings) -> dict[str, str]:
    """Return the key of payloads, and where the `temporal` CLI gets them decrypted.

    Keys in the environment are those of a Temporal that others use too, and no key is made.
    """
    _, keys = given_settings("payload_keys")
    if not keys:
        keys = {"PAYLOAD_KEYS": credential(settings.home / "data" / "codec" / "key", KEY_BYTES)}
    return keys | {
        "CODEC_PORT": str(settings.codec_port),
        "TEMPORAL_CODEC_ENDPOINT": f"http://{LOOPBACK}:{settings.codec_port}",
    }
