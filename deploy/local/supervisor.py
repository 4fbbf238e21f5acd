"""The process supervisor of the stack: supervisord, controlled by its configuration and XML-RPC."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import psutil
from supervisor.xmlrpc import SupervisorTransport

from deploy.local.parts import Part
from deploy.local.server import ROOT, Server, write_private
from deploy.local.servers import leave_short_folder, short_folder

MARK = "FLEET_STACK"
"""The variable with the stack's home in the environment of its processes, to find them again."""

STARTS_WITHIN = timedelta(seconds=20)
NOT_RUNNING, ALREADY_STARTED = 70, 60  # supervisord's fault codes


class SupervisorFailed(RuntimeError):
    """The supervisor itself did not start or answer."""


@dataclass(frozen=True)
class ProcessState:
    """The supervisor's view of one part."""

    state: str
    pid: int
    up: timedelta


class Supervisor:
    """The supervisord of the stack in `home`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folder = home / "supervisor"
        self.logs = home / "logs"
        self.conf = self.folder / "supervisord.conf"
        self._pid_file = self.folder / "supervisord.pid"

    @property
    def _socket(self) -> Path:
        return short_folder(self.folder, spare=20) / "supervisor.sock"

    def leave_no_scratch(self) -> None:
        """Remove the folder of the socket, if the path of the stack's own was too long."""
        leave_short_folder(self.folder, self._socket.parent)

    def log(self, name: str) -> Path:
        """Return the path of the log of one part."""
        return self.logs / f"{name}.log"

    def running(self) -> bool:
        """Return whether the supervisor answers."""
        try:
            self._rpc.getPID()
        except (OSError, xmlrpc.client.Error):
            return False
        return True

    @property
    def _rpc(self) -> Any:
        transport = SupervisorTransport(None, None, f"unix://{self._socket}")
        # The address is a placeholder: the transport connects to the socket.
        return xmlrpc.client.ServerProxy("http://localhost", transport).supervisor

    def configure(self, parts: Iterable[Part]) -> None:
        """Write the configuration of the parts that are started here, with their servers' files."""
        self.logs.mkdir(parents=True, exist_ok=True)
        sections = [
            f"""\
[unix_http_server]
file={_quoted(self._socket)}
chmod=0600

[supervisord]
logfile={_quoted(self.log("supervisord"))}
logfile_maxbytes=10MB
logfile_backups=2
pidfile={_quoted(self._pid_file)}
directory={_quoted(ROOT)}
umask=077
environment={MARK}={_value(str(self.home))},FLEET_HOME={_value(str(self.home))}

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
"""
        ]
        sections += [self._section(part, part.ours) for part in parts if part.ours]
        write_private(self.conf, "\n".join(sections))

    def _section(self, part: Part, server: Server) -> str:
        command = server.prepare()
        env = {"PYTHONUNBUFFERED": "1", **command.env}
        return f"""\
[program:{part.name}]
command={_quoted(shlex.join(command.argv))}
environment={",".join(f"{name}={_value(value)}" for name, value in env.items())}
autostart=false
autorestart=true
startsecs=1
startretries=1000000
stopsignal=TERM
stopwaitsecs={part.stops_within.total_seconds():.0f}
stopasgroup=false
killasgroup=true
redirect_stderr=true
stdout_logfile={_quoted(self.log(part.name))}
stdout_logfile_maxbytes=20MB
stdout_logfile_backups=3
"""

    def ensure_running(self) -> None:
        """Start the supervisor if it does not run, and make it read the configuration."""
        if self.running():
            self._reload()
            return
        started = subprocess.run(
            [sys.executable, "-m", "supervisor.supervisord", "-c", str(self.conf)],
            env={**os.environ, MARK: str(self.home), "FLEET_HOME": str(self.home)},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        deadline = time.monotonic() + STARTS_WITHIN.total_seconds()
        while not self.running():
            if started.returncode != 0 or time.monotonic() > deadline:
                lines = (started.stderr or started.stdout).strip().splitlines()[-1:]
                raise SupervisorFailed(
                    f"the supervisor did not start: {' '.join(lines) or 'no answer'};"
                    f" its log is {self.log('supervisord')}"
                )
            time.sleep(0.05)

    def _reload(self) -> None:
        added, changed, removed = self._rpc.reloadConfig()[0]
        for name in [*changed, *removed]:
            self.stop(name)
            self._rpc.removeProcessGroup(name)
        for name in [*changed, *added]:
            self._rpc.addProcessGroup(name)

    def start(self, name: str) -> None:
        """Start one part; do nothing if it runs."""
        with _forgiven(ALREADY_STARTED):
            self._rpc.startProcess(name, False)

    def stop(self, name: str) -> None:
        """Stop one part and wait for its end; do nothing if it does not run."""
        with _forgiven(NOT_RUNNING):
            self._rpc.stopProcess(name, True)

    def states(self) -> dict[str, ProcessState]:
        """Return the state of every known part; none if the supervisor does not run."""
        try:
            infos: list[dict[str, Any]] = self._rpc.getAllProcessInfo()
        except (OSError, xmlrpc.client.Error):
            return {}
        return {
            info["name"]: ProcessState(
                info["statename"],
                info["pid"],
                timedelta(seconds=max(0, info["now"] - info["start"]) if info["pid"] else 0),
            )
            for info in infos
        }

    def shut_down(self) -> None:
        """End the supervisor, and everything that it still runs."""
        if not self.running():
            return
        self._rpc.shutdown()
        deadline = time.monotonic() + 120
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.1)

    def stray_pids(self) -> set[int]:
        """Return every process of this stack, whether the supervisor still knows it or not."""
        seen = _Processes.seen(self.home)
        return seen.of(seen.sessions_of_the_stack())

    def end_strays(self) -> list[int]:
        """Send SIGKILL to every process of this stack; return their ids."""
        ended: set[int] = set()
        sessions: set[int] = set()
        for _ in range(100):  # one may start another during the search
            seen = _Processes.seen(self.home)
            # What was found by its session is still found when all processes with the mark have
            # ended.
            sessions |= seen.sessions_of_the_stack()
            strays = seen.of(sessions)
            if not strays:
                break
            for pid in sorted(strays):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
                    ended.add(pid)
            time.sleep(0.1)
        return sorted(ended)


@dataclass(frozen=True)
class _Processes:
    """The processes of the machine at one moment: their sessions, and which have the mark.

    lives: those that have an environment; a process that is about to end has none. A process that
    renames itself, as Ray's workers do, may have overwritten its mark. The supervisor creates its
    own session, and everything that it starts stays in that session.
    """

    session: Mapping[int, int]
    marked: frozenset[int]
    lives: frozenset[int]

    @classmethod
    def seen(cls, home: Path) -> Self:
        mark = f"{MARK}={home}".encode()
        session: dict[int, int] = {}
        marked: set[int] = set()
        lives: set[int] = set()
        for process in psutil.process_iter():
            pid = process.pid
            with contextlib.suppress(OSError, psutil.Error):
                if process.status() == psutil.STATUS_ZOMBIE or pid == os.getpid():
                    continue
                session[pid] = os.getsid(pid)
                # psutil's `environ` is empty for a process that has renamed itself.
                if environ := Path("/proc", str(pid), "environ").read_bytes():
                    lives.add(pid)
                if mark in environ.split(b"\0"):
                    marked.add(pid)
        return cls(session, frozenset(marked), frozenset(lives))

    def sessions_of_the_stack(self) -> set[int]:
        """Return sessions whose leader has the mark or has ended: a user's shell does neither."""
        return {
            self.session[pid]
            for pid in self.marked
            if self.session[pid] in self.marked or self.session[pid] not in self.lives
        }

    def of(self, sessions: set[int]) -> set[int]:
        """Return the processes in `sessions`."""
        return {pid for pid, session in self.session.items() if session in sessions}


@contextlib.contextmanager
def _forgiven(code: int) -> Iterator[None]:
    try:
        yield
    except xmlrpc.client.Fault as fault:
        if fault.faultCode != code:
            raise


def _quoted(text: object) -> str:
    """Escape text for a supervisord setting, which would expand a percent sign."""
    return str(text).replace("%", "%%")


def _value(text: str) -> str:
    """Return a value for a supervisord `environment`."""
    if '"' in text or "\n" in text:
        raise ValueError(f"supervisord cannot pass on {text!r}: it has a quote or a line break")
    return f'"{_quoted(text)}"'
