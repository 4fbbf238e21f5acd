"""The current activity of a story, read from Temporal alone."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

from temporalio.client import Client, WorkflowExecutionStatus, WorkflowHandle
from temporalio.service import RPCError, RPCStatusCode

from bridge.executions import require_no_failure
from workers.clients.queries import NO_ANSWER
from workflows.deliberation import DeliberationWorkflow
from workflows.implementation import ImplementationWorkflow
from workflows.models.base import Model
from workflows.models.deliberation import Progress
from workflows.models.ids import decode_id, story_workflow_id, task_of
from workflows.models.implementation import ImplementationProgress
from workflows.models.story import StoryResult, StoryView
from workflows.story import StoryWorkflow

COUNCIL = DeliberationWorkflow.__name__
IMPLEMENTATION = ImplementationWorkflow.__name__

LOOK_EVERY_S = 1.0
QUERY_WITHIN = timedelta(seconds=10)

AWAY = (RPCStatusCode.UNAVAILABLE, *NO_ANSWER)
"""The errors of a query while Temporal, or every story worker, is unavailable."""

Story = WorkflowHandle[StoryWorkflow, StoryResult]


class Council(Model):
    """A running deliberation."""

    task_id: str
    progress: Progress


class AgentWork(Model):
    """A running implementation. agent: `{task_id}-{agent_id}`."""

    agent: str
    progress: ImplementationProgress


class Snapshot(Model):
    """A story at one moment. status: RUNNING, COMPLETED, CANCELED and so on."""

    status: str
    story: StoryView
    councils: list[Council] = []
    implementations: list[AgentWork] = []


async def look(client: Client, story: Story) -> Snapshot:
    """Return the story's state, and the progress of all that works for it.

    Raises:
        WorkflowFailureError: the story has failed.
        RPCError: Temporal does not answer, or knows no such story.
    """
    description = await require_no_failure(story)
    view = await story.query(StoryWorkflow.state, rpc_timeout=QUERY_WITHIN)
    status = description.status or WorkflowExecutionStatus.RUNNING
    found = Snapshot(status=status.name, story=view)
    return await _with_work(client, story.id, found) if is_open(status.name) else found


def is_open(status: str) -> bool:
    """Return whether the story is still open."""
    return status in (
        WorkflowExecutionStatus.RUNNING.name,
        WorkflowExecutionStatus.CONTINUED_AS_NEW.name,
    )


async def _with_work(client: Client, root_id: str, story: Snapshot) -> Snapshot:
    at_work = client.list_workflows(
        f"WorkflowType IN ('{COUNCIL}', '{IMPLEMENTATION}') AND ExecutionStatus = 'Running' "
        f"AND RootWorkflowId = '{root_id}'"
    )
    ids = sorted([(each.workflow_type, each.id) async for each in at_work])
    found = await asyncio.gather(*(_progress(client, *each) for each in ids))
    return story.model_copy(
        update={
            "councils": [each for each in found if isinstance(each, Council)],
            "implementations": [each for each in found if isinstance(each, AgentWork)],
        }
    )


async def _progress(client: Client, kind: str, workflow_id: str) -> Council | AgentWork | None:
    handle = client.get_workflow_handle(workflow_id)
    try:
        if kind == COUNCIL:
            wave = await handle.query(DeliberationWorkflow.progress, rpc_timeout=QUERY_WITHIN)
            return Council(task_id=task_of(workflow_id), progress=wave)
        step = await handle.query(ImplementationWorkflow.progress, rpc_timeout=QUERY_WITHIN)
        agent = decode_id(workflow_id.removeprefix("implementation-"))
        return AgentWork(agent=agent, progress=step)
    except RPCError as error:
        if error.status == RPCStatusCode.NOT_FOUND:
            return None  # it ended meanwhile
        raise


async def follow(client: Client, story_id: str) -> AsyncIterator[Snapshot | str]:
    """Yield a snapshot each second until the story is closed; a line while there is no answer.

    Raises:
        WorkflowFailureError: the story has failed.
        RPCError: the story does not exist, or access is denied.
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
