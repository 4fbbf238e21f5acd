"""The store holds what agents make: deterministic commits, refs, merges and pushes."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from temporalio.exceptions import ApplicationError

from activities.workspace import commits as limits
from activities.workspace.outline import outline_of
from activities.workspace.store import Store
from activities.workspace.stores import Stores
from tests.support.projects import Project, copy_project, make_project, plain_git
from workers.environment import ROOT
from workflows.models.errors import ErrorType
from workflows.models.ids import agent_ref, ref_part, story_branch
from workflows.models.workspace import Conflict, Merged, Trailers

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
STORY = "US-101"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("template"))


@pytest.fixture
def project(template: Project, tmp_path: Path) -> Project:
    return copy_project(template, tmp_path)


@pytest.fixture
async def store(project: Project, tmp_path: Path) -> Store:
    (tmp_path / "stores").mkdir()
    return await Stores(tmp_path / "stores").of(project.entry())


def trailers(step: int = 1, agent: str = "agent-dev-1", story: str = STORY) -> Trailers:
    return Trailers(story=story, task=f"{story}-plan-1:T1", agent=agent, step=step, model="m")


async def checkout(store: Store, commit: str, folder: Path) -> Path:
    """Return a new working tree of a commit, without `.git`."""
    await asyncio.to_thread(folder.mkdir, parents=True)
    archive = ["git", f"--git-dir={store.path}", "archive", "--format=tar", commit]
    packed = await asyncio.create_subprocess_exec(*archive, stdout=asyncio.subprocess.PIPE)
    content, _ = await packed.communicate()
    unpacked = await asyncio.create_subprocess_exec(
        "tar", "-x", cwd=folder, stdin=asyncio.subprocess.PIPE
    )
    await unpacked.communicate(content)
    return folder


@contextmanager
def refused(kind: ErrorType, match: str | None = None, retryable: bool = False) -> Iterator[None]:
    with pytest.raises(ApplicationError, match=match) as error:
        yield
    assert error.value.type == kind
    assert error.value.non_retryable is not retryable


async def step(store: Store, tree: Path, parent: str, number: int = 1, **more: str) -> str:
    return await store.commit(
        tree, parent=parent, message=f"Step {number}", trailers=trailers(number, **more), at=AT
    )


# --- making a store ---


async def test_a_store_begins_with_the_base_of_the_project(store: Store, project: Project) -> None:
    base = await store.base_commit()

    assert base == plain_git("rev-parse", "main", cwd=project.clone)
    assert [file.path for file in await store.outline(base)] == [
        "README.md",
        "src/app.py",
        "tests/test_app.py",
    ]


async def test_workers_that_make_a_store_at_once_make_one(project: Project, tmp_path: Path) -> None:
    root = tmp_path / "stores"
    root.mkdir()

    made = await asyncio.gather(*(Stores(root).of(project.entry()) for _ in range(4)))

    assert {store.path for store in made} == {root / "sample.git"}
    assert [each.name for each in root.iterdir()] == ["sample.git"]


async def test_a_store_follows_the_base(store: Store, project: Project) -> None:
    await store.base_commit()
    moved = project.commit({"new.txt": "new\n"})

    assert await store.base_commit() == moved


async def test_a_folder_of_stores_that_is_away_is_waited_for(
    project: Project, store: Store, tmp_path: Path
) -> None:
    base = await store.base_commit()
    (tmp_path / "stores").rename(tmp_path / "elsewhere")

    with refused(ErrorType.GIT_STORE_AWAY, "mount it", retryable=True):
        await Stores(tmp_path / "stores").of(project.entry())
    with refused(ErrorType.GIT_STORE_AWAY, retryable=True):
        await store.read(base, "README.md")
    with refused(ErrorType.GIT_STORE_AWAY, retryable=True):
        await store.head(STORY)

    (tmp_path / "elsewhere").rename(tmp_path / "stores")
    assert await store.read(base, "README.md")


async def test_a_repository_that_is_away_is_waited_for(store: Store, project: Project) -> None:
    project.bare.rename(project.bare.with_name("away.git"))

    with refused(ErrorType.REPOSITORY_AWAY, "repository sample: .* check its `url`", True):
        await store.base_commit()


async def test_a_base_that_is_gone_is_named(store: Store, project: Project) -> None:
    plain_git("branch", "-m", "main", "trunk", cwd=project.bare)

    with refused(ErrorType.BASE_MISSING, "correct `base`"):
        await store.base_commit()


async def test_a_shallow_repository_is_refused(project: Project, tmp_path: Path) -> None:
    project.commit({"new.txt": "new\n"})
    shallow = tmp_path / "shallow"
    plain_git("clone", "--quiet", "--depth=1", project.url, str(shallow), cwd=tmp_path)
    (tmp_path / "stores").mkdir()

    with refused(ErrorType.INVALID_CONFIG, "git fetch --unshallow"):
        await Stores(tmp_path / "stores").of(project.entry(url=shallow.as_uri()))


async def test_a_base_with_a_file_in_gits_folder_is_refused(store: Store, project: Project) -> None:
    blob = plain_git("hash-object", "-w", "--stdin", cwd=project.bare, stdin=b"[core]\n")
    inner = plain_git("mktree", cwd=project.bare, stdin=f"100644 blob {blob}\tconfig\n".encode())
    outer = plain_git("mktree", cwd=project.bare, stdin=f"040000 tree {inner}\t.GIT\n".encode())
    commit = plain_git("commit-tree", outer, "-m", "x", cwd=project.bare)
    plain_git("update-ref", "refs/heads/main", commit, cwd=project.bare)

    with refused(ErrorType.TREE_REFUSED, "repair its history"):
        await store.base_commit()


# --- commits ---


async def test_a_step_is_a_commit_with_trailers(store: Store, tmp_path: Path) -> None:
    base = await store.base_commit()
    tree = await checkout(store, base, tmp_path / "w" / "tree")
    (tree / "src" / "app.py").write_text("def answer() -> int:\n    return 43\n")

    commit = await store.commit(
        tree,
        parent=base,
        message="Correct the answer\n\nStep: 99",
        trailers=Trailers(
            story=STORY,
            task="T1",
            agent="Agent <x>\nStory: other",
            model="big",
            prompt_hash="abc",
            step=3,
        ),
        at=AT,
    )

    (logged,) = await store.log(base, commit)
    assert logged.subject == "Correct the answer"
    assert logged.at == AT
    assert logged.author == "Agent x Story: other"
    assert logged.trailers == {
        "Story": STORY,
        "Task": "T1",
        "Agent": "Agent <x> Story: other",
        "Model": "big",
        "Prompt-Hash": "abc",
        "Step": "3",
    }


async def test_a_step_that_is_retried_makes_the_same_commit(store: Store, tmp_path: Path) -> None:
    base = await store.base_commit()
    ids = set()
    for attempt in range(2):
        tree = await checkout(store, base, tmp_path / str(attempt) / "tree")
        (tree / "new.txt").write_text("new\n")
        ids.add(await step(store, tree, base))

    (commit,) = ids
    assert await store.agent_head(STORY, trailers().task, "agent-dev-1") == commit


async def test_a_late_attempt_finds_its_step_behind_the_next(store: Store, tmp_path: Path) -> None:
    base = await store.base_commit()
    tree = await checkout(store, base, tmp_path / "a" / "tree")
    (tree / "1.txt").write_text("1")
    first = await step(store, tree, base, 1)
    late = Path(shutil.copytree(tree, tmp_path / "b" / "tree"))
    (tree / "2.txt").write_text("2")
    second = await step(store, tree, first, 2)

    assert await step(store, late, base, 1) == first

    assert await store.agent_head(STORY, trailers().task, "agent-dev-1") == second


async def test_a_step_from_another_commit_is_refused_until_the_ref_is_placed(
    store: Store, tmp_path: Path
) -> None:
    base = await store.base_commit()
    tree = await checkout(store, base, tmp_path / "a" / "tree")
    (tree / "1.txt").write_text("1")
    first = await step(store, tree, base)
    (tree / "1.txt").write_text("other")

    with refused(ErrorType.REF_MOVED, first):
        await step(store, tree, base)
    await store.place(STORY, trailers().task, "agent-dev-1", base)
    second = await step(store, tree, base)

    assert await store.agent_head(STORY, trailers().task, "agent-dev-1") == second
    assert first in plain_git("for-each-ref", cwd=store.path)


async def test_a_step_that_changes_nothing_makes_no_commit(store: Store, tmp_path: Path) -> None:
    base = await store.base_commit()
    tree = await checkout(store, base, tmp_path / "w" / "tree")
    (tree / "src" / "app.py").touch()
    (tree / "src" / "__pycache__").mkdir()
    (tree / "src" / "__pycache__" / "app.pyc").write_bytes(b"x")

    assert await step(store, tree, base) == base

    assert await store.agent_head(STORY, trailers().task, "agent-dev-1") is None


async def test_every_kind_of_change_is_reported(store: Store, tmp_path: Path) -> None:
    base = await store.base_commit()
    tree = await checkout(store, base, tmp_path / "w" / "tree")
    (tree / "src" / "app.py").rename(tree / "src" / "core.py")
    (tree / "tests" / "test_app.py").unlink()
    (tree / "README.md").write_text("# Sample\n\nA good project.\nReally.\n")
    (tree / "blob.bin").write_bytes(bytes(range(256)))
    (tree / "way out").symlink_to("/etc/passwd")

    commit = await step(store, tree, base)

    changed = {file.path: file for file in await store.changed(base, commit)}
    assert {path: file.status for path, file in changed.items()} == {
        "README.md": "modified",
        "blob.bin": "added",
        "src/core.py": "renamed",
        "tests/test_app.py": "deleted",
        "way out": "added",
    }
    assert (changed["README.md"].insertions, changed["README.md"].deletions) == (2, 1)
    assert changed["blob.bin"].binary
    assert changed["src/core.py"].old_path == "src/app.py"
    assert changed["way out"].link
    assert await store.read(commit, "way out") == b"/etc/passwd"
    assert {file.path for file in await store.outline(commit) if file.kind == "link"} == {"way out"}


async def test_a_link_in_place_of_a_folder_is_not_followed(store: Store, tmp_path: Path) -> None:
    base = await store.base_commit()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "app.py").write_text("secret\n")
    tree = await checkout(store, base, tmp_path / "w" / "tree")
    shutil.rmtree(tree / "src")
    (tree / "src").symlink_to(outside)

    commit = await step(store, tree, base)

    assert await store.read(commit, "src") == str(outside).encode()
    assert "secret" not in await store.diff(base, commit)


async def test_concurrent_processes_lose_no_commit(store: Store, tmp_path: Path) -> None:
    """Four workers commit for four agents at once, and merge into one branch."""
    base = await store.base_commit()
    await store.start_branch(STORY, base)
    workers = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", WORKER, str(store.path), base, str(number)),
            str(tmp_path / f"w{number}"),
            cwd=ROOT,
            stderr=asyncio.subprocess.PIPE,
        )
        for number in range(4)
    ]

    for worker in workers:
        _, reason = await worker.communicate()
        assert worker.returncode == 0, reason.decode()

    head = await store.head(STORY)
    assert head
    paths = {file.path for file in await store.outline(head)}
    assert {f"file-{number}-{each}.txt" for number in range(4) for each in (1, 2)} <= paths
    for number in range(4):
        mine = await store.agent_head(STORY, trailers().task, f"agent-{number}")
        assert mine
        assert await store.contains(head, mine)


WORKER = """
import asyncio, sys
from datetime import UTC, datetime
from pathlib import Path
from activities.workspace.store import Store
from workflows.models.workspace import Merged, Repository, Trailers

async def main(path, parent, number, folder):
    store = Store(Path(path), Repository(key="sample", url="file:///nowhere"))
    tree = Path(folder) / "tree"
    tree.mkdir(parents=True)
    for file in await store.outline(parent):
        (tree / file.path).parent.mkdir(parents=True, exist_ok=True)
        (tree / file.path).write_bytes(await store.read(parent, file.path))
    at = datetime(2026, 1, 1, tzinfo=UTC)
    for step in (1, 2):
        (tree / f"file-{number}-{step}.txt").write_text(number)
        trailers = Trailers(
            story="US-101", task="US-101-plan-1:T1", agent=f"agent-{number}", step=step
        )
        parent = await store.commit(tree, parent=parent, message="x", trailers=trailers, at=at)
        merged = await store.merge("US-101", parent, at=at, message="Merge")
        assert isinstance(merged, Merged)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_lock_that_a_dead_machine_left_is_removed(store: Store) -> None:
    base = await store.base_commit()
    lock = store.path / "refs" / "heads" / "story" / "US-101.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()

    with refused(ErrorType.GIT_STORE_AWAY, "File exists", retryable=True):
        await store.start_branch(STORY, base)
    os.utime(lock, (0, 0))

    assert await store.start_branch(STORY, base) == base


@pytest.mark.parametrize(
    "story",
    ["Story 12.3:a", "a" + ":" * 99, "x.lock", "a..b", "HEAD", "s-1"],
)
async def test_every_story_id_has_a_branch(story: str, store: Store, tmp_path: Path) -> None:
    base = await store.base_commit()
    tree = await checkout(store, base, tmp_path / "w" / "tree")
    (tree / "new.txt").write_text("new\n")

    assert await store.start_branch(story, base) == base
    commit = await step(store, tree, base, story=story[:100])

    assert await store.start_branch(story, commit) == base
    assert plain_git("rev-parse", f"refs/heads/{story_branch(story)}", cwd=store.path) == base


def test_long_ids_have_different_parts_of_refs() -> None:
    one, other = "a" + ":" * 198 + "b", "a" + ":" * 198 + "c"

    assert ref_part(one) != ref_part(other)
    assert len(ref_part(one)) <= 200
    assert agent_ref("S 1", "T:1", "a") == "refs/fleet/S%201/T%3A1/a"


# --- reading ---


async def test_a_diff_is_cut_at_its_limit(store: Store, tmp_path: Path) -> None:
    base = await store.base_commit()
    tree = await checkout(store, base, tmp_path / "w" / "tree")
    (tree / "big.txt").write_text("line\n" * 10_000)
    commit = await step(store, tree, base)

    whole = await store.diff(base, commit)
    cut = await store.diff(base, commit, limit=1_000)

    assert whole.count("\n+line") == 10_000
    assert cut.endswith("[the diff is longer than 1,000 bytes]\n")
    assert len(cut) < 1_100


async def test_a_line_is_traced_to_the_step_that_wrote_it(store: Store, tmp_path: Path) -> None:
    base = await store.base_commit()
    tree = await checkout(store, base, tmp_path / "w" / "tree")
    (tree / "README.md").write_text("# Sample\n\nA project.\nBy agents.\n")
    commit = await step(store, tree, base, 7)

    line = await store.blame(commit, "README.md", 4)

    assert line.text == "By agents."
    assert line.origin.commit == commit
    assert line.origin.trailers["Step"] == "7"
    assert (await store.blame(commit, "README.md", 1)).origin.commit == base
    with refused(ErrorType.NOT_FOUND):
        await store.blame(commit, "README.md", 99)


async def test_what_the_store_does_not_have_is_not_found(store: Store) -> None:
    base = await store.base_commit()

    with refused(ErrorType.NOT_FOUND, "nothing.txt"):
        await store.read(base, "nothing.txt")
    with refused(ErrorType.NOT_FOUND):
        await store.outline("1" * 40)
    with refused(ErrorType.NOT_FOUND):
        await store.merge("US-9", base, at=AT, message="x")
    with refused(ErrorType.INVALID_INPUT, "40 hex digits"):
        await store.read("--output=x", "README.md")
    with refused(ErrorType.TOO_LARGE, "README.md"):
        await store.read(base, "README.md", limit=5)


# --- merging, pushing, collecting ---


async def two_agents(store: Store, tmp_path: Path, texts: tuple[str, str]) -> tuple[str, str]:
    """Return two agents' commits on the base, each of which writes `src/app.py` or a new file."""
    base = await store.base_commit()
    await store.start_branch(STORY, base)
    commits = []
    for number, text in enumerate(texts):
        tree = await checkout(store, base, tmp_path / str(number) / "tree")
        name = text.partition(":")[0]
        (tree / name).write_text(text)
        commits.append(await step(store, tree, base, agent=f"agent-{number}"))
    return commits[0], commits[1]


async def test_agents_work_is_merged_one_after_the_other(store: Store, tmp_path: Path) -> None:
    first, second = await two_agents(store, tmp_path, ("one.txt: 1", "two.txt: 2"))

    forward = await store.merge(STORY, first, at=AT, message="Merge one")
    merged = await store.merge(STORY, second, at=AT, message="Merge two")
    again = await store.merge(STORY, second, at=AT + timedelta(hours=1), message="Merge two")

    assert forward == Merged(commit=first)
    assert isinstance(merged, Merged)
    assert merged == again
    assert {"one.txt", "two.txt"} <= {file.path for file in await store.outline(merged.commit)}
    assert (await store.log(first, merged.commit))[0].trailers == {"Story": STORY}


async def test_a_conflict_names_its_files_and_changes_nothing(store: Store, tmp_path: Path) -> None:
    first, second = await two_agents(store, tmp_path, ("README.md: 1", "README.md: 2"))
    await store.merge(STORY, first, at=AT, message="Merge one")

    conflict = await store.merge(STORY, second, at=AT, message="Merge two")

    assert conflict == Conflict(head=first, files=["README.md"])
    assert await store.head(STORY) == first


async def test_histories_that_have_nothing_in_common_are_not_merged(
    project: Project, store: Store
) -> None:
    await store.start_branch(STORY, await store.base_commit())
    plain_git("checkout", "--quiet", "--orphan", "other", cwd=project.clone)
    plain_git("commit", "--quiet", "-m", "Begin again", cwd=project.clone)
    plain_git("push", "--quiet", "--force", "origin", "other:main", cwd=project.clone)
    other = await store.base_commit()

    with refused(ErrorType.MERGE_CONFLICT, "no common ancestor"):
        await store.merge(STORY, other, at=AT, message="x")


async def test_an_approved_commit_is_pushed_and_nothing_else(
    project: Project, store: Store, tmp_path: Path
) -> None:
    first, _ = await two_agents(store, tmp_path, ("one.txt: 1", "two.txt: 2"))
    base = await store.base_commit()
    await store.merge(STORY, first, at=AT, message="Merge")
    open_store = Store(store.path, project.entry(push=True))

    with refused(ErrorType.PUSH_REFUSED, "`push: true`"):
        await store.push(STORY, first)
    with refused(ErrorType.PUSH_REFUSED, "which was approved"):
        await open_store.push(STORY, base)
    with refused(ErrorType.PUSH_REFUSED, "never written"):
        await Store(store.path, project.entry(push=True, base="story/US-101")).push(STORY, first)
    refs = plain_git("for-each-ref", "--format=%(refname)", cwd=project.bare).split()
    assert refs == ["refs/heads/main"]
    await open_store.push(STORY, first)
    await open_store.push(STORY, first)

    refs = plain_git("for-each-ref", "--format=%(refname)", cwd=project.bare).split()
    assert refs == ["refs/heads/main", "refs/heads/story/US-101"]
    assert plain_git("rev-parse", "story/US-101", cwd=project.bare) == first
    assert plain_git("rev-parse", "main", cwd=project.bare) == base


async def test_a_push_overwrites_no_branch_and_runs_no_hook(
    project: Project, store: Store, tmp_path: Path
) -> None:
    first, _ = await two_agents(store, tmp_path, ("one.txt: 1", "two.txt: 2"))
    await store.merge(STORY, first, at=AT, message="Merge")
    project.commit({"theirs.txt": "1"})
    plain_git("branch", "story/US-101", "main", cwd=project.bare)
    theirs = plain_git("rev-parse", "main", cwd=project.bare)
    hook = project.bare / "hooks" / "pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/marker\n")
    hook.chmod(0o755)
    open_store = Store(store.path, project.entry(push=True))

    with refused(ErrorType.PUSH_REFUSED, "remove or merge the branch"):
        await open_store.push(STORY, first)
    assert plain_git("rev-parse", "story/US-101", cwd=project.bare) == theirs
    plain_git("branch", "-D", "story/US-101", cwd=project.bare)
    await open_store.push(STORY, first)

    assert not (tmp_path / "marker").exists()
    plain_git("push", "origin", "HEAD:refs/heads/other", cwd=project.clone)
    assert (tmp_path / "marker").exists(), "the hook does not work with plain git"


async def test_many_files_are_one_step(store: Store, tmp_path: Path) -> None:
    base = await store.base_commit()
    tree = await checkout(store, base, tmp_path / "w" / "tree")
    for number in range(500):
        (tree / f"{number}.txt").write_text("x")

    commit = await step(store, tree, base)

    assert len(await store.changed(base, commit)) == 500


async def test_a_worker_that_is_killed_while_it_commits_loses_nothing(
    store: Store, tmp_path: Path
) -> None:
    """Wherever it dies, the step that another worker repeats makes the same commit."""
    base = await store.base_commit()
    expected = None
    for calls in (2, 3, 4, 6, 7, 8):
        agent = f"agent-{calls}"
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", DYING, str(store.path), base, agent, str(calls)),
            str(tmp_path / agent),
            cwd=ROOT,
        )
        died = await worker.wait()
        tree = tmp_path / agent / "tree"

        commit = await step(store, tree, base, agent="agent-1")
        mine = await step(store, tree, base, agent=agent)

        assert died in (-9, 0)
        assert (await store.agent_head(STORY, trailers().task, agent)) == mine
        assert commit == (expected or commit)
        expected = commit
    assert died == 0, "the last one lived: it died at every call of git"


DYING = """
import asyncio, os, signal, sys
from datetime import UTC, datetime
from pathlib import Path
from activities.workspace import store as module
from workflows.models.workspace import Repository, Trailers

calls = int(sys.argv[4])
run = module.git

async def dying(*args, **more):
    global calls
    result = await run(*args, **more)
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

async def main(path, parent, agent, _, folder):
    store = module.Store(Path(path), Repository(key="sample", url="file:///nowhere"))
    tree = Path(folder) / "tree"
    tree.mkdir(parents=True)
    for file in await store.outline(parent):
        (tree / file.path).parent.mkdir(parents=True, exist_ok=True)
        (tree / file.path).write_bytes(await store.read(parent, file.path))
    (tree / "new.txt").write_text("new")
    module.git = dying
    trailers = Trailers(story="US-101", task="US-101-plan-1:T1", agent=agent, step=1, model="m")
    at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    await store.commit(tree, parent=parent, message="Step 1", trailers=trailers, at=at)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_storys_branch_is_cloned_for_a_person(store: Store, tmp_path: Path) -> None:
    first, _ = await two_agents(store, tmp_path, ("one.txt: 1", "two.txt: 2"))
    await store.merge(STORY, first, at=AT, message="Merge")

    assert await store.clone_branch(STORY, tmp_path / "mine") == first

    assert (tmp_path / "mine" / "one.txt").read_text() == "one.txt: 1"
    assert plain_git("status", "--porcelain", "--branch", cwd=tmp_path / "mine") == (
        "## story/US-101...origin/story/US-101"
    )


# --- bad input ---


async def test_a_working_tree_with_a_repository_in_it_is_refused(
    store: Store, tmp_path: Path
) -> None:
    base = await store.base_commit()
    tree = await checkout(store, base, tmp_path / "w" / "tree")
    inner = tree / "inner"
    inner.mkdir()
    (inner / "a.txt").write_text("a")
    plain_git("init", "-q", cwd=inner)
    plain_git("add", "-A", cwd=inner)
    plain_git("commit", "-q", "-m", "x", cwd=inner)

    with refused(ErrorType.TREE_REFUSED, "inner/: is a git repository"):
        await step(store, tree, base)


@pytest.mark.parametrize("name", [".GIT", "git~1", ".g\u200cit", ".git "])
async def test_a_name_that_is_gits_on_another_system_is_refused(
    name: str, store: Store, tmp_path: Path
) -> None:
    base = await store.base_commit()
    tree = await checkout(store, base, tmp_path / "w" / "tree")
    (tree / name).mkdir()
    (tree / name / "config").write_text("[core]\n\tfsmonitor = touch x\n")

    with refused(ErrorType.TREE_REFUSED, "git's own folder"):
        await step(store, tree, base)


async def test_a_file_or_a_number_of_files_over_the_limits_is_refused(
    store: Store, tmp_path: Path
) -> None:
    base = await store.base_commit()
    tree = await checkout(store, base, tmp_path / "w" / "tree")
    with (tree / "huge.bin").open("wb") as huge:
        huge.truncate(200 * 1024**2)

    with refused(ErrorType.TREE_REFUSED, "huge.bin: has 209,715,200 bytes"):
        await step(store, tree, base)
    (tree / "huge.bin").unlink()
    for number in range(limits.CHANGED_FILES + 1):
        (tree / f"{number}.txt").touch()
    with refused(ErrorType.TREE_REFUSED, "5,001 files changed"):
        await step(store, tree, base)


async def test_special_files_are_not_stored(store: Store, tmp_path: Path) -> None:
    base = await store.base_commit()
    tree = await checkout(store, base, tmp_path / "w" / "tree")
    os.mkfifo(tree / "pipe")
    (tree / "a.txt").write_text("a")

    commit = await step(store, tree, base)

    assert [file.path for file in await store.changed(base, commit)] == ["a.txt"]


async def test_bytes_and_odd_names_stay_as_they_are(
    project: Project, store: Store, tmp_path: Path
) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
    odd = os.fsdecode(b"caf\xe9.txt")
    project.commit(
        {
            ".gitattributes": "* text=auto eol=lf\n*.bin filter=lfs diff=lfs\n*.v ident\n",
            "windows.txt": b"a\r\nb\r\n",
            "big.bin": pointer,
            "version.v": b"$Id$\n",
            odd: b"odd\n",
        }
    )
    # The person's git converts on `add`; the bytes as they are come from a commit without rules.
    base = await store.base_commit()
    tree = await checkout(store, base, tmp_path / "w" / "tree")
    (tree / "windows.txt").write_bytes(b"c\r\nd\r\n")
    (tree / "version.v").write_bytes(b"$Id: 1 $\n")

    commit = await step(store, tree, base)

    assert await store.read(commit, "windows.txt") == b"c\r\nd\r\n"
    assert await store.read(commit, "version.v") == b"$Id: 1 $\n"
    assert await store.read(commit, "big.bin") == pointer
    assert {file.path for file in await store.changed(base, commit)} == {"version.v", "windows.txt"}
    assert "caf\\xe9.txt" in {file.path for file in await store.outline(commit)}


async def test_an_outline_offers_only_files_that_an_agent_can_name(
    project: Project, store: Store
) -> None:
    odd = os.fsdecode(b"docs/caf\xe9.md")
    project.commit({odd: "odd\n", "docs/a.md": "a\n", r"docs/caf\xe8.md": "b\n"})
    base = await store.base_commit()

    outline = await outline_of(store, base, ["docs/**"], [])

    assert outline.editable == ["docs/a.md", r"docs/caf\xe8.md"]
    assert [file.text for file in outline.files] == ["a\n", "b\n"]
    assert r"docs/caf\xe9.md" in outline.text


async def test_programs_that_attributes_select_are_not_run(store: Store, tmp_path: Path) -> None:
    """The worst case: the store's own configuration names programs."""
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/marker\ncat\n")
    program.chmod(0o755)
    for key in ("filter.x.clean", "filter.x.smudge", "diff.x.textconv", "diff.x.command"):
        plain_git("config", key, str(program), cwd=store.path)
    plain_git("config", "merge.x.driver", f"{program} %A", cwd=store.path)
    base = await store.base_commit()
    await store.start_branch(STORY, base)
    commits = []
    for number in (1, 2):
        tree = await checkout(store, base, tmp_path / str(number) / "tree")
        (tree / ".gitattributes").write_text("* filter=x diff=x merge=x\n")
        (tree / "README.md").write_text(f"{number}\n")
        commits.append(await step(store, tree, base, agent=f"agent-{number}"))

    await store.diff(base, commits[0])
    await store.changed(base, commits[0])
    await store.blame(commits[0], "README.md", 1)
    await store.merge(STORY, commits[0], at=AT, message="x")
    assert isinstance(await store.merge(STORY, commits[1], at=AT, message="x"), Conflict)

    assert not (tmp_path / "marker").exists()
    (store.path / "info" / "attributes").unlink()
    (tree / "README.md").write_text("3\n")
    await step(store, tree, commits[1], 2, agent="agent-2")
    assert (tmp_path / "marker").exists(), "the trap does not work without the store's attributes"


async def test_a_submodule_stays_and_is_not_entered(
    project: Project, store: Store, tmp_path: Path
) -> None:
    other = make_project_in(tmp_path / "other")
    plain_git("submodule", "--quiet", "add", other.url, "sub", cwd=project.clone)
    project.commit({})
    base = await store.base_commit()
    tree = await checkout(store, base, tmp_path / "w" / "tree")
    assert (tree / "sub").is_dir()
    (tree / "a.txt").write_text("a")

    commit = await step(store, tree, base)

    assert [file.path for file in await store.changed(base, commit)] == ["a.txt"]
    assert {file.path: file.kind for file in await store.outline(commit)}["sub"] == "submodule"


def make_project_in(folder: Path) -> Project:
    folder.mkdir()
    return make_project(folder)
