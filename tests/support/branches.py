"""Councils that commit what a test chose for each task, on a real store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.exceptions import ApplicationError
from temporalio.worker import Worker

from activities.workspace.stores import Stores
from activities.workspace.trees import Trees
from tests.unit.conftest import World, activities
from workers.workflow_runner import Runner
from workflows.models.agents import CallUsage, Proposal
from workflows.models.deliberation import DeliberationInput, DeliberationResult
from workflows.models.implementation import ImplementationInput, ImplementationResult
from workflows.models.workspace import Change, Repository, Trailers
from workflows.plan import PlanWorkflow
from workflows.story import StoryWorkflow

README = {"README.md": "# Adder\n\nAdds numbers.\n\n## Use\n\nadd(2, 3)\n"}
FIX = {"adder/__init__.py": "def add(left: int, right: int) -> int:\n    return left + right\n"}
"""Changes of the project in tests/support/repositories.py."""

AT = datetime(2026, 3, 1, 10, tzinfo=UTC)


@workflow.defn(name="DeliberationWorkflow", sandboxed=False)
class CommittingCouncil:
    """A council whose winner is a commit of the files that the test chose."""

    @workflow.run
    async def run(self, input: DeliberationInput) -> DeliberationResult:
        """Commit at once."""
        change = None
        if input.work:
            change = await workflow.execute_activity(
                "commit_for",
                input,
                result_type=Change,
                start_to_close_timeout=timedelta(minutes=5),
            )
        return DeliberationResult(
            task_id=input.task_id,
            deliberation_id=workflow.info().workflow_id,
            role=input.role,
            status="completed",
            winner_id=f"agent-{input.role.lower()}-1",
            score=1.0,
            winner=Proposal(approach="directly", content="See the change."),
            change=change,
        )


@workflow.defn(name="ImplementationWorkflow", sandboxed=False)
class CommittingAuthor:
    """An author who revises its change by committing the files that the test chose."""

    @workflow.run
    async def run(self, input: ImplementationInput) -> ImplementationResult:
        """Commit at once."""
        change = await workflow.execute_activity(
            "revise_for",
            input,
            result_type=Change,
            start_to_close_timeout=timedelta(minutes=2),
        )
        usage = CallUsage(
            act="next_action", agent_id=input.agent.agent_id, role="DEV", model="m", tokens_in=7
        )
        return ImplementationResult(
            task_id=input.task.task_id,
            agent_id=input.agent.agent_id,
            repository="sample",
            base=change.base,
            commit=change.commit,
            ended_by="finish",
            usage=[usage],
        )


@asynccontextmanager
async def committing_councils(client: Client, world: World) -> AsyncIterator[str]:
    """Run stories and plans with such councils; yield their task queue."""

    @activity.defn
    async def commit_for(task: DeliberationInput) -> Change:
        assert task.work is not None
        if cause := world.failing.get(task.task_id):
            raise ApplicationError(cause, type="AllBarred", non_retryable=True)
        title = task.description.split("\n")[0]
        title = title if title in world.edits else task.phase
        if held := world.hold.get(title):
            await held.wait()
        work = task.work
        return await commit(
            world, work.repository, work.base, title, task.task_id, story=work.story_id
        )

    @activity.defn
    async def revise_for(asked: ImplementationInput) -> Change:
        world.revisions.append(asked)
        if held := world.hold.get("revise"):
            await held.wait()
        assert isinstance(asked.repository, Repository)
        assert asked.head
        title = f"Revise: {asked.task.description.split(chr(10))[0]}"
        task_id, step = asked.task.task_id, asked.first_step
        return await commit(
            world, asked.repository, asked.head, title, task_id, step, asked.task.story_id
        )

    queue = f"committing-{world.key}"
    async with Worker(
        client,
        task_queue=queue,
        workflows=[StoryWorkflow, PlanWorkflow, CommittingCouncil, CommittingAuthor],
        activities=[*activities(), commit_for, revise_for],
        workflow_runner=Runner(),
    ):
        yield queue


async def commit(
    world: World,
    repository: Repository,
    base: str,
    title: str,
    task: str,
    step: int = 1,
    story: str = "",
) -> Change:
    """Commit the files of `world.edits` for a title, as a step of an agent."""
    store = await Stores(world.folder / "stores").of(repository)
    trees = Trees(world.folder / "trees", 2**30)
    trailers = Trailers(story=story or f"US-{world.key}", task=task, agent="agent-dev-1", step=step)
    if step > 1:
        await store.place(trailers.story, trailers.task, trailers.agent, base)
    async with trees.at(store, base) as tree:
        for path, text in world.edits.get(title, {}).items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text)
        made = await store.commit(tree, parent=base, message=title, trailers=trailers, at=AT)
    files = await store.changed(base, made)
    return Change(commit=made, base=base, files=files)
