"""StoryWorkflow: drives a story through the state machine; updates steer it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import Field
from temporalio import workflow
from temporalio.common import SearchAttributeKey
from temporalio.exceptions import (
    ActivityError,
    ApplicationError,
    FailureError,
    is_cancelled_exception,
)

from workflows import story_branch
from workflows.actors import check_actor, decisions_of_people
from workflows.branch_work import BranchWork
from workflows.child import Child
from workflows.deliberation import DeliberationWorkflow
from workflows.derivation import plan_never_ran
from workflows.execution import require_id, stopped
from workflows.models.errors import ErrorType, application_error
from workflows.outbox import Outbox, supervised
from workflows.rebase import Rebasing
from workflows.search_attributes import (
    DOR_SCORE,
    GATE_OPENED_AT,
    PENDING_GATE,
    RIGOR,
    STORY_ROLE,
    STORY_STATE,
    TITLE_MEMO,
)
from workflows.state_work import StateWork
from workflows.stubs import READ_CONFIG, PlanningStub

with workflow.unsafe.imports_passed_through():
    from workflows.child_entries import is_of_child
    from workflows.current_details import story_details
    from workflows.models.access import Via, is_policy, require_person
    from workflows.models.agents import UsageLine
    from workflows.models.base import Request, content_hash
    from workflows.models.branches import StoryBranch
    from workflows.models.context import (
        ContextUpdate,
        DecisionAdded,
        DecisionsAdded,
        MilestoneReached,
        MilestonesAdded,
    )
    from workflows.models.deliberation import WaveRequest
    from workflows.models.entries import Entry
    from workflows.models.events import (
        BODIES,
        ContextMilestoneReached,
        ContextUpdated,
        EventBody,
        GateApproved,
        GateClosed,
        GateOpened,
        PlanApproved,
        RequestRefused,
        StoryCancelled,
        StoryCreated,
        StorySpec,
        StoryTransitioned,
    )
    from workflows.models.ids import (
        context_workflow_id,
        story_workflow_id,
    )
    from workflows.models.plan import Plan
    from workflows.models.process import Transition
    from workflows.models.readiness import StoryText
    from workflows.models.report import WorkspaceReport
    from workflows.models.story import (
        Amend,
        Approve,
        Move,
        RaiseBudget,
        Rebase,
        Reject,
        StoryInput,
        StoryResult,
        StoryView,
        TimelineEntry,
    )
    from workflows.rules import machine as fsm
    from workflows.rules.machine import BUDGET_GATE
    from workflows.story_requests import (
        BUDGET_ROLE,
        require_amend,
        require_approve,
        require_commit,
        require_new_approval,
        require_new_report,
        require_open,
        require_raise_budget,
        require_reject,
        require_report,
    )
    from workflows.story_state import POLICY_ACTOR, Story
    from workflows.timestamps import timestamp

QUIET = timedelta(milliseconds=10)

AMENDER = "PO"
"""The role that a token needs for an amendment."""

CONTEXT_UPDATE = "ContextUpdateWorkflow"
"""Started by name: its module imports StoryWorkflow, which it signals."""

RequestT = TypeVar("RequestT", bound=Request)


@workflow.defn
class StoryWorkflow:
    """The life of a story up to the machine's final state; people steer it with updates."""

    @workflow.init
    def __init__(self, input: StoryInput) -> None:
        carried = input.carried if workflow.info().continued_run_id else None
        self.story = Story.model_validate(carried) if carried else Story.begin(input)
        self.outbox = Outbox(self.story.outbox, self.story.story_id, on_skipped=self.entry_skipped)
        self.child = Child(self.story)
        self.branch_work = BranchWork(self)
        self.rebasing = Rebasing(self)
        self.state_work = StateWork(self)
        self.requests = 0
        """Number of updates received."""
        self.asking = False
        """True while an answer is expected that the next run would have to request again."""
        self.attributes: dict[str, Any] = {}

    @workflow.run
    async def run(self, input: StoryInput) -> StoryResult:
        """Run until the final state; publish all events before the end."""
        require_id(story_workflow_id(input.story_id))
        if input.carried is not None and not workflow.info().continued_run_id:
            raise application_error(
                ErrorType.INVALID_INPUT, "carried: is set by continue-as-new only; remove it"
            )
        if is_policy(input.created_by) and workflow.patched("policy-actors-reserved"):
            require_person(input.created_by)
        self.outbox.start()
        self.helping = [
            asyncio.create_task(supervised("news for the child", self.child.pass_on_news())),
            asyncio.create_task(supervised("grants of waves", self.grant_waves())),
            asyncio.create_task(supervised("the base at gates", self.rebasing.look_at_gates())),
            asyncio.create_task(supervised("rebased branches", self.rebasing.measure_after())),
        ]
        try:
            if self.story.process is None:
                await self.begin(input)
            while not self.story.done:
                await self.live_in_state(input)
                if self.outgrown():
                    await self.quiet()
                    self.continue_as_new(input)
            await self.branch_work.deliver()
            self.end_waiting(self.story.plan)
        except (asyncio.CancelledError, ActivityError) as error:
            if is_cancelled_exception(error):
                self.cancelled()
            await self.outbox.closed()
            raise
        await self.outbox.drained()
        await workflow.wait_condition(workflow.all_handlers_finished)
        while not self.outbox.empty and workflow.patched("late-entries-published"):
            await self.outbox.drained()
            await workflow.wait_condition(workflow.all_handlers_finished)
        return StoryResult(
            story_id=self.story.story_id,
            state=self.story.state,
            decisions=self.story.decisions,
            tokens_used=self.story.tokens_used,
            branch=self.story.branch_view(),
        )

    # --- updates, each with its validator and its signal twin -----------------------------------

    @workflow.update
    async def approve(self, request: Approve) -> StoryView:
        """Open a gate; return the new state."""
        await self.ready()
        await self.rebasing.require_no_merge()
        via = await self.check_actor(request, request.actor, request.role)
        await self.branch_work.require_shown_commit(request)
        await self.rebasing.require_no_merge()
        self.require_open("approve")
        transition = require_approve(self.story, request)
        if self.story.approved_as(request.role) and workflow.patched("roles-approve-once"):
            require_new_approval(self.story, request)
        self.pass_gate(transition, request, via)
        return self.story.view()

    @approve.validator
    def may_approve(self, request: Approve) -> None:
        require_person(request.actor)
        require_open(self.story, "approve")
        if self.story.process:
            require_approve(self.story, request)
            require_new_approval(self.story, request)

    @workflow.signal(name="approve")
    async def approve_signal(self, request: Any = None) -> None:
        await self.handle_signal(Approve, StoryWorkflow.approve, request)

    @workflow.update
    async def reject(self, request: Reject) -> StoryView:
        """Take a rejection; pass its reason to the next deliberation."""
        await self.ready()
        via = await self.check_actor(request, request.actor, request.role)
        self.require_open("reject")
        transition = require_reject(self.story, request)
        self.send_back(transition, request, via)
        return self.story.view()

    @reject.validator
    def may_reject(self, request: Reject) -> None:
        require_person(request.actor)
        require_open(self.story, "reject")
        if self.story.process:
            require_reject(self.story, request)

    @workflow.signal(name="reject")
    async def reject_signal(self, request: Any = None) -> None:
        await self.handle_signal(Reject, StoryWorkflow.reject, request)

    @workflow.update
    async def report(self, report: WorkspaceReport) -> StoryView:
        """Store a workspace report and score it by the story's rigor."""
        await self.ready()
        via = await self.check_actor(report, report.actor or "unknown")
        self.require_open("report")
        if self.story.branch and workflow.patched("commits-of-reports-checked"):
            require_commit(self.story, report)
        require_report(self.story)
        if via:
            require_new_report(self.story, report)
        self.take_report(report, via)
        self.settle()
        return self.story.view()

    @report.validator
    def may_report(self, report: WorkspaceReport) -> None:
        require_person(report.actor)
        require_open(self.story, "report")
        require_new_report(self.story, report)
        require_commit(self.story, report)
        if self.story.process:
            require_report(self.story)

    @workflow.signal(name="report")
    async def report_signal(self, request: Any = None) -> None:
        await self.handle_signal(WorkspaceReport, StoryWorkflow.report, request)

    @workflow.update
    async def amend(self, request: Amend) -> StoryView:
        """Change the story's text; approvals of the old text have to be given again."""
        await self.ready()
        via = await self.check_actor(request, request.actor, AMENDER)
        self.require_open("amend")
        way = require_amend(self.story, request)
        changed = self.story.amended(request)
        if changed:
            through_update = workflow.patched("amendment-announced-by-an-update")
            self.amended(request, changed, way, via, announce=not through_update)
            if through_update:
                await self.update_context(request.actor)
        return self.story.view()

    @amend.validator
    def may_amend(self, request: Amend) -> None:
        require_person(request.actor)
        require_open(self.story, "amend")
        if self.story.process:
            require_amend(self.story, request)

    @workflow.signal(name="amend")
    async def amend_signal(self, request: Any = None) -> None:
        await self.handle_signal(Amend, StoryWorkflow.amend, request)

    @workflow.update
    async def rebase(self, request: Rebase) -> StoryView:
        """Merge the base branch into the story's branch; an approval of the old head is stale."""
        await self.ready()
        via = await self.check_actor(request, request.actor, request.role)
        self.require_open("rebase")
        await self.rebasing.rebase(request, via)
        return self.story.view()

    @rebase.validator
    def may_rebase(self, request: Rebase) -> None:
        require_person(request.actor)
        require_open(self.story, "rebase")
        if self.story.process:
            self.rebasing.require(request)

    @workflow.signal(name="rebase")
    async def rebase_signal(self, request: Any = None) -> None:
        await self.handle_signal(Rebase, StoryWorkflow.rebase, request)

    @workflow.update
    async def raise_budget(self, request: RaiseBudget) -> StoryView:
        """Add tokens to the budget; start the waves that waited for it."""
        await self.ready()
        story = self.story
        via = await self.check_actor(request, request.actor, request.role)
        self.require_open("raise_budget")
        require_raise_budget(story, request)
        assert story.token_budget is not None
        story.token_budget += request.tokens
        words = f"by {request.tokens} tokens, by {request.actor}"
        self.milestone("BUDGET_RAISED", words, request.actor, via)
        if story.budget_gate and story.within_budget:
            story.budget_gate = False
            self.emit(GateClosed(gate=BUDGET_GATE, role=BUDGET_ROLE, actor=request.actor))
        self.show()
        return story.view()

    @raise_budget.validator
    def may_raise_budget(self, request: RaiseBudget) -> None:
        require_person(request.actor)
        require_open(self.story, "raise_budget")
        require_raise_budget(self.story, request)

    @workflow.signal(name="raise_budget")
    async def raise_budget_signal(self, request: Any = None) -> None:
        await self.handle_signal(RaiseBudget, StoryWorkflow.raise_budget, request)

    async def handle_signal(
        self, model: type[RequestT], update: Callable[[Any, RequestT], Any], request: Any
    ) -> None:
        """Apply a signal like its update; record a rejection in the timeline and the graph."""
        try:
            await update(self, model.model_validate(request))
        except ApplicationError as error:
            self.emit(RequestRefused(request=model.__name__, reason=error.message))

    @workflow.signal
    async def not_understood(self, name: str, reason: str) -> None:
        """Record an unknown or malformed signal in the timeline (workers/payloads.py)."""
        if not workflow.patched("signals-not-understood"):
            return
        await self.ready()
        self.emit(RequestRefused(request=name, reason=reason))

    def require_open(self, request: str) -> None:
        """Refuse a request to a story that ended while the request was checked.

        Raises:
            ApplicationError: `IllegalMove`.
        """
        if self.story.ends and workflow.patched("requests-refused-at-the-end"):
            require_open(self.story, request)

    async def check_actor(self, request: Request, actor: str, *roles: str) -> Via:
        """Return how a request's actor is known; empty in histories of older releases.

        Raises:
            ApplicationError: as `workflows.actors.check_actor`; its proof was used before.
        """
        checked = await check_actor(request, actor, *roles, since="actors-checked")
        if checked is None:
            return ""
        self.story.use_proof(checked, workflow.now().timestamp())
        return checked.via

    # --- signals from the fleet itself ----------------------------------------------------------

    @workflow.signal(name="hand_on")
    def forward_events(self, entries: list[Entry]) -> None:
        """Publish a child's events through the story's outbox, in a single order."""
        foreign = [entry for entry in entries if not is_of_child(self.story, entry)]
        if foreign and workflow.patched("foreign-entries-refused"):
            entries = [entry for entry in entries if is_of_child(self.story, entry)]
            what = f"{foreign[0].kind} of {foreign[0].source}"
            reason = f"entries: {len(foreign)} are not those of a child of this story: {what[:300]}"
            self.emit(RequestRefused(request="hand_on", reason=reason))
        self.outbox.extend(entries)
        for entry in entries:
            self.story.add_line(timeline_entry(entry))

    def entry_skipped(self, entry: Entry) -> None:
        """Add a line to the timeline for an entry that the outbox has skipped."""
        self.story.add_line(timeline_entry(entry))

    @workflow.signal(unfinished_policy=workflow.HandlerUnfinishedPolicy.ABANDON)
    async def request_wave(self, request: WaveRequest) -> None:
        """Grant a wave to a deliberation; wait while the budget is used up."""
        self.story.used(request.workflow_id, request.usage, request.visit, request.phase)
        if request.visit and request.visit != self.story.visit:
            return  # The child is being stopped.
        if workflow.patched("waves-outlive-a-run"):
            self.story.waves.append(request)
            return
        await self.budget()
        deliberation = workflow.get_external_workflow_handle(request.workflow_id)
        try:
            await deliberation.signal(DeliberationWorkflow.grant_wave, request.wave)
        except FailureError:
            return  # It was stopped while it waited: there is no wave to grant.

    @workflow.signal
    async def add_decision(self, decision: DecisionAdded) -> None:
        """Receive a decision from outside; running agents get it in their next wave."""
        if not decisions_of_people([decision], self.emit):
            return
        if workflow.patched("news-in-lists"):
            self.story.take_decisions([decision], bool(self.story.child))
            return
        if any(known.decision_id == decision.decision_id for known in self.story.told):
            return
        self.story.told.append(decision)
        if not self.story.child:
            return
        child = workflow.get_external_workflow_handle(self.story.child)
        try:
            await child.signal(DeliberationWorkflow.add_decision, decision)
        except FailureError:
            return  # It has ended; the next deliberation gets the decision at its start.

    @workflow.signal
    def add_decisions(self, request: DecisionsAdded) -> None:
        """Receive decisions from outside: new ones, corrections and withdrawals."""
        decisions = decisions_of_people(request.decisions, self.emit)
        self.story.take_decisions(decisions, bool(self.story.child))

    @workflow.signal
    async def add_milestone(self, milestone: MilestoneReached) -> None:
        """Receive a milestone from outside; running agents get it in their next wave."""
        if workflow.patched("news-in-lists"):
            self.story.take_milestones([milestone], timestamp(), bool(self.story.child))
            return
        if milestone.milestone_id in self.story.heard:
            return
        self.story.take_milestones([milestone], timestamp(), child_runs=False)
        if not self.story.child:
            return
        child = workflow.get_external_workflow_handle(self.story.child)
        try:
            await child.signal(DeliberationWorkflow.add_milestone, milestone)
        except FailureError:
            return  # It has ended; the next one reads it from the graph.

    @workflow.signal
    def add_milestones(self, request: MilestonesAdded) -> None:
        """Receive milestones from outside; running agents get them in their next wave."""
        self.story.take_milestones(request.milestones, timestamp(), bool(self.story.child))

    @workflow.signal
    def context_updated(self, version: Annotated[int, Field(ge=0, lt=2**31)]) -> None:
        """Take over a context version that others have created; the story continues from it."""
        self.story.context_version = max(self.story.context_version, version)

    # --- queries --------------------------------------------------------------------------------

    @workflow.query
    def state(self) -> StoryView:
        """Return the story's current state."""
        return self.story.view()

    @workflow.query
    def text(self) -> StoryText:
        """Return the text that people wrote, with every amendment."""
        return self.story.text

    @workflow.query
    def transitions(self) -> list[Move]:
        """Return the possible moves and what blocks them."""
        return self.story.moves()

    @workflow.query
    def plan(self) -> Plan | None:
        """Return the plan; None before the design is done."""
        return self.story.plan

    @workflow.query
    def waiting_plan(self) -> Plan | None:
        """Return the plan if its workflow was not started yet."""
        return self.story.plan if self.story.plan_waits else None

    @workflow.query
    def branch(self) -> StoryBranch | None:
        """Return the story's repository and branch; None without a repository."""
        return self.story.branch

    @workflow.query
    def timeline(self) -> list[TimelineEntry]:
        """Return the timeline's newest 500 lines, oldest first."""
        return self.story.timeline

    @workflow.query
    def usage(self) -> list[UsageLine]:
        """Return calls, tokens and seconds by phase, role and model."""
        return self.story.usage_lines()

    # --- the steps, in order --------------------------------------------------------------------

    async def begin(self, input: StoryInput) -> None:
        """Pin the process in the history, then record that the story was created."""
        process = await workflow.execute_activity_method(
            PlanningStub.load_process,
            input.rigor,
            **(READ_CONFIG | {"summary": f"the process at rigor {input.rigor}"}),
        )
        if process.text_bytes is not None:
            self.story.text.require_fits("StoryInput", process.text_bytes)
        self.story.branch = await story_branch.pinned(input)
        self.story.process = process
        self.story.enter(process.machine.initial)
        self.save_spec()
        self.emit(
            StoryCreated(
                title=self.story.text.title, rigor=input.rigor, created_by=input.created_by
            )
        )
        self.show()

    async def live_in_state(self, input: StoryInput) -> None:
        """Do the state's work and wait; return when the story has moved or outgrown its run."""
        visit = self.story.visit
        work = asyncio.create_task(self.state_work.run(visit))

        def over() -> bool:
            return self.story.visit != visit or work.done()

        try:
            await workflow.wait_condition(lambda: over() or self.outgrown())
            if not over() and workflow.patched("continues-as-new-at-work"):
                await self.leave(input, over)
            await workflow.wait_condition(over)
            if work.done():
                work.result()
            await workflow.wait_condition(lambda: self.story.visit != visit or self.outgrown())
        except asyncio.CancelledError:
            self.story.cancelling = True
            await stopped(work)
            await self.child.end_left()
            raise
        await stopped(work)
        await self.child.end_left()

    def outgrown(self) -> bool:
        """Return whether to continue as new.

        A running child continues in the next run; one that is just being started has to start
        first.
        """
        begins = bool(self.story.child) and not self.child.runs
        suggested = workflow.info().is_continue_as_new_suggested()
        return suggested and not begins and not self.asking

    async def leave(self, input: StoryInput, over: Callable[[], bool]) -> None:
        """Continue as new while the state's work is running; return when the work is over.

        The next run continues the work, with the child if one is running
        (docs/design/0007-continue-as-new-with-a-child.md).
        """
        while not over():
            child = self.story.child
            if await self.child.outlives():
                await self.quiet()
                if not over() and self.outgrown() and self.child.may_be_left:
                    self.continue_as_new(input)
            else:
                await workflow.wait_condition(partial(self.has_left, child))
            await workflow.wait_condition(lambda: over() or self.outgrown())

    def has_left(self, child: str) -> bool:
        return self.story.child != child

    async def quiet(self) -> None:
        """Wait for a workflow task that answers no update.

        Temporal retries the task that continues as new if something arrives meanwhile, and fails
        the updates that the first try had answered.
        """
        seen = -1
        while workflow.patched("quiet-before-continue-as-new") and seen != self.requests:
            seen = self.requests
            await workflow.sleep(QUIET, summary="then the story continues as new")
        await workflow.wait_condition(workflow.all_handlers_finished)

    def continue_as_new(self, input: StoryInput) -> NoReturn:
        carried = self.story.model_dump(mode="json")
        workflow.continue_as_new(input.model_copy(update={"brief": "", "carried": carried}))

    def cancelled(self) -> None:
        if self.story.process and self.story.done and workflow.patched("done-stays-done"):
            self.milestone("NOT_DELIVERED", "the delivery was cancelled")
            return
        self.story.cancelling = self.story.cancelled = True
        self.story.working_on = ""
        self.end_waiting(self.story.plan)
        self.close_gate(None)
        actor = workflow.cancellation_reason() or "unknown"
        self.emit(StoryCancelled(actor=actor, status="CANCELLED", reason=""))
        self.show()

    def require_visit(self, visit: int) -> None:
        """Cancel work that is stale: a person's move came in the same task as its answer."""
        if self.story.visit != visit:
            raise asyncio.CancelledError

    # --- reports --------------------------------------------------------------------------------

    def take_report(self, report: WorkspaceReport, via: Via) -> None:
        """Score a report, and record it."""
        self.story.take_report(report)
        score = self.story.score
        assert score is not None
        self.milestone(
            "WORKSPACE_REPORT",
            f"report {report.job_id} scores {score.score}: {score.gating_decision}"
            f"{f', commit {report.commit}' if report.commit else ''}",
            report.measured_by or report.actor,
            via,
        )

    # --- moves ----------------------------------------------------------------------------------

    def settle(self) -> None:
        """Take an automatic transition if there is one; otherwise open, close or refresh the gate.

        Call it after every change.
        """
        story = self.story
        if story.cancelling and workflow.patched("requests-refused-at-the-end"):
            return
        if story.work_done and not story.done and not self.rebasing.merging:
            automatic = fsm.automatic_transition(story.machine, story.state, story.facts)
            if automatic:
                self.move(automatic, "system")
                return
            gate = fsm.open_gate(story.machine, story.state, story.facts)
            gate = None if story.held else gate
            if story.gate and (gate is None or gate.event != story.gate):
                self.close_gate(None)
            if gate and not story.gate:
                self.open_gate(gate)
            elif gate:
                story.show_revision()
            if gate and story.input.approvals == "auto":
                self.open_by_policy(gate)
                return
        self.show()

    def open_gate(self, gate: Transition) -> None:
        story = self.story
        story.gate = gate.event
        story.show_revision()
        self.emit(
            GateOpened(gate=gate.event, role=story.next_role(gate.event), revision=story.revision)
        )

    def close_gate(self, actor: str | None) -> None:
        story = self.story
        if story.budget_gate:
            story.budget_gate = False
            self.emit(GateClosed(gate=BUDGET_GATE, role=BUDGET_ROLE, actor=actor))
        if story.gate:
            self.emit(GateClosed(gate=story.gate, role=story.next_role(story.gate), actor=actor))
            story.gate = ""

    def open_by_policy(self, gate: Transition) -> None:
        for role in fsm.gate_roles(self.story.machine, gate.event):
            self.pass_gate(
                gate,
                Approve(gate=gate.event, actor=POLICY_ACTOR, role=role, comment="approvals: auto"),
                "policy",
            )

    def pass_gate(self, transition: Transition, request: Approve, via: Via) -> None:
        """Record who approved what; move if no human guard is left."""
        story, run = self.story, self.outbox.run[-8:]
        revision = story.revision
        approval_id = f"{story.story_id}-{request.gate}-{story.visit}-{request.role}-{run}"
        if workflow.patched("approval-ids-with-revision"):
            approval_id = f"{approval_id}-{revision}"
        self.emit(
            GateApproved(
                id=approval_id,
                gate=request.gate,
                actor=request.actor,
                role=request.role,
                revision=revision,
                comment=request.comment,
                via=via or "claim",
            )
        )
        if not story.approve_guards(transition, request.actor, request.role):
            self.show()
            return
        if story.spec.work == "design" and story.plan:
            self.emit(
                PlanApproved(
                    plan_id=story.plan.plan_id, approved_by=request.actor, roles=[], via=via
                )
            )
        self.move(transition, request.actor, via=via)

    def send_back(self, transition: Transition, request: Reject, via: Via) -> None:
        actor, reason = request.actor, request.reason
        self.story.feedback.append(
            f"{transition.event} by {actor} in {transition.source}: {reason}"
        )
        self.story.change = f"{transition.event} by {actor}: {reason}"
        self.move(transition, actor, reason, via)

    async def update_context(self, actor: str) -> None:
        """Publish the story's own change as a context update: versions form one sequence."""
        story_id = self.story.story_id
        await workflow.start_child_workflow(
            CONTEXT_UPDATE,
            ContextUpdate(story_id=story_id, actor=actor, changed=["CASE"]),
            id=context_workflow_id(story_id, workflow.uuid4().hex[:16]),
            parent_close_policy=workflow.ParentClosePolicy.ABANDON,
            static_summary=f"announce what was amended of {story_id}",
        )

    def amended(
        self,
        request: Amend,
        changed: list[str],
        way: list[Transition],
        via: Via,
        announce: bool,
    ) -> None:
        """Record the new text; take the machine's rejections back to where it is approved."""
        story = self.story
        self.save_spec(request.actor, via)
        if announce:
            story.context_version += 1
            self.emit(ContextUpdated(version=story.context_version, changed=["CASE"]))
        reason = f"{', '.join(changed)} amended"
        for transition in way:
            self.move(transition, request.actor, reason, via)
        if not way:
            self.close_gate(None)
            self.enter(story.state)
            self.show()

    def move(
        self,
        transition: Transition,
        actor: str,
        reason: str = "",
        via: Via = "",
    ) -> None:
        self.close_gate(actor)
        self.emit(
            StoryTransitioned(
                from_phase=transition.source,
                to_phase=transition.target,
                event=transition.event,
                actor=actor,
                reason=reason,
                via=via,
            )
        )
        self.enter(transition.target)
        self.milestone(
            "PHASE_ENTERED",
            f"{transition.target}, from {transition.source} by {transition.event}",
            actor,
            via,
        )
        self.show()

    def enter(self, state: str) -> None:
        """Start a visit of a state; a design replaces the plan."""
        plan = self.story.plan
        self.story.enter(state)
        if self.story.plan is None:
            self.end_waiting(plan)

    def end_waiting(self, plan: Plan | None) -> None:
        """Announce that a plan whose workflow was not started will never run."""
        if plan and self.story.plan_waits and workflow.patched("plans-that-never-ran-end"):
            for event in plan_never_ran(plan):
                self.emit(event)
        self.story.plan_waits = False

    # --- budget ---------------------------------------------------------------------------------

    async def budget(self, wanted: Callable[[], bool] = lambda: True) -> None:
        """Wait until the story is within its token budget; the budget gate is open meanwhile.

        A move closes the gate, so it opens again for what waits in the new state.

        Args:
            wanted: returns whether anything waits for the budget; if not, this returns too.
        """
        story = self.story

        def enough() -> bool:
            return story.within_budget or not wanted()

        while True:
            if not enough() and not story.budget_gate:
                story.budget_gate = True
                self.emit(GateOpened(gate=BUDGET_GATE, role=BUDGET_ROLE))
                self.show()
            await workflow.wait_condition(
                lambda: enough() or not (story.budget_gate or story.cancelling)
            )
            if enough():
                return
            if not workflow.patched("budget-gate-opens-again"):
                await workflow.wait_condition(enough)
                return

    async def grant_waves(self) -> None:
        """Grant the waiting waves in order, whenever the budget allows."""
        story = self.story
        while True:
            await workflow.wait_condition(lambda: bool(story.waves))
            await self.budget(wanted=lambda: bool(story.waves))
            if not story.waves:
                continue
            request = story.waves[0]
            deliberation = workflow.get_external_workflow_handle(request.workflow_id)
            with suppress(FailureError):  # It was stopped while it waited.
                await deliberation.signal(DeliberationWorkflow.grant_wave, request.wave)
            # Only now: the server drops a signal whose run continues as new in the same workflow
            # task, and then the next run has to send it.
            story.waves = [wave for wave in story.waves if wave is not request]

    # --- notifications --------------------------------------------------------------------------

    async def ready(self) -> None:
        """Wait until the process is loaded: an update may arrive earlier."""
        self.requests += 1
        await workflow.wait_condition(lambda: self.story.process is not None)

    def emit(self, body: EventBody) -> None:
        self.story.add_line(timeline_entry(self.outbox.append(body)))

    def save_spec(self, amended_by: str = "", via: Via = "") -> None:
        story = self.story
        self.emit(
            StorySpec(
                title=story.text.title,
                brief=story.text.brief,
                acceptance_criteria=story.text.acceptance_criteria,
                rigor=story.input.rigor,
                created_by=story.input.created_by,
                revision=content_hash(story.text.model_dump()),
                amended_by=amended_by,
                via=via,
            )
        )

    def milestone(
        self,
        event_type: str,
        description: str,
        actor: str = "",
        via: Via = "",
    ) -> None:
        run, position = self.outbox.run[-8:], self.outbox.state.end
        self.emit(
            ContextMilestoneReached(
                milestone_id=f"{self.story.story_id}-m{position}-{run}",
                event_type=event_type,
                description=description[:1000],
                actor=actor,
                via=via,
            )
        )

    def work_on(self, what: str) -> None:
        self.story.working_on = what
        self.show()

    def gate_opened_at(self, gate: str) -> datetime | None:
        """Return since when the story waits at the gate, also over runs; None if at no gate."""
        known = workflow.info().typed_search_attributes
        if gate and known.get(PENDING_GATE) == gate:
            return known.get(GATE_OPENED_AT)
        return workflow.now() if gate else None

    def show(self) -> None:
        """Set the search attributes and the title, if they changed, and the current details."""
        view = self.story.view()
        now: dict[SearchAttributeKey[Any], Any] = {
            STORY_STATE: view.state,
            PENDING_GATE: view.pending_gate or None,
            GATE_OPENED_AT: self.gate_opened_at(view.pending_gate),
            STORY_ROLE: view.gate_role or None,
            RIGOR: view.rigor,
            DOR_SCORE: view.dor_score,
        }
        changed = [
            key.value_unset() if value is None else key.value_set(value)
            for key, value in now.items()
            if self.attributes.get(key.name) != value
        ]
        if changed:
            workflow.upsert_search_attributes(changed)
            self.attributes = {key.name: value for key, value in now.items()}
        listed = workflow.memo_value(TITLE_MEMO, default="", type_hint=str)
        if listed != view.title and workflow.patched("title-in-memo"):
            workflow.upsert_memo({TITLE_MEMO: view.title})
        workflow.set_current_details(story_details(view, self.story.moves()) + self.outbox.details)


def timeline_entry(entry: Entry) -> TimelineEntry:
    """Convert an outbox entry into a timeline line for people to read."""
    kind = BODIES.get(entry.kind)
    if kind is None:  # a child on a newer worker sent it
        return TimelineEntry(at=entry.time, event=entry.subject or entry.kind)
    body = kind.model_validate(entry.body)
    return TimelineEntry(
        at=entry.time,
        event=body.label,
        actor=body.by(),
        via=getattr(body, "via", ""),
        text=body.summary()[:300],
    )
