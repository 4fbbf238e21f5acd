"""The outline of a repository fits a prompt, whatever its size."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from activities.workspace.outline import CHARACTERS, LINES, outline_text

NAMES = st.text("abc.", min_size=1, max_size=40)
PATHS = st.lists(st.lists(NAMES, min_size=1, max_size=5).map("/".join), max_size=600, unique=True)


@given(PATHS)
def test_an_outline_is_bounded(paths: list[str]) -> None:
    text = outline_text(sorted(paths))

    assert len(text) <= CHARACTERS
    assert text.count("\n") < LINES


def test_a_small_repository_is_listed() -> None:
    assert outline_text(["README.md", "src/a.py"]) == "README.md\nsrc/a.py"


def test_large_folders_are_counted() -> None:
    paths = ["README.md", *(f"src/part{n % 7}/deep/f{n}.py" for n in range(1_000))]

    lines = outline_text(paths).split("\n")

    assert lines[0] == "README.md"
    assert "src/part0/deep/ (143 files)" in lines
    assert len(lines) == 8


def test_a_folder_of_many_files_is_cut() -> None:
    text = outline_text([f"file-{n:06}.txt" for n in range(100_000)])

    assert text.endswith("and 99701 more")
