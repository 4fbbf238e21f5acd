"""A control group (cgroup v2) for each run, where the worker may make one.

The kernel then holds memory and processes of the whole sandbox to their limits, with what no other
limit counts: pages of files, sockets, inodes. A group can be made below the worker's own, if that
is the root; or else beside it, if the group above was delegated to the worker (systemd:
`Delegate=memory pids` and `DelegateSubgroup=worker`), because a group that has processes gives its
children no controllers.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

MOUNTED = Path("/sys/fs/cgroup")
_CONTROLLERS = ("memory", "pids")
_DELEGATED = ("user.delegate", "trusted.delegate")
"""Attributes of a group that systemd has delegated."""


class NoGroup(Exception):
    """No control group can be made; the message has the reason."""


@dataclass(frozen=True)
class Group:
    """The control group of one run."""

    folder: Path

    def entering(self, command: Sequence[str]) -> list[str]:
        """Return a command that enters the group and becomes `command`."""
        script = 'echo $$ >"$0" && exec "$@"'
        return ["/bin/sh", "-c", script, str(self.folder / "cgroup.procs"), *command]

    def exceeded(self) -> bool:
        """Return whether the kernel killed the run for its memory."""
        events = (self.folder / "memory.events").read_text().split()
        return events[events.index("oom_kill") + 1] != "0"


def find_home(mounted: Path = MOUNTED, member: Path = Path("/proc/self/cgroup")) -> Path:
    """Return the group in which groups can be made.

    Args:
        mounted: where cgroup v2 is mounted.
        member: the file that names the worker's group.

    Raises:
        NoGroup: none can be made.
    """
    names = [line[3:] for line in member.read_text().splitlines() if line.startswith("0::")]
    if not names or not (mounted / "cgroup.controllers").exists():
        raise NoGroup(f"cgroup v2 is not mounted at {mounted}")
    own = mounted / names[0].lstrip("/")
    if own == mounted:
        home = own
    elif _is_delegated(own.parent):
        home = own.parent
    else:
        raise NoGroup(f"{own.parent} is not delegated to the worker")
    try:
        (home / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in _CONTROLLERS))
        _new(home).folder.rmdir()
    except OSError as error:
        raise NoGroup(f"{home}: {error.strerror}") from error
    return home


@asynccontextmanager
async def group(home: Path, memory_bytes: int, processes: int) -> AsyncIterator[Group]:
    """Make a group for a run, and end it with everything in it.

    Args:
        home: the group in which it is made.
        memory_bytes: the most memory of all its processes together.
        processes: the most processes and threads.
    """
    made = _new(home)
    try:
        (made.folder / "memory.max").write_text(str(memory_bytes))
        (made.folder / "memory.oom.group").write_text("1")
        if (swap := made.folder / "memory.swap.max").exists():
            swap.write_text("0")
        (made.folder / "pids.max").write_text(str(processes))
        yield made
    finally:
        await _end(made.folder)


def _is_delegated(folder: Path) -> bool:
    if os.geteuid() != 0:
        return os.access(folder / "cgroup.procs", os.W_OK)
    return any(name in os.listxattr(folder) for name in _DELEGATED)


def _new(home: Path) -> Group:
    folder = home / f"fleet-sandbox-{uuid.uuid4().hex}"
    folder.mkdir()
    return Group(folder)


async def _end(folder: Path) -> None:
    (folder / "cgroup.kill").write_text("1")
    while "populated 1" in (folder / "cgroup.events").read_text():
        await asyncio.sleep(0.001)
    os.rmdir(folder)  # noqa: PTH106  a blocking method of Path is refused here, and this is none
