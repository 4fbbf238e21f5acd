"""The `fleet` CLI and a running fleet: real servers, real workers, an LLM over real HTTP."""

import asyncio
import json
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from neo4j import AsyncDriver

from activities.revoked import READ_EVERY_S
from tests.support.fleet import (
    Environment,
    a_namespace,
    connect,
    new_environment,
    whole_fleet,
)
from tests.support.fleet_cli import command, refused, token
from tests.support.llm_server import LlmServer
from tests.support.polling import WITHIN_S, until
from tests.support.servers import RunningServer, Servers
from workers.cli import stories
from workers.cli.session import complete_story
from workers.environment import ROOT
from workers.settings import Settings
from workflows.models.ids import story_workflow_id


@pytest.fixture(scope="module")
async def fleet(servers: Servers) -> AsyncIterator[Environment]:
    """Run a fleet; yield the variables by which the CLI finds it."""
    async with LlmServer() as llm:
        environment = await new_environment(servers, llm)
        async with whole_fleet(environment):
            yield environment


def a_story(**changed: Any) -> dict[str, Any]:
    return {
        "story_id": f"US-{uuid.uuid4().hex[:8]}",
        "title": "Undo the deletion of a note",
        "brief": "As a writer I want to undo a deletion so that a slip costs me nothing.",
        "acceptance_criteria": [
            "Given a note that was deleted, when I press undo, then it is back with its text.",
            "Given no deletion, when I press undo, then nothing changes.",
        ],
        "created_by": "ana",
        "rigor": "L0",
    } | changed


async def started(fleet: Environment, **changed: Any) -> str:
    story = a_story(**changed)
    ended = await command(fleet, "start", "-", stdin=json.dumps(story))
    assert ended.code == 0, ended.err
    return str(story["story_id"])


async def shown_when(
    fleet: Environment, story_id: str, holds: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Poll `fleet show` until the condition holds for the story's state."""
    shown = await eventually(
        fleet, ("show", story_id, "--json"), lambda shown: holds(shown["story"])
    )
    return dict(shown)


async def at_gate(fleet: Environment, story_id: str, gate: str) -> dict[str, Any]:
    return await shown_when(fleet, story_id, lambda story: story["pending_gate"] == gate)


# --- start ----------------------------------------------------------------------------------------


async def test_start_answers_the_ids_and_a_running_story_is_not_started_again(
    fleet: Environment, tmp_path: Path
) -> None:
    story = a_story()
    file = tmp_path / "story.json"
    file.write_text(json.dumps(story))

    first = await command(fleet, "start", str(file), "--json")
    reason = await refused(fleet, "start", str(file))

    assert first.json["workflow_id"] == f"story-{story['story_id']}"
    assert first.json["run_id"]
    assert f"Story {story['story_id']} runs already" in reason


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps(a_story(title="")), "title: String should have at least 1 character"),
        (json.dumps(a_story(titel="x")), "titel: unknown field; remove it or correct its name"),
        (json.dumps(a_story(story_id="a/b")), "story_id: must match"),
        (json.dumps(a_story(story_id="planning.>")), "story_id: must match"),
        (json.dumps(a_story(story_id="x" * 10_000)), "story_id: String should have at most 100"),
        (json.dumps(a_story(rigor="L9")), "rigor: Input should be 'L0', 'L1', 'L2' or 'L3'"),
        (json.dumps(a_story(acceptance_criteria="one")), "acceptance_criteria: Input should be a"),
        ("{'title'}", "is not JSON"),
        ("", "is not JSON"),
    ],
    ids=["empty title", "unknown field", "slash", "wildcard", "long", "rigor", "type", "json", "0"],
)
async def test_a_bad_story_is_refused_with_field_and_rule(
    fleet: Environment, text: str, words: str
) -> None:
    reason = await refused(fleet, "start", "-", stdin=text)

    assert words in reason.replace("\n", " ")
    assert len(reason) < 2_500


async def test_a_file_that_is_not_there_is_refused(fleet: Environment) -> None:
    assert "No such file" in await refused(fleet, "start", "/nowhere/story.json")


async def test_a_story_that_cannot_begin_is_refused_with_the_reason(fleet: Environment) -> None:
    story = a_story(repository="nowhere")
    story_id = story["story_id"]

    reasons = [
        await refused(fleet, "start", "-", stdin=json.dumps(story)),
        await refused(fleet, "show", story_id),
        await refused(fleet, "watch", story_id),
        await refused(fleet, "diff", story_id),
        await refused(fleet, "report", story_id, str(ROOT / "deploy/examples/ratelimit")),
    ]
    again = await command(fleet, "start", "-", stdin=json.dumps(story | {"repository": None}))

    for reason in reasons:
        assert f"Story {story_id} has failed: repository: not found: " in reason
    assert again.code == 0, again.err


# --- control --------------------------------------------------------------------------------------


async def test_a_gate_is_opened_by_the_right_role_only_and_the_answer_is_the_new_state(
    fleet: Environment,
) -> None:
    story_id = await started(fleet)
    await at_gate(fleet, story_id, "approve_scope")

    reason = await refused(fleet, "approve", story_id, "--role", "QA", "--actor", "eve")
    unknown = await refused(fleet, "approve", story_id, "approve_lunch", "--role", "PO")
    stale = await refused(fleet, "approve", story_id, "--role", "PO", "--revision", "0" * 16)
    opened = await command(fleet, "approve", story_id, "--role", "PO", "-a", "ana", "--json")

    assert "PO" in reason
    assert "approve_lunch" in unknown
    assert "revision" in stale
    assert opened.json["state"] == "DESIGN"


async def test_who_has_a_token_acts_as_its_actor_and_in_its_roles_alone(
    fleet: Environment,
) -> None:
    story_id = await started(fleet)
    await at_gate(fleet, story_id, "approve_scope")
    qa = fleet | {"FLEET_TOKEN": await token(fleet, "quinn", "QA")}
    po = fleet | {"FLEET_TOKEN": await token(fleet, "olga", "PO,QA")}

    not_po = await refused(qa, "approve", story_id, "--role", "PO")
    not_olga = await refused(po, "approve", story_id, "--role", "PO", "--actor", "eve")
    ended = await command(po, "approve", story_id, "--role", "PO", "--json")

    assert "needs the role PO; the token of quinn has QA" in not_po
    assert "FLEET_TOKEN is olga's" in not_olga
    assert ended.code == 0, ended.err
    shown = await shown_when(fleet, story_id, lambda story: story["state"] != "DRAFT")
    approvals = [line for line in shown["timeline"] if "planning.gate.approved" in str(line)]
    assert {(line["actor"], line["via"]) for line in approvals} == {("olga", "token")}
    who = await command(po, "token", "show", "--json")
    assert (who.json["actor"], who.json["roles"]) == ("olga", ["PO", "QA"])


async def test_a_signed_request_is_known_by_its_token(fleet: Environment, tmp_path: Path) -> None:
    story_id = await started(fleet)
    await at_gate(fleet, story_id, "approve_scope")
    po = fleet | {"FLEET_TOKEN": await token(fleet, "olga", "PO")}
    request = tmp_path / "approve.json"
    request.write_text('{"gate": "approve_scope", "actor": "olga", "role": "PO"}')

    signed = await command(po, "token", "sign", story_id, "approve", str(request))
    client = await connect(fleet["TEMPORAL_ADDRESS"], fleet["TEMPORAL_NAMESPACE"])
    story = client.get_workflow_handle(story_workflow_id(story_id))
    await story.execute_update("approve", signed.json)

    shown = await shown_when(fleet, story_id, lambda story: story["state"] != "DRAFT")
    approvals = [line for line in shown["timeline"] if "planning.gate.approved" in str(line)]
    assert {(line["actor"], line["via"]) for line in approvals} == {("olga", "token")}
    assert "must be one of approve" in await refused(po, "token", "sign", story_id, "x", "-")
    assert "FLEET_TOKEN is not set" in await refused(
        fleet, "token", "sign", story_id, "approve", str(request)
    )


async def test_a_revoked_token_is_refused(fleet: Environment) -> None:
    story_id = await started(fleet)
    await at_gate(fleet, story_id, "approve_scope")
    po = fleet | {"FLEET_TOKEN": await token(fleet, "olga", "PO")}
    who = await command(po, "token", "show", "--json")

    revoked = await command(fleet, "token", "revoke", who.json["id"])
    assert revoked.code == 0, revoked.err
    await asyncio.sleep(READ_EVERY_S)

    refusal = await refused(po, "approve", story_id, "--role", "PO")
    assert "the token of olga was revoked" in refusal
    assert "32 digits" in await refused(fleet, "token", "revoke", "*")


async def test_a_forged_or_missing_token_is_refused(fleet: Environment) -> None:
    forged = {"GRPC_TOKEN_KEY": "another key, of thirty-two bytes or more"}

    other = await token(fleet | forged, "eve", "PO")

    assert "not one of ours" in await refused(
        fleet | {"FLEET_TOKEN": other}, "approve", "US-1", "approve_scope", "--role", "PO"
    )
    assert "not one of ours" in await refused(fleet | {"FLEET_TOKEN": "x"}, "token", "show")
    assert "FLEET_TOKEN is not set" in await refused(fleet, "token", "show")
    without = {name: value for name, value in fleet.items() if name != "GRPC_TOKEN_KEY"}
    keyless = await refused(without | {"GRPC_TOKEN_KEY": ""}, "token", "create", "--actor", "a")
    assert "GRPC_TOKEN_KEY is not set" in keyless
    wrong = await refused(fleet, "token", "create", "--actor", "a", "--roles", "p o")
    assert "roles.0: must match" in wrong


async def test_an_amended_story_shows_its_new_text(fleet: Environment) -> None:
    story_id = await started(fleet)
    await at_gate(fleet, story_id, "approve_scope")

    nothing = await refused(fleet, "amend", story_id)
    amended = await command(fleet, "amend", story_id, "--title", "Undo [bold]any[/bold] deletion")
    shown = await command(fleet, "show", story_id)

    assert "Give at least one of title, brief, acceptance_criteria" in nothing
    assert amended.code == 0
    assert "Undo [bold]any[/bold] deletion" in shown.out


async def test_a_budget_is_raised(fleet: Environment) -> None:
    story_id = await started(fleet, token_budget=100)
    await at_gate(fleet, story_id, "approve_scope")

    wrong = await refused(fleet, "raise-budget", story_id, "50", "--role", "QA")
    raised = await command(fleet, "raise-budget", story_id, "50", "--role", "PO", "--json")

    assert "PO" in wrong
    assert raised.json["token_budget"] == 150


async def test_a_design_goes_back_with_its_reason_and_its_decisions_can_be_explained(
    fleet: Environment, driver: AsyncDriver
) -> None:
    story_id = await started(fleet)
    await at_gate(fleet, story_id, "approve_scope")
    await command(fleet, "approve", story_id, "--role", "PO", "-a", "ana")
    shown = await at_gate(fleet, story_id, "approve_design")
    records, _, _ = await driver.execute_query(
        "MATCH (d:Decision {case_id: $id})-[:FROM]->() RETURN d.id AS id ORDER BY id", id=story_id
    )
    decision_id = records[0]["id"]

    (before,) = (await command(fleet, "why", decision_id, "--story", story_id, "--json")).json
    approved = await command(
        fleet, "approve", story_id, "--role", "PO", "-a", "ana", "-c", "Good.", "--json"
    )
    until_recorded = await eventually(
        fleet, ("why", decision_id, "--story", story_id, "--json"), lambda why: why[0]["passed_by"]
    )
    rejected = await command(
        fleet, "reject", story_id, "reject_build", "--role", "PO", "--reason", "No undo in it."
    )

    assert shown["plan"]["tasks"]
    assert shown["usage"]
    assert (before["model"], before["role"]) == ("test-model", "ARCHITECT")
    assert before["prompt_hash"]
    assert before["proposed_by"] not in ["", before["critiques"][0]["critic"]]
    assert len(before["critiques"]) == 1
    assert [c["name"] for c in before["checks"]] == ["dry_run", "lint", "policy", "substance"]
    assert before["passed_by"] == []
    assert approved.json["state"] == "BUILD"
    (passed,) = until_recorded[0]["passed_by"]
    assert (passed["gate"], passed["actor"], passed["comment"]) == (
        "approve_design",
        "ana",
        "Good.",
    )
    assert rejected.code == 0, rejected.err
    assert "DESIGN" in rejected.out


async def eventually(
    fleet: Environment, arguments: tuple[str, ...], holds: Callable[[Any], object]
) -> Any:
    ended = await until(lambda: command(fleet, *arguments), lambda ended: holds(ended.json))
    return ended.json


async def test_why_names_a_decision_that_is_not_there(fleet: Environment) -> None:
    assert "The graph has no decision nobody-decided" in await refused(
        fleet, "why", "nobody-decided"
    )


async def test_a_report_is_measured_and_sent(fleet: Environment) -> None:
    story_id = await started(fleet)
    for gate in ("approve_scope", "approve_design"):
        await at_gate(fleet, story_id, gate)
        await command(fleet, "approve", story_id, gate, "--role", "PO")

    ended = await command(
        fleet, "report", story_id, str(ROOT / "deploy/examples/ratelimit"), "--json"
    )
    empty = await command(fleet, "report", story_id, str(ROOT / "deploy" / "config"))

    assert ended.code == 0, ended.err
    assert ended.json["report"]["gating_decision"] in ("pass", "warn", "block")
    assert ended.json["report"]["score"] > 0
    assert empty.code == 1
    assert empty.err


# --- inspection -----------------------------------------------------------------------------------


async def test_list_shows_what_waits_for_a_role(fleet: Environment) -> None:
    story_id = await started(fleet)
    await at_gate(fleet, story_id, "approve_scope")

    waiting = await eventually(
        fleet,
        ("list", "--waiting", "--role", "PO", "--state", "DRAFT", "--json"),
        lambda rows: any(row["story_id"] == story_id for row in rows),
    )
    for_qa = (await command(fleet, "list", "--role", "QA", "--json")).json
    shown = await command(fleet, "list")

    (row,) = [row for row in waiting if row["story_id"] == story_id]
    assert (row["state"], row["pending_gate"], row["gate_role"]) == ("DRAFT", "approve_scope", "PO")
    assert row["rigor"] == "L0"
    assert story_id not in [row["story_id"] for row in for_qa]
    assert story_id in shown.out


async def test_list_puts_no_text_from_outside_into_its_query(fleet: Environment) -> None:
    reason = await refused(fleet, "list", "--state", "x' OR WorkflowType = 'y")

    assert "--state: must be letters, digits, '_' or '-'" in reason


async def test_watch_follows_a_story_to_its_gate_and_shows_the_council_at_work(
    fleet: Environment,
) -> None:
    story_id = await started(fleet)
    await at_gate(fleet, story_id, "approve_scope")
    await command(fleet, "approve", story_id, "--role", "PO", "-a", "ana")

    watched = await command(fleet, "watch", story_id, "--until-gate", "--json")

    snapshots = [json.loads(line) for line in watched.out.splitlines()]
    assert snapshots[-1]["story"]["pending_gate"] == "approve_design"
    assert snapshots[-1]["story"]["tokens_used"] > 0
    assert {snapshot["status"] for snapshot in snapshots} == {"RUNNING"}


async def test_watch_ends_with_a_story_that_is_cancelled(
    fleet: Environment, temporal: RunningServer
) -> None:
    story_id = await started(fleet)
    await at_gate(fleet, story_id, "approve_scope")
    watch = asyncio.create_task(command(fleet, "watch", story_id))
    client = await connect(temporal.address, fleet["TEMPORAL_NAMESPACE"])

    await client.get_workflow_handle(f"story-{story_id}").cancel()

    watched = await asyncio.wait_for(watch, WITHIN_S)
    assert watched.code == 0
    assert f"{story_id}  DRAFT cancelled" in watched.out.splitlines()[-1]
    gone = await refused(fleet, "approve", story_id, "--role", "PO")
    assert f"Story {story_id}" in gone


async def test_a_shell_completes_running_stories(
    fleet: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    story_id = await started(fleet)
    for name in Settings.model_fields:
        if value := fleet.get(name.upper()):
            monkeypatch.setenv(name.upper(), value)

    await until(
        lambda: asyncio.to_thread(complete_story, story_id[:4]), lambda found: story_id in found
    )

    assert await asyncio.to_thread(complete_story, "elsewhere") == []


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("story_id", ["a/b", "a  b", "x" * 10_000, "') RETURN 1 //", "planning.>"])
async def test_an_invalid_id_is_refused(fleet: Environment, story_id: str) -> None:
    reason = await refused(fleet, "show", story_id)

    assert "is not a story id: it is 1 to 100 letters, digits" in reason
    assert len(reason) < 400


async def test_a_story_that_is_not_there_is_named(fleet: Environment) -> None:
    assert "There is no story US-nowhere" in await refused(fleet, "show", "US-nowhere")
    assert "There is no story US-nowhere" in await refused(fleet, "watch", "US-nowhere")
    assert "There is no story US-nowhere" in await refused(
        fleet, "report", "US-nowhere", str(ROOT / "deploy/examples/ratelimit")
    )
    assert "There is no story US-nowhere" in await refused(
        fleet, "approve", "US-nowhere", "approve_scope", "--role", "PO"
    )


async def test_without_temporal_every_command_names_the_address(fleet: Environment) -> None:
    reason = await refused(fleet | {"TEMPORAL_ADDRESS": "127.0.0.1:1"}, "list")

    assert "Temporal at 127.0.0.1:1 is not reachable. Start it, or set TEMPORAL_ADDRESS" in reason


async def test_a_wrong_setting_is_refused(fleet: Environment) -> None:
    assert "REDIS_PORT (port of Valkey)" in await refused(fleet | {"REDIS_PORT": "x"}, "list")


async def test_without_a_story_worker_a_command_reports_it(
    fleet: Environment, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stories, "QUERY_WITHIN", timedelta(seconds=1))
    monkeypatch.setattr(stories, "UPDATE_WITHIN_S", 1)
    monkeypatch.setattr(stories, "BEGUN_WITHIN_S", 0.3)
    elsewhere = fleet | {"TEMPORAL_NAMESPACE": await a_namespace(servers)}
    story = a_story()
    story_id = story["story_id"]
    start = await command(elsewhere, "start", "-", stdin=json.dumps(story))

    shown = await refused(elsewhere, "show", story_id)
    approved = await refused(elsewhere, "approve", story_id, "approve_scope", "--role", "PO")

    assert start.code == 0
    assert f"story-{story_id} waits for a story worker" in start.out
    assert "or from a story worker" in shown
    assert "Is a story worker running? `python -m workers story` starts one" in approved
    assert "may still be carried out" in approved.replace("\n", " ")


def test_as_a_process_it_ends_with_its_code(fleet: Environment) -> None:
    def ended(*arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "workers.cli", *arguments],
            env=fleet | changed,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )

    listed = ended("list", "--json")
    unreachable = ended("list", TEMPORAL_ADDRESS="127.0.0.1:1")
    not_understood = ended("lisst")

    assert (listed.returncode, listed.stderr) == (0, "")
    assert isinstance(json.loads(listed.stdout), list)
    assert (unreachable.returncode, unreachable.stdout) == (1, "")
    assert "Traceback" not in unreachable.stderr
    assert not_understood.returncode == 2
