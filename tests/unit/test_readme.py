"""The README's tables say what the code does."""

from __future__ import annotations

from pathlib import Path

from workers.settings import table

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_table_of_settings_is_the_one_that_the_workers_print() -> None:
    assert table().strip() in README
