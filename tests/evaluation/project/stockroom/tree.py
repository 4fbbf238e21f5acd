"""Categories, as paths with slashes."""

from __future__ import annotations

from collections.abc import Iterable


def above(path: str) -> list[str]:
    """Return the categories above one, the nearest first."""
    parts = path.split("/")
    return ["/".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]


def totals(counts: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Add each category's count to those above it."""
    found: dict[str, int] = {}
    for path, count in counts:
        for each in (path, *above(path)):
            found[each] = found.get(each, 0) + count
    return found
