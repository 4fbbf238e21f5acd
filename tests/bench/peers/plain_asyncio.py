"""The calls in plain asyncio, with nothing stored."""

from __future__ import annotations

import asyncio

from openai import AsyncOpenAI

from tests.bench.peers.rounds import report
from tests.bench.replay import Body, repeat


async def main() -> None:
    async with AsyncOpenAI(max_retries=0) as client:

        async def deliberate(waves: list[list[Body]]) -> list[str]:
            answers: list[str] = []
            for wave in waves:
                replies = await asyncio.gather(*(repeat(client, body) for body in wave))
                answers += [reply.text for reply in replies]
            return answers

        await report(deliberate)


if __name__ == "__main__":
    asyncio.run(main())
