"""Tasks of one plan that change the same lines: one revision by the author on the merged base."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from temporalio.client import Client

from tests.support.branches import committing_councils
from tests.support.polling import until
from tests.support.repositories import in_store
from tests.unit.conftest import RunningStory, StartStory, World
from tests.unit.workflows.test_story_branch import Repo, branch_of, lines, to_gate
from workflows.models.agents import DraftTask, UsageLine

BUILD = {"README.md": "# Built\n", "built.txt": "yes\n"}
TEST = {"README.md": "# Tested\n", "tested.txt": "yes\n"}
BOTH = {"README.md": "# Built and tested\n"}


@pytest.fixture
def repo(world: World, tmp_path: Path) -> Repo:
    return Repo(world, tmp_path)


@pytest.fixture
async def start(fleet: Client, world: World, repo: Repo) -> AsyncIterator[StartStory]:
    async with committing_councils(fleet, world) as queue:
        yield StartStory(fleet, world, queue)


def conflicting(world: World, *more: str) -> None:
    """Let tasks that run at once change the same line."""
    titles = ["Build it", "Test it", *more]
    world.drafts = [DraftTask(role="DEV", title=title, description="Do it.") for title in titles]
    world.edits = {title: {"README.md": f"# {title}\n"} for title in more}
    world.edits |= {"Build it": BUILD, "Test it": TEST}


async def to_build(story: RunningStory) -> None:
    await to_gate(story, "approve_design")
    await story.approve("approve_design")


async def test_a_task_that_conflicts_once_is_revised_and_merged(
    start: StartStory, repo: Repo, world: World
) -> None:
    conflicting(world)
    world.edits |= {"Revise: Build it": BOTH, "Revise: Test it": BOTH}
    story = await start(repository="sample")
    await to_build(story)
    await story.until(state="TEST")

    (asked,) = world.revisions
    branch = await branch_of(story)
    first, second = branch.merged
    assert asked.base == first.commit
    assert asked.first_step == 2
    feedback = "\n".join(asked.feedback)
    assert "conflicts with the branch in README.md" in feedback
    assert "+# Built\n" in feedback
    assert "+# Tested\n" in feedback
    files = in_store(repo.store, "ls-tree", "--name-only", str(asked.head)).split()
    assert {"built.txt", "tested.txt"} <= set(files)
    kept = in_store(repo.store, "show", f"{asked.head}:README.md")
    assert kept == in_store(repo.store, "show", f"{first.commit}:README.md")
    assert second.base == first.commit
    assert second.commit == branch.head
    assert in_store(repo.store, "show", f"{branch.head}:README.md") == "# Built and tested"
    used = await story.handle.query("usage", result_type=list[UsageLine])
    assert [line.tokens_in for line in used if line.model == "m"] == [7]


async def test_tasks_of_a_story_that_may_change_one_file_take_turns(
    start: StartStory, repo: Repo, world: World
) -> None:
    titles = ["Build it", "Test it", "Say it"]
    world.drafts = [DraftTask(role="DEV", title=title, description="Do it.") for title in titles]
    world.edits = {title: {"README.md": f"# {title}\n"} for title in titles}
    story = await start(repository="sample", paths=["README.md"])
    await to_build(story)
    await story.until(state="TEST")

    merged = (await branch_of(story)).merged
    assert world.revisions == []
    assert len(merged) == 3
    assert [change.base for change in merged[1:]] == [change.commit for change in merged[:-1]]
    assert in_store(repo.store, "show", f"{merged[-1].commit}:README.md") in (
        f"# {title}" for title in titles
    )


async def test_tasks_that_conflict_twice_fail_and_name_the_files(
    start: StartStory, repo: Repo, world: World
) -> None:
    conflicting(world, "Say it")
    for title in ("Build it", "Test it", "Say it"):
        world.edits[f"Revise: {title}"] = {"README.md": f"# All, says {title}\n"}
    world.hold["revise"] = asyncio.Event()
    story = await start(repository="sample")
    await to_build(story)

    await until(lambda: len(world.revisions) == 2)
    world.hold["revise"].set()
    (failed,) = await until(lambda: lines(story, "WORK_FAILED"))

    assert "conflicts in README.md, also after a revision" in failed
    assert len(world.revisions) == 2
    assert len((await branch_of(story)).merged) == 2


@pytest.mark.parametrize(
    ("revision", "broken", "words"),
    [
        ({}, set(), "conflicts in README.md, also after a revision"),
        (BOTH, {"README.md"}, "README.md is barred: breaks what passed on the base"),
    ],
    ids=["changes nothing", "breaks a test"],
)
async def test_a_revision_that_is_not_fit_is_not_merged(
    start: StartStory,
    repo: Repo,
    world: World,
    revision: dict[str, str],
    broken: set[str],
    words: str,
) -> None:
    conflicting(world)
    world.edits |= {"Revise: Build it": revision, "Revise: Test it": revision}
    world.broken = broken
    story = await start(repository="sample")
    await to_build(story)

    (failed,) = await until(lambda: lines(story, "WORK_FAILED"))

    assert words in failed
    branch = await branch_of(story)
    assert [each.commit for each in branch.merged] == [branch.head]
