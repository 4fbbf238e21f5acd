"""Amounts in cents."""

from __future__ import annotations


def parse(text: str) -> int:
    """Return the cents of an amount such as `12.50`, `12.5` or `-3`."""
    sign = -1 if text.strip().startswith("-") else 1
    whole, _, part = text.strip().lstrip("+-").partition(".")
    return sign * (int(whole or 0) * 100 + int(part.ljust(2, "0") or 0))


def split(cents: int, parts: int) -> list[int]:
    """Split an amount into parts that differ by at most a cent, the larger ones first."""
    each, rest = divmod(cents, parts)
    return [each + 1] * rest + [each] * (parts - rest)
