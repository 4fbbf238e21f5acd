"""Edits in a working tree: what they change, what they refuse, and that no link leads out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from activities.workspace.edits import LARGEST_FILE, EditRefused, replace, write


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "src").mkdir(parents=True)
    (tree / "src" / "a.py").write_text("one\ntwo\ntwo\n")
    (tmp_path / "secret").write_text("one\n")
    (tmp_path / "outside").mkdir()
    return tree


def test_a_new_file_is_written_with_its_folders(tree: Path) -> None:
    done = write(tree, "docs/new/page.md", "# Title\n\n")

    assert (tree / "docs/new/page.md").read_text() == "# Title\n\n"
    assert done == "docs/new/page.md is written: 2 lines"


def test_a_written_file_keeps_its_mode(tree: Path) -> None:
    (tree / "run.sh").write_text("exit 1")
    (tree / "run.sh").chmod(0o755)

    write(tree, "run.sh", "exit 0")

    assert (tree / "run.sh").stat().st_mode & 0o777 == 0o755
    assert (tree / "run.sh").read_text() == "exit 0"


def test_a_text_that_is_there_once_is_replaced(tree: Path) -> None:
    done = replace(tree, "src/a.py", "one\n", "1\n1\n")

    assert (tree / "src/a.py").read_text() == "1\n1\ntwo\ntwo\n"
    assert done == "src/a.py is changed: 1 line replaced by 2 lines"


@pytest.mark.parametrize(
    ("path", "old", "why"),
    [
        ("src/a.py", "three", "not in src/a.py"),
        ("src/a.py", "two", "2 times"),
        ("src/b.py", "one", "does not exist"),
        ("lib/b.py", "one", "does not exist"),
        ("src", "one", "is not a file"),
        ("src/a.py/b.py", "one", "a link or a file, not a folder"),
    ],
)
def test_what_cannot_be_replaced_is_refused_and_changes_nothing(
    tree: Path, path: str, old: str, why: str
) -> None:
    with pytest.raises(EditRefused, match=why):
        replace(tree, path, old, "x")

    assert (tree / "src/a.py").read_text() == "one\ntwo\ntwo\n"
    assert [path.name for path in tree.iterdir()] == ["src"]


def test_lines_of_a_file_with_crlf_are_replaced_by_such_lines(tree: Path) -> None:
    (tree / "a.txt").write_bytes(b"one\r\ntwo\r\nthree\r\n")

    replace(tree, "a.txt", "one\ntwo\n", "1\n2\n")
    replace(tree, "a.txt", "2\r\nthree", "two\r\n3")
    replace(tree, "a.txt", "two", "2\n2b")

    assert (tree / "a.txt").read_bytes() == b"1\r\n2\r\n2b\r\n3\r\n"


def test_line_ends_are_not_guessed_in_a_file_that_mixes_them(tree: Path) -> None:
    (tree / "a.txt").write_bytes(b"one\r\ntwo\nthree\n")

    with pytest.raises(EditRefused, match=r"not in a\.txt"):
        replace(tree, "a.txt", "one\ntwo", "x")


def test_occurrences_that_overlap_are_counted(tree: Path) -> None:
    (tree / "a.txt").write_text("aaa")

    with pytest.raises(EditRefused, match="2 times"):
        replace(tree, "a.txt", "aa", "b")


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "src/a.py", "nowhere"])
def test_a_link_is_not_followed(tree: Path, target: str) -> None:
    (tree / "link").symlink_to(target)

    with pytest.raises(EditRefused, match="is a link"):
        replace(tree, "link", "one", "x")
    with pytest.raises(EditRefused, match="is not a file"):
        write(tree, "link", "x")

    assert (tree.parent / "secret").read_text() == "one\n"


def test_a_folder_that_is_a_link_is_not_followed(tree: Path) -> None:
    (tree / "away").symlink_to("../outside")

    with pytest.raises(EditRefused, match="away is a link"):
        write(tree, "away/x", "x")

    assert list((tree.parent / "outside").iterdir()) == []


def test_another_link_to_the_same_file_keeps_its_content(tree: Path) -> None:
    os.link(tree.parent / "secret", tree / "hard")

    write(tree, "hard", "x")

    assert (tree.parent / "secret").read_text() == "one\n"


def test_a_pipe_does_not_block(tree: Path) -> None:
    os.mkfifo(tree / "pipe")

    with pytest.raises(EditRefused, match="is not a file"):
        replace(tree, "pipe", "a", "b")


def test_a_file_that_is_not_text_or_too_large_is_refused(tree: Path) -> None:
    (tree / "image").write_bytes(b"\xff\xfe\x00")
    (tree / "large").write_bytes(b"x" * (LARGEST_FILE + 1))

    with pytest.raises(EditRefused, match="is not UTF-8"):
        replace(tree, "image", "a", "b")
    with pytest.raises(EditRefused, match="more than"):
        replace(tree, "large", "a", "b")


def test_crlf_stays(tree: Path) -> None:
    (tree / "dos.txt").write_bytes(b"a\r\nb\r\n")

    replace(tree, "dos.txt", "a", "c")

    assert (tree / "dos.txt").read_bytes() == b"c\r\nb\r\n"
