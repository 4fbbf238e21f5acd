"""What a step may put into a commit, and the text of its message."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from activities.workspace.git_output import shown
from workflows.models.errors import ErrorType, application_error
from workflows.models.workspace import Trailers
from workflows.rules.paths import git_name

CHANGED_FILES = 5_000
CHANGED_BYTES = 200 * 1024**2
FILE_BYTES = 50 * 1024**2
"""Limits of one commit: files, bytes together, bytes of each file."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def check_files(tree: Path, changed: Collection[bytes]) -> None:
    """Check the names and sizes of changed files of a working tree.

    Raises:
        ApplicationError: TreeRefused.
    """
    if len(changed) > CHANGED_FILES:
        raise _refused(f"{len(changed):,} files changed, of at most {CHANGED_FILES:,}; ignore some")
    total = 0
    for path in changed:
        name = shown(path)
        if path.endswith(b"/") or any(git_name(part) for part in name.split("/")):
            raise _refused(f"{name}: is a git repository or git's own folder; remove it")
        try:
            size = (tree / os.fsdecode(path)).lstat().st_size
        except (FileNotFoundError, NotADirectoryError):
            continue  # it was deleted
        except OSError as error:
            problem = f"{name[:200]}: cannot be read: {error.strerror}; remove or shorten it"
            raise _refused(problem) from None
        if size > FILE_BYTES:
            raise _refused(f"{name}: has {size:,} bytes, of at most {FILE_BYTES:,}; remove it")
        total += size
    if total > CHANGED_BYTES:
        raise _refused(f"the changes have {total:,} bytes, of at most {CHANGED_BYTES:,}; cut them")


def remove_special(tree: Path) -> None:
    """Remove pipes, sockets and devices from a tree.

    git stores none of them, and waits without end for what a pipe named `.gitignore` says.
    """
    waiting = [os.fspath(tree)]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as found:
                entries = list(found)
        except OSError:
            continue  # git cannot read it either
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            elif not (entry.is_symlink() or entry.is_file(follow_symlinks=False)):
                Path(folder).chmod(0o700)
                Path(entry.path).unlink()


def _refused(problem: str) -> Exception:
    return application_error(ErrorType.TREE_REFUSED, problem)


def one_line(text: str) -> str:
    """Return text without line ends."""
    return " ".join(clean(text).split())


def clean(text: str) -> str:
    """Return text that a commit can hold."""
    return _CONTROL.sub(" ", text).encode(errors="replace").decode().strip()


def message_text(message: str, trailers: Trailers) -> str:
    """Return the message of a step's commit, with its trailers."""
    fields = {
        "Story": trailers.story,
        "Task": trailers.task,
        "Agent": trailers.agent,
        "Model": trailers.model,
        "Prompt-Hash": trailers.prompt_hash,
        "Step": str(trailers.step),
    }
    lines = [f"{name}: {one_line(value)}" for name, value in fields.items() if value]
    return f"{clean(message)[:4_000] or 'Change files'}\n\n" + "\n".join(lines) + "\n"
