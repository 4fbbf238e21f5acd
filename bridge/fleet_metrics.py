"""Metrics of the whole fleet: stories, gates, backlogs, dead letters.

Every replica of the process `inbox` reports the same values: use their maximum, not their sum.
Visibility follows a workflow within about a second. Each value is one count in it, so that the cost
does not grow with the number of stories.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import structlog
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError
from prometheus_client import Counter, Gauge
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import Client

from bridge.jetstream.dead_letters import STREAM as DEAD_LETTERS
from bridge.story_list import stories_query
from workflows.models.process import Machine
from workflows.rules.machine import BUDGET_GATE
from workflows.search_attributes import GATE_OPENED_AT, PENDING_GATE
from workflows.stubs import (
    AGENTS_QUEUE,
    BRIDGE_QUEUE,
    CONTEXT_QUEUE,
    STORY_QUEUE,
    WORKSPACE_QUEUE,
)

EVERY_S = 15.0
WAITED: Mapping[str, timedelta] = {
    "1h": timedelta(hours=1),
    "1d": timedelta(days=1),
    "7d": timedelta(days=7),
}
"""The waits of gates that are counted, by the value of the label `longer_than`."""

RUNNING = stories_query(running=True)
RUNNING_DELIBERATIONS = "WorkflowType = 'DeliberationWorkflow' AND ExecutionStatus = 'Running'"
OTHER = "other"
"""The states that today's process does not have, of stories that began with an earlier one."""

QUEUES = {
    STORY_QUEUE: TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW,
    AGENTS_QUEUE: TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY,
    CONTEXT_QUEUE: TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY,
    BRIDGE_QUEUE: TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY,
    WORKSPACE_QUEUE: TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY,
}

STORIES = Gauge("fleet_stories", "Stories that run, by state", ["state"])
GATES = Gauge("fleet_gates_waiting", "Stories that wait for a person, by gate", ["gate"])
GATES_LONG = Gauge(
    "fleet_gates_waiting_long", "Stories that have waited for a person longer", ["longer_than"]
)
DELIBERATIONS = Gauge("fleet_deliberations_running", "Deliberations that run")
BACKLOG = Gauge("fleet_task_queue_backlog", "Tasks that no worker has taken yet", ["queue"])
BACKLOG_AGE = Gauge(
    "fleet_task_queue_backlog_age_seconds", "Age of the oldest task of the backlog", ["queue"]
)
LETTERS = Gauge("fleet_dead_letters", "Dead letters that were neither replayed nor dropped")
FAILURES = Counter("fleet_metrics_failures", "Rounds of these metrics that a server did not answer")

log = structlog.stdlib.get_logger(__name__)


class FleetMetrics:
    """A job of the process `inbox` that brings the metrics up to date periodically."""

    def __init__(self, temporal: Client, jetstream: JetStreamContext, machine: Machine) -> None:
        """Create the job.

        Args:
            temporal: where workflows and task queues are counted.
            jetstream: where dead letters are counted.
            machine: its states and gates are counted.
        """
        self._temporal, self._jetstream = temporal, jetstream
        self._states = [state.name for state in machine.states if state.name != machine.final]
        self._gates = [*machine.gates, BUDGET_GATE]
        self._stopping = asyncio.Event()
        self._running = False

    @property
    def is_running(self) -> bool:
        return self._running

    async def run(self) -> None:
        """Measure until `shutdown`; while a server is away, the last values stay."""
        self._running = True
        try:
            while not self._stopping.is_set():
                try:
                    await self.measure()
                except Exception as error:  # an outage or a bug must not stop the job  # noqa: BLE001
                    FAILURES.inc()
                    log.warning("metrics not measured", error=repr(error))
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), EVERY_S)
        finally:
            self._running = False

    async def shutdown(self) -> None:
        """Start no more rounds."""
        self._stopping.set()

    async def measure(self) -> None:
        """Bring every metric up to date.

        Raises:
            RPCError: Temporal does not answer.
            nats.errors.Error: NATS does not answer.
        """
        in_known_states = 0
        for state in self._states:
            count = await self._count(stories_query(running=True, state=state))
            STORIES.labels(state).set(count)
            in_known_states += count
        STORIES.labels(OTHER).set(max(0, await self._count(RUNNING) - in_known_states))
        for gate in self._gates:
            query = f"{RUNNING} AND {PENDING_GATE.name} = '{gate}'"
            GATES.labels(gate).set(await self._count(query))
        now = datetime.now(UTC)
        for name, wait in WAITED.items():
            before = (now - wait).isoformat(timespec="seconds")
            query = f"{RUNNING} AND {GATE_OPENED_AT.name} < '{before}'"
            GATES_LONG.labels(name).set(await self._count(query))
        DELIBERATIONS.set(await self._count(RUNNING_DELIBERATIONS))
        for queue, kind in QUEUES.items():
            await self._measure_queue(queue, kind)
        with suppress(NotFoundError):  # the stream is made again at once
            LETTERS.set((await self._jetstream.stream_info(DEAD_LETTERS)).state.messages)

    async def _count(self, query: str) -> int:
        return (await self._temporal.count_workflows(query)).count

    async def _measure_queue(self, queue: str, kind: TaskQueueType.ValueType) -> None:
        described = await self._temporal.workflow_service.describe_task_queue(
            DescribeTaskQueueRequest(
                namespace=self._temporal.namespace,
                task_queue=TaskQueue(name=queue),
                task_queue_type=kind,
                report_stats=True,
            )
        )
        stats = described.stats
        BACKLOG.labels(queue).set(stats.approximate_backlog_count)
        BACKLOG_AGE.labels(queue).set(stats.approximate_backlog_age.ToTimedelta().total_seconds())
