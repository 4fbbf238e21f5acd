"""Names of articles in addresses and lists."""

from __future__ import annotations

import re


def slug(name: str) -> str:
    """Return a name for an address: lower case, words joined by single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def shortened(text: str, length: int) -> str:
    """Cut a text to a length, with the sign that it was cut."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
