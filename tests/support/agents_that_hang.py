"""The process `agents`, except that it never reports an external agent's answer to Temporal.

A test kills it at that point. It prints `completing` where it would have called Temporal.
"""

from __future__ import annotations

import asyncio

from temporalio.client import (
    CompleteAsyncActivityInput,
    Interceptor,
    OutboundInterceptor,
)
from temporalio.plugin import SimplePlugin

from workers.run import ready, run_until
from workers.settings import load


class Hanging(Interceptor):
    """An interceptor that replaces the call to Temporal."""

    def intercept_client(self, next: OutboundInterceptor) -> OutboundInterceptor:
        return _Hangs(next)


class _Hangs(OutboundInterceptor):
    async def complete_async_activity(self, input: CompleteAsyncActivityInput) -> None:
        print("completing", flush=True)
        await asyncio.Event().wait()


async def main() -> None:
    plugin = SimplePlugin("hanging", interceptors=[Hanging()])
    async with ready("agents", load(), plugins=[plugin]) as process:
        await run_until(list(process.jobs.values()), asyncio.Event(), process.lost)


if __name__ == "__main__":
    asyncio.run(main())
