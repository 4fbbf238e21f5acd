"""Prepared dependencies: a repository's set-up command, run once for the same lock files.

It runs in the sandbox, with the network, on a copy of the tree. What stays is what it wrote to
$PREPARED and the dependency folders that it made in the tree; commands see both read-only.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import mkdtemp

from activities.checks.disk import measure_folders
from activities.checks.sandbox import Sandbox
from activities.workspace.sandbox import DEPENDENCIES, run_in_project
from activities.workspace.toolchains import Toolchain, toolchain
from activities.workspace.tree_copies import copy_tree
from workflows.models.workspace import CommandRun, Repository

LOCK_FILES = (
    *("uv.lock", "poetry.lock", "pdm.lock", "Pipfile.lock", "pyproject.toml", "setup.py"),
    *("setup.cfg", "package.json", "package-lock.json", "npm-shrinkwrap.json", "yarn.lock"),
    *("pnpm-lock.yaml", "go.mod", "go.sum", "go.work", "go.work.sum"),
)
"""Files of which a change means another preparation, as are requirements*.txt."""

MAX_LOCK_FILES = 1_000
MAX_LOCK_BYTES = 32 * 1024 * 1024

CACHE_BYTES = 20 * 1024**3
"""How much space prepared dependencies take; those that were not used longest go first."""

_USED_FOR_S = 3_600
"""How long prepared dependencies stay at least after a use, beyond a command's time."""

_ASKED_EVERY_S = 0.1


class PreparationFailed(Exception):
    """The set-up command failed, or what it left cannot be used; the message has the reason."""


async def prepare(
    repository: Repository,
    tree: Path,
    cache: Path,
    *,
    sandbox: Sandbox | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Path | None:
    """Return the folder of a tree's prepared dependencies; None without a set-up command.

    Workers that share the cache prepare the same thing once.

    Args:
        repository: its set-up command, tool chain and limits.
        tree: has the lock files; it is copied, and never changed.
        cache: the folder of all preparations on this machine.
        sandbox: limits how many commands run at once; None: a new one.
        cache_bytes: how much space the cache may take.

    Raises:
        PreparationFailed: the set-up command failed, with the end of its output.
        MissingToolchain: the tool chain is not installed.
        CannotRun: the sandbox is not available on this machine.
    """
    if not repository.setup:
        return None
    chain = toolchain(repository.image)
    key = await asyncio.to_thread(preparation_key, repository, tree)
    await asyncio.to_thread(cache.mkdir, parents=True, exist_ok=True)
    ready = cache / key
    async with _locked(cache / f"{key}.lock"):
        if not ready.is_dir():
            await _make(repository, tree, chain, ready, sandbox)
        os.utime(ready)
    in_use_s = _USED_FOR_S + repository.limits.seconds
    await asyncio.to_thread(_make_room, cache, key, cache_bytes, in_use_s)
    return ready


def preparation_key(repository: Repository, tree: Path) -> str:
    """Return a hash of all that a preparation depends on: command, tool chain and lock files.

    Raises:
        PreparationFailed: the tree has too many lock files, or they are too large.
    """
    digest = hashlib.sha256(f"{repository.setup}\0{repository.image}\0".encode())
    size = 0
    for number, file in enumerate(sorted(_lock_files(tree))):
        content = file.read_bytes() if file.stat().st_size <= MAX_LOCK_BYTES else b""
        size += file.stat().st_size
        if number >= MAX_LOCK_FILES or size > MAX_LOCK_BYTES:
            raise PreparationFailed(
                f"set-up: more than {MAX_LOCK_FILES} lock files, or more than {MAX_LOCK_BYTES} "
                "bytes in them; remove some"
            )
        name = os.fsencode(file.relative_to(tree))
        digest.update(b"%d %s %d " % (len(name), name, len(content)) + content)
    return digest.hexdigest()[:32]


def _lock_files(tree: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(tree):
        folders[:] = [name for name in folders if name not in DEPENDENCIES and name != ".git"]
        for name in names:
            file = Path(parent, name)
            known = name in LOCK_FILES or (
                name.startswith("requirements") and file.suffix == ".txt"
            )
            if known and stat.S_ISREG(file.lstat().st_mode):
                yield file


def _is_lock_file(name: str) -> bool:
    return name in LOCK_FILES or (name.startswith("requirements") and name.endswith(".txt"))


@contextlib.asynccontextmanager
async def _locked(file: Path) -> AsyncIterator[None]:
    """Hold a lock that the system releases when this process ends."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            await asyncio.sleep(_ASKED_EVERY_S)
        yield
    finally:
        os.close(descriptor)


async def _make(
    repository: Repository, tree: Path, chain: Toolchain, ready: Path, sandbox: Sandbox | None
) -> None:
    """Run the set-up command, and move its result to `ready` at once."""
    scratch = Path(mkdtemp(prefix="making-", dir=ready.parent))
    try:
        copy, made = scratch / "tree", scratch / "prepared"
        await asyncio.to_thread(copy_tree, tree, copy)
        before = {name for name in DEPENDENCIES if (copy / name).exists()}
        (made / "packages").mkdir(parents=True)
        run = await run_in_project(
            repository.setup,
            copy,
            limits=repository.limits,
            toolchain=chain,
            prepared=made,
            preparing=True,
            network=True,
            sandbox=sandbox,
            environment=chain.preparing,
        )
        if not run.ok:
            raise PreparationFailed(_failure(run))
        await asyncio.to_thread(_keep, copy, made, before)
        made.rename(ready)
    finally:
        await asyncio.to_thread(shutil.rmtree, scratch, True)


def _failure(run: CommandRun) -> str:
    ended = run.stopped or f"it ended with exit code {run.exit_code}"
    tail = " | ".join(line.strip() for line in run.output.splitlines() if line.strip())[-600:]
    return f"set-up: {ended}: {tail}"


def _keep(copy: Path, made: Path, before: set[str]) -> None:
    """Move the dependencies that the command made in the tree to the prepared ones."""
    for link in (each for each in (made / "packages").rglob("*") if each.is_symlink()):
        if not link.resolve().is_relative_to(made.resolve()):
            raise PreparationFailed(
                f"set-up: what it installed cannot be kept: {link.name} links to a file elsewhere; "
                "install a copy"
            )
    (made / "tree").mkdir(exist_ok=True)
    for name in DEPENDENCIES:
        if name not in before and (copy / name).is_dir() and not (copy / name).is_symlink():
            shutil.move(copy / name, made / "tree" / name)
    for path in (made, *made.rglob("*")):
        if not path.is_symlink():  # other users read it
            mode = path.stat().st_mode
            path.chmod(mode | (0o555 if path.is_dir() or mode & 0o100 else 0o444))


def _make_room(cache: Path, used: str, most: int, in_use_s: float) -> None:
    """Remove the preparations that were not used longest, until the others fit."""
    known = [each for each in cache.iterdir() if each.is_dir()]
    ages = {each: time.time() - each.stat().st_mtime for each in known}
    sizes = {each: measure_folders([each]).bytes for each in known}
    total = sum(sizes.values())
    for each in sorted(known, key=lambda each: -ages[each]):
        if total <= most:
            return
        if each.name != used and ages[each] > in_use_s:
            shutil.rmtree(each, ignore_errors=True)
            total -= sizes[each]
