"""Activities on a story's branch, each repeated as after a crash, on a real store."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from temporalio.exceptions import ApplicationError

from activities.workspace.branches import Branches, globs_of
from activities.workspace.store import Stores
from tests.support.branches import FIX, README, commit
from tests.support.repositories import in_store, make_repository
from tests.unit.conftest import World
from workflows.models.branches import BranchPoint, MergeRequest
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
        request = MergeRequest(
            repository=self.entry,
            story_id="US-1",
            task_id="T-1",
            head=head,
            commit=change,
            at=AT.replace(hour=hour),
        )
        return (await self.activities.merge_change(request)).head


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
