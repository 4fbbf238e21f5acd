"""Reads a story's histories from Temporal: every run, every child, every plan of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, timedelta
from functools import partial
from typing import Any

from temporalio.api.enums.v1 import EventType
from temporalio.client import (
    Client,
    WorkflowHandle,
    WorkflowHistory,
    WorkflowQueryFailedError,
)
from temporalio.service import RPCError, RPCStatusCode

from bridge.replay import WRITES, Given, GraphWrite, RunId, Told, given, related, told
from workflows.events import Entry, PublishBatch
from workflows.models import (
    closure_workflow_id,
    context_workflow_id,
    deliberation_workflow_id,
    derivation_workflow_id,
    former_derivation_workflow_id,
    plan_workflow_id,
    story_workflow_id,
)
from workflows.outbox import HAND_ON, LEFT
from workflows.outbox_state import OutboxState

AT_ONCE = 8
"""Histories that are read at the same time."""

ANSWER_WITHIN = timedelta(seconds=10)

STANDALONE = "WorkflowType = 'DeliberationWorkflow'"
"""Workflows that belong to a story whatever their id is."""

RECORDING = (
    "WorkflowType IN ('StoryWorkflow', 'PlanWorkflow', 'DeliberationWorkflow', "
    "'ContextUpdateWorkflow', 'DerivationWorkflow', 'StoryClosureWorkflow')"
)
"""Workflows that write to the graph; one that coaches writes nothing."""

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
    beginnings = [f"WorkflowId STARTS_WITH '{name('')}'" for name in _names(story_id)]
    query = " OR ".join([f"WorkflowId = '{story_workflow_id(story_id)}'", *beginnings])
    found = {RunId(each.id, each.run_id) async for each in client.list_workflows(query)}
    found |= (await _told_by_input(client, STANDALONE)).get(story_id, set())
    # Visibility may be behind: the story that runs now is asked for by its id.
    try:
        now = await client.get_workflow_handle(story_workflow_id(story_id)).describe()
        found.add(RunId(now.id, now.run_id))
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise
    return found


def _names(story_id: str) -> list[Callable[[str], str]]:
    """The ids of workflows that are named after the story, but for the rest of their name."""
    return [
        partial(plan_workflow_id, story_id),
        partial(derivation_workflow_id, story_id),
        partial(former_derivation_workflow_id, story_id),
        partial(context_workflow_id, story_id),
        partial(closure_workflow_id, story_id),
        lambda rest: deliberation_workflow_id(f"{story_id}-{rest}"),
    ]


async def all_stories(client: Client) -> list[str]:
    """The ids of every story that Temporal knows something of, in order.

    Among them '' where deliberations were started without a story.

    Raises:
        RPCError: Temporal does not answer.
    """
    return sorted(await _told_by_input(client, RECORDING))


async def _told_by_input(client: Client, query: str) -> dict[str, set[RunId]]:
    """Story id -> the runs that no other workflow started, by the story that their input names."""
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
    """The story that a run's input names; None where there is none to read."""
    handle = client.get_workflow_handle(run.workflow_id, run_id=run.run_id)
    try:
        first = await anext(handle.fetch_history_events(page_size=1))
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise
        return None  # its retention is over
    payloads = first.workflow_execution_started_event_attributes.input.payloads
    try:
        (value,) = await client.data_converter.decode(payloads)
    except (ValueError, RuntimeError):
        return None  # it was refused for that
    story_id = value.get("story_id") if isinstance(value, dict) else None
    return story_id or "" if story_id is None or isinstance(story_id, str) else None


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
            if not history.events:
                return set()  # it is being removed
            decoded = [(each, await self._decode(each)) for each in given(history.events)]
            state = await self._left(run, handle, history)
        started = history.events[0].event_time.ToDatetime(UTC)
        self.found.runs.append(told(run, started, decoded, state))
        return set(related(run.workflow_id, history.events))

    async def _decode(self, each: Given) -> GraphWrite | list[Entry]:
        kinds: dict[str, Any] = {**WRITES, "publish": PublishBatch, HAND_ON: list[Entry]}
        kind = kinds[each.what]
        (value,) = await self._client.data_converter.decode([each.payload], [kind])
        if isinstance(value, PublishBatch):
            return value.entries
        decoded: GraphWrite | list[Entry] = value
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
