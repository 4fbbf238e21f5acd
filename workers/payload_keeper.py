"""Keeping and collecting the payloads in Valkey that histories refer to.

Every payload expires PAYLOAD_DAYS after it was stored or renewed. Once a day, those of all open
runs are renewed. So a payload outlives its run's end by PAYLOAD_DAYS less a day, and Temporal
deletes the history before that. A payload without an expiry gets one: older releases kept all.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from datetime import timedelta

import structlog
from prometheus_client import Counter
from redis.asyncio import Redis
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from workers.clients.connection import StartError
from workers.clients.temporal import retention
from workers.external_storage import payload_key
from workers.payload_codec import payloads_of

SPARE = timedelta(days=7)
"""How much longer payloads are kept than ended histories: the longest outage of this job."""

EVERY = timedelta(days=1)
AGAIN_AFTER_S = 600.0
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


class PayloadKeeper:
    """A job of the process `story`; of its replicas, one a day does the work."""

    def __init__(self, temporal: Client, valkey: Redis, keep_for: timedelta) -> None:
        self._temporal, self._valkey, self._keep_for = temporal, valkey, keep_for
        self._stopping = asyncio.Event()
        self._running = False

    @property
    def is_running(self) -> bool:
        return self._running

    async def run(self) -> None:
        """Renew until `shutdown`; after an outage of a server, try again."""
        self._running = True
        turn = f"swe:payloads-renewed:{self._temporal.namespace}"
        try:
            while not self._stopping.is_set():
                try:
                    if await self._valkey.set(turn, "", nx=True, ex=EVERY):
                        await self._renew_or_free(turn)
                except Exception as error:  # an outage or a bug must not stop the job  # noqa: BLE001
                    FAILURES.inc()
                    log.warning("payloads not renewed yet", error=repr(error))
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), AGAIN_AFTER_S)
        finally:
            self._running = False

    async def shutdown(self) -> None:
        """Start no more renewals."""
        self._stopping.set()

    async def _renew_or_free(self, turn: str) -> None:
        try:
            renewed = await self.renew()
        except BaseException:
            await self._valkey.delete(turn)
            raise
        log.info("payloads renewed", payloads=renewed)

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
