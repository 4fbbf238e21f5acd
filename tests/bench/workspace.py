"""Agents in a repository: what a step costs, what a kill costs, and what working trees cost."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from temporalio.client import WorkflowHandle

from activities.workspace.stores import Stores
from activities.workspace.trees import Trees
from tests.bench.calls import Recorder, act_in, ask
from tests.bench.environments import python_with
from tests.bench.figures import Figure, at_least, at_most
from tests.bench.peer_endpoint import PeerEndpoint
from tests.bench.replay import Body
from tests.support.git_server import GitServer, credentials
from tests.support.llm_server import LlmServer
from tests.support.repositories import config_with, in_store, make_repository
from tests.support.scripted_model import STEP, ScriptedModel, run
from tests.support.site import Site, patient
from workflows.implementation import TASK_TIMEOUT
from workflows.models.implementation import ImplementationResult
from workflows.models.workspace import Repository

STEPS = 30
ROUNDS = 3
WORKERS = ("story", "agents", "context", "workspace")
EXTRA = "bench-peer"


async def workspace(folder: Path) -> list[Figure]:
    """Compare steps with mini-swe-agent's and trees with git's; kill workers in mid-work."""
    figures = await trees(folder / "trees")
    async with LlmServer(window=32_768) as engine, Recorder(engine.url) as recorder:
        async with workshop(folder / "site", recorder.url) as site:
            figures += await steps(site, engine, folder)
            figures += await kills(site, engine)
            figures += await with_a_git_server(site, engine, recorder.url, folder / "served")
        figures += await prefix_cache(recorder)
    return figures


@asynccontextmanager
async def workshop(home: Path, url: str, **store: str) -> AsyncIterator[Site]:
    """Run a fleet that works in a repository of a few files; its store is in a folder."""
    config = config_with(home / "config", adder={"url": make_repository(home / "adder")})
    variables = {"FLEET_CONFIG": str(config), "WORKSPACE_STORE": str(home / "store")} | store
    async with Site(home, url, workers=WORKERS, more=variables) as site:
        yield site


async def start(site: Site) -> WorkflowHandle[Any, ImplementationResult]:
    """Start an implementation as the first in its run: it has no commits before."""
    task_id = f"T-{uuid.uuid4().hex[:8]}"
    return await site.client.start_workflow(
        "ImplementationWorkflow",
        {
            "repository": "adder",
            "task": {"task_id": task_id, "role": "DEV", "description": "Let it add."},
            "agent": {"agent_id": "agent-dev-1", "role": "DEV"},
        },
        id=f"implementation-{task_id}-agent-dev-1",
        task_queue="story",
        task_timeout=TASK_TIMEOUT,
        result_type=ImplementationResult,
    )


# --- a step ---------------------------------------------------------------------------------------

LOOKING = [f"cat README.md && echo looked {number}" for number in range(STEPS)]
CHANGING = [f"echo line {number} >> NEWS.md" for number in range(STEPS)]


async def steps(site: Site, engine: LlmServer, folder: Path) -> list[Figure]:
    """Measure a step beyond model and command, in turns with the peer's."""
    peer = await asyncio.to_thread(python_with, EXTRA)
    figures = []
    await durable(site, engine, LOOKING[:3])  # opens connections, loads code
    for name, commands in (("looks", LOOKING), ("changes a file, with its commit", CHANGING)):
        ours, theirs = [], []
        for _ in range(ROUNDS):
            ours.append(await durable(site, engine, commands))
            if peer:
                theirs.append(await plain(peer, commands, folder / "site" / "adder"))
        each = statistics.median(ours)
        how = f"median of {ROUNDS} runs of {STEPS} steps; the endpoint answers at once"
        figures.append(Figure(f"a durable step that {name}", each, "ms", how=how))
        if theirs:
            other = statistics.median(theirs)
            figures.append(
                Figure(f"mini-swe-agent's step that {name.split(',')[0]}", other, "ms", how=how)
            )
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            figures.append(at_most(f"of a step that {name}, the ratio", ratio, "x", 2.0, how))
    if not peer:
        print(f"  mini-swe-agent is not compared: {EXTRA} of pyproject.toml cannot be installed")
    return [*figures, await history(site)]


async def with_a_git_server(site: Site, engine: LlmServer, url: str, folder: Path) -> list[Figure]:
    """Compare a step whose store is on a git server, on this machine, with one in a folder."""
    (folder / "server").mkdir(parents=True)
    server = GitServer(folder / "server")
    server.make("adder")
    store = {
        "WORKSPACE_STORE": server.url,
        "WORKSPACE_TREES": str(folder / "trees"),
        "REPOSITORY_CREDENTIALS": str(credentials(folder / "credentials")),
    }
    served, in_folder = [], []
    with server.serving():
        async with workshop(folder / "site", url, **store) as other:
            await durable(other, engine, LOOKING[:3])
            for _ in range(ROUNDS):
                served.append(await durable(other, engine, CHANGING))
                in_folder.append(await durable(site, engine, CHANGING))
    how = f"median of {ROUNDS} runs of {STEPS} steps; git's HTTP backend on this machine"
    ratio = statistics.median(a / b for a, b in zip(served, in_folder, strict=True))
    return [
        Figure(
            "a step with its commit, store on a git server",
            statistics.median(served),
            "ms",
            how=how,
        ),
        Figure("the same / store in a folder", ratio, "x", how=how),
    ]


async def durable(site: Site, engine: LlmServer, commands: Sequence[str]) -> float:
    """Return the milliseconds of a step of an implementation."""
    engine.documents["next_action"] = ScriptedModel([run(each) for each in commands])
    handle = await start(site)
    result = await handle.result()
    assert (result.ended_by, result.steps) == ("finish", len(commands) + 1), result
    return result.duration_ms / result.steps


async def plain(python: Path, commands: Sequence[str], tree: Path) -> float:
    """Return the milliseconds of a step of mini-swe-agent with the same commands."""
    async with PeerEndpoint(commands) as endpoint:
        process = await asyncio.create_subprocess_exec(
            *(python, Path(__file__).parent / "peer.py", endpoint.url, tree),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "MSWEA_SILENT_STARTUP": "1"},
        )
        out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()[-2_000:]
    seconds: float = json.loads(out.splitlines()[-1])["seconds"]
    return seconds * 1000 / (len(commands) + 1)


async def history(site: Site) -> Figure:
    """Return the size of the history of the last implementation."""
    newest = [
        each async for each in site.client.list_workflows("WorkflowType = 'ImplementationWorkflow'")
    ]
    last = max(newest, key=lambda each: each.start_time)
    described = await site.client.get_workflow_handle(last.id).describe()
    info = described.raw_description.workflow_execution_info
    return at_most(
        f"history of an implementation of {STEPS} steps",
        info.history_size_bytes / 1024,
        "KiB",
        600,
        f"{info.history_length} events",
    )


# --- a kill ---------------------------------------------------------------------------------------

KILLED_AFTER = 15


async def kills(site: Site, engine: LlmServer) -> list[Figure]:
    """Kill each kind of worker (-9) after step 15 of 30, start it again, and see what is lost."""
    figures = []
    for kind in ("workspace", "agents", "story"):
        engine.documents["next_action"] = ScriptedModel([run(each) for each in CHANGING])
        engine.calls.clear()
        handle = await start(site)
        await until_acted(handle, KILLED_AFTER)
        began = time.monotonic()
        await site.kill_and_start(kind)
        await until_acted(handle, KILLED_AFTER + 2)
        seconds = time.monotonic() - began
        result: ImplementationResult = await patient(handle.result)
        lost = repeated(engine) + wrong_lines(site, result.commit)
        figures += [
            at_most(f"{kind} killed after step {KILLED_AFTER}: steps lost", lost, "", 0, "of 30"),
            at_most(
                f"{kind} killed: until the next step is done", seconds, "s", 6, "with its start"
            ),
        ]
    return figures


def repeated(engine: LlmServer) -> int:
    """Return how many answers of steps that were done at the kill were asked for again."""
    answered = [call for call in engine.calls if call.end == "answered"]
    taken = [max(map(int, STEP.findall(call.prompt)), default=0) for call in answered]
    done = [step for step in taken if step < KILLED_AFTER]
    return len(done) - len(set(done))


def wrong_lines(site: Site, commit: str) -> int:
    """Return how many lines that the steps write are missing or doubled."""
    text = in_store(site.home / "store" / "adder.git", "show", f"{commit}:NEWS.md")
    wanted = [f"line {number}" for number in range(STEPS)]
    return 0 if text.splitlines() == wanted else len(set(wanted) ^ set(text.splitlines())) or 1


async def until_acted(handle: WorkflowHandle[Any, Any], count: int) -> None:
    """Wait until the workflow has so many actions carried out."""

    async def follow() -> None:
        scheduled: set[int] = set()
        done = 0
        async for event in handle.fetch_history_events(wait_new_event=True):
            began = event.activity_task_scheduled_event_attributes
            if began.activity_type.name == "run_action":
                scheduled.add(event.event_id)
            ended = event.activity_task_completed_event_attributes.scheduled_event_id
            done += ended in scheduled
            if done == count:
                return

    await patient(follow)


# --- working trees --------------------------------------------------------------------------------

FILES = 5_000
CHECKOUTS = 5


async def trees(folder: Path) -> list[Figure]:
    """Compare a working tree from the store with `git worktree add`, in turns."""
    files = {
        f"part{number % 50}/file{number}.py": f"VALUE = {number}\n" * 40 for number in range(FILES)
    }
    url = make_repository(folder / "project", files)
    entry = Repository(key="project", url=url)
    (folder / "store").mkdir()
    store = await Stores(folder / "store").of(entry)
    commit = await store.base_commit()
    ratios, ours = [], []
    for number in range(CHECKOUTS + 1):
        made = Trees(folder / f"trees{number}", 2**40)
        began = time.perf_counter()
        async with made.at(store, commit):
            own = time.perf_counter() - began
        other = await asyncio.to_thread(worktree, store.path, folder / f"worktree{number}", commit)
        if number:  # the first one warms the disk's cache
            ratios.append(own / other)
            ours.append(own)
        shutil.rmtree(folder / f"trees{number}")
        shutil.rmtree(folder / f"worktree{number}")
    ratio, own = statistics.median(ratios), statistics.median(ours)
    how = f"median of {CHECKOUTS}; {own * 1000:.0f} ms"
    return [at_most(f"a tree of {FILES:,} files / git worktree add", ratio, "x", 1.2, how)]


def worktree(store: Path, place: Path, commit: str) -> float:
    began = time.perf_counter()
    subprocess.run(
        ["git", "--git-dir", store, "worktree", "add", "--quiet", "--detach", place, commit],
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - began


# --- the prefix cache -----------------------------------------------------------------------------

CACHED_STEPS = 10


async def prefix_cache(recorder: Recorder) -> list[Figure]:
    """Send the prompts of the last implementation's steps to VLLM_URL, and count what it had."""
    what = "prompt tokens from the prefix cache, from step 2 on, vLLM"
    url = os.environ.get("VLLM_URL", "").rstrip("/")
    if not url:
        how = "set VLLM_URL (ending in /v1) and VLLM_MODEL to a vLLM; `make up` starts one"
        return [Figure(what, None, "", "at least 80", None, how)]
    bodies = [body for body in recorder.bodies if act_in(body) == "next_action"]
    model = os.environ.get("VLLM_MODEL") or await served_model(url)
    last = [alone(body, model) for body in bodies[-STEPS - 1 :][:CACHED_STEPS]]
    answered = [await ask(url, [[body]]) for body in last]
    later = answered[1:]
    share = 100 * sum(a.cached_tokens for a in later) / sum(a.tokens_in for a in later)
    return [at_least(what, share, "%", 80, f"{len(later)} steps, {model}")]


def alone(body: Body, model: str) -> Body:
    """Return a call of which only the prompt counts."""
    kept = {"messages", "temperature", "seed", "stream", "stream_options"}
    return {name: value for name, value in body.items() if name in kept} | {
        "model": model,
        "max_tokens": 1,
    }


async def served_model(url: str) -> str:
    async with httpx.AsyncClient() as client:
        found = (await client.get(f"{url}/models")).json()
    name: str = found["data"][0]["id"]
    return name
