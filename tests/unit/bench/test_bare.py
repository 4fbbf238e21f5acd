"""The story without the fleet that figures are compared with."""

from tests.bench.bare import A_STORY


def test_the_bare_story_has_the_activities_that_the_figures_name() -> None:
    assert A_STORY.activities == 127
