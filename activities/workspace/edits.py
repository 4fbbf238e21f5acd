"""Edits of files in a working tree, by agents. They follow no link, so none leads out of it."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

LARGEST_FILE = 2 * 1024 * 1024
"""Bytes of a file that an agent may change."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class EditRefused(Exception):
    """An edit that changed nothing; the message is for the agent."""


def write(tree: Path, path: str, content: str) -> str:
    """Create a file with its folders, or replace all of its content; return what was done.

    Raises:
        EditRefused: the path is a folder, or leads through a link or a file.
    """
    data = content.encode(errors="replace")
    with _folder_of(tree, path, create=True) as (folder, name):
        known = _mode(folder, name)
        if known is not None and not stat.S_ISREG(known):
            raise EditRefused(f"{path} is not a file; nothing was changed")
        _replace(folder, name, data, stat.S_IMODE(known) if known else 0o644)
    return f"{path} is written: {_lines(content)}"


def replace(tree: Path, path: str, old: str, new: str) -> str:
    """Replace a text that a file has exactly once; return what was done.

    In a file whose lines all end in CRLF, so do those of both texts, unless they have a CR.

    Args:
        tree: the working tree.
        path: of the file.
        old: the text.
        new: what replaces it.

    Raises:
        EditRefused: the file is missing or not UTF-8, or the text is absent or occurs twice.
    """
    with _folder_of(tree, path, create=False) as (folder, name):
        text, mode = _read(folder, name, path)
        if "\r" not in old + new and text.count("\n") == text.count("\r\n") > 0:
            # What an agent reads shows no carriage returns.
            old, new = (each.replace("\n", "\r\n") for each in (old, new))
        if (count := _occurrences(text, old)) != 1:
            raise EditRefused(
                f"the text `old` is not in {path}; nothing was changed. Read the file and copy it"
                if count == 0
                else f"the text `old` is {count} times in {path}; nothing was changed. "
                "Give more of the lines around it"
            )
        _replace(folder, name, text.replace(old, new).encode(errors="replace"), mode)
    return f"{path} is changed: {_lines(old)} replaced by {_lines(new)}"


def _occurrences(text: str, part: str) -> int:
    """Return how often a text has a part; occurrences may overlap."""
    count, at = 0, text.find(part)
    while at >= 0:
        count, at = count + 1, text.find(part, at + 1)
    return count


@contextmanager
def _folder_of(tree: Path, path: str, create: bool) -> Iterator[tuple[int, str]]:
    """Yield the open folder of a file and the file's name in it."""
    parts = PurePosixPath(path).parts
    folder = os.open(tree, _FOLDER)
    try:
        for part in parts[:-1]:
            inner = _open_folder(folder, part, path, create)
            os.close(folder)
            folder = inner
        yield folder, parts[-1]
    finally:
        os.close(folder)


def _open_folder(folder: int, name: str, path: str, create: bool) -> int:
    if create:
        with suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=folder)
    try:
        return os.open(name, _FOLDER, dir_fd=folder)
    except FileNotFoundError:
        raise EditRefused(f"{path} does not exist; nothing was changed") from None
    except OSError:
        raise EditRefused(
            f"{path}: {name} is a link or a file, not a folder; nothing was changed"
        ) from None


def _mode(folder: int, name: str) -> int | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return None


def _read(folder: int, name: str, path: str) -> tuple[str, int]:
    try:
        file = os.open(name, os.O_RDONLY | _FILE, dir_fd=folder)
    except FileNotFoundError:
        raise EditRefused(f"{path} does not exist; nothing was changed") from None
    except OSError:
        raise EditRefused(f"{path} is a link; nothing was changed") from None
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        os.close(file)
        raise EditRefused(f"{path} is not a file; nothing was changed")
    with os.fdopen(file, "rb") as opened:
        data = opened.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise EditRefused(f"{path} has more than {LARGEST_FILE} bytes; nothing was changed")
    try:
        return data.decode(), stat.S_IMODE(status.st_mode)
    except UnicodeDecodeError:
        raise EditRefused(f"{path} is not UTF-8; nothing was changed. Use write or run") from None


def _replace(folder: int, name: str, data: bytes, mode: int) -> None:
    """Write a new file and move it over the old one, of which there may be other links."""
    made = f".{secrets.token_hex(16)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FILE
    with os.fdopen(os.open(made, flags, 0o600, dir_fd=folder), "wb") as file:
        os.fchmod(file.fileno(), mode & 0o777)
        file.write(data)
    os.rename(made, name, src_dir_fd=folder, dst_dir_fd=folder)


def _lines(text: str) -> str:
    count = len(text.splitlines())
    return "1 line" if count == 1 else f"{count} lines"
