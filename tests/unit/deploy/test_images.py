"""Images and the compose file, as far as they can be checked without a container engine."""

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from deploy.local.server import script
from deploy.local.servers import DYNAMIC_CONFIG
from tests.support.manifests import Manifests, rendered
from workers import health
from workers.environment import ALIASES, ROOT
from workers.processes.process import IF_ENCRYPTED, PROCESSES
from workers.settings import Settings, slips

DOCKER = ROOT / "deploy" / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
SCHEMA = Path(__file__).with_name("compose-spec.schema.json")
"""From the Go module github.com/compose-spec/compose-go/v2, version 2.16.2."""


def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return document


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Return the instructions with their arguments, continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        (word, rest)
        for word, _, rest in (line.partition(" ") for line in text.splitlines())
        if word
    ]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    linted = subprocess.run(
        [str(script("hadolint")), str(dockerfile)], capture_output=True, text=True, check=False
    )

    assert (linted.returncode, linted.stdout) == (0, "")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_runs_as_an_ordinary_user_on_a_base_that_can_be_pinned(dockerfile: Path) -> None:
    lines = instructions(dockerfile)
    bases = [rest.split()[0] for word, rest in lines if word == "FROM"]
    stages = {rest.split()[2] for word, rest in lines if word == "FROM" and " AS " in rest}
    users = [rest for word, rest in lines if word == "USER"]

    assert {base for base in bases if base not in stages} == {"${PYTHON_IMAGE}"}
    assert users
    assert all(int(user.partition(":")[0]) >= 1000 for user in users)
    assert "HEALTHCHECK" in dict(lines)
    assert any("--require-hashes" in rest for word, rest in lines if word == "RUN")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_what_an_image_copies_is_in_its_context(dockerfile: Path) -> None:
    ignore = (DOCKER / f"{dockerfile.name}.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignore if line.startswith("!")}
    for word, rest in instructions(dockerfile):
        if word != "COPY" or rest.startswith("--from"):
            continue
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists()
            assert source == "." or source.partition("/")[0] in kept
    packages = {path.parent.name for path in ROOT.glob("*/py.typed")}
    assert kept == packages | {"LICENSE", "README.md", "pyproject.toml"}


def test_an_image_may_have_the_build_id_of_its_workers() -> None:
    lines = [f"{word} {rest}" for word, rest in instructions(DOCKER / "fleet.Dockerfile")]
    argument = lines.index("ARG WORKER_BUILD_ID=")

    assert lines[argument + 1] == "ENV WORKER_BUILD_ID=$WORKER_BUILD_ID"
    assert argument > max(n for n, line in enumerate(lines) if line.startswith("FROM"))
    assert Settings.model_validate({}).worker_build_id is None


async def well() -> None:
    """Return at once, as a server that responds."""


async def away() -> None:
    raise ConnectionError


async def test_the_health_check_of_the_image_asks_the_process() -> None:
    command = json.loads(
        dict(instructions(DOCKER / "fleet.Dockerfile"))["HEALTHCHECK"].split("CMD", 1)[1]
    )

    async def code(check: health.Check) -> int:
        with health.serve("127.0.0.1", 0, "story", {"server": check}) as url:
            environment = {"HEALTH_PORT": url.rpartition(":")[2]}
            asked = await asyncio.create_subprocess_exec(
                sys.executable, *command[1:], env=environment, stderr=asyncio.subprocess.DEVNULL
            )
            return await asked.wait()

    assert command[0] == "python"
    assert [await code(well), await code(away)] == [0, 1]


# --- compose.yaml ---------------------------------------------------------------------------------


def test_the_compose_file_is_valid() -> None:
    validator = Draft202012Validator(json.loads(SCHEMA.read_text()))

    assert [f"{e.json_path}: {e.message}" for e in validator.iter_errors(compose())] == []
    assert list(validator.iter_errors(compose() | {"service": {}}))


def test_it_runs_every_process() -> None:
    commands = {tuple(each.get("command", ())) for each in compose()["services"].values()}

    assert {(name,) for name in PROCESSES | IF_ENCRYPTED} <= commands


def test_temporal_has_the_configuration_that_the_fleet_needs_wherever_it_runs() -> None:
    service = compose()["services"]["temporal"]
    (mounted,) = service["configs"]
    in_compose = yaml.safe_load(compose()["configs"][mounted["source"]]["content"])
    values = yaml.safe_load((ROOT / "deploy/k8s/temporal/values.yaml").read_text())

    assert service["environment"]["DYNAMIC_CONFIG_FILE_PATH"] == mounted["target"]
    for found in (in_compose, values["server"]["dynamicConfig"]):
        assert found == {name: [{"value": value}] for name, value in DYNAMIC_CONFIG.items()}


def test_nothing_is_published_beyond_this_machine() -> None:
    services = compose()["services"]
    for name, service in services.items():
        inside = service.get("network_mode")
        assert inside in ("service:network", "none") or name == "network"
        assert "ports" not in service or name == "network"
        assert not service.get("privileged")
        assert service["cap_drop"] == ["ALL"]
    ports = services["network"]["ports"]
    assert all(str(port).startswith("127.0.0.1:") for port in ports)


def test_no_password_has_a_default() -> None:
    text = (DOCKER / "compose.yaml").read_text()

    assert set(re.findall(r"\$\{(\w+(?:PASSWORD|KEYS?)):\?\}", text)) == {
        "POSTGRES_PASSWORD",
        "NEO4J_PASSWORD",
        "NATS_PASSWORD",
        "REDIS_PASSWORD",
        "GRPC_TOKEN_KEY",
        "PAYLOAD_KEYS",
    }
    assert not re.search(r"\$\{\w*(PASSWORD|KEYS?)(:?-|\})", text)


def in_container(value: str, folder: Path) -> str:
    """Return what a process gets: the default, or a value that is given; paths are in `folder`."""
    value = re.sub(r"\$\{\w+:-(.*)\}", r"\1", value)
    value = re.sub(r"\$\{.*\}", "a1" * 32, value)
    return re.sub("^(/certificate|/etc/fleet/repositories)", str(folder), value)


def test_credentials_of_repositories_are_mounted_for_their_process_alone() -> None:
    services = compose()["services"]
    mounted = {name for name, each in services.items() if "credentials" in str(each.get("volumes"))}

    assert mounted == {"workspace"}
    assert (DOCKER / "repository-credentials").is_dir()
    for file in DOCKER.glob("*.dockerignore"):
        assert file.read_text().splitlines()[-1] == "deploy/docker/repository-credentials"


def test_each_process_gets_settings_that_it_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEET_HOME", str(tmp_path))
    for file in ("tls.crt", "tls.key"):
        (tmp_path / file).touch()
    services = compose()["services"]
    ports = []
    for name in PROCESSES | IF_ENCRYPTED:
        variables = {
            key: in_container(str(value), tmp_path)
            for key, value in services[name]["environment"].items()
        }
        assert slips(list(variables)) == {}
        known = {name.upper() for name in (*Settings.model_fields, *ALIASES)}
        assert variables.keys() <= known
        settings = Settings.model_validate({k.lower(): v for k, v in variables.items()})
        ports += [settings.health_port, *([settings.codec_port] if name == "codec" else [])]
        assert bool(settings.grpc_tls_cert) == (name == "grpc")
        assert bool(settings.codec_tls_cert) == (name == "codec")
        assert settings.encryption_keys
        assert services[name]["read_only"] is True
    assert len(set(ports)) == len(ports), "they share a network"


@pytest.fixture
def production() -> Manifests:
    return rendered("production")


def test_it_runs_the_same_stores_as_the_cluster(production: Manifests) -> None:
    services = compose()["services"]
    for name in ("nats", "neo4j", "valkey"):
        (container,) = production.of_kind("StatefulSet")[name]["spec"]["template"]["spec"][
            "containers"
        ]
        assert services[name]["image"] == container["image"]


def test_the_images_of_the_stack_have_a_version() -> None:
    for name, service in compose()["services"].items():
        assert re.search(r":(\d|\$\{\w+:-\d)", service["image"]), name


def test_the_sandbox_has_one_profile() -> None:
    (named,) = [
        each.partition("=")[2]
        for each in compose()["services"]["agents"]["security_opt"]
        if each.startswith("seccomp=")
    ]

    assert json.loads((DOCKER / named).read_text())["defaultAction"] == "SCMP_ACT_ALLOW"
