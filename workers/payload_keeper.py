"""Keeping and collecting the payloads in Valkey that histories refer to.

Every payload expires PAYLOAD_DAYS after it was stored or renewed. Once a day, those of all open
runs are renewed. So a payload outlives its run's end by PAYLOAD_DAYS less a day, and Temporal
deletes the history before that. A payload without an expiry gets one: older releases kept all.
"""

from __future__ import annotations

import re
from datetime import timedelta

import structlog
from prometheus_client import Counter
from redis.asyncio import Redis
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from workers.clients.connection import StartError
from workers.clients.temporal import retention
from workers.daily_job import DailyJob
from workers.external_storage import payload_key
from workers.payload_codec import payloads_of

SPARE = timedelta(days=7)
"""How much longer payloads are kept than ended histories: the longest outage of this job."""

BATCH = 500

RENEWED = Counter("fleet_payloads_renewed", "Payloads of open runs whose expiry was renewed")
FAILURES = Counter("fleet_payload_renewal_failures", "Renewals that failed, and are tried again")

CLAIM = re.compile(rb'"sha256":\s*"([0-9a-f]{64})"')

log = structlog.stdlib.get_logger(__name__)


async def require_kept(temporal: Client, keep_for: timedelta) -> None:
    """Raise StartError if the namespace keeps histories longer than their payloads."""
    needed = await retention(temporal) + SPARE
    if keep_for < needed:
        raise StartError(
            f"PAYLOAD_DAYS is {keep_for.days}, but the namespace {temporal.namespace} keeps "
            f"histories for {(needed - SPARE).days} days: set it to {needed.days} or more"
        )


class PayloadKeeper(DailyJob):
    """A job of the process `story`."""

    def __init__(self, temporal: Client, valkey: Redis, keep_for: timedelta) -> None:
        super().__init__(valkey, f"swe:payloads-renewed:{temporal.namespace}", FAILURES)
        self._temporal, self._keep_for = temporal, keep_for

    async def work(self) -> None:
        """Renew the payloads, as `renew`."""
        log.info("payloads renewed", payloads=await self.renew())

    async def renew(self) -> int:
        """Renew the payloads of all open runs, and give an expiry to those that have none.

        Returns:
            The number of renewed payloads.

        Raises:
            RPCError: Temporal does not answer.
            RedisError: Valkey does not answer.
        """
        renewed = 0
        async for run in self._temporal.list_workflows("ExecutionStatus = 'Running'"):
            handle = self._temporal.get_workflow_handle(run.id, run_id=run.run_id)
            claims: set[str] = set()
            try:
                async for event in handle.fetch_history_events():
                    for payload in payloads_of(event):
                        if payload.external_payloads:
                            claims |= {each.decode() for each in CLAIM.findall(payload.data)}
            except RPCError as error:
                if error.status != RPCStatusCode.NOT_FOUND:  # it has been deleted meanwhile
                    raise
            await self._expire([payload_key(each) for each in sorted(claims)])
            renewed += len(claims)
        RENEWED.inc(renewed)
        keys: list[str] = []
        async for key in self._valkey.scan_iter(match=payload_key("*"), count=BATCH):
            keys.append(key.decode() if isinstance(key, bytes) else key)
            if len(keys) == BATCH:
                await self._expire(keys, only_without=True)
                keys = []
        await self._expire(keys, only_without=True)
        return renewed

    async def _expire(self, keys: list[str], *, only_without: bool = False) -> None:
        async with self._valkey.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.pexpire(key, self._keep_for, nx=only_without)
            await pipe.execute()
