"""The changes that entries make: parsed, with their position in time; and the writes of a change.

A `Write` is one statement and one row. A statement reads its row's values from `row`, MERGEs by
key, and sets an immutable property only when it creates the node. Mutable values (a status, a
story's text) carry an order key, and an older value never replaces a newer one. Writes can thus be
repeated, delayed or reordered, and the graph ends up the same.

Every statement that has a story writes to the story's node before it compares or reads anything
else. This takes the node's lock, so that writers on one story run one after the other.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString, NamedTuple

from pydantic import ValidationError
from temporalio.exceptions import ApplicationError

from activities.graph.stories import STORY
from workflows.models.entries import Entry, RecordBatch
from workflows.models.errors import ErrorType, application_error, invalid_input
from workflows.models.events import BODIES, EventBody

MAX_CLOCK_SKEW = timedelta(minutes=5)
"""How far a sender's clock may be ahead of ours; limited because the latest time wins."""

LAST_VERSION = 2**31 - 2**20
"""The highest context version that is accepted from others; ours count on from it as int32."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

KEY_BYTES = 2_000
"""The longest id that is stored, in UTF-8: Neo4j refuses keys of some 8,000 bytes in its index."""

Row = dict[str, Any]


class Write(NamedTuple):
    """A constant statement and the row it reads as `row`.

    together: the statement compares nothing that another row of it writes, so that the rows of a
        batch need no subquery each.
    """

    cypher: str
    row: Row
    together: bool = False


class Claim(NamedTuple):
    """The id that a sender gave a message, and the hash of the message's content."""

    id: str
    content: str
    story_id: str
    at: str


class Change(NamedTuple):
    """A parsed entry: its body, its story and its position in time.

    Attributes:
        order: sorts as text by the body's time, then by the outbox and the position in it.
        line: id in the timeline's stream, `{start of its outbox in ms}-{position in it}`.
        workflow: id of the workflow whose outbox it comes from; empty if it came over the bus.
    """

    entry: Entry
    body: EventBody
    story_id: str
    at: datetime
    order: str
    line: str
    workflow: str = ""


def changes(batch: RecordBatch) -> list[Change]:
    """Parse the entries of a batch.

    Raises:
        ApplicationError: `InvalidEntry` (not retryable) names the entry, field and rule;
            `UnknownKind` (retryable) if a newer workflow writes a kind that this worker cannot
            store.
    """
    return [
        change(entry, batch.owner_started_ms, number, batch.owner)
        for number, entry in enumerate(batch.entries, batch.first)
    ]


def change(entry: Entry, started_ms: int, number: int, workflow: str = "") -> Change:
    """Parse one entry.

    Args:
        entry: the entry.
        started_ms: when its outbox or stream began.
        number: its position in the outbox or stream.
        workflow: id of the outbox's workflow; empty for a stream.

    Raises:
        ApplicationError: as in `changes`.
    """
    kind = BODIES.get(entry.kind)
    if kind is None:
        raise application_error(
            ErrorType.UNKNOWN_KIND,
            f"entry {entry.id}: this worker does not know the kind {entry.kind!r}; "
            "it is stored as soon as a worker of the workflow's version runs",
        )
    try:
        body = kind.model_validate(entry.body)
    except ValidationError as error:
        raise invalid_entry(
            invalid_input(f"entry {entry.id} ({entry.kind})", error).message
        ) from None
    return positioned(entry, body, started_ms, number, workflow)


def positioned(
    entry: Entry, body: EventBody, started_ms: int, number: int, workflow: str = ""
) -> Change:
    """Return the change of an entry whose body is validated; arguments and errors as `change`'s."""
    at = parse_timestamp(body.timestamp, f"entry {entry.id}: timestamp")
    order = order_key(at, started_ms, number)
    line = f"{started_ms}-{number}"
    return Change(entry, body, body.story_id or entry.story_id, at, order, line, workflow)


def parse_timestamp(text: str, field: str) -> datetime:
    """Parse an ISO 8601 time and return it in UTC; one without an offset is taken as UTC.

    Raises:
        ApplicationError: `InvalidEntry`, not retryable.
    """
    try:
        if text.isdecimal() and len(text) > len("20260131"):
            raise ValueError  # a number of seconds, which may look like a date in another century
        parsed = datetime.fromisoformat(text)
        return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)
    except (ValueError, OverflowError):
        raise invalid_entry(
            f"{field}: {text[:80]!r} is not ISO 8601, as in 2026-01-31T12:00:00Z"
        ) from None


def order_key(at: datetime, owner_started_ms: int, number: int) -> str:
    """Return a key that sorts as text by time, then by the position in the outbox."""
    micros = max(0, (at - EPOCH) // timedelta(microseconds=1))
    return f"{micros:018d}-{owner_started_ms:013d}-{number:09d}"


IN_STORY: LiteralString = "\nWITH n, row WHERE row.story_id <> ''" + STORY
"""Matches or creates the story of `row` as `s`; if it has none, the statement ends here."""

OF_STORY: LiteralString = IN_STORY + "MERGE (n)-[:OF]->(s)\n"
"""Attaches the node `n` to its story `s`."""

CLAIM: LiteralString = """
UNWIND $rows AS row
MERGE (n:Received {id: row.id})
  ON CREATE SET n.content = row.content, n.story_id = row.story_id, n.at = row.at,
                n.received_ms = timestamp()
WITH n, row WHERE n.content <> row.content
RETURN row AS claim
"""

FORGET: LiteralString = """
MATCH (n:Received) WHERE n.received_ms < timestamp() - $age_ms
WITH n LIMIT $limit DELETE n RETURN count(*) AS count
"""


def key(field: str, value: str) -> str:
    """Return the id.

    Raises:
        ApplicationError: `InvalidEntry`, not retryable: it is too long.
    """
    if len(value.encode()) > KEY_BYTES:
        raise invalid_entry(
            f"{field}: {value[:60]!r}... is longer than {KEY_BYTES} bytes; shorten it"
        )
    return value


def invalid_entry(message: str) -> ApplicationError:
    """Return the error of an entry that can never be stored."""
    return application_error(ErrorType.INVALID_ENTRY, message)
