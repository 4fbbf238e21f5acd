"""Entries of outboxes, and the batches in which activities record and publish them."""

from __future__ import annotations

from typing import Any

from workflows.models.base import Model
from workflows.models.deliberation import DeliberationRecord


class Entry(Model):
    """One entry of an outbox.

    `id` is the CloudEvents id. `kind` is the body's class name; `subject` is empty if the entry is
    recorded and not published. `story_id` orders the bus: one story's entries stay in order.
    """

    id: str
    kind: str
    subject: str = ""
    source: str
    """Id of the workflow where the change happened: the path of the CloudEvents source."""
    story_id: str = ""
    time: str
    body: dict[str, Any]


class RecordBatch(Model):
    """Entries to store in the graph and the cache, in order.

    `owner` and `first` number the entries in their outbox. With the owner's start time they form
    the ids of the timeline's stream, so that a batch stored twice adds each line once.
    """

    owner: str
    owner_started_ms: int
    first: int
    entries: list[Entry]


class OutcomeBatch(RecordBatch):
    """The last entries of a deliberation of no story, stored in one transaction with the rest."""

    deliberation: DeliberationRecord

    @classmethod
    def of(cls, batch: RecordBatch, deliberation: DeliberationRecord) -> OutcomeBatch:
        """Return the batch with a deliberation."""
        return cls(**dict(batch), deliberation=deliberation)


class Announced(Model):
    """How many entries of a batch, from its start, are published; all of them are recorded."""

    published: int


class PublishBatch(Model):
    """Entries to publish to JetStream, in order; all of them have a subject."""

    entries: list[Entry]
