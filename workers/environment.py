"""Where settings are read from: the environment, and the file of the local stack."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic_settings import DotEnvSettingsSource, EnvSettingsSource

ROOT = Path(__file__).resolve().parents[1]

SERVICES = ("orchestrator", "context", "planning", "storycoach", "workspace")
"""The gRPC services; the setting `grpc_{name}_port` is the port of each."""

ALIASES = {f"grpc_port_{name}": f"grpc_{name}_port" for name in SERVICES}
"""The predecessor's name of each setting, and the name here."""

OF_OTHER_PROCESSES = frozenset(
    {
        # deploy.local: the stack on one machine, and its setup
        *("fleet_home", "fleet_serve", "temporal_port", "temporal_ui_port", "nats_port"),
        *("valkey_port", "neo4j_port", "observe", "prometheus_port"),
        # workers.serve_settings: the LLM
        *("vllm_model_source", "vllm_device", "vllm_max_model_len", "vllm_max_num_seqs"),
        *("vllm_kv_cache_gib", "vllm_threads", "vllm_gpu_memory_utilization"),
        *("vllm_tensor_parallel_size", "vllm_min_replicas", "vllm_max_replicas"),
        *("serve_host", "serve_port", "ray_temp_dir"),
    }
)
"""Settings that other parts of the fleet read."""

FOREIGN = re.compile(
    # configuration of the Temporal CLI and client, OpenTelemetry, Ray and gRPC
    r"(temporal_(cli|codec|grpc_meta)|otel|ray|nats_box|nats_context|grpc_(trace|verbosity|dns))_.*"
    r"|temporal_tls_(client_(cert|key)|server_ca_cert)_data|temporal_tls_server_name|nats_box"
    # variables that Kubernetes sets for each Service
    r"|.*_service_(host|port)(_.*)?|.*_port_\d+_(tcp|udp)(_.*)?"
)
"""Variables that belong to other software, however similar their names are."""


def home() -> Path:
    """Return the folder of the local stack: FLEET_HOME, or `.fleet` beside the code."""
    return Path(os.environ.get("FLEET_HOME") or ROOT / ".fleet")


class InvalidSettings(Exception):
    """One line for each wrong setting: its name, the rule, the remedy."""


class _Renamed(EnvSettingsSource):
    """A source that returns variables under the names of their settings."""

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return own_names(super()._load_env_vars())


class Environment(_Renamed):
    """The environment, with aliases."""


class EnvironmentFile(_Renamed, DotEnvSettingsSource):
    """A file of variables, with aliases."""


def own_names(variables: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return the variables, each alias under the name of its setting.

    Raises:
        InvalidSettings: an alias and its setting differ.
    """
    renamed = {name: value for name, value in variables.items() if name not in ALIASES}
    problems = []
    for alias, name in ALIASES.items():
        if not (value := variables.get(alias)):
            continue
        if renamed.get(name) not in (None, "", value):
            problems.append(
                f"{alias.upper()} and {name.upper()} are the same setting and differ; unset one"
            )
        renamed[name] = value
    if problems:
        raise InvalidSettings("\n".join(problems))
    return renamed
