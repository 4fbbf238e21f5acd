"""DeliberationWorkflow: a council writes, criticises and revises proposals, which are then ranked.

context pack -> propose -> per round: criticise in a ring, revise -> check -> score and rank ->
select -> record -> publish. Each step asks all agents at once: 1 + 2R waves for R rounds. In a
repository, the proposals are commits, which the fleet measures (workflows/council_changes.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from typing import Any, TypeVar

from temporalio import workflow
from temporalio.common import Priority
from temporalio.exceptions import (
    ActivityError,
    ApplicationError,
    ChildWorkflowError,
    FailureError,
    is_cancelled_exception,
)

from workflows.actors import decisions_of_people
from workflows.council_changes import CouncilChanges
from workflows.council_checks import CouncilChecks
from workflows.council_results import CouncilResults
from workflows.execution import cause_of, require_id, stopped, type_of
from workflows.gathering import FEWER_STEPS, gather
from workflows.kept_packs import is_pack_missing, kept_pack
from workflows.models.errors import ErrorType, application_error
from workflows.models.outbox import OutboxState
from workflows.outbox import Outbox, record_deliberation
from workflows.search_attributes import STORY_ROLE
from workflows.stubs import AgentStub, agent_call, fair_priority
from workflows.time_limit import TimeLimit

with workflow.unsafe.imports_passed_through():
    from workflows.call_costs import failed_call
    from workflows.current_details import deliberation_details
    from workflows.early_ends import EARLY_END
    from workflows.models.agents import (
        Agent,
        CallUsage,
        Council,
        CouncilQuery,
        CriticiseInput,
        Critique,
        CritiqueAnswer,
        JudgeInput,
        Proposal,
        ProposalAnswer,
        ProposeInput,
        ReviseInput,
        Task,
        Verdict,
    )
    from workflows.models.context import (
        ContextPack,
        DecisionAdded,
        DecisionsAdded,
        MilestoneReached,
        MilestonesAdded,
        PackQuery,
    )
    from workflows.models.deliberation import (
        Check,
        DeliberationInput,
        DeliberationResult,
        FailedAgent,
        Progress,
        WaveRequest,
    )
    from workflows.models.events import (
        DeliberationFailed,
        DeliberationStarted,
        RequestRefused,
        RoundCompleted,
    )
    from workflows.models.ids import (
        called_deliberation_workflow_id,
        deliberation_workflow_id,
    )
    from workflows.rules import changes, ranking
    from workflows.rules.news import decisions_with, milestones_with

REQUEST_WAVE = "request_wave"

BARRED = "every proposal is barred"
"""The start of the cause of a deliberation without a winner."""

FEWER_EVENTS = "council-with-one-timer"
"""The patch of deliberations with one timer, and those of no story with one announcement."""

STARTS_ANNOUNCED = "starts-announced-by-the-parent"
"""The patch of stories and plans that announce the start of their deliberations."""

Answer = TypeVar("Answer")


class Participant:
    """An agent of the council, its proposal, and the critiques and checks of that proposal."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.proposal = Proposal(approach="", content="")
        self.drafts: list[str] = []
        self.critiques: list[Critique] = []
        self.critics: list[str] = []
        self.checks: list[Check] = []
        self.candidate: ranking.Candidate | None = None
        self.usage = CallUsage(act="", agent_id=agent.agent_id, role=agent.role, model="")
        self.created_at_ms = 0

    def proposes(self, answer: ProposalAnswer) -> None:
        if self.proposal.content:
            self.drafts.append(self.proposal.content)
        self.proposal = answer.proposal
        self.continues(answer.usage)

    def continues(self, usage: CallUsage, draft: str = "") -> None:
        """Note who wrote the proposal, and when. `draft`: the one before, unless it is noted."""
        if draft:
            self.drafts.append(draft)
        self.usage = usage
        self.created_at_ms = int(workflow.now().timestamp() * 1000)


WAITING_TIMEOUT_S = 3600.0
"""Time limit of a deliberation that may wait, for unavailable agents or behind others of its plan.

A story's process and a plan's input can set another one.
"""


@workflow.defn
class DeliberationWorkflow:
    """One task before one council; ends with a winner and its provenance, or with every cause."""

    @workflow.init
    def __init__(self, input: DeliberationInput) -> None:
        self.input = input
        self.outbox = Outbox(
            OutboxState(), input.story_id or "", publish_via=input.outbox_workflow_id
        )
        self.seats: list[Participant] = []
        self.failed: list[FailedAgent] = []
        self.usage: list[CallUsage] = []
        self.decisions: list[DecisionAdded] = list(input.decisions)
        self.milestones: list[MilestoneReached] = []
        self.granted: set[str] = set()
        self.fewer_events = False
        self.pack = ContextPack()
        self.wave = 0
        self.wave_name = "gathering"
        self.round = 0
        self.answered: list[str] = []
        self.status = "generating"
        self.time = TimeLimit(timedelta(seconds=input.timeout))
        self.outcome: DeliberationResult | None = None
        self.checks = CouncilChecks(self)
        self.results = CouncilResults(self)
        self.changes = CouncilChanges(self, input.work) if input.work else None

    @workflow.run
    async def run(self, input: DeliberationInput) -> DeliberationResult:
        """Deliberate on the task.

        Raises:
            ApplicationError: QuorumLost, DeliberationTimeout or AllBarred.
        """
        require_id(
            deliberation_workflow_id(input.task_id), called_deliberation_workflow_id(input.task_id)
        )
        workflow.upsert_search_attributes([STORY_ROLE.value_set(input.role)])
        self.fewer_events = self.time.one_timer = workflow.patched(FEWER_EVENTS)
        self.outbox.at_once = self.fewer_events
        self.outbox.start()
        self.announce_start()
        self.show()
        try:
            await self.deliberate()
        except (asyncio.CancelledError, FailureError) as error:
            if is_cancelled_exception(error):
                await self.announce_failure("cancelled", ErrorType.CANCELLED)
            else:
                await self.announce_failure(cause_of(error), type_of(error))
            raise
        assert self.outcome is not None
        await self.outbox.drained()
        return self.outcome

    # --- signals and queries --------------------------------------------------------------------

    @workflow.signal
    def add_decision(self, decision: DecisionAdded) -> None:
        """Receive a decision made meanwhile; the agents get it in their next wave."""
        self.take_decisions([decision])

    @workflow.signal
    def add_decisions(self, request: DecisionsAdded) -> None:
        """Receive decisions that were made, corrected or withdrawn meanwhile."""
        self.take_decisions(request.decisions)

    def take_decisions(self, decisions: list[DecisionAdded]) -> None:
        """Pass decisions on to the agents, but none that names a policy."""
        taken = decisions_of_people(decisions, self.outbox.append)
        self.decisions = decisions_with(self.decisions, taken)

    @workflow.signal
    def add_milestone(self, milestone: MilestoneReached) -> None:
        """Receive a milestone from outside; the agents get it in their next wave."""
        self.milestones = milestones_with(self.milestones, [milestone])

    @workflow.signal
    def add_milestones(self, request: MilestonesAdded) -> None:
        """Receive milestones from outside; the agents get them in their next wave."""
        self.milestones = milestones_with(self.milestones, request.milestones)

    @workflow.signal
    def grant_wave(self, wave: str) -> None:
        """Receive the story's permission to start a wave, if it has a token budget."""
        self.granted.add(wave)

    @workflow.signal
    async def request_wave(self, request: WaveRequest) -> None:
        """Grant a step to an agent that works in a repository, when the story grants it."""
        if self.changes:
            await self.changes.grant_step(request)

    @workflow.signal
    def outlive(self) -> None:
        """Ignore cancellations from now on: the story continues as new (workflows/child.py)."""

    @workflow.signal
    def stop(self) -> None:
        """End as if cancelled: workers/outliving.py turns this signal into a cancellation."""

    @workflow.signal
    def not_understood(self, name: str, reason: str) -> None:
        """Record an unknown or malformed signal (workers/payloads.py)."""
        if workflow.patched("signals-not-understood"):
            self.outbox.append(RequestRefused(request=name, reason=reason))

    @workflow.query
    def progress(self) -> Progress:
        """Return the current wave, who has answered in it and who has failed."""
        answered = sorted(self.answered)
        return Progress(
            status=self.status,
            wave=self.wave_name,
            round=self.round,
            answered=answered,
            waiting=[s.agent.agent_id for s in self.seats if s.agent.agent_id not in answered],
            failed=self.failed,
            tokens=sum(call.tokens for call in self.all_usage()),
        )

    @workflow.query
    def result(self) -> DeliberationResult | None:
        """Return the result; None while the deliberation runs."""
        return self.outcome

    @workflow.query(name=EARLY_END)
    def early_end(self) -> list[DeliberationFailed]:
        """Return the event that ends the deliberation if its workflow was terminated."""
        if self.status in ("complete", "failed"):
            return []
        end = self.results.failed_event("", "")
        return [end.model_copy(update={"story_id": self.input.story_id or ""})]

    # --- the steps, in order --------------------------------------------------------------------

    def announce_start(self) -> None:
        task = self.input
        if not task.announced:
            self.outbox.append(DeliberationStarted(task_id=task.task_id, role=task.role))

    async def deliberate(self) -> None:
        council = await self.gather()
        await self.propose()
        for number in range(1, self.input.rounds + 1):
            self.round = number
            self.status = "reviewing"
            await self.criticise()
            await self.revise()
            self.announce_round()
        self.status = "scoring"
        self.hold_events()
        await self.check()
        await self.select(council)

    async def gather(self) -> Council:
        """Load the council and the context pack from the graph."""
        task = self.input
        query = CouncilQuery(role=task.role, size=task.agents)
        found = await gather(query, self.pack_query(), at_once=self.fewer_events)
        council, self.pack = found.council, found.pack
        if self.changes:
            await self.changes.load_level()
        self.seats = [Participant(agent) for agent in council.agents]
        self.size = len(self.seats)
        return council

    def pack_query(self) -> PackQuery:
        task = self.input
        return PackQuery(
            story_id=task.story_id or "",
            role=task.role,
            phase=task.phase,
            subtask_id=task.task_id if task.plan_id else "",
            # A story's workflow records its start before it starts a council.
            known=bool(task.outbox_workflow_id),
            background=task.background,
        )

    async def propose(self) -> None:
        await self.begin_wave("propose")
        if self.changes:
            await self.changes.wave("propose", self.changes.propose)
            return

        async def ask(seat: Participant) -> None:
            answer = await self.call(
                AgentStub.propose, ProposeInput(**self.call_fields(seat.agent)), seat.agent
            )
            self.usage.append(answer.usage)
            seat.proposes(answer)

        await self.all_at_once("propose", ask)

    async def criticise(self) -> None:
        """Ask agent i to criticise the proposal of agent i+1: a ring, so that each is read once."""
        if self.changes:
            self.name_wave("measure")
            await self.all_at_once("measure", self.changes.measure)
        await self.begin_wave("criticise")
        authors = {
            seat.agent.agent_id: self.seats[(i + 1) % len(self.seats)]
            for i, seat in enumerate(self.seats)
        }
        answers: dict[str, CritiqueAnswer] = {}

        async def ask(seat: Participant) -> None:
            author = authors[seat.agent.agent_id]
            answer = await self.call(
                AgentStub.criticise,
                CriticiseInput(
                    **self.call_fields(seat.agent),
                    author_id=author.agent.agent_id,
                    proposal=author.proposal,
                ),
                seat.agent,
            )
            self.usage.append(answer.usage)
            answers[seat.agent.agent_id] = answer

        for seat in self.seats:
            seat.critiques, seat.critics = [], []
        await self.all_at_once("criticise", ask)
        for critic_id, author in authors.items():
            if critic_id in answers:
                author.critiques.append(answers[critic_id].critique)
                author.critics.append(critic_id)

    async def revise(self) -> None:
        """Ask each author for a revision, except those whose critic failed."""
        await self.begin_wave("revise")
        if self.changes:
            await self.changes.wave("revise", self.changes.revise)
            return

        async def ask(seat: Participant) -> None:
            if not seat.critiques:
                return
            answer = await self.call(
                AgentStub.revise,
                ReviseInput(
                    **self.call_fields(seat.agent),
                    proposal=seat.proposal,
                    critiques=seat.critiques,
                ),
                seat.agent,
            )
            self.usage.append(answer.usage)
            if not answer.problem:
                seat.proposes(answer)

        await self.all_at_once("revise", ask)

    def announce_round(self) -> None:
        task = self.input
        self.outbox.append(RoundCompleted(task_id=task.task_id, role=task.role, round=self.round))

    def hold_events(self) -> None:
        """Announce the last round with the result, unless that takes long."""
        if self.changes:
            return
        if self.fewer_events:
            self.outbox.paused = True
        elif self.outbox.publish_via:
            self.outbox.paused = workflow.patched(FEWER_STEPS)

    async def check(self) -> None:
        """Run policy, lint and dry run on every proposal at once; of changes, policy and tests."""
        self.name_wave("check")
        if self.changes:
            await self.all_at_once("check", self.changes.check)
            return

        together = asyncio.create_task(self.checks.together())

        async def ask(seat: Participant) -> None:
            agent_id = seat.agent.agent_id
            report = (await together).get(agent_id) or await self.checks.alone(seat)
            seat.checks = report.checks
            unchecked = ranking.unchecked(report) and workflow.patched("unchecked-after-verified")
            seat.candidate = ranking.Candidate(
                agent_id=agent_id,
                score=ranking.score(report),
                barred=ranking.barred(report),
                open_points=ranking.open_points(seat.critiques),
                verified=ranking.verified(report),
                unchecked=unchecked,
            )

        await self.all_at_once("check", ask)

    async def select(self, council: Council) -> None:
        """Rank, judge a near tie, record with provenance, publish."""
        candidates = [seat.candidate for seat in self.seats if seat.candidate]
        tied = changes.tied(candidates) if self.changes else ranking.near_tie(candidates)
        if not tied:
            reason = f"{BARRED}: {self.results.findings()}"
            raise application_error(ErrorType.ALL_BARRED, reason, self.results.failed(reason))
        judged, winner_id = "", tied[0]
        if len(tied) > 1:
            verdict = await self.judge(council, tied)
            winner_id, judged = verdict.winner_id, verdict.reason
        rank = changes.rank if self.changes else ranking.rank
        outcome = self.results.completed(rank(candidates, winner_id), judged)
        if self.fewer_events and not self.outbox.publish_via:
            self.outbox.state.deliberation = self.results.record_of(outcome)
        else:
            # Recorded before it is published: the next agent starts from these decisions.
            await record_deliberation(self.results.record_of(outcome))
        self.announce_result(outcome)
        self.outcome = outcome
        self.status = "complete"
        self.name_wave("done")

    async def judge(self, council: Council, tied: list[str]) -> Verdict:
        """Return an architect's choice with its reason; without an architect, apply the rule."""
        seats = {seat.agent.agent_id: seat for seat in self.seats}
        by_rule = ranking.fewest_open_points(
            [candidate for s in self.seats if (candidate := s.candidate)], tied
        )
        rule = Verdict(winner_id=by_rule, reason="near tie: fewest open critique points, then id")
        if council.judge is None or not self.input.judged:
            return rule
        judge = council.judge
        if self.fewer_events:
            self.outbox.paused = not self.input.ask_for_budget
        elif not self.input.announced:
            self.outbox.paused = False
        await self.begin_wave("judge")
        try:
            answer = await self.within_time(
                self.call(
                    AgentStub.judge,
                    JudgeInput(
                        **self.call_fields(judge),
                        contenders=[
                            ranking.contender(candidate, seats[agent_id].proposal)
                            for agent_id in tied
                            if (candidate := seats[agent_id].candidate)
                        ],
                    ),
                    judge,
                )
            )
        except ActivityError as error:
            self.failed.append(
                FailedAgent(agent_id=judge.agent_id, act="judge", cause=cause_of(error))
            )
            return rule.model_copy(
                update={"reason": f"{rule.reason} (the judge failed: {cause_of(error)})"[:1000]}
            )
        self.usage.append(answer.usage)
        if answer.verdict.winner_id not in tied:
            return rule
        return answer.verdict.model_copy(
            update={"reason": f"{judge.agent_id}: {answer.verdict.reason}"}
        )

    def announce_result(self, outcome: DeliberationResult) -> None:
        for event in self.results.events_of(outcome):
            self.outbox.append(event)
        self.outbox.paused = False

    async def announce_failure(self, cause: str, error_type: str) -> None:
        self.status = "failed"
        self.name_wave(cause[:200])
        self.outbox.append(self.results.failed_event(cause, error_type))
        self.outbox.paused = False
        await self.outbox.closed()

    # --- a wave ---------------------------------------------------------------------------------

    async def begin_wave(self, name: str) -> None:
        """Start the next wave; if the story has a token budget, wait until it grants the wave."""
        self.wave += 1
        self.name_wave(name)
        if not self.input.ask_for_budget:
            return
        await self.granted_by_story(f"{self.outbox.run}/{self.wave}")

    async def granted_by_story(self, wave: str) -> None:
        """Ask the story for a wave, and wait until it grants it."""
        story = workflow.get_external_workflow_handle(self.input.outbox_workflow_id)
        await story.signal(
            REQUEST_WAVE,
            WaveRequest(
                workflow_id=workflow.info().workflow_id,
                wave=wave,
                usage=self.all_usage(),
                visit=self.input.visit,
                phase=self.input.phase,
            ),
        )
        await workflow.wait_condition(lambda: wave in self.granted)

    def all_usage(self) -> list[CallUsage]:
        """Return all calls so far, with those of implementations that run."""
        return [*self.usage, *(self.changes.running_usage if self.changes else [])]

    async def all_at_once(
        self,
        act: str,
        ask: Callable[[Participant], Awaitable[None]],
        *,
        timed: bool = True,
    ) -> None:
        """Ask every agent at once and leave out those that failed for good.

        Args:
            act: what they are asked to do.
            ask: asks one of them.
            timed: whether the deliberation's time limit ends it.

        Raises:
            ApplicationError: QuorumLost, if not more than half of the agents are left.
        """

        async def ask_one(seat: Participant) -> None:
            await ask(seat)
            self.answered.append(seat.agent.agent_id)
            self.show()

        async def ask_all() -> list[BaseException | None]:
            return await asyncio.gather(*map(ask_one, self.seats), return_exceptions=True)

        outcomes = await (self.within_time(ask_all()) if timed else ask_all())
        staying = []
        for seat, outcome in zip(self.seats, outcomes, strict=True):
            if isinstance(outcome, ActivityError | ChildWorkflowError):
                self.failed.append(
                    FailedAgent(agent_id=seat.agent.agent_id, act=act, cause=cause_of(outcome))
                )
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                staying.append(seat)
        self.seats = staying
        if 2 * len(staying) <= self.size:
            causes = "; ".join(f"{f.agent_id} ({f.act}): {f.cause}" for f in self.failed)
            raise application_error(
                ErrorType.QUORUM_LOST,
                f"{len(staying)} of {self.size} agents left, a quorum is more than half. {causes}",
                self.results.failed(causes),
            )

    async def within_time(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Limit the total time of all waves to `timeout`; waiting for a person does not count."""
        task = asyncio.create_task(work)
        named = "the deliberation" if self.time.one_timer else self.wave_name
        try:
            await self.time.wait(task, f"{named} is given up then")
        except asyncio.CancelledError:
            await stopped(task)
            raise
        except TimeoutError:
            await stopped(task)
            waiting = ", ".join(self.progress().waiting)
            cause = f"not done after {self.input.timeout:g} s, in {self.wave_name}: {waiting}"
            raise application_error(
                ErrorType.DELIBERATION_TIMEOUT, cause, self.results.failed(cause)
            ) from None
        return task.result()

    async def call(
        self,
        act: Callable[[Any, Any], Awaitable[Answer]],
        request: Any,
        agent: Agent,
    ) -> Answer:
        summary = f"{agent.agent_id} {self.wave_name}s"
        options = agent_call(agent) | {"summary": summary, "priority": self.priority()}
        try:
            return await workflow.execute_activity_method(act, request, **options)
        except ActivityError as error:
            self.usage += failed_call(error)
            if not is_pack_missing(error):
                raise
        self.pack = await kept_pack(self.pack_query())
        request = request.model_copy(update={"pack": self.pack})
        return await workflow.execute_activity_method(act, request, **options)

    @property
    def task(self) -> Task:
        """The task as the agents get it."""
        task = self.input
        return Task(
            task_id=task.task_id,
            story_id=task.story_id or "",
            role=task.role,
            phase=task.phase,
            description=task.description,
            subject=task.subject,
            rubric=task.rubric,
            requirements=task.requirements,
            feedback=task.feedback,
            actor=task.actor,
            attempt=task.attempt,
        )

    def call_fields(self, agent: Agent) -> dict[str, Any]:
        return {
            "task": self.task,
            "agent": agent,
            "pack": self.pack,
            "wave": self.wave,
            "late_decisions": list(self.decisions),
            "late_milestones": list(self.milestones),
        }

    def priority(self) -> Priority:
        """Return the priority of the calls of this story or caller.

        A caller of gRPC may name any story that has no workflow, so it counts as itself.
        """
        of = self.input.actor or self.input.story_id or self.input.task_id
        return fair_priority(of)

    # --- what people see ------------------------------------------------------------------------

    def name_wave(self, name: str) -> None:
        self.wave_name = name
        self.answered = []
        self.show()

    def show(self) -> None:
        workflow.set_current_details(
            deliberation_details(self.input, self.progress()) + self.outbox.details
        )


def failed_deliberation(error: BaseException) -> DeliberationResult | None:
    """Return the outcome of a failed child deliberation: its causes and the calls it paid for.

    None if the error contains no outcome.
    """
    cause = error.__cause__
    if isinstance(cause, ApplicationError) and cause.details:
        return DeliberationResult.model_validate(cause.details[0])
    return None
