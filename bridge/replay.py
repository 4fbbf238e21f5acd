"""What a story's histories say that belongs on the bus and in the graph; in order. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import EventType, WorkflowTaskFailedCause
from temporalio.api.history.v1 import HistoryEvent

from workflows.events import Entry, RecordBatch
from workflows.models import ContextWrite, DeliberationRecord
from workflows.outbox import HAND_ON
from workflows.outbox_state import OutboxState

GraphWrite = RecordBatch | DeliberationRecord | ContextWrite
"""What an activity that writes to the graph was given."""

WRITES: dict[str, type[GraphWrite]] = {
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
class Given:
    """Entries in a history, not decoded yet.

    what: an activity of WRITES, or `publish`, for what it was given; `hand_on` for what a child
    handed over. done: when the entries were known to be recorded; None: the history does not say
    that they are.
    """

    what: str
    payload: Payload
    done: datetime | None


def given(history: Iterable[HistoryEvent]) -> list[Given]:
    """What one run's outbox was given to do, in order.

    A batch is published only once it is recorded: what `publish` was asked for is recorded.
    """
    found: dict[int, Given] = {}
    for event in history:
        match event.event_type:
            case EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED:
                asked = event.activity_task_scheduled_event_attributes
                if asked.activity_type.name in WRITES:
                    name = asked.activity_type.name
                    found[event.event_id] = Given(name, asked.input.payloads[0], None)
                elif asked.activity_type.name == "publish":
                    at = event.event_time.ToDatetime(UTC)
                    found[event.event_id] = Given("publish", asked.input.payloads[0], at)
            case EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED:
                number = event.activity_task_completed_event_attributes.scheduled_event_id
                batch = found.get(number)
                if batch and batch.what in WRITES:
                    at = event.event_time.ToDatetime(UTC)
                    found[number] = Given(batch.what, batch.payload, at)
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED:
                signal = event.workflow_execution_signaled_event_attributes
                if signal.signal_name == HAND_ON and signal.input.payloads:
                    found[event.event_id] = Given("hand_on", signal.input.payloads[0], None)
    return list(found.values())


def related(workflow_id: str, history: Sequence[HistoryEvent]) -> Iterator[RunId]:
    """The runs that this one goes on from, by continue-as-new or reset, and its children."""
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
            case EventType.EVENT_TYPE_CHILD_WORKFLOW_EXECUTION_STARTED:
                child = event.child_workflow_execution_started_event_attributes.workflow_execution
                yield RunId(child.workflow_id, child.run_id)


@dataclass(frozen=True)
class Told:
    """What one run says. recorded: in order, and since when at the latest; left: not recorded.

    writes: what was written to the graph, and when it was known to be there.
    """

    run: RunId
    started: datetime
    recorded: list[tuple[datetime, Entry]] = field(default_factory=list)
    left: list[RecordBatch] = field(default_factory=list)
    writes: list[tuple[datetime, GraphWrite]] = field(default_factory=list)


def told(
    run: RunId,
    started: datetime,
    decoded: Iterable[tuple[Given, GraphWrite | list[Entry]]],
    state: OutboxState | None = None,
) -> Told:
    """What a run says, by what its outbox was given and, where it ended early, the outbox itself.

    state: the outbox as the run left it; None: not asked, or nobody answers.
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
        batches = [
            RecordBatch(
                owner=run.workflow_id,
                owner_started_ms=owner_started_ms,
                first=state.recorded,
                entries=state.entries[start:],
            )
        ]
        # Recorded already, and not yet given to `publish`.
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
    return Told(run, started, recorded, batches, writes)


def in_order(runs: Iterable[Told], story_id: str) -> list[Entry]:
    """The story's recorded events, each once, in the order in which they were recorded."""
    recorded = [
        pair for run in sorted(runs, key=lambda each: each.started) for pair in run.recorded
    ]
    recorded.sort(key=lambda pair: pair[0])
    return _once(entry for _, entry in recorded if entry.subject and entry.story_id == story_id)


def unrecorded(runs: Sequence[Told], story_id: str) -> list[RecordBatch]:
    """What no run says is recorded, as `record` takes it; in the runs' order."""
    known = {entry.id for run in runs for _, entry in run.recorded}
    batches = []
    for run in sorted(runs, key=lambda each: each.started):
        for batch in run.left:
            numbered = [
                (number, entry)
                for number, entry in enumerate(batch.entries, batch.first)
                if entry.id not in known and entry.story_id == story_id
            ]
            known |= {entry.id for _, entry in numbered}
            # One by one: each keeps its place in its outbox.
            batches += [
                batch.model_copy(update={"first": number, "entries": [entry]})
                for number, entry in numbered
            ]
    return batches


def graph_writes(runs: Sequence[Told], story_id: str) -> list[GraphWrite]:
    """The story's writes to the graph, in the order in which they were made; then what is left.

    A reset run repeats the writes of the run before: what is written again changes nothing.
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
    """The story's entries of the batch, each at its place in the outbox."""
    if all(entry.story_id == story_id for entry in batch.entries):
        return [batch]
    return [
        batch.model_copy(update={"first": number, "entries": [entry]})
        for number, entry in enumerate(batch.entries, batch.first)
        if entry.story_id == story_id
    ]


def _once(entries: Iterable[Entry]) -> list[Entry]:
    return list({entry.id: entry for entry in reversed(list(entries))}.values())[::-1]
