"""The activities of the process `workspace`: work in a repository, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.checks.sandbox import CannotRun
from activities.workspace.actions import Actions
from activities.workspace.changes import Changes
from activities.workspace.outline import outline_of
from activities.workspace.repositories import find_repository, is_imported
from activities.workspace.store import Store
from activities.workspace.stores import Stores
from activities.workspace.toolchains import MissingToolchain
from workflows.models.changes import MeasuredChange, MeasureInput
from workflows.models.errors import ErrorType, application_error
from workflows.models.implementation import (
    ActionResult,
    RunActionInput,
    WorkQuery,
    WorkStart,
)
from workflows.models.workspace import Repository
from workflows.stubs import WorkspaceStub


class Workspaces(WorkspaceStub):
    """Work in the repositories of repositories.yaml, by one worker among others."""

    def __init__(
        self,
        repositories: Mapping[str, Repository],
        stores: Stores,
        actions: Actions,
        changes: Changes,
    ) -> None:
        """Create the activities.

        Args:
            repositories: key -> entry.
            stores: the repositories' stores.
            actions: carries out actions in working trees.
            changes: measures commits.
        """
        self._repositories = repositories
        self._stores = stores
        self._actions = actions
        self._changes = changes

    @activity.defn
    async def begin_work(self, query: WorkQuery) -> WorkStart:
        repository = self._entry(query.repository)
        store = await self._stores.of(repository, *filter(None, (query.base, query.head)))
        base = await known_commit(store, query.base)
        head = await known_commit(store, query.head or base)
        return WorkStart(
            repository=repository,
            base=base,
            head=head,
            outline=await outline_of(store, head, query.paths, repository.open_paths),
            changed=await store.changed(base, head),
        )

    @activity.defn
    async def run_action(self, request: RunActionInput) -> ActionResult:
        entry = self._entry(request.repository)
        with sandbox_errors():
            return await self._actions.carry_out(request.model_copy(update={"repository": entry}))

    @activity.defn
    async def measure_change(self, request: MeasureInput) -> MeasuredChange:
        entry = self._entry(request.repository)
        store = await self._stores.of(entry, *filter(None, [request.base]))
        base = await known_commit(store, request.base)
        with sandbox_errors():
            return await self._changes.measured(
                request.model_copy(update={"repository": entry, "base": base})
            )

    def _entry(self, asked: Repository | str) -> Repository:
        return pinned_entry(self._repositories, self._stores, asked)


def pinned_entry(
    repositories: Mapping[str, Repository], stores: Stores, asked: Repository | str
) -> Repository:
    """Return the pinned entry, at the URL that the fleet has for its key.

    Args:
        repositories: key -> entry.
        stores: has the repositories that `fleet eval` imported.
        asked: an entry, or its key.

    Raises:
        ApplicationError: `UnknownRepository`.
    """
    if isinstance(asked, str):
        return find_repository(repositories, asked)
    if is_imported(asked.key):
        return asked.model_copy(update={"url": stores.imported_url(asked.key)})
    entry = find_repository(repositories, asked.key)
    return asked.model_copy(update={"url": entry.url})


async def known_commit(store: Store, commit: str | None) -> str:
    """Return the commit, if the store has it; None: the head of the base branch.

    Raises:
        ApplicationError: `NotFound`.
    """
    if commit and await has(store, commit):
        return commit
    latest = await store.base_commit()  # the store may have fetched it only now
    if commit and not await has(store, commit):
        raise application_error(
            ErrorType.NOT_FOUND,
            f"commit {commit} is not found in the store; give a commit of the base branch or of "
            "work of the fleet, in full",
        )
    return commit or latest


async def has(store: Store, commit: str) -> bool:
    """Return whether the store has a commit."""
    try:
        await store.changed(commit, commit)
    except ApplicationError as error:
        if error.type != ErrorType.NOT_FOUND:
            raise
        return False
    return True


@contextmanager
def sandbox_errors() -> Iterator[None]:
    """Raise what keeps commands from running as ApplicationErrors, which are retried."""
    try:
        yield
    except (CannotRun, MissingToolchain) as error:
        raise application_error(ErrorType.NO_SANDBOX, str(error)) from error
