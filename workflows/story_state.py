"""A story's state and its rules: possible moves, the content of gates, and usage. Pure.

StoryWorkflow (story.py) uses it and does the waiting. The whole state is one model, so that
continue-as-new carries it by `model_dump`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from workflows.models.acceptance import Acceptance
from workflows.models.access import CheckedActor, request_content
from workflows.models.agents import CallUsage, Proposal, UsageLine
from workflows.models.base import content_hash
from workflows.models.branches import BaseLook, BranchView, MergedChange, StoryBranch
from workflows.models.context import DecisionAdded, MilestoneReached
from workflows.models.deliberation import DeliberationResult, RecordedDecision, WaveRequest
from workflows.models.errors import ErrorType, application_error
from workflows.models.ids import (
    deliberation_workflow_id,
    implementation_workflow_id,
)
from workflows.models.outbox import OutboxState
from workflows.models.plan import Plan, PlanResult, Repair
from workflows.models.process import Machine, Process, StateSpec, Transition
from workflows.models.readiness import Readiness, StoryText
from workflows.models.report import ReportScore, WorkspaceReport
from workflows.models.story import (
    Amend,
    Move,
    StoryInput,
    StoryRuns,
    StoryView,
    TimelineEntry,
)
from workflows.models.workspace import RepositoryWork
from workflows.rules import machine as fsm
from workflows.rules import rigor
from workflows.rules.machine import BUDGET_GATE
from workflows.rules.news import MILESTONES_KNOWN, decisions_with, holding, milestones_with
from workflows.story_requests import BUDGET_ROLE, new_text
from workflows.usage_lines import merged, summed

POLICY_ACTOR = "policy:auto"

PROOF_SPARE = 60.0
"""Seconds that an expired proof is remembered, for clocks that differ."""


LINES_KEPT = 500
"""Maximum number of timeline lines: what `fleet show` shows, and what a query and a continue-as-new
carry without trouble. The graph, Valkey and the bus have every event."""


class Approval(BaseModel):
    """An approval of a human guard: who passed it, and in which role."""

    guard: str
    actor: str
    role: str


class Shown(BaseModel):
    """A revision that a gate showed, and the change that caused it.

    A stale approver is shown what has changed since.
    """

    gate: str
    revision: str
    change: str


class Council(BaseModel):
    """The outcome of a state's deliberation."""

    task_id: str
    winner_id: str
    proposal: Proposal
    score: float


class Story(BaseModel):
    """The complete state of a story's run; continue-as-new carries it."""

    input: StoryInput
    text: StoryText
    state: str
    process: Process | None = None
    branch: StoryBranch | None = None
    """The story's repository, pinned, and its branch; None without a repository."""
    unmeasured: str = ""
    """Why the fleet could not measure the branch's head."""
    acceptance: Acceptance | None = None
    """Which criteria are proved; None without a repository, and until the tests were run."""
    rebased: bool = False
    """True if this visit has merged the base into a head that was measured."""
    remeasure: bool = False
    """True until the fleet has measured the head of a rebase."""
    strays: bool = False
    """True if work was stopped that may have merged changes, until the branch is put back."""
    visit: int = 0
    """A counter of transitions and amendments: work started before the last one is stale."""
    attempts: dict[str, int] = {}
    """Number of times that each state's work was started; it numbers plans and deliberations."""
    before: StoryRuns | None = None
    """Numbers that earlier runs under this id have used; None before the first council."""
    child: str = ""
    """The workflow id of the running deliberation or plan."""
    child_run: str = ""
    outlived: bool = False
    """True if the child continues when this run continues as new; a signal then stops it."""
    waves: list[WaveRequest] = []
    """Waves that wait for the budget, in order."""
    readiness: Readiness | None = None
    councils: dict[str, Council] = {}
    """State -> the outcome of its deliberation."""
    plan: Plan | None = None
    plan_waits: bool = False
    """True from the derivation of the plan until its workflow is started."""
    plan_status: str = ""
    plan_faults: list[str] = []
    done_tasks: list[str] = []
    repairs: list[Repair] = []
    """The plan's repairs, in order; each belongs to one visit."""
    report: WorkspaceReport | None = None
    reported: dict[str, str] = {}
    """Job of a workspace report -> the hash of that report: each counts once."""
    proofs: dict[str, float] = {}
    """Proof of a request -> when it expires, in seconds: each counts once."""
    score: ReportScore | None = None
    approvals: list[Approval] = []
    gate: str = ""
    shown: list[Shown] = []
    change: str = "the story was written"
    """The last change to what a gate shows."""
    feedback: list[str] = []
    derivations: int = 0
    working_on: str = ""
    work_failed: str = ""
    attempt: int = 1
    """Which try the current work is; one more with each failure of any state's work."""
    work_done: bool = False
    """True if the current state's work is done: its gate may open."""
    decisions: list[RecordedDecision] = []
    told: list[DecisionAdded] = []
    """The newest decisions from outside, for the next deliberations; the graph has all of them."""
    heard: list[str] = []
    """Ids of the newest milestones from outside."""
    unsent_decisions: list[DecisionAdded] = []
    """Decisions for the running child that have not been sent to it yet."""
    unsent_milestones: list[MilestoneReached] = []
    usage: dict[str, list[UsageLine]] = {}
    """One run of one deliberation -> its usage so far: a later value replaces an earlier one."""
    token_budget: int | None = None
    budget_gate: bool = False
    context_version: int = 0
    cancelling: bool = False
    """True from a cancellation on; `cancelled`: its event is in the outbox."""
    cancelled: bool = False
    timeline: list[TimelineEntry] = []
    outbox: OutboxState = OutboxState()

    @classmethod
    def begin(cls, input: StoryInput) -> Story:
        text = StoryText(
            title=input.title, brief=input.brief, acceptance_criteria=input.acceptance_criteria
        )
        return cls(
            input=input.model_copy(update={"carried": None, "brief": ""}),
            text=text,
            state="",
            token_budget=input.token_budget,
        )

    @property
    def story_id(self) -> str:
        return self.input.story_id

    @property
    def machine(self) -> Machine:
        assert self.process is not None, "asked before the process was loaded"
        return self.process.machine

    @property
    def done(self) -> bool:
        return self.state == self.machine.final

    @property
    def ends(self) -> bool:
        """Whether the story takes no requests: it is done, or is being cancelled."""
        return self.cancelling or (self.process is not None and self.done)

    @property
    def spec(self) -> StateSpec:
        return next(state for state in self.machine.states if state.name == self.state)

    # --- facts ----------------------------------------------------------------------------------

    @property
    def guards(self) -> dict[str, bool]:
        """The computed guards and whether each one holds."""
        assert self.process is not None
        deliberated = self.state in self.councils
        return {
            "dor_ok": self.readiness is not None
            and self.readiness.total >= self.process.rigor.dor_threshold,
            "design_complete": deliberated and self.plan is not None,
            "all_subtasks_done": self.plan_status == "COMPLETED",
            "builds_passing": self.report is not None
            and self.report.build.ok
            and self.report.unit.ok
            and not self.outdated,
            "tests_passing": self.score is not None
            and self.score.gating_decision in ("pass", "warn")
            and not self.outdated,
            "docs_complete": deliberated,
        }

    @property
    def facts(self) -> fsm.Facts:
        return fsm.Facts(
            guards=self.guards, approved=[approval.guard for approval in self.approvals]
        )

    def moves(self) -> list[Move]:
        """Return the possible moves and what blocks each one, with the reason."""
        if self.process is None:
            return []
        why = self.reasons()
        return [
            move.model_copy(
                update={
                    "blocked_by": [
                        f"{guard}: {why[guard]}" if guard in why else guard
                        for guard in move.blocked_by
                    ]
                }
            )
            for move in fsm.moves(self.machine, self.state, self.facts)
        ]

    def reasons(self) -> dict[str, str]:
        """Return the reason why each computed guard does not hold."""
        assert self.process is not None
        waits = self.working_on or self.work_failed
        ready = self.readiness
        return {
            "dor_ok": f"readiness {ready.total} is below {self.process.rigor.dor_threshold} for "
            f"{self.input.rigor}; amend the story"
            if ready
            else "the story is being scored",
            "design_complete": waits or "the design is not done",
            "all_subtasks_done": waits or "; ".join(self.plan_faults) or "the plan is not done",
            "builds_passing": self.outdated
            or (
                f"the last report's build or units failed{self._after_repairs}"
                if self.report
                else self.no_report
            ),
            "tests_passing": self.outdated
            or (
                f"the last report scores {self.score.score}, "
                f"{self.score.gating_decision}: {'; '.join(self.score.reasons)}"
                if self.score
                else self.no_report
            ),
            "docs_complete": waits or "the documentation is not done",
        }

    @property
    def no_report(self) -> str:
        why = f": the fleet could not measure the branch: {self.unmeasured}"
        return (
            f"no workspace report yet{why if self.unmeasured else ''}; "
            "send one with the update `report`"
        )

    @property
    def repairs_now(self) -> list[Repair]:
        """The repairs of this visit of the state that runs the plan."""
        return [repair for repair in self.repairs if repair.visit == self.visit]

    @property
    def _after_repairs(self) -> str:
        made = sum(repair.status != "open" for repair in self.repairs_now)
        if not made:
            return ""
        tasks = f"{made} repair task{'s' if made > 1 else ''}"
        return f", after {tasks}; send the update `report`, or reject"

    @property
    def held(self) -> str:
        """Why no gate opens after a rebase; empty if none holds it."""
        if not self.rebased or self.guards["builds_passing"]:
            return ""
        return f"the base was merged, and {self.reasons()['builds_passing']}"

    @property
    def outdated(self) -> str:
        """Why the last report does not count: the branch has another commit; empty if it does."""
        head = self.branch.head if self.branch else ""
        if not head or self.report is None or head.startswith(self.report.commit):
            return ""
        return (
            f"the last report is of commit {self.report.commit[:12]}, and the branch is at "
            f"{head[:12]}; measure that commit, and send the update `report`"
        )

    def legal(self) -> str:
        events = ", ".join(fsm.legal_events(self.machine, self.state)) or "none"
        return f"the story is in {self.state}; legal now: {events}"

    # --- the gate -------------------------------------------------------------------------------

    def gate_content(self, gate: Transition) -> object:
        """Return exactly what a gate approves: story text, design and plan, report, or document.

        Of a story in a repository, all but the text also names the branch's commit.
        """
        content = self._gate_content(gate)
        if self.shows_commit:
            assert self.branch is not None
            return {"commit": self.branch.head, "shown": content}
        return content

    @property
    def shows_commit(self) -> bool:
        """Whether the current state's gate is for a commit."""
        return bool(self.branch and self.branch.head) and self.spec.work != "readiness"

    def _gate_content(self, gate: Transition) -> object:
        council = self.councils.get(self.state)
        proposal = council.proposal.model_dump() if council else None
        match self.spec.work:
            case "design":
                plan = self.plan.model_dump() if self.plan else None
                return {"design": proposal, "plan": plan}
            case "deliberation" | "plan" if self.reads_report(gate):
                tested = {"acceptance": self.acceptance.model_dump()} if self.acceptance else {}
                return {"report": _shown_report(self.report), "findings": proposal, **tested}
            case "deliberation":
                return {"document": proposal}
            case _:
                return self.text.model_dump()

    def reads_report(self, transition: Transition) -> bool:
        return bool({"builds_passing", "tests_passing"} & set(transition.guards))

    @property
    def revision(self) -> str:
        """The content hash of what the open gate shows; empty if no gate is open."""
        transition = fsm.gate_transition(self.machine, self.gate) if self.gate else None
        return content_hash(self.gate_content(transition)) if transition else ""

    def show_revision(self) -> None:
        """Record the open gate's revision; a new one voids approvals of the old one."""
        revision = self.revision
        last = self.shown[-1] if self.shown else None
        if last and (last.gate, last.revision) == (self.gate, revision):
            return
        self.approvals = []
        self.shown.append(Shown(gate=self.gate, revision=revision, change=self.change))

    def since(self, revision: str) -> str:
        """Return what changed after `revision` was shown."""
        at = [i for i, shown in enumerate(self.shown) if shown.revision == revision]
        if not at:
            return "this gate never showed it"
        return "since then " + "; ".join(shown.change for shown in self.shown[at[-1] + 1 :])

    def visited(self, state: str) -> int:
        return self.attempts.get(state, 0)

    @property
    def council_number(self) -> int:
        """Number of the current state's deliberation; numbers of earlier runs are not reused."""
        earlier = self.before.councils.get(self.state.lower(), 0) if self.before else 0
        return earlier + self.visited(self.state)

    @property
    def designs_begun(self) -> int:
        """Number of times that a state that makes a plan was entered; it numbers the plans."""
        return sum(self.visited(s.name) for s in self.machine.states if s.work == "design")

    def use_proof(self, checked: CheckedActor, now: float) -> None:
        """Note that a proof was used; refuse it if it was used before.

        Raises:
            ApplicationError: `Unauthenticated`.
        """
        if checked.proof_id in self.proofs:
            raise application_error(
                ErrorType.UNAUTHENTICATED, "proof: was used before; sign the request again"
            )
        self.proofs = {proof: end for proof, end in self.proofs.items() if end > now - PROOF_SPARE}
        if checked.proof_id:
            self.proofs[checked.proof_id] = checked.expires

    # --- changes --------------------------------------------------------------------------------

    def enter(self, state: str) -> None:
        """Start a visit of a state; drop the results that its work will replace."""
        self.strays = self.strays or (not self.work_done and bool(self.branch and self.branch.head))
        self.waves = [wave for wave in self.waves if not wave.visit]  # else of the visit that ends
        self.state = state
        self.visit += 1
        self.attempts[state] = self.visited(state) + 1
        self.gate, self.approvals = "", []
        self.working_on, self.work_failed, self.work_done = "", "", False
        self.councils.pop(state, None)
        if self.spec.work in ("readiness", "design", "plan") or self.tests_criteria:
            self.acceptance = None
        self.rebased = self.remeasure = False
        match self.spec.work:
            case "readiness":
                self.readiness = None
            case "design":
                self.plan, self.done_tasks, self.repairs = None, [], []
                self.report = self.score = None
            case "plan":
                self.plan_status, self.plan_faults, self.done_tasks = "", [], []
                self.report = self.score = None
                self.unmeasured = ""

    def amended(self, request: Amend) -> list[str]:
        """Store the new text; return the names of the fields that differ from before."""
        new = new_text(request)
        changed = [field for field, value in new.items() if getattr(self.text, field) != value]
        self.text = self.text.model_copy(update=new)
        if changed:
            self.change = f"{', '.join(changed)} amended by {request.actor}"
        return changed

    def take_report(self, report: WorkspaceReport) -> None:
        assert self.process is not None
        self.report, self.unmeasured = report, ""
        self.reported[report.job_id] = request_content(report)
        self.score = rigor.score_report(self.process.rigor, self.input.rigor, report)
        came = f"report {report.job_id} came in"
        self.change = f"{self.change}, and {came}" if self.remeasure else came

    def repository_work(self) -> RepositoryWork | None:
        """Return what councils work on; None without a repository."""
        branch = self.branch
        if branch is None:
            return None
        return RepositoryWork(
            repository=branch.repository,
            story_id=self.story_id,
            base=branch.head,
            paths=branch.paths,
            steps=self.input.steps,
            rigor=self.input.rigor,
            level=self.process.rigor if self.process else None,
            goal=[self.text.title, *self.text.acceptance_criteria],
        )

    @property
    def changes(self) -> list[str]:
        """Globs that the current state's council may change in the repository; empty: none."""
        task, branch = self.spec.in_repository, self.branch
        if task is None or branch is None:
            return []
        return branch.tests if task.changes == "tests" else branch.docs

    @property
    def tests_criteria(self) -> bool:
        """Whether the current state is the one that finds out which criteria are proved."""
        task = self.spec.in_repository
        return self.branch is not None and task is not None and task.changes == "tests"

    def phase_work(self) -> RepositoryWork | None:
        """Return what the current state's council works on; None: it writes Markdown."""
        work, changes = self.repository_work(), self.changes
        return work.model_copy(update={"paths": changes}) if work and changes else None

    def take_acceptance(self, acceptance: Acceptance) -> None:
        self.acceptance = acceptance
        self.change = f"{acceptance.proved} of {len(acceptance.criteria)} criteria were proved"

    def take_outcomes(self, result: PlanResult) -> None:
        """Take over what a plan's tasks have cost, decided and merged."""
        for outcome in result.outcomes:
            self.used(deliberation_workflow_id(outcome.task_id), outcome.usage)
            if outcome.revised:
                author = outcome.revised[0].agent_id
                self.used(implementation_workflow_id(outcome.task_id, author), outcome.revised)
            self.decisions += outcome.decisions
            if outcome.status == "done":
                self.done_tasks.append(outcome.task_id)
        self.take_merged(result.merged)

    def end_repair(self, repair: Repair, error: str) -> None:
        """Note how a repair ended. `error`: why it failed; empty: it did not."""
        ended = repair.model_copy(update={"status": "failed" if error else "done", "error": error})
        self.repairs = [ended if each == repair else each for each in self.repairs]

    def take_merged(self, merged: list[MergedChange]) -> None:
        """Take over the changes that a plan has merged into the branch."""
        if self.branch and merged:
            changes = {"head": merged[-1].commit, "merged": [*self.branch.merged, *merged]}
            self.branch = self.branch.model_copy(update=changes)
            self.change = f"{merged[-1].task_id} was merged"

    def take_base(self, branch: StoryBranch, actor: str) -> None:
        """Take over a branch into which a person has merged the base."""
        was_measured = bool(self.report or self.unmeasured)
        self.rebased, self.remeasure = was_measured or self.rebased, was_measured
        self.branch = branch
        self.change = f"{branch.repository.base} at {branch.base[:12]} was merged by {actor}"

    def found_commit(self, head: str) -> None:
        """Take over a commit of the branch that the story did not make."""
        assert self.branch is not None
        self.branch = self.branch.model_copy(update={"head": head})
        self.change = f"commit {head or 'none'} appeared on {self.branch.branch}"

    def take_council(self, result: DeliberationResult) -> None:
        assert result.winner is not None
        self.councils[self.state] = Council(
            task_id=result.task_id,
            winner_id=result.winner_id,
            proposal=result.winner,
            score=result.score,
        )
        self.decisions += result.decisions
        self.change = f"{result.task_id} was decided"

    def approve_guards(self, transition: Transition, actor: str, role: str) -> bool:
        """Pass the human guards of `role`; return True if none is left to pass."""
        human = {
            g.name: g.role for g in self.machine.guards if g.role and g.name in transition.guards
        }
        passed = {approval.guard for approval in self.approvals}
        self.approvals += [
            Approval(guard=guard, actor=actor, role=role)
            for guard, needed in human.items()
            if needed == role and guard not in passed
        ]
        return set(human) <= {approval.guard for approval in self.approvals}

    def add_line(self, line: TimelineEntry) -> None:
        """Append to the timeline, which keeps its newest lines."""
        self.timeline.append(line)
        del self.timeline[:-LINES_KEPT]

    # --- decisions and milestones from outside --------------------------------------------------

    def take_decisions(self, decisions: Iterable[DecisionAdded], child_runs: bool) -> None:
        """Add new decisions, corrections and withdrawals for the running child and later ones."""
        known = {decision.decision_id: decision for decision in self.told}
        news = [each for each in decisions if each != known.get(each.decision_id)]
        self.told = decisions_with(self.told, news)
        if child_runs:
            changed = {decision.decision_id for decision in news}
            complete = [each for each in self.told if each.decision_id in changed]
            self.unsent_decisions = decisions_with(self.unsent_decisions, complete)
        self.told = holding(self.told)

    @property
    def has_unsent(self) -> bool:
        return bool(self.unsent_decisions or self.unsent_milestones)

    def sent(self, decisions: list[DecisionAdded], milestones: list[MilestoneReached]) -> None:
        """Note what the child has been sent; versions that came meanwhile are still unsent."""
        self.unsent_decisions = [each for each in self.unsent_decisions if each not in decisions]
        self.unsent_milestones = [each for each in self.unsent_milestones if each not in milestones]

    def take_milestones(
        self, milestones: Iterable[MilestoneReached], at: str, child_runs: bool
    ) -> None:
        """Add each milestone from outside once, to the timeline and for the running child."""
        known = set(self.heard)
        for milestone in milestones:
            if milestone.milestone_id in known:
                continue
            known.add(milestone.milestone_id)
            self.heard = [*self.heard, milestone.milestone_id][-MILESTONES_KNOWN:]
            text = milestone.description[:300]
            self.add_line(TimelineEntry(at=at, event=milestone.event_type, text=text))
            if child_runs:
                self.unsent_milestones = milestones_with(self.unsent_milestones, [milestone])

    # --- usage ----------------------------------------------------------------------------------

    @property
    def tokens_used(self) -> int:
        return sum(
            line.tokens_in + line.tokens_out for lines in self.usage.values() for line in lines
        )

    @property
    def within_budget(self) -> bool:
        return self.token_budget is None or self.tokens_used < self.token_budget

    def used(self, run: str, calls: Iterable[CallUsage], visit: int = 0, phase: str = "") -> None:
        """Store what one run of a deliberation has used so far; a later call replaces it.

        Args:
            run: the deliberation.
            calls: all of its calls so far.
            visit: the visit that it worked for; 0: the current one.
            phase: the state of that visit; empty: the current one.
        """
        self.usage[f"{visit or self.visit}/{run}"] = summed(phase or self.state, calls)

    def keep_usage(self) -> None:
        """Keep the usage of a failed try: the next try stores its own under the same names."""
        runs = [run for run in self.usage if run.startswith(f"{self.visit}/")]
        lines = [line for run in runs for line in self.usage.pop(run)]
        self.usage[f"{self.visit}/earlier tries"] = merged(lines)

    def usage_lines(self) -> list[UsageLine]:
        """Return calls, tokens and seconds by phase, role and model."""
        return merged(line for lines in self.usage.values() for line in lines)

    # --- views ----------------------------------------------------------------------------------

    def view(self) -> StoryView:
        open_gates = self.open_gates()
        gate = next(iter(open_gates), "")
        return StoryView(
            story_id=self.story_id,
            title=self.text.title,
            state=self.state,
            pending_gate=gate,
            gate_role=open_gates.get(gate, ""),
            open_gates=open_gates,
            revision=self.revision if gate and gate != BUDGET_GATE else "",
            rigor=self.input.rigor,
            dor_score=self.readiness.total if self.readiness else 0,
            findings=self.readiness.findings if self.readiness else [],
            plan_id=self.plan.plan_id if self.plan else "",
            report=self.score,
            working_on=self.working_on or self.work_failed or self.held,
            child=self.child,
            token_budget=self.token_budget,
            tokens_used=self.tokens_used,
            cancelled=self.cancelled,
            branch=self.branch_view(),
            acceptance=self.acceptance,
        )

    def branch_view(self) -> BranchView | None:
        if self.branch is None:
            return None
        return BranchView(
            repository=self.branch.repository.key,
            **self.branch.model_dump(include={"branch", "base", "head", "unmatched"}),
            base_branch=self.branch.repository.base,
            **_base_seen(self.branch.seen),
        )

    def open_gates(self) -> dict[str, str]:
        """Return every open gate and the role that opens it.

        The budget gate comes first, because no wave passes it.
        """
        budget = {BUDGET_GATE: BUDGET_ROLE} if self.budget_gate else {}
        return budget | ({self.gate: self.next_role(self.gate)} if self.gate else {})

    def approved_as(self, role: str) -> str:
        """Return who has approved what the gate shows in this role; empty if no one has."""
        return next((each.actor for each in self.approvals if each.role == role), "")

    def next_role(self, gate: str) -> str:
        """Return the role whose guard of the gate has not been passed yet."""
        passed = {approval.role for approval in self.approvals}
        roles = fsm.gate_roles(self.machine, gate)
        return next((role for role in roles if role not in passed), roles[0])


def _shown_report(report: WorkspaceReport | None) -> dict[str, Any] | None:
    """Return what a gate shows of a report; later fields change no revision while empty."""
    if report is None:
        return None
    hidden = {"actor", "proof"}
    hidden |= {name for name in ("measured_by", "notes") if not getattr(report, name)}
    return report.model_dump(exclude=hidden)


def _base_seen(seen: BaseLook | None) -> dict[str, Any]:
    if seen is None:
        return {}
    return {
        "base_now": seen.commit,
        "base_commits": seen.commits,
        "base_unknown": seen.unknown,
    }
