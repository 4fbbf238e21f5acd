"""`make run` before anything runs: which story it starts, and under which id."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from deploy.local.demo import MOST_RUNS, STORY, Failed, following_ids, read_story


def test_the_story_of_make_run_ends_in_a_branch_that_changes_the_readme() -> None:
    story = read_story(STORY)

    assert (story["story_id"], story["repository"]) == ("US-101", "sample")
    assert (story["paths"], story["steps"]) == (["README.md"], 1)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (None, "No such file"),
        ("{", "JSON"),
        ('{"story_id": "US-1", "title": "T", "titel": "x"}', "titel"),
        ('{"story_id": "US-1", "title": "T", "steps": 1}', "stories with a repository"),
    ],
)
def test_a_story_that_cannot_be_read_is_refused(
    tmp_path: Path, text: str | None, rule: str
) -> None:
    file = tmp_path / "story.json"
    if text is not None:
        file.write_text(text)

    with pytest.raises(Failed, match=rule) as refused:
        read_story(file)

    assert str(refused.value).startswith(f"STORY={file}: ")


def test_each_run_takes_the_next_number() -> None:
    assert list(islice(following_ids("US-101"), 3)) == ["US-101", "US-102", "US-103"]
    assert list(islice(following_ids("US-009"), 2)) == ["US-009", "US-010"]
    assert len(list(following_ids("US-101"))) == MOST_RUNS
    assert list(following_ids("retry-after")) == ["retry-after"]
