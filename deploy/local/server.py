"""What a server of the local stack is, and how to wait until it serves."""

import asyncio
import os
import secrets
import sysconfig
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import ClassVar, Protocol

from workers.clients.connection import StartError

LOOPBACK = "127.0.0.1"
ROOT = Path(__file__).resolve().parents[2]
INSTALLED = ROOT / ".fleet" / "setup"
"""What setup fetched or made, shared by every stack of this checkout."""

PROBE_EVERY_S = 0.25
PROBE_LIMIT_S = 30.0


class ServerNotReady(RuntimeError):
    """A server did not answer its health check in time, or its process ended."""

    def __init__(self, name: str, why: str, log: Path | None) -> None:
        look = f"; its log is {log}" if log else ""
        super().__init__(f"{name} is not ready: {why}{look}")
        self.name = name
        self.log = log


class NotInstalled(RuntimeError):
    """The program of a server is missing: setup has not been run, or not to its end."""

    def __init__(self, what: str, where: Path) -> None:
        super().__init__(f"{what} is not installed ({where} is missing): run `make setup`")


@dataclass(frozen=True)
class Command:
    """The arguments of a program, with the variables it needs in addition to the caller's."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


class Probed(Protocol):
    """Anything that can be asked whether it serves."""

    @property
    def name(self) -> str:
        """Its name in the stack and in messages."""

    async def check(self) -> None:
        """Return when the server really serves; raise the error of its client otherwise."""


class Server(ABC):
    """One server: how it is configured, started, addressed and probed."""

    name: ClassVar[str]
    home: Path

    @abstractmethod
    def prepare(self) -> Command:
        """Write configuration and credentials under `home`; repeatable."""

    @abstractmethod
    async def check(self) -> None:
        """Return when the server really serves; raise the error of its client otherwise."""

    @property
    @abstractmethod
    def ports(self) -> Mapping[str, int]:
        """The ports it will listen on, by purpose."""


async def until_ready(
    server: Probed,
    *,
    deadline: timedelta,
    alive: Callable[[], bool] = lambda: True,
    log: Path | None = None,
) -> float:
    """Probe `server` until it serves.

    Args:
        server: What to probe.
        deadline: How long it may take to serve.
        alive: Returns whether the process may still become ready.
        log: The log that the error names.

    Returns:
        The seconds that it took.

    Raises:
        ServerNotReady: `deadline` has passed, or `alive` returned false.
    """
    began = time.monotonic()
    while True:
        try:
            await asyncio.wait_for(server.check(), PROBE_LIMIT_S)
            why = ""
        except Exception as error:  # clients report "not yet" in different ways  # noqa: BLE001
            why = why_not_ready(error)
        if not alive():  # what answered is another process on the same port
            raise ServerNotReady(server.name, "its process ended", log)
        if not why:
            return time.monotonic() - began
        if time.monotonic() - began > deadline.total_seconds():
            waited = f"no healthy answer in {deadline.total_seconds():.0f} s"
            raise ServerNotReady(server.name, f"{waited}, the last one was {why}", log)
        await asyncio.sleep(PROBE_EVERY_S)


def why_not_ready(error: Exception) -> str:
    """Return what a probe's error says, in whole if it names a setting and the remedy."""
    if isinstance(error, StartError):
        return str(error)
    return f"{type(error).__name__}: {error}".strip(": ")[:300]


def credential(path: Path, size: int = 16) -> str:
    """Return the password in `path`; the first call creates it, readable by its owner only.

    Args:
        path: Where it is kept.
        size: Its length in random bytes; it is written in twice as many hexadecimal digits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text().strip()
    with os.fdopen(descriptor, "w") as file:
        password = secrets.token_hex(size)  # never starts with a dash, like an option
        file.write(password + "\n")
    return password


def write_private(path: Path, text: str) -> Path:
    """Write a file that only its owner may read, in full or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".draft")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)
    return path


def script(name: str) -> Path:
    """Return the path of a program that a Python package of this environment installed."""
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        raise NotInstalled(name, path)
    return path
