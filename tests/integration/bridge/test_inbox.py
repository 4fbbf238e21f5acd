"""The inbox on real servers: each message handled once, none dead-lettered during an outage."""

import asyncio
import json
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from neo4j import AsyncDriver
from prometheus_client import REGISTRY
from structlog.testing import capture_logs
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.exceptions import ApplicationError

from activities.graph.activities import Graph
from activities.graph.changes import Change
from bridge.inbox.inbox import AT_ONCE, LAST_DELIVERY, Inbox
from bridge.jetstream import consumers, streams
from bridge.jetstream.consumers import CONSUMERS
from bridge.jetstream.dead_letters import DeadLetter, DeadLetters
from bridge.mirror.source import read_source
from tests.support.fleet import Environment, connect, running
from tests.support.polling import until
from tests.support.servers import RunningServer, Servers
from workflows.models.errors import ErrorType, application_error

TRANSITIONED = "planning.story.transitioned"
APPROVED = "planning.plan.approved"
DELIBERATED = "orchestration.deliberation.completed"


def a_story() -> str:
    return f"US-{uuid.uuid4().hex[:10]}"


def at(minute: int) -> str:
    return (datetime(2026, 3, 1, 10, tzinfo=UTC) + timedelta(minutes=minute)).isoformat()


def moved(story_id: str, to: str = "BUILD", minute: int = 0) -> dict[str, Any]:
    return {
        "story_id": story_id,
        "from_phase": "DESIGN",
        "to_phase": to,
        "event": "approve_design",
        "actor": "ana",
        "timestamp": at(minute),
    }


@pytest.fixture
async def bus(nats_client: Nats, jetstream: JetStreamContext) -> JetStreamContext:
    """Return a JetStream context with the fleet's streams and consumers."""
    await streams.reconcile(jetstream, replicas=1)
    await consumers.reconcile(jetstream)
    return jetstream


@pytest.fixture
async def temporal_client(servers: Servers, namespace: str) -> Client:
    return await connect(servers.temporal.address, namespace)


@asynccontextmanager
async def consuming(
    nats: Nats, graph: Graph, temporal: Client, replicas: int = 1
) -> AsyncIterator[None]:
    """Run that many inboxes until the block ends."""
    inboxes = [Inbox(nats, graph, temporal, 1) for _ in range(replicas)]
    runs = [asyncio.create_task(inbox.run()) for inbox in inboxes]
    try:
        yield
    finally:
        for inbox in inboxes:
            await inbox.shutdown()
        await asyncio.gather(*runs)


async def send(bus: JetStreamContext, subject: str, body: Any, **headers: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    await bus.publish(subject, data, headers=headers or None)


async def settled(bus: JetStreamContext) -> None:
    """Wait until no consumer has anything pending or outstanding."""

    async def nothing_left() -> bool:
        infos = [await bus.consumer_info(each.stream, each.name) for each in CONSUMERS]
        return not any((info.num_pending or 0) + (info.num_ack_pending or 0) for info in infos)

    await until(nothing_left)


async def rows(driver: AsyncDriver, cypher: Any, **parameters: Any) -> list[dict[str, Any]]:
    async with driver.session() as session:
        return await (await session.run(cypher, parameters)).data()


async def count(driver: AsyncDriver, label: str, story_id: str) -> int:
    found = await rows(
        driver,
        f"MATCH (n:{label} {{story_id: $story}})-[:OF]->(:Story {{id: $story}}) "
        "RETURN count(n) AS n",
        story=story_id,
    )
    return int(found[0]["n"])


async def dead(nats: Nats) -> list[DeadLetter]:
    return [letter async for letter in DeadLetters(nats).list()]


async def test_only_events_that_this_fleet_sent_are_treated_as_internal(
    bus: JetStreamContext,
    nats_client: Nats,
    graph: Graph,
    driver: AsyncDriver,
    temporal_client: Client,
) -> None:
    """Another fleet's namespace may have the same name, and its stories the same ids."""
    known = await temporal_client.start_workflow(
        "Idle", id=f"idle-{uuid.uuid4()}", task_queue="none"
    )
    run = known.first_execution_run_id
    space = temporal_client.namespace
    cases = {
        "another cluster's": (f"/swe-ai-fleet/{uuid.uuid4()}/{space}/story-1", "story-1/run/1", 1),
        "another namespace's": (
            (await read_source(temporal_client)).of("x").replace(f"/{space}/", "/other/"),
            "story-1/run/2",
            1,
        ),
        "an older release's": (f"/swe-ai-fleet/temporal/{space}/x", f"{known.id}/{run}/1", 0),
        "the same after a reset": (
            f"/swe-ai-fleet/temporal/{space}/x",
            f"{known.id}/{run}-00000000000000ff/1",
            0,
        ),
        "an older release's of another fleet": (
            f"/swe-ai-fleet/temporal/{space}/x",
            f"{known.id}/{uuid.uuid4()}/1",
            1,
        ),
        "an older release's without a run": (f"/swe-ai-fleet/temporal/{space}/x", "odd", 1),
    }
    stories = {name: a_story() for name in cases}
    for name, (source, event_id, _) in cases.items():
        headers = {"ce-source": source, "ce-id": event_id}
        await send(bus, TRANSITIONED, moved(stories[name]), **headers)

    async with consuming(nats_client, graph, temporal_client):
        await settled(bus)

    for name, (_, _, stored) in cases.items():
        assert await count(driver, "PhaseTransition", stories[name]) == stored, name
    await known.terminate()


async def test_messages_are_stored_and_those_of_the_fleet_are_not_stored_again(
    bus: JetStreamContext,
    nats_client: Nats,
    graph: Graph,
    driver: AsyncDriver,
    temporal_client: Client,
) -> None:
    story, own = a_story(), a_story()
    source = (await read_source(temporal_client)).of(f"story-{own}")
    await send(bus, TRANSITIONED, moved(story))
    await send(bus, APPROVED, {"story_id": story, "plan_id": "plan-1"})
    decision = {"id": "d-1", "type": "DESIGN", "title": "Use a queue", "rationale": "order"}
    body = {"story_id": story, "task_id": "t-1", "role": "DEV", "decisions": [decision]}
    await send(bus, DELIBERATED, body | {"unknown": "field"})
    dispatch = {"story_id": story, "task_id": "t-1", "agent_id": "a-1", "role": "DEV"}
    await send(bus, "orchestration.task.dispatched", dispatch)
    await send(
        bus,
        "context.decision.added",
        {"story_id": story, "decision_id": "d-2"}
        | {"title": "No cookies", "rationale": "law", "decided_by": "ana"},
    )
    await send(
        bus,
        "context.milestone.reached",
        {"story_id": story, "milestone_id": "m-1"}
        | {"event_type": "DEMO", "description": "shown to users"},
    )
    await send(bus, TRANSITIONED, moved(own), **{"ce-source": source, "ce-id": "own-1"})

    async with consuming(nats_client, graph, temporal_client):
        await settled(bus)

    for label in ("PhaseTransition", "PlanApproval", "TaskDispatch"):
        assert await count(driver, label, story) == 1, label
    assert await count(driver, "PhaseTransition", own) == 0
    found = await rows(
        driver,
        "MATCH (d:Decision {case_id: $story}) RETURN d.id AS id ORDER BY id",
        story=story,
    )
    assert [row["id"] for row in found] == ["d-1", "d-2"]
    found = await rows(
        driver, "MATCH (e:Event {case_id: $story, id: 'm-1'}) RETURN e.event_type AS t", story=story
    )
    assert found == [{"t": "DEMO"}]
    (approval,) = await rows(
        driver,
        "MATCH (a:PlanApproval {story_id: $story}) RETURN a.approved_by AS who, a.id AS id",
        story=story,
    )
    assert approval["who"] == "unknown"
    assert approval["id"].startswith("PLANNING_EVENTS/")
    assert await dead(nats_client) == []


async def test_a_message_that_comes_alone_does_not_wait_for_others(
    bus: JetStreamContext,
    nats_client: Nats,
    graph: Graph,
    temporal_client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bridge.inbox.inbox.FETCH_WITHIN_S", 600)
    async with consuming(nats_client, graph, temporal_client):
        await until(lambda: all_wait(bus))
        await send(bus, TRANSITIONED, moved(a_story()))
        await settled(bus)


async def all_wait(bus: JetStreamContext) -> bool:
    """Return whether every consumer has fetches that wait for a message."""
    infos = [await bus.consumer_info(each.stream, each.name) for each in CONSUMERS]
    return all(info.num_waiting for info in infos)


async def test_a_thousand_messages_and_three_replicas_store_each_once(
    bus: JetStreamContext,
    nats_client: Nats,
    graph: Graph,
    driver: AsyncDriver,
    temporal_client: Client,
) -> None:
    story = a_story()
    for number in range(1_000):
        await send(bus, APPROVED, {"story_id": story, "plan_id": f"plan-{number}"})

    async with consuming(nats_client, graph, temporal_client, replicas=3):
        await settled(bus)

    assert await count(driver, "PlanApproval", story) == 1_000
    assert await dead(nats_client) == []


async def test_the_same_message_a_hundred_times_is_one(
    bus: JetStreamContext,
    nats_client: Nats,
    graph: Graph,
    driver: AsyncDriver,
    temporal_client: Client,
) -> None:
    story = a_story()
    for _ in range(100):
        await send(bus, TRANSITIONED, moved(story), **{"ce-id": f"sender/{story}"})

    async with consuming(nats_client, graph, temporal_client, replicas=2):
        await settled(bus)

    assert await count(driver, "PhaseTransition", story) == 1


async def test_of_contradictory_transitions_the_later_one_is_kept(
    bus: JetStreamContext,
    nats_client: Nats,
    graph: Graph,
    driver: AsyncDriver,
    temporal_client: Client,
) -> None:
    story = a_story()
    await send(bus, TRANSITIONED, moved(story, "TEST", minute=9))
    await send(bus, TRANSITIONED, moved(story, "DRAFT", minute=2))

    async with consuming(nats_client, graph, temporal_client):
        await settled(bus)

    assert await count(driver, "PhaseTransition", story) == 2
    found = await rows(driver, "MATCH (s:Story {id: $story}) RETURN s.status AS s", story=story)
    assert found == [{"s": "TEST"}]


DECIDED = {"story_id": "US-1", "decision_id": "d-1", "rationale": "r", "decided_by": "ana"}
MILESTONE = {"story_id": "US-1", "milestone_id": "m-1", "description": "shown"}
LARGE = json.dumps(moved("US-1") | {"reason": "x" * 5_000_000}).encode()


@pytest.mark.parametrize(
    ("subject", "body", "reason"),
    [
        (APPROVED, b"{not json", "is not JSON"),
        (APPROVED, b"\xff\xfe", "is not JSON"),
        (APPROVED, b"[1, 2]", "not an object"),
        (APPROVED, b"[" * 100_000, "nested too deeply"),
        (APPROVED, b"", "is not JSON"),
        (APPROVED, {"plan_id": "plan-1"}, "story_id: required"),
        (APPROVED, {"story_id": "US-1"}, "plan_id"),
        (APPROVED, {"story_id": "US.*", "plan_id": "plan-1"}, "story_id: 'US.*' is not an id"),
        (APPROVED, {"story_id": "US-1", "plan_id": ">"}, "plan_id: '>' is not an id"),
        (APPROVED, {"story_id": "x'}) DETACH DELETE n //", "plan_id": "p"}, "is not an id"),
        (TRANSITIONED, LARGE, "at most 1048576"),
        (TRANSITIONED, moved("US-1") | {"timestamp": "2999-01-01T00:00:00Z"}, "later than the"),
        (TRANSITIONED, moved("US-1") | {"timestamp": "0044-03-15T12:00:00Z"}, "before 1970"),
        (TRANSITIONED, moved("US-1") | {"timestamp": "yesterday"}, "is not a time"),
        (DELIBERATED, {"story_id": "US-1", "role": "DEV"}, "task_id"),
        ("context.decision.added", {"story_id": "US-1", "title": "t"}, "decision_id"),
        ("context.milestone.reached", MILESTONE | {"event_type": "x" * 5_000}, "event_type"),
    ],
)
async def test_an_invalid_message_is_a_dead_letter_with_the_reason(
    bus: JetStreamContext,
    nats_client: Nats,
    graph: Graph,
    temporal_client: Client,
    subject: str,
    body: Any,
    reason: str,
) -> None:
    await send(bus, subject, body, **{"X-Sender": "elsewhere"})

    async with consuming(nats_client, graph, temporal_client):
        await settled(bus)

    letters = await dead(nats_client)
    of = sorted(each.name for each in CONSUMERS if each.subject == subject)
    assert sorted(letter.consumer for letter in letters) == of
    for letter in letters:
        assert reason in letter.reason
        assert letter.subject == subject
        assert letter.headers["X-Sender"] == "elsewhere"
        assert letter.deliveries == 1
        assert letter.body == (body if isinstance(body, bytes) else json.dumps(body).encode())


async def test_a_time_long_past_and_another_offset_are_accepted(
    bus: JetStreamContext,
    nats_client: Nats,
    graph: Graph,
    driver: AsyncDriver,
    temporal_client: Client,
) -> None:
    story = a_story()
    await send(bus, TRANSITIONED, moved(story, "A") | {"timestamp": "1999-01-01T00:00:00+05:30"})
    await send(bus, TRANSITIONED, moved(story, "B") | {"timestamp": "1999-01-01 00:00:00"})

    async with consuming(nats_client, graph, temporal_client):
        await settled(bus)

    found = await rows(driver, "MATCH (s:Story {id: $story}) RETURN s.status AS s", story=story)
    assert found == [{"s": "B"}]


class Poisoned(Graph):
    """A graph that can never store changes of one particular plan."""

    async def store(self, known: Any) -> None:
        changes: list[Change] = list(known)
        if any(change.entry.body.get("plan_id") == "poison" for change in changes):
            raise ApplicationError("cannot hold it", type="GraphValue", non_retryable=True)
        await super().store(changes)


class Forgetful(Graph):
    """A graph with a bug that one particular story triggers."""

    async def store(self, changes: Sequence[Change]) -> None:
        if any(change.story_id == "US-fault" for change in changes):
            raise KeyError("nobody thought of this")
        await super().store(changes)

    async def drop_packs(self, stories: Iterable[str]) -> None:
        raise KeyError("nor of this")


async def test_an_unexpected_error_does_not_end_the_inbox(
    bus: JetStreamContext,
    nats_client: Nats,
    graph: Graph,
    driver: AsyncDriver,
    temporal_client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bridge.inbox.inbox.NAK_AFTER_S", (0.01,))
    story = a_story()
    faulty = Forgetful(graph._driver, graph._cache, graph._scopes)
    await send(bus, TRANSITIONED, moved("US-fault"))
    await send(bus, "context.updated", {"story_id": story, "version": 1, "changed": ["CASE"]})
    await send(bus, TRANSITIONED, moved(story))

    async with consuming(nats_client, faulty, temporal_client):
        await settled(bus)

    assert await count(driver, "PhaseTransition", story) == 1
    letters = {letter.consumer: letter for letter in await dead(nats_client)}
    assert sorted(letters) == ["context-planning-story-transitions", "orch-context-updated"]
    for letter in letters.values():
        assert letter.deliveries == LAST_DELIVERY
        assert "nobody thought" in letter.error or "nor of this" in letter.error


class Busy(Graph):
    """A graph that cannot lock one particular story's node in time, again and again."""

    def __init__(self, graph: Graph, story_id: str, times: int) -> None:
        super().__init__(graph._driver, graph._cache, graph._scopes)
        self._story_id, self._times = story_id, times

    async def store(self, changes: Sequence[Change]) -> None:
        if self._times and any(change.story_id == self._story_id for change in changes):
            self._times -= 1
            raise application_error(ErrorType.GRAPH_BUSY, "the lock was not free in time")
        await super().store(changes)


async def test_a_message_that_finds_the_graph_busy_is_not_dead_lettered_for_that(
    bus: JetStreamContext,
    nats_client: Nats,
    graph: Graph,
    driver: AsyncDriver,
    temporal_client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bridge.inbox.inbox.NAK_AFTER_S", (0.01,))
    story = a_story()
    await send(bus, TRANSITIONED, moved(story))

    busy = Busy(graph, story, times=2 * LAST_DELIVERY)
    async with consuming(nats_client, busy, temporal_client):
        await settled(bus)

    assert await count(driver, "PhaseTransition", story) == 1
    assert await dead(nats_client) == []


class Slow(Graph):
    """A graph in which every transaction takes 10 s."""

    async def store(self, changes: Sequence[Change]) -> None:
        await asyncio.sleep(10)
        await super().store(changes)


async def test_work_slower_than_the_ack_wait_is_reported_as_in_progress_and_done_once(
    bus: JetStreamContext,
    nats_client: Nats,
    graph: Graph,
    driver: AsyncDriver,
    temporal_client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    soon = [each.model_copy(update={"ack_wait": timedelta(seconds=4)}) for each in CONSUMERS]
    await consumers.reconcile(bus, soon)
    monkeypatch.setattr("bridge.inbox.inbox.CONSUMERS", soon)
    story = a_story()
    await send(bus, TRANSITIONED, moved(story))

    async with consuming(
        nats_client, Slow(graph._driver, graph._cache, graph._scopes), temporal_client
    ):
        await settled(bus)

    assert await count(driver, "PhaseTransition", story) == 1
    info = await bus.consumer_info("PLANNING_EVENTS", "context-planning-story-transitions")
    assert info.delivered
    assert info.delivered.consumer_seq == 1


async def test_a_removed_consumer_is_created_again(
    bus: JetStreamContext,
    nats_client: Nats,
    graph: Graph,
    driver: AsyncDriver,
    temporal_client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bridge.inbox.inbox.FETCH_WITHIN_S", 0.5)
    story = a_story()
    async with consuming(nats_client, graph, temporal_client):
        await send(bus, TRANSITIONED, moved(story))
        await settled(bus)
        for each in CONSUMERS:
            await bus.delete_consumer(each.stream, each.name)
        await send(bus, TRANSITIONED, moved(story, minute=1))

        async def both_stored() -> bool:
            return await count(driver, "PhaseTransition", story) == 2

        async def all_there() -> bool:
            names = {info.name for info in await bus.consumers_info("CONTEXT")}
            return names >= {each.name for each in CONSUMERS if each.stream == "CONTEXT"}

        await until(both_stored)
        await until(all_there)


async def test_an_outage_of_nats_is_logged_once_for_each_consumer(
    bus: JetStreamContext,
    nats_client: Nats,
    nats_server: RunningServer,
    graph: Graph,
    driver: AsyncDriver,
    temporal_client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetched, failures = Inbox._fetched, 0

    async def counted(self: Inbox, shared: JetStreamContext.PullSubscription) -> list[Msg]:
        nonlocal failures
        try:
            return await fetched(self, shared)
        except Exception:
            failures += 1
            raise

    monkeypatch.setattr(Inbox, "_fetched", counted)
    monkeypatch.setattr("bridge.inbox.inbox.STORE_AGAIN_S", (0.05, 0.05))
    monkeypatch.setattr("bridge.inbox.inbox.FETCH_WITHIN_S", 0.5)
    story = a_story()
    with capture_logs() as logs:
        async with consuming(nats_client, graph, temporal_client):
            await nats_server.kill()
            await until(lambda: failures >= 5 * AT_ONCE * len(CONSUMERS))
            await nats_server.start()
            await until(lambda: nats_client.is_connected)
            await send(bus, TRANSITIONED, moved(story))
            await settled(bus)

    said = Counter(each["consumer"] for each in logs if each["event"] == "NATS does not answer")
    assert said.keys() == {consumer.name for consumer in CONSUMERS}
    assert max(said.values()) <= AT_ONCE
    assert await count(driver, "PhaseTransition", story) == 1


async def test_the_lag_of_a_consumer_is_a_metric(
    bus: JetStreamContext,
    nats_client: Nats,
    graph: Graph,
    temporal_client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bridge.inbox.inbox.LAG_EVERY_S", 0.05)
    name = {"consumer": "context-planning-story-transitions"}

    def lag(figure: str) -> float | None:
        return REGISTRY.get_sample_value(f"fleet_consumer_{figure}", name)

    class Away(Graph):
        async def store(self, changes: Sequence[Change]) -> None:
            raise ApplicationError("away", type="GraphUnavailable")

    story = a_story()
    for minute in range(600):
        await send(bus, TRANSITIONED, moved(story, minute=minute))
    away = Away(graph._driver, graph._cache, graph._scopes)
    async with consuming(nats_client, away, temporal_client):

        async def is_paused() -> bool:
            return (lag("outstanding"), lag("pending")) == (512, 88) and lag("paused") == 1

        await until(is_paused)
    async with consuming(nats_client, graph, temporal_client):

        async def caught_up() -> bool:
            return (lag("outstanding"), lag("pending")) == (0, 0) and lag("paused") == 0

        await until(caught_up)
        await settled(bus)


async def test_one_bad_message_among_ten_thousand_is_dead_lettered_and_delays_no_other(
    bus: JetStreamContext,
    nats_client: Nats,
    graph: Graph,
    driver: AsyncDriver,
    temporal_client: Client,
) -> None:
    story = a_story()
    await bus.delete_consumer("PLANNING_EVENTS", "orch-planning-plan-approved")
    for first in range(0, 10_000, 500):
        plans = [f"plan-{number}" for number in range(first, first + 500)]
        if first == 5_000:
            plans[250] = "poison"
        bodies = [json.dumps({"story_id": story, "plan_id": plan}).encode() for plan in plans]
        await asyncio.gather(*(bus.publish(APPROVED, body) for body in bodies))
    poisoned = Poisoned(graph._driver, graph._cache, graph._scopes)
    inbox = Inbox(nats_client, poisoned, temporal_client, 1)
    inbox._source = await read_source(temporal_client)  # as `run` does
    name = "context-planning-plan-approved"
    only = next(each for each in CONSUMERS if each.name == name)

    work = asyncio.create_task(inbox._consume(only))
    await until(lambda: nothing_left(bus, name))
    await inbox.shutdown()
    await work

    assert await count(driver, "PlanApproval", story) == 9_999
    (letter,) = await dead(nats_client)
    assert letter.reason == "it can never be applied"
    assert letter.error == "cannot hold it"


async def nothing_left(bus: JetStreamContext, name: str) -> bool:
    info = await bus.consumer_info("PLANNING_EVENTS", name)
    return not (info.num_pending or 0) + (info.num_ack_pending or 0)


async def test_while_the_graph_is_away_nothing_is_fetched_nor_dead_lettered(
    bus: JetStreamContext,
    nats_client: Nats,
    graph: Graph,
    driver: AsyncDriver,
    temporal_client: Client,
    neo4j_server: RunningServer,
) -> None:
    story = a_story()
    await neo4j_server.kill()
    async with consuming(nats_client, graph, temporal_client):
        for number in range(600):
            await send(bus, TRANSITIONED, moved(story, minute=number))
        name = "context-planning-story-transitions"

        async def holds_one_batch() -> bool:
            info = await bus.consumer_info("PLANNING_EVENTS", name)
            paused = REGISTRY.get_sample_value("fleet_consumer_paused", {"consumer": name})
            return paused == 1 and bool(info.num_ack_pending) and bool(info.num_pending)

        await until(holds_one_batch)
        await neo4j_server.start()
        await settled(bus)

    assert await count(driver, "PhaseTransition", story) == 600
    assert await dead(nats_client) == []


async def test_a_replica_that_is_killed_loses_nothing(
    bus: JetStreamContext,
    nats_client: Nats,
    driver: AsyncDriver,
    environment: Environment,
) -> None:
    story = a_story()
    for number in range(3_000):
        await bus.publish(
            APPROVED, json.dumps({"story_id": story, "plan_id": f"p{number}"}).encode()
        )
    async with running("inbox", environment) as first:
        await until(lambda: some_stored(driver, story))
        first.process.kill()
        await first.process.wait()
        async with running("inbox", environment), running("inbox", environment):
            await settled(bus)

    assert await count(driver, "PlanApproval", story) == 3_000
    assert await dead(nats_client) == []


async def some_stored(driver: AsyncDriver, story: str) -> bool:
    return await count(driver, "PlanApproval", story) > 0


async def test_a_plan_under_the_workflow_id_of_another_storys_plan_is_a_dead_letter(
    bus: JetStreamContext, nats_client: Nats, graph: Graph, temporal_client: Client
) -> None:
    story = a_story()
    async with consuming(nats_client, graph, temporal_client):
        await send(bus, APPROVED, {"story_id": f"{story}-b", "plan_id": "c", "roles": ["DEV"]})
        await settled(bus)

        await send(bus, APPROVED, {"story_id": story, "plan_id": "b-c", "roles": ["DEV"]})
        await settled(bus)

    (letter,) = await dead(nats_client)
    assert letter.subject == APPROVED
    assert f"is the workflow of plan c of {story}-b" in letter.error
    assert f"give the plan of {story} another id" in letter.error
    run = await temporal_client.get_workflow_handle(f"plan-{story}-b-c").describe()
    assert run.status == WorkflowExecutionStatus.RUNNING
