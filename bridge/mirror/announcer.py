"""Recording and publishing of workflows' outbox entries in one activity, in this order."""

from __future__ import annotations

from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.graph.activities import Graph
from bridge.mirror.publisher import Mirror
from workflows.models.entries import Announced, Entry, OutcomeBatch, RecordBatch
from workflows.stubs import AnnounceStub


class Announcer(AnnounceStub):
    """The recorder and publisher of outbox entries (docs/design/0001-outbox.md)."""

    def __init__(self, graph: Graph, mirror: Mirror) -> None:
        self._graph, self._mirror = graph, mirror

    @activity.defn
    async def announce(self, batch: RecordBatch) -> Announced:
        """Record a batch, then publish what of it has a subject, up to the first that fails.

        The workflow publishes the others by the activity `publish`, which shows why it fails.

        Raises:
            ApplicationError: the batch cannot be recorded; none of it is published.
        """
        await self._graph.record(batch)
        return Announced(published=await self._published(batch.entries))

    @activity.defn
    async def announce_outcome(self, batch: OutcomeBatch) -> Announced:
        """Do as `announce` does with a batch that has a deliberation."""
        await self._graph.record_outcome(batch)
        return Announced(published=await self._published(batch.entries))

    async def _published(self, entries: list[Entry]) -> int:
        """Publish entries in order; return how many are done before the first that fails."""
        for done, entry in enumerate(entries):
            if entry.subject:
                try:
                    await self._mirror.store(entry)
                except ApplicationError:
                    return done
        return len(entries)
