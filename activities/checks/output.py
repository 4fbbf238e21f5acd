"""What is kept of a program's output."""

from __future__ import annotations


class Output:
    """The output of a program, or its start and its end.

    Args:
        most: how many bytes the program may write.
        kept: how many of them are kept, half from the start and half from the end; None: all.
    """

    def __init__(self, most: int, kept: int | None = None) -> None:
        self._most = most
        self._half = most if kept is None else kept // 2
        self._size = 0
        self._head = bytearray()
        self._tail = bytearray()

    @property
    def exceeded(self) -> bool:
        """Whether the program wrote more than it may."""
        return self._size > self._most

    def add(self, chunk: bytes) -> None:
        """Add what the program wrote next."""
        chunk = chunk[: max(0, self._most - self._size) + 1]  # one more byte is too much
        self._size += len(chunk)
        room = self._half - len(self._head)
        self._head += chunk[:room]
        self._tail += chunk[room:]
        if len(self._tail) > self._half:
            del self._tail[: -self._half]

    def kept(self) -> bytes:
        """Return the output, with a line in the middle that counts what was left out."""
        left_out = min(self._size, self._most) - len(self._head) - len(self._tail)
        if left_out <= 0:
            return bytes(self._head + self._tail)[: self._most]
        return b"%s\n... %d bytes left out ...\n%s" % (self._head, left_out, self._tail)
