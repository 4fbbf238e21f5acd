"""Extraction of events and graph writes from a story's histories, in order. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import EventType, WorkflowTaskFailedCause
from temporalio.api.history.v1 import HistoryEvent

from workflows.models.context import ContextWrite
from workflows.models.deliberation import DeliberationRecord
from workflows.models.entries import Entry, OutcomeBatch, RecordBatch
from workflows.models.events import SKIPPED, EntrySkipped
from workflows.models.outbox import OutboxState
from workflows.outbox import FORWARD_EVENTS

GraphWrite = RecordBatch | DeliberationRecord | ContextWrite
"""The input of an activity that writes to the graph."""

WRITES: dict[str, type[GraphWrite]] = {
    "announce": RecordBatch,
    "announce_outcome": OutcomeBatch,
    "record": RecordBatch,
    "record_deliberation": DeliberationRecord,
    "update_context": ContextWrite,
}
"""Activity -> its input: every activity that writes a story's part of the graph."""


class RunId(NamedTuple):
    """One run of a workflow."""

    workflow_id: str
    run_id: str


@dataclass(frozen=True)
class OutboxCall:
    """Entries in a history, not decoded yet.

    what: an activity of WRITES, or `publish`, for an activity's input; `hand_on` for entries from
    a child. done: when the entries were known to be recorded; None if the history does not show
    that they were.
    """

    what: str
    payload: Payload
    done: datetime | None


def outbox_calls(history: Iterable[HistoryEvent]) -> list[OutboxCall]:
    """Return the inputs of one run's outbox activities and signals, in order.

    A batch is published only after it is recorded: the input of `publish` counts as recorded.
    """
    found: dict[int, OutboxCall] = {}
    for event in history:
        match event.event_type:
            case EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED:
                scheduled = event.activity_task_scheduled_event_attributes
                if scheduled.activity_type.name in WRITES:
                    name = scheduled.activity_type.name
                    found[event.event_id] = OutboxCall(name, scheduled.input.payloads[0], None)
                elif scheduled.activity_type.name == "publish":
                    at = event.event_time.ToDatetime(UTC)
                    found[event.event_id] = OutboxCall("publish", scheduled.input.payloads[0], at)
            case EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED:
                number = event.activity_task_completed_event_attributes.scheduled_event_id
                batch = found.get(number)
                if batch and batch.what in WRITES:
                    at = event.event_time.ToDatetime(UTC)
                    found[number] = OutboxCall(batch.what, batch.payload, at)
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED:
                signal = event.workflow_execution_signaled_event_attributes
                if signal.signal_name == FORWARD_EVENTS and signal.input.payloads:
                    found[event.event_id] = OutboxCall("hand_on", signal.input.payloads[0], None)
    return list(found.values())


def related(workflow_id: str, history: Sequence[HistoryEvent]) -> Iterator[RunId]:
    """Yield the runs before and after this one, by continue-as-new or reset, and its children."""
    started = history[0].workflow_execution_started_event_attributes
    if started.continued_execution_run_id:
        yield RunId(workflow_id, started.continued_execution_run_id)
    for event in history:
        match event.event_type:
            case EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED:
                failed = event.workflow_task_failed_event_attributes
                if (
                    failed.cause
                    == WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_RESET_WORKFLOW
                ):
                    yield RunId(workflow_id, failed.base_run_id)
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CONTINUED_AS_NEW:
                then = event.workflow_execution_continued_as_new_event_attributes
                yield RunId(workflow_id, then.new_execution_run_id)
            case EventType.EVENT_TYPE_CHILD_WORKFLOW_EXECUTION_STARTED:
                child = event.child_workflow_execution_started_event_attributes.workflow_execution
                yield RunId(child.workflow_id, child.run_id)


@dataclass(frozen=True)
class RunEvents:
    """The entries and graph writes of one run.

    recorded: in order, each with the time by which it was recorded. left: not recorded. writes:
    what was written to the graph, with the time by which it was there.
    """

    run: RunId
    started: datetime
    recorded: list[tuple[datetime, Entry]] = field(default_factory=list)
    left: list[RecordBatch] = field(default_factory=list)
    writes: list[tuple[datetime, GraphWrite]] = field(default_factory=list)


def run_events(
    run: RunId,
    started: datetime,
    decoded: Iterable[tuple[OutboxCall, GraphWrite | list[Entry]]],
    state: OutboxState | None = None,
) -> RunEvents:
    """Collect a run's entries and writes from its inputs and, if it ended early, its outbox.

    Args:
        run: the run.
        started: when it started.
        decoded: the inputs that `given` found, each with its decoded value.
        state: the outbox as the run left it; None if it was not queried or not answered.
    """
    recorded: list[tuple[datetime, Entry]] = []
    batches: list[RecordBatch] = []
    handed: list[Entry] = []
    writes: list[tuple[datetime, GraphWrite]] = []
    owner_started_ms, end = round(started.timestamp() * 1000), 0
    for batch, what in decoded:
        if batch.done is not None and not isinstance(what, list):
            writes.append((batch.done, what))
        if isinstance(what, DeliberationRecord | ContextWrite):
            continue
        if isinstance(what, RecordBatch):
            owner_started_ms, end = what.owner_started_ms, what.first + len(what.entries)
            if batch.done is None:
                batches.append(what)
        entries = what.entries if isinstance(what, RecordBatch) else what
        if batch.done is not None:
            recorded += [(batch.done, entry) for entry in entries]
        elif batch.what == "hand_on":
            handed += entries
    if state is not None:
        start = state.recorded - state.published
        owner_started_ms, end = state.started_ms or owner_started_ms, state.end
        left = RecordBatch(
            owner=run.workflow_id,
            owner_started_ms=owner_started_ms,
            first=state.recorded,
            entries=state.entries[start:],
        )
        batches = [OutcomeBatch.of(left, state.deliberation) if state.deliberation else left]
        # Recorded already, and not yet passed to `publish`.
        at = recorded[-1][0] if recorded else started
        recorded += [(at, entry) for entry in state.entries[:start]]
    taken = {entry.id for batch in batches for entry in batch.entries}
    taken |= {entry.id for _, entry in recorded}
    waiting = [entry for entry in handed if entry.id not in taken]
    batches.append(
        RecordBatch(
            owner=run.workflow_id, owner_started_ms=owner_started_ms, first=end, entries=waiting
        )
    )
    return RunEvents(run, started, recorded, batches, writes)


def in_order(runs: Iterable[RunEvents], story_id: str) -> list[Entry]:
    """Return the story's recorded events, each once, in the order in which they were recorded.

    Entries that a person has skipped are left out, and so are their dead letters.
    """
    runs = list(runs)
    skipped = skipped_ids(runs)
    recorded = [
        pair for run in sorted(runs, key=lambda each: each.started) for pair in run.recorded
    ]
    recorded.sort(key=lambda pair: pair[0])
    return _once(
        entry
        for _, entry in recorded
        if entry.subject
        and entry.story_id == story_id
        and entry.id not in skipped
        and entry.kind != EntrySkipped.__name__
    )


def skipped_ids(runs: Iterable[RunEvents]) -> set[str]:
    """Return the ids of the entries that a person has skipped."""
    return {
        entry.id.removesuffix(SKIPPED)
        for run in runs
        for _, entry in run.recorded
        if entry.kind == EntrySkipped.__name__
    }


def unrecorded(runs: Sequence[RunEvents], story_id: str) -> list[RecordBatch]:
    """Return the entries that no run has recorded, as inputs of `record`, in the runs' order."""
    known = {entry.id for run in runs for _, entry in run.recorded} | skipped_ids(runs)
    batches = []
    for run in sorted(runs, key=lambda each: each.started):
        for batch in run.left:
            numbered = [
                (number, entry)
                for number, entry in enumerate(batch.entries, batch.first)
                if entry.id not in known and entry.story_id == story_id
            ]
            known |= {entry.id for _, entry in numbered}
            # One batch per entry: each keeps its position in its outbox.
            batches += [
                batch.model_copy(update={"first": number, "entries": [entry]})
                for number, entry in numbered
            ]
    return batches


def graph_writes(runs: Sequence[RunEvents], story_id: str) -> list[GraphWrite]:
    """Return the story's writes to the graph in their order, followed by the unrecorded entries.

    A reset run repeats the writes of the run before it: writing them again changes nothing.
    """
    made = [pair for run in sorted(runs, key=lambda each: each.started) for pair in run.writes]
    made.sort(key=lambda pair: pair[0])
    found: list[GraphWrite] = []
    for _, write in made:
        match write:
            case RecordBatch():
                found += _of_story(write, story_id)
            case DeliberationRecord() if write.story_id == story_id:
                found.append(write)
            case ContextWrite() if write.update.story_id == story_id:
                found.append(write)
    return [*found, *unrecorded(runs, story_id)]


def _of_story(batch: RecordBatch, story_id: str) -> list[RecordBatch]:
    """Return the story's entries of the batch, each with its position in the outbox."""
    if all(entry.story_id == story_id for entry in batch.entries):
        return [batch]
    return [
        batch.model_copy(update={"first": number, "entries": [entry]})
        for number, entry in enumerate(batch.entries, batch.first)
        if entry.story_id == story_id
    ]


def _once(entries: Iterable[Entry]) -> list[Entry]:
    return list({entry.id: entry for entry in reversed(list(entries))}.values())[::-1]
