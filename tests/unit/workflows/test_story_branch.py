"""A story in a repository: its branch, the commits that gates show, measurement and delivery."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from temporalio.client import Client, WorkflowFailureError
from temporalio.exceptions import ActivityError, ApplicationError

from tests.support.branches import FIX, README, commit, committing_councils
from tests.support.polling import until
from tests.support.repositories import in_store, make_repository
from tests.unit.conftest import RunningStory, StartStory, World
from tests.unit.workflows.test_story import refused
from workflows.models.agents import DraftTask
from workflows.models.branches import BranchView, StoryBranch
from workflows.models.plan import PlanInput
from workflows.models.story import StoryResult, TimelineEntry
from workflows.models.workspace import Repository


class Repo:
    """The repository `sample` of a world, and its store."""

    def __init__(self, world: World, folder: Path) -> None:
        self.origin = folder / "origin"
        self.origin.mkdir(parents=True)
        self.entry = Repository(key="sample", url=make_repository(self.origin))
        self.store = folder / "stores" / "sample.git"
        self.base = self.at(self.origin / ".git", "main")
        world.folder = folder
        world.repositories = {"sample": self.entry}
        world.edits = {"Build it": FIX, "Test it": README}
        self.world = world

    def at(self, git_dir: Path, ref: str) -> str:
        return in_store(git_dir, "rev-parse", ref)

    def branches(self) -> str:
        return in_store(self.store, "branch", "--format=%(refname:short)")

    async def foreign_commit(self, story: RunningStory) -> str:
        """Move the story's branch to a commit that the story did not make."""
        self.world.edits["By hand"] = {"by-hand.txt": "x\n"}
        head = self.at(self.store, f"story/{story.story_id}")
        made = await commit(self.world, self.entry, head, "By hand", "by-hand")
        in_store(self.store, "update-ref", f"refs/heads/story/{story.story_id}", made.commit)
        return made.commit


@pytest.fixture
def repo(world: World, tmp_path: Path) -> Repo:
    return Repo(world, tmp_path)


@pytest.fixture
async def start(fleet: Client, world: World, repo: Repo) -> AsyncIterator[StartStory]:
    async with committing_councils(fleet, world) as queue:
        yield StartStory(fleet, world, queue)


async def branch_of(story: RunningStory) -> StoryBranch:
    found: StoryBranch = await story.handle.query("branch", result_type=StoryBranch)
    return found


async def view_of(story: RunningStory) -> BranchView:
    view = (await story.state()).branch
    assert view is not None
    return view


async def lines(story: RunningStory, event: str) -> list[str]:
    shown = await story.handle.query("timeline", result_type=list[TimelineEntry])
    return [line.text for line in shown if line.event == event]


async def to_gate(story: RunningStory, gate: str) -> None:
    """Approve all gates before one."""
    for each, role in (
        ("approve_scope", "PO"),
        ("approve_design", "PO"),
        ("qa_passed", "QA"),
        ("docs_ready", "PO"),
    ):
        await story.until(gate=each)
        if each == gate:
            return
        await story.approve(each, role)


async def done(story: RunningStory) -> StoryResult:
    await to_gate(story, "docs_ready")
    await story.approve("docs_ready")
    return await story.handle.result()


def delivered(world: World) -> list[dict[str, Any]]:
    return [e.body for e in world.published if e.subject == "planning.story.delivered"]


async def test_a_story_in_a_repository_ends_in_a_branch(
    start: StartStory, repo: Repo, world: World
) -> None:
    story = await start(repository="sample")

    result = await done(story)

    branch = result.branch
    assert branch is not None
    assert branch.head == repo.at(repo.store, f"story/{story.story_id}")
    assert in_store(repo.store, "show", f"{branch.head}:README.md") == README["README.md"].strip()
    (event,) = delivered(world)
    assert {name: event[name] for name in event if name not in ("timestamp",)} == {
        "story_id": story.story_id,
        "repository": "sample",
        "branch": f"story/{story.story_id}",
        "commit": branch.head,
        "base": repo.base,
        "files_changed": 2,
        "insertions": 5,
        "deletions": 1,
    }
    assert repo.at(repo.origin / ".git", "main") == repo.base
    assert in_store(repo.origin / ".git", "branch", "--format=%(refname:short)") == "main"


async def test_the_branch_is_created_when_the_scope_is_approved(
    start: StartStory, repo: Repo
) -> None:
    story = await start(repository="sample")
    await story.until(gate="approve_scope")
    assert (await view_of(story)).head == ""
    assert repo.branches() == ""

    await story.approve("approve_scope")
    await story.until(gate="approve_design")

    assert (await view_of(story)).head == repo.base
    assert repo.at(repo.store, f"story/{story.story_id}") == repo.base


async def test_each_task_begins_at_the_merged_changes_before_it(
    fleet: Client, start: StartStory, repo: Repo
) -> None:
    story = await start(repository="sample")
    await to_gate(story, "qa_passed")

    branch = await branch_of(story)

    plan = fleet.get_workflow_handle(f"plan-{story.story_id}-{story.story_id}-plan-1")
    history = await plan.fetch_history()
    began = history.events[0].workflow_execution_started_event_attributes
    (asked,) = await fleet.data_converter.decode(began.input.payloads, [PlanInput])
    assert asked.work.goal == ["Shorten links"]
    first, second = branch.merged
    assert (first.base, second.base, second.commit) == (repo.base, first.commit, branch.head)
    parents = in_store(repo.store, "rev-list", "--parents", branch.head).splitlines()
    assert parents[0] == f"{second.commit} {first.commit}"


async def test_the_fleets_own_measurement_of_the_head_passes_the_build(
    start: StartStory, repo: Repo
) -> None:
    story = await start(repository="sample")
    await to_gate(story, "qa_passed")

    head = (await view_of(story)).head
    (line,) = await lines(story, "WORKSPACE_REPORT")

    assert f"commit {head}" in line
    shown = await story.handle.query("timeline", result_type=list[TimelineEntry])
    assert [each.actor for each in shown if each.event == "WORKSPACE_REPORT"] == ["fleet"]


async def test_a_build_that_the_fleet_sees_fail_waits_for_a_person(
    start: StartStory, repo: Repo, world: World
) -> None:
    world.builds = False
    story = await start(repository="sample")
    await to_gate(story, "approve_design")
    await story.approve("approve_design")

    await until(lambda: lines(story, "WORKSPACE_REPORT"), lambda found: len(found) == 3)
    assert (await story.until(working_on="")).state == "BUILD"
    assert "after 2 repair tasks" in str(await story.handle.query("transitions"))
    await story.report(commit=(await view_of(story)).head)

    assert (await story.until(state="TEST")).report is not None


async def test_a_branch_that_cannot_be_measured_waits_for_a_report_of_its_commit(
    start: StartStory, repo: Repo, world: World
) -> None:
    world.failing["measure_change"] = "set-up: no network"
    story = await start(repository="sample")
    await to_gate(story, "approve_design")
    await story.approve("approve_design")
    await until(lambda: lines(story, "NOT_MEASURED"))
    await story.until(working_on="")

    moves = await story.handle.query("transitions")
    assert "set-up: no network" in str(moves)
    head = (await view_of(story)).head
    for text in ("c", "c0ffee", "HEAD", head.upper(), f"{head}\n", f"{head}-dirty"):
        with refused("InvalidInput", "is not 7 to 40 hexadecimal digits"):
            await story.report(commit=text)
    await story.report(commit="c0ffee1")
    moves = await story.handle.query("transitions")
    assert "the last report is of commit c0ffee1" in str(moves)
    assert (await story.state()).state == "BUILD"
    await story.report(commit=(await view_of(story)).head)

    await story.until(state="TEST")


@pytest.mark.parametrize("gate", ["approve_design", "qa_passed", "docs_ready"])
async def test_a_commit_that_appears_after_a_gate_was_shown_makes_the_approval_stale(
    start: StartStory, repo: Repo, gate: str
) -> None:
    story = await start(repository="sample")
    await to_gate(story, gate)
    shown = await story.state()
    assert shown.branch is not None
    made = await repo.foreign_commit(story)

    with refused("StaleRevision", shown.branch.head, made):
        await story.approve(gate, shown.gate_role, revision=shown.revision)

    now = await story.state()
    assert now.state == shown.state
    assert (now.branch.head if now.branch else "") == made
    assert now.revision != shown.revision
    with refused("GuardBlocked" if gate == "qa_passed" else "StaleRevision", made[:12]):
        await story.approve(gate, shown.gate_role, revision=shown.revision)


async def test_a_commit_that_no_one_measured_does_not_pass_the_test_gate(
    start: StartStory, repo: Repo
) -> None:
    story = await start(repository="sample")
    await to_gate(story, "qa_passed")
    made = await repo.foreign_commit(story)

    with refused("StaleRevision", "the gate is not open"):
        await story.approve("qa_passed", "QA")
    await story.report(commit=made)
    await story.until(gate="qa_passed")

    assert (await story.approve("qa_passed", "QA")).state == "DOCS"


async def test_a_gate_is_not_opened_while_the_branch_cannot_be_read(
    start: StartStory, repo: Repo, world: World
) -> None:
    story = await start(repository="sample")
    await to_gate(story, "approve_design")
    world.repositories = {}

    with refused("GitStoreAway", "cannot be read now", "sample"):
        await story.approve("approve_design")

    assert (await story.state()).state == "DESIGN"


async def test_the_approved_commit_is_pushed_where_the_entry_says_so(
    start: StartStory, repo: Repo, world: World
) -> None:
    world.repositories = {"sample": repo.entry.model_copy(update={"push": True})}
    story = await start(repository="sample")

    result = await done(story)

    assert result.branch is not None
    assert repo.at(repo.origin / ".git", result.branch.branch) == result.branch.head
    assert repo.at(repo.origin / ".git", "main") == repo.base


async def test_a_refused_push_is_a_line_in_the_timeline(
    start: StartStory, repo: Repo, world: World
) -> None:
    world.repositories = {"sample": repo.entry.model_copy(update={"push": True})}
    story = await start(repository="sample")
    tree = in_store(repo.origin / ".git", "rev-parse", "main^{tree}")
    other = in_store(
        repo.origin / ".git",
        *("-c", "user.name=bo", "-c", "user.email=bo@example.org"),
        *("commit-tree", tree, "-m", "Another"),
    )
    in_store(repo.origin / ".git", "branch", f"story/{story.story_id}", other)

    await done(story)

    (line,) = await lines(story, "NOT_PUSHED")
    assert "refuses the branch" in line
    assert len(delivered(world)) == 1
    assert repo.at(repo.origin / ".git", f"story/{story.story_id}") == other


@pytest.mark.parametrize(
    ("fields", "changes", "kind", "words"),
    [
        ({"repository": "nowhere"}, {}, "UnknownRepository", "it has: sample"),
        ({"repository": "sample"}, {"base": "gone"}, "BaseMissing", "no such branch"),
        ({"repository": "sample"}, {"url": "file:///nonexistent"}, "RepositoryAway", "its `url`"),
        ({"repository": "sample", "paths": ["../x"]}, {}, "InvalidInput", "from the root"),
    ],
)
async def test_a_story_whose_repository_cannot_be_used_does_not_start(
    start: StartStory,
    repo: Repo,
    world: World,
    fields: dict[str, Any],
    changes: dict[str, str],
    kind: str,
    words: str,
) -> None:
    world.repositories = {"sample": repo.entry.model_copy(update=changes)}
    story = await start(**fields)

    with pytest.raises(WorkflowFailureError) as failed:
        await story.handle.result()

    error = failed.value.cause
    assert isinstance(error, ActivityError)
    assert isinstance(error.cause, ApplicationError)
    assert error.cause.type == kind
    assert words in error.cause.message
    assert world.published == []


@pytest.mark.parametrize("fields", [{"paths": ["docs/**"]}, {"steps": 1}])
async def test_paths_are_for_stories_with_a_repository(
    start_story: StartStory, fields: dict[str, Any]
) -> None:
    story = await start_story(**fields)

    with pytest.raises(WorkflowFailureError) as failed:
        await story.handle.result()

    assert f"{next(iter(fields))}: " in str(failed.value.cause)
    assert "name one, or remove it" in str(failed.value.cause)


async def test_a_glob_that_matches_nothing_is_shown_at_the_gate(
    start: StartStory, repo: Repo
) -> None:
    story = await start(repository="sample", paths=["README.md", "doc/**"])
    await story.until(gate="approve_scope")

    assert (await view_of(story)).unmatched == ["doc/**"]


async def test_tasks_that_run_at_once_are_merged(
    start: StartStory, repo: Repo, world: World
) -> None:
    world.drafts = [
        DraftTask(role="DEV", title="Build it", description="Write the code."),
        DraftTask(role="QA", title="Test it", description="Write tests."),
    ]
    story = await start(repository="sample")

    await to_gate(story, "qa_passed")

    head = (await view_of(story)).head
    assert len(in_store(repo.store, "rev-list", "--parents", "-1", head).split()) == 3
    assert in_store(repo.store, "show", f"{head}:README.md") == README["README.md"].strip()
    assert "left + right" in in_store(repo.store, "show", f"{head}:adder/__init__.py")


@pytest.mark.parametrize("way", ["rejected", "amended"])
async def test_what_a_stopped_plan_has_merged_leaves_the_branch_again(
    start: StartStory, repo: Repo, world: World, way: str
) -> None:
    world.hold["Test it"] = asyncio.Event()
    story = await start(repository="sample")
    await to_gate(story, "approve_design")
    await story.approve("approve_design")
    name = f"story/{story.story_id}"
    await until(lambda: repo.at(repo.store, name) != repo.base)

    if way == "rejected":
        await story.reject("reject_build")
    else:
        await story.update("amend", brief="Another one.")
        await story.until(gate="approve_scope")
        await story.approve("approve_scope")
    world.hold["Test it"].set()
    await story.until(gate="approve_design")

    assert repo.at(repo.store, name) == (await view_of(story)).head == repo.base
    assert (await story.approve("approve_design")).state == "BUILD"


async def test_a_story_is_not_cancelled_before_its_work_has_ended(
    start: StartStory, repo: Repo, world: World
) -> None:
    """If it is terminated until then, the sweep announces the end that it has not announced."""
    world.hold["place_branch"] = asyncio.Event()
    story = await start(repository="sample")
    await to_gate(story, "approve_scope")
    await story.approve("approve_scope")

    async def placing() -> list[str]:
        pending = (await story.handle.describe()).raw_description.pending_activities
        return [each.activity_type.name for each in pending]

    await until(placing, lambda names: names == ["place_branch"])
    await story.handle.cancel()
    with refused("IllegalMove", "the story is cancelled"):
        await story.update("amend", brief="Another one.")

    assert not (await story.state()).cancelled
    world.hold["place_branch"].set()
    with pytest.raises(WorkflowFailureError):
        await story.handle.result()
    assert (await story.state()).cancelled


async def test_a_story_whose_delivery_is_cancelled_stays_done(
    start: StartStory, repo: Repo, world: World
) -> None:
    world.repositories["sample"] = repo.entry.model_copy(update={"push": True})
    world.hold["push_branch"] = asyncio.Event()
    story = await start(repository="sample")
    await to_gate(story, "docs_ready")
    await story.approve("docs_ready")

    await story.handle.cancel()
    await until(lambda: lines(story, "NOT_DELIVERED"))
    world.hold["push_branch"].set()
    with pytest.raises(WorkflowFailureError):
        await story.handle.result()

    assert world.transitions()[-1] == ("DOCS", "docs_ready", "DONE")
    assert "planning.story.cancelled" not in world.subjects()


async def test_an_id_that_is_used_again_begins_a_new_branch(
    start: StartStory, repo: Repo, world: World
) -> None:
    first = await done(await start(repository="sample"))
    assert first.branch is not None

    story = await start(repository="sample")
    await to_gate(story, "approve_design")

    assert (await view_of(story)).head == repo.base
    kept = in_store(repo.store, "for-each-ref", "--format=%(objectname)", "refs/fleet-left/")
    assert kept == first.branch.head
