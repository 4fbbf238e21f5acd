"""The parts of the benchmark; each starts what it needs and returns its figures."""

from __future__ import annotations

import asyncio
import secrets
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import psutil
from temporalio.api.enums.v1 import EventType
from temporalio.client import Client, WorkflowHandle
from temporalio.worker import Worker

from deploy.local.server import Command
from deploy.local.servers import Temporal
from deploy.local.settings import StackSettings
from deploy.local.stack import Stack
from tests.bench.bare import A_STORY, BareStory, Shape, noop
from tests.bench.calls import WAVES, Answered, Recorder, apart, ask
from tests.bench.figures import Figure, at_least, at_most
from tests.bench.replay import Body, reworded
from tests.support.checker import paid_twice
from tests.support.llm_server import LlmServer
from tests.support.site import WORKERS, Site
from workers.payload_codec import KEY_BYTES
from workflows.models.agents import PlannedTask
from workflows.search_attributes import PENDING_GATE

PAIRS = 7
"""Pairs of a durable and a plain run, in turns; the figure is the median of the pairs' ratios."""


# --- a deliberation -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Durable:
    """A durable deliberation; `calls_s`: from scheduling the first call to the last answer."""

    seconds: float
    calls_s: float
    waves: list[list[Body]]
    topic: str


async def deliberate(client: Client, recorder: Recorder) -> Durable:
    topic = uuid.uuid4().hex
    recorder.take()
    began = time.perf_counter()
    handle = await started(client, topic)
    await handle.result()
    seconds = time.perf_counter() - began
    return Durable(seconds, await calls_span(handle), recorder.take(), topic)


async def started(client: Client, topic: str) -> WorkflowHandle[Any, Any]:
    """Start a deliberation about a client, who is named as the topic."""
    task_id = f"bench-{topic[:12]}"
    handle: WorkflowHandle[Any, Any] = await client.start_workflow(
        "DeliberationWorkflow",
        {"task_id": task_id, "role": "DEV", "description": f"Limit requests of client {topic}"},
        id=f"deliberation-{task_id}",
        task_queue="story",
    )
    return handle


async def calls_span(handle: WorkflowHandle[Any, Any]) -> float:
    started: dict[int, float] = {}
    answered = []
    for event in (await handle.fetch_history()).events:
        at = event.event_time.ToNanoseconds() / 1e9
        if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED:
            scheduled = event.activity_task_scheduled_event_attributes
            if scheduled.activity_type.name in WAVES:
                started[event.event_id] = at
        if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED:
            done = event.activity_task_completed_event_attributes.scheduled_event_id
            if done in started:
                answered.append(at)
    return max(answered) - min(started.values())


@dataclass(frozen=True)
class Pair:
    """A durable deliberation, and the same calls in plain asyncio."""

    durable: Durable
    plain: Answered

    @property
    def calls(self) -> int:
        return sum(map(len, self.durable.waves))


async def pairs(client: Client, recorder: Recorder, count: int) -> list[Pair]:
    await deliberate(client, recorder)  # warm-up: opens connections, loads code
    found = []
    for _ in range(count):
        durable = await deliberate(client, recorder)
        same = reworded(durable.waves, durable.topic, uuid.uuid4().hex)
        found.append(Pair(durable, await ask(recorder.url, same)))
        recorder.take()
    return found


def ratios(found: Sequence[Pair], on: str, aim: float | None) -> list[Figure]:
    calls = statistics.median(p.durable.calls_s / p.plain.seconds for p in found)
    whole = statistics.median(p.durable.seconds / p.plain.seconds for p in found)
    how = f"median of {len(found)} pairs of {found[0].calls} calls"
    first = f"durable calls / plain asyncio, {on}"
    return [
        at_most(first, calls, "x", aim, how) if aim else Figure(first, calls, "x", how=how),
        Figure(f"whole deliberation, checked and recorded / plain asyncio, {on}", whole, "x"),
    ]


async def deliberation(folder: Path) -> list[Figure]:
    """Compare durable with plain calls, at 200 ms a call and on an instant endpoint."""
    figures = []
    for delay_ms, on in ((200, "200 ms a call"), (0, "instant endpoint")):
        async with (
            LlmServer(delay_ms=delay_ms) as engine,
            Recorder(engine.url) as recorder,
            Site(folder / str(delay_ms), recorder.url) as site,
        ):
            found = await pairs(site.client, recorder, PAIRS)
        if delay_ms:
            figures += ratios(found, on, 1.12)
        else:
            each = statistics.median(
                (p.durable.calls_s - p.plain.seconds) / p.calls * 1000 for p in found
            )
            how = f"median of {len(found)} pairs"
            figures.append(at_most(f"overhead of a durable call, {on}", each, "ms", 10, how))
    return figures


# --- many stories ---------------------------------------------------------------------------------

STORIES = 20
WARMING = 10


async def load(folder: Path) -> list[Figure]:
    """Compare stories with bare Temporal's: `bare.A_STORY`."""
    async with LlmServer() as engine, Site(folder, engine.url) as site:
        warm = [f"WARM-{number}" for number in range(WARMING)]  # mainly for Neo4j's JVM
        await asyncio.gather(*(through(site, name) for name in warm))
        began, before = time.perf_counter(), cpu_of(site)
        names = [f"US-{number}" for number in range(1, STORIES + 1)]
        await asyncio.gather(*(through(site, name) for name in names))
        durable = time.perf_counter() - began
        spent = since(before, site)
        shapes = [await shape_of(site.client, f"story-{name}") for name in names]
        before, own = cpu_of(site), time.process_time()
        async with Worker(site.client, task_queue="bare", workflows=[BareStory], activities=[noop]):
            began = time.perf_counter()
            await asyncio.gather(
                *(
                    site.client.execute_workflow(
                        BareStory.run, A_STORY, id=f"bare-{uuid.uuid4()}", task_queue="bare"
                    )
                    for _ in names
                )
            )
            bare = time.perf_counter() - began
        idle = since(before, site)
        bare_spent = {"temporal": idle.pop("temporal"), "its worker": time.process_time() - own}
        bare_spent["all else"] = sum(idle.values())
        sizes = [await site.client.get_workflow_handle(f"story-{n}").describe() for n in names]
    activities = sum(shape.activities for shape in shapes)
    history = statistics.mean(
        each.raw_description.workflow_execution_info.history_size_bytes for each in sizes
    )
    events = statistics.mean(each.history_length for each in sizes)
    how = f"{STORIES} stories at once; bare {STORIES / bare * 60:.0f}/min"
    cpu, bare_cpu = sum(spent.values()) / STORIES, sum(bare_spent.values()) / STORIES
    return [
        Figure("stories a minute, instant endpoint", STORIES / durable * 60, "/min", how=how),
        at_least("of bare Temporal's stories a minute", bare / durable, "x", 0.5, how),
        at_most(
            "CPU of a story / of a bare story",
            cpu / bare_cpu,
            "x",
            1.8,
            f"the whole machine; {cpu:.2f} of {bare_cpu:.2f} s",
        ),
        Figure("activities of a story", activities / STORIES, "", how="mean"),
        Figure("history of a story's own workflow, not encrypted", history / 1024, "KiB"),
        at_most("events of a story's own workflow", events, "", 280, "mean"),
        *(
            Figure(f"CPU of a story in {name}", cpu / STORIES, "s")
            for name, cpu in sorted(spent.items(), key=lambda each: -each[1])
        ),
        *(
            Figure(f"CPU of a bare story in {name}", cpu / STORIES, "s")
            for name, cpu in bare_spent.items()
        ),
    ]


SANDBOXES = "sandboxes and the kernel"


def since(before: dict[str, float], site: Site) -> dict[str, float]:
    """Return the CPU seconds since `before`, which `cpu_of` returned."""
    return {name: cpu - before[name] for name, cpu in cpu_of(site).items()}


def cpu_of(site: Site) -> dict[str, float]:
    """Return the CPU seconds of each process, and of all else but this one as SANDBOXES.

    The kernel adds what a sandbox used to no process, because bubblewrap is killed with it.
    """
    found = {
        name: sum(psutil.Process(process.pid).cpu_times()[:4])  # user, system, and the children's
        for name, process in site.processes.items()
    }
    all_of_it = psutil.cpu_times()
    busy = all_of_it.user + all_of_it.nice + all_of_it.system + all_of_it.irq + all_of_it.softirq
    return found | {SANDBOXES: busy - sum(found.values()) - time.process_time()}


async def through(site: Site, name: str) -> None:
    await site.begin(name)
    await site.finish(name)


async def shape_of(client: Client, workflow_id: str) -> Shape:
    """Return how many activities each workflow task scheduled, and the shapes of the children."""
    history = await client.get_workflow_handle(workflow_id).fetch_history()
    batches: dict[int, int] = {}
    children = []
    for event in history.events:
        if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED:
            task = event.activity_task_scheduled_event_attributes.workflow_task_completed_event_id
            batches[task] = batches.get(task, 0) + 1
        if event.event_type == EventType.EVENT_TYPE_CHILD_WORKFLOW_EXECUTION_STARTED:
            child = event.child_workflow_execution_started_event_attributes.workflow_execution
            children.append(await shape_of(client, child.workflow_id))
    return Shape(batches=list(batches.values()), children=children)


# --- encryption -----------------------------------------------------------------------------------


ENCRYPTED_STORIES = 6
ENCRYPTED_WARMING = 2


@dataclass(frozen=True)
class Cost:
    """What a story costs.

    Attributes:
        cpu: seconds, by process.
        stored: bytes of the histories of its workflows.
        own: bytes of the story's own history.
    """

    cpu: dict[str, float]
    stored: float
    own: float

    @property
    def workers(self) -> float:
        """The CPU seconds of the fleet's own processes."""
        return sum(self.cpu[name] for name in WORKERS)


async def codec(folder: Path) -> list[Figure]:
    """Compare what a story costs with encrypted payloads and without."""
    async with LlmServer() as engine:
        off = await cost_of_a_story(Site(folder / "off", engine.url))
        on = await cost_of_a_story(Site(folder / "on", engine.url, secrets.token_bytes(KEY_BYTES)))
    how = f"mean of {ENCRYPTED_STORIES} stories at once"
    cpu = f"{how}; {on.workers:.2f} s on, {off.workers:.2f} s off"
    stored = f"{how}; {on.stored / 1024:.0f} KiB on, {off.stored / 1024:.0f} KiB off"
    temporal = f"{how}; {on.cpu['temporal']:.2f} s on, {off.cpu['temporal']:.2f} s off"
    servers = on.cpu["temporal"] / off.cpu["temporal"]
    return [
        Figure(
            "CPU of a story in the workers, codec on / off", on.workers / off.workers, "x", how=cpu
        ),
        Figure("CPU of a story in Temporal, codec on / off", servers, "x", how=temporal),
        Figure("histories of a story, codec on / off", on.stored / off.stored, "x", how=stored),
        at_most(
            "history of a story's own workflow, encrypted",
            on.own / 1024,
            "KiB",
            80,
            f"{how}; {off.own / 1024:.0f} KiB off",
        ),
    ]


async def cost_of_a_story(site: Site) -> Cost:
    async with site:
        await asyncio.gather(
            *(through(site, f"WARM-{number}") for number in range(ENCRYPTED_WARMING))
        )
        before = cpu_of(site)
        names = [f"US-{number}" for number in range(1, ENCRYPTED_STORIES + 1)]
        await asyncio.gather(*(through(site, name) for name in names))
        cpu = {
            name: (spent - before[name]) / ENCRYPTED_STORIES for name, spent in cpu_of(site).items()
        }
        own = [await stored_of(site.client, f"story-{name}") for name in names]
        all_of_them = [await stored_in_histories(site.client, f"story-{name}") for name in names]
    return Cost(cpu, statistics.mean(all_of_them), statistics.mean(own))


async def stored_of(client: Client, workflow_id: str) -> int:
    """Return the bytes of a workflow's history."""
    description = await client.get_workflow_handle(workflow_id).describe()
    return description.raw_description.workflow_execution_info.history_size_bytes


async def stored_in_histories(client: Client, workflow_id: str) -> int:
    """Return the bytes of a workflow's history and of its children's."""
    handle = client.get_workflow_handle(workflow_id)
    children = [
        event.child_workflow_execution_started_event_attributes.workflow_execution.workflow_id
        async for event in handle.fetch_history_events()
        if event.event_type == EventType.EVENT_TYPE_CHILD_WORKFLOW_EXECUTION_STARTED
    ]
    of_children = [await stored_in_histories(client, child) for child in children]
    return await stored_of(client, workflow_id) + sum(of_children)


# --- long histories -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patient(Temporal):
    """A server that does not suggest continue-as-new before 100,000 events."""

    def prepare(self) -> Command:
        command = super().prepare()
        late = ("--dynamic-config-value", "limit.historyCount.suggestContinueAsNew=100000")
        return changed(command, argv=(*command.argv, *late))


LENGTHS = (100, 1_000, 5_000)
TAKEN = 15


async def growth(folder: Path) -> list[Figure]:
    """Measure an amendment as the history grows, and the histories of a plan of 50 tasks.

    The figures also include the events and KiB of one of its deliberations. Payloads are
    compressed and encrypted.
    """
    async with LlmServer() as engine, patient_site(folder, engine.url) as site:
        await amended_often(await site.begin("US-0", approvals="human"), 300)  # warms the servers
        handle = await site.begin("US-1", approvals="human")
        figures, medians = [], []
        for length in LENGTHS:
            await amended_often(handle, length)
            took = [await amend(handle) for _ in range(TAKEN)]
            how = f"median of {TAKEN} updates"
            each = statistics.median(took) * 1000
            medians.append(each)
            figures.append(Figure(f"an amendment at {length:,} events", each, "ms", how=how))
        ratio = medians[-1] / medians[0]
        figures.append(
            at_most(f"at {LENGTHS[-1]:,} events / at {LENGTHS[0]}", ratio, "x", 1.5, "flat is 1")
        )
        await handle.terminate()
        return figures + await plan_of_fifty(site)


@asynccontextmanager
async def patient_site(folder: Path, url: str) -> AsyncIterator[Site]:
    site = Site(folder, url, secrets.token_bytes(KEY_BYTES))  # encrypted, as by `make run`
    server = site.processes["temporal"].server
    assert isinstance(server, Temporal)
    site.processes["temporal"].server = Patient(server.home, server.port, server.ui_port)
    async with site:
        yield site


async def amended_often(handle: WorkflowHandle[Any, Any], length: int) -> None:
    """Amend a story until its history has so many events."""
    while await events_of(handle) < length:
        for _ in range(20):
            await handle.signal("amend", {"brief": uuid.uuid4().hex})
        await asyncio.sleep(0.5)
    await asyncio.sleep(2)  # until the work of the last amendments is done


async def amend(handle: WorkflowHandle[Any, Any]) -> float:
    """Amend a story on an idle stack, and return the seconds."""
    await asyncio.sleep(0.5)
    began = time.perf_counter()
    await handle.execute_update("amend", {"brief": uuid.uuid4().hex}, result_type=dict)
    return time.perf_counter() - began


async def events_of(handle: WorkflowHandle[Any, Any]) -> int:
    description = await handle.describe()
    return description.history_length


async def plan_of_fifty(site: Site) -> list[Figure]:
    tasks = [
        PlannedTask(task_id=f"p50-t{number}", role="DEV", title=f"Task {number}", description="Do")
        for number in range(1, 51)
    ]
    handle = await site.client.start_workflow(
        "PlanWorkflow",
        {"story_id": "US-50", "plan_id": "p50", "tasks": [task.model_dump() for task in tasks]},
        id="plan-US-50-p50",
        task_queue="story",
    )
    # Not `result`: it is large and in the fleet's own storage, and only the end matters here.
    while (await handle.describe()).close_time is None:
        await asyncio.sleep(0.5)
    plan = (await handle.describe()).raw_description.workflow_execution_info
    one = await site.client.get_workflow_handle("deliberation-p50-t1").describe()
    council = one.raw_description.workflow_execution_info
    limit = "of 51,200 events and 50 MiB"
    return [
        at_most(
            "history of a deliberation", council.history_size_bytes / 1024, "KiB", 45, "encrypted"
        ),
        at_most("events of a deliberation", council.history_length, "", 170, ""),
        at_most("events of a plan of 50 tasks", plan.history_length, "", 5120, f"a tenth {limit}"),
        at_most(
            "history of a plan of 50 tasks",
            plan.history_size_bytes / 2**20,
            "MiB",
            5,
            f"a tenth {limit}",
        ),
    ]


# --- memory ---------------------------------------------------------------------------------------

OPEN_STORIES = 1_000
WOKEN = 50


async def memory(folder: Path) -> list[Figure]:
    """Measure the memory of each process with a thousand open stories, and what waking one costs.

    The story worker keeps the last ones in memory, and replays the others.
    """
    async with LlmServer() as engine, Site(folder, engine.url) as site:
        idle = {name: rss_mib(process.pid) for name, process in site.processes.items()}
        gate = asyncio.Semaphore(50)

        async def opened(number: int) -> None:
            async with gate:
                await site.begin(f"US-{number}", approvals="human")
                while not await site.attribute(f"US-{number}", PENDING_GATE):
                    await asyncio.sleep(1)

        await asyncio.gather(*(opened(number) for number in range(OPEN_STORIES)))
        full = {name: rss_mib(process.pid) for name, process in site.processes.items()}
        worker = site.processes["story"].pid
        kept = await woken(site, worker, range(OPEN_STORIES - WOKEN, OPEN_STORIES))
        replayed = await woken(site, worker, range(WOKEN))
    return [
        Figure(
            f"{name} with {OPEN_STORIES:,} open stories",
            full[name],
            "MiB",
            how=f"idle {idle[name]:.0f} MiB",
        )
        for name in idle
    ] + [
        Figure(
            f"waking a story that is {where}",
            cost.seconds * 1000,
            "ms",
            how=f"a query; {cost.cpu_s * 1000:.1f} ms of the story worker's CPU",
        )
        for where, cost in (("in memory", kept), ("replayed", replayed))
    ]


@dataclass(frozen=True)
class Waking:
    """The cost of a query, as the median over many stories and as the mean CPU time."""

    seconds: float
    cpu_s: float


async def woken(site: Site, worker: int | None, stories: Sequence[int]) -> Waking:
    """Query stories one after another."""
    took = []
    before = cpu_s(worker)
    for number in stories:
        began = time.perf_counter()
        await site.client.get_workflow_handle(f"story-US-{number}").query("state")
        took.append(time.perf_counter() - began)
    return Waking(statistics.median(took), (cpu_s(worker) - before) / len(stories))


def cpu_s(pid: int | None) -> float:
    spent = psutil.Process(pid).cpu_times()
    return spent.user + spent.system


def rss_mib(pid: int | None) -> float:
    return psutil.Process(pid).memory_info().rss / 2**20


# --- a killed worker ------------------------------------------------------------------------------

CALL_S = 3.0


async def recovery(folder: Path) -> list[Figure]:
    """Kill a worker (-9) in mid-wave, start a new one at once and measure the extra time."""
    figures = []
    async with (
        LlmServer(delay_ms=CALL_S * 1000) as engine,
        Recorder(engine.url) as recorder,
        Site(folder, recorder.url) as site,
    ):
        await deliberate(site.client, recorder)
        unharmed = statistics.median(
            [(await deliberate(site.client, recorder)).seconds for _ in range(3)]
        )
        for kind in ("agents", "story"):
            engine.calls.clear()
            took = []
            for _ in range(3):
                killed = asyncio.create_task(deliberate(site.client, recorder))
                while sum(call.act == "criticise" for call in engine.calls) < 3:
                    await asyncio.sleep(0.05)
                await asyncio.sleep(CALL_S / 2)
                await site.kill_and_start(kind)
                took.append((await killed).seconds - unharmed)
                assert paid_twice(call.model_dump() for call in engine.calls) == []
                engine.calls.clear()
            figures.append(
                at_most(
                    f"the {kind} worker killed in mid-wave, until done, beyond what was left",
                    statistics.median(took),
                    "s",
                    6,
                    "median of 3; no answered call was asked again",
                )
            )
    return figures


# --- on vLLM --------------------------------------------------------------------------------------

VLLM_PAIRS = 2


async def vllm(folder: Path) -> list[Figure]:
    """Compare durable, plain and sequential calls on Ray Serve and vLLM.

    Also measures what the prefix cache gains for a council.
    """
    others = ("temporal", "nats", "neo4j", "valkey", "workers")
    stack = Stack(StackSettings.load(home=folder, pick_free_ports=True), without=others)
    try:
        await stack.up()
        async with (
            Recorder(stack.parts.env["VLLM_URL"]) as recorder,
            Site(folder / "site", recorder.url) as site,
        ):
            return await on_vllm(site.client, recorder)
    finally:
        await stack.down()


async def on_vllm(client: Client, recorder: Recorder) -> list[Figure]:
    found = await pairs(client, recorder, VLLM_PAIRS)
    in_turn = []
    for pair in found:
        same = reworded(pair.durable.waves, pair.durable.topic, uuid.uuid4().hex)
        one_by_one = await ask(recorder.url, [[body] for wave in same for body in wave])
        in_turn.append(one_by_one.seconds / pair.durable.calls_s)
    council, strangers = [], []
    for pair in found:
        wave = reworded(pair.durable.waves, pair.durable.topic, uuid.uuid4().hex)[0]
        head = uuid.uuid4().hex
        council.append(await ask(recorder.url, [apart(wave, [head] * len(wave))]))
        names = [uuid.uuid4().hex for _ in wave]
        strangers.append(await ask(recorder.url, [apart(wave, names)]))
    recorder.take()
    how = f"median of {len(found)}"
    faster = statistics.median(in_turn)
    gain = rate(council) / rate(strangers)
    return [
        *ratios(found, "vLLM", 1.10),
        at_least("one call after another / durable waves, vLLM", faster, "x", 2.5, how),
        Figure("a council of three proposes, vLLM", rate(council), "tokens/s", how=hits(council)),
        Figure("three strangers propose, vLLM", rate(strangers), "tokens/s", how=hits(strangers)),
        Figure("the council's rate / the strangers'", gain, "x", how=how),
    ]


def rate(answered: Sequence[Answered]) -> float:
    return statistics.median(each.tokens_out / each.seconds for each in answered)


def hits(answered: Sequence[Answered]) -> str:
    cached = sum(each.cached_tokens for each in answered)
    return f"{cached / sum(each.tokens_in for each in answered):.0%} of the prompts from the cache"
