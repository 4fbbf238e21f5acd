"""Half-open periods of days: the start belongs to a period, its end does not."""

from __future__ import annotations

from collections.abc import Iterable

Period = tuple[int, int]


def overlap(one: Period, other: Period) -> bool:
    """Return whether two periods have a day in common."""
    return one[0] < other[1] and other[0] < one[1]


def merged(periods: Iterable[Period]) -> list[Period]:
    """Join periods that overlap or follow one another at once, in their order."""
    found: list[Period] = []
    for start, end in sorted(periods):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found
