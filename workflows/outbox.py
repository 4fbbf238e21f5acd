"""The outbox: every change of state is recorded in the graph and then published.

A workflow appends and goes on; it never waits for NATS. `announce` stores a batch of entries in
graph and cache, and then publishes it, so that an event is in Neo4j before a subscriber receives it
(docs/design/0001-outbox.md). What is recorded and could not be published follows by `publish`;
until then, newer entries are only recorded. A child of a story passes its entries to the story's
outbox instead, so that one story has one order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Literal

from temporalio import workflow
from temporalio.exceptions import ActivityError, FailureError, TimeoutType
from temporalio.exceptions import TimeoutError as TimedOut

from workflows.actors import check_actor
from workflows.current_details import stuck_details
from workflows.models.access import Via, require_person
from workflows.models.deliberation import DeliberationRecord
from workflows.models.entries import Announced, Entry, OutcomeBatch, PublishBatch, RecordBatch
from workflows.models.errors import ErrorType, application_error
from workflows.models.events import LATER_PUBLISHED, SKIPPED, EntrySkipped, EventBody
from workflows.models.ids import closure_workflow_id, event_id, run_after_reset
from workflows.models.outbox import OutboxState, OutboxStuck, SkipEntry, StoryClosure
from workflows.search_attributes import OUTBOX_STUCK
from workflows.stubs import ANNOUNCE, MIRROR, STORE, AnnounceStub, GraphStub, MirrorStub
from workflows.timestamps import timestamp

BATCH = 100
"""Entries in one activity: a batch stays far below the message limits of NATS and Temporal."""

AGAIN_AFTER = timedelta(minutes=1)
"""The pause before an activity that failed for good (by an operator, for example) is retried."""

FORWARD_EVENTS = "hand_on"
"""The signal by which a child passes entries to its story."""

OUTBOX_QUERY = "outbox"
"""The query for the outbox's state: the entries still to record and publish."""

STUCK = "outbox_stuck"
"""The query for the stuck entries: list[OutboxStuck]."""

SKIP_ENTRY = "skip_entry"
"""The update by which a person skips an entry that can never be stored."""

SKIPPED_SUBJECT = "deadletter.outbox"
"""The subject of a skipped entry's record: the mirror makes a dead letter of it."""

SKIPPERS = ("OPERATOR", "PO")
"""The roles of which a token needs one to skip an entry."""

CLOSURE = "StoryClosureWorkflow"
"""Started by name: its module imports Outbox."""


class Outbox:
    """A workflow's outbox. `publish_via`: the workflow that publishes for this one, or empty.

    An entry that is refused for good (its error is not retryable) is stuck and blocks the entries
    behind it. It is retried every minute, because the cause may be removed. The workflow shows it
    in its details, in the query STUCK and in the search attribute OutboxStuck; the update
    SKIP_ENTRY replaces it by a record of it (docs/design/0011-stuck-outbox-entries.md).
    """

    def __init__(
        self,
        state: OutboxState,
        story_id: str,
        publish_via: str = "",
        owner: str = "",
        on_skipped: Callable[[Entry], None] = lambda entry: None,
    ) -> None:
        """Register the outbox's queries and its update.

        Args:
            state: the state carried by continue-as-new, or a new one.
            story_id: the story of this workflow's changes; empty if they have none.
            publish_via: the workflow that publishes for this one; empty: this one.
            owner: the workflow whose outbox `state` is; empty: this one.
            on_skipped: called with the record of an entry that a person has skipped.
        """
        self.state = state
        self.story_id = story_id
        self.owner = owner or workflow.info().workflow_id
        self.publish_via = publish_via
        self.first_run = self.run = workflow.info().original_execution_run_id
        """The name of this run in ids.

        A reset run keeps its first run's name up to the point of the reset, so that entries
        appended before keep their ids (docs/design/0002-event-ids-and-resets.md).
        """
        workflow.register_random_seed_callback(self._on_reset)
        workflow.set_query_handler(OUTBOX_QUERY, lambda: self.state)
        workflow.set_query_handler(STUCK, lambda: list(self.stuck.values()))
        workflow.set_update_handler(SKIP_ENTRY, self._skip, validator=self._may_skip)
        self.held = False
        """True: entries are recorded, but neither published nor passed on."""
        self.paused = False
        """True: entries wait, to be recorded and published, or passed on, with later ones."""
        self.at_once = False
        """True: a batch is recorded and published by one activity; else it depends on a patch."""
        self.stuck: dict[str, OutboxStuck] = {}
        """Stuck entries by id: at most one for each cursor."""
        self.details = ""
        """The end of the workflow's current details while an entry is stuck."""
        self._skips: dict[str, tuple[SkipEntry, Via]] = {}
        self._on_skipped = on_skipped
        self._marked = bool(workflow.info().typed_search_attributes.get(OUTBOX_STUCK))
        if not state.started_ms:
            state.started_ms = int(workflow.info().start_time.timestamp() * 1000)

    def start(self) -> None:
        """Start to drain. Call it once, at the beginning of `run`."""
        self._tasks = [
            asyncio.create_task(supervised("outbox: record", self._record())),
            asyncio.create_task(supervised("outbox: publish", self._publish())),
        ]

    def append(self, body: EventBody) -> Entry:
        """Append a change of this workflow, with the story and the time that the body lacks.

        The entry's id follows from workflow, run and position.
        """
        workflow_id = workflow.info().workflow_id
        body = body.model_copy(
            update={
                "story_id": body.story_id or self.story_id,
                "timestamp": body.timestamp or timestamp(),
            }
        )
        entry = Entry(
            id=event_id(workflow_id, self.run, self.state.end),
            kind=type(body).__name__,
            subject=self._subject(body),
            source=workflow_id,
            story_id=body.story_id,
            time=body.timestamp,
            body=body.model_dump(mode="json", exclude_none=True),
        )
        self.extend([entry])
        return entry

    def _subject(self, body: EventBody) -> str:
        if body.SUBJECT in LATER_PUBLISHED and not workflow.patched("ends-and-approvals-published"):
            return ""
        return body.SUBJECT

    def extend(self, entries: list[Entry]) -> None:
        """Append entries from a child; they keep their ids."""
        self.state.entries.extend(entries)

    @property
    def empty(self) -> bool:
        return not self.state.entries

    async def drained(self) -> None:
        """Wait until every entry is published or passed on. If cancelled, end like `closed`."""
        try:
            await workflow.wait_condition(lambda: self.empty)
        except asyncio.CancelledError:
            if workflow.patched("stuck-outbox-closed"):
                await self.closed()
            raise

    async def closed(self) -> None:
        """Wait as `drained` does, but leave a stuck entry to a separate workflow.

        For workflows that are cancelled or fail: they end although an entry is stuck.
        """
        await workflow.wait_condition(lambda: self.empty or bool(self.stuck))
        if self.empty:
            return
        if not workflow.patched("stuck-outbox-closed"):
            await workflow.wait_condition(lambda: self.empty)
            return
        story_id, run_id = self.state.entries[0].story_id, workflow.info().run_id
        await workflow.start_child_workflow(
            CLOSURE,
            StoryClosure(story_id=story_id, run_id=run_id, outbox=self.state, owner=self.owner),
            id=closure_workflow_id(story_id, run_id),
            parent_close_policy=workflow.ParentClosePolicy.ABANDON,
            static_summary=f"the outbox of {self.owner}, which ended while it was stuck"[:200],
        )

    async def recorded(self) -> None:
        """Wait until everything appended so far is in the graph, for work that reads it there."""
        position = self.state.end
        await workflow.wait_condition(lambda: self.state.recorded >= position)

    def _on_reset(self, seed: int) -> None:
        """Rename the run: events after the reset are not those that happened in the first run."""
        # The SDK calls this outside the workflow's loop: `workflow.info()` would raise here.
        self.run = run_after_reset(self.first_run, seed)

    async def _record(self) -> None:
        state = self.state
        one_by_one = 0
        while True:
            await workflow.wait_condition(lambda: state.recorded < state.end and not self._waits())
            first = state.recorded
            start = first - state.published
            size = 1 if first < one_by_one else BATCH
            batch = state.entries[start : start + size]
            if self.publish_via:
                await self._forward_events(batch)
                continue
            deliberation = state.deliberation
            try:
                published = await self._stored(batch)
            except ActivityError as error:
                if self._can_divide(batch):
                    one_by_one = first + len(batch)
                elif skipped := await self._pause("record", batch, error):
                    state.entries[first - state.published] = skipped  # Recorded in its place.
            else:
                self._settled(batch)
                if state.deliberation is deliberation:
                    state.deliberation = None
                state.recorded += len(batch)
                self._settle(published)

    def _waits(self) -> bool:
        return self.paused or (self.held and bool(self.publish_via))

    async def _stored(self, batch: list[Entry]) -> int:
        """Record the next entries, and publish them if all before them are.

        Returns:
            The number of entries that are published, from the first.

        Raises:
            ActivityError: the batch cannot be recorded.
        """
        state = self.state
        request = RecordBatch(
            owner=self.owner,
            owner_started_ms=state.started_ms,
            first=state.recorded,
            entries=batch,
        )
        all_published = state.published == state.recorded and not self.held
        if all_published and (self.at_once or workflow.patched("recorded-and-published-at-once")):
            try:
                answer = await self._announced(request)
            except ActivityError as error:
                if not _was_not_taken(error):
                    raise
            else:
                return answer.published
        if state.deliberation:
            await record_deliberation(state.deliberation)
        await workflow.execute_activity_method(
            GraphStub.record, request, **(STORE | {"summary": f"record {_kinds(batch)}"})
        )
        return 0

    async def _announced(self, batch: RecordBatch) -> Announced:
        """Record a batch and publish it.

        That with a deliberation is another activity, because a worker of an earlier version would
        ignore the deliberation.
        """
        options = ANNOUNCE | {"summary": f"record and publish {_kinds(batch.entries)}"}
        deliberation = self.state.deliberation
        if deliberation is None:
            return await workflow.execute_activity_method(AnnounceStub.announce, batch, **options)
        return await workflow.execute_activity_method(
            AnnounceStub.announce_outcome, OutcomeBatch.of(batch, deliberation), **options
        )

    async def _forward_events(self, batch: list[Entry]) -> None:
        story = workflow.get_external_workflow_handle(self.publish_via)
        try:
            await story.signal(FORWARD_EVENTS, batch)
        except FailureError:
            # The story is gone (terminated): this workflow records and publishes the events itself.
            self.publish_via = ""
        else:
            self.state.recorded += len(batch)
            self._settle(len(batch))

    async def _publish(self) -> None:
        state = self.state
        one_by_one = 0
        while True:
            await workflow.wait_condition(
                lambda: state.published < state.recorded and not self.held
            )
            first = state.published
            size = 1 if first < one_by_one else BATCH
            batch = state.entries[: min(size, state.recorded - first)]
            public = [entry for entry in batch if entry.subject]
            try:
                if public:
                    await workflow.execute_activity_method(
                        MirrorStub.publish,
                        PublishBatch(entries=public),
                        **(MIRROR | {"summary": f"publish {_kinds(public)}"}),
                    )
            except ActivityError as error:
                if self._can_divide(batch):
                    one_by_one = first + len(batch)
                elif skipped := await self._pause("publish", batch, error):
                    self._settle(1)
                    self.extend([skipped])
            else:
                self._settled(batch)
                self._settle(len(batch))

    def _can_divide(self, batch: list[Entry]) -> bool:
        """Return whether to try the entries one by one, to find which of them is refused."""
        return len(batch) > 1 and workflow.patched("stuck-entries-found")

    async def _pause(
        self, step: Literal["record", "publish"], batch: list[Entry], error: ActivityError
    ) -> Entry | None:
        """Show why the batch was refused, and wait; return the entry's record if it is skipped."""
        entry, cause = batch[0], error.cause or error
        stuck = OutboxStuck(
            entry_id=entry.id,
            kind=entry.kind,
            step=step,
            error_type=getattr(cause, "type", None) or "",
            error=str(getattr(cause, "message", None) or cause)[:500],
            story_id=entry.story_id,
        )
        if len(batch) == 1:
            self.stuck[entry.id] = stuck
            self._show_stuck(entry.kind)
        try:
            await workflow.wait_condition(
                lambda: entry.id in self._skips,
                timeout=AGAIN_AFTER,
                timeout_summary=f"outbox: again after {stuck.error[:120]}",
            )
        except TimeoutError:
            return None
        request, via = self._skips[entry.id]
        self._settled([entry])
        skipped = _skipped(entry, stuck, request, via)
        self._on_skipped(skipped)
        return skipped

    def _settled(self, batch: list[Entry]) -> None:
        """Mark the batch as handled: none of its entries is stuck any more."""
        for entry in batch:
            if self.stuck.pop(entry.id, None):
                self._skips.pop(entry.id, None)
                self._show_stuck("")

    def _show_stuck(self, kind: str) -> None:
        """Show the stuck entries in details and search attribute. `kind`: the new entry's."""
        shown = workflow.get_current_details().removesuffix(self.details)
        info = workflow.info()
        self.details = stuck_details(info.workflow_id, list(self.stuck.values()))
        workflow.set_current_details(shown + self.details)
        if kind and not self._marked and workflow.patched("stuck-entries-found"):
            workflow.upsert_search_attributes([OUTBOX_STUCK.value_set(kind)])
            self._marked = True
        elif self._marked and not self.stuck:
            workflow.upsert_search_attributes([OUTBOX_STUCK.value_unset()])
            self._marked = False

    async def _skip(self, request: SkipEntry) -> OutboxStuck:
        """Skip a stuck entry and return it."""
        checked = await check_actor(request, request.actor, *SKIPPERS, since="skips-checked")
        self._require_stuck(request)
        self._skips[request.entry_id] = (request, checked.via if checked else "")
        return self.stuck[request.entry_id]

    def _may_skip(self, request: SkipEntry) -> None:
        require_person(request.actor)
        self._require_stuck(request)

    def _require_stuck(self, request: SkipEntry) -> None:
        if request.entry_id in self.stuck and request.entry_id not in self._skips:
            return
        there = ", ".join(each for each in self.stuck if each not in self._skips) or "none"
        raise application_error(
            ErrorType.ENTRY_NOT_STUCK,
            f"entry_id: {request.entry_id[:200]} is not a stuck entry; those that are: {there}",
        )

    def _settle(self, count: int) -> None:
        del self.state.entries[:count]
        self.state.published += count


def _was_not_taken(error: ActivityError) -> bool:
    """Return whether no worker took the activity, as when the process `bridge` does not run."""
    cause = error.cause
    return isinstance(cause, TimedOut) and cause.type == TimeoutType.SCHEDULE_TO_START


async def record_deliberation(record: DeliberationRecord) -> None:
    """Record a deliberation by itself."""
    await workflow.execute_activity_method(
        GraphStub.record_deliberation,
        record,
        **(STORE | {"summary": "record proposals, critiques, checks, decisions"}),
    )


async def supervised(name: str, work: Awaitable[None]) -> None:
    """Do a background task's work; an unexpected error fails the workflow task.

    Otherwise the error would only be logged, and the workflow would wait forever. Temporal shows a
    failed workflow task, and tries it again until the code is corrected.
    """
    try:
        await work
    except Exception as error:  # raised where it is seen  # noqa: BLE001
        failure = RuntimeError(f"{name} failed: {error!r}")
        failure.__cause__ = error

        def fail() -> bool:
            raise failure

        await workflow.wait_condition(fail)  # evaluated by the event loop, outside of every task


def _skipped(entry: Entry, stuck: OutboxStuck, request: SkipEntry, via: Via) -> Entry:
    """Build the record of a skipped entry; it contains the whole entry."""
    at = timestamp()
    body = EntrySkipped(
        story_id=entry.story_id,
        timestamp=at,
        reason=request.reason,
        actor=request.actor,
        via=via,
        error=f"{stuck.kind}, {stuck.step}: {stuck.error}",
        step=stuck.step,
        entry=entry.model_dump_json(),
    )
    return Entry(
        id=f"{entry.id}{SKIPPED}",
        kind=EntrySkipped.__name__,
        subject=SKIPPED_SUBJECT if workflow.patched("skipped-entries-are-dead-letters") else "",
        source=entry.source,
        story_id=entry.story_id,
        time=at,
        body=body.model_dump(mode="json"),
    )


def _kinds(batch: list[Entry]) -> str:
    kinds = ", ".join(entry.kind for entry in batch[:3])
    return kinds if len(batch) <= 3 else f"{kinds} and {len(batch) - 3} more"
