"""The cost of starting processes: until each is ready, its memory, and a restart under load."""

from __future__ import annotations

import asyncio
import secrets
import statistics
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path

from temporalio.client import WorkflowFailureError

from deploy.local.ports import free_ports
from deploy.local.server import Command
from deploy.local.servers import Workers
from tests.bench.figures import Figure, at_most
from tests.bench.parts import rss_mib
from tests.support.llm_server import LlmServer
from tests.support.server_process import ServerProcess
from tests.support.servers import READY_WITHIN
from tests.support.site import WORKERS, Site
from workflows.search_attributes import PENDING_GATE

STARTS = 3
SETTLED_S = 5.0


@dataclass(frozen=True)
class Codec(Workers):
    """A codec server with a key and a port of its own."""

    def prepare(self) -> Command:
        command = super().prepare()
        own = {"PAYLOAD_KEYS": secrets.token_hex(32), "CODEC_PORT": str(self.other_ports["codec"])}
        return changed(command, env={**command.env, **own})


async def start(folder: Path) -> list[Figure]:
    """Measure how long each process takes until it is ready, and its memory while idle."""
    figures = []
    async with LlmServer() as engine, Site(folder, engine.url) as site:
        grpc_port, codec_port, codec = free_ports(3)
        processes = {name: site.processes[name] for name in WORKERS}
        processes["grpc"] = process_of(site, Workers(site.home, grpc_port, "grpc"))
        processes["codec"] = process_of(
            site, Codec(site.home, codec_port, "codec", {"codec": codec})
        )
        for name, process in processes.items():
            took = []
            for _ in range(STARTS):
                await process.stop()
                took.append(await process.start())
            await asyncio.sleep(SETTLED_S)
            ready, memory = statistics.median(took), rss_mib(process.pid)
            how = f"median of {STARTS}, from {min(took):.1f} to {max(took):.1f} s"
            figures.append(Figure(f"{name} from its start until ready", ready, "s", how=how))
            figures.append(Figure(f"memory of {name}, idle", memory, "MiB"))
        await asyncio.gather(*(processes[name].kill() for name in ("grpc", "codec")))
    return figures


def process_of(site: Site, server: Workers) -> ServerProcess:
    log = site.home / "logs" / f"{server.process}-{server.health_port}.log"
    return ServerProcess(server, log, READY_WITHIN)


# --- a rolling restart ----------------------------------------------------------------------------

MOVING = 5
"""Stories that move between DRAFT and DESIGN at the same time, each with a person."""

ROUNDS = 4
"""Decisions about a design until the story is cancelled and the next one begins: some 400 events,
about as many as a story to DONE has, because the worker that takes a story over replays them."""

PAUSE_S = 0.5
"""How long a person reads before the next decision."""

CALM_S = 30.0


async def restart(folder: Path) -> list[Figure]:
    """Replace every worker under load, and compare the transitions with those before and after."""
    took: list[float] = []
    names: list[str] = []
    async with LlmServer(delay_ms=200) as engine, Site(folder, engine.url) as site:
        stop = asyncio.Event()
        people = [asyncio.create_task(decide(site, names, took, stop)) for _ in range(MOVING)]
        await calm(people)  # warm-up
        before = await measured(took, calm(people))
        during = await measured(took, replace_workers(site))
        after = await measured(took, calm(people))
        stop.set()
        await asyncio.gather(*people)
        lost = await lost_events(site, names)
    usual = p95([*before, *after])
    how = (
        f"p95 of {len(during)} updates: {p95(during) * 1000:.0f} ms; of {len(before) + len(after)} "
        f"before and after: {usual * 1000:.0f} ms; {MOVING} stories, each worker in turn"
    )
    return [
        at_most("p95 of a transition, rolling restart / usual", p95(during) / usual, "x", 2, how),
        at_most("events lost or doubled by it", len(lost), "", 0, "; ".join(lost[:3])),
    ]


async def calm(people: Sequence[asyncio.Task[None]]) -> None:
    """Let the stories move for a while.

    Raises:
        AssertionError: one of them has stopped.
    """
    done, _ = await asyncio.wait(people, timeout=CALM_S, return_when=asyncio.FIRST_COMPLETED)
    assert not done, [person.exception() for person in done]


async def measured(took: list[float], work: Coroutine[None, None, None]) -> list[float]:
    """Return the seconds of the transitions that were made during the work."""
    first = len(took)
    await work
    return took[first:]


async def decide(site: Site, names: list[str], took: list[float], stop: asyncio.Event) -> None:
    """Begin one story after the other; approve its scope and reject its design, then cancel it."""
    person = {"actor": "ana", "role": "PO"}
    approval = person | {"gate": "approve_scope"}
    rejection = person | {"event": "reject_design", "reason": "Another one, please."}
    while not stop.is_set():
        name = f"US-{len(names) + 1}"
        names.append(name)
        handle = await site.begin(name, approvals="human")
        for _ in range(ROUNDS):
            while await site.attribute(name, PENDING_GATE) != "approve_scope":
                await asyncio.sleep(0.05)
            for update, request in (("approve", approval), ("reject", rejection)):
                await asyncio.sleep(PAUSE_S)
                began = time.perf_counter()
                await handle.execute_update(update, request, result_type=dict)
                took.append(time.perf_counter() - began)
        await handle.cancel()
        with suppress(WorkflowFailureError):
            await handle.result()


async def lost_events(site: Site, names: Sequence[str]) -> list[str]:
    """Compare histories, streams and graph, for a minute at most while events are on their way."""
    lost: list[str] = []
    for _ in range(60):
        lost = await site.differences(*names)
        if not lost:
            break
        await asyncio.sleep(1)
    return lost


async def replace_workers(site: Site) -> None:
    """Start another of each worker, and stop the one before when the new one is ready."""
    for name in WORKERS:
        (port,) = free_ports(1)
        old, new = site.processes[name], process_of(site, Workers(site.home, port, name))
        site.processes[name] = new
        await new.start()
        await old.stop()


def p95(seconds: Sequence[float]) -> float:
    return statistics.quantiles(seconds, n=20)[-1]
