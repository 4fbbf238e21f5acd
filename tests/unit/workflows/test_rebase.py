"""A base that moves while a story is under way: what its gates show, and the update `rebase`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from temporalio.client import Client, WorkflowUpdateStage

from tests.support.branches import README, committing_councils
from tests.support.polling import until
from tests.support.projects import plain_git
from tests.support.repositories import in_store
from tests.unit.conftest import RunningStory, StartStory, World
from tests.unit.workflows.test_story import refused
from tests.unit.workflows.test_story_branch import (
    Repo,
    branch_of,
    delivered,
    lines,
    to_gate,
    view_of,
)
from workflows.models.branches import BranchView
from workflows.models.story import StoryView

MORE = {"more.txt": "from main\n"}


class MovingRepo(Repo):
    """A repository in which people work beside the story."""

    def move_base(self, files: dict[str, str] = MORE) -> str:
        """Commit files on main, and return the commit."""
        for name, text in files.items():
            (self.origin / name).write_text(text)
        plain_git("add", "--all", cwd=self.origin)
        plain_git("commit", "--quiet", "-m", "Change main", cwd=self.origin)
        return self.at(self.origin / ".git", "main")

    def file(self, commit: str, path: str) -> str:
        return in_store(self.store, "show", f"{commit}:{path}")


@pytest.fixture
def repo(world: World, tmp_path: Path) -> MovingRepo:
    return MovingRepo(world, tmp_path)


@pytest.fixture
async def start(fleet: Client, world: World, repo: MovingRepo) -> AsyncIterator[StartStory]:
    async with committing_councils(fleet, world) as queue:
        yield StartStory(fleet, world, queue)


async def rebase(story: RunningStory, role: str = "PO") -> StoryView:
    return await story.update("rebase", actor="ana", role=role)


async def seen_at_gate(story: RunningStory, gate: str) -> BranchView:
    """Return what the view shows of the branch once the base was looked at for the gate."""
    await story.until(gate=gate)
    seen = (await until(lambda: branch_of(story), lambda branch: looked(branch, gate))).seen
    assert seen is not None
    return await view_of(story)


def looked(branch: Any, gate: str) -> bool:
    return branch.seen is not None and branch.seen.gate == gate


# --- at gates -------------------------------------------------------------------------------------


async def test_a_gate_shows_by_how_many_commits_the_base_has_moved(
    start: StartStory, repo: MovingRepo
) -> None:
    story = await start(repository="sample")
    assert (await seen_at_gate(story, "approve_scope")).base_note(story.story_id) == ""
    repo.move_base()
    repo.move_base({"more.txt": "again\n"})
    await story.approve("approve_scope")

    note = (await seen_at_gate(story, "approve_design")).base_note(story.story_id)

    assert note == (
        f"main has moved by 2 commits since {repo.base[:12]}; `fleet rebase {story.story_id}` "
        "merges it"
    )


async def test_a_gate_opens_although_the_base_cannot_be_seen(
    start: StartStory, repo: MovingRepo
) -> None:
    story = await start(repository="sample")
    await seen_at_gate(story, "approve_scope")
    plain_git("branch", "-m", "main", "trunk", cwd=repo.origin)
    await story.approve("approve_scope")

    note = (await seen_at_gate(story, "approve_design")).base_note(story.story_id)

    assert note.startswith("whether main has moved is unknown: ")
    assert "no such branch" in note
    assert (await story.approve("approve_design")).state == "BUILD"


# --- rebase ---------------------------------------------------------------------------------------


async def test_a_rebase_at_the_design_gate_moves_the_branch_and_makes_old_approvals_stale(
    start: StartStory, repo: MovingRepo, world: World
) -> None:
    story = await start(repository="sample")
    await to_gate(story, "approve_design")
    shown, base = (await story.state()).revision, repo.move_base()

    view = await rebase(story)

    assert view.branch is not None
    assert (view.branch.base, view.branch.head) == (base, base)
    assert view.branch.base_note(story.story_id) == ""
    assert view.revision != shown
    with refused("StaleRevision", f"main at {base[:12]} was merged by ana"):
        await story.approve("approve_design", revision=shown)
    await story.approve("approve_design", revision=view.revision)
    await story.finish()
    assert repo.file((await view_of(story)).head, "more.txt") == "from main"
    assert [event["base"] for event in delivered(world)] == [base]
    assert world.measured_commits[-1].base == base


async def test_a_rebase_at_the_test_gate_is_measured_before_the_gate_opens_again(
    start: StartStory, repo: MovingRepo, world: World
) -> None:
    story = await start(repository="sample")
    await to_gate(story, "qa_passed")
    before, base = await story.state(), repo.move_base()
    world.hold["measure_change"] = asyncio.Event()

    after = await rebase(story, role="QA")
    assert after.pending_gate == ""
    with refused("IllegalMove", "measuring"):
        await rebase(story)
    world.hold["measure_change"].set()
    shown = await story.until(gate="qa_passed")

    head = (await view_of(story)).head
    assert (world.measured_commits[-1].base, world.measured_commits[-1].commit) == (base, head)
    assert repo.file(head, "more.txt") == "from main"
    assert repo.file(head, "README.md") == README["README.md"].strip()
    with refused("StaleRevision", "was merged by ana"):
        await story.approve("qa_passed", "QA", revision=before.revision)
    (line,) = await lines(story, "REBASED")
    assert f"(commits since {repo.base[:12]}: 1); its head is {head}" in line
    assert (await story.approve("qa_passed", "QA", revision=shown.revision)).state == "DOCS"


async def test_an_approval_that_comes_while_the_base_is_merged_is_stale(
    start: StartStory, repo: MovingRepo, world: World
) -> None:
    story = await start(repository="sample")
    await seen_at_gate(story, "approve_scope")
    await story.approve("approve_scope")
    await seen_at_gate(story, "approve_design")
    base, held = repo.move_base(), asyncio.Event()
    world.hold["base_now"] = held
    rebasing = asyncio.create_task(rebase(story))
    await until(
        story.handle.describe, lambda described: described.raw_description.pending_activities
    )

    approving = await story.handle.start_update(
        "approve",
        {"gate": "approve_design", "actor": "ana", "role": "PO"},
        wait_for_stage=WorkflowUpdateStage.ACCEPTED,
    )
    held.set()

    with refused("StaleRevision", base):
        await approving.result()
    assert (await rebasing).pending_gate == "approve_design"


async def test_a_rebase_that_conflicts_names_the_files_and_changes_nothing(
    start: StartStory, repo: MovingRepo
) -> None:
    story = await start(repository="sample")
    await to_gate(story, "qa_passed")
    before = await until(story.state, lambda view: view.branch and view.branch.base_now)
    repo.move_base({"README.md": "# Another\n"})

    with refused("MergeConflict", "README.md", "nothing is changed"):
        await rebase(story)

    after = await story.state()
    assert before.branch is not None
    assert after.branch is not None
    # The look at the base for this gate may have ended after the base has moved.
    look = {"base_now": after.branch.base_now, "base_commits": after.branch.base_commits}
    branch = before.branch.model_copy(update=look)
    assert after == before.model_copy(update={"branch": branch})
    assert repo.at(repo.store, f"story/{story.story_id}") == before.branch.head
    assert (await story.approve("qa_passed", "QA", revision=before.revision)).state == "DOCS"


async def test_a_rebase_that_breaks_the_build_holds_every_gate_until_a_report_passes(
    start: StartStory, repo: MovingRepo, world: World
) -> None:
    story = await start(repository="sample")
    await to_gate(story, "docs_ready")
    repo.move_base()
    world.builds = False

    await rebase(story)
    await until(lambda: lines(story, "WORKSPACE_REPORT"), lambda found: len(found) == 2)
    await story.until(gate="")

    with refused("GuardBlocked", "the base was merged", "build or units failed"):
        await story.approve("docs_ready")
    await story.report(commit=(await view_of(story)).head)
    await story.until(gate="docs_ready")
    assert (await story.approve("docs_ready")).state == "DONE"


async def test_what_may_not_be_rebased_is_refused_with_the_reason(
    start: StartStory, repo: MovingRepo, world: World
) -> None:
    story = await start(repository="sample")
    await to_gate(story, "approve_design")

    with refused("IllegalMove", f"main is still at {repo.base}"):
        await rebase(story)
    with refused("GateRole", "is for PO"):
        await rebase(story, role="DEV")
    with refused("Permission", "is reserved"):
        await story.update("rebase", actor="policy:auto", role="PO")
    plain_git("branch", "-m", "main", "trunk", cwd=repo.origin)
    with refused("BaseMissing", "is as it was", "no such branch"):
        await rebase(story)
    world.hold["measure_change"] = asyncio.Event()
    await story.approve("approve_design")
    await until(story.state, lambda view: view.working_on.startswith("measuring"))
    with refused("IllegalMove", "measuring story/", "is at work"):
        await rebase(story)


async def test_a_story_without_a_repository_has_no_base(start_story: StartStory) -> None:
    story = await start_story()
    await story.until(gate="approve_scope")

    with refused("IllegalMove", "has no repository"):
        await rebase(story)


# --- two stories ----------------------------------------------------------------------------------


async def test_two_stories_on_one_repository_do_not_disturb_each_other(
    start: StartStory, repo: MovingRepo, world: World
) -> None:
    one, two = await asyncio.gather(
        start(repository="sample"),
        start(repository="sample", story_id=f"US-{world.key}-b"),
    )
    await asyncio.gather(to_gate(one, "qa_passed"), to_gate(two, "qa_passed"))
    shown, base = await two.state(), repo.move_base()

    await rebase(one)
    await one.until(gate="qa_passed")

    assert await two.state() == shown
    assert shown.branch is not None
    assert repo.at(repo.store, f"story/{two.story_id}") == shown.branch.head
    assert (await two.approve("qa_passed", "QA", revision=shown.revision)).state == "DOCS"
    await asyncio.gather(one.finish(), two.finish())
    assert sorted(event["base"] for event in delivered(world)) == sorted([base, repo.base])
