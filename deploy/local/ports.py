"""Which port is taken, and by whom."""

import contextlib
import socket
from dataclasses import dataclass
from pathlib import Path

from deploy.local.servers import LOOPBACK


@dataclass(frozen=True)
class TakenPort:
    """A port that something listens on; `pid` is None where we may not see whose it is."""

    port: int
    pid: int | None
    command: str

    def __str__(self) -> str:
        if self.pid is None:
            return f"port {self.port} is taken by a process of another user"
        return f"port {self.port} is taken by process {self.pid}: {self.command}"


def who_takes(port: int) -> TakenPort | None:
    """The process that listens on `port`; None when it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            return None
        except OSError:
            pass
    inodes = _listening(port)
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(_inode(link) in inodes for link in (folder / "fd").iterdir()):
                argv = (folder / "cmdline").read_bytes().split(b"\0")
                command = b" ".join(argv).decode(errors="replace").strip()
                return TakenPort(port, int(folder.name), command[:160])
    return TakenPort(port, None, "")


def _listening(port: int) -> set[str]:
    found: set[str] = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(fields[9])
    return found


def _inode(link: Path) -> str:
    with contextlib.suppress(OSError):
        target = str(link.readlink())
        if target.startswith("socket:["):
            return target[8:-1]
    return ""
