"""One server process that its starter owns; tests also break it on purpose."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import IO

from deploy.local.server import Server, ServerNotReady, until_ready

STOP_WITHIN = timedelta(seconds=30)


class ServerProcess:
    """A runner of one server in a separate process group; it ends that group only."""

    def __init__(self, server: Server, log: Path, ready_within: timedelta) -> None:
        self.server = server
        self.log = log
        self._ready_within = ready_within
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ending = False

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return self._process.pid if self.running and self._process else None

    @property
    def running(self) -> bool:
        """Whether the process exists; not whether it is healthy."""
        return self._process is not None and self._process.poll() is None

    @property
    def ended_by_itself(self) -> bool:
        """Whether the process has ended, and neither `stop` nor `kill` ended it."""
        return self._process is not None and not self.running and not self._is_ending

    async def start(self) -> float:
        """Start and wait until healthy; do nothing if it already runs.

        Returns:
            The seconds that it took.
        """
        if self.running:
            return 0.0
        command = self.server.prepare()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = _spawn(command.argv, dict(command.env), log)
        self._is_ending = False
        try:
            return await until_ready(
                self.server,
                deadline=self._ready_within,
                alive=lambda: self.running,
                log=self.log,
            )
        except ServerNotReady:
            await self.kill()
            raise

    async def stop(self) -> None:
        """Send SIGTERM and wait; kill it if it does not end."""
        await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        """End it as a crash would: SIGKILL, with no time to write anything."""
        await self._end(signal.SIGKILL)

    async def _end(self, how: signal.Signals) -> None:
        process = self._process
        if process is None:
            return
        self._is_ending = True
        for attempt in (how, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, attempt)
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, STOP_WITHIN.total_seconds())
                break
        self._process = None


def _spawn(argv: tuple[str, ...], env: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    # The server must also end when its starter is killed.
    setpriv = shutil.which("setpriv")
    dies_with_us = (setpriv, "--pdeathsig", "KILL", "--") if setpriv else ()
    return subprocess.Popen(
        [*dies_with_us, *argv],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
