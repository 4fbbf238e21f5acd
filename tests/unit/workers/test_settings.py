"""Settings: read from the environment or the stack's file; errors name field, rule and remedy."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.local.settings import StackSettings
from workers.environment import ALIASES, OF_OTHER_PROCESSES, InvalidSettings
from workers.serve_settings import ServeSettings
from workers.settings import MockRefused, Settings, load, slips, table

SECRETS = ("temporal_api_key", "nats_password", "neo4j_password", "redis_password", "vllm_api_key")

FIRST, SECOND = "0" * 64, "0123456789abcDEF" * 4


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Remove all settings from the environment; FLEET_HOME is an empty folder."""
    for name in (*Settings.model_fields, *ALIASES):
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("FLEET_HOME", str(tmp_path))
    return tmp_path


def test_without_any_variable_everything_is_on_this_machine() -> None:
    settings = load()

    assert settings.temporal_address == "127.0.0.1:7233"
    assert settings.nats_url == "nats://127.0.0.1:4222"
    assert settings.neo4j_uri == "bolt://127.0.0.1:7687"
    assert (settings.redis_host, settings.redis_port) == ("127.0.0.1", 6379)
    assert settings.agent_type == "RAY_VLLM"
    assert settings.drain_seconds == timedelta(seconds=30)


def test_the_environment_wins_over_the_stacks_file(
    monkeypatch: pytest.MonkeyPatch, no_environment: Path
) -> None:
    (no_environment / "env").write_text("NATS_USER=file\nNEO4J_USER=file\nUNKNOWN=ignored\n")
    monkeypatch.setenv("NATS_USER", "environment")

    settings = load()

    assert (settings.nats_user, settings.neo4j_user) == ("environment", "file")


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_PORT", "")

    assert load().redis_port == 6379


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("TEMPORAL_ADDRESS", "temporal", "must be host:port"),
        ("TEMPORAL_TLS", "perhaps", "must be a valid boolean"),
        ("TEMPORAL_TLS_CLIENT_CERT_PATH", "/nowhere.pem", "does not point to a file"),
        ("NATS_URL", "localhost", "must be a URL such as nats://"),
        ("NATS_REPLICAS", "2", "must be 1 or 3"),
        ("NEO4J_URI", "http://localhost", "must be a URI such as bolt://"),
        ("REDIS_PORT", "70000", "less than or equal to 65535"),
        ("VLLM_URL", "localhost:8000", "must be a URL such as http://"),
        ("AGENT_TYPE", "GPT", "must be 'RAY_VLLM', 'VLLM' or 'NATS'"),
        ("LLM_CONCURRENCY", "0", "greater than or equal to 1"),
        ("LLM_CONCURRENCY", "many", "must be a valid integer"),
        ("FLEET_CONFIG", "/nowhere", "does not point to a directory"),
        ("DRAIN_SECONDS", "-1", "must be a number of seconds, 0 or more"),
        ("DRAIN_SECONDS", "soon", "must be a number of seconds, 0 or more"),
        ("DRAIN_SECONDS", "inf", "must be a number of seconds, 0 or more"),
        ("DELIBERATION_TIMEOUT", "0", "greater than 0"),
        ("DELIBERATION_TIMEOUT", "86401", "less than or equal to 1 day"),
        ("CONTEXT_CACHE_TTL", "0", "greater than or equal to 1"),
        ("ENABLE_NATS", "false", "must be true: events leave through the outbox, which needs NATS"),
        ("LOG_FORMAT", "xml", "must be 'json' or 'console'"),
        ("LOG_LEVEL", "LOUD", "must be 'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector", "must be a URL such as http://"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_the_rule_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch, no_environment: Path, name: str, value: str, rule: str
) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(InvalidSettings) as refused:
        load()

    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"{name} (")
    assert rule in line
    assert f"fix or unset it in the environment or in {no_environment / 'env'}" in line


SEED = "SU" + "A2" * 28
CREDENTIALS = f"""-----BEGIN NATS USER JWT-----
ey.ey.ey
------END NATS USER JWT------
-----BEGIN USER NKEY SEED-----
{SEED}
------END USER NKEY SEED------
"""


@pytest.mark.parametrize(
    ("name", "text", "others", "rule"),
    [
        ("NATS_CREDS_FILE", SEED, {}, "credentials with a user's JWT and seed"),
        ("NATS_CREDS_FILE", CREDENTIALS.replace(SEED, ""), {}, "a user's JWT and seed"),
        ("NATS_CREDS_FILE", CREDENTIALS, {"NATS_USER": "fleet"}, "together with NATS_USER"),
        ("NATS_NKEY_SEED_FILE", CREDENTIALS, {}, "the seed of a user's nkey and nothing else"),
        ("NATS_NKEY_SEED_FILE", SEED.replace("SU", "SA"), {}, "the seed of a user's nkey"),
        ("NATS_NKEY_SEED_FILE", SEED, {"NATS_USER": "fleet"}, "together with NATS_USER"),
        ("TEMPORAL_TLS_SERVER_CA_CERT_PATH", "", {}, "must have a CA's certificate in PEM"),
        ("NATS_CA_FILE", "", {}, "must have a CA's certificate in PEM"),
        ("NEO4J_CA_FILE", "", {}, "must have a CA's certificate in PEM"),
        ("REDIS_CA_FILE", "", {}, "must have a CA's certificate in PEM"),
        ("VLLM_CA_FILE", "", {}, "must have a CA's certificate in PEM"),
    ],
)
def test_a_file_with_the_wrong_content_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    text: str,
    others: dict[str, str],
    rule: str,
) -> None:
    (tmp_path / "file").write_text(text)
    for variable, value in {name: str(tmp_path / "file"), **others}.items():
        monkeypatch.setenv(variable, value)

    with pytest.raises(InvalidSettings) as refused:
        load()

    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"{name} (")
    assert rule in line


@pytest.mark.parametrize(
    ("name", "text"), [("NATS_CREDS_FILE", CREDENTIALS), ("NATS_NKEY_SEED_FILE", f"{SEED}\n")]
)
def test_a_file_that_cannot_be_read_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, text: str
) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    monkeypatch.setenv(name, str(file))
    assert getattr(load(), name.lower()) == file

    def refuse(path: Path, **_: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)  # root may read every file
    with pytest.raises(InvalidSettings, match=f"{name} .*file cannot be read: Permission denied"):
        load()


@pytest.mark.parametrize(
    ("variable", "value", "setting", "meant"),
    [
        ("AGENT_TYPE", "vllm", "agent_type", "VLLM"),
        ("AGENT_TYPE", "ray_vllm", "agent_type", "RAY_VLLM"),
        ("VLLM_URL", "http://gpu:8000", "vllm_url", "http://gpu:8000/v1"),
        ("VLLM_URL", "http://gpu:8000/v1/", "vllm_url", "http://gpu:8000/v1"),
        ("VLLM_URL", "http://gpu:8000/agents/", "vllm_url", "http://gpu:8000/agents/v1"),
        ("VLLM_URL", "https://gpu/v1beta/openai", "vllm_url", "https://gpu/v1beta/openai"),
        ("RAY_ADDRESS", "ray://head:10001", "vllm_url", "http://head:8000/v1"),
        ("RAY_ADDRESS", "auto", "vllm_url", "http://127.0.0.1:8000/v1"),
        ("GRPC_PORT_ORCHESTRATOR", "6055", "grpc_orchestrator_port", 6055),
        ("GRPC_PORT_CONTEXT", "6054", "grpc_context_port", 6054),
        ("GRPC_PORT_PLANNING", "6053", "grpc_planning_port", 6053),
        ("GRPC_PORT_STORYCOACH", "6052", "grpc_storycoach_port", 6052),
        ("GRPC_PORT_WORKSPACE", "6051", "grpc_workspace_port", 6051),
        ("DELIBERATION_TIMEOUT", "45", "deliberation_timeout", timedelta(seconds=45)),
        ("CONTEXT_CACHE_TTL", "60", "context_cache_ttl", 60),
        ("LOG_LEVEL", "warn", "log_level", "WARNING"),
        ("LOG_FORMAT", "CONSOLE", "log_format", "console"),
        ("ENABLE_NATS", "true", "enable_nats", True),
    ],
)
def test_the_predecessors_settings_are_accepted(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, setting: str, meant: object
) -> None:
    monkeypatch.setenv(variable, value)

    assert getattr(load(), setting) == meant


def test_an_alias_in_the_environment_wins_over_the_stacks_file(
    monkeypatch: pytest.MonkeyPatch, no_environment: Path
) -> None:
    (no_environment / "env").write_text("GRPC_CONTEXT_PORT=50054\nVLLM_URL=http://file:1/v1\n")
    monkeypatch.setenv("GRPC_PORT_CONTEXT", "6054")
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")

    settings = load()

    assert (settings.grpc_context_port, settings.vllm_url) == (6054, "http://file:1/v1")
    assert StackSettings.load(home=no_environment).grpc_context_port == 6054


def test_an_alias_and_its_setting_may_not_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPC_PORT_CONTEXT", "6054")
    monkeypatch.setenv("GRPC_CONTEXT_PORT", "6054")
    assert load().grpc_context_port == 6054

    monkeypatch.setenv("GRPC_CONTEXT_PORT", "7054")
    with pytest.raises(InvalidSettings) as refused:
        load()

    expected = "GRPC_PORT_CONTEXT and GRPC_CONTEXT_PORT are the same setting and differ; unset one"
    assert str(refused.value) == expected


def test_a_misspelled_setting_is_reported_with_the_right_name() -> None:
    wrong = {
        "VLLM_URI": "VLLM_URL",
        "NEO4J_PASWORD": "NEO4J_PASSWORD",
        "NEO4J_USERNAME": "NEO4J_USER",
        "NATS_PASS": "NATS_PASSWORD",
        "LOGLEVEL": "LOG_LEVEL",
        "GRPC_PORTS_CONTEXT": "GRPC_PORT_CONTEXT",
        "DELIBERATION_TIMEOUT_SECONDS": "DELIBERATION_TIMEOUT",
    }
    right = [
        *(name.upper() for name in (*Settings.model_fields, *ALIASES, *OF_OTHER_PROCESSES)),
        *("PATH", "HOME", "LOG_DIR", "NATS_BOX", "NEO4J_HOME", "NEO4J_AUTH", "TEMPORAL_HOST"),
        *("TEMPORAL_CLI_ADDRESS", "TEMPORAL_TLS_CLIENT_CERT_DATA", "REDIS_SERVICE_HOST"),
        *("REDIS_PORT_6379_TCP", "OTEL_EXPORTER_OTLP_PROTOCOL", "RAY_ADDRESS", "VLLM_USE_V1"),
    ]

    assert slips([*wrong, *right]) == wrong


def test_the_settings_of_other_parts_are_known() -> None:
    others = {*ServeSettings.model_fields, *StackSettings.model_fields}

    assert others - set(Settings.model_fields) <= OF_OTHER_PROCESSES


def test_every_wrong_value_has_a_separate_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_PORT", "x")
    monkeypatch.setenv("NATS_REPLICAS", "x")

    with pytest.raises(InvalidSettings) as refused:
        load()

    names = [line.split(" ")[0] for line in str(refused.value).splitlines()]
    assert sorted(names) == ["NATS_REPLICAS", "REDIS_PORT"]


@pytest.mark.parametrize("name", ["mock", "MOCK", "Mock", " mOcK "])
def test_a_mock_agent_is_refused_with_the_specified_message(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("AGENT_TYPE", name)

    with pytest.raises(MockRefused) as refused:
        load()

    assert str(refused.value) == "Mock agents not allowed in production"


def test_a_mock_agent_ends_the_process_with_one_message(no_environment: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "workers", "all"],
        env={**os.environ, "AGENT_TYPE": "mock"},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert ended.returncode == 1
    assert ended.stderr == "Mock agents not allowed in production\n"
    assert ended.stdout == ""


@given(seconds=st.floats(0, 1e9))
def test_a_number_of_seconds_is_a_duration(seconds: float) -> None:
    settings = Settings.model_validate({"drain_seconds": str(seconds)})

    assert settings.drain_seconds == timedelta(seconds=seconds)


def test_secrets_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name.upper(), "hunter2")
    monkeypatch.setenv("REDIS_PORT", "6379")

    settings = load()

    assert settings.nats_password is not None
    assert settings.nats_password.get_secret_value() == "hunter2"
    assert "hunter2" not in f"{settings!r} {settings} {settings.model_dump_json()}"


def test_a_refusal_never_shows_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_URL", "https://fleet:hunter2@nats")

    with pytest.raises(InvalidSettings) as refused:
        load()

    assert "hunter2" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_the_table_names_every_setting() -> None:
    rows = table().splitlines()[2:]

    assert [row.split("`")[1] for row in rows] == [name.upper() for name in Settings.model_fields]
    assert all(row.rstrip(" |").rpartition("| ")[2] for row in rows)


@pytest.mark.parametrize("between", [",", " , ", "\n", "\r\n\r\n"])
def test_payload_keys_are_read_from_a_variable_or_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, between: str
) -> None:
    keys = (bytes.fromhex(FIRST), bytes.fromhex(SECOND))
    (tmp_path / "keys").write_text(f"{FIRST}{between}{SECOND}\n")
    assert load().encryption_keys == ()

    monkeypatch.setenv("PAYLOAD_KEYS_FILE", str(tmp_path / "keys"))
    assert load().encryption_keys == keys

    monkeypatch.delenv("PAYLOAD_KEYS_FILE")
    monkeypatch.setenv("PAYLOAD_KEYS", f"{FIRST}{between}{SECOND}")
    assert load().encryption_keys == keys


@pytest.mark.parametrize("wrong", ["0" * 63, "0" * 128, "g" * 64, f"{FIRST};{SECOND}", "secret"])
def test_a_wrong_payload_key_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str
) -> None:
    (tmp_path / "keys").write_text(wrong)
    for name, value in (("PAYLOAD_KEYS", wrong), ("PAYLOAD_KEYS_FILE", str(tmp_path / "keys"))):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(InvalidSettings, match=rf"{name} .*64 hexadecimal digits") as error:
                load()
            assert wrong not in str(error.value)


def test_payload_keys_come_from_one_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(FIRST)
    monkeypatch.setenv("PAYLOAD_KEYS", SECOND)
    monkeypatch.setenv("PAYLOAD_KEYS_FILE", str(tmp_path / "keys"))

    with pytest.raises(InvalidSettings, match=r"PAYLOAD_KEYS_FILE.*together with PAYLOAD_KEYS"):
        load()
