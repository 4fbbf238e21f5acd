"""Live following of the fleet's streams: one ephemeral ordered consumer each, merged by time."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from nats import errors as nats_errors
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js import errors as js_errors
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from bridge.inbox.envelopes import InvalidMessage, in_lower_case
from bridge.inbox.parsing import READING, Received, parse_event
from bridge.jetstream.streams import STREAMS, Stream
from bridge.outages import is_unavailable
from workflows.models.entries import Entry
from workflows.models.events import PUBLISHED

EVENT_STREAMS = tuple(
    stream
    for stream in STREAMS
    if stream.name in ("PLANNING_EVENTS", "CONTEXT", "ORCHESTRATOR_EVENTS")
)
"""The streams that hold the events of workflows."""

BATCH = 200
FETCH_S = 2.0
"""How long one request for messages waits at the server, in seconds."""

ANSWER_S = 5.0
"""How long the server has to answer any other request, in seconds."""

AGAIN_AFTER_S = 0.5
"""The pause before a lost consumer is created again."""

LINGER_S = 0.2
"""How long an event waits for an older one of another stream, once all streams are read."""

GONE_AFTER_S = 30.0
"""How long the server keeps a consumer that no one reads."""


class StreamMissing(Exception):
    """Absence of a stream; the message names what creates it."""


@dataclass(frozen=True)
class Seen:
    """A message of a stream.

    id: its `ce-id`; without one, stream and sequence. time: when it happened, ISO 8601. stored:
    when JetStream stored it, by which the streams are merged. body: its JSON, or its text if it
    is not JSON. read: the event's fields as the inbox reads them; None if it does not.
    """

    stream: str
    sequence: int
    subject: str
    id: str
    time: str
    story: str
    body: Any
    stored: datetime
    headers: dict[str, str]
    read: dict[str, Any] | None = None


def seen(message: Msg) -> Seen:
    """Parse a stream's message, which need not be one of the fleet's own."""
    about = message.metadata
    headers = dict(message.headers or {})
    named = in_lower_case(headers)
    text = message.data.decode(errors="replace")
    try:
        body = json.loads(text)
    except ValueError:
        body = text
    fields = body if isinstance(body, dict) else {}
    entry = _entry(message)
    if entry:
        fields = entry.body
    return Seen(
        stream=about.stream,
        sequence=about.sequence.stream,
        subject=message.subject,
        id=named.get("ce-id") or f"{about.stream}/{about.sequence.stream}",
        time=str(named.get("ce-time") or fields.get("timestamp") or about.timestamp.isoformat()),
        story=str(named.get("ce-subject") or fields.get("story_id") or ""),
        body=body,
        stored=about.timestamp,
        headers=headers,
        read=entry.body if entry else None,
    )


def _entry(message: Msg) -> Entry | None:
    """Return what the inbox reads; others wrap the fields and name them in their own ways."""
    if PUBLISHED.get(message.subject) not in READING:
        return None
    try:
        return parse_event(Received.of(message)).change.entry
    except InvalidMessage:
        return None


@dataclass
class Source:
    """The messages of one stream that were read and are not passed on yet.

    read_up: whether all messages that the stream held at the last request have been read.
    """

    waiting: deque[tuple[float, Seen]] = field(default_factory=deque)
    """When each event was read, by the loop's clock, and the event; oldest first."""
    read_up: bool = False
    ended: bool = False


def due(sources: Iterable[Source], now: float, linger: float = LINGER_S) -> Source | None:
    """Return the source whose first event is the next in time, if it may be passed on already.

    A source without waiting events may still bring an older one. The event waits until that source
    is read completely, and then for `linger` seconds.
    """
    sources = list(sources)
    holding = [source for source in sources if source.waiting]
    if not holding:
        return None
    first = min(holding, key=lambda source: source.waiting[0][1].stored)
    for source in sources:
        if source.waiting or source.ended:
            continue
        if not source.read_up or now - first.waiting[0][0] < linger:
            return None
    return first


class Following:
    """The streams' events from `since` on, or from now on.

    `on_away` is called once per outage of the server, `on_back` once when it is back.
    """

    def __init__(
        self,
        nats: Nats,
        *,
        since: datetime | None,
        from_first: bool = False,
        streams: tuple[Stream, ...] = EVENT_STREAMS,
        on_away: Callable[[], None] = lambda: None,
        on_back: Callable[[], None] = lambda: None,
    ) -> None:
        self._nats = nats
        self._jetstream = nats.jetstream(timeout=ANSWER_S)
        self._since, self._from_first = since, from_first
        self._on_away, self._on_back = on_away, on_back
        self._away = False
        self._sources = {stream.name: Source() for stream in streams}
        self._changed = asyncio.Event()

    async def events(self, live: bool = True) -> AsyncIterator[Seen]:
        """Yield every event once, in time order; without `live`, only those stored at the start.

        Raises:
            StreamMissing: a stream does not exist at the start.
        """
        begins = {name: await self._begin(name) for name in self._sources}
        readers = [
            asyncio.create_task(self._read(name, config, None if live else last))
            for name, (config, last) in begins.items()
        ]
        try:
            while True:
                self._changed.clear()
                while source := due(self._sources.values(), asyncio.get_running_loop().time()):
                    yield source.waiting.popleft()[1]
                for reader in readers:
                    if reader.done():
                        reader.result()
                if all(each.ended and not each.waiting for each in self._sources.values()):
                    return
                await self._next_change()
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    async def _next_change(self) -> None:
        lingers = any(source.waiting for source in self._sources.values())
        try:
            async with asyncio.timeout(LINGER_S / 4 if lingers else 1):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _begin(self, stream: str) -> tuple[ConsumerConfig, int]:
        """Return where to begin in the stream, and the sequence of its current last message."""
        try:
            state = (await self._jetstream.stream_info(stream)).state
        except js_errors.NotFoundError:
            raise StreamMissing(
                f"NATS has no stream {stream}: the bridge makes it when it starts "
                "(`python -m workers bridge`)"
            ) from None
        if self._since:
            config = ConsumerConfig(
                deliver_policy=DeliverPolicy.BY_START_TIME, opt_start_time=self._since
            )
        elif self._from_first:
            config = ConsumerConfig(deliver_policy=DeliverPolicy.ALL)
        else:
            config = _from(state.last_seq + 1)
        return config, state.last_seq

    async def _read(self, stream: str, config: ConsumerConfig, last: int | None) -> None:
        """Fill the stream's source; if the consumer is lost, continue after the last event."""
        source = self._sources[stream]
        position = 0
        while not source.ended:
            try:
                if position > (await self._jetstream.stream_info(stream)).state.last_seq:
                    config, position = _from(1), 0  # the stream was deleted and created again
                async with aclosing(self._consume(stream, config)) as messages:
                    async for message, pending in messages:
                        self._note_back()
                        if message:
                            position = message.metadata.sequence.stream
                            config = _from(position + 1)
                            now = asyncio.get_running_loop().time()
                            source.waiting.append((now, seen(message)))
                        source.read_up = pending == 0
                        source.ended = last is not None and (position >= last or pending == 0)
                        self._changed.set()
                        if source.ended:
                            return
                        while len(source.waiting) > BATCH:  # the reader is slower: wait
                            await asyncio.sleep(LINGER_S / 4)
            except Exception as error:
                if not is_unavailable(error):
                    raise
                source.read_up = False
                if not self._nats.is_connected:
                    self._note_away()
                await asyncio.sleep(AGAIN_AFTER_S)

    async def _consume(
        self, stream: str, config: ConsumerConfig
    ) -> AsyncGenerator[tuple[Msg | None, int]]:
        """Yield messages in the stream's order without a gap, each with the number still pending.

        It ends if a message is missing: the server redelivers nothing to such a consumer.
        """
        subscription = await self._jetstream.pull_subscribe(
            "",
            stream=stream,
            config=config.evolve(
                ack_policy=AckPolicy.NONE,
                mem_storage=True,
                num_replicas=1,
                inactive_threshold=GONE_AFTER_S,
            ),
        )
        try:
            pending = (await subscription.consumer_info()).num_pending or 0
            yield None, pending
            expected = 1
            while True:
                for message in await self._fetch(subscription, pending):
                    if message.metadata.sequence.consumer != expected:
                        return
                    expected += 1
                    pending = message.metadata.num_pending
                    yield message, pending
        finally:
            await _drop(subscription)

    async def _fetch(
        self, subscription: JetStreamContext.PullSubscription, pending: int
    ) -> list[Msg]:
        # Request no more than is available: such a request is answered at once.
        try:
            return await subscription.fetch(max(1, min(pending, BATCH)), timeout=FETCH_S)
        except nats_errors.TimeoutError:
            # No message came, or the server lost the consumer: then this raises.
            await subscription.consumer_info()
            return []

    def _note_away(self) -> None:
        if not self._away:
            self._away = True
            self._on_away()

    def _note_back(self) -> None:
        if self._away:
            self._away = False
            self._on_back()


def _from(sequence: int) -> ConsumerConfig:
    return ConsumerConfig(
        deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=max(sequence, 1)
    )


async def _drop(subscription: JetStreamContext.PullSubscription) -> None:
    """End the subscription; the server removes the consumer by itself."""
    try:
        await subscription.unsubscribe()
    except Exception as error:
        if not is_unavailable(error):
            raise
