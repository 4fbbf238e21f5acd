"""The outline of a repository: what an agent knows of it before it looks."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Sequence

from activities.workspace.store import Store
from workflows.models.implementation import FileText, Outline
from workflows.models.workspace import TreeFile
from workflows.rules import paths as rules

MAX_EDITABLE = 200
"""Files that may change, which the decoder's schema names."""

FILES_BYTES = 16 * 1024
"""Of all files that may change: if they are larger, an agent has to read them."""

LINES = 300
CHARACTERS = 12_000
"""The largest outline."""


async def outline_of(
    store: Store, commit: str, globs: Sequence[str], open_paths: Sequence[str]
) -> Outline:
    """Return the outline of a commit.

    Args:
        store: has the commit.
        commit: its id.
        globs: what may change; empty: everything but CI and git configuration.
        open_paths: configuration that may change.
    """
    found = await store.outline(commit)
    names = {path for _, path in await store.listing(commit)}
    # The rules of paths are slow enough to keep a heartbeat of a large repository waiting.
    editable = await asyncio.to_thread(_editable, found, names, globs, open_paths)
    known = [file.path for file in editable[:MAX_EDITABLE]]
    files = []
    if globs and sum(file.size for file in editable) <= FILES_BYTES:
        texts = {path: await store.read(commit, path) for path in known}
        files = [FileText(path=p, text=t.decode()) for p, t in texts.items() if is_text(t)]
    return Outline(
        text=await asyncio.to_thread(outline_text, [file.path for file in found]),
        editable=known,
        more_editable=len(editable) > len(known),
        files=files,
    )


def _editable(
    found: Sequence[TreeFile],
    names: Collection[bytes],
    globs: Sequence[str],
    open_paths: Sequence[str],
) -> list[TreeFile]:
    return [
        file
        for file in found
        # A name that is not UTF-8 is shown with escapes: no agent can give it.
        if file.kind == "file"
        and file.path.encode() in names
        and rules.allowed(file.path, globs, open_paths)
    ]


def is_text(data: bytes) -> bool:
    """Return whether a file is text that a prompt can have."""
    try:
        return "\0" not in data.decode()
    except UnicodeDecodeError:
        return False


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
