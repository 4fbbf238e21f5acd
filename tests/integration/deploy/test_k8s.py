"""The stores' configurations of the manifests, given to the real servers on this machine."""

import asyncio
import os
import re
import shutil
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import nats
import nats.errors
import pytest
import yaml
from nats.aio.client import Client as Nats
from ray.serve.schema import ServeDeploySchema
from redis.asyncio import Redis

from bridge.jetstream.streams import STREAMS, reconcile
from deploy.local.ports import free_ports
from deploy.local.server import script
from deploy.local.servers import _valkey_program
from tests.support.certificates import write_certificate
from tests.support.manifests import SECRETS, Manifests, rendered
from tests.support.polling import until
from workers import serve
from workers.serve_settings import ServeSettings

NATS_PASSWORDS = SECRETS["nats"]


@pytest.fixture
def manifests() -> Manifests:
    return rendered("production")


def shell(manifests: Manifests, name: str) -> str:
    """Return the script that a store's container runs."""
    (container,) = manifests.of_kind("StatefulSet")[name]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["/bin/sh", "-ec"]
    (lines,) = container["args"]
    return str(lines)


@asynccontextmanager
async def running(
    lines: str, environment: dict[str, str], *folders: Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    path = f"{os.pathsep.join(map(str, folders))}{os.pathsep}{os.environ['PATH']}"
    process = await asyncio.create_subprocess_exec(
        "/bin/sh",
        "-ec",
        lines,
        env={**environment, "PATH": path},
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@asynccontextmanager
async def cluster(manifests: Manifests, folder: Path) -> AsyncIterator[list[int]]:
    """Run the three servers of NATS with the manifests' script and file; yield the client ports."""
    write_certificate(folder / "tls")
    conf = manifests.of_kind("ConfigMap")["nats-config"]["data"]["nats.conf"]
    ports = [free_ports(3) for _ in range(3)]
    for number, (_, peer, _) in enumerate(ports):
        host = f"nats-{number}.nats-headless.swe-ai-fleet.svc.cluster.local:6222"
        assert host in conf
        conf = conf.replace(host, f"localhost:{peer}")
    async with AsyncExitStack() as servers:
        for number, (client, peer, monitor) in enumerate(ports):
            home = folder / f"nats-{number}"
            home.mkdir()
            own = conf
            for old, new in {
                '"0.0.0.0:4222"': f'"127.0.0.1:{client}"',
                '"0.0.0.0:6222"': f'"127.0.0.1:{peer}"',
                '"0.0.0.0:8222"': f'"127.0.0.1:{monitor}"',
                "/etc/nats-tls": str(folder / "tls"),
                "/run/nats": str(home),
                '"/data"': f'"{home}"',
            }.items():
                assert old in own
                own = own.replace(old, new)
            (home / "nats.conf").write_text(own)
            lines = shell(manifests, "nats").replace("/etc/nats/nats.conf", str(home / "nats.conf"))
            environment = {**NATS_PASSWORDS, "POD_NAME": f"nats-{number}"}
            process = running(lines, environment, script("nats-server").parent)
            await servers.enter_async_context(process)
        yield [client for client, _, _ in ports]


async def connect(port: int, user: str, password: str, folder: Path) -> Nats:
    return await nats.connect(
        f"tls://localhost:{port}",
        user=user,
        password=password,
        tls=ssl.create_default_context(cafile=folder / "tls" / "ca.crt"),
        allow_reconnect=False,
    )


async def test_three_servers_of_nats_hold_three_copies_of_each_stream(
    manifests: Manifests, tmp_path: Path
) -> None:
    async with cluster(manifests, tmp_path) as ports:

        async def fleet() -> Nats | None:
            try:
                client = await connect(ports[0], "fleet", NATS_PASSWORDS["NATS_PASSWORD"], tmp_path)
                await client.jetstream().account_info()
            except (OSError, nats.errors.Error):
                return None
            return client

        client = await until(fleet, lambda found: found is not None)
        assert client
        jetstream = client.jetstream()
        await reconcile(jetstream, 3)
        for stream in STREAMS:
            info = await jetstream.stream_info(stream.name)
            assert info.config.num_replicas == 3
            assert info.cluster
            assert len(info.cluster.replicas or []) == 2
        await client.close()

        for user, variable in (
            ("agent", "NATS_AGENT_PASSWORD"),
            ("subscriber", "NATS_SUBSCRIBER_PASSWORD"),
        ):
            other = await connect(ports[1], user, NATS_PASSWORDS[variable], tmp_path)
            await other.close()
        with pytest.raises(nats.errors.Error, match=r"(?i)authorization"):
            await connect(ports[1], "fleet", "100000", tmp_path)
        with pytest.raises((OSError, nats.errors.Error)):
            await nats.connect(f"nats://localhost:{ports[1]}", allow_reconnect=False)


async def test_valkey_takes_its_file_and_a_password_with_spaces(
    manifests: Manifests, tmp_path: Path
) -> None:
    conf = manifests.of_kind("ConfigMap")["valkey-config"]["data"]["valkey.conf"]
    (port,) = free_ports(1)
    # The server here is built without TLS: the rest of the file is what it gets.
    conf = re.sub(r"^(port 0|tls-.*)\n", "", conf, flags=re.MULTILINE)
    (tmp_path / "valkey.conf").write_text(f"{conf.replace('/data', str(tmp_path))}\nport {port}\n")
    lines = (
        shell(manifests, "valkey")
        .replace("/etc/valkey/valkey.conf", str(tmp_path / "valkey.conf"))
        .replace("/run/valkey/valkey.conf", str(tmp_path / "run.conf"))
    )
    password = SECRETS["valkey"]["REDIS_PASSWORD"]

    async with running(lines, {"REDIS_PASSWORD": password}, _valkey_program().parent):
        client = Redis(port=port, password=password)

        async def answers() -> bool:
            try:
                return bool(await client.ping())
            except (OSError, ConnectionError):
                return False

        await until(answers, bool)
        settings = await client.config_get("*")
        await client.aclose()

    assert settings["appendfsync"] == "always"
    assert settings["maxmemory-policy"] == "noeviction"
    assert settings["maxmemory"] == str(3 * 1024**3)


def test_ray_accepts_the_configuration_of_serve(manifests: Manifests) -> None:
    text = manifests.of_kind("RayService")["agents"]["spec"]["serveConfigV2"]
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))

    (application,) = config.applications
    module, _, builder = application.import_path.partition(":")
    assert module == serve.__name__
    assert callable(getattr(serve, builder))
    assert config.http_options.port == 8000
    assert config.http_options.ssl_certfile
    assert shutil.which("bash"), "KubeRay starts Ray by bash"


def test_the_engines_accept_the_settings_of_their_pods(
    manifests: Manifests, monkeypatch: pytest.MonkeyPatch
) -> None:
    pods = dict(manifests.pods())
    for name in ("ray-head", "ray-engines"):
        variables = manifests.environment(pods[name])
        assert "RAY_ADDRESS" not in variables, "Ray itself reads it"
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        settings = ServeSettings.model_validate({})
        assert settings.vllm_model == variables["VLLM_MODEL"]
        assert settings.on_gpu
        assert settings.vllm_max_replicas == 4
