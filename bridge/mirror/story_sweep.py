"""Recording and publishing of the end of stories whose workflow ended early.

A workflow that is terminated, times out or fails cannot publish its end itself. Any number of
sweeps can run at the same time: the closure of a run has one workflow id, and one workflow.
Other workflows without a parent that publish are closed too (bridge/mirror/alone.py).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial

import structlog
from prometheus_client import Counter as Count
from prometheus_client import Gauge
from temporalio.client import (
    Client,
    WorkflowExecution,
    WorkflowExecutionStatus,
    WorkflowHandle,
    WorkflowQueryFailedError,
)
from temporalio.common import WorkflowIDReusePolicy
from temporalio.converter import DataConverter
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from activities.graph.activities import Graph
from bridge.jetstream.streams import STREAMS
from bridge.mirror.alone import ALONE_ENDED_EARLY, ANSWER_WITHIN, closure_alone, why_ended
from bridge.story_list import STUCK_RUNS
from workflows.child import STOP
from workflows.closure import StoryClosureWorkflow
from workflows.derivation import plan_never_ran
from workflows.models.events import GateClosed, StoryCancelled
from workflows.models.ids import closure_workflow_id, story_of
from workflows.models.outbox import OutboxState, StoryClosure
from workflows.models.plan import Plan
from workflows.models.story import Move, StoryView
from workflows.outbox import OUTBOX_QUERY
from workflows.search_attributes import PENDING_GATE, STORY_ROLE, STORY_STATE
from workflows.stubs import STORY_QUEUE
from workflows.timestamps import format_timestamp

ENDED_EARLY = (
    "WorkflowType = 'StoryWorkflow' AND ExecutionStatus IN ('Terminated', 'TimedOut', 'Failed')"
)
RECEIVED_FOR = 2 * max(stream.max_age for stream in STREAMS)
"""How long the identity of a message is kept. Its stream holds the message for the maximum age at
most, and its dead letter may be replayed for that time again. After that it cannot return."""

ASKED_AT_MOST = 5
"""Number of sweeps that query a story whose history the workers cannot replay. A release that can
replay it may be deployed meanwhile. After that, visibility's data is used to close the story."""

NOT_REPLAYED = "its history cannot be replayed, so what it had not recorded is lost"
JITTER = 0.2

CLOSED = Count("fleet_stories_closed", "Stories, plans and councils whose early end was announced")
STUCK = Gauge("fleet_outbox_stuck", "Workflows whose outbox has an entry that is refused for good")
FAILURES = Count("fleet_story_sweep_failures", "Stories, or whole sweeps, left to the next sweep")

log = structlog.stdlib.get_logger(__name__)

ClosureOf = Callable[
    [WorkflowExecution, WorkflowHandle[object, object]], Awaitable[StoryClosure | None]
]
"""Returns what a run that ended early has not published; None: nothing."""


class StorySweep:
    """A job of the process `inbox` that sweeps at its start and then periodically.

    It also removes the identities of messages that no stream holds any more.
    """

    def __init__(self, temporal: Client, graph: Graph, every: timedelta) -> None:
        self._temporal, self._graph, self._every = temporal, graph, every
        self._stopping = asyncio.Event()
        self._running = False
        self._settled: set[str] = set()
        """Runs that need no more work: they are not looked at again."""
        self._unanswered = Counter[str]()
        """Run -> how many times its history could not be replayed."""

    @property
    def is_running(self) -> bool:
        return self._running

    async def run(self) -> None:
        """Sweep until `shutdown`; after an outage of a server, try again at the next sweep."""
        self._running = True
        try:
            while not self._stopping.is_set():
                try:
                    await self.sweep()
                    await self._graph.forget_received(RECEIVED_FOR)
                except Exception as error:  # an outage or a bug must not stop the job  # noqa: BLE001
                    FAILURES.inc()
                    log.warning("sweep for ended stories failed", error=repr(error))
                pause_s = self._every.total_seconds() * random.uniform(1 - JITTER, 1 + JITTER)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), pause_s)
        finally:
            self._running = False

    async def shutdown(self) -> None:
        """Start no more sweeps."""
        self._stopping.set()

    async def sweep(self) -> int:
        """Sweep once, and count the workflows with a stuck outbox.

        Returns:
            The number of closures that were started.

        Raises:
            RPCError: Temporal does not answer.
            ApplicationError: the graph does not answer.
        """
        STUCK.set((await self._temporal.count_workflows(STUCK_RUNS)).count)
        stories = [run async for run in self._temporal.list_workflows(ENDED_EARLY)]
        alone = [run async for run in self._temporal.list_workflows(ALONE_ENDED_EARLY)]
        self._settled &= {run.run_id for run in (*stories, *alone)}
        fresh = self._fresh(stories)
        live = await self._graph.live_stories(sorted({story_of(run.id) for run in fresh}))
        of_stories = [run for run in fresh if story_of(run.id) in live]
        started = await self._close_each(of_stories, self._closure)
        of_alone = partial(closure_alone, converter=self._temporal.data_converter)
        return started + await self._close_each(self._fresh(alone), of_alone)

    def _fresh(self, runs: list[WorkflowExecution]) -> list[WorkflowExecution]:
        return [run for run in runs if run.run_id not in self._settled]

    async def _close_each(self, runs: list[WorkflowExecution], closure_of: ClosureOf) -> int:
        """Close the runs; return how many closures were started."""
        started = 0
        for run in runs:
            if self._stopping.is_set():
                break
            try:
                started += await self._close(run, closure_of)
            except Exception as error:  # the others are closed all the same  # noqa: BLE001
                FAILURES.inc()
                log.warning("workflow not closed yet", workflow_id=run.id, error=repr(error))
            else:
                self._settled.add(run.run_id)
        return started

    async def _close(self, run: WorkflowExecution, closure_of: ClosureOf) -> bool:
        """Start the closure that records and publishes the end; return whether it was started."""
        latest = await self._temporal.get_workflow_handle(run.id).describe()
        if latest.run_id != run.run_id:
            return False
        handle = self._temporal.get_workflow_handle(run.id, run_id=run.run_id)
        closure = await closure_of(run, handle)
        if closure is None:
            return False
        try:
            await self._temporal.start_workflow(
                StoryClosureWorkflow.run,
                closure,
                id=closure_workflow_id(closure.story_id, run.run_id),
                task_queue=STORY_QUEUE,
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                static_summary=f"the end of {run.id}, which ended early"[:200],
            )
        except WorkflowAlreadyStartedError:
            return False
        CLOSED.inc()
        return True

    async def _closure(
        self, run: WorkflowExecution, handle: WorkflowHandle[object, object]
    ) -> StoryClosure | None:
        """Return what is still to be published, or None; a story worker must answer the queries."""
        await self._stop_children(run)
        try:
            outbox = await handle.query(
                OUTBOX_QUERY, result_type=OutboxState, rpc_timeout=ANSWER_WITHIN
            )
            view = await handle.query("state", result_type=StoryView, rpc_timeout=ANSWER_WITHIN)
            moves = await handle.query(
                "transitions", result_type=list[Move], rpc_timeout=ANSWER_WITHIN
            )
            waiting = await handle.query("waiting_plan", rpc_timeout=ANSWER_WITHIN)
        except WorkflowQueryFailedError:
            self._unanswered[run.run_id] += 1
            if self._unanswered[run.run_id] < ASKED_AT_MOST:
                raise
            return await _closure_by_visibility(run, handle, self._temporal.data_converter)
        if view.cancelled or not moves:
            closure = StoryClosure(story_id=view.story_id, run_id=run.run_id, outbox=outbox)
            return closure if outbox.entries else None
        actor, reason = await why_ended(handle, self._temporal.data_converter)
        closure = _closing(run, outbox, view.open_gates, actor, reason)
        if not waiting:
            return closure
        assert closure.cancelled
        when = {"story_id": closure.story_id, "timestamp": closure.cancelled.timestamp}
        ends = [end.model_copy(update=when) for end in plan_never_ran(Plan.model_validate(waiting))]
        return closure.model_copy(update={"plan": ends})

    async def _stop_children(self, run: WorkflowExecution) -> None:
        """Stop children that outlived an earlier run of the story.

        Temporal itself cancels only a child that the last run started. Visibility knows the others,
        so that they are stopped even if the story's history cannot be replayed. See
        docs/design/0007-continue-as-new-with-a-child.md.
        """
        assert run.close_time
        ours = f"ParentWorkflowId = '{run.id}' AND ExecutionStatus = 'Running'"
        before = f"StartTime < '{format_timestamp(run.close_time)}'"
        async for child in self._temporal.list_workflows(f"{ours} AND {before}"):
            try:
                await self._temporal.get_workflow_handle(child.id, run_id=child.run_id).signal(STOP)
            except RPCError as error:
                if error.status != RPCStatusCode.NOT_FOUND:  # else it has ended meanwhile
                    raise


async def _closure_by_visibility(
    run: WorkflowExecution, handle: WorkflowHandle[object, object], converter: DataConverter
) -> StoryClosure | None:
    """Build the closure of a story whose queries fail; None if the story had not begun."""
    known = run.typed_search_attributes
    if not known.get(STORY_STATE):
        return None
    gate, role = known.get(PENDING_GATE), known.get(STORY_ROLE)
    actor, reason = await why_ended(handle, converter)
    open_gates = {gate: role or ""} if gate else {}
    return _closing(run, OutboxState(), open_gates, actor, f"{reason}; {NOT_REPLAYED}")


def _closing(
    run: WorkflowExecution,
    outbox: OutboxState,
    open_gates: Mapping[str, str],
    actor: str,
    reason: str,
) -> StoryClosure:
    """Build the closure of a run, which closes its open gates and ends the story."""
    story_id = story_of(run.id)
    terminated = run.status == WorkflowExecutionStatus.TERMINATED
    assert run.close_time
    at = format_timestamp(
        run.close_time
    )  # older than anything that a later run of the story writes
    return StoryClosure(
        story_id=story_id,
        run_id=run.run_id,
        outbox=outbox,
        gates=[
            GateClosed(story_id=story_id, gate=gate, role=role, timestamp=at)
            for gate, role in open_gates.items()
        ],
        cancelled=StoryCancelled(
            story_id=story_id,
            actor=actor,
            status="CANCELLED" if terminated else "FAILED",
            reason=reason,
            timestamp=at,
        ),
    )
