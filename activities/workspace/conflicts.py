"""The commit on which the author of a change that conflicts works once more."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from activities.workspace.errors import store_errors
from activities.workspace.git import GitFailed, git
from activities.workspace.git_output import shown
from activities.workspace.refs import Move
from activities.workspace.store import Store
from workflows.models.branches import MergedBase, MergeRequest
from workflows.models.ids import ref_part

SHOWN_BYTES = 8 * 1024
"""Of each side's diff that the author reads."""

_ABSENT = "0 " + "0" * 40


async def merged_base(store: Store, request: MergeRequest) -> MergedBase:
    """Return the branch with all of a change that does not conflict, as a commit of both.

    A file that conflicts is there as the branch has it. The commit is a pure function of the
    request, and has a separate ref: its author's next step may be days later.
    """
    head, commit = request.head, request.commit
    with store_errors(what=request.task_id):
        began = await _line(store, "merge-base", head, commit)
        tree, files = await _merged_tree(store, head, commit)
        tree = await _with_files_of(store, head, tree, files) if files else tree
        made = await store.commit_merge(
            tree,
            [head, commit],
            f"Merge {request.task_id} but for its conflicts",
            {"Story": request.story_id, "Task": request.task_id},
            at=request.at,
        )
    work = f"{ref_part(request.story_id)}/{ref_part(request.task_id)}"
    await store.refs.move(Move(f"refs/fleet-merged/{work}/{made}", made))
    names = [shown(file) for file in sorted(files)]
    paths = [os.fsdecode(file) for file in files]
    logged = await store.log(began, commit)
    of_task = [each.trailers for each in logged if each.trailers.get("Task") == request.task_id]
    steps = [trailers.get("Step", "") for trailers in of_task]
    return MergedBase(
        commit=made,
        files=names,
        branch_diff=await store.diff(began, head, paths=paths, limit=SHOWN_BYTES),
        change_diff=await store.diff(began, commit, paths=paths, limit=SHOWN_BYTES),
        steps=max((int(step) for step in steps if step.isdigit()), default=0),
    )


async def _merged_tree(store: Store, head: str, commit: str) -> tuple[str, set[bytes]]:
    """Merge two commits; return the tree, and the files with marks of conflicts in it."""
    words = ("merge-tree", "--write-tree", "-z", "--name-only", "--no-messages")
    try:
        output = await git(*words, head, commit, git_dir=store.path)
    except GitFailed as failure:
        if failure.code != 1:
            raise
        output = failure.output
    tree, *files = output.rstrip(b"\0").split(b"\0")
    return tree.decode(), set(files)


async def _with_files_of(store: Store, head: str, tree: str, files: set[bytes]) -> str:
    """Return a merged tree in which files are as the branch has them.

    Where git made up a name for one, because a file met a folder, it is the branch's own tree.
    """
    ours = await _entries(store, head)
    theirs = {*ours, *(await _entries(store, tree))}
    made_up = {file for file in files if b"~" in file and file not in ours}
    if made_up or not files <= theirs:
        return await _line(store, "rev-parse", f"{head}^{{tree}}")
    lines = b"".join(
        ours.get(file, _ABSENT.encode()) + b"\t" + file + b"\0" for file in sorted(files)
    )
    with TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        await git("read-tree", tree, git_dir=store.path, index=index)
        words = ("update-index", "-z", "--index-info")
        await git(*words, git_dir=store.path, index=index, stdin=lines)
        return (await git("write-tree", git_dir=store.path, index=index)).decode().strip()


async def _entries(store: Store, tree: str) -> dict[bytes, bytes]:
    """Return path -> mode and blob, as an index takes them, of every file."""
    listed = await git("ls-tree", "-r", "-z", "--full-tree", tree, git_dir=store.path)
    return dict(_entry(line) for line in _lines(listed))


def _lines(output: bytes) -> Iterable[bytes]:
    return (line for line in output.split(b"\0") if line)


def _entry(line: bytes) -> tuple[bytes, bytes]:
    about, path = line.split(b"\t", 1)
    mode, _, blob = about.split(b" ")
    return path, mode + b" " + blob


async def _line(store: Store, *words: str) -> str:
    return (await git(*words, git_dir=store.path)).decode().split("\n")[0].strip()
