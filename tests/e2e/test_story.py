"""A story on the real stack, through the `temporal` CLI: from start to DONE, and refusals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import nats
import neo4j
import pytest
from nats.js.api import ConsumerConfig, DeliverPolicy
from redis.asyncio import Redis

from tests.e2e.conftest import GATES, Fleet
from tests.support.polling import until
from workers.payload_codec import text_cipher
from workflows.models.context import ContextPack

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
SAMPLE = EXAMPLES / "ratelimit"
README_STORY = EXAMPLES / "stories" / "readme.json"

pytestmark = pytest.mark.timeout(5400)

RECORDED = {
    "planning.story.created": "MATCH (n:Story {id: $story_id}) RETURN count(n) AS n",
    "planning.story.transitioned": "MATCH (n:PhaseTransition {story_id: $story_id, "
    "from_phase: $from_phase, to_phase: $to_phase}) RETURN count(n) AS n",
    "planning.plan.approved": "MATCH (n:PlanApproval {plan_id: $plan_id}) RETURN count(n) AS n",
    "planning.task.created": "MATCH (n:Subtask {id: $task_id}) RETURN count(n) AS n",
    "planning.gate.approved": "MATCH (n:GateApproval {id: $id}) RETURN count(n) AS n",
    "planning.plan.completed": "MATCH (n:PlanVersion {id: $plan_id, status: $status}) "
    "RETURN count(n) AS n",
    "orchestration.task.completed": "MATCH (n:Subtask {id: $task_id, status: 'DONE'}) "
    "RETURN count(n) AS n",
    "orchestration.task.dispatched": "MATCH (n:TaskDispatch {task_id: $task_id}) "
    "RETURN count(n) AS n",
    "context.decision.added": "MATCH (n:Decision {id: $decision_id}) RETURN count(n) AS n",
}
"""Subject -> the query that must find a node when a subscriber has the event."""


class Follower:
    """A NATS subscriber that looks up each event in Neo4j as it receives it."""

    def __init__(self, fleet: Fleet, story_id: str) -> None:
        self.env, self.story_id = fleet.env, story_id
        self.events: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.not_recorded: list[str] = []

    async def follow(self) -> None:
        env = self.env
        client = await nats.connect(
            env["NATS_URL"], user=env["NATS_USER"], password=env["NATS_PASSWORD"]
        )
        driver = neo4j.AsyncGraphDatabase.driver(
            env["NEO4J_URI"], auth=(env["NEO4J_USER"], env["NEO4J_PASSWORD"])
        )
        js = client.jetstream()
        subscriptions = [
            await js.pull_subscribe(
                subject, config=ConsumerConfig(deliver_policy=DeliverPolicy.ALL)
            )
            for subject in ("planning.>", "orchestration.>", "context.>")
        ]
        try:
            await asyncio.gather(*(self.take(each, driver) for each in subscriptions))
        finally:
            await driver.close()
            await client.close()

    async def take(self, subscription: Any, driver: neo4j.AsyncDriver) -> None:
        while True:
            try:
                messages = await subscription.fetch(50, timeout=1)
            except TimeoutError:
                continue
            for message in messages:
                body = json.loads(message.data)
                if body.get("story_id") == self.story_id:
                    await self.look_up(message.subject, body, driver)
                    self.events.append((message.subject, body, dict(message.headers or {})))
                await message.ack()

    async def look_up(self, subject: str, body: dict[str, Any], driver: neo4j.AsyncDriver) -> None:
        if statement := RECORDED.get(subject):
            rows, _, _ = await driver.execute_query(statement, body)
            if rows[0]["n"] == 0:
                self.not_recorded.append(f"{subject} {body}")

    def of(self, subject: str) -> list[dict[str, Any]]:
        return [body for name, body, _ in self.events if name == subject]


async def ask(fleet: Fleet, statement: str, **parameters: Any) -> list[dict[str, Any]]:
    env = fleet.env
    async with neo4j.AsyncGraphDatabase.driver(
        env["NEO4J_URI"], auth=(env["NEO4J_USER"], env["NEO4J_PASSWORD"])
    ) as driver:
        rows, _, _ = await driver.execute_query(statement, parameters)
    return [row.data() for row in rows]


async def test_a_story_goes_from_the_temporal_cli_to_a_branch_though_the_engine_dies_once(
    fleet: Fleet, tmp_path: Path
) -> None:
    story = json.loads(README_STORY.read_text()) | {"story_id": "US-1"}
    follower = Follower(fleet, "US-1")
    following = asyncio.create_task(follower.follow())

    started = await fleet.start(tmp_path, **story)
    assert started.code == 0, started.output
    for gate, role in GATES.items():
        if gate == "approve_design":
            await fleet.writing("deliberation-US-1-design-1")
            (replica,) = fleet.processes("ray::ServeRepli", "LLMServer")
            os.kill(replica, signal.SIGKILL)
        # The model decides how long the plan is, and a small one on two cores writes for minutes.
        view = await fleet.gate("US-1", gate)
        request = {"gate": gate, "actor": "ana", "role": role, "revision": view["revision"]}
        opened = await fleet.update("US-1", "approve", request)
        assert opened.code == 0, opened.output
    ended = await fleet.result("US-1")
    assert replica not in fleet.processes("ray::ServeRepli", "LLMServer")
    assert len(fleet.processes("VLLM::EngineCor")) == 1
    await until(lambda: len(follower.of("planning.story.transitioned")) >= 6)
    following.cancel()

    assert ended.code == 0, ended.output
    moves = [(b["from_phase"], b["to_phase"]) for b in follower.of("planning.story.transitioned")]
    assert moves == [
        ("BACKLOG", "DRAFT"),
        ("DRAFT", "DESIGN"),
        ("DESIGN", "BUILD"),
        ("BUILD", "TEST"),
        ("TEST", "DOCS"),
        ("DOCS", "DONE"),
    ]
    assert follower.not_recorded == []
    ids = [headers["Nats-Msg-Id"] for _, _, headers in follower.events]
    assert len(set(ids)) == len(ids)
    assert all(headers["ce-id"] == headers["Nats-Msg-Id"] for _, _, headers in follower.events)
    assert {headers["ce-subject"] for _, _, headers in follower.events} == {"US-1"}

    changed = await fleet.run("fleet", "diff", "US-1", "--json")
    commits = await fleet.run("fleet", "log", "US-1", "--json")
    assert [file["path"] for file in json.loads(changed.out)["files"]] == ["README.md"]
    assert {each["trailers"].get("Story", "US-1") for each in json.loads(commits.out)} == {"US-1"}


async def test_the_graph_holds_the_provenance_of_every_decision(fleet: Fleet) -> None:
    decisions = await ask(
        fleet,
        "MATCH (d:Decision)-[:FROM]->(p:Proposal)-[:BY]->(a:Agent), (d)-[:OF]->(:Story {id: $id}) "
        "RETURN d.id AS id, p.model AS model, p.prompt_hash AS prompt, a.id AS agent, "
        "COUNT { (:Critique)-[:OF]->(p) } AS critiques, COUNT { (:Check)-[:OF]->(p) } AS checks",
        id="US-1",
    )
    approvals = await ask(
        fleet,
        "MATCH (g:GateApproval)-[:OF]->(:Story {id: $id}) RETURN g.gate AS gate ORDER BY g.at",
        id="US-1",
    )
    why = await fleet.run("fleet", "why", decisions[0]["id"])

    assert decisions
    assert all(d["model"] and d["prompt"] and d["checks"] for d in decisions)
    assert any(d["critiques"] for d in decisions)  # a critic that fails is left out
    assert [row["gate"] for row in approvals] == list(GATES)
    assert why.code == 0, why.output
    assert decisions[0]["agent"] in why.out


async def kept_pack(fleet: Fleet, key: str) -> ContextPack:
    """Return a pack that the calls of a deliberation refer to."""
    env = fleet.env
    async with Redis(
        host=env["REDIS_HOST"], port=int(env["REDIS_PORT"]), password=env["REDIS_PASSWORD"]
    ) as valkey:
        kept = await valkey.get(key)
    assert isinstance(kept, bytes)
    cipher = text_cipher([bytes.fromhex(env["PAYLOAD_KEYS"])])
    return ContextPack.model_validate_json(cipher.decrypt(kept))


async def test_what_was_decided_is_in_the_context_of_the_next_agents(fleet: Fleet) -> None:
    decided = await ask(
        fleet,
        "MATCH (d:Decision)-[:OF]->(:Story {id: 'US-1'}) "
        "WHERE NOT d.id STARTS WITH 'US-1-docs' RETURN d.title AS title",
    )
    client = await fleet.client()
    history = await client.get_workflow_handle("deliberation-US-1-docs-1").fetch_history()
    answers = [
        answer
        for event in history.events
        for answer in await client.data_converter.decode(
            event.activity_task_completed_event_attributes.result.payloads
        )
    ]
    (gathered,) = [each for each in answers if isinstance(each, dict) and "pack" in each]
    pack = await kept_pack(fleet, gathered["pack"]["kept_at"])

    assert decided
    titles = [" ".join(row["title"].split())[:30] for row in decided]
    assert any(title in pack.context for title in titles if title), (titles, pack)


async def test_what_waits_for_a_role_is_one_visibility_query(fleet: Fleet, tmp_path: Path) -> None:
    story = json.loads((SAMPLE / "story.json").read_text()) | {"story_id": "US-2"}
    await fleet.start(tmp_path, **story)
    await fleet.gate("US-2", "approve_scope")

    query = "PendingGate = 'approve_scope' AND StoryRole = 'PO' AND StoryState = 'DRAFT'"
    await until(
        lambda: fleet.temporal("workflow", "list", "--query", query),
        lambda listed: "story-US-2" in listed.out,
        every_s=0.5,
    )
    waiting = await fleet.run("fleet", "list", "--waiting", "--role", "PO", "--json")
    described = await fleet.temporal("workflow", "metadata", "--workflow-id", "story-US-2")

    assert any(row["story_id"] == "US-2" for row in json.loads(waiting.out))
    assert "approve_scope" in described.output


@pytest.mark.parametrize(
    ("name", "request_", "words"),
    [
        ("approve", {"gate": "nope", "actor": "a", "role": "PO"}, ["gate", "approve_scope"]),
        ("approve", {"gate": "docs_ready", "actor": "a", "role": "PO"}, ["DRAFT"]),
        ("approve", {"gate": "approve_scope", "actor": "a", "role": "QA"}, ["role", "PO"]),
        (
            "approve",
            {"gate": "approve_scope", "actor": "a", "role": "PO", "revision": "00"},
            ["revision", "stale"],
        ),
        (
            "reject",
            {"event": "reject_docs", "actor": "a", "role": "PO", "reason": "r"},
            ["event", "approve_scope"],
        ),
        ("report", {"job_id": "j", "unit": {"passed": -1}}, ["unit.passed", "unit.failed"]),
        ("amend", {}, ["title", "brief"]),
        ("raise_budget", {"tokens": 5, "actor": "a", "role": "PO"}, ["tokens"]),
        ("approve", {"gate": "approve_scope", "actor": "a", "rolle": "PO"}, ["rolle", "role"]),
    ],
)
async def test_a_wrong_update_ends_with_1_and_changes_nothing(
    fleet: Fleet, name: str, request_: dict[str, Any], words: list[str]
) -> None:
    before = await fleet.query("US-2", "state")

    refused = await fleet.update("US-2", name, request_)

    assert refused.code == 1
    assert [word for word in words if word not in refused.output] == [], refused.output
    assert await fleet.query("US-2", "state") == before


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"titel": "x"}, ["titel"]),
        ({"title": ""}, ["title"]),
        ({"acceptance_criteria": 3}, ["acceptance_criteria"]),
        ({"brief": "no one starves. " * 60_000}, ["brief", "960,000", "65,536"]),
        ({"story_id": "a  b"}, ["story_id"]),
        ({"story_id": "a/b"}, ["story_id"]),
        ({"story_id": "a.*.>"}, ["story_id"]),
        ({"story_id": "'}) DETACH DELETE n //"}, ["story_id"]),
    ],
)
async def test_a_wrong_story_fails_naming_its_field_and_leaves_nothing(
    fleet: Fleet, tmp_path: Path, fields: dict[str, Any], words: list[str]
) -> None:
    story = {"story_id": "US-bad", "title": "A title"} | fields
    started = await fleet.start(tmp_path, **story)
    assert started.code == 0, started.output

    ended = await fleet.result(story["story_id"])

    assert ended.code == 1
    assert [word for word in words if word not in ended.output] == [], ended.output
    rows = await ask(fleet, "MATCH (s:Story {id: $id}) RETURN s.id", id=story["story_id"])
    assert rows == []


async def test_an_id_of_10_000_characters_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    started = await fleet.start(tmp_path, story_id="x" * 10_000, title="A title")

    assert started.code == 1
    assert "WorkflowId" in started.output or "workflow" in started.output.lower()


async def test_a_second_start_of_a_running_story_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    before = await fleet.query("US-2", "state")
    another = {"story_id": "US-2", "title": "Another"}
    file = tmp_path / "another.json"
    file.write_text(json.dumps(another))

    refused = await fleet.temporal(
        "workflow", "start", "--type", "StoryWorkflow", "--task-queue", "story",
        "--workflow-id", "story-US-2", "--input-file", str(file),
        "--fail-existing",
    )  # fmt: skip
    by_fleet = await fleet.run("fleet", "start", str(file))
    # By default, the `temporal` CLI returns the existing run and starts nothing.
    unasked = await fleet.start(tmp_path, **another)

    assert refused.code == 1
    assert "already" in refused.output
    assert by_fleet.code == 1, by_fleet.output
    assert unasked.code == 0
    assert await fleet.query("US-2", "state") == before


async def test_everything_dies_while_an_agent_answers_and_goes_on_when_it_is_up_again(
    fleet: Fleet, tmp_path: Path
) -> None:
    story = json.loads((SAMPLE / "story.json").read_text())
    started = await fleet.start(tmp_path, **(story | {"story_id": "US-4", "approvals": "auto"}))
    assert started.code == 0, started.output
    await fleet.writing("deliberation-US-4-design-1")
    before = await ask(fleet, "MATCH (n:Decision)-[:OF]->(:Story {id: 'US-1'}) RETURN count(n)")

    fleet.stack.kill()
    await fleet.stack.up()

    await fleet.until("US-4", lambda view: view.get("state") == "BUILD")
    for story_id in ("US-4", "US-2"):
        cancelled = await fleet.temporal("workflow", "cancel", "-w", f"story-{story_id}")
        assert cancelled.code == 0, cancelled.output
        ended = await fleet.result(story_id)
        assert ended.code == 1
        assert "cancel" in ended.output.lower()
    assert await fleet.differences("US-1", "US-2", "US-4") == []
    assert (await fleet.query("US-1", "state"))["state"] == "DONE"
    assert before == await ask(
        fleet, "MATCH (n:Decision)-[:OF]->(:Story {id: 'US-1'}) RETURN count(n)"
    )
