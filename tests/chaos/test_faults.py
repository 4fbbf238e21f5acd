"""Whatever is killed at any point of a story: it reaches DONE, nothing is lost or duplicated."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from nats.js.api import Header

from tests.chaos.conftest import TIME_LIMIT
from tests.support.checker import paid_twice, read_streams
from tests.support.kept import forget_calls, kill_and_start
from tests.support.llm_server import LlmServer
from tests.support.polling import until
from tests.support.site import SERVERS, WORKERS, Site

pytestmark = TIME_LIMIT

WAVES = ("gather", "propose", "criticise", "revise", "check_council", "record_deliberation")

AWAY_S = 65
"""Longer than the longest pause between two attempts, which is one minute."""


@pytest.mark.parametrize("kind", WORKERS)
async def test_a_worker_killed_in_each_wave_of_a_deliberation_loses_nothing(
    site: Site, engine: LlmServer, kind: str
) -> None:
    story_id = f"US-{kind}"
    await forget_calls(site, engine)
    await site.begin(story_id)

    for wave in WAVES:
        await site.until_scheduled(f"deliberation-{story_id}-design-1", wave)
        await kill_and_start(site, engine, kind)
    state = await site.finish(story_id)

    assert state == "DONE"
    assert await site.differences(story_id) == []
    assert paid_twice(call.model_dump() for call in engine.calls) == []
    assert site.orphans() == []


async def test_temporal_is_stopped_in_mid_wave_and_restarts_with_its_database(
    site: Site, engine: LlmServer
) -> None:
    engine.calls.clear()
    await site.begin("US-temporal")

    await site.until_scheduled("deliberation-US-temporal-design-1", "propose")
    await site.stop("temporal")
    await site.start("temporal")
    await site.until_scheduled("deliberation-US-temporal-design-1", "revise")
    await site.kill_and_start("temporal")
    state = await site.finish("US-temporal")

    assert state == "DONE"
    assert await site.differences("US-temporal") == []
    assert paid_twice(call.model_dump() for call in engine.calls) == []


async def test_answers_that_temporal_never_received_are_not_paid_for_twice(
    site: Site, engine: LlmServer
) -> None:
    """Temporal is down when they arrive, and their worker is killed before it is back."""
    engine.calls.clear()
    await site.begin("US-unheard")
    await until(lambda: len(engine.calls) >= 3)
    await site.kill("temporal")
    await until(
        lambda: site.kept_answers("deliberation-US-unheard-design-1"), lambda kept: len(kept) == 3
    )

    await site.kill("agents")
    await site.start("temporal")
    await site.start("agents")
    state = await site.finish("US-unheard")

    assert state == "DONE"
    assert paid_twice(call.model_dump() for call in engine.calls) == []
    assert await site.differences("US-unheard") == []


async def test_everything_is_killed_at_once_in_mid_wave(site: Site) -> None:
    await site.begin("US-all")

    await site.until_scheduled("deliberation-US-all-design-1", "criticise")
    await site.kill_and_start(*SERVERS, *WORKERS)
    state = await site.finish("US-all")

    assert state == "DONE"
    assert await site.differences("US-all") == []
    assert site.orphans() == []


async def test_the_checker_reports_every_manipulation(site: Site) -> None:
    """Lost, duplicated, foreign and reordered events; a lost node, a changed status."""
    await site.begin("US-doctored")
    assert await site.finish("US-doctored") == "DONE"
    assert await site.differences("US-doctored") == []

    async with site.clients() as (connection, driver):
        jetstream = connection.jetstream()
        mine = [m for m in await read_streams(connection) if m.story_id == "US-doctored"]
        moves = [m for m in mine if m.event.subject == "planning.story.transitioned"]
        lost, doubled = moves[1], moves[2]
        await jetstream.delete_msg(lost.stream, lost.sequence)
        foreign = await jetstream.publish(
            "planning.story.cancelled",
            b"{}",
            headers={Header.MSG_ID: "foreign", "ce-id": "foreign", "ce-subject": "US-doctored"},
        )
        message = await jetstream.get_msg(doubled.stream, doubled.sequence)
        again = dict(message.headers or {}) | {Header.MSG_ID.value: "again"}
        await jetstream.publish(doubled.event.subject, message.data or b"", headers=again)
        await driver.execute_query(
            "MATCH (t:PhaseTransition {id: $id}) DETACH DELETE t", id=moves[0].event.id
        )
        await driver.execute_query(
            "MATCH (t:Subtask {case_id: 'US-doctored'}) SET t.status = 'IN_PROGRESS'"
        )
    found = "\n".join(await site.differences("US-doctored"))

    assert f"planning.story.transitioned {lost.event.id} is on no stream" in found
    assert f"{doubled.event.id} is 2 times on the streams" in found
    assert f"foreign is on {foreign.stream}, and in no history" in found
    assert "the streams say DRAFT BUILD TEST DOCS DONE BUILD" in found
    assert f"the graph lacks PhaseTransition {moves[0].event.id}" in found
    assert "the graph's transitions are DRAFT -> DESIGN" in found
    assert "is IN_PROGRESS" in found


async def test_each_server_may_be_away_for_longer_than_every_pause(tmp_path: Path) -> None:
    """Three fleets side by side, each without one server in the middle of a deliberation."""

    async def without(server: str) -> tuple[str, list[str]]:
        engine, site = fleets[server]
        await site.begin("US-1")
        await site.until_scheduled("deliberation-US-1-design-1", "propose")
        await site.kill(server)
        await asyncio.sleep(AWAY_S)
        await site.start(server)
        state = await site.finish("US-1")
        doubled = paid_twice(call.model_dump() for call in engine.calls)
        return state, [*await site.differences("US-1"), *doubled]

    fleets: dict[str, tuple[LlmServer, Site]] = {}
    async with AsyncExitStack() as stack:
        # One after another: a worker that starts has 8 s to connect.
        for server in ("nats", "neo4j", "valkey"):
            engine = await stack.enter_async_context(LlmServer(delay_ms=300))
            site = await stack.enter_async_context(Site(tmp_path / server, engine.url))
            fleets[server] = engine, site
        outcomes = await asyncio.gather(*map(without, fleets))

    assert outcomes == [("DONE", [])] * 3
