"""The cost of the bus: into the graph, and from a change of state to a subscriber."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import neo4j
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig
from temporalio.client import WorkflowHandle
from temporalio.worker import Worker

from deploy.local.ports import free_ports
from deploy.local.servers import Workers
from tests.bench.bare import BareStory, Shape, noop
from tests.bench.figures import Figure, at_least, at_most
from tests.support.llm_server import LlmServer
from tests.support.server_process import ServerProcess
from tests.support.servers import READY_WITHIN
from tests.support.site import Site
from workflows.search_attributes import PENDING_GATE

EVENTS = 20_000
STORIES = 200
BACKLOG = 100_000
BATCH = 256
CHANGES = 30

DISPATCHED = "orchestration.task.dispatched"
TRANSITIONED = "planning.story.transitioned"
CONSUMERS = {
    DISPATCHED: (("ORCHESTRATOR_EVENTS", "context-orch-task-dispatched"),),
    TRANSITIONED: (
        ("PLANNING_EVENTS", "context-planning-story-transitions"),
        ("PLANNING_EVENTS", "orch-planning-story-transitions"),
    ),
}

STORE: Any = """
UNWIND $rows AS row
MERGE (n:TaskDispatch {id: row.id}) ON CREATE SET n += row
MERGE (s:Story {id: row.story_id})
MERGE (n)-[:OF]->(s)
"""


async def inbox(folder: Path) -> list[Figure]:
    """Measure inbound events per second against a bare script, with one and three replicas.

    Also measures a replica's memory while it works off a backlog.
    """
    async with LlmServer() as engine, Site(folder, engine.url) as site:
        await site.stop("inbox")
        async with site.clients() as (nats, driver):
            await drained(site, nats, DISPATCHED, EVENTS // 2, replicas=1)  # warms the servers
            alone = await bare(nats, driver)
            one, _ = await drained(site, nats, DISPATCHED, EVENTS, replicas=1)
            alone = (alone + await bare(nats, driver)) / 2
            three, _ = await drained(site, nats, DISPATCHED, EVENTS, replicas=3)
            backlog, peak = await drained(site, nats, TRANSITIONED, BACKLOG, replicas=1)
    how = f"{EVENTS:,} dispatches of {STORIES} stories; a bare script {EVENTS / alone:,.0f}/s"
    return [
        Figure("inbound events a second into the graph", EVENTS / one, "/s", how=how),
        at_least("of a bare fetch + UNWIND + ack script", alone / one, "x", 0.6, how),
        at_least("three replicas' speed / one's", one / three, "x", 1, "same events"),
        at_most(
            f"memory of a replica, a backlog of {BACKLOG:,}",
            peak,
            "MiB",
            300,
            f"its peak; drained in {backlog:.0f} s, two consumers",
        ),
    ]


async def drained(
    site: Site, nats: Nats, subject: str, count: int, replicas: int
) -> tuple[float, float]:
    """Return the seconds from first delivery to last ack of `count` messages, and the peak MiB."""
    jetstream = nats.jetstream()
    for stream, _ in CONSUMERS[subject]:
        await jetstream.purge_stream(stream)  # of the bare script's messages, for one
    await fill(jetstream, subject, count)
    processes = [
        ServerProcess(
            Workers(site.home, port, "inbox"),
            site.home / "logs" / f"inbox-{port}.log",
            READY_WITHIN,
        )
        for port in free_ports(replicas)
    ]
    # The consumers are paused so that all replicas begin together, after all have started.
    paused = [await pause(jetstream, *consumer) for consumer in CONSUMERS[subject]]
    await asyncio.gather(*(process.start() for process in processes))
    await asyncio.gather(*(resume() for resume in paused))
    # The replicas get messages with their next request, within 5 s.
    while not await delivering(jetstream, subject):
        await asyncio.sleep(0.02)
    began, peak = time.perf_counter(), 0.0
    while await left(jetstream, subject):
        peak = max(peak, *(peak_mib(process.pid) for process in processes))
        await asyncio.sleep(0.2)  # more often would take time from the replicas
    seconds = time.perf_counter() - began
    await asyncio.gather(*(process.kill() for process in processes))
    return seconds, peak


async def pause(jetstream: JetStreamContext, stream: str, name: str) -> Any:
    until = datetime.now(UTC).replace(year=datetime.now(UTC).year + 1)
    await jetstream.pause_consumer(stream, name, until.isoformat())
    return lambda: jetstream.resume_consumer(stream, name)


async def fill(jetstream: JetStreamContext, subject: str, count: int) -> None:
    run = uuid.uuid4().hex[:8]
    for first in range(0, count, 1_000):
        bodies = [body(subject, run, number) for number in range(first, first + 1_000)]
        await asyncio.gather(*(jetstream.publish(subject, data, timeout=60) for data in bodies))


def body(subject: str, run: str, number: int) -> bytes:
    story = {"story_id": f"B-{run}-{number % STORIES}", "timestamp": datetime.now(UTC).isoformat()}
    if subject == DISPATCHED:
        body = {"task_id": f"t-{number}", "agent_id": "council-dev", "role": "DEV"}
    else:
        body = {"from_phase": "BUILD", "to_phase": "TEST", "event": "build_done", "actor": "ana"}
    return json.dumps(story | body).encode()


async def delivering(jetstream: JetStreamContext, subject: str) -> bool:
    infos = [await jetstream.consumer_info(*consumer) for consumer in CONSUMERS[subject]]
    return any(each.num_ack_pending for each in infos)


async def left(jetstream: JetStreamContext, subject: str) -> int:
    infos = [await jetstream.consumer_info(*consumer) for consumer in CONSUMERS[subject]]
    return sum((each.num_pending or 0) + (each.num_ack_pending or 0) for each in infos)


async def bare(nats: Nats, driver: neo4j.AsyncDriver) -> float:
    """Return the seconds that a bare script (fetch, UNWIND, ack) takes for EVENTS messages."""
    jetstream = nats.jetstream()
    await jetstream.purge_stream("ORCHESTRATOR_EVENTS")
    await fill(jetstream, DISPATCHED, EVENTS)
    name = f"bare-{uuid.uuid4().hex[:8]}"
    config = ConsumerConfig(
        durable_name=name,
        filter_subject=DISPATCHED,
        ack_policy=AckPolicy.EXPLICIT,
        max_ack_pending=2_048,
    )
    await jetstream.add_consumer("ORCHESTRATOR_EVENTS", config)
    shared = await jetstream.pull_subscribe_bind(consumer=name, stream="ORCHESTRATOR_EVENTS")
    done, began = 0, time.perf_counter()
    async with driver.session() as session:
        while done < EVENTS:
            messages = await shared.fetch(BATCH)
            rows = [
                json.loads(message.data) | {"id": f"{name}/{message.metadata.sequence.stream}"}
                for message in messages
            ]

            async def store(tx: neo4j.AsyncManagedTransaction, rows: Sequence[Any] = rows) -> None:
                await (await tx.run(STORE, rows=rows)).consume()

            await session.execute_write(store)
            for message in messages:
                await message.ack()
            done += len(messages)
    seconds = time.perf_counter() - began
    await jetstream.delete_consumer("ORCHESTRATOR_EVENTS", name)
    return seconds


def peak_mib(pid: int | None) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) / 1024


async def mirror(folder: Path) -> list[Figure]:
    """Measure the time from a change of state to a subscriber's event, on an idle stack.

    Also that of an amendment, which is stored as an update of the context before it is announced.
    """
    async with LlmServer() as engine, Site(folder, engine.url) as site, site.clients() as (nats, _):
        moved = await moves(site, nats)
        amended = await amendments(site, nats)
        jetstream, trips, sent = nats.jetstream(), [], []
        async with Worker(site.client, task_queue="bare", workflows=[BareStory], activities=[noop]):
            for _ in range(CHANGES):
                began = time.perf_counter()
                await jetstream.publish("context.bench", b"{}")
                sent.append(time.perf_counter() - began)
                trips.append(await round_trip(site))
    both = 2 * statistics.median(trips) + statistics.median(sent)
    how = f"median of {CHANGES}; two round trips and a publish: {both * 1000:.0f} ms"
    found = []
    for what, each in (
        ("a change of state", statistics.median(moved)),
        ("an amendment", statistics.median(amended)),
    ):
        way = f"from {what} to a subscriber with its event"
        found += [
            Figure(way, each * 1000, "ms", how=how),
            at_most(f"{way} / two no-op activities and a publish", each / both, "x", 1.3, how),
        ]
    return found


async def moves(site: Site, nats: Nats) -> list[float]:
    """Return the seconds until a subscriber has the event of an approval of a scope."""
    took = []
    async with events_of(nats, TRANSITIONED) as came:
        for number in range(CHANGES):
            story = await at_scope_gate(site, f"US-move-{number}")
            while not came.empty():
                came.get_nowait()
            approval = {"gate": "approve_scope", "actor": "ana", "role": "PO"}
            await story.execute_update("approve", approval, result_type=dict)
            took.append(await came.get())
            await story.terminate()
    return took


async def amendments(site: Site, nats: Nats) -> list[float]:
    """Return the seconds until a subscriber has the event of an amendment of one story."""
    took = []
    story = await at_scope_gate(site, "US-amended")
    async with events_of(nats, "context.updated") as came:
        for _ in range(CHANGES):
            await asyncio.sleep(0.2)  # let the stack go idle
            await story.execute_update("amend", {"brief": uuid.uuid4().hex}, result_type=dict)
            took.append(await came.get())
    await story.terminate()
    return took


async def at_scope_gate(site: Site, story_id: str) -> WorkflowHandle[Any, Any]:
    """Return a story that waits for a person, on a stack that has gone idle."""
    story = await site.begin(story_id, approvals="human")
    while not await site.attribute(story_id, PENDING_GATE):
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.5)
    return story


@asynccontextmanager
async def events_of(nats: Nats, subject: str) -> AsyncIterator[asyncio.Queue[float]]:
    """Yield a queue of the seconds from the time of each event to its arrival."""
    came: asyncio.Queue[float] = asyncio.Queue()

    async def note(message: Msg) -> None:
        changed = datetime.fromisoformat(json.loads(message.data)["timestamp"])
        came.put_nowait((datetime.now(UTC) - changed).total_seconds())

    subscription = await nats.subscribe(subject, cb=note)
    yield came
    await subscription.unsubscribe()


async def round_trip(site: Site) -> float:
    """Return the seconds of one no-op activity: a run of ten less a run of none, divided by ten."""
    seconds = []
    for batches in ([], [1] * 10):
        began = time.perf_counter()
        await site.client.execute_workflow(
            BareStory.run,
            Shape(batches=batches, children=[]),
            id=f"bare-{uuid.uuid4()}",
            task_queue="bare",
        )
        seconds.append(time.perf_counter() - began)
    return (seconds[1] - seconds[0]) / 10
