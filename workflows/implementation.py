"""ImplementationWorkflow: one agent works in a repository, action by action.

begin -> per step: next action -> run it, commit -> until it finishes, repeats itself or reaches a
limit. Its result is the diff so far, whatever ended it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from temporalio import workflow
from temporalio.common import Priority
from temporalio.exceptions import (
    ActivityError,
    ApplicationError,
    TimeoutType,
    is_cancelled_exception,
)
from temporalio.exceptions import TimeoutError as TimedOut
from temporalio.workflow import ActivityConfig

from workflows.actors import decisions_of_people
from workflows.execution import cause_of, require_id, type_of
from workflows.kept_packs import is_pack_missing, kept_pack
from workflows.models.errors import ErrorType
from workflows.search_attributes import STORY_ROLE
from workflows.stubs import (
    WORKSPACE,
    AgentStub,
    WorkspaceStub,
    agent_call,
    fair_priority,
    workspace_call,
)

with workflow.unsafe.imports_passed_through():
    from workflows.call_costs import cancelled_as_such, failed_call, summed_up
    from workflows.current_details import implementation_details
    from workflows.models.agents import CallUsage
    from workflows.models.context import (
        ContextPack,
        DecisionAdded,
        DecisionsAdded,
        MilestoneReached,
        MilestonesAdded,
        PackQuery,
    )
    from workflows.models.deliberation import WaveRequest
    from workflows.models.events import RequestRefused
    from workflows.models.ids import implementation_workflow_id
    from workflows.models.implementation import (
        ALL_ACTIONS,
        EDITS,
        Action,
        ActionResult,
        EndedBy,
        Finish,
        ImplementationInput,
        ImplementationProgress,
        ImplementationResult,
        NextActionAnswer,
        NextActionInput,
        RunActionInput,
        RunCommand,
        StartedWork,
        StepRecord,
        WorkQuery,
    )
    from workflows.models.workspace import Trailers
    from workflows.rules import transcript
    from workflows.rules.news import decisions_with, milestones_with

REQUEST_WAVE = "request_wave"

TASK_TIMEOUT = timedelta(seconds=5)
"""Temporal's time limit of a workflow task, half of the default.

A worker that is killed in the middle of one holds the workflow up for that long. Replaying the
steps of a run takes a fraction of it.
"""

STEPS_OF_A_RUN = 100
"""The workflow continues as new after this many steps."""

TRANSCRIPT_BYTES = 128 * 1024
"""Of the steps that each call gets; older ones are elided."""

REFUSALS_SHOWN = 5

NO_STORY = "no-story"
"""The story in the trailers of work that was started alone."""


@workflow.defn
class ImplementationWorkflow:
    """One agent's work on one task in a repository; ends with a commit."""

    @workflow.init
    def __init__(self, input: ImplementationInput) -> None:
        self.input = input
        self.work: StartedWork | None = input.carried
        self.first = input.carried.step if input.carried else input.first_step - 1
        self.decisions = list(input.carried.decisions if input.carried else input.decisions)
        self.milestones: list[MilestoneReached] = list(
            input.carried.milestones if input.carried else []
        )
        self.refused: list[str] = list(input.carried.refused if input.carried else [])
        self.usage: list[CallUsage] = list(input.carried.usage if input.carried else [])
        self.granted: set[str] = set()
        self.status: Any = "starting"
        self.step = self.first
        self.last: StepRecord | None = None
        self.ended_by: EndedBy | None = None
        self.error = ""
        self.finish: Finish | None = None

    @workflow.run
    async def run(self, input: ImplementationInput) -> ImplementationResult:
        """Work on the task.

        Raises:
            ActivityError: the repository cannot be used.
            ApplicationError: the agent failed before anything was changed; its calls are details.
        """
        task = input.task
        require_id(implementation_workflow_id(task.task_id, input.agent.agent_id))
        workflow.upsert_search_attributes([STORY_ROLE.value_set(task.role)])
        self.show("starting")
        with cancelled_as_such():
            if self.work is None:
                self.work = await self.begin()
            while not self.ended_by:
                await self.take_step(self.work)
                self.end_at_a_limit()
                self.continue_if_long(self.work)
        self.show("ended")
        return self.result(self.work)

    # --- signals and queries --------------------------------------------------------------------

    @workflow.signal
    def add_decision(self, decision: DecisionAdded) -> None:
        """Receive a decision made meanwhile; the agent gets it in its next step."""
        self.take_decisions([decision])

    @workflow.signal
    def add_decisions(self, request: DecisionsAdded) -> None:
        """Receive decisions that were made, corrected or withdrawn meanwhile."""
        self.take_decisions(request.decisions)

    def take_decisions(self, decisions: list[DecisionAdded]) -> None:
        """Pass decisions on to the agent, but none that names a policy."""
        self.decisions = decisions_with(
            self.decisions, decisions_of_people(decisions, self.take_refusal)
        )

    @workflow.signal
    def add_milestone(self, milestone: MilestoneReached) -> None:
        """Receive a milestone from outside; the agent gets it in its next step."""
        self.milestones = milestones_with(self.milestones, [milestone])

    @workflow.signal
    def add_milestones(self, request: MilestonesAdded) -> None:
        """Receive milestones from outside; the agent gets them in its next step."""
        self.milestones = milestones_with(self.milestones, request.milestones)

    @workflow.signal
    def grant_wave(self, wave: str) -> None:
        """Receive the story's permission to take a step, if it has a token budget."""
        self.granted.add(wave)

    @workflow.signal
    def not_understood(self, name: str, reason: str) -> None:
        """Show an unknown or malformed signal (workers/payloads.py)."""
        self.take_refusal(RequestRefused(request=name, reason=reason))

    def take_refusal(self, refusal: RequestRefused) -> None:
        line = f"{refusal.request}: {refusal.reason}"[:500]
        self.refused = [*self.refused, line][-REFUSALS_SHOWN:]
        self.show(self.status)

    @workflow.query
    def progress(self) -> ImplementationProgress:
        """Return the step, the last action and its exit code, the changed files and the tokens."""
        work, last = self.work, self.last
        command = last.action if last and isinstance(last.action, RunCommand) else None
        return ImplementationProgress(
            status=self.status,
            step=self.step,
            steps=self.input.first_step - 1 + self.most_steps() if work else 0,
            last=transcript.headline(last.action) if last else "",
            last_command=command.command if command else "",
            exit_code=last.exit_code if last else None,
            changed=work.changed if work else [],
            tokens=self.tokens(),
            commit=work.commit if work else "",
            ended_by=self.ended_by or "",
            refused=self.refused,
        )

    @workflow.query
    def transcript(self) -> list[StepRecord]:
        """Return the steps, as the agent sees them: the oldest without their texts."""
        return self.work.steps if self.work else []

    # --- the steps, in order --------------------------------------------------------------------

    async def begin(self) -> StartedWork:
        """Find the repository and the commits, and load the context pack."""
        request = self.input
        start = await workflow.execute_activity_method(
            WorkspaceStub.begin_work,
            WorkQuery(
                repository=request.repository,
                base=request.base,
                head=request.head,
                paths=request.paths,
            ),
            **(WORKSPACE | {"summary": "outline of the repository", "priority": self.priority()}),
        )
        return StartedWork(
            repository=start.repository,
            pack=await self.load_pack(),
            outline=start.outline,
            base=start.base,
            commit=start.head,
            head=start.head,
            began=(request.began or workflow.info().start_time).replace(microsecond=0),
            step=self.step,
            changed=start.changed,
        )

    async def load_pack(self) -> ContextPack:
        request = self.input
        if request.pack is None or (request.pack.kept_at and request.background):
            return await self.keep_pack()
        context = "\n\n".join(filter(None, (request.pack.context, request.background)))
        return request.pack.model_copy(update={"context": context})

    async def keep_pack(self) -> ContextPack:
        request, task = self.input, self.input.task
        return await kept_pack(
            PackQuery(
                story_id=task.story_id,
                role=task.role,
                phase=task.phase,
                subtask_id=task.task_id if request.plan_id else "",
                known=bool(request.outbox_workflow_id),
                background=request.background,
            )
        )

    async def take_step(self, work: StartedWork) -> None:
        """Ask for the next action and run it; note what ends the work."""
        self.step += 1
        await self.budget()
        began = workflow.now()
        try:
            answer = await self.ask(work)
            if isinstance(answer.action, Finish):
                self.finish, self.ended_by = answer.action, "finish"
            else:
                result = await self.act(work, answer.action, answer.usage)
                self.add_step(work, answer.action, result)
        except ActivityError as error:
            self.usage = summed_up([*self.usage, *failed_call(error)])
            self.end_by_failure(work, error)
        self.update(seconds=work.seconds + (workflow.now() - began).total_seconds())

    async def budget(self) -> None:
        """Wait until the story grants the step, if it has a token budget."""
        if not self.input.ask_for_budget:
            return
        self.show("waiting for budget")
        info = workflow.info()
        wave = f"{info.first_execution_run_id}/{self.step}"
        story = workflow.get_external_workflow_handle(self.input.outbox_workflow_id)
        await story.signal(
            REQUEST_WAVE,
            WaveRequest(workflow_id=info.workflow_id, wave=wave, usage=self.usage),
        )
        await workflow.wait_condition(lambda: wave in self.granted)

    async def ask(self, work: StartedWork) -> NextActionAnswer:
        """Ask the agent for its next action."""
        self.show("asking")
        try:
            answer = await self.next_action(work, work.pack)
        except ActivityError as error:
            if not is_pack_missing(error):
                raise
            pack = await self.keep_pack()
            self.update(pack=pack)
            answer = await self.next_action(work, pack)
        self.usage = summed_up([*self.usage, answer.usage])
        return answer

    async def next_action(self, work: StartedWork, pack: ContextPack) -> NextActionAnswer:
        request, task = self.input, self.input.task
        only_edits = self.most_steps() == 1
        return await workflow.execute_activity_method(
            AgentStub.next_action,
            NextActionInput(
                task=task.model_copy(update={"feedback": [*task.feedback, *request.feedback]}),
                agent=request.agent,
                pack=pack,
                wave=self.step,
                late_decisions=self.decisions,
                late_milestones=self.milestones,
                outline=work.outline,
                paths=request.paths,
                editable=editable(work),
                steps=work.steps,
                allowed=list(EDITS if only_edits else ALL_ACTIONS),
                steps_left=self.steps_left() + 1,
                goal=request.goal if only_edits else [],
                changed=work.changed if only_edits else [],
            ),
            **self.within_time(
                agent_call(request.agent), f"step {self.step}: {request.agent.agent_id} decides"
            ),
        )

    async def act(self, work: StartedWork, action: Action, usage: CallUsage) -> ActionResult:
        """Run an action and commit what it changes."""
        self.show("acting")
        request, task = self.input, self.input.task
        return await workflow.execute_activity_method(
            WorkspaceStub.run_action,
            RunActionInput(
                repository=work.repository,
                base=work.base,
                parent=work.commit,
                action=action,
                paths=request.paths,
                trailers=Trailers(
                    story=task.story_id or NO_STORY,
                    task=task.task_id,
                    agent=request.agent.agent_id,
                    model=usage.model,
                    prompt_hash=usage.prompt_hash,
                    step=self.step,
                ),
                at=work.began + timedelta(seconds=self.step),
            ),
            **self.within_time(
                workspace_call(work.repository.limits),
                f"step {self.step}: {transcript.headline(action, 120)}",
            ),
        )

    def add_step(self, work: StartedWork, action: Action, result: ActionResult) -> None:
        """Add a step to the transcript; repeated steps end the work."""
        changed = result.commit != work.commit
        step = StepRecord(
            step=self.step,
            action=action,
            exit_code=result.exit_code,
            stopped=result.stopped,
            observation=result.observation,
            commit=result.commit,
            changed=changed,
            fingerprint=transcript.fingerprint(
                action, result.exit_code, result.stopped, result.observation, changed
            ),
        )
        self.last = step
        self.update(
            steps=transcript.elided([*work.steps, step], TRANSCRIPT_BYTES),
            digest=transcript.digest(work.digest, step),
            commit=result.commit,
            changed=result.changed,
        )

    def end_by_failure(self, work: StartedWork, error: ActivityError) -> None:
        """End the work by a failed call if it has changed something.

        Raises:
            ActivityError: it was cancelled.
            ApplicationError: there is nothing to keep.
        """
        if is_cancelled_exception(error) or type_of(error) == ErrorType.CANCELLED:
            raise error
        if out_of_time(error):
            self.ended_by = "seconds"
            return
        if work.commit == work.head:
            raise failed_work(error, self.usage) from error
        self.ended_by, self.error = "failure", cause_of(error)

    # --- limits ---------------------------------------------------------------------------------

    def end_at_a_limit(self) -> None:
        """End the work if it repeats itself or has reached a limit."""
        limits = self.input.limits
        if self.ended_by:
            return
        if self.work and transcript.loops(self.work.steps):
            self.ended_by = "loop"
        elif self.steps_left() <= 0:
            self.ended_by = "steps"
        elif limits.tokens and self.tokens() >= limits.tokens:
            self.ended_by = "tokens"
        elif self.seconds_left() <= 0:
            self.ended_by = "seconds"

    def most_steps(self) -> int:
        """Return the number of steps that the work may have."""
        assert self.work
        return self.input.limits.steps or self.work.repository.limits.steps

    def steps_left(self) -> int:
        return self.most_steps() - (self.step - self.input.first_step + 1)

    def seconds_left(self) -> float:
        return self.input.limits.seconds - (self.work.seconds if self.work else 0)

    def tokens(self) -> int:
        return sum(call.tokens for call in self.usage)

    def within_time(self, options: ActivityConfig, summary: str) -> ActivityConfig:
        """Return the options of an activity that ends with the time of the work."""
        left = timedelta(seconds=max(self.seconds_left(), 0.001))
        return options | ActivityConfig(
            schedule_to_close_timeout=left, summary=summary, priority=self.priority()
        )

    def priority(self) -> Priority:
        task = self.input.task
        return fair_priority(task.actor or task.story_id or task.task_id)

    # --- state ----------------------------------------------------------------------------------

    def update(self, **fields: Any) -> None:
        assert self.work
        self.work = self.work.model_copy(update=fields)

    def continue_if_long(self, work: StartedWork) -> None:
        suggested = workflow.info().is_continue_as_new_suggested()
        if self.ended_by or not (suggested or self.step - self.first >= STEPS_OF_A_RUN):
            return
        carried = work.model_copy(
            update={
                "step": self.step,
                "usage": self.usage,
                "decisions": self.decisions,
                "milestones": self.milestones,
                "refused": self.refused,
            }
        )
        workflow.continue_as_new(self.input.model_copy(update={"carried": carried}))

    def result(self, work: StartedWork) -> ImplementationResult:
        assert self.ended_by
        request, last = self.input, self.usage[-1] if self.usage else None
        return ImplementationResult(
            task_id=request.task.task_id,
            agent_id=request.agent.agent_id,
            repository=work.repository.key,
            base=work.base,
            commit=work.commit,
            changed=work.changed,
            ended_by=self.ended_by,
            error=self.error,
            summary=self.finish.summary if self.finish else "",
            decisions=self.finish.decisions if self.finish else [],
            usage=self.usage,
            steps=self.step - request.first_step + 1,
            transcript_digest=work.digest,
            model=last.model if last else "",
            prompt_hash=last.prompt_hash if last else "",
            duration_ms=round(work.seconds * 1000),
        )

    def show(self, status: str) -> None:
        self.status = status
        workflow.set_current_details(implementation_details(self.input.task, self.progress()))


def editable(work: StartedWork) -> list[str]:
    """Return the files that may change, as far as they are known, in their order."""
    gone = {file.path for file in work.changed if file.status == "deleted"}
    known = [path for path in work.outline.editable if path not in gone]
    return [*known, *(f.path for f in work.changed if f.path not in {*known, *gone})]


def failed_work(error: ActivityError, usage: list[CallUsage]) -> ApplicationError:
    """Return the failure of work without a change, with the calls that were paid for."""
    return ApplicationError(
        f"nothing was changed: {cause_of(error)}", *usage, type=type_of(error), non_retryable=True
    )


def out_of_time(error: ActivityError) -> bool:
    """Return whether an activity reached the end of the time that the work has."""
    cause = error.cause
    return isinstance(cause, TimedOut) and cause.type == TimeoutType.SCHEDULE_TO_CLOSE


def summary(input: ImplementationInput) -> str:
    """Return the static summary of an implementation, for who starts it."""
    return f"{input.agent.agent_id} implements {input.task.description}"[:200]
