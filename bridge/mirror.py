"""Temporal -> JetStream: what a workflow's outbox holds becomes events (design section 5).

CloudEvents 1.0 in NATS headers, a flat JSON body, and `Nats-Msg-Id` equal to the entry's id, so
that a batch published twice is stored once.
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
    # What the client raises, our type, what to tell, whether a retry may mend it. First match.
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
"""Every way a publish can fail. Whatever the outside can mend is retried: no event is lost."""

PUBLISH_FAILURES = (nats_errors.Error, asyncio.TimeoutError, OSError)
"""The classes that REFUSALS are of. Any other error is a bug, and goes its own way."""


class Mirror(MirrorStub):
    """Publishes outbox entries. `nats` must buffer nothing: see `workers.clients.nats`."""

    def __init__(self, nats: Nats, source: Source) -> None:
        self._nats = nats
        self._jetstream = nats.jetstream(timeout=ACK_WITHIN_S)
        self._source = source

    @activity.defn
    async def publish(self, batch: PublishBatch) -> None:
        """Store each entry in its stream, one after the other, in the batch's order.

        An entry is sent only when the one before it is stored, so that order holds across
        retries and across an earlier attempt that is still running.

        Raises:
            ApplicationError: by REFUSALS; the entries before the one it names are stored.
        """
        for entry in batch.entries:
            await self.store(entry)

    async def store(self, entry: Entry) -> bool:
        """Store one entry in its stream; whether it is new there, and not known already.

        Raises:
            ApplicationError: as `publish`.
        """
        stream = stream_of(entry.subject)
        if stream is None:
            # Retried: a newer worker, in the middle of an upgrade, may know the subject.
            raise ApplicationError(f"{_named(entry)}: no declared stream takes it", type="NoStream")
        try:
            ack = await self._jetstream.publish(
                entry.subject,
                json.dumps(entry.body, ensure_ascii=False, separators=(",", ":")).encode(),
                stream=stream.name,
                headers=self.headers(entry),
            )
        except PUBLISH_FAILURES as error:
            raise refusal(entry, error) from None  # told in full; Temporal cuts long chains
        if ack.stream != stream.name:
            raise ApplicationError(
                f"{_named(entry)}: stored in {ack.stream} and not in {stream.name}",
                type="StreamRefused",
            )
        return not ack.duplicate

    def headers(self, entry: Entry) -> dict[str, str]:
        """The CloudEvents attributes, the id that JetStream deduplicates by, and the trace."""
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
    """The failure that Temporal is told: which event, what happened, whether to try again."""
    return refused(_named(entry), error)


def refused(what: str, error: Exception) -> ApplicationError:
    """The failure of a publish, by REFUSALS; `what` is not where it should be."""
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
