"""Which ports are in use, and by whom: read from /proc, so that no other program is needed."""

import contextlib
import ipaddress
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from deploy.local.servers import LOOPBACK

LISTENING = "0A"  # TCP_LISTEN, as /proc/net/tcp writes it


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


@dataclass(frozen=True)
class Listener:
    """The address and port that one process listens on."""

    address: IPv4Address | IPv6Address
    port: int
    inode: str

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can connect."""
        mapped = self.address.ipv4_mapped if isinstance(self.address, IPv6Address) else None
        return (mapped or self.address).is_loopback


def who_takes(port: int) -> TakenPort | None:
    """Return the process that listens on `port`; None if it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            return None
        except OSError:
            pass
    inodes = {listener.inode for listener in _listeners() if listener.port == port}
    for folder in Path("/proc").glob("[0-9]*"):
        if inodes & set(_sockets(folder)):
            with contextlib.suppress(OSError):
                argv = (folder / "cmdline").read_bytes().split(b"\0")
                command = b" ".join(argv).decode(errors="replace").strip()
                return TakenPort(port, int(folder.name), command[:160])
    return TakenPort(port, None, "")


def listeners_of(pids: Iterable[int]) -> list[Listener]:
    """Return everything that these processes listen on."""
    inodes = {inode for pid in pids for inode in _sockets(Path("/proc", str(pid)))}
    return [listener for listener in _listeners() if listener.inode in inodes]


def _listeners() -> Iterator[Listener]:
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING:
                    address, port = fields[1].split(":")
                    yield Listener(_address(address), int(port, 16), fields[9])


def _address(text: str) -> IPv4Address | IPv6Address:
    """Parse an address; the kernel writes 32-bit words in the machine's byte order."""
    words = [bytes.fromhex(text[at : at + 8]) for at in range(0, len(text), 8)]
    if sys.byteorder == "little":
        words = [word[::-1] for word in words]
    return ipaddress.ip_address(b"".join(words))


def _sockets(process: Path) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for link in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                target = str(link.readlink())
                if target.startswith("socket:["):
                    yield target[8:-1]
