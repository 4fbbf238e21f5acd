"""Recording and publishing in one activity, on real servers."""

from __future__ import annotations

from typing import Any

import pytest
from nats.aio.client import Client as Nats
from nats.js import JetStreamContext
from neo4j import AsyncDriver
from temporalio.exceptions import ApplicationError

from activities.graph.activities import Graph
from bridge.jetstream.streams import reconcile
from bridge.mirror.announcer import Announcer
from bridge.mirror.publisher import Mirror
from bridge.mirror.source import Source
from tests.integration.conftest import nats_settings
from tests.support.servers import RunningServer
from tests.support.stories import at, batch, deliberation, new_story, spec
from workers.clients.nats import open_nats
from workers.settings import Settings
from workflows.models.entries import OutcomeBatch
from workflows.models.events import EventBody, GateOpened, StoryCreated


@pytest.fixture
async def announcer(nats_client: Nats, jetstream: JetStreamContext, graph: Graph) -> Announcer:
    await reconcile(jetstream, replicas=1)
    return Announcer(graph, Mirror(nats_client, Source("c-1", "default")))


def changes(story: str, **gate: Any) -> list[EventBody]:
    """Return a text, which is only recorded, and two events."""
    return [
        spec(story),
        StoryCreated(story_id=story, title="Log in", rigor="L1", created_by="ana", timestamp=at(0)),
        GateOpened(story_id=story, gate="approve_scope", role="PO", timestamp=at(1), **gate),
    ]


async def is_stored(driver: AsyncDriver, story: str) -> bool:
    found = await driver.execute_query(
        "MATCH (s:Story {id: $id, title: 'Log in'}) RETURN s", id=story
    )
    return bool(found.records)


async def messages(jetstream: JetStreamContext) -> int:
    return (await jetstream.stream_info("PLANNING_EVENTS")).state.messages


async def test_a_batch_is_recorded_and_its_events_are_published(
    announcer: Announcer, jetstream: JetStreamContext, driver: AsyncDriver
) -> None:
    story, before = new_story(), await messages(jetstream)

    answer = await announcer.announce(batch(story, *changes(story)))
    again = await announcer.announce(batch(story, *changes(story)))

    assert answer.published == again.published == 3
    assert await is_stored(driver, story)
    assert await messages(jetstream) == before + 2


async def test_an_outcome_is_recorded_with_its_proposals_before_its_events_are_published(
    announcer: Announcer, jetstream: JetStreamContext, driver: AsyncDriver
) -> None:
    story, before = new_story(), await messages(jetstream)
    outcome = OutcomeBatch.of(batch(story, *changes(story)), deliberation(story))

    answer = await announcer.announce_outcome(outcome)
    again = await announcer.announce_outcome(outcome)

    assert answer.published == again.published == 3
    assert await proposals(driver, story) == 2
    assert await messages(jetstream) == before + 2


async def test_nothing_of_an_outcome_that_cannot_be_recorded_is_published(
    announcer: Announcer, jetstream: JetStreamContext, driver: AsyncDriver
) -> None:
    story, before = new_story(), await messages(jetstream)
    wrong = batch(story, *changes(story))
    wrong.entries[2].body["timestamp"] = "yesterday"

    with pytest.raises(ApplicationError):
        await announcer.announce_outcome(OutcomeBatch.of(wrong, deliberation(story)))

    assert await proposals(driver, story) == 0
    assert await messages(jetstream) == before


async def proposals(driver: AsyncDriver, story: str) -> int:
    found = await driver.execute_query("MATCH (p:Proposal {story_id: $id}) RETURN p", id=story)
    return len(found.records)


async def test_a_batch_is_recorded_while_nats_is_away(
    nats_server: RunningServer, graph: Graph, driver: AsyncDriver
) -> None:
    story = new_story()
    async with open_nats(Settings.model_validate(nats_settings(nats_server))) as lost:
        await lost.close()
        mirror = Mirror(lost, Source("c-1", "default"))
        answer = await Announcer(graph, mirror).announce(batch(story, *changes(story)))

    assert answer.published == 1  # the text, which has no subject
    assert await is_stored(driver, story)


async def test_nothing_of_a_batch_that_cannot_be_recorded_is_published(
    announcer: Announcer, jetstream: JetStreamContext
) -> None:
    story, before = new_story(), await messages(jetstream)
    wrong = batch(story, *changes(story))
    wrong.entries[2].body["timestamp"] = "yesterday"

    with pytest.raises(ApplicationError) as failed:
        await announcer.announce(wrong)

    assert failed.value.type == "InvalidEntry"
    assert await messages(jetstream) == before
