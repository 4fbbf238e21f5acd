"""The calls as activities of temporalio: a workflow, an activity and a worker as they come."""

from __future__ import annotations

import asyncio
import uuid
from datetime import timedelta

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import Worker

with workflow.unsafe.imports_passed_through():
    from openai import AsyncOpenAI

    from tests.bench.peers.rounds import TASK_QUEUE, given_address, report
    from tests.bench.replay import Body, repeat

CALL_TIMEOUT = timedelta(seconds=60)


class Calls:
    def __init__(self, client: AsyncOpenAI) -> None:
        self.client = client

    @activity.defn
    async def call(self, body: Body) -> str:
        return (await repeat(self.client, body)).text


@workflow.defn
class Deliberation:
    @workflow.run
    async def run(self, waves: list[list[Body]]) -> list[str]:
        answers: list[str] = []
        for wave in waves:
            calls = (
                workflow.execute_activity_method(
                    Calls.call, body, start_to_close_timeout=CALL_TIMEOUT
                )
                for body in wave
            )
            answers += await asyncio.gather(*calls)
        return answers


async def main() -> None:
    temporal = await Client.connect(given_address())
    async with (
        AsyncOpenAI(max_retries=0) as client,
        Worker(
            temporal,
            task_queue=TASK_QUEUE,
            workflows=[Deliberation],
            activities=[Calls(client).call],
        ),
    ):

        async def deliberate(waves: list[list[Body]]) -> list[str]:
            return await temporal.execute_workflow(
                Deliberation.run, waves, id=uuid.uuid4().hex, task_queue=TASK_QUEUE
            )

        await report(deliberate)


if __name__ == "__main__":
    asyncio.run(main())
