"""Long-running stories continue as new and lose nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path

import pytest
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowFailureError

from deploy.local.ports import free_ports
from tests.support.branches import committing_councils
from tests.support.fleet import connect
from tests.support.polling import WITHIN_S, until
from tests.support.servers import EarlyTemporal, started
from tests.unit.conftest import RunningStory, StartStory, World, instant_workers
from tests.unit.workflows.test_repairs import dispatched
from tests.unit.workflows.test_story_branch import Repo
from workers.search_attributes import register
from workflows.search_attributes import GATE_OPENED_AT, PENDING_GATE

pytestmark = pytest.mark.slow  # its servers are its own


@pytest.fixture
async def impatient(tmp_path: Path) -> AsyncIterator[Client]:
    port, ui_port = free_ports(2)
    server = EarlyTemporal(tmp_path / "temporal", port, ui_port)
    async with started(server, server.address, port=port):
        client = await connect(server.address)
        await register(client)
        async with instant_workers(client):
            yield client


async def test_a_story_continues_as_new_and_loses_nothing(impatient: Client, world: World) -> None:
    story = await StartStory(impatient, world)()
    first = (await story.handle.describe()).run_id

    await story.to("DONE")
    result = await story.handle.result()

    last = await impatient.get_workflow_handle(story.handle.id).describe()
    assert last.run_id != first
    assert result.state == "DONE"
    assert len(result.decisions) == 5
    assert [event for _, event, _ in world.transitions()] == [
        "create_story",
        "approve_scope",
        "approve_design",
        "build_done",
        "qa_passed",
        "docs_ready",
    ]
    ids = [entry.id for entry in world.published]
    assert len(set(ids)) == len(ids)
    assert ids == [entry.id for entry in world.recorded if entry.subject]
    timeline = await impatient.get_workflow_handle(story.handle.id).query("timeline")
    assert [line["event"] for line in timeline if line["event"] == "planning.story.created"]


async def test_a_gate_waits_since_an_earlier_run(impatient: Client, world: World) -> None:
    story = await StartStory(impatient, world)()

    async def waits_since() -> datetime | None:
        described = await story.handle.describe()
        known = described.typed_search_attributes
        return known.get(GATE_OPENED_AT) if known.get(PENDING_GATE) == "approve_scope" else None

    since = await until(waits_since)
    await flooded(impatient, story)

    assert await until(waits_since) == since
    await story.approve("approve_scope")
    assert await until(waits_since, lambda found: found is None) is None


async def flooded(client: Client, story: RunningStory) -> None:
    """Send decisions, one signal each, until the story has continued as new."""
    first = (await story.handle.describe()).run_id
    async with asyncio.timeout(WITHIN_S):
        number = 0
        while (await story.handle.describe()).run_id == first:
            await story.handle.signal(
                "add_decision", {"decision_id": f"d{number}", "title": f"Decision {number}"}
            )
            number += 1


async def approve_until_asked(story: RunningStory, world: World, gate: str) -> None:
    """Approve the gate, and wait until an agent has been asked for its proposal."""
    before = len(world.acts)
    await story.approve(gate)
    await until(lambda: len(world.acts) > before)


async def held_in(client: Client, world: World, state: str) -> tuple[RunningStory, str]:
    """Return a story whose child in `state` waits for its agents, and the child's id."""
    story = await StartStory(client, world)(token_budget=1_000_000)
    gate = {"DESIGN": "approve_scope", "BUILD": "approve_design"}[state]
    if state == "BUILD":
        await story.to("DESIGN")
    await story.until(gate=gate)
    world.hold["propose"] = asyncio.Event()
    await approve_until_asked(story, world, gate)
    return story, (await story.state()).child


@pytest.mark.parametrize("state", ["DESIGN", "BUILD"])
async def test_a_child_at_work_goes_on_when_its_story_continues_as_new(
    impatient: Client, world: World, state: str
) -> None:
    story, child = await held_in(impatient, world, state)
    began = (await impatient.get_workflow_handle(child).describe()).run_id

    await flooded(impatient, story)
    await flooded(impatient, story)
    world.hold["propose"].set()

    await story.finish()
    assert len((await story.handle.result()).decisions) == 5
    failures = [
        entry.body["description"]
        for entry in world.published
        if "WORK_FAILED" in entry.body.values()
    ]
    assert failures == []
    described = await impatient.get_workflow_handle(child).describe()
    # A plan may have continued as new itself; it was not started a second time.
    first = described.raw_description.workflow_execution_info.first_run_id
    assert (first, described.status) == (began, WorkflowExecutionStatus.COMPLETED)
    calls = [(call.task.task_id, call.agent.agent_id, call.wave) for call in world.calls]
    assert len(calls) == len(set(calls))
    ids = [entry.id for entry in world.published]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("state", ["DESIGN", "BUILD"])
async def test_a_child_that_goes_on_is_stopped_with_its_story(
    impatient: Client, world: World, state: str
) -> None:
    story, child = await held_in(impatient, world, state)
    await flooded(impatient, story)

    await story.handle.cancel()

    with pytest.raises(WorkflowFailureError):
        await story.handle.result()
    # The story cancels its child by a signal, which the worker carries out.
    await until(
        impatient.get_workflow_handle(child).describe,
        lambda described: described.status == WorkflowExecutionStatus.CANCELED,
    )
    subjects = world.subjects()
    assert subjects[-1] == "planning.story.cancelled"
    assert "orchestration.deliberation.failed" in subjects


async def test_a_child_that_goes_on_is_stopped_when_its_story_moves(
    impatient: Client, world: World
) -> None:
    story, child = await held_in(impatient, world, "BUILD")
    await flooded(impatient, story)
    first = (await impatient.get_workflow_handle(child).describe()).run_id

    await story.reject("reject_build")

    with pytest.raises(WorkflowFailureError):
        await impatient.get_workflow_handle(child, run_id=first).result()
    world.hold["propose"].set()
    await story.finish()


@pytest.mark.parametrize("way", ["cancelled", "amended"])
async def test_a_child_that_goes_on_is_stopped_though_the_graph_is_away(
    impatient: Client, world: World, way: str
) -> None:
    """The next run waits until its events are stored before it waits for the child."""
    story, child = await held_in(impatient, world, "DESIGN")
    world.graph_open.clear()
    await story.handle.signal("approve", None)  # refused, which is an event
    await flooded(impatient, story)

    if way == "cancelled":
        await story.handle.cancel()
    else:
        await story.update("amend", brief="Another one.")

    await until(
        impatient.get_workflow_handle(child).describe,
        lambda described: described.status == WorkflowExecutionStatus.CANCELED,
    )
    world.graph_open.set()
    world.hold["propose"].set()
    if way == "amended":
        await story.finish()
        return
    with pytest.raises(WorkflowFailureError):
        await story.handle.result()
    assert world.subjects()[-1] == "planning.story.cancelled"


async def test_a_wave_that_waits_for_the_budget_begins_in_a_later_run(
    impatient: Client, world: World
) -> None:
    world.tokens = 100
    story = await StartStory(impatient, world)(token_budget=500)
    await story.until(gate="approve_scope")
    await story.approve("approve_scope")
    await story.until(gate="budget")
    await flooded(impatient, story)

    await story.update("raise_budget", tokens=1_000_000, actor="ana", role="PO")

    await story.finish()
    assert world.subjects().count("planning.gate.opened") == 5


async def test_a_repair_at_work_goes_on_when_its_story_continues_as_new(
    impatient: Client, world: World, tmp_path: Path
) -> None:
    repo = Repo(world, tmp_path / "repository")
    world.failing_builds, world.edits["Repair the build"] = 1, {"fixed.txt": "yes\n"}
    world.hold["Repair the build"] = asyncio.Event()
    async with committing_councils(impatient, world) as queue:
        story = await StartStory(impatient, world, queue)(repository="sample")
        for gate in ("approve_scope", "approve_design"):
            await story.until(gate=gate)
            await story.approve(gate)
        await until(lambda: dispatched(world), lambda tasks: tasks == ["t1", "t2", "t3"])

        await flooded(impatient, story)
        await flooded(impatient, story)
        world.hold["Repair the build"].set()
        await story.finish()

    assert dispatched(world) == ["t1", "t2", "t3"]
    assert [each.commit for each in world.measured_commits][1:] == [
        repo.at(repo.store, f"story/{story.story_id}")
    ]
