"""Every setting of the fleet's processes: environment variables, or lines of `.fleet/env`.

The environment wins over the file. The README's table is made from this page by
`python -m workers settings`.
"""

import os
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    DirectoryPath,
    Field,
    FilePath,
    SecretStr,
    StringConstraints,
    ValidationError,
    field_validator,
)
from pydantic_core import PydanticUndefined
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

ROOT = Path(__file__).resolve().parents[1]

SERVICES = ("orchestrator", "context", "planning", "storycoach", "workspace")
"""The gRPC services; each has the port of its setting `grpc_{name}_port`."""

MOCK_REFUSED = "Mock agents not allowed in production"
"""The words that a request for a mock agent gets everywhere (design section 3)."""


def _seconds(value: Any) -> timedelta:
    try:
        duration = value if isinstance(value, timedelta) else timedelta(seconds=float(value))
    except (ValueError, OverflowError):
        duration = timedelta(-1)
    if duration < timedelta():
        raise ValueError("must be a number of seconds, 0 or more")
    return duration


Seconds = Annotated[timedelta, BeforeValidator(_seconds)]
"""A duration, written as a number of seconds."""

Port = Annotated[int, Field(ge=1, le=65535)]
HostPort = Annotated[
    str, StringConstraints(pattern=r"^[^\s:/]+:\d{1,5}$|^\[[0-9a-fA-F:]+\]:\d{1,5}$")
]
HttpUrl = Annotated[str, StringConstraints(pattern=r"^https?://\S+$")]


def home() -> Path:
    """The folder of the local stack: FLEET_HOME, or `.fleet` beside the code."""
    return Path(os.environ.get("FLEET_HOME") or ROOT / ".fleet")


class InvalidSettings(Exception):
    """One line for each wrong setting: its name, the rule, the remedy."""


class Settings(BaseSettings):
    """What a process is told. Frozen; a field's name is the variable's, in lower case."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_ignore_empty=True, hide_input_in_errors=True
    )

    temporal_address: HostPort = Field(
        "127.0.0.1:7233", description="Temporal's frontend, `host:port`"
    )
    temporal_namespace: str = Field("default", min_length=1, description="Temporal namespace")
    temporal_api_key: SecretStr | None = Field(
        None, description="API key for Temporal; it switches TLS on"
    )
    temporal_tls: bool = Field(False, description="TLS to Temporal: true or false")
    temporal_tls_server_ca_cert_path: FilePath | None = Field(
        None, description="CA certificate that Temporal's is checked against; else the system's"
    )
    temporal_tls_client_cert_path: FilePath | None = Field(
        None, description="client certificate for mutual TLS to Temporal"
    )
    temporal_tls_client_key_path: FilePath | None = Field(
        None, description="key of the client certificate"
    )
    nats_url: Annotated[str, StringConstraints(pattern=r"^(nats|tls|ws|wss)://\S+$")] = Field(
        "nats://127.0.0.1:4222", description="NATS; `tls://` for TLS"
    )
    nats_user: str | None = Field(None, description="user at NATS")
    nats_password: SecretStr | None = Field(None, description="its password")
    nats_ca_file: FilePath | None = Field(
        None, description="CA certificate that NATS's is checked against; else the system's"
    )
    nats_replicas: Annotated[Literal[1, 3], BeforeValidator(int)] = Field(
        1, description="copies of each stream: 1 on one server, 3 in a cluster"
    )
    neo4j_uri: Annotated[str, StringConstraints(pattern=r"^(bolt|neo4j)(\+s|\+ssc)?://\S+$")] = (
        Field("bolt://127.0.0.1:7687", description="Neo4j; `bolt+s://` or `neo4j+s://` for TLS")
    )
    neo4j_user: str = Field("neo4j", description="user at Neo4j")
    neo4j_password: SecretStr | None = Field(None, description="its password")
    redis_host: str = Field("127.0.0.1", min_length=1, description="host of Valkey")
    redis_port: Port = Field(6379, description="port of Valkey")
    redis_password: SecretStr | None = Field(None, description="password at Valkey")
    redis_tls: bool = Field(False, description="TLS to Valkey: true or false")
    agent_type: Literal["RAY_VLLM", "VLLM", "NATS"] = Field(
        "RAY_VLLM",
        description="type of the agents that councils.yaml gives none: `RAY_VLLM`, `VLLM` (any "
        "OpenAI-compatible vLLM) or `NATS` (external agents)",
    )
    external_window: Annotated[int, Field(ge=1_024)] = Field(
        8_192, description="tokens that prompt and answer may have together in external agents"
    )
    vllm_url: HttpUrl = Field(
        "http://127.0.0.1:8000/v1", description="the LLM's OpenAI-compatible API, with `/v1`"
    )
    vllm_model: str | None = Field(
        None, description="model of agents that name none; else the one that is served"
    )
    vllm_api_key: SecretStr | None = Field(None, description="key for the LLM's API")
    llm_concurrency: Annotated[int, Field(ge=1, le=10_000)] = Field(
        8, description="LLM calls and checks in flight in one worker: what the engine can run"
    )
    fleet_config: DirectoryPath = Field(
        ROOT / "deploy" / "config",
        description="folder of the process, rigor, councils, scopes, checks and prompts",
    )
    drain_seconds: Seconds = Field(
        timedelta(seconds=30),
        description="seconds that running activities get to finish after SIGTERM",
    )
    worker_build_id: str | None = Field(
        None, description="build id; set, it switches Temporal's worker versioning on"
    )
    health_host: str = Field("127.0.0.1", description="where `/health` and `/metrics` listen")
    health_port: Port | None = Field(
        None, description="port of `/health` and `/metrics`; unset: none"
    )
    temporal_metrics_port: Port | None = Field(
        None, description="loopback port of the Temporal SDK's own metrics; unset: none"
    )
    grpc_host: str = Field("127.0.0.1", description="where the gRPC services listen")
    grpc_orchestrator_port: Port = Field(50055, description="port of orchestrator.v1")
    grpc_context_port: Port = Field(50054, description="port of fleet.context.v1")
    grpc_planning_port: Port = Field(50053, description="port of fleet.planning.v1")
    grpc_storycoach_port: Port = Field(50052, description="port of fleet.storycoach.v1")
    grpc_workspace_port: Port = Field(50051, description="port of fleet.workspace.v1")
    grpc_token_key: SecretStr | None = Field(
        None,
        min_length=32,
        description="key that gRPC's tokens are signed with, 32 characters or more",
    )
    grpc_calls_per_second: float = Field(
        2000, gt=0, description="gRPC calls a second that one actor may make in the long run"
    )
    grpc_tls_cert: FilePath | None = Field(
        None, description="PEM certificate chain of the gRPC services; unset: no TLS"
    )
    grpc_tls_key: FilePath | None = Field(None, description="PEM key of that certificate")
    fleet_token: SecretStr | None = Field(
        None, description="token that `fleet` acts by, as one of `fleet token create`"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="least level that is logged"
    )
    otel_exporter_otlp_endpoint: HttpUrl | None = Field(
        None, description="where traces go by OTLP over gRPC; unset: nowhere"
    )

    @field_validator("agent_type", mode="before")
    @classmethod
    def _no_mock(cls, value: Any) -> Any:
        """Design section 3: there is no mock agent."""
        if str(value).strip().upper() == "MOCK":
            raise MockRefused(MOCK_REFUSED)
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment, then the local stack's file."""
        return (
            init_settings,
            EnvSettingsSource(settings_cls),
            DotEnvSettingsSource(settings_cls, env_file=home() / "env"),
        )


class MockRefused(Exception):
    """AGENT_TYPE asked for a mock agent. Not a ValueError: these words stand alone."""


def load() -> Settings:
    """Read the settings.

    Raises:
        InvalidSettings: one line for each wrong one.
        MockRefused: AGENT_TYPE is `mock`, in any case.
    """
    try:
        return Settings()
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        raise InvalidSettings("\n".join(_line(problem) for problem in problems)) from None


_RULES = {
    "temporal_address": "must be host:port, such as 127.0.0.1:7233",
    "nats_url": "must be a URL such as nats://127.0.0.1:4222 or tls://nats:4222",
    "neo4j_uri": "must be a URI such as bolt://127.0.0.1:7687 or neo4j+s://graph:7687",
    "vllm_url": "must be a URL such as http://127.0.0.1:8000/v1",
    "otel_exporter_otlp_endpoint": "must be a URL such as http://127.0.0.1:4317",
    "grpc_token_key": "must have 32 characters or more",
}


def _line(problem: Any) -> str:
    name = str(problem["loc"][0])
    by_rule = problem["type"] in ("string_pattern_mismatch", "too_short")
    rule = _RULES.get(name) if by_rule else None
    said = (rule or problem["msg"]).removeprefix("Value error, ").replace("Input should", "must")
    return (
        f"{name.upper()} ({Settings.model_fields[name].description}): {said}; "
        f"mend or unset it in the environment or in {home() / 'env'}"
    )


def table() -> str:
    """Every setting as a Markdown table: variable, default, meaning."""
    rows = ["| variable | default | what it is |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        rows.append(f"| `{name.upper()}` | {_default(field.default)} | {field.description} |")
    return "\n".join(rows)


def _default(value: Any) -> str:
    if value is None or value is PydanticUndefined:
        return ""
    if isinstance(value, timedelta):
        return f"`{value.total_seconds():g}`"
    if isinstance(value, Path):
        return f"`{value.relative_to(ROOT)}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"
