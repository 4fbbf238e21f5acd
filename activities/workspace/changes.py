"""What the fleet knows of an agent's commit by itself: its diff, its checks, its measurement."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from activities.checks.sandbox import Sandbox
from activities.workspace.added_lines import ChangeChecks
from activities.workspace.base_results import BaseResultsOf
from activities.workspace.changed_tests import notes_on_tests
from activities.workspace.measuring import measure, measure_base, not_measured
from activities.workspace.preparing import PreparationFailed, prepare
from activities.workspace.reports import workspace_report
from activities.workspace.store import CUT, DIFF_BYTES, Store
from activities.workspace.stores import Stores
from activities.workspace.trees import Trees
from workflows.models.changes import MeasuredChange, MeasureInput
from workflows.models.deliberation import Check
from workflows.models.errors import ErrorType, application_error
from workflows.models.measurement import BaseResults, CoverageResult, Measurement
from workflows.models.workspace import Change, ChangedFile, Repository

SHOWN_BYTES = 16 * 1024
SHOWN_CONTEXT = 8
"""Of the diff that critics and judges read: its size, and the lines around each change."""


class Changes:
    """Measures commits of stores against their bases."""

    def __init__(
        self, stores: Stores, trees: Trees, prepared: Path, checks: ChangeChecks, sandbox: Sandbox
    ) -> None:
        """Set the folders.

        Args:
            stores: the repositories' stores.
            trees: where commits are checked out.
            prepared: the cache of prepared dependencies.
            checks: of what a commit adds.
            sandbox: limits how many commands run at once.
        """
        self._stores = stores
        self._trees = trees
        self._prepared = prepared
        self._checks = checks
        self._sandbox = sandbox
        self._bases: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def measured(self, request: MeasureInput) -> MeasuredChange:
        """Return the change from the base to a commit, with its checks and its measurement.

        Raises:
            ApplicationError: the errors of the store; `PreparationFailed`, not retryable, if the
                base's own dependencies cannot be prepared.
            CannotRun, MissingToolchain: commands cannot be run on this worker.
        """
        store = await self._stores.of(request.repository, request.base, request.commit)
        base, commit = request.base, request.commit
        files = await store.changed(base, commit)
        diff = await whole_diff(store, base, commit)
        if files:
            measurement = await self._measurement(request, store, diff)
        else:
            measurement = not_measured("it changes nothing", commit, base)
        shown = await store.diff(base, commit, context=SHOWN_CONTEXT, limit=SHOWN_BYTES)
        return MeasuredChange(
            change=change_of(base, commit, files),
            diff=shown,
            checks=await self._checked(request, files, diff),
            measurement=measurement,
            report=workspace_report(
                measurement,
                job_id=commit,
                project=request.repository.key,
                notes=notes_on_tests(files, measurement, request.repository.test_paths),
            ),
        )

    async def _checked(
        self, request: MeasureInput, files: list[ChangedFile], diff: str | None
    ) -> list[Check]:
        touched = [path for file in files for path in (file.path, file.old_path) if path]
        return await self._checks.made(
            request.repository, diff, touched, request.paths, request.task
        )

    async def _measurement(
        self, request: MeasureInput, store: Store, diff: str | None
    ) -> Measurement:
        repository = request.repository
        base = await self._base_results(request, store)
        async with self._trees.at(store, request.commit, key=f"measured/{request.commit}") as tree:
            try:
                prepared = await self._prepare(request, store, tree)
            except PreparationFailed as failed:
                return not_measured(str(failed), request.commit, request.base)
            found = await measure(
                repository,
                tree,
                base,
                diff=diff or "",
                commit=request.commit,
                prepared=prepared,
                sandbox=self._sandbox,
            )
        if diff is None:
            too_long = f"the diff is longer than {DIFF_BYTES:,} bytes; make a smaller change"
            unknown = CoverageResult(not_measured=too_long)
            return found.model_copy(update={"coverage": unknown})
        return found

    async def _prepare(self, request: MeasureInput, store: Store, tree: Path) -> Path | None:
        """Prepare a change's tree.

        Raises:
            PreparationFailed: the base can be prepared, so the change is to blame.
            ApplicationError: `PreparationFailed`: the base cannot be prepared either.
        """
        repository = request.repository
        with suppress(PreparationFailed):
            return await prepare(repository, tree, self._prepared, sandbox=self._sandbox)
        async with self._trees.at(store, request.base, key=f"measured/{request.base}") as base:
            await self._prepare_base(repository, base)
        return await prepare(repository, tree, self._prepared, sandbox=self._sandbox)

    async def _prepare_base(self, repository: Repository, tree: Path) -> Path | None:
        try:
            return await prepare(repository, tree, self._prepared, sandbox=self._sandbox)
        except PreparationFailed as failed:
            raise application_error(ErrorType.PREPARATION_FAILED, str(failed)) from failed

    async def _base_results(self, request: MeasureInput, store: Store) -> BaseResults:
        """Return the base's results; complete ones are measured once for all changes of it."""
        kept = BaseResultsOf(store, request.repository, request.base)
        async with self._bases[kept.ref]:
            found = await kept.read()
            if found is None:
                found = await self._measured_base(request, store)
                if found.complete:
                    await kept.keep(found)
        return found

    async def _measured_base(self, request: MeasureInput, store: Store) -> BaseResults:
        repository = request.repository
        async with self._trees.at(store, request.base, key=f"measured/{request.base}") as tree:
            prepared = await self._prepare_base(repository, tree)
            return await measure_base(
                repository, tree, commit=request.base, prepared=prepared, sandbox=self._sandbox
            )


async def whole_diff(store: Store, base: str, commit: str) -> str | None:
    """Return the diff between two commits without context; None if it is too long."""
    diff = await store.diff(base, commit, context=0, limit=DIFF_BYTES)
    return None if f"\n{CUT}" in diff[-100:] else diff


def change_of(base: str, commit: str, files: list[ChangedFile]) -> Change:
    """Return a change with its counts.

    Args:
        base: what it is compared with.
        commit: its last commit.
        files: what the commit changes.
    """
    return Change(
        commit=commit,
        base=base,
        files=files,
        insertions=sum(file.insertions for file in files),
        deletions=sum(file.deletions for file in files),
    )
