"""Collection of a store: what agents left there is removed when nothing needs it.

Agents' work on a task is the refs of the task, with what they named before and the results of
actions. Stories' branches stay: they are what the stories were for.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from temporalio.exceptions import ApplicationError

from activities.workspace.errors import store_errors
from activities.workspace.git import git
from activities.workspace.refs import ABSENT, BEGINNING, Move, time_of
from activities.workspace.store import Store
from workflows.models.errors import ErrorType

BASES = "refs/fleet-bases/"
KINDS = (
    "refs/fleet/",
    "refs/fleet-old/",
    "refs/fleet-results/",
    "refs/fleet-merged/",
    "refs/fleet-left/",
)

_UNFINISHED_SECONDS = 24 * 3_600
_GC_SECONDS = 3_600


@dataclass
class Work:
    """What the store has of a task.

    Attributes:
        story: the story, as a part of a ref (`workflows.models.ids.ref_part`).
        task: the task, as a part of a ref; empty: former heads of the story's branch.
        refs: each ref with its value.
        latest: the latest commit's time; BEGINNING if nothing was committed.
    """

    story: str
    task: str
    refs: dict[str, str] = field(default_factory=dict)
    latest: datetime = BEGINNING


async def collect(
    store: Store, before: datetime, known: Callable[[Work], Awaitable[bool]]
) -> list[str]:
    """Remove work that is old and belongs to nothing known, and the results of old bases.

    It may be repeated, and run while others work in the store: a ref that has moved since it was
    read stays, with all of its task.

    Args:
        store: the store.
        before: work whose latest commit is from then or later stays.
        known: whether work belongs to a workflow that is open, or can still be looked at.

    Returns:
        The refs that were removed.
    """
    removed: list[str] = []
    for work in await works(store):
        if work.latest < before and not await known(work):
            removed += await _removed(store, work.refs)
    removed += await _removed(store, await _old_bases(store, before))
    with store_errors():
        await asyncio.to_thread(_remove_unfinished, store.path)
        # What a step writes now has no ref yet: a day is more than a step takes.
        await git("gc", "--quiet", "--prune=1.day.ago", git_dir=store.path, seconds=_GC_SECONDS)
    return removed


async def works(store: Store) -> list[Work]:
    """Return all work that the store has, by story and task."""
    found: dict[tuple[str, str], Work] = {}
    for ref, value, at in await store.refs.below(*KINDS):
        kind, story, task = (*ref.split("/")[1:4],)
        key = (story, "" if kind == "fleet-left" else task)
        work = found.setdefault(key, Work(*key))
        work.refs[ref] = value
        work.latest = max(work.latest, at)
    return list(found.values())


async def _old_bases(store: Store, before: datetime) -> dict[str, str]:
    """Return the results of bases that no branch of the project is at, and that are old.

    They are a cache: a base that is needed again is measured again.
    """
    bases: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for ref, value, _ in await store.refs.below(BASES):
        bases[ref.removeprefix(BASES).partition("/")[0]][ref] = value
    current = {value for _, value, _ in await store.refs.below("refs/base/")}
    old: dict[str, str] = {}
    await store.refs.hold(*(bases.keys() - current))
    for commit in bases.keys() - current:
        if await _committed_at(store, commit) < before:
            old |= bases[commit]
    return old


async def _committed_at(store: Store, commit: str) -> datetime:
    words = ("rev-list", "--max-count=1", "--no-commit-header", "--format=%ct", commit, "--")
    try:
        with store_errors():
            return time_of((await git(*words, git_dir=store.path)).decode())
    except ApplicationError as error:
        if error.type != ErrorType.NOT_FOUND:
            raise
        return BEGINNING


async def _removed(store: Store, refs: dict[str, str]) -> list[str]:
    """Remove refs that have these values, all of them or none; return those that are removed."""
    if not refs:
        return []
    done = await store.refs.move(*(Move(ref, ABSENT, value) for ref, value in refs.items()))
    return list(refs) if done else []  # else it is worked on


def _remove_unfinished(store: Path) -> None:
    """Remove what workers left that died while they made this store."""
    for path in store.parent.glob(f".{store.stem}.*"):
        if time.time() - path.stat().st_mtime > _UNFINISHED_SECONDS:
            shutil.rmtree(path)
