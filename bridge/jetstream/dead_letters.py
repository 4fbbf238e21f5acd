"""Dead letters: messages that could not be parsed or applied, kept with the reason.

A dead letter is the original's body on `deadletter.{original subject}` in DEAD_LETTERS. Its headers
record what happened (`Dead-*`) and the original's headers (`Original-*`), so that the message can
be replayed.
"""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.js.api import Header, RawStreamMsg
from nats.js.errors import NotFoundError

from bridge.inbox.envelopes import in_lower_case, stated_identity
from workflows.models.entries import Entry
from workflows.models.events import EntrySkipped

STREAM = "DEAD_LETTERS"
PREFIX = "deadletter."
ORIGINAL = "Original-"
OUTBOX = "outbox"
"""What stands in place of the consumer if the letter is a skipped entry of an outbox."""

CE_ID = "ce-id"

CONTROL = "nats-"
"""Prefix of the headers that NATS itself interprets. What the sender requested from the server for
the first publication (a deduplication id, an expected sequence, a time to live, a roll-up, a
schedule) must not be requested again for the replay."""

LONGEST_TEXT = 1_000
NEXT_WITHIN_S = 10.0

HEADERS_AT_MOST = 16 * 1024
"""Bytes reserved for a dead letter's headers if its body fills the server's limit."""

ORIGINAL_AT_MOST = 8 * 1024
"""Bytes of the original's headers that are kept; the rest of HEADERS_AT_MOST is for `Dead-*`."""

LEFT_OUT_SHOWN = 300
"""Characters of the list of the original's headers that are left out."""

HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
"""The header names that the NATS client publishes. It receives others, too."""


class NoSuchLetter(LookupError):
    """Absence of a dead letter with that number, or of its whole body."""


def place(stream: str, sequence: int, time: datetime) -> str:
    """Return the identity of a message whose sender gave none: its place in its stream.

    It includes the time at which JetStream stored the message, because a stream that is recreated
    counts from 1 again.
    """
    return f"{stream}/{sequence}/{int(time.timestamp() * 1_000_000)}"


@dataclass(frozen=True)
class DeadLetter:
    """One dead letter. number: its sequence in DEAD_LETTERS. size: bytes of the original body.

    body: the original's, or its beginning if the server's limit left no room for the headers.
    """

    number: int
    subject: str
    stream: str
    sequence: int
    consumer: str
    reason: str
    error: str
    deliveries: int
    received: str
    stored: str
    size: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def whole(self) -> bool:
        """Whether `body` is the complete body."""
        return len(self.body) == self.size

    @property
    def place(self) -> str:
        """The original's place: its identity after a replay if its sender gave none."""
        return place(self.stream, self.sequence, datetime.fromisoformat(self.received))


class DeadLetters:
    """The dead letters on a NATS server. Every method passes on the errors of the NATS client."""

    def __init__(self, nats: Nats) -> None:
        self._nats = nats
        self._jetstream = nats.jetstream()

    async def store(self, message: Msg, *, consumer: str, reason: str, error: str = "") -> None:
        """Store a message that a consumer gives up as a dead letter.

        Acknowledge the message afterwards. A repetition after a crash stores nothing twice.
        """
        about = message.metadata
        await self._put(
            message.subject,
            message.data,
            message.headers or {},
            f"dead/{consumer}/{about.stream}/{about.sequence.stream}",
            {
                "Dead-Stream": about.stream,
                "Dead-Sequence": str(about.sequence.stream),
                "Dead-Consumer": consumer,
                "Dead-Reason": _line(reason),
                "Dead-Error": _line(error),
                "Dead-Deliveries": str(about.num_delivered or 1),
                "Dead-Received": about.timestamp.astimezone(UTC).isoformat(),
            },
        )

    async def store_skipped(
        self, record: Entry, headers: Mapping[str, str], stream: str, body: bytes
    ) -> bool:
        """Store an outbox entry that a person has skipped; return whether it is new.

        Args:
            record: the record of the skipped entry (`EntrySkipped`).
            headers: the entry's headers, as the mirror publishes it.
            stream: the stream of its subject; empty if it has none.
            body: the entry's body.
        """
        skipped = EntrySkipped.model_validate(record.body)
        entry = Entry.model_validate_json(skipped.entry)
        return await self._put(
            entry.subject or f"{OUTBOX}.{entry.kind}",
            body,
            headers,
            record.id,
            {
                "Dead-Stream": stream,
                "Dead-Consumer": f"{OUTBOX}/{skipped.step}",
                "Dead-Reason": _line(f"skipped by {skipped.actor}: {skipped.reason}"),
                "Dead-Error": _line(skipped.error),
                "Dead-Received": entry.time,
            },
        )

    async def _put(
        self,
        subject: str,
        body: bytes,
        headers: Mapping[str, str],
        message_id: str,
        about: Mapping[str, str],
    ) -> bool:
        room = self._nats.max_payload - HEADERS_AT_MOST
        original, left_out = _publishable(headers)
        added = {
            Header.MSG_ID.value: message_id,
            "Dead-Subject": subject,
            "Dead-Size": str(len(body)),
            **about,
        }
        if left_out:
            names = _line(", ".join(left_out))[:LEFT_OUT_SHOWN]
            added["Dead-Reason"] += f"; headers left out: {names}"
        ack = await self._jetstream.publish(
            f"{PREFIX}{subject}",
            body if len(body) <= room else body[:room],
            stream=STREAM,
            headers={name: value for name, value in {**original, **added}.items() if value},
        )
        return not ack.duplicate

    async def list(self) -> AsyncIterator[DeadLetter]:
        """Yield all dead letters, oldest first."""
        if not (await self._jetstream.stream_info(STREAM)).state.messages:
            return
        letters = await self._jetstream.subscribe(
            f"{PREFIX}>", stream=STREAM, ordered_consumer=True
        )
        try:
            while True:
                message = await letters.next_msg(timeout=NEXT_WITHIN_S)
                about = message.metadata
                yield _letter(
                    about.sequence.stream, message.headers or {}, message.data, about.timestamp
                )
                if not about.num_pending:
                    return
        finally:
            await letters.unsubscribe()

    async def get(self, number: int) -> DeadLetter:
        """Return the dead letter with that number.

        Raises:
            NoSuchLetter: there is none with that number.
        """
        try:
            found = await self._jetstream.get_msg(STREAM, number)
        except NotFoundError:
            raise NoSuchLetter(
                f"There is no dead letter {number}; `fleet dead-letters list` shows those there are"
            ) from None
        return _letter(number, _headers(found), found.data or b"", found.time)

    async def replay(self, number: int) -> DeadLetter:
        """Publish the original on its subject again, with its identity, and remove the dead letter.

        Raises:
            NoSuchLetter: there is none with that number, or the whole original is gone, or the
                graph has refused it.
        """
        letter = await self.get(number)
        if letter.consumer.startswith(OUTBOX) and letter.consumer != f"{OUTBOX}/publish":
            raise NoSuchLetter(
                f"Dead letter {number} is an entry that the graph refused: it cannot be published, "
                "because subscribers would look for it there. Its body is in "
                f"`fleet dead-letters show {number}`"
            )
        headers = {
            name: value
            for name, value in letter.headers.items()
            if not name.lower().startswith(CONTROL)
        }
        body = await self._body(letter)
        if not stated_identity(in_lower_case(headers), body):
            headers[CE_ID] = letter.place
        # The original's id may still be in the duplicate window: the stream would drop it.
        headers[Header.MSG_ID.value] = f"replay/{STREAM}/{number}"
        await self._jetstream.publish(letter.subject, body, headers=headers)
        await self.drop(number)
        return letter

    async def drop(self, number: int) -> None:
        """Remove a dead letter for good.

        Raises:
            NoSuchLetter: there is none with that number.
        """
        await self.get(number)
        await self._jetstream.delete_msg(STREAM, number)

    async def _body(self, letter: DeadLetter) -> bytes:
        if letter.whole:
            return letter.body
        try:
            found: RawStreamMsg = await self._jetstream.get_msg(letter.stream, letter.sequence)
        except NotFoundError:
            raise NoSuchLetter(
                f"Dead letter {letter.number} has {len(letter.body)} of {letter.size} bytes, and "
                f"{letter.stream} has no message {letter.sequence} any more: it cannot be replayed"
            ) from None
        return found.data or b""


def _publishable(headers: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the headers that a dead letter can have, under their new names, and the other names.

    The shortest ones come first: an id is kept rather than a long text.
    """
    kept: dict[str, str] = {}
    left_out: list[str] = []
    size = 0
    for name, value in sorted(headers.items(), key=lambda each: len("".join(each))):
        line = len(f"{ORIGINAL}{name}: {value}\r\n".encode())
        if HEADER_NAME.fullmatch(name) and size + line <= ORIGINAL_AT_MOST:
            kept[f"{ORIGINAL}{name}"] = value
            size += line
        else:
            left_out.append(name)
    return kept, left_out


def _headers(stored: RawStreamMsg) -> dict[str, str]:
    """Return a stored message's headers as a subscription receives them.

    The client's `get_msg` reads them as an e-mail's: a value that is not ASCII is then no text.
    """
    _version, *lines = base64.b64decode(stored.hdrs or "").decode(errors="replace").split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _letter(
    number: int, headers: Mapping[str, str], body: bytes, at: datetime | None
) -> DeadLetter:
    origin = {name: headers.get(f"Dead-{name}", "") for name in ("Subject", "Stream", "Consumer")}
    return DeadLetter(
        number=number,
        subject=origin["Subject"],
        stream=origin["Stream"],
        sequence=int(headers.get("Dead-Sequence", 0)),
        consumer=origin["Consumer"],
        reason=headers.get("Dead-Reason", ""),
        error=headers.get("Dead-Error", ""),
        deliveries=int(headers.get("Dead-Deliveries", 0)),
        received=headers.get("Dead-Received", ""),
        stored=at.astimezone(UTC).isoformat() if at else "",
        size=int(headers.get("Dead-Size", len(body))),
        headers={
            name.removeprefix(ORIGINAL): value
            for name, value in headers.items()
            if name.startswith(ORIGINAL)
        },
        body=body,
    )


def _line(text: str) -> str:
    """Convert a text to one line of ASCII, which a header can hold."""
    line = " ".join(text.split())[:LONGEST_TEXT]
    return line.encode("ascii", "backslashreplace").decode()
