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

from bridge.source import Source
from bridge.streams import stream_of
from workflows.events import Entry, PublishBatch
from workflows.stubs import MirrorStub

ACK_WITHIN_S = 5.0
"""How long to wait for one acknowledgement, in seconds."""

AWAY = "NATS is away"
REFUSALS: tuple[tuple[type[Exception], str, str, bool], ...] = (
    # The client's error, our type, our message, whether a retry may succeed. First match counts.
    (js_errors.NoStreamResponseError, "NoStream", "no stream takes the subject", True),
    (js_errors.APIError, "StreamRefused", "the stream refused it", True),
    (nats_errors.MaxPayloadError, "EventTooLarge", "raise max_payload of the server", True),
    (nats_errors.BadSubjectError, "InvalidEvent", "the subject is malformed", False),
    (nats_errors.BadHeaderError, "InvalidEvent", "a header is malformed", False),
    (nats_errors.OutboundBufferLimitError, "NatsAway", AWAY, True),
    (nats_errors.ConnectionClosedError, "NatsAway", AWAY, True),
    (nats_errors.ConnectionDrainingError, "NatsAway", AWAY, True),
    (nats_errors.TimeoutError, "NoAck", "no acknowledgement came; it may be stored", True),
    (asyncio.TimeoutError, "NoAck", "no acknowledgement came; it may be stored", True),
    (nats_errors.Error, "NatsError", "NATS failed", True),
    (OSError, "NatsAway", AWAY, True),
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
            ApplicationError: by REFUSALS.
        """
        stream = stream_of(entry.subject)
        if stream is None:
            # Retryable: during an upgrade, a newer worker may know the subject.
            raise ApplicationError(f"{_named(entry)}: no declared stream takes it", type="NoStream")
        try:
            ack = await self._jetstream.publish(
                entry.subject,
                json.dumps(entry.body, ensure_ascii=False, separators=(",", ":")).encode(),
                stream=stream.name,
                headers=self.headers(entry),
            )
        except PUBLISH_FAILURES as error:
            # Without the cause: its text is in the message, and Temporal cuts long chains.
            raise refusal(entry, error) from None
        if ack.stream != stream.name:
            raise ApplicationError(
                f"{_named(entry)}: stored in {ack.stream} and not in {stream.name}",
                type="StreamRefused",
            )
        return not ack.duplicate

    def headers(self, entry: Entry) -> dict[str, str]:
        """Build the CloudEvents attributes, the id for JetStream's deduplication, and the trace."""
        headers = {
            Header.MSG_ID.value: entry.id,
            "Content-Type": "application/json",
            "ce-specversion": "1.0",
            "ce-id": entry.id,
            "ce-source": self._source.of(entry.source),
            "ce-type": entry.subject,
            "ce-time": entry.time,
            "ce-subject": entry.story_id,
        }
        TraceContextTextMapPropagator().inject(headers)
        return {name: value for name, value in headers.items() if value}


def refusal(entry: Entry, error: Exception) -> ApplicationError:
    """Build the failure for Temporal: which event, what happened, and whether to retry."""
    return refused(_named(entry), error)


def refused(what: str, error: Exception) -> ApplicationError:
    """Build the failure of a publish, by REFUSALS.

    what: the beginning of the message, which names what was not published.
    """
    for foreign, kind, told, retryable in REFUSALS:
        if isinstance(error, foreign):
            return ApplicationError(
                f"{what}: {told} ({_words(error)})",
                type=kind,
                non_retryable=not retryable,
            )
    raise error


def _named(entry: Entry) -> str:
    return f"Event {entry.subject} {entry.id} is not on JetStream"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]
