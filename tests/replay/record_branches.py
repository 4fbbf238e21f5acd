"""Paths of stories in a repository: repairs, a conflict, a base that moves (see record.py)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from temporalio.client import Client

from tests.support.branches import FIX, README, committing_councils
from tests.support.polling import until
from tests.support.projects import plain_git
from tests.support.repositories import make_repository
from tests.unit.conftest import RunningStory, StartStory, World
from workflows.models.agents import DraftTask
from workflows.models.branches import StoryBranch
from workflows.models.ids import plan_workflow_id
from workflows.models.workspace import Repository

ENTRY = "sample"


@asynccontextmanager
async def repository(client: Client, world: World) -> AsyncIterator[tuple[StartStory, Path]]:
    """Make a repository for the story of a path; yield how to start it, and the repository."""
    with TemporaryDirectory(prefix="fleet-") as folder:
        world.folder = Path(folder)
        origin = world.folder / "origin"
        origin.mkdir()
        world.repositories = {ENTRY: Repository(key=ENTRY, url=make_repository(origin))}
        world.edits |= {"Build it": FIX, "Test it": README}
        async with committing_councils(client, world) as queue:
            yield StartStory(client, world, queue), origin


async def merges_undone(client: Client, world: World) -> dict[str, str]:
    """Reject the build of a story in a repository when its plan has merged the first change."""
    world.hold["Test it"] = asyncio.Event()
    async with repository(client, world) as (start, _):
        story = await start(repository=ENTRY)
        for gate in ("approve_scope", "approve_design"):
            await story.until(gate=gate)
            await story.approve(gate)
        await until(lambda: "TaskCompleted" in [entry.kind for entry in world.recorded])
        await story.reject("reject_build")
        world.hold["Test it"].set()
        await story.finish()
    return {"story": story.handle.id}


async def kept(story: RunningStory) -> dict[str, str]:
    plan = (await story.state()).plan_id
    return {"story": story.handle.id, "plan": plan_workflow_id(story.story_id, plan)}


async def repaired(client: Client, world: World) -> dict[str, str]:
    """Let the build fail until the second repair."""
    world.failing_builds = 2
    world.edits["Repair the build"] = {"fixed.txt": "yes\n"}
    async with repository(client, world) as (start, _):
        story = await start(repository=ENTRY)
        await story.finish()
        return await kept(story)


async def conflict_revised(client: Client, world: World) -> dict[str, str]:
    """Let two tasks change the same line; the author of the second one revises its change."""
    world.drafts = [
        DraftTask(role="DEV", title=title, description="Do it.") for title in ("One", "Two")
    ]
    world.edits = {title: {"README.md": f"# {title}\n"} for title in ("One", "Two")}
    world.edits |= {f"Revise: {title}": {"README.md": "# Both\n"} for title in ("One", "Two")}
    async with repository(client, world) as (start, _):
        story = await start(repository=ENTRY)
        await story.finish()
        return await kept(story)


async def tasks_in_turn(client: Client, world: World) -> dict[str, str]:
    """Let a story that may change one file have two tasks, which take turns."""
    world.drafts = [
        DraftTask(role="DEV", title=title, description="Do it.") for title in ("One", "Two")
    ]
    world.edits = {title: {"README.md": f"# {title}\n"} for title in ("One", "Two")}
    async with repository(client, world) as (start, _):
        story = await start(repository=ENTRY, paths=["README.md"])
        await story.finish()
        return await kept(story)


async def rebased(client: Client, world: World) -> dict[str, str]:
    """Let the base move before a gate that shows a measured commit, and merge it."""
    async with repository(client, world) as (start, origin):
        story = await start(repository=ENTRY)
        for gate in ("approve_scope", "approve_design"):
            await story.until(gate=gate)
            await story.approve(gate)
        await story.until(gate="qa_passed")
        await until(lambda: branch_of(story), lambda branch: branch.seen is not None)
        (origin / "more.txt").write_text("from main\n")
        plain_git("add", "--all", cwd=origin)
        plain_git("commit", "--quiet", "-m", "Change main", cwd=origin)
        await story.update("rebase", actor="ana", role="PO")
        await story.until(gate="qa_passed")
        await story.finish()
        return await kept(story)


async def branch_of(story: RunningStory) -> StoryBranch:
    found: StoryBranch = await story.handle.query("branch", result_type=StoryBranch)
    return found
