"""The documents match the code, and their links lead to existing files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from workers.settings import table

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/**/README.md")]


def test_the_table_of_settings_is_the_one_that_the_workers_print() -> None:
    assert table().strip() in (ROOT / "docs" / "settings.md").read_text()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    files = [target for target in targets if "://" not in target]

    assert [file for file in files if not (page.parent / file).exists()] == []
