"""The same deliberations in the fleet and in simpler or similar systems: part `peers`.

Every system makes the nine calls that the fleet itself made for one deliberation: three agents
propose, criticise and revise, each in one call that asks for Markdown. A judge's call, which the
fleet makes after its checks if proposals score nearly the same, is neither repeated nor counted,
though it is in the fleet's time, as are the checks, the records in the graph and the events. Each
deliberation has another topic, so nothing is answered from a cache.

Each system runs alone, on the same endpoint, which answers at once in this process. The fleet is a
whole one; a peer is one process, with a new server of Temporal if it needs one.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from temporalio.client import Client

from deploy.local.ports import free_ports
from deploy.local.server import ROOT
from tests.bench import parts
from tests.bench.calls import waves_of
from tests.bench.environments import python_with
from tests.bench.figures import Figure, at_least, at_most
from tests.bench.peers.dev_server import DevServer
from tests.bench.peers.rounds import ALONE, ROUNDS, Calls, Speed, speed
from tests.support.llm_server import LlmServer
from tests.support.server_process import ServerProcess
from tests.support.servers import READY_WITHIN
from tests.support.site import Site

EXTRA = "bench-peers"
AT_ONCE = 20
LIMIT_S = 600
"""How long a peer's program may take, with its rounds."""


@dataclass(frozen=True)
class Peer:
    """A system that the fleet is compared with.

    Attributes:
        program: its module in this package.
        on_temporal: whether it needs a server of Temporal.
        in_extra: whether its packages are those of the extra, instead of the fleet's own.
    """

    name: str
    program: str
    on_temporal: bool = False
    in_extra: bool = False


FLEET = "the fleet"
PEERS = (
    Peer("plain asyncio", "plain_asyncio"),
    Peer("LangGraph with SQLite", "langgraph_sqlite", in_extra=True),
    Peer("plain temporalio", "plain_temporal", on_temporal=True),
    Peer("pydantic-ai on Temporal", "pydantic_ai_temporal", on_temporal=True, in_extra=True),
)


async def peers(folder: Path) -> list[Figure]:
    """Compare calls a second of many deliberations at once, and the time of one alone."""
    extra = await asyncio.to_thread(python_with, EXTRA)
    if not extra:
        print(f"  some peers are missing: {EXTRA} of pyproject.toml cannot be installed")
    own, calls, sent, spent = await fleet(folder / "fleet")
    speeds = {FLEET: own}
    for peer in PEERS:
        python = extra if peer.in_extra else Path(sys.executable)
        if python:
            speeds[peer.name] = await run(peer, python, calls, folder)
    figures = figures_of(speeds, calls.count, sent)
    how = f"of {sum(spent.values()) * 1000:.0f} ms, {AT_ONCE} deliberations at once"
    by_process = sorted(spent.items(), key=lambda each: -each[1])
    return figures + [
        Figure(f"CPU of a deliberation of {FLEET} in {name}", cpu * 1000, "ms", how=how)
        for name, cpu in by_process
    ]


async def fleet(home: Path) -> tuple[Speed, Calls, float, dict[str, float]]:
    """Measure the fleet.

    Returns:
        Its speed, the calls of its first deliberation, how many each one after it sent, and the CPU
        seconds of one by process.
    """
    async with LlmServer() as engine, Site(home, engine.url) as site:
        topic = uuid.uuid4().hex
        await deliberate(site.client, topic)
        calls = Calls(topic, waves_of([call.body for call in engine.calls]))
        assert [len(wave) for wave in calls.waves] == [3, 3, 3], "an answer was asked for again"
        engine.calls.clear()
        measured = await speed(lambda: deliberate(site.client, uuid.uuid4().hex), AT_ONCE)
        sent = len(engine.calls) / (AT_ONCE * (1 + ROUNDS) + ALONE)
        before = parts.cpu_of(site)
        await asyncio.gather(*(deliberate(site.client, uuid.uuid4().hex) for _ in range(AT_ONCE)))
        spent = {name: cpu / AT_ONCE for name, cpu in parts.since(before, site).items()}
    return measured, calls, sent, spent


async def deliberate(client: Client, topic: str) -> None:
    handle = await parts.started(client, topic)
    await handle.result()


async def run(peer: Peer, python: Path, calls: Calls, folder: Path) -> Speed:
    """Run a peer's program to its end."""
    file = folder / "calls.json"
    file.write_text(json.dumps(asdict(calls)))
    async with LlmServer() as engine, temporal_for(peer, folder) as address:
        process = await asyncio.create_subprocess_exec(
            *(str(python), "-m", f"tests.bench.peers.{peer.program}"),
            *(str(file), str(AT_ONCE), *address),
            cwd=ROOT,
            env={**os.environ, "OPENAI_BASE_URL": engine.url, "OPENAI_API_KEY": "none"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(LIMIT_S):
                out, errors = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert process.returncode == 0, errors.decode()[-2_000:]
    return Speed(**json.loads(out.splitlines()[-1]))


@asynccontextmanager
async def temporal_for(peer: Peer, folder: Path) -> AsyncIterator[list[str]]:
    """Run a server if the peer needs one, and yield its address as an argument."""
    if not peer.on_temporal:
        yield []
        return
    server = DevServer(folder / peer.program, *free_ports(1))
    process = ServerProcess(server, folder / f"{peer.program}.log", READY_WITHIN)
    await process.start()
    try:
        yield [server.address]
    finally:
        await process.kill()


def figures_of(speeds: dict[str, Speed], calls: int, sent: float) -> list[Figure]:
    """Return the figures of the fleet and of the peers that ran.

    Args:
        speeds: by the system's name.
        calls: how many calls of a deliberation count.
        sent: how many the fleet sent, as a mean.
    """
    rates = {name: AT_ONCE * calls / each.round_s for name, each in speeds.items()}
    best = max(rates[peer.name] for peer in PEERS if peer.on_temporal and peer.name in rates)
    many = f"calls a second, {AT_ONCE} deliberations at once"
    alone = "one deliberation alone"
    how = f"{calls} calls each, instant endpoint; median of {ROUNDS} rounds"
    how_alone = f"{calls} calls, instant endpoint; median of {ALONE}"
    with_all = f"; with judges' calls the fleet sent {sent:.1f}"
    peers_only = [peer.name for peer in PEERS if peer.name in speeds]
    return [
        *(Figure(f"{many}: {name}", rates[name], "/s", how=how) for name in peers_only),
        at_least(f"{many}: {FLEET}", rates[FLEET], "/s", 75, how + with_all),
        at_least(f"{many}: {FLEET} / the best peer on Temporal", rates[FLEET] / best, "x", 1, how),
        *(
            Figure(f"{alone}: {name}", speeds[name].alone_s * 1000, "ms", how=how_alone)
            for name in peers_only
        ),
        at_most(f"{alone}: {FLEET}", speeds[FLEET].alone_s * 1000, "ms", 200, how_alone + with_all),
    ]
