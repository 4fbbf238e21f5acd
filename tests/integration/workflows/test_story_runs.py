"""A story's runs on real servers: one after another under one id, each continued as new."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from neo4j import AsyncDriver
from temporalio.client import Client, WorkflowExecutionStatus

from deploy.local.ports import free_ports
from tests.support.fleet import new_environment, whole_fleet
from tests.support.llm_server import LlmServer
from tests.support.polling import until
from tests.support.servers import EarlyTemporal, Servers, started
from tests.support.site import SAMPLE_STORY

SIGNALS = 1_200
"""Enough for the server to suggest continue-as-new, which it does at 1,000 events."""


@pytest.fixture
async def fleet(servers: Servers, llm: LlmServer, tmp_path: Path) -> AsyncIterator[Client]:
    """Run a whole fleet in one process and on a Temporal of its own; yield a client."""
    port, ui_port = free_ports(2)
    server = EarlyTemporal(tmp_path / "temporal", port, ui_port, events=1_000)
    async with started(server, server.address, port=port) as temporal:
        own = dataclasses.replace(servers, temporal=temporal)
        async with whole_fleet(await new_environment(own, llm, STORY_SWEEP_SECONDS="1")) as client:
            yield client


async def start(client: Client, story: str) -> Any:
    sample = json.loads(SAMPLE_STORY.read_text())
    return await client.start_workflow(
        "StoryWorkflow",
        sample | {"story_id": story, "approvals": "auto"},
        id=f"story-{story}",
        task_queue="story",
    )


async def built_and_cancelled(client: Client, story: str) -> str:
    """Run the story until its plan is done, cancel it, and return the plan's id."""
    handle = await start(client, story)

    async def built() -> bool:
        # On a busy machine, a worker that runs whole councils may answer late.
        view = await handle.query("state", rpc_timeout=timedelta(seconds=150))
        return bool(view["state"] == "BUILD" and not view["working_on"])

    await until(built)
    plan: str = (await handle.query("state"))["plan_id"]
    await handle.cancel()
    await until(partial(closed, handle))
    return plan


async def test_a_story_id_that_is_used_again_has_a_new_plan_beside_the_old_one(
    fleet: Client, driver: AsyncDriver
) -> None:
    story = f"US-{uuid.uuid4().hex[:10]}"
    for number in (1, 2):
        assert await built_and_cancelled(fleet, story) == f"{story}-plan-{number}"

    async with driver.session() as session:
        found = await session.run(
            "MATCH (:Story {id: $id})-[:HAS_PLAN]->(p)-[:HAS_SUBTASK]->(t) "
            "RETURN p.id AS plan, p.status AS status, collect(DISTINCT t.status) AS tasks "
            "ORDER BY plan",
            id=story,
        )
        plans = [(row["plan"], row["status"], row["tasks"]) async for row in found]
        found = await session.run(
            "MATCH (:Story {id: $id})<-[:OF]-(p:Proposal {phase: 'DESIGN'}) "
            "RETURN DISTINCT p.task_id AS task ORDER BY task",
            id=story,
        )
        designs = [row["task"] async for row in found]
    assert plans == [(f"{story}-plan-{n}", "COMPLETED", ["DONE"]) for n in (1, 2)]
    assert designs == [f"{story}-design-{n}" for n in (1, 2)]


async def test_a_thousand_signals_make_a_story_continue_as_new_and_its_council_ends_with_it(
    fleet: Client, llm: LlmServer
) -> None:
    llm.delay_ms = 300_000
    story = f"US-{uuid.uuid4().hex[:10]}"
    handle = await start(fleet, story)

    async def deliberates() -> str:
        child: str = (await handle.query("state")).get("child", "")
        return child if llm.calls else ""

    await until(deliberates)
    council = fleet.get_workflow_handle((await handle.query("state"))["child"])
    first = (await handle.describe()).run_id

    async def send(part: int) -> None:
        for number in range(part, SIGNALS, 20):
            decision = {"decision_id": f"d-{number}", "title": f"Decision {number}"}
            await handle.signal("add_decision", decision)

    await asyncio.gather(*map(send, range(20)))

    async def continued() -> bool:
        return bool((await handle.describe()).run_id != first)

    await until(continued)
    assert (await handle.query("state"))["state"] == "DESIGN"
    assert (await council.describe()).status == WorkflowExecutionStatus.RUNNING

    await handle.terminate(reason="no longer wanted")

    await until(partial(closed, council))
    assert (await council.describe()).status == WorkflowExecutionStatus.CANCELED


async def closed(handle: Any) -> bool:
    return bool((await handle.describe()).close_time)
