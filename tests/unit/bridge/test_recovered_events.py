"""The events in histories that belong on the bus, and the merging of several streams."""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from temporalio.api.common.v1 import Payload, Payloads
from temporalio.api.enums.v1 import EventType, WorkflowTaskFailedCause
from temporalio.api.history.v1 import HistoryEvent

from bridge.jetstream.follow import Seen, Source, due
from bridge.mirror.recovered_events import (
    OutboxCall,
    RunId,
    graph_writes,
    in_order,
    related,
    run_events,
    unrecorded,
)
from bridge.mirror.recovered_events import outbox_calls as given_in
from workflows.models.context import ContextUpdate, ContextWrite
from workflows.models.deliberation import DeliberationRecord
from workflows.models.entries import Entry, RecordBatch
from workflows.models.outbox import OutboxState

START = datetime(2026, 3, 1, 10, tzinfo=UTC)
RUN = RunId("story-US-1", "r1")


def at(second: int) -> datetime:
    return START + timedelta(seconds=second)


def entry(number: int, story: str = "US-1", subject: str = "context.updated") -> Entry:
    return Entry(
        id=f"e{number}",
        kind="Any",
        subject=subject,
        source="story-US-1",
        story_id=story,
        time=START.isoformat(),
        body={},
    )


def batch(first: int, *entries: Entry) -> RecordBatch:
    return RecordBatch(
        owner=RUN.workflow_id, owner_started_ms=7, first=first, entries=list(entries)
    )


def recorded(done: datetime | None) -> OutboxCall:
    return OutboxCall("record", Payload(), done)


def ids(entries: list[Entry]) -> list[str]:
    return [each.id for each in entries]


def left(batches: list[RecordBatch]) -> list[tuple[str, int]]:
    return [(each.id, each_batch.first) for each_batch in batches for each in each_batch.entries]


def test_what_was_written_to_the_graph_is_written_again_in_the_order_of_its_time() -> None:
    update = ContextWrite(
        update_id="context-US-1-1",
        at=START.isoformat(),
        started_ms=1,
        update=ContextUpdate(story_id="US-1", actor="ana"),
    )
    council = DeliberationRecord(
        story_id="US-2",
        task_id="t",
        deliberation_id="deliberation-t",
        run_id="r",
        role="QA",
        phase="",
        ranked=[],
        winner_id="",
        timestamp=START.isoformat(),
    )
    first, mixed = batch(0, entry(1)), batch(1, entry(2, story="US-2"), entry(3))
    story = run_events(RUN, at(0), [(recorded(at(2)), first), (recorded(at(4)), mixed)])
    other = run_events(
        RunId("context-US-1-1", "r2"),
        at(1),
        [
            (OutboxCall("update_context", Payload(), at(3)), update),
            (OutboxCall("record_deliberation", Payload(), None), council),
            (recorded(None), batch(9, entry(4))),
        ],
    )
    of_two = run_events(
        RUN, at(0), [(OutboxCall("record_deliberation", Payload(), at(1)), council)]
    )

    writes = graph_writes([other, story, of_two], "US-1")

    alone = mixed.model_copy(update={"first": 2, "entries": [entry(3)]})
    assert writes == [first, update, alone, batch(9, entry(4))]
    assert graph_writes([of_two], "US-2") == [council]


# --- one run --------------------------------------------------------------------------------------


def an_event(number: int, kind: EventType.ValueType, **attributes: Any) -> HistoryEvent:
    event = HistoryEvent(event_id=number, event_type=kind, **attributes)
    event.event_time.FromDatetime(at(number))
    return event


def scheduled(number: int, name: str) -> HistoryEvent:
    return an_event(
        number,
        EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED,
        activity_task_scheduled_event_attributes={
            "activity_type": {"name": name},
            "input": Payloads(payloads=[Payload(data=name.encode())]),
        },
    )


def completed(number: int, of: int) -> HistoryEvent:
    return an_event(
        number,
        EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED,
        activity_task_completed_event_attributes={"scheduled_event_id": of},
    )


def test_only_a_completed_record_marks_its_entries_as_recorded() -> None:
    history = [
        scheduled(1, "record"),
        scheduled(2, "score_story"),
        completed(3, of=1),
        scheduled(4, "publish"),
        scheduled(5, "record"),
        completed(6, of=2),
    ]

    found = given_in(history)

    assert [(each.what, each.done) for each in found] == [
        ("record", at(3)),
        ("publish", at(4)),
        ("record", None),
    ]


def test_a_run_leads_to_those_it_goes_on_from_and_to_its_children() -> None:
    reset = WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_RESET_WORKFLOW
    history = [
        an_event(
            1,
            EventType.EVENT_TYPE_WORKFLOW_EXECUTION_STARTED,
            workflow_execution_started_event_attributes={"continued_execution_run_id": "before"},
        ),
        an_event(
            2,
            EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED,
            workflow_task_failed_event_attributes={"cause": reset, "base_run_id": "base"},
        ),
        an_event(
            3,
            EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED,
            workflow_task_failed_event_attributes={"base_run_id": "a task's own failure"},
        ),
        an_event(
            4,
            EventType.EVENT_TYPE_CHILD_WORKFLOW_EXECUTION_STARTED,
            child_workflow_execution_started_event_attributes={
                "workflow_execution": {"workflow_id": "plan-US-1-p", "run_id": "c"}
            },
        ),
        an_event(
            5,
            EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CONTINUED_AS_NEW,
            workflow_execution_continued_as_new_event_attributes={"new_execution_run_id": "after"},
        ),
    ]

    assert list(related(RUN.workflow_id, history)) == [
        RunId(RUN.workflow_id, "before"),
        RunId(RUN.workflow_id, "base"),
        RunId("plan-US-1-p", "c"),
        RunId(RUN.workflow_id, "after"),
    ]


def test_entries_that_a_child_forwarded_and_no_parent_took_are_unrecorded() -> None:
    taken, lost = entry(1), entry(2)

    run = run_events(
        RUN,
        START,
        [
            (OutboxCall("hand_on", Payload(), None), [taken]),
            (recorded(at(5)), batch(0, entry(0), taken)),
            (OutboxCall("hand_on", Payload(), None), [lost]),
        ],
    )

    assert ids(in_order([run], "US-1")) == ["e0", "e1"]
    assert left(unrecorded([run], "US-1")) == [("e2", 2)]


def test_the_outbox_reports_what_was_left_behind_the_batch_under_way() -> None:
    state = OutboxState(
        started_ms=7, entries=[entry(1), entry(2), entry(3)], published=1, recorded=2
    )

    run = run_events(
        RUN,
        START,
        [(recorded(at(5)), batch(0, entry(0), entry(1))), (recorded(None), batch(2, entry(2)))],
        state,
    )

    assert ids(in_order([run], "US-1")) == ["e0", "e1"]
    assert left(unrecorded([run], "US-1")) == [("e2", 2), ("e3", 3)]


# --- several --------------------------------------------------------------------------------------


def test_events_of_two_runs_are_published_once_and_in_the_order_of_recording() -> None:
    first = run_events(
        RUN,
        START,
        [(recorded(at(1)), batch(0, entry(0))), (recorded(at(4)), batch(1, entry(1)))],
    )
    after_reset = run_events(
        RunId(RUN.workflow_id, "r2"),
        at(10),
        [(recorded(at(1)), batch(0, entry(0))), (recorded(at(12)), batch(1, entry(2)))],
    )
    child = run_events(
        RunId("deliberation-x", "c"), at(2), [(recorded(at(11)), batch(0, entry(3)))]
    )

    assert ids(in_order([after_reset, child, first], "US-1")) == ["e0", "e1", "e3", "e2"]


def test_entries_that_a_later_run_recorded_are_not_unrecorded() -> None:
    first = run_events(RUN, START, [(recorded(None), batch(0, entry(0)))])
    second = run_events(
        RunId(RUN.workflow_id, "r2"), at(9), [(recorded(at(9)), batch(0, entry(0)))]
    )

    assert unrecorded([first, second], "US-1") == []
    assert left(unrecorded([first, first], "US-1")) == [("e0", 0)]


def test_entries_of_other_stories_and_those_for_the_graph_alone_are_not_published() -> None:
    run = run_events(
        RUN,
        START,
        [(recorded(at(1)), batch(0, entry(0, "US-10"), entry(1, subject=""), entry(2)))],
    )

    assert ids(in_order([run], "US-1")) == ["e2"]


# --- the streams, merged --------------------------------------------------------------------------


def an_arrival(stream: int, stored: int) -> tuple[float, Seen]:
    event = Seen(
        stream=str(stream),
        sequence=stored,
        subject="",
        id=f"{stream}/{stored}",
        time="",
        story="",
        body=None,
        stored=at(stored),
        headers={},
    )
    return 0.0, event


def test_an_event_waits_for_a_stream_that_may_have_an_older_one() -> None:
    newer, unread = Source(deque([an_arrival(1, 5)])), Source()

    assert due([newer, unread], now=100, linger=1) is None
    unread.read_up = True
    assert due([newer, unread], now=0.5, linger=1) is None
    assert due([newer, unread], now=1.5, linger=1) is newer
    unread.waiting.append(an_arrival(2, 4))
    assert due([newer, unread], now=0, linger=1) is unread
    assert due([Source(), Source()], now=0) is None


@given(st.lists(st.lists(st.integers(0, 50)), min_size=1, max_size=4))
def test_streams_that_have_ended_are_merged_in_time_order(streams: list[list[int]]) -> None:
    sources = [
        Source(deque(an_arrival(number, each) for each in sorted(times)), ended=True)
        for number, times in enumerate(streams)
    ]
    merged = []

    while source := due(sources, now=0):
        merged.append(source.waiting.popleft()[1].stored)

    assert merged == sorted(at(each) for times in streams for each in times)
