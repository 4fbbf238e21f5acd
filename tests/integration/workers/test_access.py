"""Who may act, with real processes: required tokens, revoked tokens, and a change of the key."""

import json
import uuid
from pathlib import Path
from typing import Any

import grpc
import pytest
from nats.js import JetStreamContext
from temporalio.client import WorkflowExecutionStatus

from bridge.grpc.wire import (
    planning_pb2,
    planning_pb2_grpc,
    storycoach_pb2,
    storycoach_pb2_grpc,
)
from tests.support.fleet import Environment, running, whole_fleet
from tests.support.fleet_cli import command, done, refused, temporal, token
from tests.support.grpc_service import problem
from tests.support.polling import until
from workers.environment import ROOT
from workflows.models.ids import plan_workflow_id, story_workflow_id
from workflows.models.story import StoryView, TimelineEntry

# The generated stubs are typed for synchronous channels only.
Coach: Any = storycoach_pb2_grpc.StoryCoachServiceStub
Planning: Any = planning_pb2_grpc.PlanningServiceStub

FORMER = "the key before, of 32 bytes or more"
PROJECT = ROOT / "deploy" / "examples" / "ratelimit"


def authorized(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def test_where_tokens_are_required_no_one_acts_by_a_claim(
    environment: Environment, jetstream: JetStreamContext, tmp_path: Path
) -> None:
    """Every way into a story: the `temporal` CLI, `fleet`, gRPC and the bus."""
    fleet = environment | {"REQUIRE_TOKENS": "true"}
    story_id = f"US-{uuid.uuid4().hex[:8]}"
    start = json.loads((PROJECT / "story.json").read_text()) | {"story_id": story_id, "rigor": "L0"}
    workflow_id = story_workflow_id(story_id)
    update = ("workflow", "update", "execute", "--workflow-id", workflow_id, "--name", "approve")
    ana = fleet | {"FLEET_TOKEN": await token(fleet, "ana", "PO")}
    quinn = await token(fleet, "quinn", "QA")

    async with (
        whole_fleet(fleet) as client,
        grpc.aio.insecure_channel(f"127.0.0.1:{fleet['GRPC_PLANNING_PORT']}") as channel,
    ):
        await done(fleet, "start", "-", stdin=json.dumps(start | {"approvals": "human"}))
        story = client.get_workflow_handle(workflow_id)

        async def at(state: str, gate: str | None) -> None:
            await until(
                lambda: story.query("state", result_type=StoryView),
                lambda view: view.state == state and gate in (None, view.pending_gate),
            )

        await at("DRAFT", "approve_scope")
        claim = tmp_path / "approve.json"
        claim.write_text('{"gate": "approve_scope", "actor": "ana", "role": "PO"}')
        ended = await temporal(fleet, *update, "--input-file", str(claim))
        assert ended.code != 0
        assert "'ana' is a claim" in ended.err
        assert "fleet token sign" in ended.err
        by_signal = ("workflow", "signal", "--workflow-id", workflow_id, "--name", "approve")
        assert (await temporal(fleet, *by_signal, "--input-file", str(claim))).code == 0
        assert "is a claim" in await refused(fleet, "approve", story_id, "--role", "PO")
        forged = {"case_id": story_id, "from_state": "DRAFT", "to_state": "DESIGN"}
        await jetstream.publish(
            "planning.story.transitioned", json.dumps(forged | {"actor": "ana"}).encode()
        )

        signed = await done(ana, "token", "sign", story_id, "approve", str(claim))
        claim.write_text(signed.out)
        ended = await temporal(fleet, *update, "--input-file", str(claim))
        assert ended.code == 0, ended.err

        await at("DESIGN", "approve_design")
        await done(ana, "approve", story_id, "approve_design", "--role", "PO")
        await at("BUILD", None)
        assert "is a claim" in (await command(fleet, "report", story_id, str(PROJECT))).err
        await done(ana, "report", story_id, str(PROJECT))
        await at("TEST", "qa_passed")
        moved = await Planning(channel).Transition(
            planning_pb2.TransitionRequest(story_id=story_id, event="qa_passed"),
            metadata=authorized(quinn),
        )
        assert moved.state == "DOCS"

        plan = {"story_id": f"{story_id}-outside", "plan_id": "plan-1", "approved_by": "ana"}
        await jetstream.publish("planning.plan.approved", json.dumps(plan).encode())
        plan_id = plan_workflow_id(plan["story_id"], plan["plan_id"])

        async def plans() -> list[WorkflowExecutionStatus | None]:
            return [
                each.status async for each in client.list_workflows(f"WorkflowId = '{plan_id}'")
            ]

        await until(plans, lambda found: found == [WorkflowExecutionStatus.COMPLETED])

        lines = await story.query("timeline", result_type=list[TimelineEntry])
        approvals = [each for each in lines if each.event == "planning.gate.approved"]
        assert [(each.actor, each.via) for each in approvals] == [
            *[("ana", "token")] * 2,
            ("quinn", "token"),
        ]
        refusals = [each.text for each in lines if each.event == "RequestRefused"]
        assert len(refusals) == 1
        assert "is a claim" in refusals[0]
        (report,) = [each for each in lines if each.text.startswith("report ")]
        assert (report.actor, report.via) == ("ana", "token")
        await story.terminate()


async def test_a_running_process_refuses_a_revoked_token_and_takes_both_keys(
    environment: Environment,
) -> None:
    changing = environment | {"GRPC_TOKEN_FORMER_KEY": FORMER}
    new = await token(environment, "ana", "PO")
    former = await token(environment | {"GRPC_TOKEN_KEY": FORMER}, "ana", "PO")
    forged = await token(environment | {"GRPC_TOKEN_KEY": FORMER[::-1]}, "ana", "PO")
    asked = storycoach_pb2.ScoreStoryRequest(title="Undo")

    async with (
        running("grpc", changing, "storycoach"),
        grpc.aio.insecure_channel(f"127.0.0.1:{changing['GRPC_STORYCOACH_PORT']}") as channel,
    ):

        async def reason(token: str) -> str:
            try:
                await Coach(channel).ScoreStory(asked, metadata=authorized(token))
            except grpc.aio.AioRpcError as error:
                return f"{problem(error)[0]}: {error.details()}"
            return ""

        assert [await reason(each) for each in (new, former)] == ["", ""]
        assert "Unauthenticated: the token is not one of ours" in await reason(forged)
        shown = await done(changing | {"FLEET_TOKEN": former}, "token", "show", "--json")
        await done(environment, "token", "revoke", shown.json["id"])
        revoked = await until(lambda: reason(former))
        assert "Unauthenticated: the token of ana was revoked" in revoked
        assert await reason(new) == ""

    async with (
        running("grpc", environment, "storycoach"),
        grpc.aio.insecure_channel(f"127.0.0.1:{environment['GRPC_STORYCOACH_PORT']}") as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="not one of ours"):
            await Coach(channel).ScoreStory(asked, metadata=authorized(former))
