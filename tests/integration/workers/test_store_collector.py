"""The daily collection of the stores, on real git, Temporal and Valkey."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from redis.asyncio import Redis
from temporalio.client import Client
from temporalio.exceptions import ApplicationError

from activities.workspace.collecting import Work, collect, works
from activities.workspace.store import Store
from activities.workspace.stores import Stores
from tests.support.fleet import connect
from tests.support.polling import until
from tests.support.projects import Project, make_project, plain_git
from tests.support.servers import Servers
from workers.store_collector import StoreCollector, workflows_of
from workflows.models.ids import agent_ref, ref_part
from workflows.models.workspace import Trailers

NOW = datetime.now(UTC)
OLD = NOW - timedelta(days=60)
KEEP = timedelta(days=30)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
async def store(project: Project, tmp_path: Path) -> Store:
    return await Stores(tmp_path).of(project.entry())


@pytest.fixture
async def temporal_client(servers: Servers, namespace: str) -> Client:
    return await connect(servers.temporal.address, namespace)


async def commit(store: Store, story: str, task: str, at: datetime) -> str:
    """Commit a file as an agent, with a kept result; return the commit."""
    base = await store.base_commit()
    tree = store.path.with_name(f"{ref_part(task)}-tree")
    tree.mkdir(exist_ok=True)
    (tree / f"{ref_part(task)}.txt").write_text("x")
    trailers = Trailers(story=story, task=task, agent="agent-1", step=1)
    made = await store.commit(tree, parent=base, message="Work", trailers=trailers, at=at)
    ref(store, agent_ref(story, task, "agent-1").replace("/fleet/", "/fleet-results/"), "a result")
    return made


def ref(store: Store, name: str, content: str) -> None:
    blob = plain_git("hash-object", "-w", "--stdin", cwd=store.path, stdin=content.encode())
    plain_git("update-ref", name, blob, cwd=store.path)


def refs(store: Store, *prefixes: str) -> list[str]:
    return plain_git("for-each-ref", "--format=%(refname)", *prefixes, cwd=store.path).split()


def tasks(store: Store) -> set[str]:
    return {name.split("/")[3] for name in refs(store, "refs/fleet/", "refs/fleet-results/")}


async def open_workflow(client: Client, workflow_id: str) -> None:
    """Start a workflow, which stays open because no worker takes it."""
    await client.start_workflow("StoryWorkflow", id=workflow_id, task_queue="no-worker")
    query = f"WorkflowId = '{workflow_id}'"
    await until(lambda: client.count_workflows(query), lambda found: found.count == 1)


async def test_old_work_that_temporal_has_forgotten_is_removed(
    store: Store, project: Project, temporal_client: Client, client: Redis
) -> None:
    for workflow_id in (
        "story-US-open",
        "implementation-T-alone-agent-1",
        "deliberation-T-council",
    ):
        await open_workflow(temporal_client, workflow_id)
    for story, task, at in (
        ("US-open", "T-open", OLD),
        ("US-gone", "T-gone", OLD),
        ("US-gone", "T-recent", NOW),
        ("no-story", "T-alone", OLD),
        ("no-story", "T-council", OLD),
        ("no-story", "T-over", OLD),
    ):
        made = await commit(store, story, task, at)
        await store.start_branch(story, made)
    plain_git("update-ref", f"refs/fleet-left/US-gone/{made}", made, cwd=store.path)
    plain_git("update-ref", f"refs/fleet-merged/US-gone/T-gone/{made}", made, cwd=store.path)
    collector = StoreCollector(
        temporal_client, client, Stores(store.path.parent), [project.entry()], KEEP
    )

    await collector.work()
    await collector.work()

    assert tasks(store) == {"T-open", "T-recent", "T-alone", "T-council"}
    assert refs(store, "refs/fleet-left", "refs/fleet-merged") == []
    assert refs(store, "refs/heads") == [
        "refs/heads/story/US-gone",
        "refs/heads/story/US-open",
        "refs/heads/story/no-story",
    ]


async def test_a_store_whose_repository_has_no_entry_any_more_is_collected_too(
    store: Store, temporal_client: Client, client: Redis
) -> None:
    await commit(store, "US-gone", "T-gone", OLD)
    (store.path.parent / "Not a store.git").mkdir()
    collector = StoreCollector(temporal_client, client, Stores(store.path.parent), [], KEEP)

    await collector.work()

    assert tasks(store) == set()


async def test_a_store_that_cannot_be_read_does_not_keep_the_others_from_collection(
    store: Store, project: Project, temporal_client: Client, client: Redis
) -> None:
    await commit(store, "US-gone", "T-gone", OLD)
    broken = project.entry().model_copy(update={"key": "broken"})
    (store.path.parent / "broken.git").mkdir()
    (store.path.parent / "broken.git" / "HEAD").write_text("not git's")
    entries = [broken, project.entry()]
    collector = StoreCollector(temporal_client, client, Stores(store.path.parent), entries, KEEP)

    with pytest.RaisesGroup(pytest.RaisesExc(ApplicationError, match=r"broken\.git")):
        await collector.work()

    assert tasks(store) == set()


async def test_work_that_moves_on_meanwhile_stays(store: Store) -> None:
    await commit(store, "US-1", "T-1", OLD)
    base = await store.base_commit()

    async def continued(work: Work) -> bool:
        await store.place("US-1", "T-1", "agent-1", base)
        return False

    assert await collect(store, NOW, continued) == []
    assert tasks(store) == {"T-1"}


async def test_results_of_a_base_stay_while_the_project_is_at_it(
    store: Store, project: Project
) -> None:
    async def unknown(work: Work) -> bool:
        return False

    former = await store.base_commit()
    ref(store, f"refs/fleet-bases/{former}/commands", "results")
    later = NOW + timedelta(days=1)
    assert await collect(store, later, unknown) == []

    project.commit({"README.md": "# Later\n"})
    await store.base_commit()

    assert await collect(store, OLD, unknown) == []
    assert await collect(store, later, unknown) == [f"refs/fleet-bases/{former}/commands"]


async def test_a_long_id_is_known_by_its_beginning(store: Store, temporal_client: Client) -> None:
    story = "a" + 90 * ":"
    await open_workflow(temporal_client, f"story-a{90 * '%3A'}")
    await commit(store, story, "T-1", OLD)
    (work,) = await works(store)

    assert "." in work.story
    assert (await temporal_client.count_workflows(workflows_of(work))).count == 1
    other = Work("b" + work.story[1:], "T-1")
    assert (await temporal_client.count_workflows(workflows_of(other))).count == 0


async def test_what_a_dead_worker_left_of_a_store_is_removed(store: Store) -> None:
    left = store.path.with_name(".sample.0123")
    new, other = store.path.with_name(".sample.4567"), store.path.with_name(".sample2.0123")
    for folder in (left, new, other):
        (folder / "objects").mkdir(parents=True)
    for folder in (left, other):
        os.utime(folder, (0, 0))

    await collect(store, NOW, lambda _: pytest.fail("no task is left to ask for"))

    assert [left.exists(), new.exists(), other.exists()] == [False, True, True]
