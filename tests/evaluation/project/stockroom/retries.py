"""Waiting between attempts."""

from __future__ import annotations


def delays(attempts: int, first: float, most: float) -> list[float]:
    """Return the seconds between attempts: doubled each time, up to a limit."""
    return [min(first * 2**number, most) for number in range(attempts - 1)]
