"""A story whose graph was lost, and one whose graph rejects what the story has to store."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any, TypeVar

import pytest
from neo4j import AsyncDriver
from redis.asyncio import Redis
from temporalio.client import Client, WorkflowHandle

from activities.cache import timeline_key
from activities.graph.activities import Graph
from bridge.mirror.rebuild import rebuild
from bridge.mirror.story_sweep import StorySweep
from tests.support.fleet import a_namespace, connect
from tests.support.polling import until
from tests.support.servers import Servers
from tests.support.stories import batch, deliberation, moved, new_story, plan, refused, rows
from tests.support.stories import spec as text_of
from workers.processes.context import context_worker
from workers.processes.story import story_worker
from workers.search_attributes import register
from workers.settings import Settings
from workflows.models.context import PackQuery
from workflows.models.entries import Entry
from workflows.models.events import TaskCreated
from workflows.models.ids import closure_workflow_id, story_workflow_id
from workflows.models.outbox import OutboxStuck, SkipEntry
from workflows.models.story import Approve, StoryInput
from workflows.story import StoryWorkflow
from workflows.stubs import STORY_QUEUE

T = TypeVar("T")
Handle = WorkflowHandle[Any, Any]

LOSE = "MATCH (s:Case {id: $id}) OPTIONAL MATCH (n)-[:OF]->(s) DETACH DELETE n, s"


@pytest.mark.parametrize("then", ["nothing", "a later entry"])
async def test_no_pack_is_built_of_a_story_that_the_graph_has_lost(
    graph: Graph, driver: AsyncDriver, then: str
) -> None:
    story = new_story()
    query = PackQuery(story_id=story, role="DEV", phase="BUILD", known=True)
    await graph.record(batch(story, text_of(story), plan(story)))
    await graph.record_deliberation(deliberation(story))
    assert (await graph.build_pack(query)).context

    await rows(driver, LOSE, id=story)
    if then == "a later entry":
        await graph.record(batch(story, moved(story, "DRAFT", "DESIGN", 30), first=30))
    with refused("GraphLost", retryable=False) as lost:
        await graph.build_pack(query)
    await graph.build_pack(query.model_copy(update={"known": False}))
    await graph.build_pack(query.model_copy(update={"story_id": new_story(), "known": False}))

    assert f"fleet graph rebuild {story}" in lost.value.message


@pytest.fixture
async def fleet(
    graph: Graph, driver: AsyncDriver, client: Redis, servers: Servers
) -> AsyncIterator[Client]:
    """Run the workers that a story needs before its council deliberates; yield a client."""
    temporal = await connect(servers.temporal.address, await a_namespace(servers))
    await register(temporal)
    settings = Settings()
    stories = story_worker(temporal, settings, client)
    async with stories, context_worker(temporal, settings, driver, client):
        yield temporal


async def started(fleet: Client, driver: AsyncDriver, story: str) -> Handle:
    """Start a story; wait until it is at its first gate and in the graph."""
    text = StoryInput(
        story_id=story,
        title="Undo the deletion of a note",
        brief="As a writer I want to undo a deletion so that a slip costs me nothing.",
        acceptance_criteria=["Given a deleted note, when I press undo, then it is back."],
        rigor="L0",
    )
    running = await fleet.start_workflow(
        StoryWorkflow.run, text, id=story_workflow_id(story), task_queue=STORY_QUEUE
    )

    async def waits() -> bool:
        return bool((await running.query(StoryWorkflow.state)).pending_gate)

    await until(waits)
    await until(lambda: rows(driver, "MATCH (s:Case {id: $id}) RETURN s.title", id=story))
    return running


async def test_a_council_of_a_lost_story_fails_and_begins_once_the_graph_is_rebuilt(
    graph: Graph, driver: AsyncDriver, fleet: Client
) -> None:
    story = new_story()
    running = await started(fleet, driver, story)
    await rows(driver, LOSE, id=story)

    approve = Approve(gate="approve_scope", actor="ana", role="PO")
    await running.execute_update(StoryWorkflow.approve, approve)
    failed = await until(lambda: lines(running, "WORK_FAILED"))
    done = await rebuild(fleet, graph, story, lambda *_: None)

    assert f"fleet graph rebuild {story}" in failed[0]
    assert done.refused == []
    query = PackQuery(story_id=story, role="ARCHITECT", phase="DESIGN", known=True)
    assert "Undo the deletion" in (await graph.build_pack(query)).context
    await running.terminate()


async def stuck_on(running: Handle) -> OutboxStuck:
    """Wait until an entry of the workflow is stuck, and return what is stuck."""

    async def ask() -> list[OutboxStuck]:
        found: list[OutboxStuck] = await running.query(
            "outbox_stuck", result_type=list[OutboxStuck]
        )
        return found

    return (await until(ask))[0]


def refused_entry(story: str) -> Entry:
    """Return an entry whose task id is longer than the graph accepts."""
    at = "2026-01-01T00:01:00.000Z"
    task = TaskCreated(story_id=story, timestamp=at, plan_id="p", task_id="t" * 10_000, role="DEV")
    return Entry(
        id=f"deliberation-{story}-design-1/run/0",
        kind="TaskCreated",
        source=f"deliberation-{story}-design-1",
        story_id=story,
        time=at,
        body=task.model_dump(),
    )


async def test_an_entry_that_the_graph_refuses_is_skipped_and_kept_as_a_record(
    graph: Graph, driver: AsyncDriver, client: Redis, fleet: Client
) -> None:
    story = new_story()
    running = await started(fleet, driver, story)
    entry = refused_entry(story)

    await running.signal(StoryWorkflow.forward_events, [entry])
    stuck = await stuck_on(running)
    reason = "that id was a mistake"
    skip = SkipEntry(entry_id=stuck.entry_id, actor="ana", reason=reason)
    await running.execute_update("skip_entry", skip)
    found = await until(
        lambda: rows(
            driver,
            "MATCH (e:Event {case_id: $id, event_type: 'EntrySkipped'})-[:OF]->(:Story) "
            "RETURN e.actor, e.description, e.entry",
            id=story,
        )
    )

    async def in_timeline() -> bool:
        return reason in str(await client.xrange(timeline_key(story)))

    await until(in_timeline)

    assert (stuck.entry_id, stuck.error_type) == (entry.id, "InvalidEntry")
    [[actor, description, record]] = found
    assert actor == "ana"
    assert reason in description
    assert Entry.model_validate_json(record) == entry
    assert reason in (await lines(running, "EntrySkipped"))[0]
    done = await rebuild(fleet, graph, story, lambda *_: None)
    assert done.writes > 0
    await running.terminate()


async def test_a_story_that_is_terminated_while_an_entry_is_stuck_is_closed(
    graph: Graph, driver: AsyncDriver, fleet: Client
) -> None:
    story = new_story()
    running = await started(fleet, driver, story)
    await running.signal(StoryWorkflow.forward_events, [refused_entry(story)])
    await stuck_on(running)

    await running.terminate()
    sweep = StorySweep(fleet, graph, timedelta(seconds=1))
    await until(sweep.sweep)
    run_id = running.first_execution_run_id or ""
    closure = fleet.get_workflow_handle(closure_workflow_id(story, run_id))
    stuck = await stuck_on(closure)
    skip = SkipEntry(entry_id=stuck.entry_id, actor="ana", reason="that id was a mistake")
    await closure.execute_update("skip_entry", skip)

    ended = "MATCH (s:Story {id: $id, status: 'CANCELLED'}) RETURN s.id"
    await until(lambda: rows(driver, ended, id=story))
    await closure.terminate()  # no worker here publishes


async def lines(running: Handle, word: str) -> list[str]:
    """Return the texts of the story's timeline entries that contain that word."""
    return [
        entry.text
        for entry in await running.query(StoryWorkflow.timeline)
        if word in entry.text or word in entry.event
    ]
