"""Heartbeats for activities that have no progress to report."""

import asyncio
from typing import Any

from temporalio import activity
from temporalio.worker import ActivityInboundInterceptor, ExecuteActivityInput, Interceptor


class Heartbeats(Interceptor):
    """An interceptor that heartbeats three times per heartbeat timeout while an activity runs.

    If a worker is killed, its activity is retried after that timeout, and not only after the whole
    start-to-close timeout. Not for activities that send heartbeats with details.
    """

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        """Wrap the activity."""
        return _Heartbeating(next)


class _Heartbeating(ActivityInboundInterceptor):
    async def execute_activity(self, input: ExecuteActivityInput) -> Any:
        timeout = activity.info().heartbeat_timeout
        if timeout is None:
            return await super().execute_activity(input)

        async def beat() -> None:
            while True:
                await asyncio.sleep(timeout.total_seconds() / 3)
                activity.heartbeat()

        beating = asyncio.create_task(beat())
        try:
            return await super().execute_activity(input)
        finally:
            beating.cancel()
