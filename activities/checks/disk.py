"""Folders of this machine to which a program in the sandbox writes: their owner, modes and growth.

Nothing in the kernel limits the size of a folder. So the worker counts what is in it, again and
again: at once when the disk has lost much of its free space, and otherwise in intervals that grow
with the time that counting takes. A fast program can exceed the limit for that long.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_DEPTH = 100
"""How deep folders may nest; many programs, and some of Python's own, fail far below."""

RESERVE_BYTES = 512 * 1024 * 1024
"""Free space of a disk under which nothing may grow."""

_COUNTED_AFTER_S = 0.25
_COUNTING_SHARE = 20
"""Counting takes at most one part in so many of a core."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass
class Size:
    """What is in folders. `too_deep`: whether they nest deeper than MAX_DEPTH."""

    bytes: int = 0
    files: int = 0
    too_deep: bool = False


def measure_folders(folders: Sequence[Path]) -> Size:
    """Count the files, links and folders in folders, and the space that they take on the disk.

    No link is followed. What is removed meanwhile, or hidden by its mode, is left out.
    """
    size = Size()
    for folder in folders:
        _walk(str(folder), None, 1, size, None)
    return size


def take_over(folders: Sequence[Path], uid: int | None) -> Size:
    """Let the worker and the program's user read and change what is in folders, and count it.

    It repairs what a program did to modes: folders and files that their owner cannot read, and
    those with the right to become their owner. No program may run in the folders.

    Args:
        folders: what is taken over, with all in it; no link is followed.
        uid: who gets it; None: it belongs to the worker already.

    Raises:
        OSError: a folder is missing or belongs to someone else.
    """
    size = Size()
    for folder in folders:
        if uid is not None:
            os.chown(folder, uid, uid, follow_symlinks=False)
        folder.chmod(stat.S_IMODE(folder.stat().st_mode) | stat.S_IRWXU)
        _walk(str(folder), None, 1, size, (uid,))
    return size


def _walk(
    name: str, parent: int | None, depth: int, size: Size, owner: tuple[int | None] | None
) -> None:
    """Add what is in a folder to `size`; give it to the owner, if there is one, and repair it."""
    try:
        folder = os.open(name, _FOLDER, dir_fd=parent)
    except OSError:
        return  # it was removed, or its mode hides it
    try:
        with os.scandir(folder) as found:
            for each in found:
                try:
                    status = each.stat(follow_symlinks=False)
                except OSError:
                    continue  # it was removed
                size.bytes += status.st_blocks * 512
                size.files += 1
                if owner:
                    _repair(each.name, folder, status, owner[0])
                if not stat.S_ISDIR(status.st_mode):
                    continue
                if depth < MAX_DEPTH:
                    _walk(each.name, folder, depth + 1, size, owner)
                else:
                    size.too_deep = True
    finally:
        os.close(folder)


def _repair(name: str, folder: int, status: os.stat_result, uid: int | None) -> None:
    if uid is not None and uid != status.st_uid:
        os.chown(name, uid, uid, dir_fd=folder, follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode):
        return
    needed = stat.S_IRWXU if stat.S_ISDIR(status.st_mode) else stat.S_IRUSR
    mode = stat.S_IMODE(status.st_mode)
    wanted = (mode | needed) & ~(stat.S_ISUID | stat.S_ISGID)
    if mode != wanted:
        os.chmod(name, wanted, dir_fd=folder)


class Growth:
    """The growth of folders.

    Args:
        folders: what is watched; none: nothing ever exceeds.
        before: what is in them at first.
        max_bytes: how much they may grow together.
        max_files: how many files, links and folders may be added to them.
    """

    def __init__(
        self, folders: Sequence[Path], before: Size, max_bytes: int, max_files: int
    ) -> None:
        self.folders = folders
        self._before = self._now = before
        self._max_bytes, self._max_files = max_bytes, max_files
        self._counted_free = self._free()
        self._again = time.monotonic() + _COUNTED_AFTER_S

    def exceeded(self, hidden_bytes: int) -> bool:
        """Return whether they have grown too much; count them again only if it is time.

        Args:
            hidden_bytes: what deleted files still take.
        """
        if not self.folders:
            return False
        free = self._free()
        room = self._before.bytes + self._max_bytes - self._now.bytes - hidden_bytes
        if time.monotonic() >= self._again or self._counted_free - free > room // 4:
            self._count()
        return self.is_too_much(self._now, hidden_bytes) or free < RESERVE_BYTES

    def is_too_much(self, now: Size, hidden_bytes: int = 0) -> bool:
        """Return whether what is in the folders now is too much."""
        return (
            now.bytes + hidden_bytes - self._before.bytes > self._max_bytes
            or now.files - self._before.files > self._max_files
            or now.too_deep
        )

    def _count(self) -> None:
        began = time.monotonic()
        self._counted_free = self._free()
        self._now = measure_folders(self.folders)
        ended = time.monotonic()
        self._again = ended + max(_COUNTED_AFTER_S, _COUNTING_SHARE * (ended - began))

    def _free(self) -> int:
        return min((_free_bytes(folder) for folder in self.folders), default=0)


def _free_bytes(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize
