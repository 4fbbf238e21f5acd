"""A job that one replica of a process does once a day."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from contextlib import suppress
from datetime import timedelta

import structlog
from prometheus_client import Counter
from redis.asyncio import Redis

EVERY = timedelta(days=1)
AGAIN_AFTER_S = 600.0

log = structlog.stdlib.get_logger(__name__)


class DailyJob(ABC):
    """Work of a process; of its replicas, one a day does it."""

    def __init__(self, valkey: Redis, turn: str, failures: Counter) -> None:
        """Plan the job.

        Args:
            valkey: what the replicas share.
            turn: the key in Valkey that the replica holds whose turn it is.
            failures: counts attempts that failed.
        """
        self._valkey, self._turn, self._failures = valkey, turn, failures
        self._stopping = asyncio.Event()
        self._running = False
        self._working: asyncio.Task[None] | None = None

    @abstractmethod
    async def work(self) -> None:
        """Do the work of a day; raise if it has to be tried again."""

    @property
    def is_running(self) -> bool:
        return self._running

    async def run(self) -> None:
        """Work until `shutdown`; after an outage of a server, try again."""
        self._running = True
        try:
            while not self._stopping.is_set():
                try:
                    if await self._valkey.set(self._turn, "", nx=True, ex=EVERY):
                        await self._work_or_free()
                except asyncio.CancelledError:
                    if not self._stopping.is_set():
                        raise
                except Exception as error:  # an outage or a bug must not stop the job  # noqa: BLE001
                    self._failures.inc()
                    log.warning("daily job not done yet", job=self._turn, error=repr(error))
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), AGAIN_AFTER_S)
        finally:
            self._running = False

    async def shutdown(self) -> None:
        """Start no further work, and cancel what runs: another replica takes its turn."""
        self._stopping.set()
        if self._working:
            self._working.cancel()

    async def _work_or_free(self) -> None:
        self._working = asyncio.create_task(self.work())
        if self._stopping.is_set():
            self._working.cancel()
        try:
            await self._working
        except BaseException:
            await self._valkey.delete(self._turn)
            raise
