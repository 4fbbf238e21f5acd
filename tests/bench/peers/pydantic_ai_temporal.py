"""The calls as runs of an agent of pydantic-ai, whose model requests are activities.

The agent gets the messages and settings of the fleet's calls, and sends the same requests, except
that it does not stream: that is its default, and here it takes about half the time.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

from temporalio import workflow
from temporalio.client import Client
from temporalio.worker import Worker

with workflow.unsafe.imports_passed_through():
    from pydantic_ai.durable_exec.temporal import AgentPlugin, PydanticAIPlugin

    from tests.bench.peers.pydantic_ai_agent import AGENT
    from tests.bench.peers.rounds import TASK_QUEUE, given_address, report
    from tests.bench.replay import Body

SETTINGS = ("max_tokens", "seed", "temperature")


async def run(body: Body) -> str:
    """Run the agent with the messages and settings of a call."""
    system, user = (message["content"] for message in body["messages"])
    settings: Any = {name: body[name] for name in SETTINGS}
    result = await AGENT.run(user, instructions=system, model_settings=settings)
    text: str = result.output
    return text


@workflow.defn
class Deliberation:
    @workflow.run
    async def run(self, waves: list[list[Body]]) -> list[str]:
        answers: list[str] = []
        for wave in waves:
            answers += await asyncio.gather(*(run(body) for body in wave))
        return answers


async def main() -> None:
    temporal = await Client.connect(given_address(), plugins=[PydanticAIPlugin()])
    async with Worker(
        temporal,
        task_queue=TASK_QUEUE,
        workflows=[Deliberation],
        plugins=[AgentPlugin(AGENT)],
    ):

        async def deliberate(waves: list[list[Body]]) -> list[str]:
            return await temporal.execute_workflow(
                Deliberation.run, waves, id=uuid.uuid4().hex, task_queue=TASK_QUEUE
            )

        await report(deliberate)


if __name__ == "__main__":
    asyncio.run(main())
