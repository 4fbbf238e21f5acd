"""How the fleet and its peers are measured: many deliberations at once, and one alone.

A peer is a program, `python -m tests.bench.peers.NAME CALLS COUNT [TEMPORAL]`. CALLS is a file with
the calls of one deliberation, COUNT is how many deliberations run at once, and TEMPORAL is a
server's address. The endpoint is OPENAI_BASE_URL. The program prints its `Speed` as JSON.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.bench.replay import Body, reworded

ROUNDS = 3
ALONE = 7
TASK_QUEUE = "deliberations"

Deliberate = Callable[[list[list[Body]]], Awaitable[Sequence[str]]]
"""Makes the calls, all of a wave at once and wave after wave, and returns the answers' texts."""


@dataclass(frozen=True)
class Calls:
    """The calls of a deliberation by wave; all of them name the topic."""

    topic: str
    waves: list[list[Body]]

    @property
    def count(self) -> int:
        return sum(map(len, self.waves))

    def again(self) -> list[list[Body]]:
        """Return the calls about another topic."""
        return reworded(self.waves, self.topic, uuid.uuid4().hex)


@dataclass(frozen=True)
class Speed:
    """Seconds of one deliberation alone, and of a round of many; both are medians."""

    alone_s: float
    round_s: float


async def speed(once: Callable[[], Awaitable[object]], count: int) -> Speed:
    """Measure after a round that opens connections and loads code.

    Args:
        once: runs one deliberation.
        count: how many run at once in a round.
    """

    async def round_of(number: int) -> float:
        began = time.perf_counter()
        await asyncio.gather(*(once() for _ in range(number)))
        return time.perf_counter() - began

    await round_of(count)
    rounds = [await round_of(count) for _ in range(ROUNDS)]
    alone = [await round_of(1) for _ in range(ALONE)]
    return Speed(alone_s=statistics.median(alone), round_s=statistics.median(rounds))


def given_calls() -> Calls:
    return Calls(**json.loads(Path(sys.argv[1]).read_text()))


def given_address() -> str:
    return sys.argv[3]


async def report(deliberate: Deliberate) -> None:
    """Print the speed of a peer's deliberations, each of which must answer every call."""
    calls, count = given_calls(), int(sys.argv[2])

    async def once() -> None:
        answers = await deliberate(calls.again())
        assert len(answers) == calls.count, answers
        assert all(answers), answers

    print(json.dumps(asdict(await speed(once, count))))
