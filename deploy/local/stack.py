"""The whole fleet on one machine: started in order, probed, stopped in the reverse order.

For the command line (`python -m deploy.local`) and for tests that need a complete stack:

```python
stack = Stack(StackSettings.load(pick_free_ports=True))
await stack.up()
...
await stack.down()
```
"""

import asyncio
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

from dotenv import dotenv_values

from deploy.local.parts import Part, Parts, parts
from deploy.local.ports import TakenPort, who_takes
from deploy.local.server import ServerNotReady, until_ready, why_not_ready, write_private
from deploy.local.servers import RayServe, Temporal, leave_short_folder
from deploy.local.settings import StackSettings
from deploy.local.supervisor import ProcessState, Supervisor
from workers.clients.connection import ANSWER_WITHIN_S

GOING = ("STARTING", "RUNNING")
PROBE_WITHIN = timedelta(seconds=ANSWER_WITHIN_S + 2)
"""Longer than the workers' clients wait, whose errors name a setting."""
PORTS_FREE_WITHIN = timedelta(seconds=10)
MADE_AT_EACH_START = {"FLEET_TOKEN", "TEMPORAL_CODEC_AUTH"}
"""The lines of the `env` file with the developer's token."""

Stage = Literal["starting", "ready", "failed", "stopping", "stopped"]
ReportStage = Callable[[Part, Stage, float], None]
"""Called at each stage of a part, with the part, the stage, and the seconds that it took."""


class PortsTaken(RuntimeError):
    """Ports that the stack needs are in use."""


class OtherSettings(RuntimeError):
    """The stack runs with other settings than those it is to be started with."""


class StillRunning(RuntimeError):
    """The operation requires that the stack is down."""


@dataclass(frozen=True)
class PartStatus:
    """One line of `status`."""

    name: str
    state: str
    healthy: bool
    why: str
    pid: int | None
    up: timedelta
    where: str
    log: Path | None


def _silent(_part: Part, _stage: Stage, _seconds: float) -> None: ...


class Stack:
    """One stack; `settings` define where it is stored and which parts run elsewhere."""

    def __init__(self, settings: StackSettings, *, without: Iterable[str] = ()) -> None:
        self.settings = settings
        self.home = settings.home
        self.supervisor = Supervisor(self.home)
        self._without = frozenset(without)
        if "temporal" in self._without:
            self._without |= {"ui"}
        self._parts: Parts | None = None

    @property
    def parts(self) -> Parts:
        """The parts of the stack; the first access creates the credentials."""
        if self._parts is None:
            self._parts = parts(self.settings)
        return self._parts

    @property
    def env_file(self) -> Path:
        """The connection settings, for workers, the `fleet` CLI and people."""
        return self.home / "env"

    @property
    def wanted(self) -> tuple[Part, ...]:
        """The parts that are to run, in the order of their start."""
        return tuple(part for part in self.parts.all if part.name not in self._without)

    async def up(self, report: ReportStage = _silent) -> bool:
        """Start what does not run, and wait until all is ready.

        Returns:
            False if everything was ready already.

        Raises:
            OtherSettings: the parts that run would ignore settings that have changed.
            PortsTaken: before anything is started.
            ServerNotReady: a part does not become ready; the others are left running, so that a
                second try is quick.
        """
        states = self.supervisor.states()
        going = {name for name, process in states.items() if process.state in GOING}
        all_run = all(part.name in going for part in self.wanted if part.ours)
        if all_run or self.parts.workers.name in going:
            self._require_same_settings()
        if all_run and all(part.healthy for part in await self.status()):
            return False
        if not self.supervisor.running():
            await asyncio.to_thread(self.supervisor.end_strays)  # left by an earlier run
        await self._require_free_ports(going)
        write_private(self.env_file, _as_lines(self.parts.env))
        self.supervisor.configure(self.wanted)
        self.supervisor.ensure_running()
        await asyncio.gather(*(self._bring_up(part, report) for part in self._wanted_servers()))
        for part in self.wanted:
            if part is self.parts.workers:
                await self._bring_up(part, report)
        return True

    def _wanted_servers(self) -> list[Part]:
        return [part for part in self.wanted if part is not self.parts.workers]

    def _require_same_settings(self) -> None:
        """Raise OtherSettings if a start would write other settings to the `env` file."""
        if not self.env_file.exists():
            return
        written = dotenv_values(self.env_file, interpolate=False)
        wanted = self.parts.env
        different = {
            name for name in written.keys() | wanted.keys() if written.get(name) != wanted.get(name)
        }
        if different := different - MADE_AT_EACH_START:
            raise OtherSettings(
                f"the stack runs with other settings: {', '.join(sorted(different))} would differ "
                f"from {self.env_file}; stop it first (make stop), or give the settings that it "
                "was started with"
            )

    async def _require_free_ports(self, going: set[str]) -> None:
        """Raise PortsTaken, unless the ports become free in time.

        A killed process releases its ports with a delay.
        """
        until = time.monotonic() + PORTS_FREE_WITHIN.total_seconds()
        while taken := self._taken_ports(going):
            if time.monotonic() > until or any(owner.pid for owner in taken.values()):
                raise PortsTaken("\n".join(f"{use}: {owner}" for use, owner in taken.items()))
            await asyncio.sleep(0.1)

    def _taken_ports(self, going: set[str]) -> dict[str, TakenPort]:
        return {
            f"{part.name} ({use})": owner
            for part in self.wanted
            if (server := part.ours) and part.name not in going
            for use, port in server.ports.items()
            if (owner := who_takes(port))
        }

    async def _bring_up(self, part: Part, report: ReportStage) -> None:
        began = time.monotonic()
        report(part, "starting", 0.0)
        log = self.supervisor.log(part.name) if part.ours else None
        if part.ours:
            await asyncio.to_thread(self.supervisor.start, part.name)
        try:
            await until_ready(
                part.server,
                deadline=part.ready_within,
                alive=self._still_tries(part) if part.ours else lambda: True,
                log=log,
            )
        except ServerNotReady:
            report(part, "failed", time.monotonic() - began)
            if part.ours:
                await asyncio.to_thread(self.supervisor.stop, part.name)
            raise
        if isinstance(part.server, Temporal):
            await part.server.keep_histories()
        report(part, "ready", time.monotonic() - began)

    def _still_tries(self, part: Part) -> Callable[[], bool]:
        """Return a check whether the part may still become ready.

        A process that ends is started again, until it has been started `part.tries` times.
        """
        seen: set[int] = set()

        def tries() -> bool:
            process = self.supervisor.states().get(part.name)
            if process is None:
                return False
            if process.pid:
                seen.add(process.pid)
            if process.state in GOING:
                return len(seen) <= part.tries
            return process.state in ("EXITED", "BACKOFF") and len(seen) < part.tries

        return tries

    async def down(self, report: ReportStage = _silent) -> bool:
        """Stop the workers, then the servers, gracefully; return False if nothing ran.

        What the supervisor cannot end is killed: nothing of the stack is left behind.
        """
        states = self.supervisor.states()
        ran = self.supervisor.running() or bool(self.supervisor.stray_pids())
        by_name = {part.name: part for part in self.parts.all}
        servers = [part.name for part in self.parts.servers]
        for names in (["workers"], servers):
            going = [by_name[name] for name in names if name in states and states[name].pid]
            await asyncio.gather(*(self._take_down(part, report) for part in going))
        await asyncio.to_thread(self.supervisor.shut_down)
        await asyncio.to_thread(self.supervisor.end_strays)
        self._leave_no_scratch()
        return ran

    def _leave_no_scratch(self) -> None:
        """Remove Ray's sockets and its copies of its log, and folders made for short paths."""
        sessions = RayServe(self.home / "ray").sessions
        shutil.rmtree(sessions, ignore_errors=True)
        leave_short_folder(self.home / "ray", sessions.parent)
        self.supervisor.leave_no_scratch()

    async def _take_down(self, part: Part, report: ReportStage) -> None:
        began = time.monotonic()
        report(part, "stopping", 0.0)
        await asyncio.to_thread(self.supervisor.stop, part.name)
        report(part, "stopped", time.monotonic() - began)

    def kill(self) -> list[int]:
        """End everything at once, as a power cut would; return the process ids."""
        return self.supervisor.end_strays()

    async def restart(self, name: str, report: ReportStage = _silent) -> None:
        """Stop one part, start it again and wait until it is ready."""
        part = next(part for part in self.wanted if part.name == name and part.ours)
        await self._take_down(part, report)
        await self._bring_up(part, report)

    def pid(self, name: str) -> int | None:
        """Return the process id of one part while it runs, for tests that break it."""
        process = self.supervisor.states().get(name)
        return process.pid or None if process else None

    async def status(self) -> list[PartStatus]:
        """Return every part's status: its state in the supervisor, and whether it really serves."""
        states = self.supervisor.states()
        return list(
            await asyncio.gather(*(self._part_status(part, states) for part in self.wanted))
        )

    async def _part_status(self, part: Part, states: Mapping[str, ProcessState]) -> PartStatus:
        process = states.get(part.name)
        if part.ours and (process is None or not process.pid):
            state = process.state.lower() if process else "stopped"
            return PartStatus(
                part.name, state, False, "", None, timedelta(), part.where, self._log(part)
            )
        why = ""
        try:
            await asyncio.wait_for(part.server.check(), PROBE_WITHIN.total_seconds())
        except TimeoutError:
            why = f"no answer in {PROBE_WITHIN.total_seconds():.0f} s"
        except Exception as error:  # clients report "not healthy" in different ways  # noqa: BLE001
            why = why_not_ready(error)
        return PartStatus(
            part.name,
            process.state.lower() if process else "elsewhere",
            not why,
            why,
            process.pid if process else None,
            process.up if process else timedelta(),
            part.where,
            self._log(part),
        )

    def _log(self, part: Part) -> Path | None:
        return self.supervisor.log(part.name) if part.ours else None

    def clean(self) -> list[Path]:
        """Remove what the stack stored, its logs and its credentials; return what was removed.

        Raises:
            StillRunning: the data of a running server are not removed.
        """
        if self.supervisor.running() or self.supervisor.stray_pids():
            raise StillRunning("the stack runs: stop it first (make stop)")
        self._leave_no_scratch()
        removed = [
            path
            for path in (
                *(self.home / name for name in ("data", "ray", "supervisor", "logs")),
                *(self.home / name for name in ("env", "ports.json")),
            )
            if path.exists()
        ]
        for path in removed:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        return removed


def _as_lines(env: Mapping[str, str]) -> str:
    head = "# How to connect to this stack; written when it starts. Keep it private.\n"
    return head + "".join(f"{name}={_quoted(value)}\n" for name, value in env.items())


def _quoted(value: str) -> str:
    """Return a value as a dotenv file and a shell can read it."""
    if re.fullmatch(r"[\w@%+=:,./-]*", value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
