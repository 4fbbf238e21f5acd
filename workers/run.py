"""A process from its start to its end: open, check, run, drain."""

import asyncio
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import structlog
from temporalio.client import Plugin
from temporalio.runtime import Runtime

from workers import health, telemetry
from workers.clients.temporal import open_temporal
from workers.clients.valkey import open_valkey, watch_memory
from workers.external_storage import data_converter
from workers.health import Check
from workers.processes.process import IF_ENCRYPTED, PROCESSES, Job, ProcessContext, load_process
from workers.settings import Settings, slips, variables

ALL = "all"

log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True)
class StartedProcess:
    """The jobs that can run, the checks of all they need, and the error of a lost connection."""

    jobs: Mapping[str, Job]
    checks: Mapping[str, Check]
    lost: asyncio.Future[None]


@asynccontextmanager
async def ready(
    name: str,
    settings: Settings,
    runtime: Runtime | None = None,
    plugins: Sequence[Plugin] = (),
    service: str = "",
) -> AsyncIterator[StartedProcess]:
    """Open, check and prepare everything that the process `name` needs.

    Args:
        name: The process, or `all`.
        settings: The settings of the process.
        runtime: The Temporal client's runtime.
        plugins: The Temporal client's plugins.
        service: The service of the process `grpc` that runs alone; empty: all of them.

    Raises:
        StartError: something outside the process is wrong; nothing runs then.
    """
    async with AsyncExitStack() as opened:
        valkey = await opened.enter_async_context(open_valkey(settings))
        await opened.enter_async_context(watch_memory(valkey))
        converter = data_converter(valkey, settings.keep_payloads_for, settings.encryption_keys)
        temporal = await open_temporal(settings, converter, runtime, plugins)
        base = ProcessContext(settings, temporal, valkey, service)
        names = [name]
        if name == ALL:
            names = [*PROCESSES, *(IF_ENCRYPTED if settings.encryption_keys else ())]
        running = [await opened.enter_async_context(load_process(each)(base)) for each in names]
        jobs = {name: job for each in running for name, job in each.jobs.items()}
        checks: dict[str, Check] = {**base.checks, "workers": all_run(jobs)}
        for each in running:
            checks |= each.checks
        yield StartedProcess(jobs, checks, base.lost)


async def prepare(name: str, settings: Settings) -> None:
    """Bring what the process `name` owns up to date; run nothing.

    Raises:
        StartError: as `ready`.
    """
    telemetry.configure_logs(settings.log_level, name, settings.log_format)
    async with ready(name, settings) as process:
        log.info("prepared", queues=list(process.jobs))


async def run(name: str, settings: Settings, service: str = "") -> None:
    """Run the workers of the process `name` until SIGTERM or SIGINT, then drain them.

    Args:
        name: As for `ready`.
        settings: As for `ready`.
        service: As for `ready`.

    Raises:
        StartError: as `ready`, or a connection is lost for good.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with telemetry.started(settings, name) as (runtime, plugins):
        for variable, meant in slips(variables()).items():
            log.warning("unknown variable", variable=variable, did_you_mean=meant)
        async with ready(name, settings, runtime, plugins, service) as process:
            with (
                health.serve(
                    settings.health_host,
                    settings.health_port,
                    name,
                    process.checks,
                    telemetry.sdk_metrics(settings),
                )
                if settings.health_port
                else nullcontext()
            ):
                log.info("workers run", queues=list(process.jobs))
                await run_until(list(process.jobs.values()), stop, process.lost)
                log.info("workers stopped")


async def run_until(jobs: Sequence[Job], stop: asyncio.Event, lost: asyncio.Future[None]) -> None:
    """Run the jobs until `stop` is set, one fails, or a connection is `lost`; then drain.

    Raises:
        Exception: the error of what ended first, after all others are drained.
    """
    runs = [asyncio.create_task(job.run()) for job in jobs]
    stopped = asyncio.create_task(stop.wait())
    awaited: list[asyncio.Future[Any]] = [*runs, stopped, lost]
    ended, _ = await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
    log.info("workers drain", because="a signal" if stopped in ended else "a failure")
    stopped.cancel()
    await asyncio.gather(*(job.shutdown() for job in jobs))
    await asyncio.gather(*runs, return_exceptions=True)
    for each in ended:
        each.result()


def all_run(jobs: Mapping[str, Job]) -> Check:
    """Return a check that every job runs."""

    async def check() -> None:
        idle = [name for name, job in jobs.items() if not job.is_running]
        if idle:
            raise RuntimeError(f"not running: {', '.join(idle)}")

    return check
