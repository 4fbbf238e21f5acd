"""The outbox: every change of state, recorded in the graph and then put on the bus.

A workflow appends and goes on; it never waits for NATS. Two cursors walk the same list in order:
`record` stores entries in graph and cache, `publish` follows it onto JetStream, so that an event is
in Neo4j before a subscriber has it (design sections 5 and 6). A child of a story hands its entries
on to the story's outbox instead: one story, one order.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError, FailureError

from workflows.events import LATER_PUBLISHED, Entry, EventBody, PublishBatch, RecordBatch
from workflows.models import event_id, run_after_reset
from workflows.outbox_state import OutboxState
from workflows.stubs import MIRROR, STORE, GraphStub, MirrorStub

BATCH = 100
"""Entries in one activity: a batch stays far below NATS' and Temporal's message limits."""

AGAIN_AFTER = timedelta(minutes=1)
"""The pause before an activity that was failed for good (by an operator, say) is asked again."""

HAND_ON = "hand_on"
"""The signal by which a child hands entries to its story."""

LEFT = "outbox"
"""The query that answers the outbox's state: what is yet to be recorded and published."""


class Outbox:
    """A workflow's outbox. `through`: the workflow that publishes for this one, or empty."""

    def __init__(self, state: OutboxState, through: str = "", owner: str = "") -> None:
        """owner: the workflow whose outbox `state` is; empty: this one."""
        self.state = state
        self.owner = owner or workflow.info().workflow_id
        self.through = through
        self.first_run = self.run = workflow.info().original_execution_run_id
        """Names this run in ids. A reset run bears its first run's name up to where it was reset:
        what was appended before happened once, and has one id."""
        workflow.register_random_seed_callback(self._begin_anew)
        workflow.set_query_handler(LEFT, lambda: self.state)
        self.held = False
        """Entries are recorded, but neither published nor handed on."""
        self.stuck = ""
        """Why the last batch was refused, where one was: shown in the Web UI."""
        if not state.started_ms:
            state.started_ms = int(workflow.info().start_time.timestamp() * 1000)

    def start(self) -> None:
        """Begin to drain. Call once, at the beginning of `run`."""
        self._tasks = [asyncio.create_task(self._record()), asyncio.create_task(self._publish())]

    def append(self, body: EventBody) -> Entry:
        """Append a change of this workflow; its id follows from workflow, run and position."""
        workflow_id = workflow.info().workflow_id
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
        """Take entries that a child handed on; they keep their ids."""
        self.state.entries.extend(entries)

    @property
    def empty(self) -> bool:
        return not self.state.entries

    async def drained(self) -> None:
        """Wait until every entry is on the bus, or handed on."""
        await workflow.wait_condition(lambda: self.empty)

    async def recorded(self) -> None:
        """Wait until what was appended so far is in the graph: for work that reads it there."""
        position = self.state.end
        await workflow.wait_condition(lambda: self.state.recorded >= position)

    def _begin_anew(self, seed: int) -> None:
        """The run was reset here: what happens from now on is not what happened then."""
        # The SDK calls this outside the workflow's loop: `workflow.info()` would raise here.
        self.run = run_after_reset(self.first_run, seed)

    async def _record(self) -> None:
        state = self.state
        while True:
            await workflow.wait_condition(
                lambda: state.recorded < state.end and not (self.held and self.through)
            )
            first = state.recorded
            start = first - state.published
            batch = state.entries[start : start + BATCH]
            if self.through:
                await self._hand_on(batch)
                continue
            try:
                await workflow.execute_activity_method(
                    GraphStub.record,
                    RecordBatch(
                        owner=self.owner,
                        owner_started_ms=state.started_ms,
                        first=first,
                        entries=batch,
                    ),
                    **(STORE | {"summary": f"record {_kinds(batch)}"}),
                )
            except ActivityError as error:
                await self._pause(error)
            else:
                self.stuck = ""
                state.recorded += len(batch)

    async def _hand_on(self, batch: list[Entry]) -> None:
        story = workflow.get_external_workflow_handle(self.through)
        try:
            await story.signal(HAND_ON, batch)
        except FailureError:
            # The story is gone (terminated): what happened is still recorded and told, from here.
            self.through = ""
        else:
            self.state.recorded += len(batch)
            self._settle(len(batch))

    async def _publish(self) -> None:
        state = self.state
        while True:
            await workflow.wait_condition(
                lambda: state.published < state.recorded and not self.held
            )
            batch = state.entries[: min(BATCH, state.recorded - state.published)]
            public = [entry for entry in batch if entry.subject]
            try:
                if public:
                    await workflow.execute_activity_method(
                        MirrorStub.publish,
                        PublishBatch(entries=public),
                        **(MIRROR | {"summary": f"publish {_kinds(public)}"}),
                    )
            except ActivityError as error:
                await self._pause(error)
            else:
                self.stuck = ""
                self._settle(len(batch))

    async def _pause(self, error: ActivityError) -> None:
        self.stuck = str(error.cause or error)[:500]
        await workflow.sleep(AGAIN_AFTER, summary=f"outbox: again after {self.stuck[:120]}")

    def _settle(self, count: int) -> None:
        del self.state.entries[:count]
        self.state.published += count


def _kinds(batch: list[Entry]) -> str:
    kinds = ", ".join(entry.kind for entry in batch[:3])
    return kinds if len(batch) <= 3 else f"{kinds} and {len(batch) - 3} more"
