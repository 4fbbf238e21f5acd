"""PlanWorkflow: runs a plan's DAG, each task as soon as its dependencies are done.

A failed task stops only the tasks that depend on it; the plan ends with a list of what was done and
what was not. Where its history gets long, the plan continues as new between two batches of tasks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from temporalio import workflow
from temporalio.exceptions import FailureError, is_cancelled_exception

from workflows.actors import decisions_of_people
from workflows.batches import continue_as_new, dispatchable, outgrown
from workflows.conflicts import revised
from workflows.deliberation import (
    STARTS_ANNOUNCED,
    WAITING_TIMEOUT_S,
    DeliberationWorkflow,
    failed_deliberation,
)
from workflows.derivation import derive_from_text, plan_derived, require_plan, tasks_created
from workflows.execution import cause_of, require_id
from workflows.models.errors import ErrorType, application_error
from workflows.outbox import Outbox
from workflows.story_branch import merged
from workflows.stubs import STORE, GraphStub

with workflow.unsafe.imports_passed_through():
    from workflows.current_details import plan_details
    from workflows.early_ends import EARLY_END, cut_off
    from workflows.models.agents import CallUsage, PlannedTask
    from workflows.models.branches import MergedChange
    from workflows.models.context import (
        DecisionAdded,
        DecisionsAdded,
        MilestoneReached,
        MilestonesAdded,
    )
    from workflows.models.deliberation import DeliberationInput, DeliberationResult
    from workflows.models.events import (
        DeliberationStarted,
        PlanFinished,
        RequestRefused,
        TaskCompleted,
        TaskDispatched,
        TaskFailed,
    )
    from workflows.models.ids import council_id, deliberation_workflow_id, plan_workflow_id
    from workflows.models.plan import (
        Plan,
        PlanInput,
        PlanProgress,
        PlanQuery,
        PlanResult,
        TaskOutcome,
    )
    from workflows.models.workspace import RepositoryWork
    from workflows.rules import dag
    from workflows.rules.conflicts import still_in_conflict
    from workflows.rules.news import decisions_with, holding

News = TypeVar("News", DecisionsAdded, MilestonesAdded, MilestoneReached)


@workflow.defn
class PlanWorkflow:
    """One plan, run to its end; started by a story, or by an approved plan from the bus."""

    @workflow.init
    def __init__(self, input: PlanInput) -> None:
        self.input = input
        carried = input.carried or PlanProgress()
        self.outbox = Outbox(carried.outbox, input.story_id, publish_via=input.outbox_workflow_id)
        self.tasks: list[PlannedTask] = []
        self.outcomes = {outcome.task_id: outcome for outcome in carried.outcomes}
        self.running: list[str] = []
        self.stopping = False
        self.decisions: list[DecisionAdded] = list(input.decisions)
        self.head = input.work.base if input.work else ""
        """The last commit of the story's branch, if the tasks change a repository."""
        self.merged = list(carried.merged)
        self.merging = asyncio.Lock()
        self.revised: dict[str, list[CallUsage]] = {}
        """Task -> the calls of its author's revision after a conflict."""
        self.outlives = carried.outlives
        self.finished = False

    @workflow.run
    async def run(self, input: PlanInput) -> PlanResult:
        """Run the plan; a cancellation stops its deliberations first."""
        require_id(plan_workflow_id(input.story_id, input.plan_id))
        if input.carried is not None and not workflow.info().continued_run_id:
            raise application_error(
                ErrorType.INVALID_INPUT, "carried: is set by continue-as-new only; remove it"
            )
        self.outbox.start()
        begun = False
        try:
            self.tasks = input.tasks if input.tasks is not None else await self.find_tasks()
            self.refuse_faults()
            self.show()
            begun = True
            await self.run_tasks()
        except (asyncio.CancelledError, FailureError) as error:
            if begun or workflow.patched("plans-that-cannot-begin-end"):
                self.finish("CANCELLED" if is_cancelled_exception(error) else "FAILED")
                await self.outbox.closed()
            raise
        result = self.result()
        self.finish(result.status)
        await self.outbox.drained()
        return result

    @workflow.signal
    async def add_decision(self, decision: DecisionAdded) -> None:
        """Receive a decision made meanwhile; running deliberations get it in their next wave."""
        await self.share(decisions_of_people([decision], self.outbox.append), [*self.running])

    @workflow.signal
    async def add_decisions(self, request: DecisionsAdded) -> None:
        """Receive decisions that were made, corrected or withdrawn meanwhile."""
        decisions = decisions_of_people(request.decisions, self.outbox.append)
        await self.share(decisions, [*self.running])

    @workflow.signal
    async def add_milestones(self, request: MilestonesAdded) -> None:
        """Receive milestones from outside; running deliberations get them in their next wave."""
        await self.forward([*self.running], DeliberationWorkflow.add_milestones, request)

    @workflow.signal
    async def add_milestone(self, milestone: MilestoneReached) -> None:
        """Receive a milestone from outside; running deliberations get it in their next wave."""
        await self.forward([*self.running], DeliberationWorkflow.add_milestone, milestone)

    @workflow.signal
    def outlive(self) -> None:
        """Ignore cancellations from now on: the story continues as new (workflows/child.py)."""
        self.outlives = True

    @workflow.signal
    def stop(self) -> None:
        """End as if cancelled: workers/outliving.py turns this signal into a cancellation."""

    @workflow.signal
    def not_understood(self, name: str, reason: str) -> None:
        """Record an unknown or malformed signal (workers/payloads.py)."""
        if workflow.patched("signals-not-understood"):
            self.outbox.append(RequestRefused(request=name, reason=reason))

    @workflow.query
    def plan(self) -> list[PlannedTask]:
        """Return the plan's tasks."""
        return self.tasks

    @workflow.query
    def progress(self) -> dict[str, str]:
        """Return for each task id: done, failed, not_run, running or waiting."""
        return {task.task_id: self.status(task.task_id) for task in self.tasks}

    @workflow.query(name=EARLY_END)
    def early_end(self) -> list[TaskFailed | PlanFinished]:
        """Return the events that end the plan if its workflow was terminated."""
        ends: list[TaskFailed | PlanFinished] = []
        if not self.finished:
            ends = [*self.unfinished(), self.end("CANCELLED")]
        return [end.model_copy(update={"story_id": self.input.story_id}) for end in ends]

    # --- the steps, in order --------------------------------------------------------------------

    async def find_tasks(self) -> list[PlannedTask]:
        """Load the tasks of a plan from the bus, or derive them from the story in the graph.

        If the graph has neither, each role that the approval names gets one task.
        """
        story_id, plan_id = self.input.story_id, self.input.plan_id
        stored = await workflow.execute_activity_method(
            GraphStub.load_plan,
            PlanQuery(story_id=story_id, plan_id=plan_id),
            **(STORE | {"summary": "the plan's tasks in the graph"}),
        )
        plan = Plan(plan_id=plan_id, story_id=story_id, version=1, tasks=stored.tasks)
        if not plan.tasks and stored.story is not None:
            plan, roles = await derive_from_text(self.input, stored.story)
            if workflow.patched("plan-from-the-bus-names-known-roles"):
                require_plan(plan, roles)
            self.outbox.append(plan_derived(plan))
        elif not plan.tasks and self.input.roles:
            tasks = dag.task_of_each_role(story_id, plan_id, self.input.roles)
            plan = plan.model_copy(update={"tasks": tasks})
            self.outbox.append(plan_derived(plan))
        if workflow.patched("announce-tasks-of-plans-from-the-bus"):
            for created in tasks_created(plan):
                self.outbox.append(created)
        return plan.tasks

    def refuse_faults(self) -> None:
        if not self.tasks:
            return  # NOTHING_TO_RUN
        try:
            dag.validate(self.tasks)
        except dag.InvalidPlan as error:
            raise application_error(ErrorType.INVALID_INPUT, f"tasks: {error}") from error

    async def run_tasks(self) -> None:
        """Dispatch tasks as they become ready, until nothing runs and nothing more can."""
        runs: dict[str, asyncio.Task[None]] = {}
        while True:
            ready = dag.ready(self.tasks, self.with_status("done"), [*runs, *self.outcomes])
            ends = bool(ready) and outgrown()
            for task in [] if ends else dispatchable(ready, len(runs), self.input.work):
                runs[task.task_id] = asyncio.create_task(self.run_task(task))
            self.running = sorted(runs)
            self.show()
            if ends and not runs:
                await continue_as_new(self)
            if not runs:
                break
            try:
                await workflow.wait(runs.values(), return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                self.stopping = True
                for run in runs.values():
                    run.cancel()
                await asyncio.gather(*runs.values(), return_exceptions=True)
                raise
            for task_id in [task_id for task_id, run in runs.items() if run.done()]:
                await runs.pop(task_id)
        for task in self.tasks:
            if task.task_id not in self.outcomes:
                self.settle(task, outcome_of(task, status="not_run"))

    async def run_task(self, task: PlannedTask) -> None:
        self.outbox.append(
            TaskDispatched(task_id=task.task_id, agent_id=council_id(task.role), role=task.role)
        )
        announced = workflow.patched(STARTS_ANNOUNCED)
        if announced:
            self.outbox.append(DeliberationStarted(task_id=task.task_id, role=task.role))
        try:
            result = await workflow.execute_child_workflow(
                DeliberationWorkflow.run,
                DeliberationInput(
                    task_id=task.task_id,
                    story_id=self.input.story_id,
                    role=task.role,
                    description=f"{task.title}\n\n{task.description}",
                    phase=self.input.phase,
                    feedback=self.input.feedback,
                    plan_id=self.input.plan_id,
                    timeout=self.input.task_timeout or WAITING_TIMEOUT_S,
                    outbox_workflow_id=self.input.outbox_workflow_id,
                    announced=announced,
                    ask_for_budget=self.input.ask_for_budget,
                    decisions=self.decisions,
                    work=self.work(),
                    attempt=self.input.attempt,
                    visit=self.input.visit,
                ),
                id=deliberation_workflow_id(task.task_id),
                parent_close_policy=workflow.ParentClosePolicy.REQUEST_CANCEL,
                static_summary=f"{task.role}: {task.title}"[:200],
            )
        except FailureError as error:
            if self.stopping:
                raise
            if announced and (end := cut_off(error, task.task_id, task.role)):
                self.outbox.append(end)
            self.settle(task, failed_outcome(task, error))
            return
        if problem := await self.merge(task, result):
            fields = {"usage": result.usage, "revised": self.revised.get(task.task_id, [])}
            self.settle(task, outcome_of(task, status="failed", error=problem, **fields))
            return
        outcome = outcome_of(
            task,
            status="done",
            winner_id=result.winner_id,
            score=result.score,
            decisions=result.decisions,
            usage=result.usage,
            revised=self.revised.get(task.task_id, []),
        )
        self.settle(task, outcome)
        await self.share(
            [
                DecisionAdded(
                    decision_id=decision.id,
                    title=decision.title,
                    rationale=decision.rationale,
                    decided_by=result.winner_id,
                )
                for decision in result.decisions
            ],
            [other for other in self.running if other != task.task_id],
        )

    def work(self) -> RepositoryWork | None:
        """Return what a task's council works on now; None without a repository."""
        work = self.input.work
        return work.model_copy(update={"base": self.head}) if work else None

    async def merge(self, task: PlannedTask, result: DeliberationResult) -> str:
        """Merge a winner's change into the story's branch; return why it cannot be, or nothing.

        After a conflict its author revises it once.
        """
        change = result.change
        if change is None or self.work() is None:
            return ""
        try:
            files = await self.merge_commit(task, change.commit)
            if files and workflow.patched("conflicts-revised"):
                work = self.work()
                assert work
                files = await self.merge_commit(task, await revised(self, task, result, work))
        except FailureError as error:
            if self.stopping:
                raise
            return cause_of(error)
        return still_in_conflict(files) if files else ""

    async def merge_commit(self, task: PlannedTask, commit: str) -> list[str]:
        """Merge a commit; return the files for which it is not merged.

        One merge takes place at a time: each begins at the head that the last one has made.
        """
        work = self.input.work
        assert work
        async with self.merging:
            answer = await merged(work, task.task_id, self.head, commit)
            if not answer.conflict:
                self.merged.append(
                    MergedChange(task_id=task.task_id, base=self.head, commit=answer.head)
                )
                self.head = answer.head
            return answer.conflict

    def settle(self, task: PlannedTask, outcome: TaskOutcome) -> None:
        self.outcomes[task.task_id] = outcome
        self.announce_end(task, outcome.status, outcome.winner_id, outcome.error)
        self.show()

    def announce_end(self, task: PlannedTask, status: str, winner: str, error: str) -> None:
        body = {
            "plan_id": self.input.plan_id,
            "task_id": task.task_id,
            "role": task.role,
            "status": status,
            "assignee": winner,
        }
        self.outbox.append(
            TaskCompleted.model_validate(body)
            if status == "done"
            else TaskFailed.model_validate(body | {"error": error})
        )

    def finish(self, status: str) -> None:
        """Publish the plan's end; if it was stopped, first the end of each unfinished task."""
        self.finished = True
        if status in ("CANCELLED", "FAILED"):
            for end in self.unfinished():
                self.outbox.append(end)
        self.outbox.append(self.end(status))

    def unfinished(self) -> list[TaskFailed]:
        """Return the ends of the tasks that have none."""
        return [
            TaskFailed(
                plan_id=self.input.plan_id,
                task_id=task.task_id,
                role=task.role,
                status="cancelled",
            )
            for task in self.tasks
            if task.task_id not in self.outcomes
        ]

    def end(self, status: str) -> PlanFinished:
        return PlanFinished(
            plan_id=self.input.plan_id,
            status=status,
            done=self.with_status("done"),
            failed=self.with_status("failed"),
        )

    async def share(self, decisions: list[DecisionAdded], task_ids: list[str]) -> None:
        """Send decisions made meanwhile to running deliberations, and keep them for later ones."""
        self.decisions = holding(decisions_with(self.decisions, decisions))
        if not decisions or not task_ids:
            return
        if workflow.patched("news-in-lists"):
            added = DecisionsAdded(decisions=decisions)
            await self.forward(task_ids, DeliberationWorkflow.add_decisions, added)
            return
        for task_id in task_ids:
            deliberation = workflow.get_external_workflow_handle(deliberation_workflow_id(task_id))
            for decision in decisions:
                try:
                    await deliberation.signal(DeliberationWorkflow.add_decision, decision)
                except FailureError:
                    break  # It has ended and needs no more decisions.

    async def forward(
        self, task_ids: list[str], signal: Callable[[DeliberationWorkflow, News], None], news: News
    ) -> None:
        """Signal the tasks' deliberations in turn; one that has ended needs no news."""
        for task_id in task_ids:
            deliberation = workflow.get_external_workflow_handle(deliberation_workflow_id(task_id))
            with suppress(FailureError):
                await deliberation.signal(signal, news)

    # --- shapes ---------------------------------------------------------------------------------

    def with_status(self, status: str) -> list[str]:
        return [task_id for task_id, o in self.outcomes.items() if o.status == status]

    def status(self, task_id: str) -> str:
        if task_id in self.outcomes:
            return self.outcomes[task_id].status
        return "running" if task_id in self.running else "waiting"

    def result(self) -> PlanResult:
        outcomes = [self.outcomes[task.task_id] for task in self.tasks]
        done = [outcome for outcome in outcomes if outcome.status == "done"]
        if not outcomes:
            status = "NOTHING_TO_RUN"
        else:
            status = "COMPLETED" if len(done) == len(outcomes) else "PARTIAL"
        return PlanResult.model_validate(
            {
                "plan_id": self.input.plan_id,
                "story_id": self.input.story_id,
                "status": status,
                "outcomes": outcomes,
                "merged": self.merged,
            }
        )

    def show(self) -> None:
        workflow.set_current_details(
            plan_details(self.tasks, self.progress()) + self.outbox.details
        )


def failed_outcome(task: PlannedTask, error: FailureError) -> TaskOutcome:
    """Return a failed deliberation's outcome, with the usage of the calls it paid for."""
    failure = failed_deliberation(error)
    usage = failure.usage if failure else []
    return outcome_of(task, status="failed", error=cause_of(error), usage=usage)


def outcome_of(task: PlannedTask, **fields: Any) -> TaskOutcome:
    """Return an outcome of `task` with the given fields."""
    return TaskOutcome(task_id=task.task_id, role=task.role, title=task.title, **fields)
