"""Heartbeats for activities that have nothing to tell but that they are alive."""

import asyncio
from typing import Any

from temporalio import activity
from temporalio.worker import ActivityInboundInterceptor, ExecuteActivityInput, Interceptor


class Heartbeats(Interceptor):
    """Heartbeats thrice in every heartbeat time-out while an activity runs.

    So an activity whose worker was killed is given to another after that time-out, and not after
    its whole start-to-close. Not for activities that heartbeat with details of their own.
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
