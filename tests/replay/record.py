"""Records the histories that tests/replay replays: `python -m tests.replay.record [PATH...]`.

Each path is a story or a deliberation on a real Temporal server, with the instant activities of the
unit tests. A history that is there already is kept: it stands for the release that wrote it. Delete
a file, or add a path, and run this to record what is missing.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter

from deploy.local.process import ServerProcess, free_ports
from deploy.local.servers import Temporal
from tests.unit.conftest import WORLDS, RunningStory, StartStory, World, instant_workers
from workers.exit import leave
from workers.search_attributes import register
from workflows.models import plan_workflow_id

HISTORIES = Path(__file__).parent / "histories"

Path_ = Callable[[StartStory, World], Awaitable[RunningStory]]


async def approved(start: StartStory, _: World) -> RunningStory:
    story = await start()
    await story.to("DONE")
    await story.handle.result()
    return story


async def rejected_design(start: StartStory, _: World) -> RunningStory:
    story = await start()
    await story.to("DESIGN")
    await story.until(gate="approve_design")
    await story.reject("reject_design")
    return await _finish(story)


async def rejected_test(start: StartStory, _: World) -> RunningStory:
    story = await start()
    await story.to("TEST")
    await story.until(gate="qa_passed")
    await story.reject("reject_test", role="QA")
    return await _finish(story)


async def rejected_docs(start: StartStory, _: World) -> RunningStory:
    story = await start()
    await story.to("DOCS")
    await story.until(gate="docs_ready")
    await story.reject("reject_docs")
    return await _finish(story)


async def amended(start: StartStory, _: World) -> RunningStory:
    story = await start()
    await story.to("DESIGN")
    await story.until(gate="approve_design")
    await story.update("amend", title="Shorten every link")
    return await _finish(story)


async def budget_gate(start: StartStory, world: World) -> RunningStory:
    world.tokens = 100
    story = await start(token_budget=500)
    await story.until(gate="approve_scope")
    await story.approve("approve_scope")
    await story.until(gate="budget")
    await story.update("raise_budget", tokens=1_000_000, actor="ana", role="PO")
    return await _finish(story)


async def near_tie(start: StartStory, world: World) -> RunningStory:
    world.scores = {f"agent-architect-{n}": score for n, score in ((1, 0.9), (2, 0.88), (3, 0.1))}
    return await approved(start, world)


async def cancelled(start: StartStory, world: World) -> RunningStory:
    world.hold["propose"] = asyncio.Event()
    story = await start()
    await story.until(gate="approve_scope")
    await story.approve("approve_scope")
    async with asyncio.timeout(30):
        while not world.acts:
            await asyncio.sleep(0.02)
    await story.handle.cancel()
    async with asyncio.timeout(30):
        while (await story.handle.describe()).close_time is None:
            await asyncio.sleep(0.05)
    return story


async def auto_approved(start: StartStory, _: World) -> RunningStory:
    story = await start(approvals="auto")
    await story.until(state="BUILD")
    await story.report()
    await story.handle.result()
    return story


async def _finish(story: RunningStory) -> RunningStory:
    """From wherever the story stands to DONE, gate by gate."""
    while (view := await story.state()).state != "DONE":
        if view.pending_gate:
            await story.approve(view.pending_gate, role=view.gate_role)
        elif view.state == "BUILD" and view.report is None:
            await story.report()
        await asyncio.sleep(0.05)
    await story.handle.result()
    return story


PATHS: dict[str, Path_] = {
    each.__name__: each
    for each in (
        approved,
        rejected_design,
        rejected_test,
        rejected_docs,
        amended,
        budget_gate,
        near_tie,
        cancelled,
        auto_approved,
    )
}


async def record(names: list[str]) -> None:
    """Run each path that has no history yet; keep the story's and its children's histories."""
    with TemporaryDirectory() as folder:
        port, ui_port = free_ports(2)
        home = Path(folder)
        server = ServerProcess(
            Temporal(home / "temporal", port, ui_port), home / "log", timedelta(seconds=60)
        )
        await server.start()
        try:
            client = await Client.connect(
                f"127.0.0.1:{port}", data_converter=pydantic_data_converter
            )
            await register(client)
            async with instant_workers(client):
                for name in names:
                    await _record(client, name)
        finally:
            await server.kill()


async def _record(client: Client, name: str) -> None:
    if (HISTORIES / f"{name}.story.json").exists():
        print(f"{name}: there already")
        return
    world = World(key=f"R-{name.replace('_', '-')}")
    WORLDS[world.key] = world
    story = await PATHS[name](StartStory(client, world), world)
    kept = {"story": story.handle.id, "deliberation": f"deliberation-{story.story_id}-design-1"}
    if plan_id := (await story.state()).plan_id:
        kept["plan"] = plan_workflow_id(story.story_id, plan_id)
    for kind, workflow_id in kept.items():
        history = await client.get_workflow_handle(workflow_id).fetch_history()
        compact = json.dumps(history.to_json_dict(), separators=(",", ":"))
        (HISTORIES / f"{name}.{kind}.json").write_text(compact + "\n")
    print(f"{name}: recorded {', '.join(kept)}")


if __name__ == "__main__":
    HISTORIES.mkdir(exist_ok=True)
    asyncio.run(record(sys.argv[1:] or list(PATHS)))
    leave(0)
