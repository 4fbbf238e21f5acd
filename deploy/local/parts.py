"""The parts of the stack: which are started here, which run elsewhere, and in which order."""

import getpass
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from pydantic import SecretStr

from activities.tokens import Caller, create_token
from deploy.local.servers import (
    LOOPBACK,
    Nats,
    Neo4j,
    Prometheus,
    RayServe,
    Server,
    Temporal,
    Valkey,
    WebUi,
    Workers,
    check_nats,
    check_neo4j,
    check_temporal,
    check_valkey,
    check_vllm,
    credential,
)
from deploy.local.settings import StackSettings
from deploy.local.web_ui import CODEC_PATH
from workers.payload_codec import KEY_BYTES

DEVELOPER_ROLES = ("PO", "QA", "OPERATOR")
DEVELOPER_TOKEN_FOR = timedelta(days=365)
"""The lifetime of the developer's token; each start of the stack creates another."""


@dataclass(frozen=True)
class Elsewhere:
    """A server that others run: it is probed, never started or stopped."""

    name: str
    probe: Callable[[], Awaitable[None]]

    async def check(self) -> None:
        """Return if the server serves; raise the error of its client otherwise."""
        await self.probe()


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
    env: dict[str, str] = {}
    env |= _codec(settings)
    servers = tuple(
        decide(settings, env) for decide in (_temporal, _nats, _valkey, _neo4j, _language_model)
    )
    if isinstance(temporal := servers[0].server, Temporal):
        ui = WebUi(settings.home / "data" / "ui", temporal, settings.home)
        servers = (servers[0], Part(ui, ui.url, servers[0].ready_within), *servers[1:])
    env["HEALTH_PORT"] = str(settings.health_port)
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
    env["TEMPORAL_NAMESPACE"] = settings.temporal_namespace
    if given := settings.temporal_address:
        env["TEMPORAL_ADDRESS"] = given
        probe = partial(check_temporal, given, settings.temporal_namespace)
        return Part(Elsewhere("temporal", probe), given, within)
    server = Temporal(
        settings.home / "data" / "temporal",
        settings.temporal_port,
        settings.temporal_ui_port,
        codec_path=CODEC_PATH,
    )
    env["TEMPORAL_ADDRESS"] = server.address
    return Part(server, server.address, within)


def _nats(settings: StackSettings, env: dict[str, str]) -> Part:
    within = timedelta(minutes=2)
    if given := settings.nats_url:
        password = _plain(settings.nats_password)
        env |= _given(NATS_URL=given, NATS_USER=settings.nats_user, NATS_PASSWORD=password)
        probe = partial(check_nats, given, settings.nats_user, password)
        return Part(Elsewhere("nats", probe), given, within)
    server = Nats(settings.home / "data" / "nats", settings.nats_port)
    env |= {"NATS_URL": server.url, "NATS_USER": server.user, "NATS_PASSWORD": server.password}
    return Part(server, server.url, within)


def _valkey(settings: StackSettings, env: dict[str, str]) -> Part:
    within = timedelta(minutes=2)
    if given := settings.redis_host:
        password, port = _plain(settings.redis_password), settings.redis_port
        env |= _given(REDIS_HOST=given, REDIS_PORT=str(port), REDIS_PASSWORD=password)
        return Part(
            Elsewhere("valkey", partial(check_valkey, given, port, password)),
            f"{given}:{port}",
            within,
        )
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
        password = _plain(settings.neo4j_password)
        env |= _given(NEO4J_URI=given, NEO4J_USER=settings.neo4j_user, NEO4J_PASSWORD=password)
        probe = partial(check_neo4j, given, settings.neo4j_user, password or "")
        return Part(Elsewhere("neo4j", probe), given, within)
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
        key = _plain(settings.vllm_api_key)
        env |= _given(VLLM_URL=given, VLLM_MODEL=settings.vllm_model, VLLM_API_KEY=key)
        probe = partial(check_vllm, given, settings.vllm_model, key)
        return Part(Elsewhere("ray", probe), given, within)
    server = RayServe(
        settings.home / "ray", settings.serve_port, settings.model, settings.ray_address
    )
    env |= {"VLLM_URL": server.url, "VLLM_MODEL": server.model}
    # Ray gives its node 30 s to start, and ends if the machine is too busy for that.
    return Part(server, f"{server.url} ({server.model})", within, timedelta(seconds=60), tries=3)


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
    env = {
        "CODEC_PORT": str(settings.codec_port),
        "TEMPORAL_CODEC_ENDPOINT": f"http://{LOOPBACK}:{settings.codec_port}",
    }
    if not (settings.payload_keys or settings.payload_keys_file):
        env["PAYLOAD_KEYS"] = credential(settings.home / "data" / "codec" / "key", KEY_BYTES)
    return env


def _plain(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None


def _given(**values: str | None) -> dict[str, str]:
    return {name: value for name, value in values.items() if value}
