"""Changes of a story are recorded and published by one activity, and what fails follows."""

from __future__ import annotations

from collections import Counter

from temporalio.client import Client

from tests.support.polling import until
from tests.unit.conftest import QUEUES, RunningStory, StartStory, World, instant_workers


async def activities_of(story: RunningStory) -> Counter[str]:
    """Return how often the story has scheduled each activity."""
    history = await story.handle.fetch_history()
    return Counter(
        event.activity_task_scheduled_event_attributes.activity_type.name
        for event in history.events
        if event.HasField("activity_task_scheduled_event_attributes")
    )


async def all_is_published(story: RunningStory) -> None:
    async def nothing_left() -> bool:
        return not (await story.handle.query("outbox"))["entries"]

    await until(nothing_left)


async def test_changes_are_recorded_and_published_by_one_activity(
    start_story: StartStory, world: World
) -> None:
    story = await start_story()
    await story.until(gate="approve_scope")
    await all_is_published(story)

    ran = await activities_of(story)
    assert ran["announce"] > 0
    assert ran["record"] == ran["publish"] == 0
    assert [entry for entry in world.recorded if entry.subject] == world.published


async def test_while_nats_is_away_changes_are_recorded_and_follow_in_their_order(
    start_story: StartStory, world: World
) -> None:
    world.bus_open.clear()
    story = await start_story()
    await story.to("DESIGN")
    await story.until(gate="approve_design")  # the council has read the story from the graph
    assert not world.published
    ran = await activities_of(story)
    assert (ran["announce"], ran["publish"]) == (1, 1)

    world.bus_open.set()
    await all_is_published(story)

    assert [entry for entry in world.recorded if entry.subject] == world.published


async def test_an_entry_that_nats_refuses_does_not_stop_those_before_it(
    start_story: StartStory, world: World
) -> None:
    world.failing = {"publish/GateOpened": "too large"}
    story = await start_story()

    await story.until(gate="approve_scope")
    await until(lambda: "GateOpened" in {entry.kind for entry in world.recorded})

    assert "StoryCreated" in {entry.kind for entry in world.published}
    assert "GateOpened" not in {entry.kind for entry in world.published}


async def test_changes_are_recorded_although_no_mirror_runs(
    fleet_without_workers: Client, world: World
) -> None:
    without_bridge = [queue for queue in QUEUES if queue != "bridge"]
    async with instant_workers(fleet_without_workers, queues=without_bridge):
        story = await StartStory(fleet_without_workers, world)()
        async with story.skipping_time():
            await story.until(gate="approve_scope")
            await until(lambda: "GateOpened" in {entry.kind for entry in world.recorded})
        ran = await activities_of(story)

    assert (ran["announce"], world.published) == (1, [])
