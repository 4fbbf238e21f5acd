"""Answers that the engine gave and that are not kept yet.

If their worker is killed then, no one has them, so they are asked for and paid for again.
"""

from __future__ import annotations

import json

from tests.support.llm_server import LlmServer
from tests.support.polling import until
from tests.support.site import Site


async def forget_calls(site: Site, engine: LlmServer) -> None:
    """Forget all calls and their kept answers, so that `on_their_way` counts later ones only."""
    engine.calls.clear()
    async with site.valkey_client() as valkey:
        for key in await site.kept_answers("*"):
            await valkey.delete(key)


async def on_their_way(site: Site, engine: LlmServer) -> int:
    """Return how many different answers the engine has given that are not kept."""
    kept = len(set(await site.kept_answers("*")))
    answered = {
        (call.act, call.seed, json.dumps(call.messages))
        for call in engine.calls
        if call.end == "answered"
    }
    return len(answered) - kept


async def kill_and_start(site: Site, engine: LlmServer, kind: str) -> None:
    """Kill a worker and start it again; the agents' worker while no answer is on its way."""
    if kind == "agents":
        engine.answering.clear()
        await until(lambda: on_their_way(site, engine), lambda count: count == 0)
    await site.kill_and_start(kind)
    engine.answering.set()
