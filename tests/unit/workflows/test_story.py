"""StoryWorkflow: gates, guards, revisions, rejections, amendments, budgets, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from temporalio.client import Client, WorkflowFailureError, WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError, CancelledError

from tests.support.polling import until
from tests.unit.conftest import GOOD_REPORT, RunningStory, StartStory, World
from workflows.models.agents import UsageLine
from workflows.models.plan import Plan
from workflows.models.readiness import STORY_TEXT_BYTES
from workflows.models.story import Move, StoryRuns, TimelineEntry


@contextmanager
def refused(kind: str, *words: str) -> Iterator[None]:
    """Expect an update that fails with an ApplicationError of `kind` whose message has `words`."""
    with pytest.raises(WorkflowUpdateFailedError) as failed:
        yield
    cause = failed.value.cause
    assert isinstance(cause, ApplicationError)
    assert cause.type == kind, cause
    assert [word for word in words if word not in cause.message] == [], cause.message


async def test_a_story_goes_from_draft_to_done(start_story: StartStory, world: World) -> None:
    story = await start_story()

    await story.to("DONE")
    result = await story.handle.result()

    assert result.state == "DONE"
    assert world.transitions() == [
        ("BACKLOG", "create_story", "DRAFT"),
        ("DRAFT", "approve_scope", "DESIGN"),
        ("DESIGN", "approve_design", "BUILD"),
        ("BUILD", "build_done", "TEST"),
        ("TEST", "qa_passed", "DOCS"),
        ("DOCS", "docs_ready", "DONE"),
    ]
    assert world.subjects()[0] == "planning.story.created"
    assert len(result.decisions) == 5


async def test_every_public_event_is_published_once_and_in_order(
    start_story: StartStory, world: World
) -> None:
    story = await start_story()

    await story.to("DONE")
    await story.handle.result()

    ids = [entry.id for entry in world.published]
    assert len(set(ids)) == len(ids)
    assert ids == [entry.id for entry in world.recorded if entry.subject]
    own = [e for e in world.published if e.source == story.handle.id]
    assert [int(e.id.rsplit("/", 1)[1]) for e in own] == sorted(
        int(e.id.rsplit("/", 1)[1]) for e in own
    )


async def test_auto_approval_opens_the_gates_by_policy(
    start_story: StartStory, world: World
) -> None:
    story = await start_story(approvals="auto")

    await story.until(state="BUILD")
    await story.report()
    await story.handle.result()

    approvals = [e.body for e in world.published if e.subject == "planning.gate.approved"]
    assert {a["actor"] for a in approvals} == {"policy:auto"}
    assert [a["gate"] for a in approvals] == [
        "approve_scope",
        "approve_design",
        "qa_passed",
        "docs_ready",
    ]


async def test_a_gate_refuses_the_wrong_role(start_story: StartStory) -> None:
    story = await start_story()
    before = await story.until(gate="approve_scope")

    with refused("GateRole", "role", "PO", "QA"):
        await story.approve("approve_scope", role="QA")

    assert await story.state() == before


async def test_an_unknown_gate_is_refused_with_the_known_ones(
    start_story: StartStory,
) -> None:
    story = await start_story()
    await story.until(gate="approve_scope")

    with refused("UnknownGate", "approve_scope", "docs_ready"):
        await story.approve("approve_everything")


async def test_a_gate_of_another_state_is_refused_with_the_legal_moves(
    start_story: StartStory,
) -> None:
    story = await start_story()
    await story.until(gate="approve_scope")

    with refused("GateNotOpen", "DOCS", "DRAFT", "approve_scope"):
        await story.approve("docs_ready")


async def test_an_illegal_event_is_refused_with_the_legal_moves(start_story: StartStory) -> None:
    story = await start_story()
    await story.until(gate="approve_scope")

    with refused("IllegalMove", "reject_docs", "DRAFT", "approve_scope"):
        await story.reject("reject_docs")


async def test_a_story_that_is_not_ready_cannot_pass_its_gate(
    start_story: StartStory, world: World
) -> None:
    world.readiness = 40
    story = await start_story()
    await story.until(state="DRAFT", dor_score=40)

    with refused("GuardBlocked", "dor_ok", "40", "75"):
        await story.approve("approve_scope")

    moves = [Move.model_validate(m) for m in await story.handle.query("transitions")]
    assert moves[0].event == "approve_scope"
    assert "dor_ok" in moves[0].blocked_by[0]


async def test_an_amended_draft_is_scored_again_and_its_gate_opens(
    start_story: StartStory, world: World
) -> None:
    world.readiness = 40
    story = await start_story()
    await story.until(state="DRAFT", dor_score=40)

    world.readiness = 90
    await story.update("amend", brief="As a reader I want short links so that I can share them.")

    assert (await story.until(gate="approve_scope")).dor_score == 90


async def test_a_stale_revision_is_refused_with_what_changed_since(
    start_story: StartStory,
) -> None:
    story = await start_story()
    shown = (await story.until(gate="approve_scope")).revision

    await story.update("amend", title="Shorten all links", actor="bo")
    now = await story.until(gate="approve_scope")

    assert now.revision != shown
    with refused("StaleRevision", "title amended by bo", now.revision):
        await story.approve("approve_scope", revision=shown)
    assert (await story.approve("approve_scope", revision=now.revision)).state == "DESIGN"


async def test_a_revision_that_no_gate_showed_is_refused(start_story: StartStory) -> None:
    story = await start_story()
    await story.until(gate="approve_scope")

    with refused("StaleRevision", "never showed"):
        await story.approve("approve_scope", revision="0000")


async def test_an_approval_records_person_role_and_revision(
    start_story: StartStory, world: World
) -> None:
    story = await start_story()
    shown = (await story.until(gate="approve_scope")).revision

    await story.approve("approve_scope", comment="fine")
    await story.until(gate="approve_design")

    approval = next(e.body for e in world.published if e.subject == "planning.gate.approved")
    named = ("actor", "role", "revision", "comment", "via")
    assert [approval[name] for name in named] == ["ana", "PO", shown, "fine", "claim"]


@pytest.mark.parametrize(
    ("state", "event", "role", "back_to"),
    [
        ("DESIGN", "reject_design", "PO", "DRAFT"),
        ("BUILD", "reject_build", "PO", "DESIGN"),
        ("TEST", "reject_test", "QA", "BUILD"),
        ("DOCS", "reject_docs", "PO", "BUILD"),
    ],
)
async def test_a_rejection_goes_back_and_its_reason_is_in_the_next_context(
    start_story: StartStory, world: World, state: str, event: str, role: str, back_to: str
) -> None:
    story = await start_story()
    await story.to(state)

    with refused("GateRole", "role"):
        await story.reject(event, role="DEV")
    view = await story.reject(event, role=role, reason="it forgets the umlauts")
    if back_to == "DRAFT":
        await story.until(gate="approve_scope")
        await story.approve("approve_scope")

    assert view.state == back_to
    await until(
        lambda: "it forgets the umlauts" in str([call.task.feedback for call in world.calls])
    )


async def test_amending_after_the_scope_was_approved_opens_that_gate_again(
    start_story: StartStory, world: World
) -> None:
    story = await start_story()
    await story.to("BUILD")

    view = await story.update("amend", acceptance_criteria=["Given a link, then it is short"])

    assert view.state == "DRAFT"
    await story.until(gate="approve_scope")
    back = [("BUILD", "reject_build", "DESIGN"), ("DESIGN", "reject_design", "DRAFT")]
    await until(lambda: [t for t in world.transitions() if t[1].startswith("reject")] == back)
    await until(lambda: "context.updated" in world.subjects())


async def test_an_amendment_that_changes_nothing_changes_nothing(start_story: StartStory) -> None:
    story = await start_story()
    await story.to("DESIGN")
    before = await story.until(gate="approve_design")

    view = await story.update("amend", title=before.title)

    assert view == before


async def test_a_report_counts_only_where_a_guard_reads_it(start_story: StartStory) -> None:
    story = await start_story()
    await story.until(gate="approve_scope")

    with refused("IllegalMove", "report", "DRAFT"):
        await story.report()


async def test_a_report_that_blocks_keeps_the_test_gate_shut(start_story: StartStory) -> None:
    story = await start_story()
    await story.to("BUILD")
    bad = {"ok": True, "passed": 1, "failed": 9, "coverage": 1.0}
    await story.report(unit=bad, e2e={"ok": False, "passed": 0, "failed": 3})
    await story.until(state="TEST", working_on="")

    with refused("GuardBlocked", "tests_passing", "block"):
        await story.approve("qa_passed", role="QA")

    await story.report(job_id="job-2")
    await story.until(gate="qa_passed")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"unit": {"ok": True, "passed": -1, "failed": 0, "coverage": 9.0}}, "unit.passed"),
        ({"unit": {"ok": True, "passed": 1, "coverage": 9.0}}, "unit.failed"),
        ({"unit": {"ok": True, "passed": 1, "failed": 0, "coverage": 101}}, "unit.coverage"),
        ({"e2e": {"ok": True, "passed": 2**63, "failed": 0}}, "e2e.passed"),
        ({"build": {}}, "build.ok"),
        ({"e2e": None}, "e2e"),
        ({"surprise": 1}, "surprise"),
    ],
)
async def test_a_report_with_wrong_numbers_is_refused_naming_the_field(
    start_story: StartStory, change: dict[str, Any], field: str
) -> None:
    story = await start_story()
    await story.until(gate="approve_scope")

    with refused("InvalidInput", field):
        await story.update("report", **(GOOD_REPORT | change))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"title": "  "}, ["title"]),
        ({"titel": "x"}, ["titel", "unknown field"]),
        ({"acceptance_criteria": "one"}, ["acceptance_criteria"]),
        ({"rigor": "L9"}, ["rigor"]),
        ({"token_budget": -5}, ["token_budget"]),
        ({"token_budget": 10**13}, ["token_budget", "1000000000000"]),
        ({"carried": {"state": "DONE"}}, ["carried"]),
        ({"story_id": "a/b"}, ["story_id", "1 to 100"]),
        ({"story_id": "a  b"}, ["story_id"]),
        ({"story_id": "a.*"}, ["story_id"]),
        ({"story_id": "a>"}, ["story_id"]),
        ({"story_id": "x'}) DETACH DELETE (n"}, ["story_id"]),
    ],
)
async def test_a_bad_story_fails_naming_the_field(
    start_story: StartStory, world: World, fields: dict[str, Any], words: list[str]
) -> None:
    story = await start_story(**fields)

    with pytest.raises(WorkflowFailureError) as failed:
        await story.handle.result()

    cause = failed.value.cause
    assert isinstance(cause, ApplicationError)
    assert cause.type == "InvalidInput"
    assert [word for word in words if word not in cause.message] == []
    assert world.recorded == []


async def test_a_story_under_another_workflow_id_is_refused(fleet: Client) -> None:
    handle = await fleet.start_workflow(
        "StoryWorkflow", {"story_id": "US-1", "title": "t"}, id="other", task_queue="story"
    )

    with pytest.raises(WorkflowFailureError) as failed:
        await handle.result()

    assert "story-US-1" in str(failed.value.cause)


async def test_a_signal_does_what_the_update_does(start_story: StartStory) -> None:
    story = await start_story()
    await story.until(gate="approve_scope")

    await story.handle.signal("approve", {"gate": "approve_scope", "actor": "ana", "role": "PO"})

    await story.until(state="DESIGN")


async def refusals(story: RunningStory) -> list[str]:
    """Return the refusals of signals in the timeline."""
    lines = [TimelineEntry.model_validate(x) for x in await story.handle.query("timeline")]
    return [line.text for line in lines if line.event == "RequestRefused"]


@pytest.mark.parametrize(
    "payload",
    [{"gate": "docs_ready", "actor": "ana", "role": "PO"}, {"gate": "x"}, "nonsense", None],
)
async def test_a_refused_signal_is_recorded_with_its_reason(
    start_story: StartStory, payload: Any
) -> None:
    story = await start_story()
    before = await story.until(gate="approve_scope")

    await story.handle.signal("approve", payload)

    assert (await until(lambda: refusals(story)))[0].startswith("Approve refused: ")
    assert await story.state() == before


async def test_nats_away_stops_no_story(start_story: StartStory, world: World) -> None:
    world.bus_open.clear()
    story = await start_story()

    view = await story.to("DONE")

    assert view.state == "DONE"
    assert world.published == []
    world.bus_open.set()
    await story.handle.result()
    assert world.transitions()[-1] == ("DOCS", "docs_ready", "DONE")


async def test_cancelling_stops_the_deliberation_and_is_mirrored(
    start_story: StartStory, world: World
) -> None:
    world.hold["propose"] = asyncio.Event()
    story = await start_story()
    await story.until(gate="approve_scope")
    await story.approve("approve_scope")
    await until(lambda: world.acts)

    await story.handle.cancel()
    with pytest.raises(WorkflowFailureError) as failed:
        await story.handle.result()

    assert isinstance(failed.value.cause, CancelledError)
    mine = world.subjects(story.story_id)
    assert mine[-1] == "planning.story.cancelled"
    assert "orchestration.deliberation.failed" in mine


def plan_ends(world: World) -> list[tuple[str, str]]:
    """Return the plan or task of each end that was recorded, with its status."""
    return [
        (e.body.get("task_id") or e.body["plan_id"], e.body["status"])
        for e in world.recorded
        if e.kind in ("TaskCompleted", "TaskFailed", "PlanFinished")
    ]


def never_ran(plan: Plan) -> list[tuple[str, str]]:
    return [
        *((task.task_id, "cancelled") for task in plan.tasks),
        (plan.plan_id, "CANCELLED"),
    ]


async def test_cancelling_a_story_ends_a_plan_that_waits_for_its_approval(
    start_story: StartStory, world: World
) -> None:
    story = await start_story()
    await story.to("DESIGN")
    await story.until(gate="approve_design")
    plan = Plan.model_validate(await story.handle.query("plan"))

    await story.handle.cancel()
    with pytest.raises(WorkflowFailureError):
        await story.handle.result()

    assert plan_ends(world) == never_ran(plan)


async def test_cancelling_a_story_whose_plan_runs_ends_each_task_once(
    start_story: StartStory, world: World
) -> None:
    story = await start_story()
    await story.to("DESIGN")
    await story.until(gate="approve_design")
    plan = Plan.model_validate(await story.handle.query("plan"))
    world.hold["propose"] = asyncio.Event()
    began = len(world.acts)
    assert await story.handle.query("waiting_plan")
    await story.approve("approve_design")
    await until(lambda: world.acts[began:])

    assert await story.handle.query("waiting_plan") is None
    await story.handle.cancel()
    with pytest.raises(WorkflowFailureError):
        await story.handle.result()

    assert sorted(plan_ends(world)) == sorted(never_ran(plan))


@pytest.mark.parametrize("way", ["rejected", "amended"])
async def test_a_design_that_is_replaced_ends_its_plan(
    start_story: StartStory, world: World, way: str
) -> None:
    story = await start_story()
    await story.to("DESIGN")
    await story.until(gate="approve_design")
    plan = Plan.model_validate(await story.handle.query("plan"))

    if way == "rejected":
        await story.reject("reject_design", role="PO", reason="too large")
    else:
        await story.update("amend", acceptance_criteria=["Given a link, then it is short"])
    await story.until(gate="approve_scope")
    await story.approve("approve_scope")

    await until(lambda: plan_ends(world) == never_ran(plan))


async def test_a_story_cancelled_before_its_process_is_read_ends_cancelled(
    start_story: StartStory, world: World
) -> None:
    world.config_open.clear()
    story = await start_story()
    await until(
        story.handle.describe, lambda described: described.raw_description.pending_activities
    )

    await story.handle.cancel()
    with pytest.raises(WorkflowFailureError) as failed:
        await story.handle.result()

    assert isinstance(failed.value.cause, CancelledError)
    assert world.subjects() == ["planning.story.cancelled"]


async def test_an_update_that_comes_before_the_process_is_read_waits_and_is_judged(
    start_story: StartStory, world: World
) -> None:
    world.config_open.clear()
    story = await start_story()
    early = asyncio.create_task(story.approve("docs_ready"))
    await until(
        story.handle.describe, lambda described: described.raw_description.pending_activities
    )

    world.config_open.set()

    with refused("GateNotOpen", "docs_ready"):
        await early


async def test_a_spent_budget_opens_its_gate_and_a_po_raises_it(
    start_story: StartStory, world: World
) -> None:
    world.tokens = 100
    story = await start_story(token_budget=500)
    await story.until(gate="approve_scope")
    await story.approve("approve_scope")

    view = await story.until(gate="budget")
    assert view.gate_role == "PO"
    waves = {call.wave for call in world.calls}
    assert waves == {1}

    with refused("GateRole", "PO"):
        await story.update("raise_budget", tokens=10_000, actor="dev", role="DEV")
    await story.update("raise_budget", tokens=100_000, actor="ana", role="PO")
    await story.until(gate="approve_design")
    usage = [UsageLine.model_validate(x) for x in await story.handle.query("usage")]
    assert sum(line.calls for line in usage) == len(world.calls)
    assert (await story.state()).tokens_used == 200 * len(world.calls)


async def test_a_budget_gate_that_a_move_closes_opens_again_for_the_next_council(
    start_story: StartStory, world: World
) -> None:
    world.tokens = 100
    story = await start_story(token_budget=500)
    await story.until(gate="approve_scope")
    await story.approve("approve_scope")
    await story.until(gate="budget")

    view = await story.update("amend", brief="Another one.")
    assert "budget" not in view.open_gates
    await story.until(gate="approve_scope")
    await story.approve("approve_scope")

    await story.until(state="DESIGN", gate="budget")
    await story.update("raise_budget", tokens=100_000, actor="ana", role="PO")
    await story.until(gate="approve_design")

    def gates() -> list[str]:
        return [e.body["gate"] for e in world.recorded if e.kind == "GateOpened"]

    await until(gates, lambda found: len(found) == 5)
    assert gates() == ["approve_scope", "budget"] * 2 + ["approve_design"]


async def test_usage_that_comes_after_a_move_counts_once_and_for_its_own_phase(
    start_story: StartStory, world: World
) -> None:
    story = await start_story(token_budget=1_000_000)
    await story.to("DESIGN")
    await story.until(gate="approve_design")
    usage = {"act": "propose", "agent_id": "a", "role": "QA", "model": "m", "tokens_in": 7}
    visit_of_design = 3
    wave = {
        "workflow_id": "deliberation-of-a-test",
        "wave": "run/1",
        "usage": [usage],
        "visit": visit_of_design,
        "phase": "DESIGN",
    }

    async def lines() -> list[tuple[str, int]]:
        found = [UsageLine.model_validate(x) for x in await story.handle.query("usage")]
        return [(line.phase, line.tokens_in) for line in found if line.role == "QA"]

    await story.handle.signal("request_wave", wave)
    await until(lines, lambda found: found == [("DESIGN", 7)])
    await story.update("amend", brief="Another one.")
    more = {**wave, "usage": [usage | {"tokens_in": 9}]}
    await story.handle.signal("request_wave", more)

    await until(lines, lambda found: found != [("DESIGN", 7)])
    assert await lines() == [("DESIGN", 9)]


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("approve", {"gate": "qa_passed", "actor": "ana", "role": "QA"}),
        ("reject", {"event": "reject_quality", "actor": "ana", "role": "QA", "reason": "no"}),
        ("report", GOOD_REPORT | {"job_id": "late"}),
        ("amend", {"brief": "Another one.", "actor": "ana"}),
        ("raise_budget", {"tokens": 5, "actor": "ana", "role": "PO"}),
    ],
)
async def test_a_story_takes_no_requests_while_it_is_being_cancelled(
    start_story: StartStory, world: World, name: str, request_: dict[str, Any]
) -> None:
    story = await start_story(token_budget=1_000_000)
    await story.to("TEST")
    await story.until(gate="qa_passed")
    world.bus_open.clear()  # so that its events are waited for

    await story.handle.cancel()
    await story.until(cancelled=True)
    with refused("IllegalMove", f"{name}: the story is cancelled"):
        await story.update(name, **request_)
    await story.handle.signal(name, request_)
    assert (await until(lambda: refusals(story)))[0].endswith("or start another one")

    world.bus_open.set()
    with pytest.raises(WorkflowFailureError):
        await story.handle.result()
    assert world.subjects(story.story_id)[-1] == "planning.story.cancelled"


async def test_the_budget_of_a_story_that_is_done_cannot_be_raised(
    start_story: StartStory, world: World
) -> None:
    story = await start_story(token_budget=1_000_000)
    await story.to("DOCS")
    await story.until(gate="docs_ready")
    world.bus_open.clear()
    await story.approve("docs_ready")

    with refused("IllegalMove", "raise_budget: the story has ended"):
        await story.update("raise_budget", tokens=5, actor="ana", role="PO")


async def test_raising_the_budget_of_a_story_without_one_is_refused(
    start_story: StartStory,
) -> None:
    story = await start_story()
    await story.until(gate="approve_scope")

    with refused("NoBudget", "tokens"):
        await story.update("raise_budget", tokens=1, actor="ana", role="PO")


async def test_a_failed_task_stops_only_what_depends_on_it_and_is_tried_again(
    start_skipping_story: StartStory, world: World
) -> None:
    story = await start_skipping_story()
    await story.to("DESIGN")
    await story.until(gate="approve_design")
    plan = Plan.model_validate(await story.handle.query("plan"))
    first, second = plan.tasks
    world.failing = {first.task_id: "model gone"}
    await story.approve("approve_design")

    await until(lambda: "WORK_FAILED" in str([e.body for e in world.recorded]))
    statuses = {
        e.body["task_id"]: e.body["status"]
        for e in world.recorded
        if e.kind in ("TaskCompleted", "TaskFailed")
    }
    assert statuses == {first.task_id: "failed", second.task_id: "not_run"}
    tries = len(world.calls)

    world.failing = {}
    await story.report()
    async with story.skipping_time():
        await story.until(state="TEST")
    assert {call.task.attempt for call in world.calls[:tries]} == {1}
    assert {call.task.attempt for call in world.calls[tries:]} == {2}


@pytest.mark.parametrize("act", ["propose", "derive_plan"])
async def test_a_failed_council_is_tried_again_and_shown_and_counted_meanwhile(
    start_skipping_story: StartStory, world: World, act: str
) -> None:
    world.failures_cost = True
    world.failing = {act: "the engine is down"}
    story = await start_skipping_story()
    await story.until(gate="approve_scope")
    await story.approve("approve_scope")

    await until(story.state, lambda view: "the engine is down" in view.working_on)
    world.failing = {}
    async with story.skipping_time():
        view = await story.until(gate="approve_design")
    assert view.tokens_used == 2 * world.tokens * len(world.calls)


async def test_a_council_that_was_barred_gets_the_findings_and_other_seeds_when_it_is_tried_again(
    start_skipping_story: StartStory, world: World
) -> None:
    world.blocking = {f"agent-architect-{n}" for n in range(1, 4)}
    story = await start_skipping_story()
    await story.until(gate="approve_scope")
    await story.approve("approve_scope")

    await until(story.state, lambda view: "every proposal is barred" in view.working_on)
    first = len(world.calls)
    world.blocking = set()
    async with story.skipping_time():
        await story.until(gate="approve_design")

    assert not any(call.task.feedback for call in world.calls[:first])
    assert {call.task.attempt for call in world.calls[:first]} == {1}
    assert {call.task.attempt for call in world.calls[first:]} == {2}
    second = world.calls[first].task.feedback
    assert len(second) == 1
    assert "secret: a key" in second[0]


async def test_a_second_start_of_a_running_story_is_refused(start_story: StartStory) -> None:
    from temporalio.exceptions import WorkflowAlreadyStartedError

    story = await start_story()

    with pytest.raises(WorkflowAlreadyStartedError):
        await start_story(story_id=story.story_id)


async def test_each_approval_has_its_own_id_also_when_a_role_approves_again(
    start_story: StartStory, world: World
) -> None:
    """A new report voids the first approval; both are kept, and so is the other role's."""
    machine = world.machine
    machine["guards"]["security_ok"] = {"role": "SECURITY"}
    for row in machine["transitions"]:
        if row["event"] == "qa_passed":
            row["guards"].append("security_ok")
    story = await start_story()
    await story.to("TEST")
    await story.until(gate="qa_passed")

    await story.approve("qa_passed", "QA")
    await story.report(job_id="another")
    await story.approve("qa_passed", "QA")
    with refused("GateRole", "ana has approved 'qa_passed' as QA; it waits for SECURITY"):
        await story.update("approve", gate="qa_passed", actor="ben", role="QA")
    await story.approve("qa_passed", "SECURITY")
    await story.finish()
    await story.handle.result()

    approvals = [
        entry.body
        for entry in world.recorded
        if entry.kind == "GateApproved" and entry.body["gate"] == "qa_passed"
    ]
    assert [each["role"] for each in approvals] == ["QA", "QA", "SECURITY"]
    assert len({each["id"] for each in approvals}) == 3
    assert all(each["id"].endswith(each["revision"]) for each in approvals)


async def test_a_custom_machine_adds_a_state_with_its_gate(
    start_story: StartStory, world: World
) -> None:
    machine = world.machine
    machine["states"]["REVIEW"] = {"work": "none"}
    machine["guards"]["security_ok"] = {"role": "SECURITY"}
    machine["gates"].append("review_passed")
    for row in machine["transitions"]:
        if row["event"] == "docs_ready":
            row["to"] = "REVIEW"
    machine["transitions"].append(
        {"from": "REVIEW", "event": "review_passed", "to": "DONE", "guards": ["security_ok"]}
    )
    story = await start_story()
    await story.to("DONE")

    view = await story.until(gate="review_passed")
    assert (view.state, view.gate_role) == ("REVIEW", "SECURITY")
    await story.approve("review_passed", role="SECURITY")

    assert (await story.handle.result()).state == "DONE"


async def test_plans_of_two_design_states_are_numbered_separately(
    start_story: StartStory, world: World
) -> None:
    machine = world.machine
    machine["states"]["DETAIL"] = machine["states"]["DESIGN"]
    machine["gates"].append("approve_detail")
    for row in machine["transitions"]:
        if row["event"] == "approve_design":
            row["to"] = "DETAIL"
    machine["transitions"].append(
        {
            "from": "DETAIL",
            "event": "approve_detail",
            "to": "BUILD",
            "guards": ["po_approved", "design_complete"],
        }
    )
    story = await start_story()
    await story.to("DESIGN")
    first = await story.until(gate="approve_design")

    await story.approve("approve_design")
    second = await story.until(gate="approve_detail")

    assert first.plan_id == f"{story.story_id}-plan-1"
    assert second.plan_id == f"{story.story_id}-plan-2"
    plan = Plan.model_validate(await story.handle.query("plan"))
    assert (plan.version, plan.tasks[0].task_id) == (2, f"{second.plan_id}-t1")

    def created() -> list[str]:
        return [e.body["task_id"] for e in world.published if e.kind == "TaskCreated"]

    await until(lambda: len(created()) >= 2 * len(plan.tasks))  # published later than shown
    assert len(created()) == len(set(created())) == 2 * len(plan.tasks)


async def test_a_decision_from_outside_reaches_the_next_council(
    start_story: StartStory, world: World
) -> None:
    story: RunningStory = await start_story()
    await story.until(gate="approve_scope")

    await story.handle.signal("add_decision", {"decision_id": "d9", "title": "No cookies"})
    await story.approve("approve_scope")
    await story.until(gate="approve_design")

    assert [d.title for d in world.calls[0].late_decisions] == ["No cookies"]


async def test_a_story_whose_id_was_used_before_has_new_plans_and_councils(
    start_story: StartStory, world: World
) -> None:
    world.runs = StoryRuns(plans=2, councils={"design": 3, "test": 1})
    story = await start_story()

    await story.finish()

    assert (await story.state()).plan_id == f"{story.story_id}-plan-3"
    tasks = {record.task_id for record in world.deliberations}
    assert tasks == {
        f"{story.story_id}-{end}"
        for end in ("design-4", "plan-3-t1", "plan-3-t2", "test-2", "docs-1")
    }


# --- the length of a story's text -----------------------------------------------------------------

LONGEST = STORY_TEXT_BYTES
TOO_LONG = [
    ({"brief": "x" * (LONGEST + 1)}, "brief: has 65,537 bytes, and may have 65,536"),
    ({"brief": "é" * (LONGEST // 2 + 1)}, "brief: has 65,538 bytes"),
    ({"acceptance_criteria": ["x" * 4_000] * 17}, "acceptance_criteria: has 68,000 bytes"),
]


@pytest.mark.parametrize(("text", "words"), TOO_LONG, ids=["brief", "bytes", "criteria"])
async def test_a_story_whose_text_is_too_long_is_refused(
    start_story: StartStory, world: World, text: dict[str, Any], words: str
) -> None:
    story = await start_story(**text)

    with pytest.raises(WorkflowFailureError) as failed:
        await story.handle.result()

    assert isinstance(failed.value.cause, ApplicationError)
    assert failed.value.cause.type == "InvalidInput"
    assert words in failed.value.cause.message
    assert world.recorded == []


@pytest.mark.parametrize(("text", "words"), TOO_LONG, ids=["brief", "bytes", "criteria"])
async def test_an_amendment_that_is_too_long_changes_nothing(
    start_story: StartStory, text: dict[str, Any], words: str
) -> None:
    story = await start_story(brief="x" * LONGEST)
    before = await story.until(gate="approve_scope")

    with refused("InvalidInput", words):
        await story.update("amend", **text)

    assert (await story.state()).revision == before.revision
