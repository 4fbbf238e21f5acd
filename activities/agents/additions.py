"""Text that a small model adds to a file, instead of an action that it writes as JSON.

A model with `brief` in its profile that may only write and replace, in one file, is asked for a
paragraph in plain words. Its answer becomes an action: the end of the file is replaced by itself
and the paragraph. As JSON, SmolLM2-135M writes "1128" or "write" as the whole content of the file;
see docs/design/0018-prompt-layout.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from activities.agents.action_schema import is_pattern
from workflows.models.implementation import (
    EDITS,
    Action,
    NextActionInput,
    ReplaceText,
    WriteFile,
)

FENCE = "```"


@dataclass(frozen=True)
class Addition:
    """Where a text is added.

    Attributes:
        path: the file.
        end: the end of the file, which occurs in it once; empty: the file is written as a whole.
        kept: the part of `end` that stays; the rest is what the agent added before.
    """

    path: str
    end: str = ""
    kept: str = ""

    def action(self, text: str) -> Action:
        """Return the action that adds a text, as a paragraph."""
        paragraph = text.strip()
        if paragraph.count(FENCE) % 2:
            paragraph += f"\n{FENCE}"  # an open code block would take the rest of the file
        if not self.end:
            return WriteFile(path=self.path, content=f"{paragraph}\n")
        new = f"{self.kept}\n\n{paragraph}" if self.kept else paragraph
        return ReplaceText(path=self.path, old=self.end, new=new)


def addition_to(request: NextActionInput) -> Addition | None:
    """Return where the agent can only add text; None if it has other actions to choose from."""
    if set(request.allowed) != {*EDITS} or len(request.paths) != 1:
        return None
    path = request.paths[0]
    if is_pattern(path):
        return None
    shown = next((file.text for file in request.outline.files if file.path == path), None)
    if shown is None:
        return None if path in request.editable else Addition(path)
    change = next((file for file in request.changed if file.path == path), None)
    if not shown.strip() or (change and change.status == "added"):
        return Addition(path)
    whole = shown.removesuffix("\n").split("\n")
    if change and not change.deletions and 0 < change.insertions < len(whole):
        own = "\n".join(whole[-change.insertions :]).strip()
        if own and shown.find(own) == shown.rfind(own):  # `count` skips what overlaps
            return Addition(path, own)
    lines = shown.rstrip().split("\n")
    for count in range(1, len(lines) + 1):
        end = "\n".join(lines[-count:])
        if shown.find(end) == shown.rfind(end):
            return Addition(path, end, end)
    return None
