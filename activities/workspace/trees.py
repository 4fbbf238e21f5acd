"""Working trees: a cache on the worker's disk of what the store has.

A tree belongs to one step at a time, of one process: its folder is locked. It is brought to its
commit by changing only the files that differ, so a step that goes on in the tree that it left costs
no checkout, and no process of git if the step before noted what it left. A process that dies leaves
a tree of which nothing is believed but git's index, and git compares each file with that.

    ROOT/STORE/SLOT/tree    the files, without `.git`
    ROOT/STORE/SLOT/index   git's index of them
    ROOT/STORE/SLOT/lock    held while the tree is used
    ROOT/STORE/SLOT/state   commit, key, size, exactness; its time is that of the last use
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import stat
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from activities.workspace.commits import remove_special
from activities.workspace.errors import store_errors
from activities.workspace.git import GitFailed, git
from activities.workspace.metrics import TREES_BYTES, TREES_REMOVED
from activities.workspace.store import Store, checked

UNUSED = timedelta(days=1)
"""Trees that were not used for so long are removed."""

_IN_PARALLEL = {"checkout.workers": "4", "checkout.thresholdForParallelism": "200"}
"""A checkout waits for the file system more than for a core, so its files are written side by side.

git's default writes one after another. Few files are written sooner without more processes.
"""


class _State(NamedTuple):
    """What is known of a tree that is not used.

    Attributes:
        exact: whether it has the commit's files as they are, and else only what git ignores.
        used: the time of the last use.
    """

    commit: str
    key: str
    size: int
    exact: bool
    used: float


@dataclass(frozen=True)
class _Slot:
    """A place for one tree."""

    path: Path

    @property
    def tree(self) -> Path:
        return self.path / "tree"

    @property
    def index(self) -> Path:
        return self.path / "index"

    @property
    def state(self) -> Path:
        return self.path / "state"

    def read(self) -> _State:
        """Return what is known; one that has no state is in use, or was when its process died."""
        try:
            commit, key, size, exact = json.loads(self.state.read_bytes())
            return _State(commit, key, size, exact, self.state.stat().st_mtime)
        except (OSError, ValueError):
            return _State("", "", 0, exact=False, used=self._changed())

    def _changed(self) -> float:
        with suppress(FileNotFoundError):
            return self.path.stat().st_mtime
        return 0.0  # another process removed it

    def write(self, commit: str, key: str, size: int, *, exact: bool) -> None:
        self.state.write_text(json.dumps([commit, key, size, exact]))

    def locked(self) -> int | None:
        """Lock the slot and return the lock, which `os.close` releases; None if it is used."""
        try:
            lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            return None  # it was removed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (self.path / "lock").stat().st_ino == os.fstat(lock).st_ino:
                return lock
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(lock)
        return None


class Trees:
    """The working trees of a worker's machine."""

    def __init__(self, root: Path, limit_bytes: int) -> None:
        """Keep trees in a folder.

        Args:
            root: the folder, made if missing; processes may share it.
            limit_bytes: of all trees together. Above it, and after a day without use, trees that
                are not used are removed, the longest unused first.
        """
        self._root = root
        self._limit = limit_bytes
        self._exact: dict[Path, str] = {}

    def note(self, tree: Path, commit: str) -> None:
        """Note that a tree that is used has exactly the files of a commit, as git has compared.

        Its user changes nothing afterwards. Files that git ignores may be there too.
        """
        self._exact[tree] = commit

    @asynccontextmanager
    async def at(self, store: Store, commit: str, key: str = "") -> AsyncIterator[Path]:
        """Yield a clean working tree of a commit that no one else uses.

        Args:
            store: the store that has the commit.
            commit: the commit.
            key: what the tree is for, such as a task and an agent; the tree that the same key left
                is preferred.
        """
        folder = self._root / store.path.name.removesuffix(".git")
        slot, lock = await asyncio.to_thread(_taken, folder, checked(commit), key)
        exact = None
        try:
            with store_errors(what=f"the working tree of {commit[:12]}"):
                await _bring(slot, store, commit)
            yield slot.tree
            exact = self._exact.get(slot.tree)
        finally:
            self._exact.pop(slot.tree, None)
            try:
                await asyncio.to_thread(_left, slot, exact or commit, key, exact is not None)
            finally:
                os.close(lock)
            await asyncio.to_thread(self._evict)

    def _evict(self) -> None:
        """Remove trees that are not used, the longest unused first."""
        latest = time.time() - UNUSED.total_seconds()
        found = sorted(((slot.read(), slot) for slot in _slots(self._root)), key=_last_use)
        total = sum(state.size for state, _ in found)
        removed = 0
        for state, slot in found:
            if state.used >= latest and total <= self._limit:
                break
            lock = slot.locked()
            if lock is not None:
                try:
                    discard(slot.path)
                    removed += 1
                    total -= state.size
                finally:
                    os.close(lock)
        TREES_BYTES.set(total)
        TREES_REMOVED.inc(removed)


def _last_use(found: tuple[_State, _Slot]) -> float:
    return found[0].used


def _slots(root: Path) -> Iterator[_Slot]:
    for path in sorted(root.glob("*/*/")):
        if not path.name.startswith("."):
            yield _Slot(path)


def _taken(folder: Path, commit: str, key: str) -> tuple[_Slot, int]:
    """Lock and return the slot that fits best, or a new one."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [(slot, slot.read()) for slot in map(_Slot, sorted(folder.iterdir()))]
    fitting = [slot for slot, state in found if key and state.key == key]
    # Another's tree stays as it was left; one that was for no key changes by few files.
    free = [(state.commit != commit, slot) for slot, state in found if not state.key]
    fitting += [slot for _, slot in sorted(free, key=lambda each: each[0])]
    for slot in fitting:
        lock = slot.locked()
        if lock is not None:
            return slot, lock
    while True:
        slot = _Slot(folder / uuid.uuid4().hex)
        slot.path.mkdir()
        lock = slot.locked()
        if lock is not None:  # else another process removed it as unused
            return slot, lock


async def _bring(slot: _Slot, store: Store, commit: str) -> None:
    """Bring a tree to a commit; one that git cannot change is made again."""
    exact = await asyncio.to_thread(_prepare, slot)
    try:
        if exact != commit:
            await _reset(slot, store, commit)
        await _swept(slot, store, commit)
    except (GitFailed, OSError):
        await asyncio.to_thread(_clear, slot)
        await _reset(slot, store, commit)


async def _reset(slot: _Slot, store: Store, commit: str) -> None:
    words = ("read-tree", "--reset", "-u", commit)
    await git(
        *words, git_dir=store.path, work_tree=slot.tree, index=slot.index, config=_IN_PARALLEL
    )


async def _swept(slot: _Slot, store: Store, commit: str) -> None:
    tracked = {path for _, path in await store.listing(commit)}
    await asyncio.to_thread(_sweep, slot.tree, tracked)


def _prepare(slot: _Slot) -> str:
    """Return the commit whose files the tree has exactly; empty if that is not known."""
    state = slot.read()
    for name in ("state", "index.lock"):  # what a process left that died
        (slot.path / name).unlink(missing_ok=True)
    for left in slot.path.glob(".index.*"):
        left.unlink()
    if slot.tree.is_symlink() or not slot.tree.is_dir():
        _clear(slot)
        return ""
    slot.tree.chmod(0o755)
    if state.exact and slot.index.exists():
        return state.commit
    remove_special(slot.tree)
    return ""


def _clear(slot: _Slot) -> None:
    slot.index.unlink(missing_ok=True)
    (slot.path / "index.lock").unlink(missing_ok=True)
    discard(slot.tree)
    slot.tree.mkdir()


def _sweep(tree: Path, tracked: set[bytes]) -> None:
    """Remove everything that is not of the commit, also empty folders, pipes and `.git`."""
    folders = {b""}
    for path in tracked:
        above = path
        while b"/" in above and (above := above.rpartition(b"/")[0]) not in folders:
            folders.add(above)
    waiting = [b""]
    root = os.fsencode(tree)
    while waiting:
        folder = waiting.pop()
        with os.scandir(b"/".join(filter(None, (root, folder)))) as entries:
            for entry in entries:
                path = b"/".join(filter(None, (folder, entry.name)))
                if entry.is_dir(follow_symlinks=False):
                    if path in folders:
                        waiting.append(path)
                        continue
                    if path in tracked:  # a submodule, whose folder is empty
                        for inside in Path(os.fsdecode(entry.path)).iterdir():
                            discard(inside)
                        continue
                elif path in tracked:
                    continue
                discard(Path(os.fsdecode(entry.path)))


def _left(slot: _Slot, commit: str, key: str, exact: bool) -> None:
    """Note what a step left in a tree."""
    slot.write(commit, key, _size(slot.path), exact=exact)


def _size(folder: Path) -> int:
    """Return the bytes that a folder's files have on the disk, as far as it can be read."""
    total = 0
    waiting = [os.fspath(folder)]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                total += entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
    return total


def discard(path: Path) -> None:
    """Remove a file or a folder, whatever its permissions are."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        try:
            shutil.rmtree(path, onerror=_retried)
        except RecursionError:  # `rm` goes down any depth
            subprocess.run(["rm", "-rf", "--", path], check=True)
    else:
        path.unlink()


def _retried(function: Callable[..., Any], path: str, _: object) -> None:
    """Open the folder that forbids it, and remove what is in the way."""
    parent = Path(path).parent
    parent.chmod(0o700)
    failed = Path(path)
    if not failed.is_symlink() and failed.is_dir():
        failed.chmod(0o700)
        shutil.rmtree(failed)
    else:
        failed.unlink()
