"""A process from its start to its end: open, check, run, drain."""

import asyncio
import signal
from collections.abc import Sequence
from contextlib import AsyncExitStack, nullcontext
from typing import Any

import structlog
from temporalio.worker import Worker

from workers import health, telemetry
from workers.clients.temporal import open_temporal
from workers.clients.valkey import open_valkey
from workers.external_storage import data_converter
from workers.health import Check
from workers.processes import PROCESSES, Base, load_process
from workers.settings import Settings

ALL = "all"

log = structlog.stdlib.get_logger(__name__)


async def run(name: str, settings: Settings) -> None:
    """Open, check and prepare everything, then run the workers of process `name`.

    Raises:
        StartError: something outside is wrong; nothing runs then.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runtime, plugins = telemetry.start(settings, name)
    async with AsyncExitStack() as opened:
        valkey = await opened.enter_async_context(open_valkey(settings))
        temporal = await open_temporal(settings, data_converter(valkey), runtime, plugins)
        base = Base(settings, temporal, valkey)
        names = list(PROCESSES) if name == ALL else [name]
        running = [await opened.enter_async_context(load_process(each)(base)) for each in names]
        workers = [each.worker for each in running]

        checks: dict[str, Check] = {**base.checks, "workers": all_run(workers)}
        for each in running:
            checks |= each.checks
        opened.enter_context(
            health.serve(settings.health_host, settings.health_port, checks)
            if settings.health_port
            else nullcontext()
        )
        log.info("workers run", queues=[worker.task_queue for worker in workers])
        await run_until(workers, stop, base.lost)
        log.info("workers stopped")


async def run_until(
    workers: Sequence[Worker], stop: asyncio.Event, lost: asyncio.Future[None]
) -> None:
    """Run the workers until `stop` is set, one fails, or a connection is `lost`; then drain.

    Raises:
        Exception: of what ended first, after all others are drained.
    """
    runs = [asyncio.create_task(worker.run()) for worker in workers]
    stopped = asyncio.create_task(stop.wait())
    awaited: list[asyncio.Future[Any]] = [*runs, stopped, lost]
    ended, _ = await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
    log.info("workers drain", because="a signal" if stopped in ended else "a failure")
    stopped.cancel()
    await asyncio.gather(*(worker.shutdown() for worker in workers))
    await asyncio.gather(*runs, return_exceptions=True)
    for each in ended:
        each.result()


def all_run(workers: Sequence[Worker]) -> Check:
    """The check that every worker runs."""

    async def check() -> None:
        idle = [worker.task_queue for worker in workers if not worker.is_running]
        if idle:
            raise RuntimeError(f"not running: {', '.join(idle)}")

    return check
