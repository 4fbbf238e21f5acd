"""Where the local stack is stored, its ports, and which servers run elsewhere."""

import json
import os
from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from deploy.local.ports import free_ports
from deploy.local.server import ROOT
from deploy.local.servers import DEFAULT_MODEL
from workers.environment import ALIASES, SERVICES, Environment, InvalidSettings
from workers.setting_values import api_url
from workers.settings import Settings, only

Port = Annotated[int, Field(ge=1, le=65535)]

GRPC_PORTS = tuple(f"grpc_{name}_port" for name in SERVICES)

PORT_FIELDS = (
    "temporal_port",
    "temporal_ui_port",
    "nats_port",
    "valkey_port",
    "neo4j_port",
    "serve_port",
    "health_port",
    "temporal_metrics_port",
    "prometheus_port",
    "codec_port",
    *GRPC_PORTS,
)


class StackSettings(BaseSettings):
    """The settings of the stack, from the environment.

    If an address is set (TEMPORAL_ADDRESS, NATS_URL, NEO4J_URI, REDIS_HOST, VLLM_URL), the server
    runs elsewhere: it is used, and not started. `given_settings` has how it is connected to.
    """

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    fleet_home: Path = Field(ROOT / ".fleet", description="folder of the stack's data and logs")

    temporal_port: Port = Field(7233, description="Temporal's port on this machine")
    temporal_ui_port: Port = Field(8233, description="the Web UI's port")
    nats_port: Port = Field(4222, description="NATS's port on this machine")
    valkey_port: Port = Field(6379, description="Valkey's port on this machine")
    neo4j_port: Port = Field(7687, description="Neo4j's Bolt port on this machine")
    serve_port: Port = Field(8000, description="port of the LLM's API on this machine")
    health_port: Port = Field(8080, description="port of the workers' health endpoint")

    observe: bool = Field(False, description="whether to start Prometheus")
    temporal_metrics_port: Port = Field(9464, description="port of the Temporal SDK's metrics")
    prometheus_port: Port = Field(9090, description="Prometheus's port")
    codec_port: Port = Field(8081, description="port of the codec server")

    grpc_orchestrator_port: Port = Field(50055, description="port of the orchestrator service")
    grpc_context_port: Port = Field(50054, description="port of the context service")
    grpc_planning_port: Port = Field(50053, description="port of the planning service")
    grpc_storycoach_port: Port = Field(50052, description="port of the story coach service")
    grpc_workspace_port: Port = Field(50051, description="port of the workspace service")

    temporal_address: str | None = Field(None, description="a Temporal that runs elsewhere")
    nats_url: str | None = Field(None, description="a NATS that runs elsewhere")
    neo4j_uri: str | None = Field(None, description="a Neo4j that runs elsewhere")
    redis_host: str | None = Field(None, description="a Valkey that runs elsewhere")
    vllm_url: Annotated[str | None, BeforeValidator(api_url)] = Field(
        None, description="an LLM's API that runs elsewhere"
    )
    vllm_model: str | None = Field(None, description="the model to serve, or the one served there")
    ray_address: str | None = Field(
        None, description="a Ray cluster that runs elsewhere, which is to host the LLM"
    )

    @property
    def home(self) -> Path:
        """The stack's folder, as an absolute path."""
        return self.fleet_home.expanduser().absolute()

    @property
    def grpc_ports(self) -> dict[str, int]:
        """The services' ports, by the names of their settings."""
        return {name: getattr(self, name) for name in GRPC_PORTS}

    @property
    def model(self) -> str:
        """The model that this stack serves."""
        return self.vllm_model or DEFAULT_MODEL

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the arguments of `load`, then the environment."""
        return (init_settings, Environment(settings_cls))

    @classmethod
    def load(cls, *, home: Path | None = None, pick_free_ports: bool = False) -> Self:
        """Read the environment, with `home` instead of FLEET_HOME if it is given.

        A stack keeps the ports that it once took. With `pick_free_ports`, one that has none yet
        takes free ports, so that it can run beside another stack.
        """
        try:
            settings = cls(fleet_home=home) if home else cls()
        except ValidationError as error:
            raise InvalidStackSettings(_lines(error)) from None
        except InvalidSettings as error:
            raise InvalidStackSettings(str(error)) from None
        kept = settings.home / "ports.json"
        ports: dict[str, int] = json.loads(kept.read_text()) if kept.exists() else {}
        if pick_free_ports and not ports:
            ports = dict(zip(PORT_FIELDS, free_ports(len(PORT_FIELDS)), strict=True))
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(ports, indent=1) + "\n")
        in_environment = {
            ALIASES.get(name, name) for name in (*ports, *ALIASES) if os.environ.get(name.upper())
        }
        return settings.model_copy(
            update={name: port for name, port in ports.items() if name not in in_environment}
        )


def given_settings(*prefixes: str) -> tuple[Settings, dict[str, str]]:
    """Read the workers' settings with these prefixes from the environment alone.

    The file of an earlier start is not read, since it may describe other servers.

    Returns:
        The settings, all others with their defaults; and the variables, with absolute paths, so
        that a process in another folder finds the files.

    Raises:
        InvalidStackSettings: one line for each wrong variable.
    """
    given = {
        name: value for name, value in Environment(Settings)().items() if name.startswith(prefixes)
    }
    try:
        settings = only(given)
    except InvalidSettings as error:
        raise InvalidStackSettings(str(error)) from None
    for name, value in given.items():
        if isinstance(getattr(settings, name), Path):
            given[name] = str(Path(value).absolute())
    return settings, {name.upper(): value for name, value in given.items()}


class InvalidStackSettings(Exception):
    """One line for each wrong variable: its name, the rule, the remedy."""


def _lines(error: ValidationError) -> str:
    return "\n".join(
        f"{str(problem['loc'][0]).upper()}: {problem['msg']}; fix or unset it"
        for problem in error.errors(include_url=False, include_input=False)
    )
