"""Every setting of the fleet's processes: environment variables, or lines of `.fleet/env`.

The environment overrides the file. `python -m workers settings` prints the tables in
docs/settings.md. `ALIASES` are the names that the predecessor uses for the same settings.
"""

import os
import re
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import (
    BeforeValidator,
    DirectoryPath,
    Field,
    FilePath,
    SecretStr,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticUndefined
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from workers.environment import (
    ALIASES,
    FOREIGN,
    OF_OTHER_PROCESSES,
    ROOT,
    Environment,
    EnvironmentFile,
    InvalidSettings,
    home,
)
from workers.setting_values import (
    NKEY_SEED,
    ORIGINS,
    ApiUrl,
    DeliberationSeconds,
    HostPort,
    HttpUrl,
    Port,
    PositiveSeconds,
    Seconds,
    StorePlace,
    read_secret,
    require_keys,
)
from workflows.models.agents import (
    LARGEST_PLAN,
    MAX_AGENTS,
    MAX_ROUNDS,
    MAX_TASKS,
    MOCK_REFUSED,
    TOKENS_PER_HOUR,
    is_mock,
)
from workflows.models.readiness import STORY_TEXT_BYTES
from workflows.rules.repository_urls import is_url

PAYLOAD_DAYS = 120

ALIKE = 0.81
"""How similar (difflib's ratio) an unknown name must be to count as a misspelled setting."""


class Settings(BaseSettings):
    """The settings of a process. Frozen; a field's name is the variable's, in lower case."""

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
    nats_creds_file: FilePath | None = Field(
        None,
        description="credentials of a user at NATS (JWT and seed, as `nsc` writes them) instead of "
        "NATS_USER; read again for each connection",
    )
    nats_nkey_seed_file: FilePath | None = Field(
        None,
        description="seed of the nkey of a user at NATS instead of NATS_USER; read again for each "
        "connection",
    )
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
    neo4j_ca_file: FilePath | None = Field(
        None, description="CA certificate that Neo4j's is checked against; else the system's"
    )
    redis_host: str = Field("127.0.0.1", min_length=1, description="host of Valkey")
    redis_port: Port = Field(6379, description="port of Valkey")
    redis_password: SecretStr | None = Field(None, description="password at Valkey")
    redis_tls: bool = Field(False, description="TLS to Valkey: true or false")
    redis_user: str | None = Field(None, description="user at Valkey, if not the default one")
    redis_ca_file: FilePath | None = Field(
        None, description="CA certificate that Valkey's is checked against; else the system's"
    )
    allow_plain_text: bool = Field(
        False,
        description="true: connections to servers on other machines may be without TLS, as in a "
        "network that encrypts by itself",
    )
    agent_type: Literal["RAY_VLLM", "VLLM", "NATS"] = Field(
        "RAY_VLLM",
        description="type of agents for which councils.yaml names none: `RAY_VLLM`, `VLLM` (any "
        "OpenAI-compatible vLLM) or `NATS` (external agents)",
    )
    external_window: Annotated[int, Field(ge=1_024)] = Field(
        8_192, description="tokens that prompt and answer may have together in external agents"
    )
    vllm_url: ApiUrl = Field(
        "http://127.0.0.1:8000/v1",
        description="the LLM's OpenAI-compatible API, with or without `/v1`",
    )
    vllm_model: str | None = Field(
        None,
        description="model of agents for which none is named; unset: the one that is served",
    )
    vllm_api_key: SecretStr | None = Field(None, description="key for the LLM's API")
    vllm_ca_file: FilePath | None = Field(
        None, description="CA certificate that the LLM's is checked against; else the system's"
    )
    ray_address: str | None = Field(
        None,
        description="Ray cluster that hosts the LLM; its host is VLLM_URL's where that is unset",
    )
    llm_concurrency: Annotated[int, Field(ge=1, le=10_000)] = Field(
        8, description="LLM calls and checks in flight in one worker: what the engine can run"
    )
    cached_workflows: Annotated[int, Field(ge=1, le=100_000)] = Field(
        500,
        description="open workflows that a process `story` keeps in memory, 0.25 MiB for "
        "each that waits; others are replayed from their history when they go on",
    )
    fleet_config: DirectoryPath = Field(
        ROOT / "deploy" / "config",
        description="folder of the process, rigor, councils, scopes, checks and prompts",
    )
    deliberation_timeout: DeliberationSeconds | None = Field(
        None,
        description="time limit of a deliberation, in seconds, where its request names none; "
        "unset: 300 by gRPC, 3,600 in a story or plan",
    )
    workspace_store: StorePlace | None = Field(
        None,
        description="where the repositories' stores are, for all processes `workspace`: a folder "
        "that they share, or the URL of a git server, below which each project has an empty "
        "repository `KEY.git`; unset: `data/store` in FLEET_HOME",
    )
    workspace_trees: Path | None = Field(
        None,
        description="folder of the working trees and prepared dependencies of the processes "
        "`workspace` on one machine: a cache; unset: `data/trees` in FLEET_HOME",
    )
    repository_credentials: DirectoryPath | None = Field(
        None,
        description="folder with the credentials of repositories.yaml, `KEY.token`, `KEY.key`, "
        "`known_hosts`, `ca.crt`, and of a git server in WORKSPACE_STORE, `STORE.token`, "
        "`STORE.key`; only the process `workspace` and the CLI read it",
    )
    workspace_disk_gib: Annotated[float, Field(gt=0)] = Field(
        10, description="GiB that the working trees may use before the oldest are removed"
    )
    workspace_keep_days: Annotated[int, Field(ge=1, le=3_650)] = Field(
        30,
        description="days that agents' commits stay in the store after the last one of a task, and "
        "as long as Temporal knows the story; the stories' branches stay",
    )
    workspace_concurrency: Annotated[int, Field(ge=1, le=1_000)] = Field(
        2, description="commands and measurements at once in one process `workspace`"
    )
    story_text_bytes: Annotated[int, Field(ge=1_024, le=1024 * 1024)] = Field(
        STORY_TEXT_BYTES,
        description="longest brief of a story, and longest acceptance criteria in total, in bytes",
    )
    plan_max_tasks: Annotated[int, Field(ge=1, le=LARGEST_PLAN)] = Field(
        MAX_TASKS,
        description="most tasks of a plan that agents derive; how many there are depends on the "
        "design, and on how long the model's answer may be",
    )
    payload_days: Annotated[int, Field(ge=8, le=3_650)] = Field(
        PAYLOAD_DAYS,
        description="days that a large payload is kept in Valkey after its last use: a week more "
        "than the namespace keeps ended histories, or longer",
    )
    payload_keys: SecretStr | None = Field(
        None,
        description="keys that payloads in Temporal and Valkey are encrypted with, each of 64 "
        "hexadecimal digits, separated by commas: the first encrypts, all decrypt; unset: not "
        "encrypted",
    )
    payload_keys_file: FilePath | None = Field(
        None, description="file with the keys, instead of PAYLOAD_KEYS; one a line"
    )
    codec_host: str = Field("127.0.0.1", description="where the codec server listens")
    codec_port: Port = Field(8081, description="port of the codec server")
    codec_tls_cert: FilePath | None = Field(
        None, description="PEM certificate chain of the codec server; unset: no TLS"
    )
    codec_tls_key: FilePath | None = Field(None, description="PEM key of that certificate")
    codec_origins: Annotated[str, StringConstraints(pattern=ORIGINS)] | None = Field(
        None,
        description="origins of the Web UIs whose pages may ask the codec server, such as "
        "`https://temporal.example`, separated by commas; unset: only pages of the same address",
    )
    context_cache_ttl: Annotated[int, Field(ge=1)] = Field(
        3600, description="seconds that a built context pack is kept in Valkey"
    )
    enable_nats: bool = Field(
        True, description="only `true`: events leave through the outbox, which publishes to NATS"
    )
    drain_seconds: Seconds = Field(
        timedelta(seconds=30),
        description="seconds that running activities get to finish after SIGTERM",
    )
    story_sweep_seconds: PositiveSeconds = Field(
        timedelta(seconds=60),
        description="seconds between two looks of the inbox for stories that ended early "
        "(terminated, timed out or failed)",
    )
    worker_build_id: str | None = Field(
        None, description="build id; set, it switches Temporal's worker versioning on"
    )
    health_host: str = Field("127.0.0.1", description="where `/health` and `/metrics` listen")
    health_port: Port | None = Field(
        None, description="port of `/health` and `/metrics`; unset: none"
    )
    temporal_metrics_port: Port | None = Field(
        None,
        description="loopback port of the Temporal SDK's own metrics, which `/metrics` includes; "
        "unset: none",
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
    grpc_token_former_key: SecretStr | None = Field(
        None,
        min_length=32,
        description="the key before GRPC_TOKEN_KEY, whose tokens stay valid while the key changes",
    )
    require_tokens: bool = Field(
        False,
        description="true: stories refuse approvals, rejections, reports, amendments and budgets "
        "that no token signs; the process `story` needs GRPC_TOKEN_KEY",
    )
    grpc_calls_per_second: float = Field(
        2000,
        gt=0,
        description="gRPC calls a second that one actor may make to a replica, on average",
    )
    grpc_tokens_per_hour: Annotated[int, Field(ge=1)] = Field(
        TOKENS_PER_HOUR,
        description="tokens that the gRPC calls of one actor (deliberations, story coach, derived "
        "tasks) may use in an hour; the processes `grpc` and `agents` read it",
    )
    grpc_max_agents: Annotated[int, Field(ge=1, le=MAX_AGENTS)] = Field(
        MAX_AGENTS, description="agents, at most, of a council that a gRPC call creates or asks"
    )
    grpc_max_rounds: Annotated[int, Field(ge=0, le=MAX_ROUNDS)] = Field(
        MAX_ROUNDS, description="rounds, at most, of a deliberation that a gRPC call starts"
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
    log_format: Literal["json", "console"] = Field(
        "json", description="`json`: an object a line; `console`: for a person at a terminal"
    )
    otel_exporter_otlp_endpoint: HttpUrl | None = Field(
        None, description="where traces go by OTLP over gRPC; unset: nowhere"
    )

    @property
    def store_folder(self) -> Path:
        """The folder of the stores, or of this machine's mirrors of a git server's."""
        if self.store_server:
            return self.trees_folder / "mirrors"
        return Path(self.workspace_store) if self.workspace_store else home() / "data" / "store"

    @property
    def store_server(self) -> str:
        """The URL of WORKSPACE_STORE; empty if it is a folder."""
        place = self.workspace_store or ""
        return place if is_url(place) else ""

    @property
    def trees_folder(self) -> Path:
        """WORKSPACE_TREES, or its place in the local stack."""
        return self.workspace_trees or home() / "data" / "trees"

    @property
    def keep_payloads_for(self) -> timedelta:
        """How long a large payload is kept in Valkey after its last use."""
        return timedelta(days=self.payload_days)

    @cached_property
    def encryption_keys(self) -> tuple[bytes, ...]:
        """The keys of payloads in Temporal, the one that encrypts first; empty: not encrypted."""
        text = self.payload_keys.get_secret_value() if self.payload_keys else ""
        if self.payload_keys_file:
            text = self.payload_keys_file.read_text()
        return tuple(bytes.fromhex(key) for key in re.split(r"[\s,]+", text.strip()) if key)

    @property
    def web_ui_origins(self) -> list[str]:
        """The origins of other addresses whose pages may ask the codec server."""
        return self.codec_origins.lower().split(",") if self.codec_origins else []

    @property
    def token_keys(self) -> list[str]:
        """The keys by which tokens are valid, that of new tokens first."""
        keys = (self.grpc_token_key, self.grpc_token_former_key)
        return [key.get_secret_value() for key in keys if key]

    @field_validator("agent_type", mode="before")
    @classmethod
    def _no_mock(cls, value: Any) -> Any:
        """Reject a mock agent, whatever the case of the value."""
        if is_mock(value):
            raise MockRefused(MOCK_REFUSED)
        return value.strip().upper() if isinstance(value, str) else value

    @field_validator("payload_keys")
    @classmethod
    def _are_keys(cls, value: SecretStr | None) -> SecretStr | None:
        require_keys(value.get_secret_value() if value else None)
        return value

    @field_validator("payload_keys_file")
    @classmethod
    def _has_keys(cls, value: Path | None, given: ValidationInfo) -> Path | None:
        if value and given.data.get("payload_keys"):
            raise ValueError("must not be set together with PAYLOAD_KEYS")
        require_keys(read_secret(value) if value else None)
        return value

    @field_validator("nats_creds_file")
    @classmethod
    def _has_credentials(cls, value: Path | None, given: ValidationInfo) -> Path | None:
        if value and given.data.get("nats_user"):
            raise ValueError("must not be set together with NATS_USER")
        seed = rf"(?s)BEGIN NATS USER JWT-+\r?\n\S+.*BEGIN USER NKEY SEED-+\r?\n{NKEY_SEED}\b"
        if value and not re.search(seed, read_secret(value)):
            raise ValueError("must be credentials with a user's JWT and seed, as `nsc` writes them")
        return value

    @field_validator("nats_nkey_seed_file")
    @classmethod
    def _has_a_seed(cls, value: Path | None, given: ValidationInfo) -> Path | None:
        if value and (given.data.get("nats_user") or given.data.get("nats_creds_file")):
            raise ValueError("must not be set together with NATS_USER or NATS_CREDS_FILE")
        if value and not re.fullmatch(rf"\s*{NKEY_SEED}\s*", read_secret(value)):
            raise ValueError("must have the seed of a user's nkey and nothing else: SU...")
        return value

    @field_validator(
        "temporal_tls_server_ca_cert_path",
        "nats_ca_file",
        "neo4j_ca_file",
        "redis_ca_file",
        "vllm_ca_file",
    )
    @classmethod
    def _has_certificates(cls, value: Path | None) -> Path | None:
        import ssl  # commands that read no certificate start without it

        try:
            if value:
                ssl.create_default_context(cafile=value)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"{value} must have a CA's certificate in PEM: {reason}") from None
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _level(cls, value: Any) -> Any:
        level = value.strip().upper() if isinstance(value, str) else value
        return "WARNING" if level == "WARN" else level

    @field_validator("log_format", mode="before")
    @classmethod
    def _format(cls, value: Any) -> Any:
        return value.strip().lower() if isinstance(value, str) else value

    @field_validator("enable_nats")
    @classmethod
    def _needs_nats(cls, value: bool) -> bool:
        if not value:
            raise ValueError("must be true: events leave through the outbox, which needs NATS")
        return value

    @model_validator(mode="before")
    @classmethod
    def _llm_on_ray(cls, given: Any) -> Any:
        """Derive `vllm_url` from a Ray cluster: the API has the port of Ray Serve there."""
        address = str(given.get("ray_address") or "").rpartition("//")[2]
        host = urlsplit(f"//{address}").hostname
        if given.get("vllm_url") or not host or host in ("auto", "local"):
            return given
        host = f"[{host}]" if ":" in host else host
        return given | {"vllm_url": f"http://{host}:8000/v1"}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the environment, then the local stack's file."""
        return (
            init_settings,
            Environment(settings_cls),
            EnvironmentFile(settings_cls, env_file=home() / "env"),
        )


class _Only(Settings):
    """Settings that are given as arguments; neither the environment nor a file is read."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the arguments."""
        return (init_settings,)


class MockRefused(Exception):
    """AGENT_TYPE asked for a mock agent.

    It is not a ValueError, so that the message is printed alone.
    """


def load() -> Settings:
    """Read the settings.

    Raises:
        InvalidSettings: one line for each wrong setting.
        MockRefused: AGENT_TYPE is `mock`, in any case.
    """
    return _valid(Settings)


def only(values: Mapping[str, Any]) -> Settings:
    """Return settings with these values and, whatever is set elsewhere, defaults for the others.

    Raises:
        InvalidSettings: one line for each wrong setting.
    """
    return _valid(lambda: _Only.model_validate(values))


def _valid(read: Callable[[], Settings]) -> Settings:
    try:
        return read()
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        raise InvalidSettings("\n".join(_line(problem) for problem in problems)) from None


def slips(names: Collection[str]) -> dict[str, str]:
    """Return unknown variables that resemble a setting, with the setting's name, in capitals."""
    known = {*Settings.model_fields, *ALIASES, *OF_OTHER_PROCESSES}
    unknown = {name.lower() for name in names} - known
    found = {}
    for name in sorted(name for name in unknown if not FOREIGN.fullmatch(name)):
        ours = {*Settings.model_fields, *ALIASES}
        alike = [each for each in sorted(ours) if each[:3] == name[:3]]
        for meant in get_close_matches(name, alike, n=1, cutoff=ALIKE):
            found[name.upper()] = meant.upper()
    return found


def variables() -> dict[str, str]:
    """Return the variables in the environment and, where it has none, in the stack's file."""
    in_file = dotenv_values(home() / "env")
    return {name: value for name, value in in_file.items() if value} | dict(os.environ)


_RULES = {
    "temporal_address": "must be host:port, such as 127.0.0.1:7233",
    "nats_url": "must be a URL such as nats://127.0.0.1:4222 or tls://nats:4222",
    "neo4j_uri": "must be a URI such as bolt://127.0.0.1:7687 or neo4j+s://graph:7687",
    "vllm_url": "must be a URL such as http://127.0.0.1:8000/v1",
    "otel_exporter_otlp_endpoint": "must be a URL such as http://127.0.0.1:4317",
    "codec_origins": "must be origins such as https://temporal.example, separated by commas",
    "grpc_token_key": "must have 32 characters or more",
    "grpc_token_former_key": "must have 32 characters or more",
}


def _line(problem: Any) -> str:
    name = str(problem["loc"][0])
    by_rule = problem["type"] in ("string_pattern_mismatch", "too_short")
    rule = _RULES.get(name) if by_rule else None
    rule_text = (
        (rule or problem["msg"]).removeprefix("Value error, ").replace("Input should", "must")
    )
    return (
        f"{name.upper()} ({Settings.model_fields[name].description}): {rule_text}; "
        f"fix or unset it in the environment or in {home() / 'env'}"
    )


def table(settings: type[BaseSettings] = Settings) -> str:
    """Return every setting as a Markdown table: variable, default, meaning."""
    rows = ["| variable | default | what it is |", "|---|---|---|"]
    for name, field in settings.model_fields.items():
        names = [name, *(alias for alias, own in ALIASES.items() if own == name)]
        variable = " or ".join(f"`{each.upper()}`" for each in names)
        rows.append(f"| {variable} | {_default(field.default)} | {field.description} |")
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
