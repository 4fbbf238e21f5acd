"""Working trees are a cache: clean, exclusive, bounded, and right after any death."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest
from temporalio.exceptions import ApplicationError

from activities.workspace import trees as module
from activities.workspace.store import Store
from activities.workspace.stores import Stores
from activities.workspace.trees import Trees
from tests.support.polling import until
from tests.support.projects import FILES, Project, copy_project, make_project, plain_git
from workers.environment import ROOT
from workflows.models.errors import ErrorType
from workflows.models.workspace import Trailers

AT = datetime(2026, 1, 2, tzinfo=UTC)
FAR = 10**12


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


@pytest.fixture
def trees(tmp_path: Path) -> Trees:
    return Trees(tmp_path / "trees", FAR)


def content(tree: Path) -> dict[str, str]:
    """Return every file, link and empty folder below a tree."""
    found = {}
    for path in sorted(tree.rglob("*")):
        name = str(path.relative_to(tree))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = path.read_text()
        elif path.is_dir() and not any(path.iterdir()):
            found[name] = "(empty)"
        elif not path.is_dir():
            found[name] = "(special)"
    return found


async def step(store: Store, tree: Path, parent: str, number: int) -> str:
    trailers = Trailers(story="US-1", task="T", agent="a", step=number)
    return await store.commit(tree, parent=parent, message="x", trailers=trailers, at=AT)


async def test_a_tree_has_the_files_of_its_commit_and_no_git(store: Store, trees: Trees) -> None:
    async with trees.at(store, await store.base_commit()) as tree:
        assert content(tree) == FILES


async def test_a_tree_is_cleaned_of_all_that_a_step_left(
    store: Store, trees: Trees, tmp_path: Path
) -> None:
    base = await store.base_commit()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "app.py").write_text("precious\n")
    async with trees.at(store, base, key="T/a") as tree:
        (tree / "README.md").write_text("changed\n")
        (tree / "tests" / "test_app.py").unlink()
        (tree / "src" / "app.py").unlink()
        (tree / "src").rmdir()
        (tree / "src").symlink_to(outside)
        (tree / "empty" / "folder").mkdir(parents=True)
        (tree / "__pycache__").mkdir()
        (tree / "__pycache__" / "x.pyc").write_text("x")
        (tree / ".gitignore").write_text("*\n")
        (tree / "link").symlink_to(outside)
        os.mkfifo(tree / "pipe")
        plain_git("init", "-q", cwd=tree)
        (tree / "locked").mkdir()
        (tree / "locked" / "x").write_text("x")
        (tree / "locked").chmod(0)
        tree.chmod(0o500)

    async with trees.at(store, base, key="T/a") as again:
        assert again == tree
        assert content(again) == FILES

    assert content(outside) == {"app.py": "precious\n"}


async def test_a_repository_that_a_step_left_executes_nothing(
    store: Store, trees: Trees, tmp_path: Path
) -> None:
    base = await store.base_commit()
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/marker\n")
    program.chmod(0o755)
    async with trees.at(store, base, key="T/a") as tree:
        for folder in (tree, tree / "sub"):
            folder.mkdir(exist_ok=True)
            plain_git("init", "-q", cwd=folder)
            plain_git("config", "core.fsmonitor", str(program), cwd=folder)
            plain_git("config", "filter.x.smudge", str(program), cwd=folder)
            (folder / ".gitattributes").write_text("* filter=x\n")
        plain_git("status", cwd=tree)
        assert (tmp_path / "marker").exists(), "the trap does not work with plain git"
        (tmp_path / "marker").unlink()

    async with trees.at(store, base, key="T/a") as again:
        assert content(again) == FILES

    assert not (tmp_path / "marker").exists()


async def test_folders_of_any_depth_are_removed(store: Store, trees: Trees) -> None:
    base = await store.base_commit()
    async with trees.at(store, base, key="T/a") as tree:
        at = os.open(tree, os.O_RDONLY)
        for _ in range(3_000):
            os.mkdir("d", dir_fd=at)
            inner = os.open("d", os.O_RDONLY, dir_fd=at)
            os.close(at)
            at = inner
        os.close(at)

    async with trees.at(store, base, key="T/a") as again:
        assert content(again) == FILES


async def test_a_change_that_keeps_size_and_time_is_noticed(store: Store, trees: Trees) -> None:
    base = await store.base_commit()
    async with trees.at(store, base, key="T/a") as tree:
        file = tree / "README.md"
        before = file.stat()
        file.write_text(FILES["README.md"].replace("A", "B"))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        commit = await step(store, tree, base, 1)
        assert commit != base

    async with trees.at(store, base, key="T/a") as again:
        assert content(again) == FILES


async def test_a_change_in_the_second_of_the_checkout_is_noticed(
    store: Store, trees: Trees
) -> None:
    """Git compares times in seconds, and the content of files that are as new as its index."""
    base = await store.base_commit()
    async with trees.at(store, base, key="T/a") as tree:
        file = tree / "README.md"
        file.write_text(FILES["README.md"].replace("A", "B"))
        changed = int(file.stat().st_mtime)
        await until(lambda: int(time.time()) > changed)

        assert await step(store, tree, base, 1) != base


async def test_steps_go_on_in_the_tree_that_they_left(store: Store, trees: Trees) -> None:
    base = await store.base_commit()
    async with trees.at(store, base, key="T/a") as first:
        (first / "1.txt").write_text("1")
        commit = await step(store, first, base, 1)
        unchanged = (first / "README.md").stat().st_ino

    async with trees.at(store, base) as other:
        assert other != first
    async with trees.at(store, commit, key="T/a") as second:
        assert second == first
        assert (second / "README.md").stat().st_ino == unchanged
        assert content(second) == FILES | {"1.txt": "1"}


async def test_what_git_ignores_does_not_stay_in_a_tree_that_is_noted(
    store: Store, trees: Trees
) -> None:
    base = await store.base_commit()
    async with trees.at(store, base, key="T/a") as tree:
        (tree / "__pycache__").mkdir()
        (tree / "__pycache__" / "x.pyc").write_text("x")
        (tree / "README.md").write_text("a step\n")
        commit = await step(store, tree, base, 1)
        trees.note(tree, commit)

    async with trees.at(store, commit, key="T/a") as again:
        assert again == tree
        assert content(again) == FILES | {"README.md": "a step\n"}


async def test_a_tree_whose_step_failed_is_not_believed(store: Store, trees: Trees) -> None:
    base = await store.base_commit()

    async def fails() -> None:
        async with trees.at(store, base, key="T/a") as tree:
            trees.note(tree, base)
            (tree / "README.md").write_text("changed\n")
            raise RuntimeError("later")

    with pytest.raises(RuntimeError, match="later"):
        await fails()
    async with trees.at(store, base, key="T/a") as again:
        assert content(again) == FILES
        (again / "README.md").write_text("changed\n")
    async with trees.at(store, base, key="T/a") as last:
        assert content(last) == FILES


async def test_a_tree_is_used_by_one_at_a_time(store: Store, trees: Trees, tmp_path: Path) -> None:
    base = await store.base_commit()
    others = Trees(tmp_path / "trees", FAR)

    async with AsyncExitStack() as stack:
        used = [
            await stack.enter_async_context(each.at(store, base, key="T/a"))
            for each in (trees, others, trees)
        ]
        assert len(set(used)) == 3


async def test_two_trees_of_one_commit_are_made_at_once(store: Store, trees: Trees) -> None:
    base = await store.base_commit()
    both = asyncio.Barrier(5)

    async def use() -> Path:
        async with trees.at(store, base) as tree:
            await both.wait()
            assert content(tree) == FILES
            return tree

    assert len(set(await asyncio.gather(*(use() for _ in range(5))))) == 5


async def test_trees_over_the_budget_are_removed_the_longest_unused_first(
    store: Store, project: Project, tmp_path: Path
) -> None:
    project.commit({"big.txt": os.urandom(512 * 1024).hex()})
    base = await store.base_commit()
    trees = Trees(tmp_path / "trees", 3 * 1024**2)
    left = {}
    for key in ("a", "b", "c"):
        async with trees.at(store, base, key=key) as tree:
            left[key] = tree
        slot = tree.parent
        age = {"a": 100, "b": 300, "c": 0}[key]
        os.utime(slot / "state", (slot.stat().st_mtime - age,) * 2)

    async with trees.at(store, base, key="d") as used:
        assert used.exists()

    assert not left["b"].exists()
    assert left["c"].exists()
    async with Trees(tmp_path / "trees", 0).at(store, base) as alone:
        assert content(alone).keys() >= FILES.keys()
    assert list((tmp_path / "trees").glob("*/*")) == []


async def test_trees_that_are_not_used_are_removed(store: Store, trees: Trees) -> None:
    base = await store.base_commit()
    async with trees.at(store, base, key="a") as old, trees.at(store, base, key="b") as used:
        pass
    os.utime(old.parent / "state", (0, 0))

    async with trees.at(store, base, key="c"):
        pass

    assert [old.exists(), used.exists()] == [False, True]


@pytest.mark.parametrize("broken", ["state", "index", "tree", "index.lock"])
async def test_a_tree_that_was_left_broken_is_made_again(
    broken: str, store: Store, trees: Trees
) -> None:
    base = await store.base_commit()
    async with trees.at(store, base, key="T/a") as tree:
        (tree / "more.txt").write_text("x")
    slot = tree.parent
    if broken == "tree":
        tree.rename(slot / "gone")
        (slot / "outside").mkdir()
        tree.symlink_to("outside")
    else:
        (slot / broken).write_bytes(b"\0not this")

    async with trees.at(store, base, key="T/a") as again:
        assert content(again) == FILES


async def test_a_worker_that_is_killed_leaves_its_tree_to_others(
    store: Store, trees: Trees, tmp_path: Path
) -> None:
    base = await store.base_commit()
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WORKER, str(store.path), base, str(tmp_path / "trees")),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert worker.stdout
    left = Path((await worker.stdout.readline()).decode().strip())
    async with trees.at(store, base, key="T/a") as mine:
        assert mine != left
    worker.send_signal(signal.SIGKILL)
    await worker.wait()

    async with AsyncExitStack() as stack:
        used = [
            await stack.enter_async_context(trees.at(store, base, key=key)) for key in ("T/a", "")
        ]
        assert left in used
        for tree in used:
            assert content(tree) == FILES


WORKER = """
import asyncio, sys
from pathlib import Path
from activities.workspace.store import Store
from activities.workspace.trees import Trees
from workflows.models.workspace import Repository

async def main(path, commit, root):
    store = Store(Path(path), Repository(key="sample", url="file:///nowhere"))
    async with Trees(Path(root), 10**12).at(store, commit) as tree:
        (tree / "README.md").write_text("half")
        (tree / "more.txt").write_text("x")
        print(tree, flush=True)
        await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_commit_that_the_store_does_not_have_is_not_found(
    store: Store, trees: Trees
) -> None:
    with pytest.raises(ApplicationError) as error:
        async with trees.at(store, "1" * 40):
            pass

    assert error.value.type == ErrorType.NOT_FOUND


async def test_a_submodules_folder_is_empty(
    project: Project, store: Store, trees: Trees, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = make_project(tmp_path / "other")
    plain_git("submodule", "--quiet", "add", other.url, "sub", cwd=project.clone)
    project.commit({})
    base = await store.base_commit()
    async with trees.at(store, base, key="a") as tree:
        (tree / "sub" / "x.txt").write_text("x")
        assert await step(store, tree, base, 1) == base

    async with trees.at(store, base, key="a") as again:
        assert content(again)["sub"] == "(empty)"


def replace_base(project: Project, *files: str, content: bytes = b"") -> None:
    """Give the project a base with files of `git fast-import`; the last has `content`."""
    stream = "".join(("commit refs/heads/main\ncommitter A <a@b> 1 +0000\ndata 1\nx\n", *files))
    fast = ("-c", "core.compression=1", "fast-import", "--quiet", "--force", "--done")
    plain_git(*fast, cwd=project.bare, stdin=stream.encode() + content + b"\ndone\n")


async def test_fifty_thousand_files_are_handled(
    project: Project, store: Store, trees: Trees
) -> None:
    names = [f"d{number % 200}/f{number}.txt" for number in range(50_000)]
    replace_base(project, *(f"M 644 inline {name}\ndata 1\nx\n" for name in names))
    base = await store.base_commit()

    assert {file.path for file in await store.outline(base)} == set(names)
    async with trees.at(store, base, key="a") as tree:
        (tree / "d1" / "new.txt").write_text("x")
        commit = await step(store, tree, base, 1)
        (tree / "d1" / "new.txt").write_text("y")
    assert [file.path for file in await store.changed(base, commit)] == ["d1/new.txt"]
    async with trees.at(store, commit, key="a") as again:
        assert (again / "d1" / "new.txt").read_text() == "x"


async def test_a_huge_file_of_the_base_is_handled(
    project: Project, store: Store, trees: Trees
) -> None:
    size = 200 * 1024**2
    replace_base(project, f"M 644 inline huge.bin\ndata {size}\n", content=b"\0" * size)
    base = await store.base_commit()

    async with trees.at(store, base, key="a") as tree:
        assert (tree / "huge.bin").stat().st_size == size
        (tree / "new.txt").write_text("x")
        commit = await step(store, tree, base, 1)
    assert [file.path for file in await store.changed(base, commit)] == ["new.txt"]
    with pytest.raises(ApplicationError, match="over the limit"):
        await store.read(base, "huge.bin")


def test_what_cannot_be_removed_at_once_is_opened(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "file").write_text("x")
    for folder in (deep, deep.parent, deep.parent.parent):
        folder.chmod(0)

    module.discard(tmp_path / "a")

    assert not (tmp_path / "a").exists()
