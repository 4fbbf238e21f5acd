"""The process `workspace`: work in repositories, on the store's commits, in a sandbox.

It has no credentials but Temporal's, with those of its payloads, and the store's.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial

import structlog
from temporalio.client import Client
from temporalio.exceptions import ApplicationError
from temporalio.worker import Worker

from activities.checks.sandbox import Sandbox
from activities.config import InvalidConfig
from activities.heartbeats import Heartbeats
from activities.workspace.acceptance import AcceptanceTests
from activities.workspace.actions import Actions
from activities.workspace.activities import Workspaces
from activities.workspace.added_lines import ChangeChecks
from activities.workspace.branches import Branches
from activities.workspace.changes import Changes
from activities.workspace.commits import one_line
from activities.workspace.evaluations import Evaluations
from activities.workspace.repositories import load_repositories, verify
from activities.workspace.scratch import remove_left
from activities.workspace.stores import Stores
from activities.workspace.trees import Trees
from workers.clients.connection import StartError
from workers.clients.stores import stores_of
from workers.processes.process import ProcessContext, RunningProcess, options, valid_config
from workers.settings import Settings, variables
from workers.store_collector import StoreCollector
from workflows.models.workspace import Repository
from workflows.stubs import WORKSPACE_QUEUE

GIB = 1024**3

HEARTBEATS_AT_MOST = timedelta(seconds=1)
"""How far heartbeats are apart: two may be late before a worker that is busy is taken for dead."""

log = structlog.stdlib.get_logger(__name__)


def workspace_worker(
    client: Client,
    settings: Settings,
    repositories: Mapping[str, Repository],
    stores: Stores,
    sandbox: Sandbox,
) -> Worker:
    """Return the worker of the queue `workspace`."""
    trees = Trees(settings.trees_folder / "trees", int(settings.workspace_disk_gib * GIB))
    prepared = settings.trees_folder / "prepared"
    actions = Actions(stores, trees, prepared, sandbox)
    with valid_config(InvalidConfig):
        checks = ChangeChecks(settings.fleet_config, sandbox)
    changes = Changes(stores, trees, prepared, checks, sandbox)
    workspaces = Workspaces(repositories, stores, actions, changes)
    branches = Branches(repositories, stores)
    acceptance = AcceptanceTests(repositories, stores, trees, prepared, sandbox)
    evaluations = Evaluations(repositories, stores, trees, prepared, sandbox)
    return Worker(
        client,
        task_queue=WORKSPACE_QUEUE,
        activities=[
            workspaces.begin_work,
            workspaces.run_action,
            workspaces.measure_change,
            branches.pin_repository,
            branches.place_branch,
            branches.branch_head,
            branches.merge_change,
            branches.branch_size,
            branches.base_now,
            branches.merged_base,
            branches.push_branch,
            acceptance.test_criteria,
            evaluations.evaluate_commit,
        ],
        max_concurrent_activities=settings.workspace_concurrency,
        max_heartbeat_throttle_interval=HEARTBEATS_AT_MOST,
        **options(settings, Heartbeats()),
    )


@asynccontextmanager
async def process(base: ProcessContext) -> AsyncIterator[RunningProcess]:
    """Check the repositories' entries and the folders, then run."""
    settings = base.settings
    with valid_config(InvalidConfig):
        repositories = load_repositories(settings.fleet_config / "repositories.yaml", variables())
    await verify_all(repositories, settings)
    make_folders(settings)
    if left := remove_left():
        log.info("measurements of killed processes removed", folders=len(left))
    stores = stores_of(settings)
    try:
        await stores.answer(repositories.values())
    except ApplicationError as error:
        raise StartError(f"WORKSPACE_STORE: {one_line(error.message)}") from error
    sandbox = Sandbox()
    if no_sandbox := await sandbox.problem():
        log.warning("commands of repositories are not run", reason=no_sandbox)
    elif sandbox.no_groups:
        log.warning("the kernel does not limit the whole sandbox", reason=sandbox.no_groups)
    yield RunningProcess(
        {
            WORKSPACE_QUEUE: workspace_worker(
                base.temporal, settings, repositories, stores, sandbox
            ),
            "stores": StoreCollector(
                base.temporal,
                base.valkey,
                stores,
                repositories.values(),
                timedelta(days=settings.workspace_keep_days),
            ),
        },
        {"store": partial(stores.answer, list(repositories.values())[:1])},
    )


async def verify_all(repositories: Mapping[str, Repository], settings: Settings) -> None:
    """Check that every repository answers and has its base.

    Raises:
        StartError: one of them does not.
    """
    for repository in repositories.values():
        try:
            await verify(repository, settings.repository_credentials)
        except ApplicationError as error:
            why = one_line(error.message)
            raise StartError(f"{why}. Correct repositories.yaml in FLEET_CONFIG") from error


def make_folders(settings: Settings) -> None:
    """Make the folders of the store and of the trees.

    Raises:
        StartError: one of them cannot be made.
    """
    for setting, folder in (
        ("WORKSPACE_STORE", settings.store_folder),
        ("WORKSPACE_TREES", settings.trees_folder),
    ):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartError(
                f"{setting} {folder} cannot be made ({error.strerror}): name a folder that this "
                "process may write"
            ) from error
