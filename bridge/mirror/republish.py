"""Republishing of a story's events: those that a stream lacks, or all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from temporalio.exceptions import ApplicationError

from bridge.jetstream.streams import Stream, stream_of
from bridge.mirror.publisher import Mirror
from workflows.models.entries import Entry

CLOCKS_APART = timedelta(hours=1)
"""How long before an event the search for its message begins: the servers' clocks may differ."""

BATCH = 500
NEXT_WITHIN_S = 10.0


@dataclass
class ReplayCounts:
    """The counts of one stream. events: the story's. published: new in it. known: already in it.

    suppressed_by_dedup: not in it and not accepted, because they were deleted from the stream,
    which knows their ids until its duplicate window is over.
    """

    events: int = 0
    published: int = 0
    known: int = 0
    suppressed_by_dedup: int = 0


async def published_ids_of(
    jetstream: JetStreamContext, stream: Stream, story_id: str, since: datetime
) -> set[str]:
    """Return the ids of the story's events that the stream holds.

    Raises:
        nats.errors.Error: NATS went down meanwhile.
    """
    subscription = await jetstream.pull_subscribe(
        "",
        stream=stream.name,
        config=ConsumerConfig(
            ack_policy=AckPolicy.NONE,
            headers_only=True,
            deliver_policy=DeliverPolicy.BY_START_TIME,
            opt_start_time=since,
            mem_storage=True,
            num_replicas=1,
        ),
    )
    found = set()
    left = (await subscription.consumer_info()).num_pending or 0
    while left:
        messages = await subscription.fetch(min(left, BATCH), timeout=NEXT_WITHIN_S)
        for message in messages:
            headers = message.headers or {}
            if headers.get("ce-subject") == story_id:
                found.add(headers.get("ce-id", ""))
        left = messages[-1].metadata.num_pending
    await subscription.unsubscribe()
    return found


async def published_ids(
    jetstream: JetStreamContext, story_id: str, entries: Iterable[Entry]
) -> set[str]:
    """Return the ids of the story's events that are on their streams."""
    entries = list(entries)
    if not entries:
        return set()
    since = min(datetime.fromisoformat(entry.time) for entry in entries) - CLOCKS_APART
    streams = {stream for entry in entries if (stream := stream_of(entry.subject))}
    found = set()
    for stream in sorted(streams, key=lambda each: each.name):
        found |= await published_ids_of(jetstream, stream, story_id, since)
    return found


async def republish(
    mirror: Mirror,
    entries: Sequence[Entry],
    known: set[str],
    everything: bool,
    on_progress: Callable[[int, int], None],
    refused: list[str],
) -> dict[str, ReplayCounts]:
    """Publish the entries that are not known, or everything, one after the other.

    The callback receives the number of entries that are done, and the number of all entries. An
    entry that NATS refuses for good is appended to `refused`, and the rest is published.

    Returns:
        Stream -> its counts.

    Raises:
        ApplicationError: NATS is away; the entries before it are stored.
    """
    counts: dict[str, ReplayCounts] = {}
    for done, entry in enumerate(entries, 1):
        stream = stream_of(entry.subject)
        count = counts.setdefault(stream.name if stream else "", ReplayCounts())
        count.events += 1
        is_known = entry.id in known
        try:
            is_new = (everything or not is_known) and await mirror.store(entry)
        except ApplicationError as error:
            if not error.non_retryable:
                raise
            refused.append(error.message)
            continue
        if is_new:
            count.published += 1
        elif is_known:
            count.known += 1
        else:
            count.suppressed_by_dedup += 1
        on_progress(done, len(entries))
    return counts
