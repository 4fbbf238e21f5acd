"""The commands that show what a story changes in its repository, from the store."""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import typer

from activities.workspace.store import Store
from bridge.executions import require_no_failure
from workers.cli import render
from workers.cli.session import (
    Actor,
    CommandError,
    Json,
    Role,
    StoryId,
    Wide,
    emit,
    handle,
    out,
    person,
    run,
    signed,
)
from workers.cli.snapshot import QUERY_WITHIN, Story
from workers.cli.stories import update
from workers.clients.stores import stores_of
from workers.settings import load
from workflows.models.branches import MergedChange, StoryBranch
from workflows.models.story import Rebase, StoryView
from workflows.models.workspace import Change
from workflows.story import StoryWorkflow

app = typer.Typer(add_completion=False)

Task = Annotated[
    str | None, typer.Option("--task", "-t", help="Only what this task changed.", metavar="TASK")
]


@app.command(epilog="Examples:  fleet diff US-101  ·  fleet diff US-101 --task US-101-plan-1-t1")
def diff(
    story_id: StoryId,
    task: Task = None,
    stat: Annotated[
        bool, typer.Option("--stat", help="Only the files, with their changed lines.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a story changes in its repository, as a diff."""

    async def work() -> None:
        async with opened(story_id) as (branch, store, head):
            span = _span(branch, task) if task else (branch.base, head)
            if as_json or stat:
                change = await _change(store, *span)
                emit(change, render.diff_stat(change), as_json)
                return
            shown = await store.diff(*span)
        # A terminal obeys what a model may have written into a file.
        lines = map(render.plain, shown.splitlines()) if out.is_terminal else [shown.rstrip("\n")]
        for line in lines:
            print(line)

    run(work())


@app.command(epilog="Example:  fleet log US-101")
def log(story_id: StoryId, as_json: Json = False, wide: Wide = False) -> None:
    """List the commits of a story's branch, newest first."""

    async def work() -> None:
        async with opened(story_id) as (branch, store, head):
            commits = await store.log(branch.base, head)
        emit(commits, render.commits(branch.branch, commits), as_json, wide)

    run(work())


@app.command(epilog="Example:  fleet checkout US-101 ./us-101")
def checkout(
    story_id: StoryId,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that does not exist, or is empty.")
    ],
) -> None:
    """Clone a story's branch into a new folder."""

    async def work() -> None:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise CommandError(f"DIR: {directory} is not an empty folder; name a new one")
        async with opened(story_id) as (branch, store, _):
            commit = await store.clone_branch(story_id, directory)
        out.print(render.text(f"{branch.branch} at {commit} is in {directory}"), soft_wrap=True)

    run(work())


@app.command(
    epilog="Examples:  fleet rebase US-101 --role PO  ·  as temporal: temporal workflow update "
    "execute --workflow-id story-US-101 --name rebase --input "
    '\'{"actor": "ana", "role": "PO"}\''
)
def rebase(story_id: StoryId, actor: Actor, role: Role, as_json: Json = False) -> None:
    """Merge the project's base branch into a story's branch.

    The fleet measures the result, and approvals of the old commit become invalid.
    """

    async def decide(story: Story) -> StoryView:
        request = Rebase(actor=person(actor, role), role=role)
        return await story.execute_update(StoryWorkflow.rebase, signed(story.id, request))

    update(story_id, decide, as_json)


@asynccontextmanager
async def opened(story_id: str) -> AsyncIterator[tuple[StoryBranch, Store, str]]:
    """Find a story's branch: what the story knows of it, its store, and its last commit.

    Raises:
        CommandError: the story has no repository, or no branch yet, or the store is elsewhere.
        ApplicationError: the store cannot be read.
    """
    async with handle(story_id) as story:
        branch = await story.query(StoryWorkflow.branch, rpc_timeout=QUERY_WITHIN)
        shown = shlex.quote(story_id)
        if branch is None:
            await require_no_failure(story)
            raise CommandError(
                f"Story {story_id} has no repository: its councils write Markdown. "
                f"`fleet show {shown}` shows what they decided"
            )
        if not branch.head:
            raise CommandError(
                f"Story {story_id} has no branch yet: it is created when the scope is approved. "
                f"`fleet show {shown}` shows the gate"
            )
        settings, key = load(), branch.repository.key
        where = settings.store_server or settings.store_folder
        store = await stores_of(settings).existing(branch.repository)
        if store is None:
            raise CommandError(
                f"The store {where} has no {key}.git: set WORKSPACE_STORE to the folder or git "
                "server that the processes `workspace` use"
            )
        head = await store.head(story_id)
        if head is None:
            raise CommandError(f"{key}.git in {where} has no branch {branch.branch}; was it lost?")
        yield branch, store, head


async def _change(store: Store, base: str, commit: str) -> Change:
    files = await store.changed(base, commit)
    return Change(
        base=base,
        commit=commit,
        files=files,
        insertions=sum(file.insertions for file in files),
        deletions=sum(file.deletions for file in files),
    )


def _span(branch: StoryBranch, task: str) -> tuple[str, str]:
    """Return the commits before and after a task's change, the last one if it was done again."""
    merged: dict[str, MergedChange] = {change.task_id: change for change in branch.merged}
    if task not in merged:
        known = ", ".join(merged) or "none yet; a plan's tasks are known when it has ended"
        raise CommandError(
            f"--task: {task} has no change in {branch.branch}; those with one: {known}"
        )
    return merged[task].base, merged[task].commit
