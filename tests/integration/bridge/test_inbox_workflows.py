"""Messages on the bus, as the stories' workflows and the people who look at them see them."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from nats.js import JetStreamContext
from neo4j import AsyncDriver
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.service import RPCError, RPCStatusCode

from activities.graph.activities import Graph
from bridge.mirror.story_sweep import StorySweep
from tests.support.fleet import new_environment, whole_fleet
from tests.support.llm_server import LlmServer
from tests.support.polling import WITHIN_S, until
from tests.support.servers import RunningServer, Servers
from tests.support.site import SAMPLE_STORY
from workflows.models.ids import plan_workflow_id

APPROVED = "planning.plan.approved"


@pytest.fixture
async def fleet(
    servers: Servers, llm: LlmServer, jetstream: JetStreamContext
) -> AsyncIterator[Client]:
    """Run a whole fleet, inbox included, in one process and a new namespace; yield a client."""
    llm.delay_ms = 500
    async with whole_fleet(await new_environment(servers, llm, STORY_SWEEP_SECONDS="1")) as client:
        yield client


def a_story() -> str:
    return f"US-{uuid.uuid4().hex[:10]}"


async def send(jetstream: JetStreamContext, subject: str, body: dict[str, Any]) -> None:
    await jetstream.publish(subject, json.dumps(body).encode())


async def ended(client: Client, workflow_id: str) -> dict[str, Any]:
    """Wait until a workflow exists, and return its result."""
    handle = client.get_workflow_handle(workflow_id)

    async def there() -> bool:
        try:
            await handle.describe()
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            return False
        return True

    await until(there)
    result: dict[str, Any] = await handle.result()
    return result


async def test_a_plan_approved_outside_is_stored_and_runs_or_ends_as_nothing_to_run(
    fleet: Client, jetstream: JetStreamContext, driver: AsyncDriver
) -> None:
    unknown, known, of_roles = a_story(), a_story(), f"{a_story()} 1.2:a"
    async with driver.session() as session:
        await session.run(
            "CREATE (:Case:Story {id: $id, case_id: $id, title: 'Undo', status: 'DESIGN'})",
            id=known,
        )

    await send(jetstream, APPROVED, {"story_id": unknown, "plan_id": "plan-1"})
    await send(jetstream, APPROVED, {"story_id": known, "plan_id": "plan-1", "approved_by": "ana"})

    roles = ["developer", "QA"]
    await send(jetstream, APPROVED, {"story_id": of_roles, "plan_id": "plan-1", "roles": roles})

    nothing = await ended(fleet, f"plan-{unknown}-plan-1")
    assert nothing["status"] == "NOTHING_TO_RUN"
    derived = await ended(fleet, f"plan-{known}-plan-1")
    assert derived["status"] == "COMPLETED"
    deliberated = await ended(fleet, plan_workflow_id(of_roles, "plan-1"))
    assert deliberated["status"] == "COMPLETED"
    assert [outcome["role"] for outcome in deliberated["outcomes"]] == ["DEV", "QA"]
    async with driver.session() as session:
        found = await (
            await session.run(
                "MATCH (s:Story)<-[:OF]-(a:PlanApproval)-[:APPROVES]->(p:PlanVersion) "
                "WHERE s.id IN $ids RETURN s.id AS id, a.approved_by AS by, p.status AS status",
                ids=[unknown, known],
            )
        ).data()
    by_story = {row["id"]: (row["by"], row["status"]) for row in found}
    assert by_story == {unknown: ("unknown", "NOTHING_TO_RUN"), known: ("ana", "COMPLETED")}

    # A second approval of the same plan is stored, and nothing runs again.
    await send(jetstream, APPROVED, {"story_id": unknown, "plan_id": "plan-1"})

    async def acked() -> bool:
        info = await jetstream.consumer_info("PLANNING_EVENTS", "orch-planning-plan-approved")
        return not (info.num_pending or 0) + (info.num_ack_pending or 0)

    await until(acked)
    runs = [each async for each in fleet.list_workflows(f"WorkflowId = 'plan-{unknown}-plan-1'")]
    assert [run.status for run in runs] == [WorkflowExecutionStatus.COMPLETED]


async def test_a_milestone_and_a_decision_reach_the_running_story_and_its_agents(
    fleet: Client, jetstream: JetStreamContext, llm: LlmServer
) -> None:
    llm.answering.clear()
    story = a_story()
    sample = json.loads(SAMPLE_STORY.read_text())
    handle = await fleet.start_workflow(
        "StoryWorkflow",
        sample | {"story_id": story, "approvals": "auto"},
        id=f"story-{story}",
        task_queue="story",
    )

    async def proposing() -> bool:
        return any(call.act == "propose" for call in llm.calls)

    await until(proposing)
    decision = {"story_id": story, "decision_id": "d-1", "title": "No cookies at all"}
    await send(
        jetstream,
        "context.decision.added",
        decision | {"rationale": "law", "decided_by": "ana"},
    )
    milestone = {"story_id": story, "milestone_id": "m-1", "event_type": "DEMO"}
    await send(
        jetstream,
        "context.milestone.reached",
        milestone | {"description": "Users saw the prototype"},
    )
    council = fleet.get_workflow_handle((await handle.query("state"))["child"])

    async def received() -> set[str]:
        events = (await council.fetch_history()).events
        return {e.workflow_execution_signaled_event_attributes.signal_name for e in events}

    await until(received, lambda signals: {"add_decisions", "add_milestones"} <= signals)
    llm.answering.set()

    async def agents_know() -> bool:
        later = [call.prompt for call in llm.calls if call.act in ("criticise", "revise")]
        return any("No cookies" in each and "saw the prototype" in each for each in later)

    await until(agents_know)
    timeline = await handle.query("timeline")
    assert [line["text"] for line in timeline if line["event"] == "DEMO"] == [
        "Users saw the prototype"
    ]
    await handle.terminate()


async def test_while_temporal_is_away_nothing_is_acknowledged_nor_dead_lettered(
    fleet: Client, jetstream: JetStreamContext, temporal: RunningServer
) -> None:
    story = a_story()

    async def listening() -> bool:
        consumer = await jetstream.consumer_info("PLANNING_EVENTS", "orch-planning-plan-approved")
        return bool(consumer.num_waiting)

    await until(listening)  # an inbox that still starts would wait for Temporal first
    await temporal.kill()
    await send(jetstream, APPROVED, {"story_id": story, "plan_id": "plan-1"})

    async def held() -> bool:
        info = await jetstream.consumer_info("PLANNING_EVENTS", "orch-planning-plan-approved")
        return bool(info.num_ack_pending)

    await until(held)
    await temporal.start()

    assert (await ended(fleet, f"plan-{story}-plan-1"))["status"] == "NOTHING_TO_RUN"
    assert (await jetstream.stream_info("DEAD_LETTERS")).state.messages == 0


async def test_a_terminated_story_is_announced_once_as_cancelled(
    fleet: Client, jetstream: JetStreamContext, driver: AsyncDriver, graph: Graph
) -> None:
    story = a_story()
    sample = json.loads(SAMPLE_STORY.read_text())
    handle = await fleet.start_workflow(
        "StoryWorkflow", sample | {"story_id": story}, id=f"story-{story}", task_queue="story"
    )
    ends = await jetstream.subscribe("planning.story.cancelled")

    async def waits_and_is_published() -> bool:
        left = await handle.query("outbox")
        return bool((await handle.query("state"))["pending_gate"]) and not left["entries"]

    await until(waits_and_is_published)
    async with driver.session() as session:
        await session.run("CREATE (:Received {id: $id, received_ms: 0})", id=f"old-{story}")
    sweep = StorySweep(fleet, graph, timedelta(seconds=0.5))  # in addition to the fleet's own
    sweeping = asyncio.create_task(sweep.run())
    await handle.terminate(reason="no longer wanted")

    async with asyncio.timeout(WITHIN_S):
        end: dict[str, Any] = {}
        while end.get("story_id") != story:
            end = json.loads((await ends.next_msg(WITHIN_S)).data)
    await sweep.shutdown()
    await sweeping
    assert (end["status"], end["reason"]) == ("CANCELLED", "terminated: no longer wanted")
    async with driver.session() as session:
        found = await session.run("MATCH (s:Story {id: $id}) RETURN s.status AS status", id=story)
        assert (await found.single(strict=True))["status"] == "CANCELLED"
        old = await session.run("MATCH (n:Received {id: $id}) RETURN n", id=f"old-{story}")
        assert await old.single() is None
    assert await StorySweep(fleet, graph, timedelta(seconds=1)).sweep() == 0
    closures = f"WorkflowType = 'StoryClosureWorkflow' AND WorkflowId STARTS_WITH 'closure-{story}'"
    assert len([each async for each in fleet.list_workflows(closures)]) == 1
    rest = [json.loads(message.data) for message in await _waiting(ends)]
    assert [each for each in rest if each["story_id"] == story] == []


async def _waiting(subscription: Any) -> list[Any]:
    return [await subscription.next_msg(WITHIN_S) for _ in range(subscription.pending_msgs)]
