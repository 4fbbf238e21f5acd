"""Which ports are in use, and by whom."""

import contextlib
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


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on.

    They are below the range that the kernel gives to outgoing connections.
    """
    picked: list[int] = []
    held: list[socket.socket] = []
    try:
        while len(picked) < count:
            port = random.randint(15000, 32000)
            held.append(socket.socket())
            with contextlib.suppress(OSError):
                held[-1].bind((LOOPBACK, port))
                picked.append(port)
        return picked
    finally:
        for one in held:
            one.close()
