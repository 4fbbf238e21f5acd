"""Reading of a story's histories from Temporal: every run, every child and every plan."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, timedelta
from functools import partial
from typing import Any

from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import (
    Client,
    WorkflowHandle,
    WorkflowQueryFailedError,
)
from temporalio.service import RPCError, RPCStatusCode

from bridge.executions import find_execution
from bridge.mirror.recovered_events import (
    WRITES,
    GraphWrite,
    OutboxCall,
    RunEvents,
    RunId,
    outbox_calls,
    related,
    run_events,
)
from workflows.models.entries import Entry, PublishBatch
from workflows.models.ids import (
    closure_workflow_id,
    context_workflow_id,
    deliberation_workflow_id,
    derivation_workflow_id,
    former_derivation_workflow_id,
    plan_workflow_id,
    story_workflow_id,
)
from workflows.models.outbox import OutboxState
from workflows.outbox import FORWARD_EVENTS, OUTBOX_QUERY

AT_ONCE = 8
"""Histories that are read at the same time."""

ANSWER_WITHIN = timedelta(seconds=10)

STANDALONE = "WorkflowType = 'DeliberationWorkflow'"
"""Workflows that belong to a story whatever their id is."""

RECORDING = (
    "WorkflowType IN ('StoryWorkflow', 'PlanWorkflow', 'DeliberationWorkflow', "
    "'ContextUpdateWorkflow', 'DerivationWorkflow', 'StoryClosureWorkflow')"
)
"""Workflows that write to the graph; a CoachWorkflow does not."""

ENDED_EARLY = frozenset(
    {
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TERMINATED,
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED,
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TIMED_OUT,
    }
)
"""Ends of a run that may leave entries in its outbox; a reset terminates the run before it."""


@dataclass
class StoryRuns:
    """A story's runs.

    Attributes:
        unanswered: runs that ended early and whose outbox could not be queried.
        lost: runs of which a payload is lost, and which one: its entries are left out.
    """

    runs: list[RunEvents] = field(default_factory=list)
    unanswered: list[RunId] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


async def read(client: Client, story_id: str, on_progress: Callable[[int, int], None]) -> StoryRuns:
    """Read every history that belongs to the story.

    The client needs the fleet's data converter. The callback receives the number of runs that are
    read, and the number of runs known so far.

    Raises:
        RPCError: Temporal does not answer.
    """
    reading = _Reading(client, on_progress)
    await reading.all_of(await _beginnings(client, story_id))
    return reading.found


async def story_histories(client: Client, story_id: str) -> dict[RunId, list[HistoryEvent]]:
    """Return the events of every run that belongs to the story, with payloads as they are stored.

    Raises:
        RPCError: Temporal does not answer.
    """
    found: dict[RunId, list[HistoryEvent]] = {}
    left = await _beginnings(client, story_id)
    while left:
        run = left.pop()
        handle = client.get_workflow_handle(run.workflow_id, run_id=run.run_id)
        if events := await _events(handle):
            found[run] = events
            left |= set(related(run.workflow_id, events)) - found.keys()
    return found


async def _events(handle: WorkflowHandle[Any, Any]) -> list[HistoryEvent]:
    """Return a run's events; empty if its retention has expired, or it is being deleted."""
    try:
        return list((await handle.fetch_history()).events)
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise
        return []


async def _beginnings(client: Client, story_id: str) -> set[RunId]:
    """Return the story's runs, and those that others may have started for it.

    Ids of other stories may have the same beginning: their entries are left out later, because
    they name the other story.
    """
    beginnings = [f"WorkflowId STARTS_WITH '{name('')}'" for name in _names(story_id)]
    query = " OR ".join([f"WorkflowId = '{story_workflow_id(story_id)}'", *beginnings])
    found = {RunId(each.id, each.run_id) async for each in client.list_workflows(query)}
    found |= (await _runs_by_input(client, STANDALONE)).get(story_id, set())
    # Visibility may lag behind, so the current run is looked up by its id.
    if now := await find_execution(client, story_workflow_id(story_id)):
        found.add(RunId(now.id, now.run_id))
    return found


def _names(story_id: str) -> list[Callable[[str], str]]:
    """Return functions that make the ids of the story's workflows from the rest of the id."""
    return [
        partial(plan_workflow_id, story_id),
        partial(derivation_workflow_id, story_id),
        partial(former_derivation_workflow_id, story_id),
        partial(context_workflow_id, story_id),
        partial(closure_workflow_id, story_id),
        lambda rest: deliberation_workflow_id(f"{story_id}-{rest}"),
    ]


async def all_stories(client: Client) -> list[str]:
    """Return the ids of all stories that have workflows in Temporal, sorted.

    They include '' if deliberations were started without a story.

    Raises:
        RPCError: Temporal does not answer.
    """
    return sorted(await _runs_by_input(client, RECORDING))


async def _runs_by_input(client: Client, query: str) -> dict[str, set[RunId]]:
    """Map each story id to the runs whose input names it and that no other workflow started."""
    slots = asyncio.Semaphore(AT_ONCE)
    found: dict[str, set[RunId]] = {}

    async def take(run: RunId) -> None:
        async with slots:
            story_id = await _story_of(client, run)
        if story_id is not None:
            found.setdefault(story_id, set()).add(run)

    runs = [
        RunId(each.id, each.run_id)
        async for each in client.list_workflows(query)
        if each.parent_id is None
    ]
    try:
        async with asyncio.TaskGroup() as tasks:
            for run in runs:
                tasks.create_task(take(run))
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return found


async def _story_of(client: Client, run: RunId) -> str | None:
    """Return the story that a run's input names; None if the input cannot be read."""
    handle = client.get_workflow_handle(run.workflow_id, run_id=run.run_id)
    try:
        first = await anext(handle.fetch_history_events(page_size=1))
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise
        return None  # its retention has expired
    payloads = first.workflow_execution_started_event_attributes.input.payloads
    try:
        (value,) = await client.data_converter.decode(payloads)
    except (ValueError, RuntimeError, LookupError):
        return None  # the workflow refused this input too, or it is lost
    story_id = value.get("story_id") if isinstance(value, dict) else None
    return story_id or "" if story_id is None or isinstance(story_id, str) else None


class _Reading:
    def __init__(self, client: Client, on_progress: Callable[[int, int], None]) -> None:
        self._client, self._on_progress = client, on_progress
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._known: set[RunId] = set()
        self.found = StoryRuns()

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
                    self._on_progress(done, len(self._known))
            finally:
                for each in tasks:
                    each.cancel()
            left -= self._known

    async def _run(self, run: RunId) -> set[RunId]:
        async with self._slots:
            handle = self._client.get_workflow_handle(run.workflow_id, run_id=run.run_id)
            if not (events := await _events(handle)):
                return set()
            decoded = []
            for each in outbox_calls(events):
                try:
                    decoded.append((each, await self._decode(each)))
                except LookupError as error:  # the payload is lost
                    self.found.lost.append(f"{run.workflow_id} {run.run_id}: {error}")
            state = await self._left(run, handle, events)
        started = events[0].event_time.ToDatetime(UTC)
        self.found.runs.append(run_events(run, started, decoded, state))
        return set(related(run.workflow_id, events))

    async def _decode(self, each: OutboxCall) -> GraphWrite | list[Entry]:
        kinds: dict[str, Any] = {**WRITES, "publish": PublishBatch, FORWARD_EVENTS: list[Entry]}
        kind = kinds[each.what]
        (value,) = await self._client.data_converter.decode([each.payload], [kind])
        if isinstance(value, PublishBatch):
            return value.entries
        decoded: GraphWrite | list[Entry] = value
        return decoded

    async def _left(
        self, run: RunId, handle: WorkflowHandle[object, object], events: Sequence[HistoryEvent]
    ) -> OutboxState | None:
        """Query the outbox of a run that ended early; a story worker must answer."""
        if events[-1].event_type not in ENDED_EARLY:
            return None
        try:
            state: OutboxState = await handle.query(
                OUTBOX_QUERY, result_type=OutboxState, rpc_timeout=ANSWER_WITHIN
            )
        except (RPCError, WorkflowQueryFailedError):
            self.found.unanswered.append(run)
            return None
        return state
