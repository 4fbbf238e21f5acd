"""The work of a story's states: scoring, designing, building and deliberating, tried until done.

A story has one StateWork. The results become the story's.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from temporalio import workflow
from temporalio.exceptions import ActivityError, FailureError

from workflows.deliberation import (
    BARRED,
    STARTS_ANNOUNCED,
    WAITING_TIMEOUT_S,
    DeliberationWorkflow,
    failed_deliberation,
)
from workflows.derivation import (
    load_planner,
    plan_derived,
    request_plan,
    require_plan,
    tasks_created,
)
from workflows.execution import cause_of
from workflows.models.errors import ErrorType, application_error
from workflows.plan import PlanWorkflow
from workflows.repairs import measure_and_repair
from workflows.stubs import READ_CONFIG, STORE, GraphStub, PlanningStub

with workflow.unsafe.imports_passed_through():
    from workflows.call_costs import failed_call
    from workflows.early_ends import cut_off
    from workflows.models.agents import CallUsage, PlannedTask, Proposal, Task
    from workflows.models.deliberation import DeliberationInput, DeliberationResult
    from workflows.models.events import DeliberationStarted
    from workflows.models.ids import deliberation_workflow_id, numbered_plan_id, plan_workflow_id
    from workflows.models.plan import Plan, PlanInput, PlanResult
    from workflows.rules import dag
    from workflows.rules.acceptance import numbered

if TYPE_CHECKING:
    from workflows.story import StoryWorkflow

WORK_PAUSES = tuple(timedelta(seconds=s) for s in (15, 60, 300, 600))
"""Pauses before a state's failed work is retried; after the last one, a person has to act."""

FEEDBACK_SHOWN = 5


class StateWork:
    """The work of one story's states."""

    def __init__(self, of: StoryWorkflow) -> None:
        self.of = of

    async def run(self, visit: int) -> None:
        """Do the state's work; if it fails, show the cause and retry after a pause."""
        story = self.of.story
        if story.work_done:
            return
        for pause in (*WORK_PAUSES, None):
            self.of.rebasing.rests_in = 0
            try:
                await self._begin()
            except FailureError as error:
                if story.visit != visit or story.cancelling:
                    raise
                if workflow.patched("usage-of-every-try"):
                    story.keep_usage()
                story.working_on = ""
                story.attempt += 1
                story.work_failed = f"{story.state} failed: {cause_of(error)}"
                self.of.rebasing.rests_in = visit
                self.of.milestone("WORK_FAILED", story.work_failed)
                self.of.show()
                if pause is None:
                    return
                again = f"{story.state} is tried again"
                await workflow.sleep(pause, summary=again)
            else:
                story.working_on, story.work_failed, story.work_done = "", "", True
                self.of.settle()
                return

    async def _begin(self) -> None:
        await self.of.rebasing.measured()
        spec = self.of.story.spec
        await self.of.branch_work.place()
        match spec.work:
            case "readiness":
                await self._score_readiness()
            case "design":
                await self._design()
            case "plan":
                await self._build()
            case "deliberation":
                if self.of.story.state not in self.of.story.councils:
                    await self._deliberate()
                await self.of.branch_work.examine()
            case "none":
                pass

    def _deliberation_timeout(self) -> float | None:
        """Return a deliberation's time limit in seconds, from the story's pinned process."""
        return self.of.story.process.deliberation_timeout if self.of.story.process else None

    async def _score_readiness(self) -> None:
        self.of.work_on("scoring the story")
        visit = self.of.story.visit
        readiness = await workflow.execute_activity_method(
            PlanningStub.score_story,
            self.of.story.text,
            **(READ_CONFIG | {"summary": "score against INVEST and the acceptance criteria"}),
        )
        self.of.require_visit(visit)
        self.of.story.readiness = readiness

    async def _design(self) -> None:
        """Run the council's design, then derive the plan from it."""
        if self.of.story.state not in self.of.story.councils:
            await self._deliberate()
        await self._derive_plan(self.of.story.councils[self.of.story.state].proposal)

    async def _deliberate(self) -> None:
        """Run the state's council as a child; its decisions become the story's."""
        story, spec = self.of.story, self.of.story.spec
        self.of.work_on(f"the {spec.role} council deliberates")
        visit, phase = story.visit, story.state
        await self.of.outbox.recorded()  # The council reads the story from the graph.
        await self._number_after_earlier_runs()
        task_id = f"{story.story_id}-{story.state.lower()}-{story.council_number}"
        work = story.phase_work()
        asked = spec.in_repository if work and spec.in_repository else spec
        council = deliberation_workflow_id(task_id)
        announced = workflow.patched(STARTS_ANNOUNCED)
        if announced and not story.outlived:  # else an earlier run has announced it
            self.of.emit(DeliberationStarted(task_id=task_id, role=spec.role))
        try:
            result = await self.of.child.ended(
                DeliberationWorkflow.run,
                DeliberationInput(
                    task_id=task_id,
                    story_id=story.story_id,
                    role=spec.role,
                    description=self._council_task(asked.task),
                    subject=story.text.title,
                    rubric=asked.rubric,
                    requirements=story.text.acceptance_criteria,
                    phase=story.state,
                    feedback=self._feedback(),
                    timeout=self._deliberation_timeout() or WAITING_TIMEOUT_S,
                    outbox_workflow_id=workflow.info().workflow_id,
                    announced=announced,
                    ask_for_budget=story.token_budget is not None,
                    decisions=story.told,
                    work=work,
                    attempt=story.attempt,
                    visit=visit,
                ),
                DeliberationResult,
                council,
                f"{story.state}: {story.text.title}",
            )
        except FailureError as error:
            failure = failed_deliberation(error)
            if failure:
                self._used(council, failure.usage, visit, phase)
            if announced and (end := cut_off(error, task_id, spec.role)):
                self.of.emit(end)
            raise
        self._used(council, result.usage, visit, phase)
        self.of.require_visit(visit)
        if work and result.change and result.change.commit != work.base:
            await self.of.branch_work.merge(work, task_id, result.change.commit)
        story.take_council(result)

    def _used(self, council: str, calls: list[CallUsage], visit: int, phase: str) -> None:
        """Store a council's usage under the visit that it worked for, also if that is over."""
        story = self.of.story
        if story.visit == visit or not workflow.patched("usage-counts-for-its-visit"):
            story.used(council, calls)
        else:
            story.used(council, calls, visit, phase)

    async def _number_after_earlier_runs(self) -> None:
        """Load the numbers of earlier runs once, before the first council.

        This run's plans and councils then get ids that no earlier run has used
        (docs/design/0009-story-ids-used-again.md).
        """
        story = self.of.story
        if story.before is None and workflow.patched("numbers-after-earlier-runs"):
            story.before = await workflow.execute_activity_method(
                GraphStub.story_runs,
                story.story_id,
                **(STORE | {"summary": "what earlier runs under this id have numbered"}),
            )

    def _feedback(self) -> list[str]:
        """Return why earlier work was sent back, and why the last try of this state was barred.

        A council whose proposals were all barred would otherwise write the same ones again.
        """
        story = self.of.story
        barred = [story.work_failed] if BARRED in story.work_failed else []
        return [*story.feedback, *barred][-FEEDBACK_SHOWN:]

    def _council_task(self, task: str) -> str:
        story = self.of.story
        lines = [task, f"Requirement {story.story_id}: {story.text.title}"]
        if story.tests_criteria:
            lines += [numbered(story.text.acceptance_criteria)]
        if story.score is not None:
            lines.append(
                f"The last workspace report scores {story.score.score} "
                f"({story.score.gating_decision}). {' '.join(story.score.reasons)}"
            )
        return "\n\n".join(line for line in lines if line)

    async def _derive_plan(self, design: Proposal) -> None:
        story, spec = self.of.story, self.of.story.spec
        self.of.work_on("deriving the plan's tasks")
        visit = story.visit
        await self.of.budget()
        council = await load_planner(spec.role)
        story.derivations += 1
        task = Task(
            task_id=f"{story.story_id}-plan",
            story_id=story.story_id,
            role=spec.role,
            phase=story.state,
            description=story.text.title,
            requirements=story.text.acceptance_criteria,
            feedback=self._feedback(),
            attempt=story.attempt,
        )
        self.of.asking = True
        try:
            assert story.process is not None
            most = story.process.max_tasks
            answer = await request_plan(council, task, design, most, story.derivations)
        except ActivityError as error:
            story.used(f"derive-{story.derivations}", failed_call(error))
            raise
        finally:
            self.of.asking = False
        story.used(f"derive-{story.derivations}", [answer.usage])
        self.of.require_visit(visit)
        version = story.visited(story.state)
        if story.designs_begun != version and workflow.patched("plans-numbered-over-all-states"):
            version = story.designs_begun
        version += story.before.plans if story.before else 0
        plan_id = numbered_plan_id(story.story_id, version)
        tasks = dag.number_tasks(plan_id, answer.tasks)
        plan = Plan(plan_id=plan_id, story_id=story.story_id, version=version, tasks=tasks)
        require_plan(plan, council.roles)
        story.plan, story.plan_waits = plan, True
        for event in [plan_derived(plan), *tasks_created(plan)]:
            self.of.emit(event)

    async def _build(self) -> None:
        """Run the plan's unfinished tasks as a child."""
        story, plan = self.of.story, self.of.story.plan
        if plan is None:  # A machine that an older release accepted and today's would reject.
            raise application_error(
                ErrorType.NO_PLAN, f"{story.state} runs a plan, and the story has none"
            )
        done = {*story.done_tasks, *(repair.task_id for repair in story.repairs)}
        left = [
            task.model_copy(update={"depends_on": [d for d in task.depends_on if d not in done]})
            for task in plan.tasks
            if task.task_id not in done
        ]
        if left or story.branch is None:  # else the branch is left to be measured
            self._take_plan_result(await self.run_plan(plan, left))
        await measure_and_repair(self.of)

    async def run_plan(self, plan: Plan, left: list[PlannedTask]) -> PlanResult:
        """Run tasks of the plan as a child."""
        story = self.of.story
        self.of.work_on(f"{plan.plan_id}: {len(left)} tasks")
        visit = story.visit
        await self.of.outbox.recorded()
        story.plan_waits = False
        result = await self.of.child.ended(
            PlanWorkflow.run,
            PlanInput(
                story_id=story.story_id,
                plan_id=plan.plan_id,
                tasks=left,
                phase=story.state,
                feedback=self._feedback(),
                outbox_workflow_id=workflow.info().workflow_id,
                ask_for_budget=story.token_budget is not None,
                decisions=story.told,
                task_timeout=self._deliberation_timeout(),
                work=story.repository_work(),
                attempt=story.attempt,
                visit=visit,
            ),
            PlanResult,
            plan_workflow_id(story.story_id, plan.plan_id),
            f"{len(left)} tasks of {story.text.title}",
        )
        self.of.require_visit(visit)
        story.take_outcomes(result)
        return result

    def _take_plan_result(self, result: PlanResult) -> None:
        """Take over whether the plan is done.

        Raises:
            ApplicationError: `PlanPartial`.
        """
        story = self.of.story
        story.plan_faults = [
            f"{o.task_id} {o.status} {o.error}".strip()
            for o in result.outcomes
            if o.status != "done"
        ]
        story.plan_status = result.status
        if result.status == "PARTIAL":
            raise application_error(ErrorType.PLAN_PARTIAL, "; ".join(story.plan_faults))
