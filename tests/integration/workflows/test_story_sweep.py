"""Stories whose workflow ended early, on real servers: their end is stored and published once."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from nats.aio.client import Client as Nats
from nats.js import JetStreamContext
from neo4j import AsyncDriver
from temporalio.api.command.v1 import Command, FailWorkflowExecutionCommandAttributes
from temporalio.api.enums.v1 import CommandType
from temporalio.api.failure.v1 import ApplicationFailureInfo, Failure
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import (
    PollWorkflowTaskQueueRequest,
    RespondWorkflowTaskCompletedRequest,
)
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowHandle

from activities.graph.activities import Graph
from bridge.executions import find_execution
from bridge.mirror.story_sweep import FAILURES, NOT_REPLAYED, StorySweep
from tests.support.fleet import (
    Environment,
    connect,
    new_environment,
    running,
    whole_fleet,
)
from tests.support.llm_server import LlmServer
from tests.support.polling import WITHIN_S, until
from tests.support.servers import RunningServer, Servers
from tests.support.site import SAMPLE_STORY
from workflows.models.agents import PlannedTask
from workflows.models.ids import closure_workflow_id, story_of

SAMPLE = json.loads(SAMPLE_STORY.read_text())

Story = WorkflowHandle[Any, Any]


@pytest.fixture
async def environment(servers: Servers, llm: LlmServer) -> Environment:
    """Return the variables of a whole fleet that does not sweep, because the tests do."""
    return await new_environment(servers, llm, STORY_SWEEP_SECONDS="86400")


@pytest.fixture
async def temporal_client(environment: Environment) -> Client:
    return await connect(environment["TEMPORAL_ADDRESS"], environment["TEMPORAL_NAMESPACE"])


@pytest.fixture
async def fleet(environment: Environment, jetstream: JetStreamContext) -> AsyncIterator[Client]:
    async with whole_fleet(environment) as client:
        yield client


@pytest.fixture
def sweep(temporal_client: Client, graph: Graph) -> StorySweep:
    return StorySweep(temporal_client, graph, timedelta(seconds=0.5))


async def start(client: Client, **fields: Any) -> Story:
    story_id = f"US-{uuid.uuid4().hex[:10]}"
    options = {"execution_timeout": fields.pop("execution_timeout", None)}
    return await client.start_workflow(
        "StoryWorkflow",
        SAMPLE | {"story_id": story_id} | fields,
        id=f"story-{story_id}",
        task_queue="story",
        **options,
    )


async def gates(story: Story, *names: str) -> None:
    """Wait until exactly these gates are open."""

    async def are_open() -> bool:
        view = await story.query("state")
        return sorted(view["open_gates"]) == sorted(names)

    await until(are_open)


async def all_is_published(story: Story) -> None:
    async def nothing_left() -> bool:
        return not (await story.query("outbox"))["entries"]

    await until(nothing_left)


async def closed(sweep: StorySweep) -> None:
    """Sweep until a closure is started, because visibility lags slightly."""
    assert await until(sweep.sweep) == 1


async def closed_by_any(client: Client, sweep: StorySweep, story: Story) -> None:
    """Sweep until the story's closure is started: a fleet that starts sweeps too."""
    run_id = story.first_execution_run_id
    assert run_id

    async def has_closure() -> bool:
        await sweep.sweep()
        return (
            await find_execution(client, closure_workflow_id(story_of(story.id), run_id))
            is not None
        )

    await until(has_closure)


async def events(jetstream: JetStreamContext, story: Story, last: str) -> list[dict[str, Any]]:
    """Return the story's events on the stream, with their subjects, up to the subject `last`."""
    subscription = await jetstream.subscribe("planning.>", ordered_consumer=True)
    found: list[dict[str, Any]] = []
    async with asyncio.timeout(WITHIN_S):
        while not found or found[-1]["subject"] != last:
            message = await subscription.next_msg(WITHIN_S)
            body = json.loads(message.data)
            if f"story-{body['story_id']}" == story.id:
                found.append(body | {"subject": message.subject})
    await subscription.unsubscribe()
    return found


async def status(driver: AsyncDriver, story: Story) -> str:
    """Return the story's status in the graph; empty if it is not there yet."""
    found = await driver.execute_query(
        "MATCH (s:Story {id: $id}) RETURN s.status AS status",
        id=story.id.removeprefix("story-"),
    )
    return str(found.records[0]["status"]) if found.records else ""


CANCELLED = "planning.story.cancelled"


async def test_a_story_that_timed_out_has_failed(
    fleet: Client, sweep: StorySweep, jetstream: JetStreamContext, driver: AsyncDriver
) -> None:
    story = await start(fleet, execution_timeout=timedelta(seconds=30))
    await gates(story, "approve_scope")

    await closed(sweep)
    *_, gate, end = await events(jetstream, story, CANCELLED)

    assert (gate["subject"], gate["gate"]) == ("planning.gate.closed", "approve_scope")
    assert (end["status"], end["actor"], end["reason"]) == ("FAILED", "temporal", "timed out")
    assert await status(driver, story) == "FAILED"
    assert await sweep.sweep() == 0


async def test_a_plan_that_waited_for_its_approval_ends_with_its_story(
    fleet: Client, sweep: StorySweep, driver: AsyncDriver, jetstream: JetStreamContext
) -> None:
    story = await start(fleet)
    await gates(story, "approve_scope")
    view = await story.query("state")
    approval = {"gate": "approve_scope", "actor": "ana", "role": "PO"}
    await story.execute_update("approve", approval | {"revision": view["revision"]})
    await gates(story, "approve_design")
    await all_is_published(story)

    await story.terminate(reason="no longer wanted")
    await closed(sweep)

    *_, plan, end = await events(jetstream, story, CANCELLED)
    assert (plan["subject"], plan["status"]) == ("planning.plan.completed", "CANCELLED")
    assert plan["timestamp"] == end["timestamp"]
    found = await driver.execute_query(
        "MATCH (p:PlanVersion {case_id: $id}) "
        "RETURN p.status AS plan, [(p)-[:HAS_SUBTASK]->(t) | t.status] AS tasks",
        id=story.id.removeprefix("story-"),
    )
    (stored,) = found.records
    assert stored["plan"] == "CANCELLED"
    assert set(stored["tasks"]) == {"CANCELLED"}


async def test_every_gate_that_is_open_is_closed(
    fleet: Client, sweep: StorySweep, jetstream: JetStreamContext
) -> None:
    story = await start(fleet, token_budget=1)
    await gates(story, "approve_scope")
    call = {"act": "propose", "agent_id": "a", "role": "DEV", "model": "m", "tokens_out": 9}
    late = {"workflow_id": "deliberation-that-was-stopped", "wave": "run/2", "usage": [call]}
    await story.signal("request_wave", late)
    await gates(story, "budget", "approve_scope")
    await all_is_published(story)

    await story.terminate(reason="no longer wanted")
    await closed(sweep)

    *_, one, two, end = await events(jetstream, story, CANCELLED)
    assert [(each["gate"], each["role"]) for each in (one, two)] == [
        ("budget", "PO"),
        ("approve_scope", "PO"),
    ]
    assert (end["status"], end["reason"]) == ("CANCELLED", "terminated: no longer wanted")


async def test_what_a_run_and_a_sweep_left_while_nats_was_away_goes_out_once_and_in_order(
    fleet: Client,
    sweep: StorySweep,
    graph: Graph,
    jetstream: JetStreamContext,
    driver: AsyncDriver,
    nats_server: RunningServer,
    nats_client: Nats,
) -> None:
    await nats_server.kill()
    story = await start(fleet)
    await gates(story, "approve_scope")

    async def recorded() -> bool:
        return await status(driver, story) == "DRAFT"

    await until(recorded)
    await story.terminate(reason="no longer wanted")
    await closed(sweep)
    later = StorySweep(fleet, graph, timedelta(seconds=0.5))
    assert await later.sweep() == 0  # the closure exists and waits
    await nats_server.start()
    await until(lambda: nats_client.is_connected)
    found = await events(jetstream, story, CANCELLED)

    assert [each["subject"].removeprefix("planning.") for each in found] == [
        "story.created",
        "story.transitioned",
        "gate.opened",
        "gate.closed",
        "story.cancelled",
    ]
    assert await status(driver, story) == "CANCELLED"
    assert await later.sweep() == 0


async def test_a_sweep_is_repeated_after_an_outage_of_the_graph(
    fleet: Client,
    sweep: StorySweep,
    jetstream: JetStreamContext,
    driver: AsyncDriver,
    neo4j_server: RunningServer,
) -> None:
    story = await start(fleet)
    await gates(story, "approve_scope")
    await all_is_published(story)
    before = FAILURES._value.get()
    await neo4j_server.kill()
    await story.terminate(reason="out of scope")
    sweeping = asyncio.create_task(sweep.run())

    async def failed() -> bool:
        return bool(FAILURES._value.get() > before)

    await until(failed)  # the driver retries for half a minute
    await neo4j_server.start()
    *_, end = await events(jetstream, story, CANCELLED)
    await sweep.shutdown()
    await sweeping

    assert end["reason"] == "terminated: out of scope"
    assert await status(driver, story) == "CANCELLED"


async def test_a_story_that_failed_has_failed(
    environment: Environment,
    temporal_client: Client,
    sweep: StorySweep,
    jetstream: JetStreamContext,
    driver: AsyncDriver,
) -> None:
    async with running("all", environment):
        story = await start(temporal_client)
        await gates(story, "approve_scope")
        await all_is_published(story)
    await story.signal("add_milestone", {"milestone_id": "m", "event_type": "E"})
    await fail(temporal_client, "a release that gives up")

    async with running("all", environment):
        await closed_by_any(temporal_client, sweep, story)
        *_, gate, end = await events(jetstream, story, CANCELLED)

    assert gate["gate"] == "approve_scope"
    assert (end["status"], end["actor"]) == ("FAILED", "temporal")
    assert end["reason"] == f"failed: a release that gives up; {NOT_REPLAYED}"
    assert await status(driver, story) == "FAILED"


async def test_a_council_that_ignores_cancellations_is_stopped_with_a_story_that_cannot_be_replayed(
    environment: Environment, temporal_client: Client, sweep: StorySweep, llm: LlmServer
) -> None:
    llm.delay_ms = 300_000
    async with running("all", environment):
        story = await start(temporal_client, approvals="auto")

        async def at_work() -> str:
            child: str = (await story.query("state")).get("child", "")
            return child if llm.calls else ""

        council = temporal_client.get_workflow_handle(await until(at_work))
        await council.signal("outlive")
    await story.signal("add_milestone", {"milestone_id": "m", "event_type": "E"})
    await fail(temporal_client, "a release that gives up")

    async with running("all", environment):
        await closed_by_any(temporal_client, sweep, story)

        async def ended() -> bool:
            return bool((await council.describe()).close_time)

        await until(ended)
    assert (await council.describe()).status == WorkflowExecutionStatus.CANCELED


async def fail(client: Client, message: str) -> None:
    """Fail the workflow that has the next task, as a worker of another release would."""
    service, queue = client.workflow_service, TaskQueue(name="story")
    task = await until(
        lambda: service.poll_workflow_task_queue(
            PollWorkflowTaskQueueRequest(
                namespace=client.namespace, task_queue=queue, identity="another release"
            )
        )
    )
    failure = Failure(
        message=message, application_failure_info=ApplicationFailureInfo(non_retryable=True)
    )
    await service.respond_workflow_task_completed(
        RespondWorkflowTaskCompletedRequest(
            namespace=client.namespace,
            task_token=task.task_token,
            identity="another release",
            commands=[
                Command(
                    command_type=CommandType.COMMAND_TYPE_FAIL_WORKFLOW_EXECUTION,
                    fail_workflow_execution_command_attributes=(
                        FailWorkflowExecutionCommandAttributes(failure=failure)
                    ),
                )
            ],
        )
    )


async def failed_councils(jetstream: JetStreamContext, count: int) -> list[dict[str, Any]]:
    subscription = await jetstream.subscribe(
        "orchestration.deliberation.failed", ordered_consumer=True
    )
    found = [json.loads((await subscription.next_msg(WITHIN_S)).data) for _ in range(count)]
    await subscription.unsubscribe()
    return found


async def test_a_council_without_a_story_that_is_terminated_has_failed(
    fleet: Client,
    sweep: StorySweep,
    llm: LlmServer,
    jetstream: JetStreamContext,
    driver: AsyncDriver,
) -> None:
    llm.answering.clear()
    task_id = f"alone-{uuid.uuid4().hex[:10]}"
    council = await fleet.start_workflow(
        "DeliberationWorkflow",
        {"task_id": task_id, "role": "DEV", "description": "Limit requests"},
        id=f"deliberation-{task_id}",
        task_queue="story",
    )
    await until(lambda: len(llm.calls) >= 3)

    await council.terminate(reason="asked twice")
    await closed(sweep)

    (failed,) = await failed_councils(jetstream, 1)
    assert (failed["task_id"], failed["error_type"]) == (task_id, "Terminated")
    assert failed["error"] == "terminated: asked twice"
    found = await driver.execute_query(
        "MATCH (d:Deliberation {task_id: $task_id}) RETURN d.status AS status", task_id=task_id
    )
    assert [record["status"] for record in found.records] == ["FAILED"]
    assert await sweep.sweep() == 0


async def test_a_plan_from_the_bus_that_is_terminated_is_cancelled_with_its_tasks(
    fleet: Client, sweep: StorySweep, llm: LlmServer, driver: AsyncDriver
) -> None:
    llm.answering.clear()
    story_id = f"US-{uuid.uuid4().hex[:10]}"
    first, second = (
        PlannedTask(task_id=f"{story_id}-t{n}", role="DEV", title="A task", description="Do it")
        for n in (1, 2)
    )
    tasks = [first, second.model_copy(update={"depends_on": [first.task_id]})]
    plan = await fleet.start_workflow(
        "PlanWorkflow",
        {
            "story_id": story_id,
            "plan_id": f"{story_id}-p",
            "tasks": [task.model_dump() for task in tasks],
        },
        id=f"plan-{story_id}-{story_id}-p",
        task_queue="story",
    )
    await until(lambda: len(llm.calls) >= 3)

    await plan.terminate(reason="not wanted")
    await closed(sweep)

    async def ended() -> bool:
        found = await driver.execute_query(
            "MATCH (p:PlanVersion {case_id: $id}) RETURN p.status AS status", id=story_id
        )
        return [row["status"] for row in found.records] == ["CANCELLED"]

    await until(ended)
    found = await driver.execute_query(
        "MATCH (t:Subtask {case_id: $id}) RETURN t.id AS id, t.status AS status ORDER BY id",
        id=story_id,
    )
    assert [row["status"] for row in found.records] == ["CANCELLED"] * 2
