"""A store on a git server: each worker has a mirror of its own, and the server has the truth."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from temporalio.exceptions import ApplicationError

from activities.workspace.kept_blobs import KeptBlob
from activities.workspace.kept_results import KeptResult, KeptResults
from activities.workspace.refs import ABSENT, Move
from activities.workspace.store import Store
from activities.workspace.stores import Stores
from tests.support.certificates import write_certificate
from tests.support.git_server import GitServer, credentials
from tests.support.projects import Project, make_project, plain_git
from tests.support.repositories import in_store
from workflows.models.errors import ErrorType
from workflows.models.ids import agent_ref
from workflows.models.implementation import ActionResult
from workflows.models.workspace import Merged, Trailers

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
STORY = "US-101"


class Site:
    """A project, a git server with its store, and workers."""

    def __init__(self, folder: Path, server: GitServer) -> None:
        self.folder = folder
        self.server = server
        self.project: Project = make_project(folder)
        self.bare = server.make("sample")
        self.credentials = credentials(folder / "credentials")

    def stores(self, worker: str) -> Stores:
        """Return the stores as a worker on a machine of its own has them."""
        return Stores(self.folder / worker, self.credentials, self.server.url)

    async def store(self, worker: str, *commits: str) -> Store:
        return await self.stores(worker).of(self.project.entry(), *commits)

    def there(self, ref: str) -> str:
        """Return what a ref names on the server; empty if it does not exist."""
        return in_store(self.bare, "for-each-ref", "--format=%(objectname)", ref)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "server").mkdir()
    with GitServer(tmp_path / "server").serving() as server:
        yield Site(tmp_path, server)


def trailers(agent: str = "agent-dev-1", step: int = 1) -> Trailers:
    return Trailers(story=STORY, task="T1", agent=agent, step=step)


async def step(store: Store, parent: str, name: str, agent: str = "agent-dev-1") -> str:
    """Commit a file on top of a commit, as an agent's step."""
    tree = store.path.parent / f"tree-{name}"
    await asyncio.to_thread(tree.mkdir)
    archive = await asyncio.create_subprocess_shell(
        f"git --git-dir={store.path} archive {parent} | tar -x -C {tree}"
    )
    assert await archive.wait() == 0
    await asyncio.to_thread((tree / f"{name}.txt").write_text, f"{name}\n")
    return await store.commit(tree, parent=parent, message=name, trailers=trailers(agent), at=AT)


async def test_another_worker_continues_from_a_step(site: Site) -> None:
    one = await site.store("one")
    base = await one.base_commit()
    first = await step(one, base, "first")
    shutil.rmtree(site.folder / "one")

    two = await site.store("two", first)
    second = await step(two, first, "second")

    assert await two.read(first, "first.txt") == b"first\n"
    assert [file.path for file in await two.changed(base, second)] == ["first.txt", "second.txt"]
    assert site.there(agent_ref(STORY, "T1", "agent-dev-1")) == second


async def test_a_worker_sees_what_another_moved(site: Site) -> None:
    one, two = await site.store("one"), await site.store("two")
    base = await one.base_commit()
    await one.start_branch(STORY, base)
    assert await two.head(STORY) == base

    first = await step(one, base, "first")
    assert await one.merge(STORY, first, at=AT, message="Merge") == Merged(commit=first)

    assert await two.head(STORY) == first
    assert await two.agent_head(STORY, "T1", "agent-dev-1") == first
    assert await two.head("US-none") is None


async def test_workers_that_merge_at_once_lose_no_change(site: Site) -> None:
    names = ["a", "b", "c", "d"]
    stores = [await site.store(name) for name in names]
    base = await stores[0].base_commit()
    await stores[0].start_branch(STORY, base)

    async def work(store: Store, name: str) -> None:
        await store.refs.hold(base)
        made = await step(store, base, name, agent=f"agent-{name}")
        assert isinstance(await store.merge(STORY, made, at=AT, message="Merge"), Merged)

    await asyncio.gather(*map(work, stores, names))

    head = site.there(f"refs/heads/story/{STORY}")
    listed = in_store(site.bare, "ls-tree", "--name-only", head).split()
    assert {f"{name}.txt" for name in names} < set(listed)


async def test_refs_move_all_together_or_not_at_all(site: Site) -> None:
    store = await site.store("one")
    base = await store.base_commit()
    made = await step(store, base, "made")
    one, two = "refs/fleet-old/US/T/a", "refs/fleet-old/US/T/b"

    assert await store.refs.move(Move(one, base, ABSENT))
    assert not await store.refs.move(Move(one, made, base), Move(two, made, base))
    assert not await store.refs.move(Move(two, made, ABSENT), Move(one, made, ABSENT))
    assert (site.there(one), site.there(two)) == (base, "")

    assert await store.refs.move(Move(one, made, base), Move(two, base, ABSENT))
    assert await store.refs.move(Move(two, made))
    assert (site.there(one), site.there(two)) == (made, made)

    assert not await store.refs.move(Move(one, ABSENT, base), Move(two, ABSENT, made))
    assert await store.refs.move(Move(one, ABSENT, made), Move(two, ABSENT, made))
    assert (site.there(one), site.there(two)) == ("", "")
    assert await store.refs.value(one) is None


async def test_a_kept_result_has_its_commit_though_its_worker_died_before_the_ref_moved(
    site: Site,
) -> None:
    one = await site.store("one")
    base = await one.base_commit()
    tree = site.folder / "tree"
    tree.mkdir()
    (tree / "new.txt").write_text("new\n")
    made = await one.make_commit(tree, parent=base, message="Step", trailers=trailers(), at=AT)
    result = KeptResult(asked="a", result=ActionResult(commit=made, observation="done"))
    await KeptResults(one, trailers()).keep(result)
    shutil.rmtree(site.folder / "one")

    two = await site.store("two")
    kept = await KeptResults(two, trailers()).read()

    assert kept == result
    await two.advance(trailers(), base, made)
    assert site.there(agent_ref(STORY, "T1", "agent-dev-1")) == made
    assert await two.read(made, "new.txt") == b"new\n"


async def test_results_are_shared(site: Site) -> None:
    one, two = await site.store("one"), await site.store("two")
    ref = "refs/fleet-bases/x/y"
    assert await KeptBlob(two, ref, ActionResult).read() is None
    result = ActionResult(commit="1" * 40, observation="done")

    await KeptBlob(one, ref, ActionResult).keep(result)

    assert await KeptBlob(two, ref, ActionResult).read() == result


@pytest.mark.parametrize("version_2", [True, False])
async def test_a_commit_is_fetched_whatever_version_of_the_protocol_the_server_speaks(
    site: Site, version_2: bool
) -> None:
    site.server.version_2 = version_2
    one = await site.store("one")
    base = await one.base_commit()
    first = await step(one, base, "first")
    await step(one, first, "second")

    two = await site.store("two", first, "1" * 40)

    assert await two.read(first, "first.txt") == b"first\n"
    with pytest.raises(ApplicationError, match="not found"):
        await two.read("1" * 40, "first.txt")


async def test_a_commit_that_is_there_is_not_asked_for_again(site: Site) -> None:
    store = await site.store("one")
    base = await store.base_commit()
    before = site.server.requests

    await store.refs.hold(base)
    await store.refs.hold(base)

    assert site.server.requests == before


async def test_a_commit_that_comes_late_is_asked_for_again(site: Site) -> None:
    one, two = await site.store("one"), await site.store("two")
    base = await one.base_commit()
    tree = site.folder / "tree"
    tree.mkdir()
    (tree / "new.txt").write_text("new\n")
    made = await one.make_commit(tree, parent=base, message="Step", trailers=trailers(), at=AT)
    await two.refs.hold(made)

    await one.advance(trailers(), base, made)
    await two.refs.hold(made)

    assert await two.read(made, "new.txt") == b"new\n"


async def test_a_server_that_is_away_is_waited_for(site: Site) -> None:
    store = await site.store("one")
    base = await store.base_commit()
    site.server.away = True

    for attempt in (
        store.head(STORY),
        store.start_branch(STORY, base),
        store.refs.below("refs/fleet/"),
        site.stores("one").answer([site.project.entry()]),
        site.store("two", base),
    ):
        with pytest.raises(ApplicationError, match="does not answer; check WORKSPACE_STORE") as no:
            await attempt
        assert no.value.type == ErrorType.GIT_STORE_AWAY
        assert not no.value.non_retryable

    site.server.away = False
    assert await store.start_branch(STORY, base) == base
    await site.stores("one").answer([site.project.entry()])


async def test_refused_credentials_and_a_missing_repository_are_named(site: Site) -> None:
    entry = site.project.entry()
    wrong = credentials(site.folder / "wrong", token="no")
    for folder in (wrong, None):
        stores = Stores(site.folder / "one", folder, site.server.url)
        with pytest.raises(ApplicationError, match="refuses the credentials; see STORE"):
            await stores.answer([entry])
    with pytest.raises(ApplicationError, match="no such repository; create an empty one"):
        await site.stores("one").answer([entry.model_copy(update={"key": "other"})])


async def test_a_server_of_a_private_authority_is_trusted_by_ca_crt(
    site: Site, tmp_path: Path
) -> None:
    write_certificate(tmp_path / "tls")
    server = GitServer(site.server.root, tmp_path / "tls")
    stores = Stores(tmp_path / "one", site.credentials, server.url)
    with server.serving():
        with pytest.raises(ApplicationError, match="certificate"):
            await stores.answer([site.project.entry()])

        shutil.copy(tmp_path / "tls" / "ca.crt", site.credentials)

        await stores.answer([site.project.entry()])


async def test_a_ref_that_the_server_refuses_is_named(site: Site) -> None:
    store = await site.store("one")
    base = await store.base_commit()
    in_store(site.bare, "config", "receive.hideRefs", "refs/fleet-old")

    with pytest.raises(ApplicationError, match="refuses a ref; let it accept"):
        await store.refs.move(Move("refs/fleet-old/US/T/a", base, ABSENT))


async def test_what_the_server_has_no_more_leaves_the_mirror_after_a_day(site: Site) -> None:
    store = await site.store("one")
    base = await store.base_commit()
    made = await step(store, base, "made")
    ref = agent_ref(STORY, "T1", "agent-dev-1")
    in_store(site.bare, "update-ref", "-d", ref)
    await site.store("one", base)
    assert in_store(store.path, "rev-parse", ref) == made

    os.utime(store.path / "tidied", (0, 0))
    await site.store("one", base)

    assert in_store(store.path, "for-each-ref", "refs/fleet") == ""
    assert in_store(store.path, "rev-parse", "refs/base/main") == base


async def test_the_imported_commits_of_a_folder_are_on_the_server(site: Site) -> None:
    bare = site.server.make("local-adder")
    entry = site.project.entry().model_copy(update={"key": "local-adder"})
    commit = plain_git("rev-parse", "main", cwd=site.project.clone)

    await site.stores("cli").import_commits(entry, [commit])

    assert in_store(bare, "rev-parse", f"refs/base/{commit}") == commit
    store = await site.stores("one").of(entry, commit)
    assert await store.outline(commit)


async def test_a_mirror_that_was_lost_is_made_again(site: Site) -> None:
    stores = site.stores("one")
    store = await stores.of(site.project.entry())
    base = await store.base_commit()
    first = await step(store, base, "first")
    shutil.rmtree(store.path)

    again = await stores.of(site.project.entry(), first)

    assert await again.read(first, "first.txt") == b"first\n"
