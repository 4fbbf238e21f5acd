"""Metrics of the entries that outboxes wait to record and to publish.

An entry counts from its first attempt until it succeeds. While a store is away, the attempts of a
batch are minutes apart, and any replica may make the next: an entry that this replica has not tried
again for `FORGOTTEN_AFTER_S` is not counted any longer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from temporalio import activity
from temporalio.worker import ActivityInboundInterceptor, ExecuteActivityInput, Interceptor

from workflows.models.entries import Announced, Entry, PublishBatch, RecordBatch

FORGOTTEN_AFTER_S = 150.0
"""Two and a half times the longest pause between two attempts (workflows.stubs.MIRROR)."""

STEPS = ("record", "publish")
WAITING = Gauge("fleet_outbox_waiting", "Entries of outboxes that wait for a step", ["step"])
OLDEST = Gauge("fleet_outbox_oldest_seconds", "Age of the oldest entry that waits", ["step"])
LAG = Histogram(
    "fleet_outbox_lag_seconds",
    "Time from an event to the end of a step",
    ["step"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800),
)
EVENTS = Counter("fleet_events_published", "Events on JetStream, by subject", ["subject"])


@dataclass(frozen=True)
class Batch:
    """A batch that waits: its entries, the time of the oldest, and when it was last tried."""

    entries: int
    oldest: float
    tried: float


class OutboxMetrics(Interceptor):
    """Measures the activities that record and publish the entries of outboxes."""

    def __init__(self) -> None:
        """Report the batches of this worker from now on."""
        self._waiting: dict[tuple[str, str], Batch] = {}
        for step in STEPS:
            WAITING.labels(step).set_function(partial(self.waiting, step))
            OLDEST.labels(step).set_function(partial(self.oldest_s, step))

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        """Wrap the activity."""
        return _Measured(next, self._waiting)

    def waiting(self, step: str) -> int:
        """Return how many entries wait for the step."""
        return sum(batch.entries for batch in self._batches(step))

    def oldest_s(self, step: str) -> float:
        """Return the age of the oldest entry that waits for the step, in seconds; 0 if none."""
        oldest = min((batch.oldest for batch in self._batches(step)), default=None)
        return 0.0 if oldest is None else max(0.0, time.time() - oldest)

    def _batches(self, step: str) -> list[Batch]:
        now = time.monotonic()
        for key, batch in [*self._waiting.items()]:  # Prometheus reads in another thread
            if now - batch.tried > FORGOTTEN_AFTER_S:
                self._waiting.pop(key, None)
        return [batch for (_, of), batch in [*self._waiting.items()] if of == step]


class _Measured(ActivityInboundInterceptor):
    def __init__(
        self, next: ActivityInboundInterceptor, waiting: dict[tuple[str, str], Batch]
    ) -> None:
        super().__init__(next)
        self._waiting = waiting

    async def execute_activity(self, input: ExecuteActivityInput) -> Any:
        request = input.args[0] if input.args else None
        if not isinstance(request, RecordBatch | PublishBatch) or not request.entries:
            return await super().execute_activity(input)
        step = "publish" if isinstance(request, PublishBatch) else "record"
        key = (activity.info().workflow_run_id or "", step)
        oldest = min(_seconds(entry.time) for entry in request.entries)
        self._waiting[key] = Batch(len(request.entries), oldest, time.monotonic())
        result = await super().execute_activity(input)
        self._waiting.pop(key, None)
        if isinstance(request, PublishBatch):
            _count_published(request.entries)
        else:
            _observe("record", request.entries)
        if isinstance(result, Announced):
            _count_published(request.entries[: result.published])
        return result


def _count_published(entries: Sequence[Entry]) -> None:
    public = [entry for entry in entries if entry.subject]
    _observe("publish", public)
    for entry in public:
        EVENTS.labels(entry.subject).inc()


def _observe(step: str, entries: Iterable[Entry]) -> None:
    for entry in entries:
        LAG.labels(step).observe(max(0.0, time.time() - _seconds(entry.time)))


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp()
