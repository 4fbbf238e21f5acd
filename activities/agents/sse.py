"""Server-sent events, parsed incrementally from bytes.

Why not httpx-sse 0.4: it refuses a stream by its content type, decodes by the charset in the
header, treats a byte order mark as part of the first field, drops the last event if no blank line
follows, and delays an event that ends with CR until the next byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

LONGEST_LINE = 8 * 2**20
"""Bytes; a longer line is not an event of a chat completion."""

_LINE_END = re.compile(rb"\r\n|\r|\n")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class LineTooLong(ValueError):
    """A line of more than LONGEST_LINE bytes."""


@dataclass(frozen=True)
class Event:
    """An event with data. `name`: the value of its `event:` field, or empty."""

    name: str
    data: str


class EventParser:
    """A parser from bytes to events; it skips comments, `id:`, `retry:` and events without data."""

    def __init__(self) -> None:
        self._rest = b""
        self._after_cr = False
        self._is_first_line = True
        self._name = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Yield the events that `chunk` completes; bytes that are not UTF-8 become U+FFFD.

        Raises:
            LineTooLong: the stream does not consist of lines.
        """
        if self._after_cr:
            chunk = chunk.removeprefix(b"\n")
        self._after_cr = chunk.endswith(b"\r")
        *lines, self._rest = _LINE_END.split(self._rest + chunk)
        if len(self._rest) > LONGEST_LINE:
            raise LineTooLong(f"a line is longer than {LONGEST_LINE} bytes")
        for line in lines:
            yield from self._line(line)

    def close(self) -> Iterator[Event]:
        """Yield the last event, if the stream ended without the blank line that completes it."""
        yield from self._line(self._rest)
        yield from self._line(b"")
        self._rest = b""

    def _line(self, line: bytes) -> Iterator[Event]:
        if self._is_first_line:
            line = line.removeprefix(_BYTE_ORDER_MARK)
            self._is_first_line = False
        if not line:
            if self._data:
                yield Event(self._name, "\n".join(self._data))
            self._name, self._data = "", []
            return
        field, _, value = line.partition(b":")
        text = value.removeprefix(b" ").decode(errors="replace")
        if field == b"data":
            self._data.append(text)
        elif field == b"event":
            self._name = text


class DocumentParser:
    """A parser for a body that is JSON instead of an event stream: one event, at its end."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Add a chunk; yield no events.

        Raises:
            LineTooLong: the document is larger than LONGEST_LINE.
        """
        self._parts.append(chunk)
        self._size += len(chunk)
        if self._size > LONGEST_LINE:
            raise LineTooLong(f"the document is larger than {LONGEST_LINE} bytes")
        return iter(())

    def close(self) -> Iterator[Event]:
        """Yield the document as one event, if it is not blank."""
        text = b"".join(self._parts).removeprefix(_BYTE_ORDER_MARK).decode(errors="replace")
        self._parts = []
        if text.strip():
            yield Event("", text)
