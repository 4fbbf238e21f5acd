"""Many stories at once while processes are killed at random; then the checker over all of them.

`python -m tests.chaos.load --stories 30 --minutes 30 --seed 7` (`make soak`): stories are kept in
flight for so long, on an endpoint that answers at once, and something is killed every few seconds.
Ends with 1 where a story did not reach DONE or anything differs.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from tests.support.checker import paid_twice
from tests.support.kept import on_their_way
from tests.support.llm_server import LlmServer
from tests.support.site import SERVERS, WORKERS, Site

PAUSE_S = (0.5, 4.0)
"""The shortest and longest pause between two kills, in seconds."""


@dataclass
class Outcome:
    """The result of a load.

    faults: the differences found, one per line. lost_answers: how many answers were on their way
    to be kept when the agents' worker was killed, so that they are paid for twice.
    """

    seed: int
    stories: int = 0
    calls: int = 0
    kills: list[tuple[str, ...]] = field(default_factory=list)
    lost_answers: int = 0
    faults: list[str] = field(default_factory=list)
    seconds: float = 0

    def __str__(self) -> str:
        killed = sum(len(names) for names in self.kills)
        return (
            f"seed {self.seed}: {self.stories} stories, {self.calls} LLM calls, {killed} processes "
            f"killed in {len(self.kills)} blows, {self.lost_answers} answers lost, "
            f"{self.seconds:.0f} s, {len(self.faults)} faults"
        )


def victims(choose: random.Random) -> tuple[str, ...]:
    """Choose what to kill: mostly one worker, sometimes a server, rarely four processes at once."""
    match choose.choices(("worker", "server", "many"), (6, 3, 1))[0]:
        case "worker":
            return (choose.choice(WORKERS),)
        case "server":
            return (choose.choice(SERVERS),)
        case _:
            return tuple(sorted(choose.sample((*SERVERS, *WORKERS), 4)))


async def run_load(
    site: Site,
    engine: LlmServer,
    *,
    stories: int,
    seed: int,
    lasting: timedelta = timedelta(0),
    blows: int = 0,
    report: Callable[[str], None] = print,
) -> Outcome:
    """Keep `stories` in flight while processes are killed, `blows` times and for `lasting`.

    The last stories are then left to finish undisturbed, and everything is checked.
    """
    outcome, began = Outcome(seed), time.monotonic()
    choose = random.Random(seed)
    started: list[str] = []

    def lasts() -> bool:
        return time.monotonic() - began < lasting.total_seconds()

    async def one_after_another() -> None:
        while True:
            name = f"US-{len(started) + 1}"
            started.append(name)
            await site.begin(name)
            if (state := await site.finish(name)) != "DONE":
                outcome.faults.append(f"{name} ended in {state}")
            report(f"{time.monotonic() - began:5.0f} s  {name} {state}")
            if not lasts():
                return

    async def strike() -> None:
        while lasts() or len(outcome.kills) < blows:
            await asyncio.sleep(choose.uniform(*PAUSE_S))
            struck = victims(choose)
            outcome.kills.append(struck)
            report(f"{time.monotonic() - began:5.0f} s  kill -9 {' '.join(struck)}")
            await site.kill(*struck)
            await site.start(*(name for name in struck if name in SERVERS))
            if "agents" in struck:
                outcome.lost_answers += await on_their_way(site, engine)
            await site.start(*struck)

    report(f"seed {seed}: {stories} stories at once")
    await asyncio.gather(strike(), *(one_after_another() for _ in range(stories)))
    outcome.stories, outcome.calls = len(started), len(engine.calls)
    outcome.faults += await site.differences(*started)
    doubled = paid_twice(call.model_dump() for call in engine.calls)
    if len(doubled) > outcome.lost_answers:
        outcome.faults += [f"{outcome.lost_answers} answers were lost at kills, and", *doubled]
    outcome.faults += site.orphans()
    outcome.seconds = time.monotonic() - began
    return outcome


async def _main(stories: int, minutes: float, seed: int) -> int:
    with tempfile.TemporaryDirectory(prefix="fleet-soak-") as folder:
        async with LlmServer() as engine, Site(Path(folder), engine.url) as site:
            outcome = await run_load(
                site, engine, stories=stories, seed=seed, lasting=timedelta(minutes=minutes)
            )
    print(*outcome.faults, outcome, sep="\n", flush=True)
    return 1 if outcome.faults else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stories", type=int, default=30, help="how many are in flight")
    parser.add_argument("--minutes", type=float, default=30, help="how long new ones are begun")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the kills")
    given = parser.parse_args()
    sys.exit(asyncio.run(_main(given.stories, given.minutes, given.seed)))


if __name__ == "__main__":
    main()
