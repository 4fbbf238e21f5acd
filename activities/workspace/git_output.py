"""What git prints about commits, trees and changes, as models."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from workflows.models.workspace import BlamedLine, ChangedFile, LoggedCommit, TreeFile

LOG_FORMAT = "%H%x00%an%x00%ct%x00%s%x00%(trailers:only,unfold)%x00%x1e"

_STATUS = {"A": "added", "M": "modified", "T": "modified", "D": "deleted", "R": "renamed"}
_KINDS = {"120000": "link", "160000": "submodule"}


def shown(path: bytes) -> str:
    """Return a path as text; bytes that are not UTF-8 are escaped."""
    return path.decode("utf-8", errors="backslashreplace")


def changed_files(output: bytes) -> list[ChangedFile]:
    """Read `diff-tree -r -z -M --raw --numstat`."""
    parts = iter(output.split(b"\0"))
    raw: dict[tuple[bytes, bytes], tuple[str, bool]] = {}
    changed = []
    for part in parts:
        if part.startswith(b":"):
            old_mode, new_mode, _, _, letter = part[1:].decode().split(" ")
            old = next(parts) if letter[0] == "R" else b""
            path = next(parts)
            raw[old, path] = (letter[0], bool({old_mode, new_mode} & set(_KINDS)))
        elif part:
            insertions, deletions, path = part.split(b"\t", 2)
            old = b""
            if not path:
                old, path = next(parts), next(parts)
            letter, link = raw[old, path]
            changed.append(
                ChangedFile.model_validate(
                    {
                        "path": shown(path),
                        "old_path": shown(old),
                        "status": _STATUS[letter],
                        "insertions": 0 if insertions == b"-" else int(insertions),
                        "deletions": 0 if deletions == b"-" else int(deletions),
                        "binary": insertions == b"-",
                        "link": link,
                    }
                )
            )
    return sorted(changed, key=lambda each: each.path)


def tree_files(output: bytes) -> list[TreeFile]:
    """Read `ls-tree -r -l -z`."""
    files = []
    for entry in output.split(b"\0"):
        if entry:
            about, path = entry.split(b"\t", 1)
            mode, _, _, size = about.decode().split()
            kind = _KINDS.get(mode, "file")
            files.append(
                TreeFile.model_validate(
                    {"path": shown(path), "size": 0 if size == "-" else int(size), "kind": kind}
                )
            )
    return files


def listed_files(output: bytes) -> list[tuple[str, bytes]]:
    """Read `ls-tree -r -z`: kind and path of each file."""
    listed = []
    for entry in output.split(b"\0")[:-1]:
        about, path = entry.split(b"\t", 1)
        listed.append((_KINDS.get(about[:6].decode(), "file"), path))
    return listed


def logged_commits(output: bytes) -> list[LoggedCommit]:
    """Read `log --format=LOG_FORMAT`."""
    records = output.decode(errors="replace").split("\0\x1e")
    return [_logged(record.lstrip("\n")) for record in records if record.strip()]


def _logged(record: str) -> LoggedCommit:
    commit, author, seconds, subject, trailers = record.split("\0", 4)
    return LoggedCommit(
        commit=commit,
        author=author,
        at=datetime.fromtimestamp(int(seconds), UTC),
        subject=subject,
        trailers=dict(_trailers(trailers)),
    )


def _trailers(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, colon, value = line.partition(": ")
        if colon:
            yield name, value


def blamed(output: bytes) -> tuple[str, str, str, int]:
    """Return commit, path, text and line of the single line in `blame --porcelain`."""
    lines = output.split(b"\n")
    commit, _, line = lines[0].decode().split()[:3]
    path = next(each[9:] for each in lines if each.startswith(b"filename "))
    text = next(each[1:] for each in lines if each.startswith(b"\t"))
    return commit, shown(path), text.decode(errors="replace"), int(line)


def blamed_line(output: bytes, origin: LoggedCommit) -> BlamedLine:
    """Read `blame --porcelain` of one line, whose commit is `origin`."""
    _, path, text, line = blamed(output)
    return BlamedLine(line=line, text=text, path=path, origin=origin)
