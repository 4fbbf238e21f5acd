"""Pages of a list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def count(items: int, size: int) -> int:
    """Return how many pages some items need."""
    return -(-items // size)


def page(items: Sequence[Item], number: int, size: int) -> list[Item]:
    """Return a page; pages count from 1."""
    if number < 1 or size < 1:
        raise ValueError("number and size must be 1 or more")
    start = (number - 1) * size
    return list(items[start : start + size])
