"""Refs of a store, which move by compare-and-swap: no worker loses what another one made."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Protocol

from activities.workspace.errors import store_errors
from activities.workspace.git import GitFailed, git

ABSENT = "0" * 40
"""The value of a ref that does not exist."""

BEGINNING = datetime.fromtimestamp(0, UTC)
"""The time of an object that is not a commit."""

COMMIT = re.compile(r"[0-9a-f]{40}")

_FORMAT = "%(refname) %(objectname) %(committerdate:unix)"
_LOCKED = re.compile(r"Unable to create '(.+\.lock)': File exists")
_LOCK_SECONDS = 300
"""git holds the lock of a ref for milliseconds."""


class Move(NamedTuple):
    """A change of a ref.

    Attributes:
        ref: in full.
        new: the object that it names then; ABSENT: it is removed.
        old: the object that it must name before; ABSENT: it must not exist; None: it does not
            matter.
    """

    ref: str
    new: str
    old: str | None = None


class NamedObject(NamedTuple):
    """A ref with its object. `at`: the time of the commit; BEGINNING if it is not one."""

    ref: str
    value: str
    at: datetime


class Refs(Protocol):
    """The refs of a store, and the objects that they name.

    Every method raises GitStoreAway, which is retried, if the store cannot be used.
    """

    async def value(self, ref: str) -> str | None:
        """Return the id of the object that a ref names, and have that object; None: no such ref."""
        ...

    async def noted(self, ref: str) -> str | None:
        """Return the value of a ref if that needs no process; None: ask `value`."""
        ...

    async def move(self, *moves: Move) -> bool:
        """Change refs, all of them or none; False if one of them was not at its old value."""
        ...

    async def below(self, *prefixes: str) -> list[NamedObject]:
        """Return the refs whose names begin with a prefix, which ends in `/`."""
        ...

    async def share(self, *refs: str) -> None:
        """Let all workers have refs that were fetched from the project's repository."""
        ...

    async def answers(self) -> None:
        """Check that the store can be used."""
        ...

    async def hold(self, *commits: str) -> None:
        """Have commits that other workers may have made; one that no one has is left out."""
        ...


class FolderRefs:
    """The refs of a store in a folder, which all workers reach."""

    def __init__(self, path: Path) -> None:
        """Use the bare repository in a folder."""
        self._path = path

    async def value(self, ref: str) -> str | None:
        with store_errors():
            try:
                output = await self._git("rev-parse", "--quiet", "--verify", ref)
            except GitFailed as failure:
                if failure.code != 1:
                    raise
                return None
        return output.decode().strip()

    async def noted(self, ref: str) -> str | None:
        """Return the value of a ref that has a separate file, as one has that was moved lately."""
        return await asyncio.to_thread(_loose, self._path / ref)

    async def move(self, *moves: Move) -> bool:
        lines = [" ".join(["update", *filter(None, move)]) for move in moves]
        with store_errors():
            try:
                await self._update("\n".join(lines).encode() + b"\n")
            except GitFailed:
                if await moved(self, moves):
                    return False
                raise
        return True

    async def below(self, *prefixes: str) -> list[NamedObject]:
        with store_errors():
            output = await self._git("for-each-ref", f"--format={_FORMAT}", *prefixes)
        parts = [line.split(" ") for line in output.decode().splitlines()]
        return [NamedObject(ref, value, time_of(at)) for ref, value, at in parts]

    async def share(self, *refs: str) -> None:
        """Do nothing: all workers have what was fetched into the folder."""

    async def answers(self) -> None:
        """Do nothing: a folder that is missing shows by itself."""

    async def hold(self, *commits: str) -> None:
        """Do nothing: all workers make their commits in the folder."""

    async def _update(self, orders: bytes) -> None:
        """Run `update-ref`; remove a lock that a machine left which died while it held it."""
        try:
            await self._git("update-ref", "--stdin", stdin=orders)
        except GitFailed as failure:
            lock = _LOCKED.search(failure.reason)
            if not lock or not await asyncio.to_thread(_remove_old, Path(lock[1])):
                raise
            await self._git("update-ref", "--stdin", stdin=orders)

    async def _git(self, *args: str, stdin: bytes = b"") -> bytes:
        return await git(*args, git_dir=self._path, stdin=stdin)


async def moved(refs: Refs, moves: Sequence[Move]) -> bool:
    """Return whether a ref is not at its old value."""
    for move in moves:
        if move.old is not None and (await refs.value(move.ref) or ABSENT) != move.old:
            return True
    return False


def _loose(file: Path) -> str | None:
    """Read the file of a ref, which may be on a mount that is slow; None if there is none."""
    with suppress(OSError):
        value = file.read_text(encoding="ascii", errors="replace").rstrip("\n")
        return value if COMMIT.fullmatch(value) else None
    return None


def time_of(seconds: str) -> datetime:
    """Return a time; BEGINNING for an empty text."""
    return datetime.fromtimestamp(int(seconds), UTC) if seconds.strip() else BEGINNING


def _remove_old(lock: Path) -> bool:
    """Remove a lock that no process can still hold; False if one may."""
    try:
        if time.time() - lock.stat().st_mtime < _LOCK_SECONDS:
            return False
        lock.unlink()
    except FileNotFoundError:
        pass  # it was released, or another worker removed it
    return True
