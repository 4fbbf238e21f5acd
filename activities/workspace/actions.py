"""Actions of agents: what each does to a working tree, and the commit of what it changed.

An action runs once. Its result is kept in the store before the agent's ref moves to its commit, and
a repetition, after a crash or a lost answer, returns it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from temporalio.exceptions import ApplicationError

from activities.checks.sandbox import Sandbox
from activities.workspace import edits
from activities.workspace.errors import store_errors
from activities.workspace.git import git
from activities.workspace.git_output import shown
from activities.workspace.kept_results import (
    KeptResult,
    KeptResults,
    move_agent,
    next_step,
    request_hash,
)
from activities.workspace.metrics import count_action
from activities.workspace.preparing import PreparationFailed, prepare
from activities.workspace.sandbox import run_in_project
from activities.workspace.store import Store
from activities.workspace.stores import Stores
from activities.workspace.toolchains import toolchain
from activities.workspace.trees import Trees, discard
from workflows.models.base import Model
from workflows.models.errors import ErrorType, application_error
from workflows.models.implementation import (
    ActionResult,
    Finish,
    ReplaceText,
    RunActionInput,
    RunCommand,
    WriteFile,
)
from workflows.rules import paths
from workflows.rules.transcript import headline

SUBJECT_CHARACTERS = 72
PATHS_NAMED = 10
"""Paths that an observation names."""


class Outcome(Model):
    """What an action did to the tree. `kept`: False if its changes are not committed."""

    exit_code: int | None = None
    stopped: str = ""
    observation: str = ""
    kept: bool = True


class Actions:
    """Carries out actions on commits of stores."""

    def __init__(self, stores: Stores, trees: Trees, prepared: Path, sandbox: Sandbox) -> None:
        """Set the folders.

        Args:
            stores: the repositories' stores.
            trees: where commands run.
            prepared: the cache of prepared dependencies.
            sandbox: limits how many commands run at once.
        """
        self._stores = stores
        self._trees = trees
        self._prepared = prepared
        self._sandbox = sandbox

    async def carry_out(self, request: RunActionInput) -> ActionResult:
        """Carry out an action, commit what it changed, and move the agent's ref to the commit.

        Raises:
            ApplicationError: the errors of the store; `PreparationFailed`, not retryable.
            CannotRun, MissingToolchain: commands cannot be run on this worker.
        """
        store = await self._stores.of(request.repository, request.base, request.parent)
        results, asked = KeptResults(store, request.trailers), request_hash(request)
        kept, stepped = await results.read(), False
        if kept is None or kept.asked != asked:
            result = await self._acted(request, store)
            count_action(request.action.action, result)
            made = KeptResult(asked=asked, result=result)
            kept, stepped = await results.keep(made, next_step(request, result.commit))
        if not stepped:
            await move_agent(store, request.trailers, request.parent, kept.result.commit)
        return kept.result

    async def _acted(self, request: RunActionInput, store: Store) -> ActionResult:
        """Return the result of the action, with its commit, which no ref names yet."""
        key = f"{request.trailers.task}/{request.trailers.agent}"
        commit, note = request.parent, ""
        async with self._trees.at(store, request.parent, key=key) as tree:
            outcome = await self._outcome(request, store, tree)
            if outcome.kept:
                commit, note = await self._committed(store, tree, request)
        return ActionResult(
            exit_code=outcome.exit_code,
            stopped=outcome.stopped,
            observation=outcome.observation + note,
            commit=commit,
            changed=[] if commit == request.base else await store.changed(request.base, commit),
        )

    async def _committed(
        self, store: Store, tree: Path, request: RunActionInput
    ) -> tuple[str, str]:
        """Return the commit of a tree, and what the agent reads about changes that are undone."""
        try:
            made, note = await committed(store, tree, request)
        except ApplicationError as error:
            if error.type != ErrorType.TREE_REFUSED:
                raise
            return request.parent, f"\n[all changes are undone: {error.message}]"
        self._trees.note(tree, made)
        return made, note

    async def _outcome(self, request: RunActionInput, store: Store, tree: Path) -> Outcome:
        """Do in the tree what the action says."""
        action = request.action
        match action:
            case RunCommand(command=command):
                return await self._ran(command, request, tree)
            case WriteFile(path=path) | ReplaceText(path=path):
                if problem := (await path_rules(store, request))(path):
                    note = f"nothing was changed: {path}: {problem}"
                    return Outcome(observation=note, kept=False)
                return await asyncio.to_thread(_edited, action, tree)
            case Finish():
                return Outcome(kept=False)

    async def _ran(self, command: str, request: RunActionInput, tree: Path) -> Outcome:
        repository = request.repository
        try:
            prepared = await prepare(repository, tree, self._prepared, sandbox=self._sandbox)
        except PreparationFailed as failed:
            if request.parent == request.base:
                raise application_error(ErrorType.PREPARATION_FAILED, str(failed)) from failed
            # The agent has changed what the set-up command reads.
            return Outcome(observation=f"the command was not run: {failed}", kept=False)
        run = await run_in_project(
            command,
            tree,
            limits=repository.limits,
            toolchain=toolchain(repository.image),
            prepared=prepared,
            sandbox=self._sandbox,
        )
        if run.stopped:
            note = f"{run.output}\n[it was stopped, and its changes are undone]".lstrip("\n")
            return Outcome(stopped=run.stopped, observation=note, kept=False)
        return Outcome(exit_code=run.exit_code, observation=run.output)


def _edited(action: WriteFile | ReplaceText, tree: Path) -> Outcome:
    try:
        if isinstance(action, WriteFile):
            done = edits.write(tree, action.path, action.content)
        else:
            done = edits.replace(tree, action.path, action.old, action.new)
    except edits.EditRefused as refused:
        return Outcome(observation=str(refused), kept=False)
    return Outcome(observation=done)


# --- commits --------------------------------------------------------------------------------------


async def committed(store: Store, tree: Path, request: RunActionInput) -> tuple[str, str]:
    """Commit a tree without changes to other paths than the request allows.

    Returns:
        The commit, and what the agent reads about changes that are undone.

    Raises:
        ApplicationError: TreeRefused.
    """
    made = await _commit(store, tree, request, brought=True)
    foreign = await foreign_paths(store, request, made)
    if foreign:
        await undo(store, tree, request.parent, foreign)
        made = await _commit(store, tree, request, brought=False)
    return made, undone_note(foreign)


async def _commit(store: Store, tree: Path, request: RunActionInput, *, brought: bool) -> str:
    action = request.action
    return await store.make_commit(
        tree,
        parent=request.parent,
        message=headline(request.action, SUBJECT_CHARACTERS),
        trailers=request.trailers,
        at=request.at,
        brought=brought,
        written=action.path if isinstance(action, WriteFile | ReplaceText) else "",
    )


async def path_rules(store: Store, request: RunActionInput) -> Callable[[str], str]:
    """Return the rule that says why a path may not be changed; empty if it may.

    What exists may be changed whatever its name is.
    """
    return await asyncio.to_thread(_path_rules, await store.listing(request.parent), request)


def _path_rules(
    found: Sequence[tuple[str, bytes]], request: RunActionInput
) -> Callable[[str], str]:
    kinds = {path: kind for kind, path in found}
    open_paths = request.repository.open_paths
    problem_of_new = partial(
        paths.path_problem,
        paths=request.paths,
        open_paths=open_paths,
        existing=paths.spellings(shown(path) for path in kinds),
        links={shown(path) for path, kind in kinds.items() if kind == "link"},
    )

    def problem_of(path: str) -> str:
        match kinds.get(os.fsencode(path)):
            case None:
                return problem_of_new(path)
            case "submodule":
                return "it is a submodule, which stays as it is"
            case _:
                return paths.rule_problem(path, request.paths, open_paths)

    return problem_of


async def foreign_paths(store: Store, request: RunActionInput, commit: str) -> dict[bytes, str]:
    """Return the changed paths that the request does not allow, and why.

    If a file was moved to such a path, the one from which it was moved is among them.
    """
    if commit == request.parent:
        return {}
    changes = await store.changed_paths(request.parent, commit)
    problem_of = await path_rules(store, request) if changes else str
    foreign = await asyncio.to_thread(_foreign, changes, problem_of)
    if foreign:
        names = {shown(name): name for name in changes}
        for file in await store.changed(request.parent, commit):
            if file.old_path and names[file.path] in foreign:
                foreign.setdefault(names[file.old_path], f"its move to {file.path} is undone")
    return foreign


def _foreign(changes: Iterable[bytes], problem_of: Callable[[str], str]) -> dict[bytes, str]:
    found = ((name, problem_of(os.fsdecode(name))) for name in changes)
    return {name: problem for name, problem in found if problem}


async def undo(store: Store, tree: Path, commit: str, foreign: Collection[bytes]) -> None:
    """Restore paths of a tree as they are in a commit.

    Args:
        store: has the commit.
        tree: in which no command runs any more.
        commit: the state to restore.
        foreign: what the tree changes.
    """
    known = {path for _, path in await store.listing(commit)}
    restored = sorted(known.intersection(foreign))
    await asyncio.to_thread(_remove, tree, foreign, known)
    with store_errors(), TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        await git("read-tree", commit, git_dir=store.path, index=index)
        await git(
            *("checkout-index", "--force", "-z", "--stdin"),
            git_dir=store.path,
            work_tree=tree,
            index=index,
            stdin=b"".join(path + b"\0" for path in restored),
        )


def _remove(tree: Path, foreign: Iterable[bytes], known: Collection[bytes]) -> None:
    """Remove files from a tree; of a path that is restored, also a folder that has its name."""
    for path in foreign:
        name = Path(os.fsdecode(path))
        if any((tree / above).is_symlink() for above in name.parents):
            continue  # the file is elsewhere; git replaces the link if the path is restored
        file = tree / name
        with suppress(FileNotFoundError, NotADirectoryError):
            if path in known or not file.is_dir() or file.is_symlink():
                discard(file)


def undone_note(foreign: Mapping[bytes, str]) -> str:
    """Return what the agent reads of changes to paths that it may not change."""
    if not foreign:
        return ""
    lines = [
        f"{path.decode(errors='backslashreplace')}: {problem}"
        for path, problem in list(foreign.items())[:PATHS_NAMED]
    ]
    if len(foreign) > PATHS_NAMED:
        lines.append(f"and {len(foreign) - PATHS_NAMED} more")
    return "\n[these changes are undone]\n" + "\n".join(lines)
