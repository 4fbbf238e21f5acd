"""The checks of `fleet doctor`: servers, streams, graph, stories and sandbox, each with a remedy.

A check returns findings. A server that does not answer is a finding too, and does not prevent the
other checks.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, LiteralString

from nats.aio.client import Client as Nats
from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError
from neo4j import AsyncDriver
from neo4j.exceptions import DriverError, Neo4jError
from redis.asyncio import Redis
from redis.exceptions import RedisError
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowQueryFailedError
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError

from activities.checks.sandbox import CannotRun, Sandbox
from activities.graph.activities import OVER
from activities.graph.context_update.payloads import NOT_LIVE
from activities.graph.migrations import MIGRATIONS
from bridge.executions import find_execution
from bridge.jetstream import consumers, streams
from bridge.story_list import STUCK_RUNS
from workers.clients.connection import StartError, one_line
from workers.clients.engine import open_engine
from workers.clients.nats import open_nats
from workers.clients.neo4j import open_neo4j
from workers.clients.temporal import open_temporal
from workers.clients.valkey import open_valkey, read_memory
from workers.external_storage import data_converter
from workers.lost_payloads import lost_by_story
from workers.payload_codec import encrypting_converter
from workers.settings import Settings
from workflows.models.base import Model
from workflows.models.ids import story_workflow_id
from workflows.models.outbox import OutboxStuck
from workflows.outbox import STUCK
from workflows.stubs import (
    AGENTS_QUEUE,
    BRIDGE_QUEUE,
    CONTEXT_QUEUE,
    STORY_QUEUE,
    WORKSPACE_QUEUE,
)

ANSWER_WITHIN_S = 30.0
QUERY_WITHIN = timedelta(seconds=10)

SKEW_ALLOWED_S = 2.0
"""How far a server's clock may be from this machine's."""

REPORT_STALE_AFTER = timedelta(days=7)
"""The age of a workspace report from which a story that still waits on it is reported."""

QUEUES: Mapping[str, tuple[str, TaskQueueType.ValueType]] = {
    STORY_QUEUE: ("story", TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW),
    AGENTS_QUEUE: ("agents", TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY),
    CONTEXT_QUEUE: ("context", TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY),
    BRIDGE_QUEUE: ("bridge", TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY),
    WORKSPACE_QUEUE: ("workspace", TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY),
}
"""Task queue -> the process that serves it, and the kind of its tasks."""

CHILDREN = (
    "ExecutionStatus = 'Running' AND WorkflowType IN ('DeliberationWorkflow', 'PlanWorkflow')"
)

Outcome = Literal["ok", "warning", "failing"]


class Finding(Model):
    """What a check has found. remedy: what to do; empty if nothing is wrong."""

    check: str
    outcome: Outcome
    found: str
    remedy: str = ""


Check = Callable[[], Awaitable[list[Finding]]]


@dataclass(frozen=True)
class Servers:
    """Connections to the servers that answer; None for the others."""

    temporal: Client | None
    nats: Nats | None
    neo4j: AsyncDriver | None
    valkey: Redis | None


async def diagnose(settings: Settings, story_id: str = "") -> list[Finding]:
    """Run every check, or the one for the payloads of a story too; return the findings in order."""
    found: list[Finding] = []
    async with AsyncExitStack() as stack:
        servers = await _servers(settings, stack, found)
        for name, check in _checks(settings, servers, story_id):
            found += await _made(name, check)
    return found


async def _servers(settings: Settings, stack: AsyncExitStack, found: list[Finding]) -> Servers:
    async def opened(name: str, server: Any) -> Any:
        try:
            connection = await stack.enter_async_context(server)
        except StartError as error:
            found.append(_failing(name, "no connection", str(error)))
            return None
        found.append(_ok(name, "answers"))
        return connection

    valkey = await opened("valkey", open_valkey(settings))
    return Servers(
        valkey=valkey,
        temporal=await opened("temporal", _temporal(settings, valkey)),
        nats=await opened("nats", open_nats(settings, failed=lambda _where, _error: None)),
        neo4j=await opened("neo4j", open_neo4j(settings)),
    )


@asynccontextmanager
async def _temporal(settings: Settings, valkey: Redis | None) -> AsyncIterator[Client]:
    keys = settings.encryption_keys
    converter = (
        data_converter(valkey, settings.keep_payloads_for, keys)
        if valkey
        else encrypting_converter(keys)
    )
    yield await open_temporal(settings, converter)


def _checks(settings: Settings, servers: Servers, story_id: str) -> Iterator[tuple[str, Check]]:
    temporal, nats, neo4j, valkey = servers.temporal, servers.nats, servers.neo4j, servers.valkey
    if nats:
        yield "streams", lambda: check_streams(nats, settings.nats_replicas)
        yield "consumers", lambda: check_consumers(nats)
        yield "dead letters", lambda: check_dead_letters(nats)
    if neo4j:
        yield "graph constraints", lambda: check_constraints(neo4j)
    if temporal:
        yield "workers", lambda: check_workers(temporal)
        yield "stuck outboxes", lambda: check_outboxes(temporal)
        yield "orphaned children", lambda: check_children(temporal)
    if temporal and neo4j:
        yield "gates without stories", lambda: check_gates(temporal, neo4j)
    if neo4j:
        yield "stale reports", lambda: check_reports(neo4j)
    if valkey:
        yield "valkey memory", lambda: check_memory(valkey)
    yield "clock skew", lambda: check_clocks(servers)
    yield "sandbox", check_sandbox
    yield "engine", lambda: check_engine(settings)
    if story_id and temporal and valkey:
        yield "lost payloads", lambda: check_payloads(temporal, story_id)


async def _made(name: str, check: Check) -> list[Finding]:
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            return await check()
    except TimeoutError:
        return [_failing(name, f"no answer in {ANSWER_WITHIN_S:g} s", "Run this again")]
    except (RPCError, NatsError, Neo4jError, DriverError, RedisError) as error:
        return [
            _failing(
                name,
                f"the server refuses: {type(error).__name__}: {one_line(error)}",
                "Correct what it names, then run this again",
            )
        ]
    except ApplicationError as error:
        return [_failing(name, error.message, "Correct what it names, then run this again")]


def _ok(check: str, found: str) -> Finding:
    return Finding(check=check, outcome="ok", found=found)


def _warning(check: str, found: str, remedy: str) -> Finding:
    return Finding(check=check, outcome="warning", found=found, remedy=remedy)


def _failing(check: str, found: str, remedy: str) -> Finding:
    return Finding(check=check, outcome="failing", found=found, remedy=remedy)


# --- NATS -----------------------------------------------------------------------------------------


async def check_streams(nats: Nats, replicas: int) -> list[Finding]:
    """Compare the streams with those that the fleet declares."""
    name, found = "streams", []
    jetstream = nats.jetstream()
    restart = "Start `python -m workers inbox`: it corrects that"
    for stream in streams.STREAMS:
        try:
            config = (await jetstream.stream_info(stream.name)).config
        except NotFoundError:
            found.append(_failing(name, f"{stream.name} does not exist", restart))
            continue
        if why := streams.incompatibility(config):
            found.append(
                _failing(
                    name,
                    f"{stream.name} loses events: {why}",
                    f"Back it up and remove it: nats stream rm {stream.name}; then: {restart}",
                )
            )
        elif drift := streams.drift(config, stream, replicas):
            found.append(_failing(name, f"{stream.name} differs: {', '.join(drift)}", restart))
    return found or [_ok(name, f"{len(streams.STREAMS)} as declared")]


async def check_consumers(nats: Nats) -> list[Finding]:
    """Compare the consumers with those that the fleet declares, and find those without a reader."""
    name, found = "consumers", []
    jetstream = nats.jetstream()
    declared = {**dict.fromkeys(consumers.CONSUMERS, "inbox"), consumers.AGENTS_RESPONSES: "agents"}
    for consumer, process in declared.items():
        start = f"Start `python -m workers {process}`"
        try:
            info = await jetstream.consumer_info(consumer.stream, consumer.name)
        except NotFoundError:
            found.append(_failing(name, f"{consumer.stream}/{consumer.name} does not exist", start))
            continue
        place = f"{consumer.stream}/{consumer.name}"
        if why := consumers.incompatibility(info.config):
            remove = f"nats consumer rm {consumer.stream} {consumer.name}"
            found.append(_failing(name, f"{place}: {why}", f"Remove it: {remove}; then: {start}"))
        elif drift := consumers.drift(info.config, consumer):
            found.append(_failing(name, f"{place} differs: {', '.join(drift)}", start))
        elif info.num_pending and not info.num_waiting:
            found.append(_failing(name, f"{place}: {info.num_pending} wait unread", start))
    return found or [_ok(name, f"{len(declared)} as declared")]


async def check_dead_letters(nats: Nats) -> list[Finding]:
    """Count the dead letters."""
    name = "dead letters"
    try:
        count = (await nats.jetstream().stream_info("DEAD_LETTERS")).state.messages
    except NotFoundError:
        return []  # reported with the streams
    if count:
        return [_warning(name, f"{count}", "Look at them: fleet dead-letters list")]
    return [_ok(name, "none")]


# --- the graph ------------------------------------------------------------------------------------


async def check_constraints(driver: AsyncDriver) -> list[Finding]:
    """Compare the graph's versions, constraints and indexes with those of the migrations."""
    name = "graph constraints"
    applied = {
        row["version"]
        for row in await _read(driver, "MATCH (m:Migration) RETURN m.version AS version")
    }
    if missing := [each for each in MIGRATIONS if each.version not in applied]:
        versions = ", ".join(str(each.version) for each in missing)
        return [
            _failing(
                name,
                f"version {versions} is not applied",
                "Start `python -m workers context`: it applies them",
            )
        ]
    there = {row["name"] for row in await _read(driver, "SHOW CONSTRAINTS YIELD name RETURN name")}
    there |= {row["name"] for row in await _read(driver, "SHOW INDEXES YIELD name RETURN name")}
    schema = [
        statement
        for each in MIGRATIONS
        for statement in each.statements
        if statement.startswith(("CREATE CONSTRAINT ", "CREATE INDEX "))
    ]
    found = [
        _failing(name, f"{statement.split()[2]} is not there", f"Run in cypher-shell: {statement}")
        for statement in schema
        if statement.split()[2] not in there
    ]
    return found or [_ok(name, f"{len(schema)} as declared")]


LIVE: LiteralString = """
MATCH (s:Story) WHERE s.workflow_id IS NOT NULL AND NOT coalesce(s.status, 'UNKNOWN') IN $over
CALL (s) {
  OPTIONAL MATCH (e:Event {case_id: s.id})
  RETURN count(CASE e.event_type WHEN 'planning.gate.opened' THEN 1 END)
       - count(CASE e.event_type WHEN 'planning.gate.closed' THEN 1 END) AS gates,
         max(CASE e.event_type WHEN 'WORKSPACE_REPORT' THEN e.timestamp_ms END) AS reported_ms
}
RETURN s.id AS id, s.status AS status, gates, reported_ms ORDER BY id
"""
"""The stories that the graph holds as live: their open gates, and when they had a report."""


async def _live(driver: AsyncDriver) -> list[dict[str, Any]]:
    return await _read(driver, LIVE, over=[*NOT_LIVE, *OVER])


async def _read(
    driver: AsyncDriver, cypher: LiteralString, **parameters: Any
) -> list[dict[str, Any]]:
    async with driver.session() as session:
        return await (await session.run(cypher, parameters)).data()


async def check_gates(temporal: Client, driver: AsyncDriver) -> list[Finding]:
    """Find stories that are live in the graph, with their gates, and have no workflow."""
    name, found = "gates without stories", []
    rows = await _live(driver)
    for row in rows:
        execution = await find_execution(temporal, story_workflow_id(row["id"]))
        if execution and execution.status == WorkflowExecutionStatus.RUNNING:
            continue
        gates = f"{max(row['gates'], 0)} open gates"
        if execution is None:
            found.append(
                _failing(
                    name,
                    f"{row['id']} is {row['status']} in the graph with {gates}, and Temporal has "
                    "no workflow of it",
                    "Start it again under its id with `fleet start`, or end it in the graph: MATCH "
                    f"(s:Story {{id: {json.dumps(row['id'])}}}) SET s.status = 'CANCELLED'",
                )
            )
        else:
            status = execution.status.name if execution.status else "UNKNOWN"
            found.append(
                _failing(
                    name,
                    f"{row['id']} is {row['status']} in the graph with {gates}, and its workflow "
                    f"is {status}",
                    "Start `python -m workers inbox` and `story`: the sweep of the inbox closes it",
                )
            )
    return found or [_ok(name, f"{len(rows)} live stories have their workflow")]


async def check_reports(driver: AsyncDriver) -> list[Finding]:
    """Find live stories whose newest workspace report is old."""
    name = "stale reports"
    limit_ms = (time.time() - REPORT_STALE_AFTER.total_seconds()) * 1000
    reported = [row for row in await _live(driver) if row["reported_ms"]]
    found = [
        _warning(
            name,
            f"{row['id']} is {row['status']} on a report that is "
            f"{int((time.time() - row['reported_ms'] / 1000) / 86_400)} days old",
            f"Measure again: fleet report {shlex.quote(row['id'])} DIR",
        )
        for row in reported
        if row["reported_ms"] < limit_ms
    ]
    return found or [
        _ok(name, f"{len(reported)} reports, none over {REPORT_STALE_AFTER.days} days")
    ]


# --- Temporal -------------------------------------------------------------------------------------


async def check_workers(temporal: Client) -> list[Finding]:
    """Find task queues that no worker serves."""
    name, found = "workers", []
    for queue, (process, kind) in QUEUES.items():
        answer = await temporal.workflow_service.describe_task_queue(
            DescribeTaskQueueRequest(
                namespace=temporal.namespace,
                task_queue=TaskQueue(name=queue),
                task_queue_type=kind,
            )
        )
        if not answer.pollers:
            found.append(
                _failing(
                    name,
                    f"no worker serves the queue {queue}",
                    f"Start `python -m workers {process}`",
                )
            )
    return found or [_ok(name, f"{len(QUEUES)} task queues are served")]


async def check_outboxes(temporal: Client) -> list[Finding]:
    """Find outbox entries that can be neither stored nor published."""
    name, found = "stuck outboxes", []
    async for run in temporal.list_workflows(STUCK_RUNS):
        handle = temporal.get_workflow_handle(run.id)
        try:
            entries = await handle.query(
                STUCK, result_type=list[OutboxStuck], rpc_timeout=QUERY_WITHIN
            )
        except (RPCError, WorkflowQueryFailedError) as error:
            found.append(
                _failing(
                    name, f"{run.id} does not answer: {error}", "Start `python -m workers story`"
                )
            )
            continue
        found += [
            _failing(
                name,
                f"{run.id}: {each.kind} {each.entry_id}, {each.step}: {each.error}",
                f"Remove the cause, or skip it: fleet outbox skip "
                f"{shlex.quote(each.story_id or run.id)} "
                f"{shlex.quote(each.entry_id)} --reason WHY",
            )
            for each in entries
        ]
    return found or [_ok(name, "none")]


async def check_children(temporal: Client) -> list[Finding]:
    """Find councils and plans at work whose parent has ended."""
    name, found, count = "orphaned children", [], 0
    running: dict[str, bool] = {}
    async for run in temporal.list_workflows(CHILDREN):
        if not run.parent_id:
            continue
        count += 1
        if run.parent_id not in running:
            parent = await find_execution(temporal, run.parent_id)
            running[run.parent_id] = (
                parent is not None and parent.status == WorkflowExecutionStatus.RUNNING
            )
        if not running[run.parent_id]:
            found.append(
                _failing(
                    name,
                    f"{run.id} works for {run.parent_id}, which has ended",
                    "Stop it: temporal workflow signal --name stop --workflow-id "
                    f"{shlex.quote(run.id)}",
                )
            )
    return found or [_ok(name, f"none of {count} children")]


async def check_payloads(temporal: Client, story_id: str) -> list[Finding]:
    """Check each payload that the story's histories refer to."""
    name = "lost payloads"
    runs, losses = await lost_by_story(temporal, story_id)
    if not runs:
        return [
            _failing(
                name,
                f"there is no story {story_id} in namespace {temporal.namespace}",
                "`fleet list --all` lists those there are",
            )
        ]
    found = [
        Finding(
            check=name,
            outcome="warning" if loss.ended else "failing",
            found=f"{each.workflow_id} {each.run_id}, event {each.event_id} "
            f"({each.event_type}): {each.why}",
            remedy=loss.remedy,
        )
        for loss in losses
        for each in loss.lost
    ]
    return found or [_ok(name, f"none in {runs} runs of {story_id}")]


# --- Valkey, clocks, sandbox, engine --------------------------------------------------------------


async def check_memory(valkey: Redis) -> list[Finding]:
    """Compare Valkey's memory with its limit, or with the machine's memory if it has none."""
    name = "valkey memory"
    memory = await read_memory(valkey)
    if memory.is_short:
        remedy = "Raise maxmemory: at the limit Valkey refuses payloads, and stories stop"
        return [_warning(name, str(memory), remedy)]
    return [_ok(name, str(memory))]


async def check_clocks(servers: Servers) -> list[Finding]:
    """Compare the servers' clocks with this machine's."""
    name, skews = "clock skew", {}
    for server, read in _clocks(servers):
        before = time.time()
        theirs = await read()
        after = time.time()
        if theirs is None:
            continue
        # How far it is outside the time of the call: the answer may be from any moment of that.
        skews[server] = max(before - theirs, theirs - after, 0.0)
    found = [
        _failing(
            name,
            f"the clock of {server} is {skew:.1f} s off",
            "Synchronize the machines' clocks (NTP): orders and timeouts depend on them",
        )
        for server, skew in skews.items()
        if skew > SKEW_ALLOWED_S
    ]
    return found or [
        _ok(name, f"none over {SKEW_ALLOWED_S:g} s: {', '.join(skews) or 'no server'}")
    ]


def _clocks(servers: Servers) -> Iterable[tuple[str, Callable[[], Awaitable[float | None]]]]:
    if valkey := servers.valkey:

        async def of_valkey() -> float:
            seconds, micros = await valkey.time()
            return float(seconds) + float(micros) / 1e6

        yield "Valkey", of_valkey
    if nats := servers.nats:

        async def of_nats() -> float | None:
            answer = await nats.request("$JS.API.STREAM.INFO.DEAD_LETTERS")
            at = json.loads(answer.data).get("ts")  # absent without that stream, which is reported
            return datetime.fromisoformat(at).timestamp() if at else None

        yield "NATS", of_nats
    if driver := servers.neo4j:

        async def of_neo4j() -> float:
            rows = await _read(driver, "RETURN datetime.realtime().epochMillis AS ms")
            return float(rows[0]["ms"]) / 1000

        yield "Neo4j", of_neo4j


async def check_sandbox() -> list[Finding]:
    """Run a program in the sandbox of this machine."""
    name = "sandbox"
    try:
        await Sandbox().probe()
    except CannotRun as error:
        return [
            _failing(
                name,
                str(error),
                "Install bubblewrap and allow user namespaces; until then proposals' code is not "
                "checked",
            )
        ]
    return [_ok(name, "runs programs")]


async def check_engine(settings: Settings) -> list[Finding]:
    """Ask the LLM's endpoint for its models."""
    try:
        async with open_engine(settings) as engine:
            return [_ok("engine", f"serves {engine.model or 'one model'}")]
    except StartError as error:
        return [_failing("engine", "not usable", str(error))]
