"""Publication of workflows' outbox entries on JetStream.

An event has CloudEvents 1.0 attributes in NATS headers and a flat JSON body. Its `Nats-Msg-Id` is
the entry's id, so that a batch published twice is stored once. See docs/design/0001-outbox.md.
"""

import asyncio
import json

from nats import errors as nats_errors
from nats.aio.client import Client as Nats
from nats.js import errors as js_errors
from nats.js.api import Header
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from temporalio import activity
from temporalio.exceptions import ApplicationError

from bridge.jetstream.dead_letters import DeadLetters
from bridge.jetstream.streams import stream_of
from bridge.mirror.source import Source
from bridge.tracing import send_span
from workflows.models.entries import Entry, PublishBatch
from workflows.models.errors import ErrorType, application_error
from workflows.models.events import EntrySkipped
from workflows.stubs import MirrorStub

ACK_WITHIN_S = 5.0
"""How long to wait for one acknowledgement, in seconds."""

AWAY = "NATS is away"
REFUSALS: tuple[tuple[type[Exception], ErrorType, str], ...] = (
    # The client's error, our type, our message. First match counts.
    (js_errors.NoStreamResponseError, ErrorType.NO_STREAM, "no stream takes the subject"),
    (js_errors.APIError, ErrorType.STREAM_REFUSED, "the stream refused it"),
    (nats_errors.MaxPayloadError, ErrorType.EVENT_TOO_LARGE, "raise max_payload of the server"),
    (nats_errors.BadSubjectError, ErrorType.INVALID_EVENT, "the subject is malformed"),
    (nats_errors.BadHeaderError, ErrorType.INVALID_EVENT, "a header is malformed"),
    (nats_errors.OutboundBufferLimitError, ErrorType.NATS_AWAY, AWAY),
    (nats_errors.ConnectionClosedError, ErrorType.NATS_AWAY, AWAY),
    (nats_errors.ConnectionDrainingError, ErrorType.NATS_AWAY, AWAY),
    (nats_errors.TimeoutError, ErrorType.NO_ACK, "no acknowledgement came; it may be stored"),
    (asyncio.TimeoutError, ErrorType.NO_ACK, "no acknowledgement came; it may be stored"),
    (nats_errors.Error, ErrorType.NATS_ERROR, "NATS failed"),
    (OSError, ErrorType.NATS_AWAY, AWAY),
)
"""Every way a publish can fail. Failures that can pass are retried, so that no event is lost."""

PUBLISH_FAILURES = (nats_errors.Error, asyncio.TimeoutError, OSError)
"""The base classes of the errors in REFUSALS. Any other error is a bug and is not caught."""


class Mirror(MirrorStub):
    """The publisher of outbox entries. `nats` must not buffer: see `workers.clients.nats`."""

    def __init__(self, nats: Nats, source: Source) -> None:
        self._nats = nats
        self._jetstream = nats.jetstream(timeout=ACK_WITHIN_S)
        self._source = source
        self._letters = DeadLetters(nats)

    @activity.defn
    async def publish(self, batch: PublishBatch) -> None:
        """Store each entry in its stream, one after the other, in the batch's order.

        An entry is sent only after the one before it is stored, so that the order holds across
        retries and an earlier attempt that is still running.

        Raises:
            ApplicationError: by REFUSALS; the entries before the one that it names are stored.
        """
        for entry in batch.entries:
            await self.store(entry)

    async def store(self, entry: Entry) -> bool:
        """Store one entry in its stream; return whether it is new there.

        Raises:
            ApplicationError: by REFUSALS, or EVENT_ID_TAKEN.
        """
        if entry.kind == EntrySkipped.__name__:
            return await self._store_skipped(entry)
        stream = stream_of(entry.subject)
        if stream is None:
            # Retryable: during an upgrade, a newer worker may know the subject.
            raise application_error(
                ErrorType.NO_STREAM, f"{_named(entry)}: no declared stream takes it"
            )
        try:
            with send_span(entry.subject, entry.id):
                ack = await self._jetstream.publish(
                    entry.subject,
                    _body(entry),
                    stream=stream.name,
                    headers=self.headers(entry),
                )
        except PUBLISH_FAILURES as error:
            # Without the cause: its text is in the message, and Temporal cuts long chains.
            raise entry_error(entry, error) from None
        if ack.stream != stream.name:
            raise application_error(
                ErrorType.STREAM_REFUSED,
                f"{_named(entry)}: stored in {ack.stream} and not in {stream.name}",
            )
        if ack.duplicate:
            await self._require_same(entry, stream.name, ack.seq)
        return not ack.duplicate

    async def _store_skipped(self, record: Entry) -> bool:
        """Store a skipped entry as a dead letter."""
        entry = Entry.model_validate_json(EntrySkipped.model_validate(record.body).entry)
        stream = stream_of(entry.subject)
        try:
            return await self._letters.store_skipped(
                record,
                _attributes(entry, self._source),
                stream.name if stream else "",
                _body(entry),
            )
        except PUBLISH_FAILURES as error:
            raise entry_error(record, error) from None

    async def _require_same(self, entry: Entry, stream: str, sequence: int) -> None:
        """Raise unless the stored message is this entry: anyone who sends may use its id first."""
        try:
            stored = await self._jetstream.get_msg(stream, sequence)
        except js_errors.NotFoundError:
            return  # it was deleted from the stream, which still knows its id
        except PUBLISH_FAILURES as error:
            raise entry_error(entry, error) from None
        meant = {"": entry.subject, **_attributes(entry, self._source)}
        found = {"": stored.subject, **(stored.headers or {})}
        different = [name or "subject" for name in meant if found.get(name) != meant[name]]
        if stored.data != _body(entry):
            different.append("body")
        if different:
            raise application_error(
                ErrorType.EVENT_ID_TAKEN,
                f"{_named(entry)}: {stream} already has another message with this id, number "
                f"{sequence}, which differs in {', '.join(different)}. Find out who sent it and "
                f"delete it; the event is stored when the stream's duplicate window is over",
            )

    def headers(self, entry: Entry) -> dict[str, str]:
        """Build the CloudEvents attributes, the id for JetStream's deduplication, and the trace."""
        headers = _attributes(entry, self._source)
        TraceContextTextMapPropagator().inject(headers)
        return headers


def _attributes(entry: Entry, source: Source) -> dict[str, str]:
    attributes = {
        Header.MSG_ID.value: entry.id,
        "Content-Type": "application/json",
        "ce-specversion": "1.0",
        "ce-id": entry.id,
        "ce-source": source.of(entry.source),
        "ce-type": entry.subject,
        "ce-time": entry.time,
        "ce-subject": entry.story_id,
    }
    return {name: value for name, value in attributes.items() if value}


def _body(entry: Entry) -> bytes:
    return json.dumps(entry.body, ensure_ascii=False, separators=(",", ":")).encode()


def entry_error(entry: Entry, error: Exception) -> ApplicationError:
    """Build the failure for Temporal: which event, what happened, and whether to retry."""
    return publish_error(_named(entry), error)


def publish_error(what: str, error: Exception) -> ApplicationError:
    """Build the failure of a publish, by REFUSALS.

    what: the beginning of the message, which names what was not published.
    """
    for foreign, kind, meaning in REFUSALS:
        if isinstance(error, foreign):
            return application_error(kind, f"{what}: {meaning} ({_words(error)})")
    raise error


def _named(entry: Entry) -> str:
    return f"Event {entry.subject} {entry.id} is not on JetStream"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]
