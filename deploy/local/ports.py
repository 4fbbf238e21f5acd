"""Which ports are in use, and by whom."""

import random
import socket
from dataclasses import dataclass

import psutil

from deploy.local.server import LOOPBACK


@dataclass(frozen=True)
class TakenPort:
    """A port that something listens on; `pid` is None if it cannot be determined."""

    port: int
    pid: int | None
    command: str

    def __str__(self) -> str:
        if self.pid is None:
            return f"port {self.port} is taken by a process that we may not see"
        return f"port {self.port} is taken by process {self.pid}: {self.command}"


def who_takes(port: int) -> TakenPort | None:
    """Return the process that listens on `port`; None if it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            return None
        except OSError:
            pass
    for connection in psutil.net_connections("tcp"):
        if connection.status != psutil.CONN_LISTEN or not connection.laddr:
            continue
        if connection.laddr.port == port and connection.pid:
            try:
                command = " ".join(psutil.Process(connection.pid).cmdline())
            except psutil.Error:
                continue
            return TakenPort(port, connection.pid, command[:160])
    return TakenPort(port, None, "")


PORTS = range(20_000, 32_000)
"""Above the ports of Ray's workers, below those that the kernel gives to outgoing connections."""

BLOCK = 50

_blocks: list[socket.socket] = []
"""The first port of each block that this process has taken, bound."""

_unused: list[int] = []


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on, and that no other call returns.

    A process takes them from blocks of ports that belong to it until it ends, so that stacks that
    start at the same time never plan to use the same port.

    Raises:
        RuntimeError: Other processes have taken all blocks.
    """
    picked: list[int] = []
    while len(picked) < count:
        if not _unused:
            _unused.extend(_take_block())
        port = _unused.pop()
        if free := _bound(port):
            free.close()
            picked.append(port)
    return picked


def _take_block() -> range:
    for first in random.sample(PORTS[::BLOCK], len(PORTS) // BLOCK):
        if block := _bound(first):
            _blocks.append(block)
            return range(first + 1, first + BLOCK)
    raise RuntimeError(
        f"other processes have taken the ports from {PORTS[0]} to {PORTS[-1]}: end some of them"
    )


def _bound(port: int) -> socket.socket | None:
    candidate = socket.socket()
    try:
        candidate.bind((LOOPBACK, port))
    except OSError:
        candidate.close()
        return None
    return candidate
