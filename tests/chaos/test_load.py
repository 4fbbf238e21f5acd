"""Thirty stories at once while processes are killed at random."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.conftest import TIME_LIMIT
from tests.chaos.load import run_load
from tests.support.llm_server import LlmServer
from tests.support.site import Site

pytestmark = TIME_LIMIT

STORIES = 30
BLOWS = 12
SEED = 79
"""With this one, each process is killed, and the agents' worker 4 times.

A fixed one, so that a run does not fail for kills that no change caused; `make soak` chooses it.
"""


async def test_thirty_stories_survive_what_is_killed_among_them(tmp_path: Path) -> None:
    async with LlmServer() as engine, Site(tmp_path, engine.url) as site:
        outcome = await run_load(site, engine, stories=STORIES, seed=SEED, blows=BLOWS)

    print(outcome)
    assert outcome.stories == STORIES
    assert outcome.faults == [], outcome
