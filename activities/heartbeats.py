"""Heartbeats of running activities: three per heartbeat timeout.

If a worker is killed, its activity is retried after that timeout, and not only after the whole
start-to-close timeout.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from temporalio import activity
from temporalio.worker import ActivityInboundInterceptor, ExecuteActivityInput, Interceptor


@asynccontextmanager
async def heartbeats(progress: Callable[[], Any] | None = None) -> AsyncIterator[None]:
    """Send heartbeats while the block runs; none if the activity has no heartbeat timeout.

    Args:
        progress: returns what each heartbeat reports.
    """
    timeout = activity.info().heartbeat_timeout
    if timeout is None:
        yield
        return

    async def beat() -> None:
        while True:
            await asyncio.sleep(timeout.total_seconds() / 3)
            activity.heartbeat(*([progress()] if progress else []))

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()


class Heartbeats(Interceptor):
    """Sends heartbeats for every activity of a worker, none of which reports progress itself."""

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        """Wrap the activity."""
        return _Heartbeating(next)


class _Heartbeating(ActivityInboundInterceptor):
    async def execute_activity(self, input: ExecuteActivityInput) -> Any:
        async with heartbeats():
            return await super().execute_activity(input)
