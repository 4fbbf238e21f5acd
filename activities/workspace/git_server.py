"""The refs of a store on a git server, with a mirror on each machine.

The server has the truth: a ref moves there, by a push that names the value it must have before. The
mirror is a cache of objects, and its refs are what was seen last, from which git learns what need
not be sent.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from activities.workspace.errors import SERVER, store_errors
from activities.workspace.git import GitFailed, git
from activities.workspace.refs import ABSENT, COMMIT, FolderRefs, Move, NamedObject, moved
from activities.workspace.transports import transport

CREDENTIALS: Final = "STORE"
"""The name of the server's credentials, as `KEY` is that of a repository's (transports.py)."""

_ALL: Final = "+refs/*:refs/*"
_MISSING = "couldn't find remote ref"
_NOT_BY_ID = ("not our ref", "unadvertised object", _MISSING)
_GC_SECONDS = 3_600
_TIDY_SECONDS = 24 * 3_600


class ServerRefs:
    """The refs of one project's store on a git server. See `refs.Refs`."""

    def __init__(self, mirror: Path, url: str, credentials: Path | None) -> None:
        """Use a repository of a git server.

        Args:
            mirror: a bare repository on this machine; processes may share it.
            url: of the repository, which is empty at first.
            credentials: the folder with `STORE.token` or `STORE.key`; see transports.py.
        """
        self._path = mirror
        self._mirror = FolderRefs(mirror)
        self._url = url
        self._credentials = credentials
        self._held = set[str]()

    async def value(self, ref: str) -> str | None:
        with store_errors(SERVER, self._url):
            try:
                await self._fetch(f"+{ref}:{ref}")
            except GitFailed as failure:
                if _MISSING not in failure.reason:
                    raise
                return None
        return await self._mirror.value(ref)

    async def noted(self, ref: str) -> None:
        """Return nothing: another worker may have moved the ref."""

    async def move(self, *moves: Move) -> bool:
        leases = [
            f"--force-with-lease={move.ref}:{'' if move.old == ABSENT else move.old}"
            for move in moves
            if move.old is not None
        ]
        with store_errors(SERVER, self._url):
            try:
                await self._push(*leases, specs=[_spec(move) for move in moves])
            except GitFailed:
                if await moved(self, moves):
                    return False
                raise
        seen = [Move(move.ref, move.new) for move in moves]
        return await self._mirror.move(*seen)

    async def below(self, *prefixes: str) -> list[NamedObject]:
        with store_errors(SERVER, self._url):
            await self._fetch(*(f"+{prefix}*:{prefix}*" for prefix in prefixes), prune=True)
        return await self._mirror.below(*prefixes)

    async def share(self, *refs: str) -> None:
        with store_errors(SERVER, self._url):
            await self._push(specs=[f"+{ref}:{ref}" for ref in refs])

    async def hold(self, *commits: str) -> None:
        await self._tidy_daily()
        asked = {each for each in commits if COMMIT.fullmatch(each)} - self._held
        if missing := await self._missing(asked):
            with store_errors(SERVER, self._url):
                await self._fetch_by_id(missing)
            asked -= await self._missing(missing)
        self._held |= asked

    async def answers(self) -> None:
        with store_errors(SERVER, self._url):
            await self._remote("ls-remote", "--quiet", words=["HEAD"], seconds=60)

    async def _tidy_daily(self) -> None:
        """Remove from the mirror what the server has removed, once a day."""
        stamp = self._path / "tidied"
        if not stamp.exists():
            stamp.touch()
        elif time.time() - stamp.stat().st_mtime > _TIDY_SECONDS:
            stamp.touch()
            await self._tidy()

    async def _tidy(self) -> None:
        with store_errors(SERVER, self._url):
            listed = await self._remote("ls-remote", "--quiet", "--refs", words=[])
        there = {line.partition("\t")[2] for line in listed.decode().splitlines()}
        gone = [each for each in await self._mirror.below("refs/") if each.ref not in there]
        if gone:
            await self._mirror.move(*(Move(each.ref, ABSENT, each.value) for each in gone))
        self._held.clear()
        with store_errors():
            # What a step writes now has no ref yet: a day is more than a step takes.
            words = ("gc", "--quiet", "--prune=1.day.ago")
            await git(*words, git_dir=self._path, seconds=_GC_SECONDS)

    async def _missing(self, commits: Collection[str]) -> set[str]:
        if not commits:
            return set()
        asked = "".join(f"{commit}\n" for commit in commits).encode()
        with store_errors():
            found = await git("cat-file", "--batch-check", git_dir=self._path, stdin=asked)
        lines = [line.split() for line in found.decode().splitlines()]
        return {words[0] for words in lines if words[1] == "missing"}

    async def _fetch_by_id(self, commits: Collection[str]) -> None:
        """Fetch commits; all of the store, if the server gives none by id or does not have one."""
        try:
            await self._fetch(*commits)
        except GitFailed as failure:
            if not any(text in failure.reason for text in _NOT_BY_ID):
                raise
            await self._fetch(_ALL)

    async def _fetch(self, *specs: str, prune: bool = False) -> None:
        words = ["--quiet", "--no-tags", "--no-write-fetch-head", *(["--prune"] if prune else [])]
        await self._remote("fetch", *words, words=specs)

    async def _push(self, *leases: str, specs: Sequence[str]) -> None:
        await self._remote("push", "--quiet", "--no-verify", "--atomic", *leases, words=specs)

    async def _remote(
        self, command: str, *options: str, words: Sequence[str], seconds: float = 900
    ) -> bytes:
        way = transport(self._url, CREDENTIALS, self._credentials)
        return await git(
            command,
            *options,
            *(way.push if command == "push" else way.fetch),
            self._url,
            *words,
            # A mirror that does not exist yet can be asked for.
            git_dir=None if command == "ls-remote" else self._path,
            env=way.env,
            config=way.config,
            protocol=way.protocol,
            seconds=seconds,
        )


def _spec(move: Move) -> str:
    """Return a push's refspec; a lease forces by itself, and `+` would turn it off."""
    if move.new == ABSENT:
        return f":{move.ref}"
    return f"{'+' if move.old is None else ''}{move.new}:{move.ref}"
