"""What all processes of a sandbox use together.

The kernel's limits are per process (and a process may have many), and a tmpfs counts bytes and not
files. A control group would count both, and an ordinary user or a container rarely may make one. So
the worker measures from outside, and kills the sandbox.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

_PAGE = os.sysconf("SC_PAGE_SIZE")


def excess(
    pid: int, memory_bytes: int, files: int, folders: Sequence[str]
) -> Literal["memory", "files"] | None:
    """Return what the process and its descendants use too much of, or None.

    Args:
        pid: the process that set up the sandbox.
        memory_bytes: the most memory of all together; a page that they share counts once.
        files: the most files and folders in each of `folders`.
        folders: the writable folders, as the sandbox sees them.
    """
    inside = list(_descendants(pid))
    mounted = [found for folder in folders if (found := _mounted(inside, folder))]
    # The content of the folders is memory too.
    free = memory_bytes - sum((each.f_blocks - each.f_bfree) * each.f_frsize for each in mounted)
    # What they share is counted for each here, so only the costly measure below decides.
    if sum(map(_resident, inside)) > free and sum(map(_share, inside)) > free:
        return "memory"
    if any(each.f_files - each.f_ffree > files for each in mounted):
        return "files"
    return None


def deleted_bytes(pid: int) -> int:
    """Return how much disk the deleted files take that the process and its descendants have open.

    No folder shows them.
    """
    sizes = {}
    for process in _descendants(pid):
        for file in _open_files(process):
            if not file.st_nlink and stat.S_ISREG(file.st_mode):
                sizes[(file.st_dev, file.st_ino)] = file.st_blocks * 512
    return sum(sizes.values())


def _descendants(pid: int) -> Iterator[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return  # it has ended
    for task in tasks:
        for child in _read(f"{task}/children"):
            yield int(child)
            yield from _descendants(int(child))


def _resident(pid: int) -> int:
    statm = _read(f"/proc/{pid}/statm")
    return int(statm[1]) * _PAGE if statm else 0


def _share(pid: int) -> int:
    """Return the process's memory, with its share of each page that it shares."""
    words = _read(f"/proc/{pid}/smaps_rollup")
    if "Pss:" in words:
        return int(words[words.index("Pss:") + 1]) * 1024
    return _resident(pid)  # the process hides it


def _mounted(inside: Sequence[int], folder: str) -> os.statvfs_result | None:
    for pid in inside:
        try:
            mounted = os.statvfs(f"/proc/{pid}/root{folder}")
            if mounted.f_fsid != os.statvfs(folder).f_fsid:  # it is set up
                return mounted
        except OSError:
            continue  # it has ended, or hides it
    return None


def _open_files(pid: int) -> Iterator[os.stat_result]:
    with suppress(OSError):  # it has ended, or hides them
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                yield descriptor.stat()


def _read(path: str) -> list[str]:
    """Return the words of a file of /proc; nothing if its process has ended, or hides it."""
    try:
        return Path(path).read_text().split()
    except OSError:
        return []
