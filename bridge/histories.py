"""Reads a story's histories from Temporal: every run, every child, every plan of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, timedelta

from temporalio.api.enums.v1 import EventType
from temporalio.client import (
    Client,
    WorkflowHandle,
    WorkflowHistory,
    WorkflowQueryFailedError,
)
from temporalio.service import RPCError, RPCStatusCode

from bridge.replay import Given, RunId, Told, given, related, told
from workflows.events import Entry, PublishBatch, RecordBatch
from workflows.models import story_workflow_id
from workflows.outbox import LEFT
from workflows.outbox_state import OutboxState

AT_ONCE = 8
"""Histories that are read at the same time."""

ANSWER_WITHIN = timedelta(seconds=10)

ENDED_EARLY = frozenset(
    {
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TERMINATED,
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED,
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TIMED_OUT,
    }
)
"""How a run ends that may leave something in its outbox; reset ends the run before by the first."""


@dataclass
class Found:
    """A story's runs. unanswered: those that ended early, and whose outbox nobody could tell."""

    runs: list[Told] = field(default_factory=list)
    unanswered: list[RunId] = field(default_factory=list)


async def read(client: Client, story_id: str, tell: Callable[[int, int], None]) -> Found:
    """Read all that belongs to the story; `tell` gets how many runs are read, of how many.

    Raises:
        RPCError: Temporal does not answer.
    """
    reading = _Reading(client, tell)
    await reading.all_of(await _beginnings(client, story_id))
    return reading.found


async def _beginnings(client: Client, story_id: str) -> set[RunId]:
    """The story's runs, and what may have been started for it by others.

    Ids of other stories may begin alike: what they tell is of another story, and left out then.
    """
    found = set()
    query = (
        f"WorkflowId = '{story_workflow_id(story_id)}' "
        f"OR WorkflowId STARTS_WITH 'plan-{story_id}-' "
        f"OR WorkflowId STARTS_WITH 'deliberation-{story_id}-'"
    )
    async for execution in client.list_workflows(query):
        found.add(RunId(execution.id, execution.run_id))
    # Visibility may be behind: the story that runs now is asked for by its id.
    try:
        now = await client.get_workflow_handle(story_workflow_id(story_id)).describe()
        found.add(RunId(now.id, now.run_id))
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise
    return found


class _Reading:
    def __init__(self, client: Client, tell: Callable[[int, int], None]) -> None:
        self._client, self._tell = client, tell
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._known: set[RunId] = set()
        self.found = Found()

    async def all_of(self, beginnings: set[RunId]) -> None:
        left = set(beginnings)
        done = 0
        while left:
            self._known |= left
            tasks = [asyncio.create_task(self._run(run)) for run in sorted(left)]
            left = set()
            try:
                for task in asyncio.as_completed(tasks):
                    left |= await task
                    done += 1
                    self._tell(done, len(self._known))
            finally:
                for each in tasks:
                    each.cancel()
            left -= self._known

    async def _run(self, run: RunId) -> set[RunId]:
        async with self._slots:
            handle = self._client.get_workflow_handle(run.workflow_id, run_id=run.run_id)
            try:
                history = await handle.fetch_history()
            except RPCError as error:
                if error.status != RPCStatusCode.NOT_FOUND:
                    raise
                return set()  # its retention is over
            decoded = [(each, await self._decode(each)) for each in given(history.events)]
            state = await self._left(run, handle, history)
        started = history.events[0].event_time.ToDatetime(UTC)
        self.found.runs.append(told(run, started, decoded, state))
        return set(related(run.workflow_id, history.events))

    async def _decode(self, each: Given) -> RecordBatch | list[Entry]:
        kind = {"record": RecordBatch, "publish": PublishBatch, "hand_on": list[Entry]}[each.what]
        (value,) = await self._client.data_converter.decode([each.payload], [kind])
        if isinstance(value, PublishBatch):
            return value.entries
        decoded: RecordBatch | list[Entry] = value
        return decoded

    async def _left(
        self, run: RunId, handle: WorkflowHandle[object, object], history: WorkflowHistory
    ) -> OutboxState | None:
        """What the run left in its outbox, where it ended early; a story worker answers it."""
        if history.events[-1].event_type not in ENDED_EARLY:
            return None
        try:
            state: OutboxState = await handle.query(
                LEFT, result_type=OutboxState, rpc_timeout=ANSWER_WITHIN
            )
        except (RPCError, WorkflowQueryFailedError):
            self.found.unanswered.append(run)
            return None
        return state
