"""Globs of a repository's paths. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

_PARTS = re.compile(r"\*\*/|\*\*|\*|\?|[^*?]+")
_MEANINGS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def matches(path: str, globs: Iterable[str]) -> bool:
    """Return whether a path matches one of the globs.

    `*` and `?` match within a name, `**` across names; both are relative to the root.
    """
    return any(_pattern(glob).fullmatch(path) for glob in globs)


@cache
def _pattern(glob: str) -> re.Pattern[str]:
    parts = _PARTS.findall(glob)
    return re.compile("".join(_MEANINGS.get(part) or re.escape(part) for part in parts), re.DOTALL)
