"""What git has answered about objects, which never change: another question needs no process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable

LIMIT_BYTES = 32 * 1024**2


class Remembered:
    """Answers by what was asked, up to a size; those that were not used longest go first.

    What is asked must name every object by its id, and no ref.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit = limit_bytes
        self._answers: OrderedDict[tuple[str, ...], bytes] = OrderedDict()
        self._size = 0

    def get(self, asked: tuple[str, ...]) -> bytes | None:
        """Return an answer; None if it is not known."""
        found = self._answers.get(asked)
        if found is not None:
            self._answers.move_to_end(asked)
        return found

    def add(self, asked: tuple[str, ...], answer: bytes) -> None:
        """Remember an answer; one over the limit is not kept."""
        self._size += len(answer) - len(self._answers.pop(asked, b""))
        self._answers[asked] = answer
        while self._size > self._limit:
            _, oldest = self._answers.popitem(last=False)
            self._size -= len(oldest)

    async def of(self, asked: tuple[str, ...], ask: Callable[..., Awaitable[bytes]]) -> bytes:
        """Return an answer; one that is not known is asked for, with what is asked as arguments."""
        found = self.get(asked)
        if found is None:
            found = await ask(*asked)
            self.add(asked, found)
        return found
