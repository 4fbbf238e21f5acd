"""Recording of the histories that tests/replay replays: `python -m tests.replay.record [PATH...]`.

Each path is a story or a separate call on a real Temporal server, with the instant activities of
the unit tests. An existing history is kept, because it represents the release that wrote it. To
record one again, delete its file; to record a new one, add a path. Then run this module.
"""

from __future__ import annotations

import asyncio
import json
import pkgutil
import re
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from pydantic import BaseModel
from temporalio.client import (
    Client,
    WithStartWorkflowOperation,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowHistory,
    WorkflowUpdateFailedError,
)
from temporalio.common import WorkflowIDConflictPolicy

from activities.tokens import Caller, create_proof, create_token
from deploy.local.ports import free_ports
from deploy.local.servers import Temporal
from tests.replay import record_councils, record_evaluation
from tests.replay.acceptance import criteria_tested
from tests.replay.record_branches import (
    conflict_revised,
    merges_undone,
    rebased,
    repaired,
    tasks_in_turn,
)
from tests.replay.record_plans import continued_between_batches
from tests.support.branches import FIX, README, committing_councils
from tests.support.fleet import TOKEN_KEY, connect
from tests.support.polling import until
from tests.support.repositories import make_repository
from tests.support.server_process import ServerProcess
from tests.support.servers import EarlyTemporal
from tests.unit.conftest import WORLDS, RunningStory, StartStory, World, instant_workers
from tests.unit.workflows.test_continue_as_new import approve_until_asked, flooded
from workers.exit import leave
from workers.search_attributes import register
from workflows import models, story_state
from workflows.closure import StoryClosureWorkflow
from workflows.coach import CoachWorkflow
from workflows.context_update import ContextUpdateWorkflow, request_hash
from workflows.deliberation import DeliberationWorkflow
from workflows.derivation import DerivationWorkflow
from workflows.implementation import ImplementationWorkflow
from workflows.models.agents import Agent, Task
from workflows.models.coach import CoachInput
from workflows.models.context import ContextChange, ContextUpdate
from workflows.models.deliberation import DeliberationInput
from workflows.models.entries import Entry
from workflows.models.events import GateClosed, StoryCancelled, StoryCreated
from workflows.models.ids import (
    closure_workflow_id,
    coach_workflow_id,
    context_workflow_id,
    deliberation_workflow_id,
    derivation_workflow_id,
    implementation_workflow_id,
    plan_workflow_id,
)
from workflows.models.implementation import (
    ImplementationInput,
    ImplementationResult,
    RunCommand,
    WriteFile,
)
from workflows.models.outbox import OutboxState, SkipEntry, StoryClosure
from workflows.models.plan import DerivationInput, PlanInput, StoredPlan
from workflows.models.readiness import StoryText
from workflows.models.story import Amend, Approve, Reject, StoryRuns
from workflows.models.workspace import Repository, RepositoryWork
from workflows.plan import PlanWorkflow
from workflows.rules import machine, machine_file, rigor

HISTORIES = Path(__file__).parent / "histories"
WIRE = Path(__file__).parent / "wire.json"
"""The file with the models that histories contain, and their fields."""

Path_ = Callable[[StartStory, World], Awaitable[RunningStory]]


async def approved(start: StartStory, _: World) -> RunningStory:
    story = await start()
    await story.to("DONE")
    await story.handle.result()
    return story


async def rejected_design(start: StartStory, _: World) -> RunningStory:
    story = await start()
    await story.to("DESIGN")
    await story.until(gate="approve_design")
    await story.reject("reject_design")
    return await story.finish()


async def rejected_build(start: StartStory, _: World) -> RunningStory:
    story = await start()
    await story.to("BUILD")
    await story.reject("reject_build")
    return await story.finish()


async def rejected_test(start: StartStory, _: World) -> RunningStory:
    story = await start()
    await story.to("TEST")
    await story.until(gate="qa_passed")
    await story.reject("reject_test", role="QA")
    return await story.finish()


async def rejected_docs(start: StartStory, _: World) -> RunningStory:
    story = await start()
    await story.to("DOCS")
    await story.until(gate="docs_ready")
    await story.reject("reject_docs")
    return await story.finish()


async def amended(start: StartStory, _: World) -> RunningStory:
    story = await start()
    await story.to("DESIGN")
    await story.until(gate="approve_design")
    await story.update("amend", title="Shorten every link")
    return await story.finish()


async def signed(start: StartStory, _: World) -> RunningStory:
    """Approve, amend and reject by signed requests, which a local activity checks."""
    story = await start(created_by="ana")

    async def send(name: str, request: Approve | Reject | Amend) -> None:
        owner = Caller(actor=request.actor, roles=frozenset({"PO"}))
        token = create_token(TOKEN_KEY, owner, timedelta(hours=1))
        proof = create_proof(token, story.handle.id, request)
        await story.update(name, **request.model_dump(exclude_none=True) | {"proof": proof})

    for gate in ("approve_scope", "approve_design"):
        await story.until(gate=gate)
        await send("approve", Approve(gate=gate, actor="ana", role="PO"))
    await story.until(state="BUILD")
    await send("amend", Amend(title="Shorten every link", actor="ben"))
    await story.until(gate="approve_scope")
    await send("approve", Approve(gate="approve_scope", actor="ana", role="PO"))
    await story.until(gate="approve_design")
    await send("reject", Reject(event="reject_design", actor="ana", role="PO", reason="no"))
    return await story.finish()


async def checked_by_activities(start: StartStory, world: World) -> RunningStory:
    """Check the actors of signed requests in activities, not in local ones."""
    return await signed(start, world)


async def stale_approval(start: StartStory, world: World) -> RunningStory:
    """Send a stale approval by signal.

    A stale update would leave no trace in the history: its validator refuses it first.
    """
    story = await start()
    old = await story.until(gate="approve_scope")
    await story.update("amend", title="Shorten every link")
    await story.until(gate="approve_scope", title="Shorten every link")
    approval = {"gate": "approve_scope", "actor": "ana", "role": "PO", "revision": old.revision}
    await story.handle.signal("approve", approval)
    await until(lambda: any(entry.kind == "RequestRefused" for entry in world.recorded))
    return await story.finish()


async def failed_quorum(start: StartStory, world: World) -> RunningStory:
    world.failing = {f"agent-architect-{number}": "the engine is down" for number in (1, 2)}
    story = await start()
    await story.until(gate="approve_scope")
    await story.approve("approve_scope")
    await until(story.state, lambda view: view.working_on.startswith("DESIGN failed"))
    return await _given_up(story)


async def paid_failures(start: StartStory, world: World) -> RunningStory:
    """Let calls fail after they cost tokens; the council's next attempt adds to that count."""
    world.failures_cost = True
    world.failing = {f"propose/agent-architect-{n}": "the engine is down" for n in (1, 2)}
    story = await start(token_budget=1_000_000)
    await story.until(gate="approve_scope")
    await story.approve("approve_scope")
    await until(story.state, lambda view: view.working_on.startswith("DESIGN failed"))
    world.failing = {"revise/agent-architect-2": "the engine is down"}
    return await story.finish()


async def failed_task(start: StartStory, world: World) -> RunningStory:
    story = await start()
    await story.to("DESIGN")
    await story.until(gate="approve_design")
    world.failing = {f"{(await story.state()).plan_id}-t1": "the engine is down"}
    await story.approve("approve_design")
    await until(lambda: any(entry.kind == "PlanFinished" for entry in world.recorded))
    return await _given_up(story)


async def late_decision(start: StartStory, world: World) -> RunningStory:
    """Send a decision while the architects write; their critiques include it."""
    world.hold["propose"] = asyncio.Event()
    story = await start()
    await story.until(gate="approve_scope")
    await story.approve("approve_scope")
    await until(lambda: world.acts)
    decision = {"decision_id": "D-9", "title": "No SMS", "rationale": "Cost", "decided_by": "bo"}
    await story.handle.signal("add_decision", decision)
    deliberation = f"deliberation-{story.story_id}-design-1"
    await until(lambda: _signals(start.client, deliberation), lambda names: "add_decision" in names)
    world.hold["propose"].set()
    return await story.finish()


async def news_in_lists(start: StartStory, world: World) -> RunningStory:
    """Send lists of decisions and milestones while the architects write and while tasks run."""
    world.hold |= {"propose": asyncio.Event()}
    story = await start()
    await story.until(gate="approve_scope")
    await story.approve("approve_scope")
    await until(lambda: world.acts)
    await _send_news(start.client, story, 1, f"deliberation-{story.story_id}-design-1")
    world.hold["propose"].set()
    await story.until(gate="approve_design")
    world.hold["propose"] = asyncio.Event()
    before = len(world.acts)
    await story.approve("approve_design")
    await until(lambda: len(world.acts) != before)
    plan = (await story.state()).plan_id
    await _send_news(start.client, story, 2, f"deliberation-{plan}-t1")
    world.hold["propose"].set()
    return await story.finish()


async def _send_news(client: Client, story: RunningStory, number: int, reader: str) -> None:
    decision = {"decision_id": "D-9", "title": f"No SMS {number}", "withdrawn": number == 2}
    milestone = {"milestone_id": f"M-{number}", "event_type": "DEMO"}
    await story.handle.signal("add_decisions", {"decisions": [decision]})
    await story.handle.signal("add_milestones", {"milestones": [milestone]})
    await until(
        lambda: _signals(client, reader),
        lambda names: {"add_decisions", "add_milestones"} <= {*names},
    )


async def continued(start: StartStory, world: World) -> RunningStory:
    """Approve a story on a server that suggests continue-as-new after 60 events."""
    return await approved(start, world)


async def continued_at_work(start: StartStory, world: World) -> RunningStory:
    """Continue as new while architects write and while tasks run, with a budget."""
    story = await start(token_budget=1_000_000)
    for gate in ("approve_scope", "approve_design"):
        await story.until(gate=gate)
        world.hold["propose"] = asyncio.Event()
        await approve_until_asked(story, world, gate)
        await flooded(start.client, story)
        world.hold["propose"].set()
    return await story.finish()


async def earlier_runs(start: StartStory, world: World) -> RunningStory:
    """Run a story whose id was used before; its plans and councils continue the numbering."""
    world.runs = StoryRuns(plans=2, councils={"design": 3, "test": 1})
    return await approved(start, world)


async def waves_in_order(start: StartStory, world: World) -> RunningStory:
    """Let waves wait for the budget in the story's state, not in their signal handlers."""
    return await budget_gate(start, world)


async def budget_gate(start: StartStory, world: World) -> RunningStory:
    world.tokens = 100
    story = await start(token_budget=500)
    await story.until(gate="approve_scope")
    await story.approve("approve_scope")
    await story.until(gate="budget")
    await story.update("raise_budget", tokens=1_000_000, actor="ana", role="PO")
    return await story.finish()


async def budget_gate_again(start: StartStory, world: World) -> RunningStory:
    """Amend the story while its council waits for the budget; the next council waits again."""
    world.tokens = 100
    story = await start(token_budget=500)
    await story.until(gate="approve_scope")
    await story.approve("approve_scope")
    await story.until(gate="budget")
    await story.update("amend", brief="Another one.")
    await story.until(gate="approve_scope")
    await story.approve("approve_scope")
    await story.until(state="DESIGN", gate="budget")
    await story.update("raise_budget", tokens=1_000_000, actor="ana", role="PO")
    return await story.finish()


async def amended_while_cancelled(client: Client, world: World) -> dict[str, str]:
    """Cancel a story while NATS is away; an amendment by signal is refused meanwhile."""
    story = await StartStory(client, world)()
    await story.until(gate="approve_scope")
    world.bus_open.clear()
    await story.handle.cancel()
    await story.until(cancelled=True)
    await story.handle.signal("amend", {"brief": "Another one.", "actor": "ana"})
    await until(
        lambda: story.handle.query("timeline"),
        lambda lines: lines[-1]["event"] == "RequestRefused",
    )
    world.bus_open.set()
    with suppress(WorkflowFailureError):
        await story.handle.result()
    return {"story": story.handle.id}


async def near_tie(start: StartStory, world: World) -> RunningStory:
    world.scores = {f"agent-architect-{n}": score for n, score in ((1, 0.9), (2, 0.88), (3, 0.1))}
    return await approved(start, world)


async def starts_announced(start: StartStory, world: World) -> RunningStory:
    """Let the story and its plan announce the councils, each of which asks a judge."""
    return await near_tie(start, world)


async def unchecked(start: StartStory, world: World) -> RunningStory:
    """Rank a proposal whose code was not run after one whose checks passed."""
    world.unchecked = {"agent-architect-1"}
    return await approved(start, world)


async def cancelled(start: StartStory, world: World) -> RunningStory:
    world.hold["propose"] = asyncio.Event()
    story = await start()
    await story.until(gate="approve_scope")
    await story.approve("approve_scope")
    await until(lambda: world.acts)
    return await _given_up(story)


async def plans_never_ran(client: Client, world: World) -> dict[str, str]:
    """Replace a plan that waits for its approval, and cancel the story while the next one waits."""
    story = await StartStory(client, world)()
    await story.to("DESIGN")
    await story.until(gate="approve_design")
    await story.reject("reject_design", role="PO", reason="too large")
    await story.to("DESIGN")
    await story.until(gate="approve_design")
    await _given_up(story)
    return {"story": story.handle.id}


async def auto_approved(start: StartStory, _: World) -> RunningStory:
    story = await start(approvals="auto")
    await story.until(state="BUILD")
    await story.report()
    await story.handle.result()
    return story


async def stuck_entry_skipped(start: StartStory, world: World) -> RunningStory:
    """Find the entry of a batch that the graph refuses for good, retry it and skip it."""
    world.failing = {"record/StoryCreated": "no"}
    story = await start()
    await _skip(story.handle)
    await story.to("DONE")
    await story.handle.result()
    return story


async def skipped_by_its_actor(start: StartStory, world: World) -> RunningStory:
    """Refuse a decision by a policy, and an unsigned skip; take the signed one."""
    world.require_tokens = True
    world.failing = {"publish/StoryCreated": "no"}
    story = await start()
    with suppress(WorkflowUpdateFailedError):
        await _skip(story.handle)
    forged = {"decision_id": "D-1", "title": "No SMS", "decided_by": "policy:auto"}
    await story.handle.signal("add_decision", forged)
    stuck = await until(lambda: story.handle.query("outbox_stuck"))
    token = create_token(
        TOKEN_KEY, Caller(actor="ana", roles=frozenset({"PO"})), timedelta(minutes=5)
    )
    request = SkipEntry(entry_id=stuck[0]["entry_id"], actor="ana", reason="it never fits")
    proof = create_proof(token, story.handle.id, request)
    await story.handle.execute_update("skip_entry", request.model_copy(update={"proof": proof}))
    world.require_tokens = False
    return await story.finish()


async def stuck_entry_dead_lettered(start: StartStory, world: World) -> RunningStory:
    """Skip an entry that cannot be published: its record is published as a dead letter."""
    world.failing = {"publish/StoryCreated": "no"}
    story = await start()
    await _skip(story.handle)
    await story.to("DONE")
    await story.handle.result()
    return story


async def cancelled_while_stuck(start: StartStory, world: World) -> RunningStory:
    """Cancel a story with a stuck outbox; a closure workflow records what is left."""
    story = await start()
    await story.to("TEST")
    await story.until(gate="qa_passed")
    world.failing = {"record/ContextMilestoneReached": "no"}
    await story.report()
    await until(lambda: story.handle.query("outbox_stuck"))
    await story.handle.cancel()
    with suppress(WorkflowFailureError):
        await story.handle.result()
    run_id = story.handle.first_execution_run_id or ""
    closure = start.client.get_workflow_handle(closure_workflow_id(story.story_id, run_id))
    await _skip(closure)
    await closure.result()
    return story


async def _skip(handle: WorkflowHandle[Any, Any]) -> None:
    """Skip the entry on which the workflow's outbox is stuck."""
    stuck = await until(lambda: handle.query("outbox_stuck"))
    request = {"entry_id": stuck[0]["entry_id"], "actor": "ana", "reason": "it never fits"}
    await handle.execute_update("skip_entry", request)


async def retitled(start: StartStory, _: World) -> RunningStory:
    """Amend the title; the memo, which lists read, has the first title and then the new one."""
    story = await start()
    await story.until(gate="approve_scope")
    await story.update("amend", title="Shorten every link")
    await story.until(gate="approve_scope", title="Shorten every link")
    return await story.finish()


async def announced(start: StartStory, world: World) -> RunningStory:
    """Publish approvals and the ends of tasks and plans."""
    return await approved(start, world)


async def amended_in_order(start: StartStory, world: World) -> RunningStory:
    """Announce an amendment by an update of the story's context."""
    return await amended(start, world)


async def failures_announced(start: StartStory, world: World) -> RunningStory:
    return await failed_task(start, world)


async def failed_agents_named(start: StartStory, world: World) -> RunningStory:
    """Publish with a council's failure the agents that failed and the type of the error."""
    return await failed_quorum(start, world)


async def _signals(client: Client, workflow_id: str) -> list[str]:
    history = await client.get_workflow_handle(workflow_id).fetch_history()
    return [
        event.workflow_execution_signaled_event_attributes.signal_name for event in history.events
    ]


async def _given_up(story: RunningStory) -> RunningStory:
    await story.handle.cancel()
    await until(story.handle.describe, lambda described: described.close_time is not None)
    return story


async def published_later(start_story: StartStory, world: World) -> RunningStory:
    """Events are recorded and published at once; those of an outage are published after it."""
    story = await start_story()
    await story.until(gate="approve_scope")
    await until(lambda: world.published)
    world.bus_open.clear()
    await story.to("DESIGN")
    await story.until(gate="approve_design")
    world.bus_open.set()
    return await story.finish()


PATHS: dict[str, Path_] = {
    each.__name__: each
    for each in (
        approved,
        signed,
        rejected_design,
        rejected_build,
        rejected_test,
        rejected_docs,
        amended,
        checked_by_activities,
        stale_approval,
        failed_quorum,
        paid_failures,
        failed_task,
        late_decision,
        news_in_lists,
        continued,
        continued_at_work,
        earlier_runs,
        waves_in_order,
        budget_gate,
        budget_gate_again,
        near_tie,
        starts_announced,
        unchecked,
        cancelled,
        auto_approved,
        retitled,
        stuck_entry_skipped,
        skipped_by_its_actor,
        stuck_entry_dead_lettered,
        cancelled_while_stuck,
        announced,
        amended_in_order,
        failures_announced,
        failed_agents_named,
        published_later,
    )
}


Call_ = Callable[[Client, World], Awaitable[dict[str, str]]]
"""A call that runs to its end and returns kind -> id of the workflows whose histories are kept."""


async def coached(client: Client, world: World) -> dict[str, str]:
    workflow_id = coach_workflow_id(world.key)
    await client.execute_workflow(
        CoachWorkflow.run, CoachInput(goal="Shorten links"), id=workflow_id, task_queue="story"
    )
    return {"coach": workflow_id}


async def context_updated(client: Client, world: World) -> dict[str, str]:
    """Update the context of a running story, which receives the decision and the milestone."""
    story = await StartStory(client, world)()
    workflow_id = await _context_updated(client, story.story_id)
    await client.get_workflow_handle(workflow_id).result()
    await _given_up(story)
    return {"context": workflow_id}


async def context_in_lists(client: Client, world: World) -> dict[str, str]:
    """Update the context of a running story, which receives decisions and milestones as lists."""
    return await context_updated(client, world)


async def context_updated_without_story(client: Client, world: World) -> dict[str, str]:
    """Update the context of a story that is not running."""
    workflow_id = await _context_updated(client, f"US-{world.key}")
    await client.get_workflow_handle(workflow_id).result()
    return {"context": workflow_id}


async def context_in_order(client: Client, world: World) -> dict[str, str]:
    """Update a running story's context twice; it publishes both, the second after the first."""
    story = await StartStory(client, world)()
    await story.until(gate="approve_scope")
    world.bus_open.clear()
    await _context_updated(client, story.story_id)
    workflow_id = await _context_updated(client, story.story_id, "2")
    await client.get_workflow_handle(workflow_id).result()
    world.bus_open.set()
    await _given_up(story)
    return {"context": workflow_id}


async def context_in_order_without_story(client: Client, world: World) -> dict[str, str]:
    """Update twice without a running story; the second waits until the first is on the bus."""
    world.bus_open.clear()
    story_id = f"US-{world.key}"
    first = await _context_updated(client, story_id)
    second = await _context_updated(client, story_id, "2")
    await until(lambda: _signals(client, first), lambda names: "follow" in names)
    world.bus_open.set()
    await client.get_workflow_handle(second).result()
    return {"context": second}


async def context_refused(client: Client, world: World) -> dict[str, str]:
    world.failing = {"update_context": "case not found"}
    with suppress(WorkflowUpdateFailedError):
        await _context_updated(client, f"US-{world.key}")
    workflow_id = context_workflow_id(f"US-{world.key}", "1")
    with suppress(WorkflowFailureError):
        await client.get_workflow_handle(workflow_id).result()
    return {"context": workflow_id}


async def _context_updated(client: Client, story_id: str, request_id: str = "1") -> str:
    workflow_id = context_workflow_id(story_id, request_id)
    change = ContextChange(operation="CREATE", entity_type="DECISION", entity_id="D-1")
    update = ContextUpdate(story_id=story_id, actor="ana", changes=[change])
    await client.execute_update_with_start_workflow(
        ContextUpdateWorkflow.stored,
        request_hash(update),
        start_workflow_operation=WithStartWorkflowOperation(
            ContextUpdateWorkflow.run,
            update,
            id=workflow_id,
            task_queue="story",
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        ),
    )
    return workflow_id


async def derived(client: Client, world: World) -> dict[str, str]:
    """Derive a plan when the graph has the story's text and no plan."""
    world.stored = StoredPlan(story=StoryText(title="Shorten links", brief="They are long."))
    return await _derived(client, world)


async def plan_from_the_bus(client: Client, world: World) -> dict[str, str]:
    """Run a plan when the graph has only the story's text: its tasks are derived and announced."""
    world.stored = StoredPlan(story=StoryText(title="Shorten links", brief="They are long."))
    return await _run_plan(client, world)


async def plan_without_story(client: Client, world: World) -> dict[str, str]:
    """Run a plan when the graph has neither its tasks nor its story."""
    return await _run_plan(client, world)


async def plan_of_roles(client: Client, world: World) -> dict[str, str]:
    """Run a plan of a story that the graph does not have; the plan's approval names two roles."""
    return await _run_plan(client, world, roles=["DEV", "QA"])


async def plan_that_cannot_begin(client: Client, world: World) -> dict[str, str]:
    """Run a plan whose tasks cannot be derived: it ends as failed."""
    world.stored = StoredPlan(story=StoryText(title="Shorten links", brief="They are long."))
    world.failing = {"derive_plan": "no model"}
    with suppress(WorkflowFailureError):
        await _run_plan(client, world)
    return {"plan": plan_workflow_id(f"US-{world.key}", f"p-{world.key}")}


async def _run_plan(client: Client, world: World, **more: Any) -> dict[str, str]:
    story_id, plan_id = f"US-{world.key}", f"p-{world.key}"
    workflow_id = plan_workflow_id(story_id, plan_id)
    request = PlanInput(story_id=story_id, plan_id=plan_id, **more)
    await client.execute_workflow(PlanWorkflow.run, request, id=workflow_id, task_queue="story")
    return {"plan": workflow_id}


async def derived_without_story(client: Client, world: World) -> dict[str, str]:
    """Derive a plan of a story that the graph does not have."""
    with suppress(WorkflowFailureError):
        await _derived(client, world)
    return {"derivation": derivation_workflow_id(f"US-{world.key}", "plan-1")}


async def closed(client: Client, world: World) -> dict[str, str]:
    """Close a story that was terminated while a gate was open and an entry was unpublished."""
    story_id = f"US-{world.key}"
    at = {"story_id": story_id, "timestamp": "2026-03-01T10:00:00.000Z"}
    created = StoryCreated(title="Undo", rigor="standard", created_by="ana", **at)
    left = Entry(
        id=f"story-{story_id}/run/0",
        kind="StoryCreated",
        subject=created.SUBJECT,
        source=f"story-{story_id}",
        story_id=story_id,
        time=created.timestamp,
        body=created.model_dump(mode="json"),
    )
    closure = StoryClosure(
        story_id=story_id,
        run_id="run",
        outbox=OutboxState(started_ms=1, entries=[left]),
        gate=GateClosed(gate="approve_scope", role="PO", **at),
        cancelled=StoryCancelled(actor="ana", status="CANCELLED", reason="terminated", **at),
    )
    workflow_id = closure_workflow_id(story_id, "run")
    await client.execute_workflow(
        StoryClosureWorkflow.run, closure, id=workflow_id, task_queue="story"
    )
    return {"closure": workflow_id}


async def _derived(client: Client, world: World) -> dict[str, str]:
    request = DerivationInput(story_id=f"US-{world.key}", plan_id="plan-1", announce=True)
    workflow_id = derivation_workflow_id(request.story_id, request.plan_id)
    await client.execute_workflow(
        DerivationWorkflow.run, request, id=workflow_id, task_queue="story"
    )
    return {"derivation": workflow_id}


async def implemented(client: Client, world: World) -> dict[str, str]:
    """Explore, edit, test and finish; a decision arrives after the first step."""
    world.hold["next_action"] = asyncio.Event()
    handle = await _implementation(client, world)
    await until(lambda: world.calls)
    decision = {"decision_id": "D-9", "title": "No SMS", "rationale": "Cost", "decided_by": "bo"}
    await handle.signal("add_decision", decision)
    world.hold.pop("next_action").set()
    await handle.result()
    return {"implementation": handle.id}


async def pack_lost(client: Client, world: World) -> dict[str, str]:
    """Build the kept context pack again, because a call does not find it."""
    world.lost_packs = {"pack-1"}
    return await implemented(client, world)


async def implemented_within_budget(client: Client, world: World) -> dict[str, str]:
    """Wait for the story's budget before each step."""
    story = await StartStory(client, world)(token_budget=25)
    await story.until(gate="approve_scope")
    handle = await _implementation(
        client, world, ask_for_budget=True, outbox_workflow_id=story.handle.id
    )
    await story.until(gate="budget")
    await story.update("raise_budget", tokens=10_000, actor="ana", role="PO")
    await handle.result()
    await _given_up(story)
    return {"implementation": handle.id}


async def implementation_failed(client: Client, world: World) -> dict[str, str]:
    """Keep the commit of the second step when the third one fails."""
    world.failing["run_action/3"] = "the set-up fails"
    handle = await _implementation(client, world)
    await handle.result()
    return {"implementation": handle.id}


async def implementation_cancelled(client: Client, world: World) -> dict[str, str]:
    world.hold["next_action"] = asyncio.Event()
    handle = await _implementation(client, world)
    await until(lambda: world.calls)
    await handle.cancel()
    with suppress(WorkflowFailureError):
        await handle.result()
    return {"implementation": handle.id}


async def delivered(client: Client, world: World) -> dict[str, str]:
    """Bring a story in a repository up to the delivery of its branch."""
    with TemporaryDirectory(prefix="fleet-") as folder:
        world.folder = Path(folder)
        origin = world.folder / "origin"
        origin.mkdir()
        entry = Repository(key="sample", url=make_repository(origin), push=True)
        world.repositories = {entry.key: entry}
        world.edits = {"Build it": FIX, "Test it": README}
        async with committing_councils(client, world) as queue:
            start = StartStory(client, world, queue)
            story = await start(repository=entry.key, paths=["README.md", "adder/**"])
            await story.finish()
            plan = (await story.state()).plan_id
    return {"story": story.handle.id, "plan": plan_workflow_id(story.story_id, plan)}


async def council_of_changes(client: Client, world: World) -> dict[str, str]:
    """Let three agents change a repository within a budget: one breaks a test, one does nothing."""
    story = await StartStory(client, world)(token_budget=50)
    await story.until(gate="approve_scope")
    world.actions_of = {
        "agent-dev-1": [WriteFile(path="core.py", content="x")],
        "agent-dev-2": [RunCommand(command="ls")],
        "agent-dev-3": [WriteFile(path="README.md", content="hello")],
    }
    world.broken = {"core.py"}
    request = DeliberationInput(
        task_id=f"T-{world.key}",
        story_id=story.story_id,
        role="DEV",
        description="Add a section",
        ask_for_budget=True,
        outbox_workflow_id=story.handle.id,
        work=RepositoryWork(
            repository=Repository(key="sample", url="file:///r"),
            story_id=story.story_id,
            base="0" * 40,
        ),
    )
    workflow_id = deliberation_workflow_id(request.task_id)
    handle = await client.start_workflow(
        DeliberationWorkflow.run, request, id=workflow_id, task_queue="story"
    )
    await story.until(gate="budget")
    await story.update("raise_budget", tokens=10_000, actor="ana", role="PO")
    await handle.result()
    await _given_up(story)
    return {"deliberation": workflow_id}


async def _implementation(
    client: Client, world: World, **more: Any
) -> WorkflowHandle[Any, ImplementationResult]:
    world.actions = [
        RunCommand(command="ls"),
        WriteFile(path="README.md", content="hello"),
        RunCommand(command="pytest -q"),
    ]
    task = Task(
        task_id=f"T-{world.key}",
        story_id=f"US-{world.key}",
        role="DEV",
        description="Add a section",
    )
    agent = Agent(agent_id="agent-dev-1", role="DEV")
    request = ImplementationInput(
        repository="sample", task=task, agent=agent, paths=["README.md"], **more
    )
    return await client.start_workflow(
        ImplementationWorkflow.run,
        request,
        id=implementation_workflow_id(task.task_id, agent.agent_id),
        task_queue="story",
    )


CALLS: dict[str, Call_] = {
    each.__name__: each
    for each in (
        coached,
        context_updated,
        context_in_lists,
        context_updated_without_story,
        context_in_order,
        context_in_order_without_story,
        context_refused,
        plans_never_ran,
        derived,
        derived_without_story,
        closed,
        plan_from_the_bus,
        plan_without_story,
        plan_of_roles,
        plan_that_cannot_begin,
        implemented,
        pack_lost,
        implemented_within_budget,
        implementation_failed,
        implementation_cancelled,
        delivered,
        merges_undone,
        amended_while_cancelled,
        council_of_changes,
        criteria_tested,
        repaired,
        conflict_revised,
        tasks_in_turn,
        rebased,
        *record_councils.CALLS,
        *record_evaluation.CALLS,
        continued_between_batches,
    )
}


IMPATIENT = {"continued", "continued_at_work", "continued_between_batches"}
"""Paths that need a server that suggests continue-as-new early."""


async def record(names: list[str]) -> None:
    """Run each path without a history and write the histories of the story and its children."""
    for server, paths in (
        (Temporal, [name for name in names if name not in IMPATIENT]),
        (EarlyTemporal, [name for name in names if name in IMPATIENT]),
    ):
        missing = [name for name in paths if not [*HISTORIES.glob(f"{name}*.*.json")]]
        if missing:
            await _record_on(server, missing)


async def _record_on(kind: type[Temporal], names: list[str]) -> None:
    with TemporaryDirectory() as folder:
        port, ui_port = free_ports(2)
        home = Path(folder)
        server = ServerProcess(
            kind(home / "temporal", port, ui_port), home / "log", timedelta(seconds=60)
        )
        await server.start()
        try:
            client = await connect(f"127.0.0.1:{port}")
            await register(client)
            async with instant_workers(client):
                for name in names:
                    await _record(client, name)
        finally:
            await server.kill()


async def _record(client: Client, name: str) -> None:
    world = World(key=f"R-{name.replace('_', '-')}")
    WORLDS[world.key] = world
    if name in CALLS:
        kept = await CALLS[name](client, world)
    else:
        kept = await _of_story(await PATHS[name](StartStory(client, world), world), world)
    for kind, workflow_id in kept.items():
        for number, history in enumerate(await _runs(client, workflow_id), 1):
            _write(f"{name}.{kind}" if number == 1 else f"{name}_{number}.{kind}", history)
    print(f"{name}: recorded {', '.join(kept)}")


async def _of_story(story: RunningStory, world: World) -> dict[str, str]:
    """Return the workflows of a story to keep: its first council, its plan and itself."""
    first = world.runs.councils.get("design", 0) + 1
    kept = {"deliberation": f"deliberation-{story.story_id}-design-{first}"}
    if plan_id := (await story.state()).plan_id:
        kept["plan"] = plan_workflow_id(story.story_id, plan_id)
    return kept | {"story": story.handle.id}


async def _runs(client: Client, workflow_id: str) -> list[WorkflowHistory]:
    """Return the histories of a workflow's runs, each of which continues the one before."""
    run_id: str | None = None
    found: list[WorkflowHistory] = []
    while run_id or not found:
        handle = client.get_workflow_handle(workflow_id, run_id=run_id)
        found.insert(0, await handle.fetch_history())
        began = found[0].events[0].workflow_execution_started_event_attributes
        run_id = began.continued_execution_run_id
    return found


STICKY_QUEUE = re.compile(r"^\d+@.+-(?=[0-9a-f]{32}$)")


def portable(part: Any) -> Any:
    """Return a history without stack traces and worker names, which identify the machine.

    Replay reads neither.
    """
    match part:
        case dict():
            return {
                key: "recorder" if key == "identity" else portable(value)
                for key, value in part.items()
                if key != "stackTrace"
            }
        case list():
            return [portable(each) for each in part]
        case str():
            return STICKY_QUEUE.sub("recorder-", part)
        case _:
            return part


def _write(name: str, history: WorkflowHistory) -> None:
    compact = json.dumps(portable(history.to_json_dict()), separators=(",", ":"))
    (HISTORIES / f"{name}.json").write_text(compact + "\n")


def model_modules() -> Iterator[ModuleType]:
    """Import each module of workflows/models."""
    for module in pkgutil.iter_modules(models.__path__):
        yield import_module(f"{models.__name__}.{module.name}")


def wire() -> dict[str, dict[str, list[str]]]:
    """Return each model's fields and the fields without a default."""
    return {
        f"{model.__module__}.{model.__qualname__}": {
            "fields": sorted(model.model_fields),
            "required": sorted(n for n, f in model.model_fields.items() if f.is_required()),
        }
        for module in (*model_modules(), story_state, machine, machine_file, rigor)
        for model in vars(module).values()
        if isinstance(model, type)
        and issubclass(model, BaseModel)
        and model.__module__ == module.__name__
    }


def record_wire() -> None:
    """Add new models to WIRE; existing ones stay, because histories contain them."""
    known = json.loads(WIRE.read_text()) if WIRE.exists() else {}
    WIRE.write_text(json.dumps(wire() | known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    HISTORIES.mkdir(exist_ok=True)
    record_wire()
    asyncio.run(record(sys.argv[1:] or [*PATHS, *CALLS]))
    leave(0)
