"""The globs that a story's paths and the paths of its tests have in common."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workflows.models.workspace import Repository
from workflows.rules.common_globs import MOST, TooManyGlobs, common
from workflows.rules.paths import matches

NAMES = st.text("ab.*?", min_size=1, max_size=4).filter(lambda name: "**" not in name)
GLOBS = st.lists(st.just("**") | NAMES, min_size=1, max_size=4).map("/".join)
PATHS = st.lists(st.text("ab.", min_size=1, max_size=3), min_size=1, max_size=4).map("/".join)
TESTS = Repository(key="sample", url="file:///sample.git").test_paths


@given(st.lists(GLOBS, max_size=3), st.lists(GLOBS, max_size=3), PATHS)
def test_a_path_matches_the_common_globs_if_it_matches_both_lists(
    left: list[str], right: list[str], path: str
) -> None:
    def fits(globs: list[str]) -> bool:
        return any(matches(glob, path) for glob in globs)

    assert fits(common(left, right)) == (fits(left) and fits(right))


@pytest.mark.parametrize(
    ("story", "expected"),
    [
        (["**"], TESTS),
        (["README.md"], []),
        (["tests/test_a.py"], ["tests/test_a.py"]),
        (["tests/**"], ["tests/**"]),
        (
            ["src/**", "tests/unit/**"],
            ["tests/unit/**", "src/**/test_*.py", "src/**/*_test.*", "src/**/*.spec.*"],
        ),
        (["src/shop.py", "test/?.py"], ["test/?.py"]),
    ],
)
def test_the_tests_that_a_story_may_change_are_written_shortly(
    story: list[str], expected: list[str]
) -> None:
    assert set(expected) <= set(found := common(story, TESTS))
    assert len(found) <= len(expected) + 1


def test_too_many_common_globs_are_refused() -> None:
    with pytest.raises(TooManyGlobs, match=str(MOST)):
        common(["*a*b*c*d*e*f*g*h*"], ["*1*2*3*4*5*6*7*8*"])
