"""The current activity of a story, read from Temporal alone."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

from temporalio.client import Client, WorkflowExecutionStatus, WorkflowHandle
from temporalio.service import RPCError, RPCStatusCode

from workers.clients.queries import NO_ANSWER
from workflows.deliberation import DeliberationWorkflow
from workflows.models.base import Model
from workflows.models.deliberation import Progress
from workflows.models.ids import story_workflow_id, task_of
from workflows.models.story import StoryResult, StoryView
from workflows.story import StoryWorkflow

LOOK_EVERY_S = 1.0
QUERY_WITHIN = timedelta(seconds=10)

AWAY = (RPCStatusCode.UNAVAILABLE, *NO_ANSWER)
"""The errors of a query while Temporal, or every story worker, is unavailable."""

Story = WorkflowHandle[StoryWorkflow, StoryResult]


class Council(Model):
    """A running deliberation."""

    task_id: str
    progress: Progress


class Snapshot(Model):
    """A story at one moment. status: RUNNING, COMPLETED, CANCELED and so on."""

    status: str
    story: StoryView
    councils: list[Council] = []


async def look(client: Client, story: Story) -> Snapshot:
    """Return the story's state, and the progress of every council that works for it."""
    description = await story.describe()
    view = await story.query(StoryWorkflow.state, rpc_timeout=QUERY_WITHIN)
    status = description.status or WorkflowExecutionStatus.RUNNING
    councils = await _councils(client, story.id) if is_open(status.name) else []
    return Snapshot(status=status.name, story=view, councils=councils)


def is_open(status: str) -> bool:
    """Return whether the story is still open."""
    return status in (
        WorkflowExecutionStatus.RUNNING.name,
        WorkflowExecutionStatus.CONTINUED_AS_NEW.name,
    )


async def _councils(client: Client, root_id: str) -> list[Council]:
    at_work = client.list_workflows(
        "WorkflowType = 'DeliberationWorkflow' AND ExecutionStatus = 'Running' "
        f"AND RootWorkflowId = '{root_id}'"
    )
    ids = [execution.id async for execution in at_work]
    found = await asyncio.gather(*(_progress(client, each) for each in ids))
    return sorted((council for council in found if council), key=lambda each: each.task_id)


async def _progress(client: Client, workflow_id: str) -> Council | None:
    handle = client.get_workflow_handle(workflow_id)
    try:
        progress = await handle.query(DeliberationWorkflow.progress, rpc_timeout=QUERY_WITHIN)
    except RPCError as error:
        if error.status == RPCStatusCode.NOT_FOUND:
            return None  # it ended meanwhile
        raise
    return Council(task_id=task_of(workflow_id), progress=progress)


async def follow(client: Client, story_id: str) -> AsyncIterator[Snapshot | str]:
    """Yield a snapshot each second until the story is closed; a line while there is no answer.

    Raises:
        RPCError: there is no such story, or access is denied.
    """
    story = client.get_workflow_handle(story_workflow_id(story_id))
    while True:
        try:
            snapshot = await look(client, story)
        except RPCError as error:
            if error.status not in AWAY:
                raise
            yield f"no answer ({error.message}): Temporal or the story worker is away"
        else:
            yield snapshot
            if not is_open(snapshot.status):
                return
        await asyncio.sleep(LOOK_EVERY_S)
