"""The waves of a council that works in a repository: implementations, and measured commits.

DeliberationWorkflow runs these instead of the calls that ask for a text. An author's work is a
child, an ImplementationWorkflow; a critic reads its diff and what the fleet measured of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from pydantic import ValidationError
from temporalio import workflow
from temporalio.exceptions import ApplicationError, FailureError

from workflows.implementation import TASK_TIMEOUT, ImplementationWorkflow, summary
from workflows.stubs import READ_CONFIG, PlanningStub, WorkspaceStub, measuring

with workflow.unsafe.imports_passed_through():
    from workflows.models.agents import CallUsage, Decision
    from workflows.models.changes import MeasuredChange, MeasureInput
    from workflows.models.context import (
        DecisionAdded,
        DecisionsAdded,
        MilestoneReached,
        MilestonesAdded,
    )
    from workflows.models.deliberation import Check, RankedProposal, WaveRequest
    from workflows.models.ids import implementation_workflow_id
    from workflows.models.implementation import (
        ImplementationInput,
        ImplementationResult,
        WorkLimits,
    )
    from workflows.models.process import RigorLevel
    from workflows.models.report import ReportScore
    from workflows.models.workspace import RepositoryWork
    from workflows.rules import changes, ranking, rigor

if TYPE_CHECKING:
    from workflows.deliberation import DeliberationWorkflow, Participant

News = tuple[list[DecisionAdded], list[MilestoneReached]]

SHARE_OF_TIME = 0.5
"""Of the time that a deliberation has left, for each wave of implementations."""

LEAST_SECONDS = 1.0


class Work:
    """An agent's work so far: its commit, and what the fleet measured of it."""

    def __init__(self, result: ImplementationResult, before: Work | None) -> None:
        self.commit = result.commit
        self.summary = result.summary or result.error or f"ended by {result.ended_by}"
        self.decisions: list[Decision] = result.decisions
        self.steps: int = result.steps + (before.steps if before else 0)
        self.measured: MeasuredChange | None = None
        self.scored: ReportScore | None = None
        self.checks: list[Check] = []
        self.draft = ""
        """The commit before, in a line, if this is another one."""
        if before and before.commit != self.commit:
            self.draft = f"Commit {before.commit}: {before.summary}"
        elif before:
            self.measured = before.measured


class CouncilChanges:
    """What a deliberation does in a repository, agent by agent."""

    def __init__(self, council: DeliberationWorkflow, work: RepositoryWork) -> None:
        self.council = council
        self.work = work
        self.level: RigorLevel | None = work.level
        self.done: dict[str, Work] = {}
        self.spent: dict[str, list[CallUsage]] = {}
        """Workflow id of an implementation that runs -> the calls that it has reported."""
        self.seconds_of_wave: list[float] = []

    @property
    def running_usage(self) -> list[CallUsage]:
        """The calls of the implementations that run, as far as they are known."""
        return [call for calls in self.spent.values() for call in calls]

    # --- propose and revise ---------------------------------------------------------------------

    async def wave(self, act: str, ask: Callable[[Participant], Awaitable[None]]) -> None:
        """Let every agent work at once; a wait for a token budget takes no time of the council."""
        council, self.seconds_of_wave = self.council, [0.0]
        waits_for_budget = council.input.ask_for_budget
        await council.all_at_once(act, ask, timed=not waits_for_budget)
        if waits_for_budget:
            council.time.spent += timedelta(seconds=max(self.seconds_of_wave))

    async def propose(self, seat: Participant) -> None:
        """Let an agent work from the base."""
        await self.implement(seat, [])

    async def revise(self, seat: Participant) -> None:
        """Let an author continue from its commit, unless its critic failed."""
        if seat.critiques:
            found = self.done[seat.agent.agent_id].checks
            await self.implement(seat, changes.feedback(seat.critiques, found))

    async def implement(self, seat: Participant, feedback: list[str]) -> None:
        """Run an agent's implementation, from its last commit on."""
        agent_id = seat.agent.agent_id
        before = self.done.get(agent_id)
        result = await self.counted(self.request(seat, before, feedback))
        work = self.done[agent_id] = Work(result, before)
        usage = CallUsage(
            act="revise" if before else "propose",
            agent_id=agent_id,
            role=seat.agent.role,
            model=result.model,
            prompt_hash=result.prompt_hash,
        )
        seat.continues(usage, work.draft)

    async def counted(self, request: ImplementationInput) -> ImplementationResult:
        """Run an implementation; count its calls once, also if it fails."""
        council, task = self.council, request.task
        workflow_id = implementation_workflow_id(task.task_id, request.agent.agent_id)
        try:
            result = await self.child_result(request, workflow_id)
        except FailureError as error:
            council.usage += calls_of(error) or self.spent.get(workflow_id, [])
            raise
        finally:
            self.spent.pop(workflow_id, None)
        council.usage += result.usage
        self.seconds_of_wave.append(result.duration_ms / 1000)
        return result

    def request(
        self, seat: Participant, before: Work | None, feedback: list[str]
    ) -> ImplementationInput:
        """Return the input of an agent's work."""
        council, work = self.council, self.work
        return ImplementationInput(
            repository=work.repository,
            base=work.base,
            head=before.commit if before else work.base,
            task=council.task.model_copy(update={"story_id": work.story_id}),
            agent=seat.agent,
            paths=work.paths,
            limits=WorkLimits(steps=work.steps, seconds=self.seconds()),
            feedback=feedback,
            decisions=council.decisions,
            pack=council.pack,
            plan_id=council.input.plan_id,
            # The council asks its story, so that the story counts each call once.
            outbox_workflow_id=workflow.info().workflow_id,
            ask_for_budget=council.input.ask_for_budget,
            first_step=before.steps + 1 if before else 1,
            began=workflow.info().start_time,
            goal=work.goal,
        )

    def seconds(self) -> float:
        """Return the time that a wave of implementations gets; it ends with the diffs so far."""
        return max(self.council.time.left.total_seconds() * SHARE_OF_TIME, LEAST_SECONDS)

    async def child_result(
        self, request: ImplementationInput, workflow_id: str
    ) -> ImplementationResult:
        """Run an implementation to its end, and pass news on to it."""
        handle = await workflow.start_child_workflow(
            ImplementationWorkflow.run,
            request,
            id=workflow_id,
            parent_close_policy=workflow.ParentClosePolicy.REQUEST_CANCEL,
            task_timeout=TASK_TIMEOUT,
            static_summary=summary(request),
        )
        news = asyncio.create_task(self.pass_on_news(handle, request))
        try:
            result: ImplementationResult = await handle
        finally:
            news.cancel()
        return result

    async def pass_on_news(
        self,
        handle: workflow.ChildWorkflowHandle[ImplementationWorkflow, ImplementationResult],
        request: ImplementationInput,
    ) -> None:
        """Signal decisions and milestones that arrive while an agent works."""
        sent: News = (list(request.decisions), [])
        with suppress(FailureError):  # It has ended meanwhile.
            while True:
                await workflow.wait_condition(partial(self.has_other_news, sent))
                before, sent = sent, self.news()
                if sent[0] != before[0]:
                    added = DecisionsAdded(decisions=sent[0])
                    await handle.signal(ImplementationWorkflow.add_decisions, added)
                if sent[1] != before[1]:
                    reached = MilestonesAdded(milestones=sent[1])
                    await handle.signal(ImplementationWorkflow.add_milestones, reached)

    def news(self) -> News:
        return list(self.council.decisions), list(self.council.milestones)

    def has_other_news(self, sent: News) -> bool:
        return self.news() != sent

    async def grant_step(self, request: WaveRequest) -> None:
        """Ask the story for a step of an implementation, and pass its grant on."""
        self.spent[request.workflow_id] = request.usage
        await self.council.granted_by_story(f"{request.workflow_id}/{request.wave}")
        implementation = workflow.get_external_workflow_handle(request.workflow_id)
        with suppress(FailureError):  # It has ended meanwhile.
            await implementation.signal(ImplementationWorkflow.grant_wave, request.wave)

    # --- measure --------------------------------------------------------------------------------

    async def load_level(self) -> None:
        """Load the values of the rigor level, unless the input has them."""
        if self.level is None:
            process = await workflow.execute_activity_method(
                PlanningStub.load_process,
                self.work.rigor,
                **(READ_CONFIG | {"summary": f"rigor {self.work.rigor}"}),
            )
            self.level = process.rigor

    async def measure(self, seat: Participant) -> None:
        """Let the fleet check and measure an agent's commit, once."""
        assert self.level
        work, agent_id = self.done[seat.agent.agent_id], seat.agent.agent_id
        if work.measured is None:
            work.measured = await workflow.execute_activity_method(
                WorkspaceStub.measure_change,
                MeasureInput(
                    repository=self.work.repository,
                    base=self.work.base,
                    commit=work.commit,
                    paths=self.work.paths,
                    task=self.council.input.description,
                ),
                **(
                    measuring(self.work.repository.limits)
                    | {"summary": f"measure {agent_id}", "priority": self.council.priority()}
                ),
            )
        work.scored = rigor.score_report(self.level, self.work.rigor, work.measured.report)
        work.checks = changes.checks(work.measured, work.scored)
        seat.proposal = changes.proposal(work.measured, work.summary, work.decisions)

    async def check(self, seat: Participant) -> None:
        """Measure an agent's last commit, and compare it by that."""
        await self.measure(seat)
        work = self.done[seat.agent.agent_id]
        assert work.measured
        assert work.scored
        seat.checks = work.checks
        seat.candidate = changes.candidate(
            seat.agent.agent_id,
            work.checks,
            work.scored,
            work.measured.change,
            ranking.open_points(seat.critiques),
        )

    def with_changes(self, ranked: Sequence[RankedProposal]) -> list[RankedProposal]:
        """Add to each proposal its change, what was measured of it, and the score of that."""
        return [
            each.model_copy(
                update={
                    "change": measured.change,
                    "measurement": measured.measurement,
                    "scored": self.done[each.agent_id].scored,
                }
            )
            for each in ranked
            if (measured := self.done[each.agent_id].measured)
        ]


def calls_of(error: FailureError) -> list[CallUsage]:
    """Return the calls of a failed implementation, which its failure carries."""
    match error.__cause__:
        case ApplicationError(details=[_, *_] as details):
            with suppress(ValidationError):  # The details of something else.
                return [CallUsage.model_validate(each) for each in details]
    return []
