"""Settings: read from the environment or the stack's file, refused with name, rule and remedy."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.settings import InvalidSettings, MockRefused, Settings, load, table

SECRETS = ("temporal_api_key", "nats_password", "neo4j_password", "redis_password", "vllm_api_key")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No setting but the test's own; FLEET_HOME is an empty folder."""
    for name in Settings.model_fields:
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
    assert f"mend or unset it in the environment or in {no_environment / 'env'}" in line


def test_every_wrong_value_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_PORT", "x")
    monkeypatch.setenv("NATS_REPLICAS", "x")

    with pytest.raises(InvalidSettings) as refused:
        load()

    names = [line.split(" ")[0] for line in str(refused.value).splitlines()]
    assert sorted(names) == ["NATS_REPLICAS", "REDIS_PORT"]


@pytest.mark.parametrize("name", ["mock", "MOCK", "Mock", " mOcK "])
def test_a_mock_agent_is_refused_in_the_designs_words(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("AGENT_TYPE", name)

    with pytest.raises(MockRefused) as refused:
        load()

    assert str(refused.value) == "Mock agents not allowed in production"


def test_a_mock_agent_ends_the_process_with_these_words_alone(no_environment: Path) -> None:
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
