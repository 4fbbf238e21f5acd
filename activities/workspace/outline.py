"""The outline of a repository: its paths, with large folders as a number of files. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

LINES = 300
CHARACTERS = 12_000
"""The largest outline."""


def outline_text(paths: Sequence[str]) -> str:
    """Return one line for each file or folder; the deepest folders are counted first."""
    depth = max((path.count("/") for path in paths), default=0)
    lines = list(paths)
    while depth > 0 and not _fits(lines):
        depth -= 1
        lines = _counted(paths, depth)
    if _fits(lines):
        return "\n".join(lines)
    kept: list[str] = []
    size = 0
    for line in lines[: LINES - 1]:
        size += len(line) + 1
        if size > CHARACTERS - 100:
            break
        kept.append(line)
    return "\n".join([*kept, f"and {len(lines) - len(kept)} more"])


def _fits(lines: Sequence[str]) -> bool:
    return len(lines) <= LINES and sum(map(len, lines)) + len(lines) <= CHARACTERS


def _counted(paths: Sequence[str], depth: int) -> list[str]:
    """Return the paths; what is in more than `depth` folders is counted in the last of these."""
    folders = Counter(
        "/".join(path.split("/")[: depth + 1]) for path in paths if path.count("/") > depth
    )
    lines = [path for path in paths if path.count("/") <= depth]
    lines += [f"{folder}/ ({count} files)" for folder, count in folders.items()]
    return sorted(lines)
