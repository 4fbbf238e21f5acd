"""Result files that a project's commands wrote: untrusted, so read with limits."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from activities.workspace.sandbox import PROJECT

MAX_BYTES = 64 * 1024 * 1024
"""The size of a result file."""

MAX_FILES = 1_000
"""The number of result files of a run."""


class InvalidResult(Exception):
    """A result file that cannot be read; the message names it and the reason."""


def result_files(reports: Path, *suffixes: str) -> list[Path]:
    """Return the files with one of the suffixes in a folder and those below it, sorted.

    Raises:
        InvalidResult: there are too many.
    """
    found = sorted(each for each in _files(reports) if each.name.endswith(suffixes))
    if len(found) > MAX_FILES:
        raise InvalidResult(f"$REPORTS has {len(found)} result files; at most {MAX_FILES} are read")
    return found


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        for name in names:
            yield Path(parent, name)


def read_result(file: Path) -> bytes:
    """Read a result file; no link, pipe or device is opened.

    Raises:
        InvalidResult: it is not a file, or too big.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidResult(f"{file.name}: cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as content:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidResult(f"{file.name}: it is not a file")
        if status.st_size > MAX_BYTES:
            raise InvalidResult(
                f"{file.name}: it has {status.st_size} bytes; at most {MAX_BYTES} are read"
            )
        return content.read()


def read_xml(file: Path) -> Element:
    """Parse an XML file; entities and external references are refused.

    Raises:
        InvalidResult: it cannot be read, or is not such XML.
    """
    try:
        root: Element = fromstring(read_result(file))
    except (ParseError, DefusedXmlException, ValueError, LookupError) as error:
        raise InvalidResult(f"{file.name}: is not XML that can be read: {error!r}") from error
    return root


def relative_path(path: str) -> str:
    """Return a path of a result file relative to the project; others stay as they are."""
    path = path.removeprefix("file://")
    with suppress(ValueError):
        return str(Path(path).relative_to(PROJECT))
    return os.path.normpath(path) if path else ""


def one_line(text: str, most: int = 300) -> str:
    """Return the first line of a text that is not blank, cut to a length."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:most]


def last_line(text: str) -> str:
    """Return the last line of a text that is not blank, cut to a length."""
    return one_line("\n".join(reversed(text.splitlines())))
