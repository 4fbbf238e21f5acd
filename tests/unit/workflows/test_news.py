"""Decisions and milestones from outside: corrections, withdrawals and limits."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from tests.support.polling import until
from tests.unit.conftest import StartStory, World
from workflows.models.context import DecisionAdded, MilestoneReached
from workflows.models.story import StoryInput
from workflows.rules.news import KEPT, decisions_with, holding, milestones_with
from workflows.story_state import LINES_KEPT, Story

DECISIONS = st.lists(
    st.builds(
        DecisionAdded,
        decision_id=st.sampled_from([f"d{n}" for n in range(300)]),
        title=st.sampled_from(["A", "B"]),
        withdrawn=st.booleans(),
    ),
    max_size=400,
)


@given(DECISIONS, DECISIONS)
def test_of_each_decision_the_last_text_is_kept_and_of_all_the_newest(
    known: list[DecisionAdded], added: list[DecisionAdded]
) -> None:
    kept = decisions_with(decisions_with([], known), added)

    last = {decision.decision_id: decision for decision in [*known, *added]}
    assert len(kept) == len({decision.decision_id for decision in kept}) <= KEPT
    assert all(last[decision.decision_id] == decision for decision in kept)
    assert {d.decision_id for d in added[-1:]} <= {d.decision_id for d in kept}


def test_a_story_forgets_what_was_withdrawn_and_passes_it_on() -> None:
    story = Story.begin(StoryInput(story_id="US-1", title="Shorten links"))
    story.take_decisions([DecisionAdded(decision_id="d1", title="No SMS")], child_runs=False)

    story.take_decisions(
        [DecisionAdded(decision_id="d1", title="d1", withdrawn=True)], child_runs=True
    )

    assert story.told == []
    decisions = story.unsent_decisions
    assert [(each.title, each.withdrawn) for each in decisions] == [("No SMS", True)]
    assert holding(decisions) == []


def test_news_that_come_while_earlier_ones_are_sent_stay_unsent() -> None:
    """The earlier ones stay too until they are sent: a story may continue as new meanwhile."""
    story = Story.begin(StoryInput(story_id="US-1", title="Shorten links"))
    first = DecisionAdded(decision_id="d1", title="No SMS")
    later = DecisionAdded(decision_id="d1", title="No SMS and no mail")
    story.take_decisions([first, DecisionAdded(decision_id="d2", title="No fax")], child_runs=True)
    sending = story.unsent_decisions

    assert story.has_unsent
    story.take_decisions([later], child_runs=True)
    story.sent(sending, [])

    assert story.unsent_decisions == [later]


def test_milestones_are_taken_once_and_the_newest_are_kept() -> None:
    many = [MilestoneReached(milestone_id=f"m{n}", event_type="DEMO") for n in range(150)]
    story = Story.begin(StoryInput(story_id="US-1", title="Shorten links"))

    for _ in range(2):
        story.take_milestones(many, "2026-01-01T00:00:00Z", child_runs=True)

    assert len(story.timeline) == 150
    assert story.unsent_milestones == milestones_with([], many) == many[-KEPT:]


async def test_a_flood_of_decisions_goes_to_the_child_in_few_signals(
    start_story: StartStory, world: World
) -> None:
    world.hold["propose"] = asyncio.Event()
    story = await start_story()
    await story.until(gate="approve_scope")
    await story.approve("approve_scope")
    await until(lambda: len(world.acts) >= 3)

    for part in range(10):
        many = [{"decision_id": f"d{part}-{n}", "title": f"T{part}-{n}"} for n in range(1000)]
        await story.handle.signal("add_decisions", {"decisions": many})
    for n in range(50):
        await story.handle.signal("add_decision", {"decision_id": f"s{n}", "title": f"S{n}"})
    council = story.handle.id.replace("story-", "deliberation-") + "-design-1"
    deliberation = start_story.client.get_workflow_handle(council)

    async def signals() -> list[bytes]:
        """Return the payloads of the child's signals, in order."""
        history = await deliberation.fetch_history()
        found = [event.workflow_execution_signaled_event_attributes for event in history.events]
        return [signal.input.payloads[0].data for signal in found if signal.signal_name]

    await until(signals, lambda found: any(b"S49" in signal for signal in found))
    assert len(await signals()) < 20
    world.hold["propose"].set()
    await story.until(gate="approve_design")
    late = [call.late_decisions for call in world.calls if call.wave == 3]
    assert late[-1][-1].title == "S49"


def test_a_timeline_keeps_its_newest_lines() -> None:
    story = Story.begin(StoryInput(story_id="US-1", title="Shorten links"))

    many = [MilestoneReached(milestone_id=f"m{n}", event_type=f"E{n}") for n in range(600)]
    story.take_milestones(many, "2026-01-01T00:00:00Z", child_runs=False)

    assert len(story.timeline) == LINES_KEPT
    assert story.timeline[-1].event == "E599"
