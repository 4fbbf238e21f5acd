"""`fleet doctor` on real servers: each thing that is broken is named, with what to do about it."""

from __future__ import annotations

import asyncio
import json
import shlex
import time
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from nats.js import JetStreamContext
from neo4j import AsyncDriver
from prometheus_client import REGISTRY
from redis.asyncio import Redis
from temporalio import workflow
from temporalio.api.sdk.v1 import WorkflowMetadata
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner, Worker
from typer.testing import CliRunner

from activities.checks.sandbox import Sandbox
from activities.graph.activities import Graph
from bridge.mirror.story_sweep import StorySweep
from tests.support.fleet import Environment, new_environment, whole_fleet
from tests.support.fleet_cli import temporal as run_temporal
from tests.support.llm_server import LlmServer
from tests.support.polling import until
from tests.support.servers import Servers
from tests.support.stories import batch, new_story, spec
from workers.cli import app as cli
from workflows.models.entries import Entry
from workflows.models.events import ContextMilestoneReached, StoryCreated, TaskCreated
from workflows.models.ids import plan_workflow_id, story_workflow_id

TEXT = {
    "title": "Undo the deletion of a note",
    "brief": "As a writer I want to undo a deletion so that a slip costs me nothing.",
    "acceptance_criteria": ["Given a deleted note, when I press undo, then it is back."],
}


@pytest.fixture
async def environment(servers: Servers, llm: LlmServer) -> Environment:
    return await new_environment(servers, llm)


@pytest.fixture
async def fleet(
    environment: Environment, jetstream: JetStreamContext, driver: AsyncDriver
) -> AsyncIterator[Client]:
    """Run a whole fleet on streams of its own."""
    async with whole_fleet(environment) as client:
        yield client


class Diagnosis:
    """What `fleet doctor` printed. code: its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        assert out, err
        self.code, self.findings = code, json.loads(out)

    def of(self, check: str) -> list[dict[str, str]]:
        return [each for each in self.findings if each["check"] == check]

    def one(self, check: str, *words: str) -> dict[str, str]:
        """Return the only finding of the check that contains the words."""
        texts = [each for each in self.of(check) if all(word in str(each) for word in words)]
        assert len(texts) == 1, self.of(check)
        return texts[0]


async def fleet_command(environment: Environment, *arguments: str, stdin: str = "") -> Any:
    return await asyncio.to_thread(
        CliRunner().invoke, cli.app, arguments, input=stdin, env=environment
    )


async def doctor(environment: Environment, *arguments: str) -> Diagnosis:
    ended = await fleet_command(environment, "doctor", *arguments, "--json")
    if ended.exception and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    return Diagnosis(ended.exit_code, ended.stdout, ended.stderr)


async def test_a_fleet_that_runs_has_nothing_to_repair(
    fleet: Client, environment: Environment
) -> None:
    found = await doctor(environment)

    failing = [each for each in found.findings if each["outcome"] == "failing"]
    # The graph is shared with other tests, whose stories have no workflow here.
    assert [each for each in failing if each["check"] != "gates without stories"] == []
    assert {each["check"] for each in found.findings} == {
        *("valkey", "temporal", "nats", "neo4j", "streams", "consumers", "dead letters"),
        *("graph constraints", "workers", "stuck outboxes", "orphaned children"),
        *("gates without stories", "stale reports", "valkey memory", "clock skew"),
        *("sandbox", "engine"),
    }


async def test_what_is_broken_is_named_with_its_remedy(
    environment: Environment,
    jetstream: JetStreamContext,
    driver: AsyncDriver,
    client: Redis,
    graph: Graph,
) -> None:
    """No process runs, streams and a constraint are gone, a story has no workflow, a report is old.

    Valkey is almost full.
    """
    story = new_story()
    created = StoryCreated(title="t", rigor="L1", created_by="ana", timestamp=spec(story).timestamp)
    report = ContextMilestoneReached(
        milestone_id=f"{story}-m",
        event_type="WORKSPACE_REPORT",
        description="report j scores 1",
        timestamp=spec(story).timestamp,
    )
    await graph.record(
        batch(
            story,
            spec(story),
            created.model_copy(update={"story_id": story}),
            report.model_copy(update={"story_id": story}),
        )
    )
    await driver.execute_query("DROP CONSTRAINT gate_approval_id IF EXISTS")
    used = (await client.info("memory"))["used_memory"]
    await client.config_set("maxmemory", used + used // 10)
    try:
        found = await doctor(environment)
    finally:
        await client.config_set("maxmemory", 0)

    assert found.code == 1
    assert "workers inbox" in found.one("streams", "PLANNING_EVENTS does not exist")["remedy"]
    assert "workers agents" in found.one("consumers", "agents-responses does not")["remedy"]
    assert "workers story" in found.one("workers", "queue story")["remedy"]
    constraint = found.one("graph constraints", "gate_approval_id is not there")
    await driver.execute_query(constraint["remedy"].removeprefix("Run in cypher-shell: "))
    assert "fleet start" in found.one("gates without stories", story)["remedy"]
    assert f"fleet report {story} DIR" in found.one("stale reports", story)["remedy"]
    assert found.one("valkey memory")["outcome"] == "warning"
    again = await doctor(environment)
    assert again.one("graph constraints")["outcome"] == "ok"
    assert again.one("valkey memory")["outcome"] == "ok"


async def test_servers_that_do_not_answer_are_named_and_the_rest_is_checked(
    environment: Environment,
) -> None:
    away = {
        "NATS_URL": "nats://127.0.0.1:1",
        "NEO4J_URI": "bolt://127.0.0.1:1",
        "TEMPORAL_ADDRESS": "127.0.0.1:1",
        "VLLM_URL": "http://127.0.0.1:1",
    }

    found = await doctor(environment | away)

    assert found.code == 1
    for server, setting in (
        ("nats", "NATS_URL"),
        ("neo4j", "NEO4J_URI"),
        ("temporal", "TEMPORAL_ADDRESS"),
        ("engine", "VLLM_URL"),
    ):
        assert setting in found.one(server)["remedy"]
    assert found.one("valkey")["outcome"] == "ok"


async def test_a_sandbox_that_cannot_start_is_named(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = tmp_path / "bwrap"
    refusing.write_text("#!/bin/sh\necho 'bwrap: No permissions' >&2\nexit 1\n")
    refusing.chmod(0o755)

    assert (await doctor(environment)).one("sandbox")["outcome"] == "ok"
    monkeypatch.setattr("workers.diagnosis.Sandbox", lambda: Sandbox(str(refusing)))

    found = await doctor(environment)

    assert found.one("sandbox", "No permissions")["outcome"] == "failing"


async def test_a_clock_that_is_off_is_named(
    environment: Environment, fleet: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    monkeypatch.setattr("workers.diagnosis.time.time", lambda: real() + 60)

    found = await doctor(environment)

    skews = [each["found"] for each in found.of("clock skew")]
    assert [skew.split()[3] for skew in skews] == ["Valkey", "NATS", "Neo4j"]


@workflow.defn(name="DeliberationWorkflow")
class Council:
    """A council that works until it is stopped."""

    def __init__(self) -> None:
        self.stopped = False

    @workflow.run
    async def run(self) -> None:
        await workflow.wait_condition(lambda: self.stopped)

    @workflow.signal
    def stop(self) -> None:
        self.stopped = True


@workflow.defn(name="Parent")
class Parent:
    """A parent that ends and leaves its child."""

    @workflow.run
    async def run(self, child: str) -> None:
        await workflow.start_child_workflow(
            "DeliberationWorkflow", id=child, parent_close_policy=workflow.ParentClosePolicy.ABANDON
        )


async def test_a_council_whose_story_has_ended_is_named_and_the_remedy_stops_it(
    environment: Environment, servers: Servers
) -> None:
    there = await Client.connect(
        servers.temporal.address, namespace=environment["TEMPORAL_NAMESPACE"]
    )
    child = f"deliberation-{uuid.uuid4().hex}"
    runner = UnsandboxedWorkflowRunner()
    async with Worker(there, task_queue="q", workflows=[Parent, Council], workflow_runner=runner):
        await there.execute_workflow("Parent", child, id="the-parent", task_queue="q")

        async def orphans() -> list[dict[str, str]]:
            found = await doctor(environment)
            return [each for each in found.of("orphaned children") if child in each["found"]]

        (orphan,) = await until(orphans)
        await temporal(environment, orphan["remedy"].removeprefix("Stop it: "))
        await there.get_workflow_handle(child).result()


async def test_a_stuck_entry_is_named_and_skipped_kept_as_a_dead_letter_and_gone_round(
    environment: Environment, fleet: Client, graph: Graph
) -> None:
    story = await started(environment, f"{new_story()}.2")
    handle = fleet.get_workflow_handle(story_workflow_id(story))
    at = "2026-01-01T00:01:00.000Z"
    task = TaskCreated(story_id=story, timestamp=at, plan_id="p", task_id="t" * 10_000, role="DEV")
    child = plan_workflow_id(story, "p")
    entry = Entry(
        id=f"{child}/run/1",
        kind="TaskCreated",
        source=child,
        story_id=story,
        time=at,
        body=task.model_dump(),
    )
    await handle.signal("hand_on", [entry])

    async def stuck() -> list[dict[str, str]]:
        found = await doctor(environment)
        return [each for each in found.of("stuck outboxes") if entry.id in each["found"]]

    (shown,) = await until(stuck)
    assert "TaskCreated" in shown["found"]
    listed = await fleet_command(environment, "list", "--json")
    assert {row["story_id"]: row["stuck"] for row in json.loads(listed.stdout)}[story] == (
        "TaskCreated"
    )
    metadata = await handle.query("__temporal_workflow_metadata", result_type=WorkflowMetadata)
    assert entry.id in metadata.current_details
    query = f"WorkflowId = '{handle.id}' AND OutboxStuck = 'TaskCreated'"
    assert [each.id async for each in fleet.list_workflows(query)] == [handle.id]
    await StorySweep(fleet, graph, timedelta(days=1)).sweep()
    assert REGISTRY.get_sample_value("fleet_outbox_stuck") == 1
    _, command = shown["remedy"].split("fleet ")
    arguments = shlex.split(command.replace("WHY", "'that id was a mistake'"))
    for other in ("US-other", f"context-{'x%2E' * 30}"):
        another = await fleet_command(
            environment, "outbox", "skip", other, entry.id, "--reason", "r"
        )
        assert another.exit_code == 1
        assert f"not a stuck entry of {other}" in another.stderr
    assert handle.id != f"story-{story}"
    listing = await fleet_command(environment, "outbox", "list", handle.id, "--json")
    assert [each["entry"]["entry_id"] for each in json.loads(listing.stdout)] == [entry.id]

    done = await fleet_command(environment, *arguments, "--actor", "ana")
    assert done.exit_code == 0, done.stderr

    async def letters() -> list[dict[str, Any]]:
        ended = await fleet_command(environment, "dead-letters", "list", "--json")
        return [each for each in json.loads(ended.stdout) if each["consumer"] == "outbox/record"]

    (letter,) = await until(letters)
    assert letter["reason"] == "skipped by ana: that id was a mistake"
    assert json.loads(letter["body"]) == entry.body
    replayed = await fleet_command(environment, "dead-letters", "replay", str(letter["number"]))
    assert replayed.exit_code == 1
    assert "the graph refused" in replayed.stderr
    for repair in (("mirror", "replay"), ("graph", "rebuild")):
        again = await fleet_command(environment, *repair, story)
        assert again.exit_code == 0, again.stdout + again.stderr
    await handle.terminate()


async def started(environment: Environment, story: str = "") -> str:
    """Start a story and wait until it stands at its first gate."""
    story = story or new_story()
    start = json.dumps(TEXT | {"story_id": story, "created_by": "ana", "rigor": "L0"})
    ended = await fleet_command(environment, "start", "-", stdin=start)
    assert ended.exit_code == 0, ended.stderr

    async def listed() -> bool:
        shown = await fleet_command(environment, "show", story, "--json")
        return shown.exit_code == 0 and bool(json.loads(shown.stdout)["story"]["pending_gate"])

    await until(listed)
    return story


async def temporal(environment: Environment, command: str) -> None:
    """Run a command of the `temporal` CLI as the doctor printed it."""
    _, *arguments = shlex.split(command)
    ended = await run_temporal(environment, *arguments)
    assert ended.code == 0, ended.err


async def test_a_lost_payload_is_named_and_a_reset_to_before_it_gives_the_story_back(
    environment: Environment, fleet: Client, client: Redis
) -> None:
    story = await started(environment)
    handle = fleet.get_workflow_handle(story_workflow_id(story))

    async def state() -> dict[str, Any]:
        return dict(await handle.query("state"))

    whole = await doctor(environment, story)
    assert whole.one("lost payloads")["outcome"] == "ok"
    before = {key async for key in client.scan_iter("swe:payload:*")}
    large = ("--brief", "As a writer I want " + "more " * 8_000)
    criteria = [f"--criterion=Given {n} {'x' * 900}, then undo works." for n in range(40)]
    amended = await fleet_command(environment, "amend", story, *large, *criteria)
    assert amended.exit_code == 0, amended.stderr
    new = {key async for key in client.scan_iter("swe:payload:*")} - before
    assert new

    await client.delete(*new)
    found = await doctor(environment, story)

    assert found.code == 1
    first = found.of("lost payloads")[0]
    assert "WORKFLOW_EXECUTION_UPDATE_ACCEPTED" in first["found"]
    assert any(key.decode() in first["found"] for key in new)
    await temporal(environment, first["remedy"].removeprefix("Reset the story to before it: "))
    shown = await until(state, lambda view: view["pending_gate"] == "approve_scope")
    assert shown["title"] == TEXT["title"]
    kept = dict(await handle.query("text"))
    assert kept["brief"] == TEXT["brief"]
    after = (await doctor(environment, story)).of("lost payloads")
    assert {each["outcome"] for each in after} == {"warning"}  # in the run before the reset
    rebuilt = await fleet_command(environment, "graph", "rebuild", story, "--json")
    assert rebuilt.exit_code == 1
    (summary,) = json.loads(rebuilt.stdout)
    assert summary["writes"] > 0
    assert all("Valkey has no swe:payload:" in each for each in summary["lost"])
    await handle.terminate()


async def test_what_a_story_started_with_is_lost(environment: Environment, client: Redis) -> None:
    """Without a worker nothing has been done yet: there is no place to reset to."""
    story = new_story()
    start = json.dumps(
        {
            "story_id": story,
            "title": "Large",
            "brief": "more " * 8_000,
            "acceptance_criteria": [f"Given {n} {'x' * 900}" for n in range(40)],
            "created_by": "ana",
        }
    )
    before = {key async for key in client.scan_iter("swe:payload:*")}
    assert (await fleet_command(environment, "start", "-", stdin=start)).exit_code == 0
    new = {key async for key in client.scan_iter("swe:payload:*")} - before
    assert new
    await client.delete(*new)

    found = await doctor(environment, story)

    assert "fleet start" in found.one("lost payloads")["remedy"]
    assert found.one("lost payloads")["outcome"] == "failing"


async def test_a_story_that_is_not_there_is_named(environment: Environment) -> None:
    found = await doctor(environment, "US-nowhere")

    assert "no story US-nowhere" in found.one("lost payloads")["found"]
