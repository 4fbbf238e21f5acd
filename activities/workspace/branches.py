"""Activities on stories' branches: pinned at a start, merged, and delivered."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.workspace.conflicts import merged_base
from activities.workspace.errors import store_errors
from activities.workspace.git import git
from activities.workspace.refs import Move
from activities.workspace.repositories import find_repository
from activities.workspace.store import Store
from activities.workspace.stores import Stores
from workflows.models.branches import (
    BaseNow,
    BaseQuery,
    BranchPoint,
    BranchQuery,
    BranchSize,
    BranchSpan,
    MergeAnswer,
    MergedBase,
    MergeRequest,
    PinnedRepository,
    PinQuery,
)
from workflows.models.errors import ErrorType, application_error
from workflows.models.ids import ref_part, story_branch
from workflows.models.workspace import Conflict, Repository
from workflows.rules.common_globs import TooManyGlobs, common
from workflows.rules.paths import allowed, glob_problem
from workflows.stubs import BranchStub

PIN_ATTEMPTS = 4
"""After these, a start is refused if its repository does not answer: a few seconds."""


class Branches(BranchStub):
    """The branches of stories in the repositories of repositories.yaml."""

    def __init__(self, repositories: Mapping[str, Repository], stores: Stores) -> None:
        """Create the activities. `repositories`: key -> entry."""
        self._repositories = repositories
        self._stores = stores

    @activity.defn
    async def pin_repository(self, query: PinQuery) -> PinnedRepository:
        repository = find_repository(self._repositories, query.repository)
        for glob in query.paths:
            if problem := glob_problem(glob):
                raise application_error(
                    ErrorType.INVALID_INPUT, f"paths: {glob[:100]!r}: {problem}"
                )
        try:
            store = await self._stores.of(repository)
            base = await store.base_commit()
        except ApplicationError as error:
            if error.type == ErrorType.REPOSITORY_AWAY and activity.info().attempt >= PIN_ATTEMPTS:
                raise ApplicationError(
                    error.message, type=error.type, non_retryable=True
                ) from error
            raise
        return PinnedRepository(
            repository=repository,
            base=base,
            unmatched=await unmatched(store, base, query.paths, repository),
            tests=await asyncio.to_thread(globs_of, "test_paths", query.paths, repository),
            docs=await asyncio.to_thread(globs_of, "docs_paths", query.paths, repository),
        )

    @activity.defn
    async def place_branch(self, point: BranchPoint) -> None:
        store = await self._store(point, point.commit)
        await place(store, point.story_id, point.commit)

    @activity.defn
    async def branch_head(self, query: BranchQuery) -> str:
        store = await self._store(query)
        return await store.head(query.story_id) or ""

    @activity.defn
    async def merge_change(self, request: MergeRequest) -> MergeAnswer:
        story_id = request.story_id
        store = await self._store(request, request.head, request.commit)
        now = await store.head(story_id)
        if now and await is_merge_of(store, now, request.head, request.commit):
            return MergeAnswer(head=now)  # an attempt before this one made it
        await place(store, story_id, request.head)
        message = request.message or f"Merge {request.task_id}"
        merged = await store.merge(story_id, request.commit, at=request.at, message=message)
        if isinstance(merged, Conflict):
            return MergeAnswer(head=merged.head, conflict=merged.files)
        return MergeAnswer(head=merged.commit)

    @activity.defn
    async def base_now(self, query: BaseQuery) -> BaseNow:
        store = await self._store(query, query.base)
        commit = await store.base_commit()
        with store_errors():
            words = ("rev-list", "--count", f"{query.base}..{commit}", "--")
            counted = await git(*words, git_dir=store.path)
        return BaseNow(commit=commit, commits=int(counted))

    @activity.defn
    async def merged_base(self, request: MergeRequest) -> MergedBase:
        store = await self._store(request, request.head, request.commit)
        return await merged_base(store, request)

    @activity.defn
    async def branch_size(self, span: BranchSpan) -> BranchSize:
        store = await self._store(span, span.base, span.commit)
        files = await store.changed(span.base, span.commit)
        return BranchSize(
            files_changed=len(files),
            insertions=sum(file.insertions for file in files),
            deletions=sum(file.deletions for file in files),
        )

    @activity.defn
    async def push_branch(self, point: BranchPoint) -> None:
        store = await self._store(point)
        await store.push(point.story_id, point.commit)

    async def _store(self, query: BranchQuery, *commits: str) -> Store:
        return await self._stores.of(self._entry(query), *commits)

    def _entry(self, query: BranchQuery) -> Repository:
        """Return the pinned entry, at the URL that the fleet has for its key."""
        entry = find_repository(self._repositories, query.repository.key)
        return query.repository.model_copy(update={"url": entry.url})


def globs_of(field: str, paths: list[str], repository: Repository) -> list[str]:
    """Return the globs that a field of the entry and a story's paths have in common.

    Raises:
        ApplicationError: `InvalidInput`: there are too many.
    """
    of_the_entry: list[str] = getattr(repository, field)
    try:
        return common(paths, of_the_entry) if paths else of_the_entry
    except TooManyGlobs as error:
        raise application_error(
            ErrorType.INVALID_INPUT,
            f"paths: with the `{field}` of the repository, {error}; write fewer or simpler globs",
        ) from error


async def unmatched(
    store: Store, commit: str, globs: list[str], repository: Repository
) -> list[str]:
    """Return the globs that no file of a commit matches which the story may change."""
    if not globs:
        return []
    files = [file.path for file in await store.outline(commit)]
    return await asyncio.to_thread(_unmatched, files, globs, repository.open_paths)


def _unmatched(files: list[str], globs: list[str], open_paths: list[str]) -> list[str]:
    return [glob for glob in globs if not any(allowed(path, [glob], open_paths) for path in files)]


async def place(store: Store, story_id: str, commit: str) -> None:
    """Let a story's branch be at a commit.

    What it names otherwise is work of an earlier run under this id, of a plan that was stopped, or
    of a history that was reset. It stays under `refs/fleet-left/`.
    """
    branch = story_branch(story_id)
    while (now := await store.head(story_id)) != commit:
        if now is None:
            await store.start_branch(story_id, commit)
            continue
        left = f"refs/fleet-left/{ref_part(story_id)}/{now}"
        await store.refs.move(Move(left, now), Move(f"refs/heads/{branch}", commit, now))


async def is_merge_of(store: Store, commit: str, head: str, change: str) -> bool:
    """Return whether a commit is what a merge of `change` into `head` makes."""
    if commit == change:
        return await store.contains(change, head)
    with store_errors():
        words = ("rev-list", "--parents", "--max-count=1", commit, "--")
        found = (await git(*words, git_dir=store.path)).decode().split()
    return found[1:] == [head, change]
