"""Queries that get lost on their way are sent again.

A worker keeps one waiting query per workflow run. If more arrive for a run that has ended, it drops
some of them, and they are answered neither by it nor by the server before the caller gives up
(temporalio/sdk-rust, issues 438 and 578). Queries change nothing, so a query without an answer is
sent again.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

from temporalio.client import Interceptor, OutboundInterceptor, QueryWorkflowInput
from temporalio.service import RPCError, RPCStatusCode

FIRST_WAIT = timedelta(seconds=2)
"""How long the first try waits for its answer; each further try waits twice as long."""

ANSWER_WITHIN = timedelta(seconds=30)
"""How long all tries of a query wait together, unless its caller gives a time."""

NO_ANSWER = (RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.CANCELLED)


class RepeatedQueries(Interceptor):
    """Sends a query again if its answer does not come."""

    def intercept_client(self, next: OutboundInterceptor) -> OutboundInterceptor:
        """Put the repetition in front of `next`."""
        return _Repeating(next)


class _Repeating(OutboundInterceptor):
    async def query_workflow(self, input: QueryWorkflowInput) -> Any:
        clock = asyncio.get_running_loop()
        ends_at = clock.time() + (input.rpc_timeout or ANSWER_WITHIN).total_seconds()
        wait_s = FIRST_WAIT.total_seconds()
        while True:
            left_s = ends_at - clock.time()
            last = left_s <= wait_s
            timeout = timedelta(seconds=max(left_s if last else wait_s, 0.001))
            try:
                return await self.next.query_workflow(replace(input, rpc_timeout=timeout))
            except RPCError as error:
                if last or error.status not in NO_ANSWER:
                    raise
            wait_s *= 2
