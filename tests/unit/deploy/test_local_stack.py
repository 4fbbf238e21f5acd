"""The local stack without its servers: settings, parts, ports, credentials, configuration."""

import configparser
import os
import signal
import socket
import stat
import subprocess
import sys
from contextlib import ExitStack, suppress
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
from dotenv import dotenv_values

from deploy.local import ports
from deploy.local.parts import Elsewhere, parts
from deploy.local.ports import free_ports, who_takes
from deploy.local.server import ROOT, Command, Server, ServerNotReady, credential, until_ready
from deploy.local.servers import Workers, short_folder
from deploy.local.settings import InvalidStackSettings, StackSettings
from deploy.local.stack import PortsTaken, Stack, StillRunning, _as_lines
from deploy.local.supervisor import MARK, Supervisor
from tests.support import nats_keys
from tests.support.authority import Authority
from workers import health
from workers.settings import Settings, load


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("NATS_PORT", *(name.upper() for name in Settings.model_fields)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLEET_HOME", str(tmp_path / "fleet"))


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_credential_is_made_once_and_is_its_owners_only(tmp_path: Path) -> None:
    first = credential(tmp_path / "nats" / "password")

    again = credential(tmp_path / "nats" / "password")

    assert again == first
    assert len(first) >= 32
    assert permissions(tmp_path / "nats" / "password") == 0o600


def test_no_command_line_reads_a_credential_as_an_option(tmp_path: Path) -> None:
    made = [credential(tmp_path / str(number)) for number in range(200)]

    assert all(one.isalnum() for one in made)


def test_two_stacks_have_different_credentials(tmp_path: Path) -> None:
    one = parts(StackSettings.load(home=tmp_path / "one")).env
    two = parts(StackSettings.load(home=tmp_path / "two")).env

    for name in ("NATS_PASSWORD", "NEO4J_PASSWORD", "REDIS_PASSWORD"):
        assert one[name] != two[name]


@pytest.mark.parametrize(
    ("variable", "value", "part"),
    [
        ("TEMPORAL_ADDRESS", "temporal.example:7233", "temporal"),
        ("NATS_URL", "nats://nats.example:4222", "nats"),
        ("NEO4J_URI", "neo4j://graph.example:7687", "neo4j"),
        ("REDIS_HOST", "valkey.example", "valkey"),
        ("VLLM_URL", "http://llm.example:8000/v1", "ray"),
    ],
)
def test_a_server_at_a_given_address_is_used_and_not_started(
    variable: str, value: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)

    found = parts(StackSettings.load())

    elsewhere = [one.name for one in found.all if isinstance(one.server, Elsewhere)]
    assert elsewhere == [part]
    assert found.env[variable] == value


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Set the settings of a NATS elsewhere, with files that are named relative to a folder."""
    monkeypatch.chdir(tmp_path)
    Authority(Path(), "ca")
    Path("user.creds").write_text(
        nats_keys.credentials(nats_keys.new_key("U"), nats_keys.new_key("A"))
    )
    given = {
        "NATS_URL": "tls://nats.example:4222",
        "NATS_CREDS_FILE": "user.creds",
        "NATS_CA_FILE": "ca.pem",
        "NATS_REPLICAS": "3",
        "ALLOW_PLAIN_TEXT": "true",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return given


def test_clients_get_every_setting_of_a_server_elsewhere(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REDIS_TLS", "true")  # of a server that the stack starts
    home = tmp_path / "fleet"
    home.mkdir()
    (home / "env").write_text("NATS_USER=of_an_earlier_start\n")

    env = parts(StackSettings.load()).env

    files = {name: str(tmp_path / given[name]) for name in ("NATS_CREDS_FILE", "NATS_CA_FILE")}
    ours = {name: env[name] for name in env if name.startswith(("NATS_", "ALLOW_", "REDIS_TLS"))}
    assert ours == given | files

    (home / "env").write_text(_as_lines(env))
    for name in (*given, "REDIS_TLS"):
        monkeypatch.delenv(name)
    monkeypatch.chdir("/")
    read = load()
    assert read.nats_ca_file == tmp_path / "ca.pem"
    assert read.nats_creds_file == tmp_path / "user.creds"
    assert (read.nats_url, read.nats_replicas) == ("tls://nats.example:4222", 3)
    assert read.allow_plain_text


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("NATS_URL", "nats.example", "must be a URL such as nats://"),
        ("NATS_CA_FILE", "missing.pem", "does not point to a file"),
        ("NATS_REPLICAS", "2", "must be 1 or 3"),
    ],
)
def test_a_wrong_setting_of_a_server_elsewhere_is_refused_by_name(
    name: str, value: str, rule: str, given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(InvalidStackSettings, match=rf"(?s){name} .*{rule}.*; fix or unset it"):
        parts(StackSettings.load())


def test_a_password_in_an_address_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_URL", "nats://fleet:secret@nats.example:4222")

    found = parts(StackSettings.load())

    assert {part.where for part in found.servers} >= {"nats://nats.example:4222"}
    assert found.env["NATS_URL"] == "nats://fleet:secret@nats.example:4222"


def test_clients_get_given_payload_keys_and_no_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("a1" * 32)
    monkeypatch.setenv("PAYLOAD_KEYS_FILE", str(tmp_path / "keys"))

    env = parts(StackSettings.load()).env

    assert env["PAYLOAD_KEYS_FILE"] == str(tmp_path / "keys")
    assert "PAYLOAD_KEYS" not in env


def test_free_ports_are_kept_for_the_next_start(tmp_path: Path) -> None:
    first = StackSettings.load(home=tmp_path, pick_free_ports=True)

    again = StackSettings.load(home=tmp_path)

    assert again.nats_port == first.nats_port != 4222
    assert again.temporal_port == first.temporal_port != 7233


def test_a_port_in_the_environment_wins_over_a_kept_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StackSettings.load(home=tmp_path, pick_free_ports=True)
    monkeypatch.setenv("NATS_PORT", "14222")

    assert StackSettings.load(home=tmp_path).nats_port == 14222


def test_an_invalid_port_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_PORT", "70000")

    with pytest.raises(InvalidStackSettings, match=r"NATS_PORT: .*65535"):
        StackSettings.load()


def test_a_taken_port_is_reported_with_its_owner() -> None:
    listen = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); "
    listen += "print(s.getsockname()[1], flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", listen], stdout=subprocess.PIPE) as owner:
        assert owner.stdout
        port = int(owner.stdout.readline())

        taken = who_takes(port)

        owner.kill()
    assert taken is not None
    assert taken.pid == owner.pid
    assert "socket.create_server" in str(taken)


async def test_a_stack_whose_port_is_taken_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        monkeypatch.setenv("NATS_PORT", str(port))
        stack = Stack(
            StackSettings.load(), without=("temporal", "valkey", "neo4j", "ray", "workers")
        )

        with pytest.raises(PortsTaken, match=rf"nats \(clients\): port {port} .* process \d+"):
            await stack.up()

    assert not stack.supervisor.running()
    assert not stack.supervisor.conf.exists()


def test_a_free_port_has_no_owner() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]

    assert who_takes(port) is None


class Never(Server):
    name: ClassVar[str] = "never"
    ports: ClassVar[dict[str, int]] = {}

    def prepare(self) -> Command:
        raise NotImplementedError

    async def check(self) -> None:
        raise ConnectionRefusedError("nobody there")


async def test_a_server_that_is_not_ready_in_time_names_its_log(tmp_path: Path) -> None:
    with pytest.raises(ServerNotReady, match=r"never is not ready: .*nobody there.*never\.log"):
        await until_ready(Never(), deadline=timedelta(0), log=tmp_path / "never.log")


async def test_a_server_whose_process_ended_is_not_waited_for() -> None:
    with pytest.raises(ServerNotReady, match="its process ended"):
        await until_ready(Never(), deadline=timedelta(hours=1), alive=lambda: False)


class Answered(Never):
    async def check(self) -> None:
        """Succeed, as if something else answered on the same port."""


async def test_an_answer_does_not_count_if_the_process_has_ended() -> None:
    with pytest.raises(ServerNotReady, match="its process ended"):
        await until_ready(Answered(), deadline=timedelta(hours=1), alive=lambda: False)


async def test_workers_are_not_ready_when_something_else_answers_on_their_port(
    tmp_path: Path,
) -> None:
    with health.serve("127.0.0.1", 0, "context", {}) as url:
        port = httpx.URL(url).port or 0

        await Workers(tmp_path, port, "context").check()
        with pytest.raises(ConnectionError, match=f"on port {port} are those of context"):
            await Workers(tmp_path, port, "story").check()


def test_no_two_calls_return_the_same_port() -> None:
    picked = [free_ports(300), free_ports(300), free_ports(300)]

    assert len(set(chain.from_iterable(picked))) == 900


def test_no_two_processes_return_the_same_port() -> None:
    """The ports of the first process are still unused when the second takes its own."""
    pick = "from deploy.local.ports import free_ports; print(*free_ports(500), flush=True); "
    picked: list[set[int]] = []
    with ExitStack() as running:
        for _ in range(3):
            process = running.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", f"{pick} input()"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    cwd=ROOT,
                )
            )
            assert process.stdout
            picked.append({int(port) for port in process.stdout.readline().split()})
            running.callback(process.kill)

    assert [len(each) for each in picked] == [500] * 3
    assert len(set().union(*picked)) == 1_500


def test_a_process_that_finds_no_block_of_ports_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "PORTS", ports.PORTS[: ports.BLOCK])
    monkeypatch.setattr(ports, "_unused", [])
    monkeypatch.setattr(ports, "_blocks", [])
    with suppress(RuntimeError):  # another test run may hold it already
        free_ports(1)

    with pytest.raises(RuntimeError, match=r"have taken the ports from 20000 to 20049"):
        free_ports(ports.BLOCK)


def test_the_supervisors_configuration_is_private_and_marks_what_it_starts(
    tmp_path: Path,
) -> None:
    home = tmp_path / "100% fleet"
    supervisor = Supervisor(home)

    supervisor.configure(
        part for part in parts(StackSettings.load(home=home)).all if part.name in ("nats", "valkey")
    )

    conf = configparser.RawConfigParser()
    conf.read(supervisor.conf)
    assert permissions(supervisor.conf) == 0o600
    assert conf["supervisord"]["environment"].startswith(f'{MARK}="{str(home).replace("%", "%%")}"')
    assert {"program:nats", "program:valkey"} <= set(conf.sections())
    assert all(conf[f"program:{name}"]["autorestart"] == "true" for name in ("nats", "valkey"))


def test_every_part_listens_on_loopback_only(tmp_path: Path) -> None:
    found = parts(StackSettings.load(home=tmp_path))

    for part in found.servers:
        if part.ours and part.name in ("nats", "valkey"):
            part.ours.prepare()
    configuration = [
        (tmp_path / "data" / "nats" / "nats.conf").read_text(),
        (tmp_path / "data" / "valkey" / "valkey.conf").read_text(),
    ]

    assert 'listen: "127.0.0.1:4222"' in configuration[0]
    assert "bind 127.0.0.1\n" in configuration[1]
    assert "0.0.0.0" not in "".join(configuration)


def test_a_password_with_odd_characters_is_read_back_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = "a'b\"c #d\\e$f g"

    (tmp_path / "env").write_text(_as_lines({"NATS_PASSWORD": odd}))

    assert dotenv_values(tmp_path / "env", interpolate=False) == {"NATS_PASSWORD": odd}


def test_sockets_get_a_short_folder_when_the_stacks_own_is_deep(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 90)

    folder = short_folder(deep, spare=20)

    assert len(str(folder)) + 20 <= 100
    assert permissions(folder) == 0o700
    assert short_folder(deep, spare=20) == folder
    folder.rmdir()


def test_clean_removes_what_was_stored_and_keeps_what_was_installed(tmp_path: Path) -> None:
    (tmp_path / "setup").mkdir()
    (tmp_path / "data" / "nats").mkdir(parents=True)
    (tmp_path / "env").write_text("")

    Stack(StackSettings.load(home=tmp_path)).clean()

    assert [path.name for path in tmp_path.iterdir()] == ["setup"]


def test_clean_refuses_while_a_process_of_the_stack_lives(tmp_path: Path) -> None:
    with subprocess.Popen(
        ["cat"],
        env={MARK: str(tmp_path), "PATH": "/usr/bin:/bin"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()  # Before it runs, its environment cannot be read.
        stack = Stack(StackSettings.load(home=tmp_path))

        with pytest.raises(StillRunning, match="stop it first"):
            stack.clean()

        assert stack.kill() == [process.pid]
    assert process.returncode == -9


RENAMED = """
import ctypes, subprocess, sys
size = len(open("/proc/self/environ", "rb").read())
variables = ctypes.POINTER(ctypes.c_void_p).in_dll(ctypes.CDLL(None), "environ")
ctypes.memset(variables[0], 0, size)
child = subprocess.Popen(["/bin/sleep", "60"], env={sys.argv[1]: sys.argv[2]})
print(child.pid, flush=True)
child.wait()
"""
"""A session leader whose environment is overwritten, as a program does that renames itself."""


def test_processes_in_the_session_of_a_leader_that_renamed_itself_are_not_the_stacks(
    tmp_path: Path,
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", RENAMED, MARK, str(tmp_path)],
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as leader:
        assert leader.stdout
        child = int(leader.stdout.readline())
        environment = Path("/proc", str(leader.pid), "environ").read_bytes()

        strays = Supervisor(tmp_path).stray_pids()

        os.killpg(leader.pid, signal.SIGKILL)
    assert environment.strip(b"\0") == b""
    assert environment
    assert child not in strays
    assert leader.pid not in strays
