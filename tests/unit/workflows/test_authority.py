"""Who acts on a story: signed requests, claims, names of policies, and replayed requests."""

from __future__ import annotations

import asyncio
import uuid
from datetime import timedelta
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from temporalio.client import Client, WorkflowHandle, WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError

from activities.tokens import Caller, create_proof, create_token, read_proof, read_token
from tests.support.fleet import TOKEN_KEY
from tests.support.polling import until
from tests.unit.conftest import GOOD_REPORT, RunningStory, StartStory, World
from workflows.models.access import request_content
from workflows.models.entries import Entry
from workflows.models.events import (
    ContextMilestoneReached,
    DeliberationFailed,
    EntrySkipped,
    EventBody,
    GateApproved,
)
from workflows.models.ids import story_workflow_id
from workflows.models.outbox import SkipEntry
from workflows.models.report import WorkspaceReport
from workflows.models.story import Amend, Approve, RaiseBudget, Reject, TimelineEntry

HOUR = timedelta(hours=1)
APPROVAL = Approve(gate="approve_scope", actor="ana", role="PO")
Signable = Approve | Reject | Amend | RaiseBudget | WorkspaceReport | SkipEntry


def token(actor: str = "ana", *roles: str, key: str = TOKEN_KEY) -> str:
    return create_token(key, Caller(actor=actor, roles=frozenset(roles or {"PO"})), HOUR)


def signed(
    story: RunningStory,
    request: Signable,
    by: str | None = None,
    valid_for: timedelta = HOUR,
) -> dict[str, Any]:
    proof = create_proof(by or token(), story.handle.id, request, valid_for)
    return request.model_dump(mode="json", exclude_none=True) | {"proof": proof}


async def refusal(story: RunningStory, name: str, request: dict[str, Any]) -> ApplicationError:
    with pytest.raises(WorkflowUpdateFailedError) as refused:
        await story.update(name, **request)
    assert isinstance(refused.value.cause, ApplicationError)
    return refused.value.cause


async def timeline(story: RunningStory) -> list[TimelineEntry]:
    lines: list[TimelineEntry] = await story.handle.query(
        "timeline", result_type=list[TimelineEntry]
    )
    return lines


def bodies(world: World, kind: str) -> list[dict[str, Any]]:
    return [entry.body for entry in world.recorded if entry.kind == kind]


# --- how the actor is known -----------------------------------------------------------------------


@pytest.mark.parametrize("via", ["token", "claim"])
async def test_every_request_says_how_its_actor_is_known(
    start_story: StartStory, world: World, via: str
) -> None:
    story = await start_story(token_budget=10_000)

    async def send(name: str, request: Signable) -> None:
        fields = request.model_dump(mode="json", exclude_none=True)
        await story.update(name, **(signed(story, request) if via == "token" else fields))

    await story.until(gate="approve_scope")
    await send("amend", Amend(title="Shorten every link", actor="ana"))
    await story.until(gate="approve_scope")
    await send("raise_budget", RaiseBudget(tokens=10, actor="ana", role="PO"))
    await send("approve", APPROVAL)
    await story.until(gate="approve_design")
    await send("reject", Reject(event="reject_design", actor="ana", role="PO", reason="no"))
    await story.to("BUILD")
    await send("report", WorkspaceReport.model_validate(GOOD_REPORT))
    await story.until(state="TEST")
    await until(
        lambda: world.bus_open.wait(), lambda _: len(bodies(world, "StoryTransitioned")) > 4
    )

    assert [spec["via"] for spec in bodies(world, "StorySpec")] == ["", via]
    assert bodies(world, "StorySpec")[1]["amended_by"] == "ana"
    assert bodies(world, "GateApproved")[0]["via"] == via
    moves = {move["event"]: move for move in bodies(world, "StoryTransitioned")}
    assert (moves["reject_design"]["actor"], moves["reject_design"]["via"]) == ("ana", via)
    milestones = {each["event_type"]: each for each in bodies(world, "ContextMilestoneReached")}
    for kind in ("WORKSPACE_REPORT", "BUDGET_RAISED"):
        assert (milestones[kind]["actor"], milestones[kind]["via"]) == ("ana", via)
    assert "commit c0ffee1" in milestones["WORKSPACE_REPORT"]["description"]
    lines = await timeline(story)
    assert {line.via for line in lines if line.event == "planning.gate.approved"} >= {via}


async def test_a_move_by_policy_is_marked_as_such(start_story: StartStory, world: World) -> None:
    story = await start_story(approvals="auto")
    await story.until(state="BUILD")

    assert {each["via"] for each in bodies(world, "GateApproved")} == {"policy"}
    assert {each["via"] for each in bodies(world, "PlanApproved")} <= {"policy"}


@pytest.mark.parametrize("actor", ["policy:auto", "Policy:x", " policy:auto "])
async def test_no_one_acts_as_a_policy(start_story: StartStory, world: World, actor: str) -> None:
    story = await start_story()
    await story.until(gate="approve_scope")

    for name, request in {
        "approve": {"gate": "approve_scope", "actor": actor, "role": "PO"},
        "reject": {"event": "reject_design", "actor": actor, "role": "PO", "reason": "no"},
        "amend": {"title": "Mine", "actor": actor},
        "report": GOOD_REPORT | {"actor": actor},
        "raise_budget": {"tokens": 5, "actor": actor, "role": "PO"},
    }.items():
        refused = await refusal(story, name, request)
        assert (refused.type, "is reserved" in refused.message) == ("Permission", True)
        await story.handle.signal(name, request)

    await until(story.state, lambda _: len(bodies(world, "RequestRefused")) == 5)
    assert (await story.state()).pending_gate == "approve_scope"


@pytest.mark.parametrize("running", ["story", "deliberation"])
async def test_no_decision_is_sent_by_a_policy(
    fleet: Client, start_story: StartStory, world: World, running: str
) -> None:
    mine = {"decision_id": "D-1", "title": "No SMS", "decided_by": "ana"}
    forged = mine | {"decision_id": "D-2", "decided_by": "policy:auto"}
    world.hold["propose"] = asyncio.Event()
    story = await start_story()
    await story.to("DESIGN")
    view = await until(story.state, lambda view: view.child)
    await until(lambda: world.calls)  # the council is at work, so it has begun
    handle: WorkflowHandle[Any, Any] = story.handle
    if running == "deliberation":
        handle = fleet.get_workflow_handle(view.child)

    await handle.signal("add_decision", forged)
    await handle.signal("add_decisions", {"decisions": [forged, mine]})

    await until(lambda: len(bodies(world, "RequestRefused")) == 2)
    assert "'policy:auto' is reserved" in bodies(world, "RequestRefused")[0]["reason"]
    world.hold["propose"].set()
    await story.until(gate="approve_design")
    assert "D-1" in str(world.calls)
    assert "D-2" not in str(world.calls)


async def test_no_story_is_created_by_a_policy(start_story: StartStory) -> None:
    story = await start_story(created_by="policy:auto")

    with pytest.raises(Exception) as failed:  # noqa: PT011
        await story.handle.result()
    assert "is reserved" in str(failed.value.__cause__)


# --- forged and replayed proofs -------------------------------------------------------------------


async def test_a_proof_that_does_not_hold_is_refused(start_story: StartStory) -> None:
    story = await start_story()
    await story.until(gate="approve_scope")
    foreign = create_proof(token(), story_workflow_id("US-other"), APPROVAL)
    fields = APPROVAL.model_dump(mode="json", exclude_none=True)

    for request, words in [
        (fields | {"proof": "x"}, "is not valid"),
        (fields | {"proof": token()}, "is not valid"),
        (fields | {"proof": foreign}, "Audience"),
        (signed(story, APPROVAL, valid_for=timedelta(seconds=-10)), "expired"),
        (signed(story, APPROVAL, token(key=TOKEN_KEY[::-1])), "not signed by a token"),
        (signed(story, APPROVAL) | {"comment": "and more"}, "another request"),
        (signed(story, APPROVAL) | {"role": "QA"}, "QA"),
    ]:
        assert words in (await refusal(story, "approve", request)).message
    ben = await refusal(story, "approve", signed(story, APPROVAL, token("ben")))
    assert (ben.type, "ben signed it" in ben.message) == ("Permission", True)
    dev = await refusal(story, "approve", signed(story, APPROVAL, token("ana", "DEV")))
    assert (dev.type, "needs the role PO" in dev.message) == ("Permission", True)
    amended = signed(story, Amend(title="Mine", actor="ana"), token("ana", "DEV"))
    assert "needs the role PO" in (await refusal(story, "amend", amended)).message


async def test_a_proof_is_for_one_request_alone(start_story: StartStory) -> None:
    story = await start_story(token_budget=10_000)
    await story.to("DESIGN")
    seen = (await story.until(gate="approve_design")).revision
    approval = Approve(gate="approve_design", actor="ana", role="PO", revision=seen)
    request = signed(story, approval)
    proof = {"proof": request["proof"]}
    rejection = {"event": "reject_design", "actor": "ana", "role": "PO", "reason": "no"}
    others: dict[str, dict[str, Any]] = {
        "approve": {"gate": "approve_design", "actor": "ana", "role": "PO"},
        "reject": rejection,
        "amend": {"title": "Mine", "actor": "ana"},
        "raise_budget": {"tokens": 5, "actor": "ana", "role": "PO"},
    }

    for update, other in others.items():
        assert "another request" in (await refusal(story, update, other | proof)).message, update
    await story.update("amend", title="Shorten every link", actor="ana")
    await story.to("DESIGN")
    now = await story.until(gate="approve_design")
    assert "is stale" in (await refusal(story, "approve", request)).message
    changed = await refusal(story, "approve", request | {"revision": now.revision})
    assert "another request" in changed.message


async def test_a_proof_of_a_report_is_for_its_commit_alone(start_story: StartStory) -> None:
    story = await start_story()
    await story.to("BUILD")
    report = signed(story, WorkspaceReport.model_validate(GOOD_REPORT))

    for changes in (
        {"commit": "bad"},
        {"job_id": "job-2"},
        {"e2e": {"ok": True, "passed": 4, "failed": 0}},
    ):
        assert "another request" in (await refusal(story, "report", report | changes)).message
    assert "another request" in (await refusal(story, "report", report | {"actor": "ben"})).message
    await story.update("report", **report)


async def test_a_signed_request_counts_once(start_story: StartStory) -> None:
    story = await start_story()
    await story.until(gate="approve_scope")
    request = signed(story, APPROVAL)
    await story.update("approve", **request)
    await story.until(gate="approve_design")
    await story.update("amend", title="Other links", actor="ana")
    await story.until(gate="approve_scope")

    assert "used before" in (await refusal(story, "approve", request)).message
    assert (await story.state()).pending_gate == "approve_scope"


async def test_claims_are_refused_where_tokens_are_required(
    start_story: StartStory, world: World
) -> None:
    world.require_tokens = True
    story = await start_story()
    await story.until(gate="approve_scope")

    claim = APPROVAL.model_dump(mode="json", exclude_none=True)
    refused = await refusal(story, "approve", claim)
    assert (refused.type, "fleet token sign" in refused.message) == ("Unauthenticated", True)
    await story.handle.signal("approve", claim)
    await until(story.state, lambda _: len(bodies(world, "RequestRefused")) == 1)
    assert (await story.state()).pending_gate == "approve_scope"

    await story.handle.signal("approve", signed(story, APPROVAL))
    await story.until(gate="approve_design")
    assert bodies(world, "GateApproved")[0]["via"] == "token"


async def test_an_entry_is_skipped_in_no_others_name(start_story: StartStory, world: World) -> None:
    world.require_tokens = True
    world.failing = {"record/StoryCreated": "no"}
    story = await start_story()
    stuck = await until(lambda: story.handle.query("outbox_stuck"))
    request = SkipEntry(entry_id=stuck[0]["entry_id"], actor="ana", reason="it never fits")
    claim = request.model_dump(mode="json", exclude_defaults=True)
    by_policy = claim | {"actor": "policy:auto"}

    assert (await refusal(story, "skip_entry", claim)).type == "Unauthenticated"
    assert "is reserved" in (await refusal(story, "skip_entry", by_policy)).message
    for by, words in (("ben", "ben signed it"), ("ana", "needs the role OPERATOR or PO")):
        signed_by = signed(story, request, token(by, "DEV" if by == "ana" else "PO"))
        refused = await refusal(story, "skip_entry", signed_by)
        assert (refused.type, words in refused.message) == ("Permission", True)
    assert bodies(world, "EntrySkipped") == []

    await story.handle.execute_update("skip_entry", signed(story, request))
    await until(lambda: bodies(world, "EntrySkipped"))
    assert [(each["actor"], each["via"]) for each in bodies(world, "EntrySkipped")] == [
        ("ana", "token")
    ]


# --- entries of others ---


async def test_a_story_publishes_entries_of_itself_and_its_children_alone(
    start_story: StartStory, world: World
) -> None:
    story = await start_story()
    await story.until(gate="approve_scope")
    child, at = f"deliberation-{story.story_id}-design-1", "2026-03-01T10:00:00.000Z"
    failed = DeliberationFailed(
        task_id="t", role="DEV", error="no", duration_ms=1, story_id=story.story_id, timestamp=at
    )
    approved = GateApproved(
        id="x",
        gate="approve_scope",
        actor="eve",
        role="PO",
        revision="",
        via="token",
        story_id=story.story_id,
        timestamp=at,
    )

    skipped = EntrySkipped(
        reason="no", actor="eve", error="no", entry="{}", story_id=story.story_id, timestamp=at
    )
    reported = ContextMilestoneReached(
        milestone_id="M-1",
        event_type="BUDGET_RAISED",
        description="by 1 token",
        actor="ana",
        via="token",
        story_id=story.story_id,
        timestamp=at,
    )

    def entry(body: EventBody, source: str = child, **more: str) -> Entry:
        fields = {
            "id": f"{source}/run/{uuid.uuid4().hex}",
            "kind": type(body).__name__,
            "subject": body.SUBJECT,
            "source": source,
            "story_id": story.story_id,
            "time": at,
        }
        return Entry.model_validate(fields | {"body": body.model_dump()} | more)

    forged = [
        entry(failed, story_id="US-other"),
        entry(failed, source="deliberation-US-other-design-1"),
        entry(failed, id=f"{story.handle.id}/run/1"),
        entry(approved),
        entry(approved, source=story.handle.id),
        entry(skipped),
        entry(reported),
    ]
    own = entry(failed)
    await story.handle.signal("hand_on", [*forged, own])
    await until(lambda: len(bodies(world, "RequestRefused")) == 1)

    recorded = {entry.id for entry in world.recorded}
    assert own.id in recorded
    assert not recorded.intersection(entry.id for entry in forged)
    assert "7 are not those of a child" in bodies(world, "RequestRefused")[0]["reason"]


# --- reports --------------------------------------------------------------------------------------


async def test_a_report_needs_an_actor_and_a_commit(start_story: StartStory) -> None:
    story = await start_story()
    await story.to("BUILD")

    for name in ("actor", "commit"):
        refused = await refusal(story, "report", GOOD_REPORT | {name: ""})
        assert f"{name}: required" in refused.message


async def test_no_person_s_report_counts_as_measured_by_the_fleet(start_story: StartStory) -> None:
    story = await start_story()
    await story.to("BUILD")

    refused = await refusal(story, "report", GOOD_REPORT | {"measured_by": "fleet"})

    assert "measured_by: only the fleet itself sets it; leave it out" in refused.message


async def test_a_report_cannot_be_replayed_for_another_commit(start_story: StartStory) -> None:
    story = await start_story()
    await story.to("BUILD")
    failing = {"unit": GOOD_REPORT["unit"] | {"ok": False, "failed": 1}}
    await story.report(job_id="job-1", **failing)

    same = await story.report(job_id="job-1", **failing)
    for changes in ({"commit": "bad"}, {"actor": "ben"}, {}):
        refused = await refusal(story, "report", GOOD_REPORT | changes)
        assert "job_id: 'job-1' was reported before" in refused.message
    await story.reject("reject_build")
    await story.until(gate="approve_design")
    await story.approve("approve_design")
    await story.until(state="BUILD")
    old = await refusal(story, "report", GOOD_REPORT | failing)

    assert same.state == "BUILD"
    assert "was reported before" in old.message


# --- tokens and proofs, without a story ----------------------------------------------------------


@pytest.mark.parametrize("token_id", [{}, {"jti": ""}, {"jti": None}, {"jti": 7}])
def test_a_token_that_could_not_be_revoked_is_refused(token_id: dict[str, Any]) -> None:
    claims = jwt.decode(token(), options={"verify_signature": False})
    del claims["jti"]
    forged = jwt.encode(claims | token_id, TOKEN_KEY, algorithm="HS256")

    with pytest.raises(ApplicationError, match=r"jti|token_id|Token ID|JWT ID"):
        read_token([TOKEN_KEY], forged)


def test_a_proof_does_not_reveal_its_token() -> None:
    mine = token()
    proof = create_proof(mine, "story-US-1", APPROVAL)
    shown = jwt.decode(proof, options={"verify_signature": False})

    assert mine not in proof
    assert mine.rpartition(".")[2] not in str(shown)
    with pytest.raises(ApplicationError):
        read_token([TOKEN_KEY], shown["tok"])
    with pytest.raises(ApplicationError):
        read_token([TOKEN_KEY], shown["tok"] + "." + proof.rpartition(".")[2])


def test_proofs_of_both_keys_hold_while_the_key_changes() -> None:
    former = "the key before, of 32 bytes or more"
    content = request_content(APPROVAL)
    for key in (TOKEN_KEY, former):
        proof = create_proof(token(key=key), "story-US-1", APPROVAL)
        found = read_proof([TOKEN_KEY, former], proof, "story-US-1", content)
        assert found.caller.actor == "ana"
    with pytest.raises(ApplicationError, match="not signed by a token"):
        read_proof([TOKEN_KEY], proof, "story-US-1", content)


@given(st.text(max_size=200))
def test_no_text_is_a_proof_by_chance(text: str) -> None:
    with pytest.raises(ApplicationError, match="is not valid"):
        read_proof([TOKEN_KEY], text, "story-US-1", request_content(APPROVAL))
