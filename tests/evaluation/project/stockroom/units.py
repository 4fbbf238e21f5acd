"""Sizes in bytes, for people."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB")


def shown(size: int) -> str:
    """Return a size with the largest unit of which it has at least one: `1.5 KiB`."""
    value = float(size)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{value:.1f} {unit}" if unit != "B" else f"{size} B"
