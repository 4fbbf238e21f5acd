"""A graph that has lost a story: its councils do not begin, and the story shows how to go on."""

import asyncio

import pytest
from neo4j import AsyncDriver
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.worker import Worker

from activities.graph import Graph
from activities.planning import Planning
from bridge.rebuild import rebuild
from tests.conftest import Servers
from tests.integration.conftest import a_namespace
from tests.integration.stories import batch, deliberation, moved, new_story, plan, refused, rows
from tests.integration.stories import spec as text_of
from workers.heartbeats import Heartbeats
from workers.search_attributes import register
from workers.workflow_runner import workflow_runner
from workflows.deliberation import DeliberationWorkflow
from workflows.models import Approve, PackQuery, StoryInput, story_workflow_id
from workflows.story import StoryWorkflow
from workflows.stubs import CONTEXT_QUEUE, STORY_QUEUE

LOSE = "MATCH (s:Case {id: $id}) OPTIONAL MATCH (n)-[:OF]->(s) DETACH DELETE n, s"


@pytest.mark.parametrize("then", ["nothing", "a later entry"])
async def test_no_pack_is_built_of_a_story_that_the_graph_has_lost(
    graph: Graph, driver: AsyncDriver, then: str
) -> None:
    story = new_story()
    asked = PackQuery(story_id=story, role="DEV", phase="BUILD", known=True)
    await graph.record(batch(story, text_of(story), plan(story)))
    await graph.record_deliberation(deliberation(story))
    assert (await graph.build_pack(asked)).context

    await rows(driver, LOSE, id=story)
    if then == "a later entry":
        await graph.record(batch(story, moved(story, "DRAFT", "DESIGN", 30), first=30))
    with refused("GraphLost", retryable=False) as lost:
        await graph.build_pack(asked)
    await graph.build_pack(asked.model_copy(update={"known": False}))
    await graph.build_pack(asked.model_copy(update={"story_id": new_story(), "known": False}))

    assert f"fleet graph rebuild {story}" in lost.value.message


async def test_a_council_of_a_lost_story_fails_and_begins_once_the_graph_is_rebuilt(
    graph: Graph, driver: AsyncDriver, servers: Servers
) -> None:
    client = await Client.connect(
        servers.temporal.address,
        namespace=await a_namespace(servers),
        data_converter=pydantic_data_converter,
    )
    await register(client)
    planning = Planning()
    story = new_story()
    text = StoryInput(
        story_id=story,
        title="Undo the deletion of a note",
        brief="As a writer I want to undo a deletion so that a slip costs me nothing.",
        acceptance_criteria=["Given a deleted note, when I press undo, then it is back."],
        rigor="L0",
    )
    stories = Worker(
        client,
        task_queue=STORY_QUEUE,
        workflows=[StoryWorkflow, DeliberationWorkflow],
        workflow_runner=workflow_runner(),
    )
    stores = Worker(
        client,
        task_queue=CONTEXT_QUEUE,
        activities=[
            *(graph.record, graph.load_council, graph.build_pack),
            *(planning.load_process, planning.score_story),
        ],
        interceptors=[Heartbeats()],
    )
    async with stories, stores, asyncio.timeout(120):
        running = await client.start_workflow(
            StoryWorkflow.run, text, id=story_workflow_id(story), task_queue=STORY_QUEUE
        )
        while (await running.query(StoryWorkflow.state)).pending_gate != "approve_scope":
            await asyncio.sleep(0.1)
        while not await rows(driver, "MATCH (s:Case {id: $id}) RETURN s.title", id=story):
            await asyncio.sleep(0.1)
        await rows(driver, LOSE, id=story)

        approve = Approve(gate="approve_scope", actor="ana", role="PO")
        await running.execute_update(StoryWorkflow.approve, approve)
        while not (
            failed := [
                entry.text
                for entry in await running.query(StoryWorkflow.timeline)
                if "WORK_FAILED" in entry.text or "WORK_FAILED" in entry.event
            ]
        ):
            await asyncio.sleep(0.1)
        done = await rebuild(client, graph, story, lambda *_: None)

        assert f"fleet graph rebuild {story}" in failed[0]
        assert done.refused == []
        asked = PackQuery(story_id=story, role="ARCHITECT", phase="DESIGN", known=True)
        assert "Undo the deletion" in (await graph.build_pack(asked)).context
        await running.terminate()
