"""The coach: its result is never worse than the original, and it asks an agent at most twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from temporalio.client import Client

from tests.unit.conftest import World
from workflows.coach import CoachWorkflow, choose
from workflows.models.agents import WriteStoryInput
from workflows.models.coach import CoachInput, CoachResult
from workflows.models.ids import coach_workflow_id
from workflows.models.readiness import Finding, Readiness, StoryText

TOTALS = st.integers(0, 100)


def scored(title: str, total: int) -> tuple[StoryText, Readiness]:
    lost = [Finding(code="SMALL", message="too long", weight=100 - total)] if total < 100 else []
    return StoryText(title=title), Readiness(total=total, findings=lost)


@given(original=st.none() | TOTALS, written=st.lists(TOTALS, min_size=1, max_size=2))
def test_the_choice_is_never_worse_than_the_original_and_gives_the_reason(
    original: int | None, written: list[int]
) -> None:
    before = None if original is None else scored("original", original)

    result = choose(before, [scored(f"written {n}", total) for n, total in enumerate(written)])

    kept = result.story.title == "original"
    assert result.readiness.total == max(written if original is None else [original, *written])
    assert kept == (original is not None and original > max(written))
    assert bool(result.reason) == kept
    assert result.reason.isascii()


async def coach(fleet: Client, world: World, **fields: object) -> CoachResult:
    return await fleet.execute_workflow(
        CoachWorkflow.run,
        CoachInput.model_validate(fields),
        id=coach_workflow_id(world.key),
        task_queue="story",
    )


async def test_a_suggestion_with_findings_is_written_once_more(fleet: Client, world: World) -> None:
    world.readiness = 90

    result = await coach(fleet, world, goal="Shorten links")

    first, second = world.calls
    assert isinstance(first, WriteStoryInput)
    assert isinstance(second, WriteStoryInput)
    assert (first.goal, first.story, first.wave) == ("Shorten links", None, 1)
    assert second.story == StoryText(title="Story 1: Shorten links")
    assert second.wave == 2
    assert (result.story.title, len(result.usage)) == ("Story 1: Shorten links", 2)


async def test_a_suggestion_without_findings_is_taken(fleet: Client, world: World) -> None:
    world.readiness = 100

    result = await coach(fleet, world, goal="Shorten links")

    assert world.acts == ["write_story/agent-architect-1"]
    assert result.original is None


async def test_a_refinement_that_is_not_worse_is_taken(fleet: Client, world: World) -> None:
    world.readiness = 60

    result = await coach(fleet, world, story={"title": "Fix it"})

    assert world.acts == ["write_story/agent-architect-1"]
    assert (result.story.title, result.reason) == ("Story 1: better", "")
