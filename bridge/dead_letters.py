"""Dead letters: messages that could not be understood or applied, kept with the reason.

A dead letter is the original's body on `deadletter.{original subject}` in DEAD_LETTERS. Headers say
what happened (`Dead-*`) and keep the original's own (`Original-*`), so that it can be put back.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.js.api import Header, RawStreamMsg
from nats.js.errors import NotFoundError

from bridge.envelopes import in_lower_case, stated_identity

STREAM = "DEAD_LETTERS"
PREFIX = "deadletter."
ORIGINAL = "Original-"
CE_ID = "ce-id"

CONTROL = "nats-"
"""Begins the names of the headers that NATS itself obeys: what the sender asked of the server for
the first publication (a deduplication id, an expected sequence, a time to live, a roll-up, a
schedule) must not be asked again for the replay."""

LONGEST_TEXT = 1_000
NEXT_WITHIN_S = 10.0

HEADERS_AT_MOST = 16 * 1024
"""Bytes that are kept free for a dead letter's headers where its body fills the server's limit."""


class NoSuchLetter(LookupError):
    """There is no dead letter of that number; or not its whole body any more."""


def place(stream: str, sequence: int, time: datetime) -> str:
    """The identity of a message whose sender gave none: its place in its stream.

    With the time at which JetStream stored it: a stream that is recreated counts from 1 again.
    """
    return f"{stream}/{sequence}/{int(time.timestamp() * 1_000_000)}"


@dataclass(frozen=True)
class DeadLetter:
    """One dead letter. number: its sequence in DEAD_LETTERS. size: bytes of the original body.

    body: the original's, or its beginning where the server's limit left no room for the headers.
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
    buried: str
    size: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def whole(self) -> bool:
        """Whether `body` is all of it."""
        return len(self.body) == self.size

    @property
    def place(self) -> str:
        """The original's place, under which it is known once it is back, if by nothing else."""
        return place(self.stream, self.sequence, datetime.fromisoformat(self.received))


class DeadLetters:
    """The dead letters of a NATS; in every method, errors of its client pass."""

    def __init__(self, nats: Nats) -> None:
        self._nats = nats
        self._jetstream = nats.jetstream()

    async def bury(self, message: Msg, *, consumer: str, reason: str, error: str = "") -> None:
        """Keep a message that a consumer gives up; returns when it is stored.

        Burying it again, after a crash, stores nothing twice. Acknowledge the message afterwards.
        """
        about = message.metadata
        room = self._nats.max_payload - HEADERS_AT_MOST
        original = {f"{ORIGINAL}{name}": value for name, value in (message.headers or {}).items()}
        told = {
            Header.MSG_ID.value: f"dead/{consumer}/{about.stream}/{about.sequence.stream}",
            "Dead-Subject": message.subject,
            "Dead-Stream": about.stream,
            "Dead-Sequence": str(about.sequence.stream),
            "Dead-Consumer": consumer,
            "Dead-Reason": _line(reason),
            "Dead-Error": _line(error),
            "Dead-Deliveries": str(about.num_delivered or 1),
            "Dead-Received": about.timestamp.astimezone(UTC).isoformat(),
            "Dead-Size": str(len(message.data)),
        }
        await self._jetstream.publish(
            f"{PREFIX}{message.subject}",
            message.data if len(message.data) <= room else message.data[:room],
            stream=STREAM,
            headers={name: value for name, value in {**original, **told}.items() if value},
        )

    async def list(self) -> AsyncIterator[DeadLetter]:
        """All that there are, oldest first."""
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
        """One of them.

        Raises:
            NoSuchLetter: there is none of that number.
        """
        try:
            found = await self._jetstream.get_msg(STREAM, number)
        except NotFoundError:
            raise NoSuchLetter(
                f"There is no dead letter {number}; `fleet dead-letters list` shows those there are"
            ) from None
        return _letter(number, found.headers or {}, found.data or b"", found.time)

    async def replay(self, number: int) -> DeadLetter:
        """Put the original back on its subject, with its identity, and remove the dead letter.

        Raises:
            NoSuchLetter: there is none of that number, or the whole original is gone.
        """
        letter = await self.get(number)
        headers = {
            name: value
            for name, value in letter.headers.items()
            if not name.lower().startswith(CONTROL)
        }
        body = await self._body(letter)
        if not stated_identity(in_lower_case(headers), body):
            headers[CE_ID] = letter.place
        # Its own id may still be in the duplicate window: the stream would drop it.
        headers[Header.MSG_ID.value] = f"replay/{STREAM}/{number}"
        await self._jetstream.publish(letter.subject, body, headers=headers)
        await self.drop(number)
        return letter

    async def drop(self, number: int) -> None:
        """Remove a dead letter for good.

        Raises:
            NoSuchLetter: there is none of that number.
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


def _letter(
    number: int, headers: Mapping[str, str], body: bytes, at: datetime | None
) -> DeadLetter:
    told = {name: headers.get(f"Dead-{name}", "") for name in ("Subject", "Stream", "Consumer")}
    return DeadLetter(
        number=number,
        subject=told["Subject"],
        stream=told["Stream"],
        sequence=int(headers.get("Dead-Sequence", 0)),
        consumer=told["Consumer"],
        reason=headers.get("Dead-Reason", ""),
        error=headers.get("Dead-Error", ""),
        deliveries=int(headers.get("Dead-Deliveries", 0)),
        received=headers.get("Dead-Received", ""),
        buried=at.astimezone(UTC).isoformat() if at else "",
        size=int(headers.get("Dead-Size", len(body))),
        headers={
            name.removeprefix(ORIGINAL): value
            for name, value in headers.items()
            if name.startswith(ORIGINAL)
        },
        body=body,
    )


def _line(text: str) -> str:
    """What a header can hold: one line of ASCII."""
    line = " ".join(text.split())[:LONGEST_TEXT]
    return line.encode("ascii", "backslashreplace").decode()
