"""The daily collection of the stores: work that Temporal has forgotten, and that is old.

A story's work stays as long as Temporal knows the story: while it is open, and then for the
namespace's retention. So it stays too if its id is used again. After that, it is removed when
WORKSPACE_KEEP_DAYS have passed since its last commit. The stores of evaluations and of repositories
that have no entry any more are collected like the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

import structlog
from prometheus_client import Counter
from redis.asyncio import Redis
from temporalio.client import Client
from temporalio.exceptions import ApplicationError

from activities.workspace.collecting import Work, collect
from activities.workspace.stores import Stores
from workers.daily_job import DailyJob
from workflows.models.workspace import REPOSITORY_KEY, Repository

COLLECTED = Counter("fleet_store_refs_collected", "Refs of forgotten work that were removed")
FAILURES = Counter("fleet_store_collection_failures", "Collections that failed, and are repeated")

log = structlog.stdlib.get_logger(__name__)


class StoreCollector(DailyJob):
    """A job of the process `workspace`."""

    def __init__(
        self,
        temporal: Client,
        valkey: Redis,
        stores: Stores,
        repositories: Iterable[Repository],
        keep_for: timedelta,
    ) -> None:
        """Plan the job.

        Args:
            temporal: knows which stories are open or can still be looked at.
            valkey: what the replicas share.
            stores: the stores.
            repositories: the entries of repositories.yaml; other stores are collected too.
            keep_for: how long work stays at least after its last commit.
        """
        super().__init__(valkey, f"swe:stores-collected:{temporal.namespace}", FAILURES)
        self._temporal, self._stores, self._keep_for = temporal, stores, keep_for
        self._repositories = list(repositories)

    async def work(self) -> None:
        """Collect each store.

        Raises:
            ExceptionGroup: of an ApplicationError for each store that is away; the others are
                collected.
            RPCError: Temporal does not answer.
        """
        failed = list[ApplicationError]()
        for repository in [*self._repositories, *self._others()]:
            try:
                await self._collect(repository)
            except ApplicationError as error:
                failed.append(error)
        if failed:
            raise ExceptionGroup("stores that are not collected", failed)

    def _others(self) -> list[Repository]:
        """Return the repositories that have a store and no entry: former ones, and evaluations'."""
        known = {repository.key for repository in self._repositories}
        return [
            Repository(key=key, url=self._stores.imported_url(key))
            for key in self._stores.known()
            if key not in known and re.match(REPOSITORY_KEY, key)
        ]

    async def _collect(self, repository: Repository) -> None:
        store = await self._stores.existing(repository)
        if store is not None:
            removed = await collect(store, datetime.now(UTC) - self._keep_for, self._known)
            COLLECTED.inc(len(removed))
            log.info("store collected", repository=repository.key, removed=len(removed))

    async def _known(self, work: Work) -> bool:
        return (await self._temporal.count_workflows(workflows_of(work))).count > 0


def workflows_of(work: Work) -> str:
    """Return the visibility query of the workflows that work belongs to.

    A part of a ref is the id as workflow ids contain it; of a long one, only the beginning counts.
    """
    return " OR ".join(
        [
            _named("story-", work.story),
            *(_named(kind, work.task) for kind in ("deliberation-", "deliberation-call.")),
            f"WorkflowId STARTS_WITH 'implementation-{_beginning(work.task)}'",
        ][: 4 if work.task else 1]
    )


def _named(kind: str, part: str) -> str:
    beginning = _beginning(part)
    return (
        f"WorkflowId = '{kind}{part}'"
        if part == beginning
        else f"WorkflowId STARTS_WITH '{kind}{beginning}'"
    )


def _beginning(part: str) -> str:
    """Return the part, or what stands before the hash of a long one."""
    return part.partition(".")[0]
