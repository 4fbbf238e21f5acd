"""Daily jobs on a real Valkey: one replica works, and a stop hands its turn over."""

from __future__ import annotations

import asyncio
import uuid

from prometheus_client import CollectorRegistry, Counter
from redis.asyncio import Redis

from workers.daily_job import DailyJob


class Endless(DailyJob):
    """Work that takes longer than a worker may take to stop."""

    def __init__(self, valkey: Redis, turn: str) -> None:
        failures = Counter("test_failures", "Attempts that failed.", registry=CollectorRegistry())
        super().__init__(valkey, turn, failures)
        self.began, self.cancelled = asyncio.Event(), False

    async def work(self) -> None:
        self.began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


async def test_a_job_that_is_stopped_at_work_leaves_its_turn_to_another_replica(
    client: Redis,
) -> None:
    turn = f"turn-{uuid.uuid4()}"
    first, second = Endless(client, turn), Endless(client, turn)
    run = asyncio.create_task(first.run())
    await first.began.wait()

    await first.shutdown()
    await run
    assert first.cancelled
    assert not first.is_running

    other = asyncio.create_task(second.run())
    await second.began.wait()
    await second.shutdown()
    await other
