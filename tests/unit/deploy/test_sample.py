"""The sample project in git, and the stories that ship with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from activities.config import CONFIG
from activities.workspace.repositories import load_repositories, verify
from deploy.local.parts import SAMPLE_VARIABLE
from deploy.local.sample import PROJECT, files, make_repository
from tests.support.repositories import in_store
from workflows.models.readiness import StoryText
from workflows.models.story import StoryInput
from workflows.rules.readiness import score_story

STORIES = sorted((PROJECT.parent / "stories").glob("*.json"))


def test_the_same_files_give_the_same_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "gitconfig"
    config.write_text("[user]\nname = Someone\n[init]\ndefaultBranch = other\n")
    first = make_repository(tmp_path / "first.git")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))

    again = make_repository(tmp_path / "again.git")

    assert again == first
    assert in_store(tmp_path / "again.git", "log", "--format=%an", "main") == "The sample's team"


def test_the_repository_has_the_project_and_nothing_else(tmp_path: Path) -> None:
    repository = tmp_path / "sample.git"

    make_repository(repository)

    names = in_store(repository, "ls-tree", "-r", "--name-only", "main").splitlines()
    assert names == sorted([".gitignore", *(str(file.relative_to(PROJECT)) for file in files())])
    assert "src/ratelimit/middleware.py" in names
    assert [each.name for each in tmp_path.iterdir()] == ["sample.git"]


async def test_the_shipped_entry_reaches_the_repository(tmp_path: Path) -> None:
    make_repository(tmp_path / "sample.git")
    url = (tmp_path / "sample.git").as_uri()

    entry = load_repositories(CONFIG / "repositories.yaml", {SAMPLE_VARIABLE: url})["sample"]

    await verify(entry)


@pytest.mark.parametrize("file", STORIES, ids=lambda file: file.stem)
def test_a_story_of_the_sample_is_ready_at_every_rigor(file: Path) -> None:
    story = StoryInput.model_validate(json.loads(file.read_text()))

    assert story.repository == "sample"
    assert story.paths
    assert score_story(StoryText.model_validate(story, from_attributes=True)).total == 100


def test_the_sample_has_not_yet_what_its_story_asks_for() -> None:
    code = "".join(file.read_text() for file in files())

    assert "Retry-After" not in code
