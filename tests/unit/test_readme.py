"""The documents match the code, and their links lead to existing files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from workers.serve_settings import ServeSettings
from workers.settings import Settings, table

ROOT = Path(__file__).parents[2]
FOLDERS = ("activities", "bridge", "deploy", "docs", "tests", "workers", "workflows")
FILES = [f"/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/**/README.md")]


@pytest.mark.parametrize("settings", [Settings, ServeSettings])
def test_the_tables_of_settings_are_those_that_the_workers_print(
    settings: type[BaseSettings],
) -> None:
    assert table(settings).strip() in (ROOT / "docs" / "settings.md").read_text()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    files = [target for target in targets if "://" not in target]

    assert [file for file in files if not (page.parent / file).exists()] == []


@pytest.mark.parametrize(
    "page",
    [
        *(ROOT / name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md")),
        *ROOT.glob("docs/design/*.md"),
    ],
    ids=lambda page: page.name,
)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", page.read_text())
    names = re.findall(r"[\w./-]+\.(?:py|yaml)\b", "\n".join(spans))

    assert [name for name in names if not any(file.endswith(f"/{name}") for file in FILES)] == []


NOT_TESTS = {"test_patch", "test_paths"}
"""A column of SWE-bench, and a field of repositories.yaml."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page.read_text())) - NOT_TESTS

    assert [name for name in named if f"def {name}(" not in tests] == []


def test_the_architecture_has_a_line_for_each_folder() -> None:
    tree = (ROOT / "ARCHITECTURE.md").read_text().split("```")[1]
    named = set(re.findall(r"([\w-]+)/", tree))

    for folder in FOLDERS:
        folders = {path.parent.name for path in (ROOT / folder).glob("*/*.*")} - {"__pycache__"}
        assert folders | {folder} <= named, folder
