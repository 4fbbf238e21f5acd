"""Activities on a story's branch, each repeated as after a crash, on a real store."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from temporalio.exceptions import ApplicationError

from activities.workspace.branches import Branches, globs_of
from activities.workspace.stores import Stores
from tests.support.branches import FIX, README, commit
from tests.support.projects import plain_git
from tests.support.repositories import in_store, make_repository
from tests.unit.conftest import World
from workflows.models.branches import BranchPoint, MergedBase, MergeRequest
from workflows.models.workspace import Repository

AT = datetime(2026, 3, 1, 11, tzinfo=UTC)


class Branch:
    """The branch of a story, with a change of the code on it and one of the README beside it."""

    def __init__(self, folder: Path) -> None:
        folder.joinpath("origin").mkdir()
        folder.joinpath("stores").mkdir()
        self.entry = Repository(key="sample", url=make_repository(folder / "origin"))
        self.store = folder / "stores" / "sample.git"
        self.base = in_store(folder / "origin" / ".git", "rev-parse", "main")
        self.activities = Branches({"sample": self.entry}, Stores(folder / "stores"))
        self.world = World(folder=folder, edits={"code": FIX, "readme": README})

    @property
    def head(self) -> str:
        return in_store(self.store, "rev-parse", "story/US-1")

    async def place(self, at: str) -> None:
        point = BranchPoint(repository=self.entry, story_id="US-1", commit=at)
        await self.activities.place_branch(point)

    async def commit(self, title: str, base: str = "") -> str:
        made = await commit(self.world, self.entry, base or self.base, title, f"T-{title}")
        return made.commit

    async def merge(self, head: str, change: str, hour: int = 11) -> str:
        return (await self.activities.merge_change(self.request(head, change, hour))).head

    async def merged_base(self, head: str, change: str) -> MergedBase:
        return await self.activities.merged_base(self.request(head, change))

    def request(self, head: str, change: str, hour: int = 11) -> MergeRequest:
        return MergeRequest(
            repository=self.entry,
            story_id="US-1",
            task_id="T-two",
            head=head,
            commit=change,
            at=AT.replace(hour=hour),
        )

    def tree_without(self, name: str) -> str:
        listed = in_store(self.store, "ls-tree", self.base).splitlines()
        kept = "\n".join(line for line in listed if not line.endswith(f"\t{name}"))
        return plain_git("mktree", cwd=self.store, stdin=f"{kept}\n".encode())

    def files(self, commit: str) -> dict[str, str]:
        names = in_store(self.store, "ls-tree", "-r", "--name-only", commit).splitlines()
        return {name: in_store(self.store, "show", f"{commit}:{name}") for name in names}


@pytest.fixture
async def branch(tmp_path: Path) -> Branch:
    branch = Branch(tmp_path)
    await branch.place(branch.base)
    return branch


async def test_a_merge_that_is_repeated_is_one_merge(branch: Branch) -> None:
    code = await branch.merge(branch.base, await branch.commit("code"))
    readme = await branch.commit("readme")

    merged = await branch.merge(code, readme)
    again = await branch.merge(code, readme, hour=12)

    assert merged == again == branch.head
    parents = in_store(branch.store, "rev-list", "--parents", "-1", merged).split()[1:]
    assert parents == [code, readme]
    assert in_store(branch.store, "for-each-ref", "refs/fleet-left") == ""


async def test_a_fast_forward_that_is_repeated_changes_nothing(branch: Branch) -> None:
    code = await branch.commit("code")

    assert await branch.merge(branch.base, code) == code
    assert await branch.merge(branch.base, code) == code
    assert branch.head == code


async def test_a_change_that_the_branch_has_is_merged_already(branch: Branch) -> None:
    code = await branch.merge(branch.base, await branch.commit("code"))

    assert await branch.merge(code, branch.base) == code


async def test_a_merge_of_a_reset_history_begins_at_the_head_that_it_knows(branch: Branch) -> None:
    later = await branch.merge(branch.base, await branch.commit("code"))
    readme = await branch.commit("readme")

    assert await branch.merge(branch.base, readme) == readme == branch.head
    kept = in_store(branch.store, "for-each-ref", "--format=%(objectname)", "refs/fleet-left")
    assert kept == later


async def test_a_conflict_leaves_the_branch_as_it_is(branch: Branch) -> None:
    branch.world.edits = {"one": {"README.md": "# One\n"}, "two": {"README.md": "# Two\n"}}
    one = await branch.merge(branch.base, await branch.commit("one"))

    assert await branch.merge(one, await branch.commit("two")) == one
    assert branch.head == one


def test_the_tests_that_a_story_may_change_match_its_paths_and_those_of_the_entry() -> None:
    entry = Repository(key="sample", url="file:///r", test_paths=["tests/**"])

    assert globs_of("test_paths", [], entry) == ["tests/**"]
    assert globs_of("test_paths", ["adder/**", "tests/unit/**"], entry) == ["tests/unit/**"]
    assert globs_of("test_paths", ["README.md"], entry) == []


def test_a_start_with_more_common_globs_than_an_agent_takes_is_refused() -> None:
    entry = Repository(key="sample", url="file:///r", test_paths=["**/*a*b*c*d*e*f*"])

    with pytest.raises(ApplicationError, match="`test_paths` of the repository") as failed:
        globs_of("test_paths", ["*1*2*3*4*5*6*"], entry)

    assert failed.value.type == "InvalidInput"


# --- the base of a revision after a conflict ------------------------------------------------------


async def test_the_base_of_a_revision_has_all_of_the_change_but_the_conflicts(
    branch: Branch,
) -> None:
    branch.world.edits = {
        "one": {"README.md": "# One\n", "one.txt": "1\n"},
        "two": {"README.md": "# Two\n", "two.txt": "2\n"},
    }
    one = await branch.merge(branch.base, await branch.commit("one"))
    two = await branch.commit("two")

    base = await branch.merged_base(one, two)

    files = branch.files(base.commit)
    assert (files["README.md"], files["one.txt"], files["two.txt"]) == ("# One", "1", "2")
    parents = in_store(branch.store, "rev-list", "--parents", "-1", base.commit).split()[1:]
    assert parents == [one, two]
    assert (base.files, base.steps) == (["README.md"], 1)
    assert "+# One" in base.branch_diff
    assert "+# Two" in base.change_diff
    assert "two.txt" not in base.change_diff
    assert branch.head == one
    assert await branch.merged_base(one, two) == base
    assert await branch.merge(one, base.commit) == base.commit


async def test_the_commit_but_for_its_conflicts_outlives_the_collection_of_garbage(
    branch: Branch,
) -> None:
    branch.world.edits = {"one": {"README.md": "# One\n"}, "two": {"README.md": "# Two\n"}}
    one = await branch.merge(branch.base, await branch.commit("one"))
    base = await branch.merged_base(one, await branch.commit("two"))

    in_store(branch.store, "gc", "--quiet", "--prune=now")

    assert in_store(branch.store, "cat-file", "-t", base.commit) == "commit"


async def test_a_file_that_the_branch_has_removed_stays_removed(branch: Branch) -> None:
    branch.world.edits = {"one": {}, "two": {"README.md": "# Two\n", "two.txt": "2\n"}}
    one = in_store(
        branch.store,
        *("-c", "user.name=bo", "-c", "user.email=bo@example.org"),
        *("commit-tree", "-p", branch.base, "-m", "Remove", branch.tree_without("README.md")),
    )

    base = await branch.merged_base(one, await branch.commit("two"))

    files = branch.files(base.commit)
    assert "README.md" not in files
    assert "two.txt" in files
    assert base.files == ["README.md"]


async def test_where_a_file_meets_a_folder_the_revision_begins_at_the_branch(
    branch: Branch,
) -> None:
    branch.world.edits = {"one": {"notes": "a file\n"}, "two": {"notes/a.txt": "in a folder\n"}}
    one = await branch.merge(branch.base, await branch.commit("one"))

    base = await branch.merged_base(one, await branch.commit("two"))

    assert branch.files(base.commit) == branch.files(one)
    assert base.files
