"""The README's tables say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from workers.settings import table
from workflows.events import PUBLISHED

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_table_of_settings_is_the_one_that_the_workers_print() -> None:
    assert table().strip() in README


def test_the_table_of_events_names_every_published_subject_and_no_other() -> None:
    named = set(re.findall(r"`((?:planning|orchestration|context)\.[a-z]+\.?[a-z]*)`", README))

    assert named == set(PUBLISHED)
