"""Temporal keeps what it has confirmed through a crash, and no story has to wait for another."""

import asyncio
import uuid
from datetime import timedelta

from temporalio import activity, workflow
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import WorkflowHandle
from temporalio.common import Priority
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from bridge.mirror.source import read_source
from tests.support.fleet import connect
from tests.support.polling import until
from tests.support.servers import RunningServer


async def test_a_started_workflow_survives_a_crash(temporal: RunningServer) -> None:
    client = await connect(temporal.address)
    started = await client.start_workflow(
        "NobodyRunsThis", id=f"crash-{uuid.uuid4()}", task_queue="nobody"
    )

    source = await read_source(client)

    await temporal.kill()
    await temporal.start()

    again = await connect(temporal.address)
    description = await again.get_workflow_handle(started.id).describe()
    assert description.run_id == started.result_run_id
    assert await read_source(again) == source  # the source of the fleet's events on the bus
    assert str(uuid.UUID(source.cluster_id)) == source.cluster_id
    await again.get_workflow_handle(started.id).terminate()


class Calls:
    """An activity that records the order of the stories' calls."""

    def __init__(self) -> None:
        self.order: list[str] = []

    @activity.defn
    async def call(self, story: str) -> None:
        self.order.append(story)


@workflow.defn
class Asking:
    """A story that makes many calls at once."""

    @workflow.run
    async def run(self, story: str, calls: int, queue: str) -> None:
        await asyncio.gather(
            *(
                workflow.execute_activity_method(
                    Calls.call,
                    story,
                    task_queue=queue,
                    start_to_close_timeout=timedelta(seconds=30),
                    priority=Priority(fairness_key=story),
                )
                for _ in range(calls)
            )
        )


@workflow.defn
class Ended:
    """A workflow that ends at once and answers queries."""

    @workflow.run
    async def run(self) -> None:
        pass

    @workflow.query
    def answer(self) -> int:
        return 42


async def test_no_query_of_an_ended_workflow_is_lost_when_many_come_at_once(
    temporal: RunningServer,
) -> None:
    client = await connect(temporal.address)
    queue = f"ended-{uuid.uuid4()}"
    async with Worker(
        client, task_queue=queue, workflows=[Ended], workflow_runner=UnsandboxedWorkflowRunner()
    ):
        for turn in range(40):
            handle = await client.start_workflow("Ended", id=f"{queue}-{turn}", task_queue=queue)
            await handle.result()

            answers = await asyncio.gather(*(handle.query(Ended.answer) for _ in range(4)))

            assert answers == [42] * 4


async def test_a_large_story_does_not_delay_a_small_one(temporal: RunningServer) -> None:
    client = await connect(temporal.address)
    engine, name = Calls(), f"fair-{uuid.uuid4()}"
    asking = Worker(
        client, task_queue=name, workflows=[Asking], workflow_runner=UnsandboxedWorkflowRunner()
    )
    answering = Worker(
        client, task_queue=f"{name}-calls", activities=[engine.call], max_concurrent_activities=1
    )

    async def ask(story: str, calls: int) -> None:
        handle = await client.start_workflow(
            Asking.run, args=[story, calls, f"{name}-calls"], id=f"{name}-{story}", task_queue=name
        )
        started.append(handle)

    async def backlog(calls: int) -> None:
        """Wait until that many calls are in the queue."""
        request = DescribeTaskQueueRequest(
            namespace=client.namespace,
            task_queue=TaskQueue(name=f"{name}-calls"),
            task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY,
            report_stats=True,
        )
        await until(
            lambda: client.workflow_service.describe_task_queue(request),
            lambda answer: answer.stats.approximate_backlog_count >= calls,
        )

    started: list[WorkflowHandle[Asking, None]] = []
    async with asking:
        await ask("big", 200)
        await backlog(200)
        await ask("small", 5)
        await backlog(205)
        async with answering:
            await asyncio.gather(*(handle.result() for handle in started))

    assert len(engine.order) == 205
    last_of_small = max(place for place, story in enumerate(engine.order) if story == "small")
    # Without fairness the small story's calls would be the last five. The server shares out each
    # partition of the queue by itself, so that how soon exactly they come differs from run to run.
    assert last_of_small < 100, engine.order
