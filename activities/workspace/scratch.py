"""Folders with the copies that a measurement needs: removed afterwards, also after a kill."""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

PREFIX = "fleet-measure-"

NEW_S = 60
"""A folder that is younger may not be locked yet."""


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Make a folder that this process locks until the block ends."""
    with TemporaryDirectory(prefix=PREFIX) as folder:
        lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield Path(folder)
        finally:
            os.close(lock)


def remove_left() -> list[Path]:
    """Remove the folders of processes that were killed; return them."""
    folders = [each for each in Path(gettempdir()).glob(f"{PREFIX}*") if _is_left(each)]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)  # another worker may remove it, too
    return folders


def _is_left(folder: Path) -> bool:
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # removed meanwhile, or someone else's
        return False
    try:
        found = os.fstat(lock)
        if found.st_uid != os.getuid() or found.st_mtime > time.time() - NEW_S:
            return False
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True
