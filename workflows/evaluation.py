"""EvaluationWorkflow: agents work on a task whose solution is known by its tests, which then run.

one agent's implementation, or a council's deliberation -> the tests on the commit that it made.
The tests are not part of what the agents get.
"""

from __future__ import annotations

from typing import Any

from temporalio import workflow
from temporalio.exceptions import ChildWorkflowError

from workflows.council_changes import calls_of
from workflows.deliberation import DeliberationWorkflow, failed_deliberation
from workflows.execution import cause_of, require_id, type_of
from workflows.implementation import TASK_TIMEOUT, ImplementationWorkflow
from workflows.implementation import summary as implementation_summary
from workflows.models.errors import ErrorType
from workflows.stubs import STORE, EvaluationStub, GraphStub, evaluating

with workflow.unsafe.imports_passed_through():
    from workflows.current_details import evaluation_details
    from workflows.models.agents import Agent, CallUsage, CouncilQuery, Task
    from workflows.models.base import content_hash
    from workflows.models.context import ContextPack
    from workflows.models.deliberation import DeliberationInput, DeliberationResult
    from workflows.models.evaluation import (
        EvaluatedCommit,
        EvaluateInput,
        EvaluationInput,
        EvaluationResult,
    )
    from workflows.models.ids import (
        deliberation_workflow_id,
        evaluation_workflow_id,
        implementation_workflow_id,
    )
    from workflows.models.implementation import (
        ImplementationInput,
        ImplementationResult,
        WorkLimits,
    )
    from workflows.models.workspace import RepositoryWork

PHASE = "BUILD"
OF_THE_AGENTS = (ErrorType.ALL_BARRED, ErrorType.BAD_ANSWER, ErrorType.DELIBERATION_TIMEOUT)
"""Failures that are results: what the agents made cannot be used. Others are evaluated again."""

NOTHING_CHANGED = "nothing was changed"


@workflow.defn
class EvaluationWorkflow:
    """One task in one configuration; ends with whether its tests pass."""

    @workflow.init
    def __init__(self, input: EvaluationInput) -> None:
        self.input = input
        self.status = "the agents work"
        self.result = EvaluationResult(
            asked=content_hash(input.model_dump(mode="json")),
            run=input.run,
            instance_id=input.task.instance_id,
            configuration=input.configuration.name,
            task_id=input.task_id,
            base=input.base,
        )

    @workflow.run
    async def run(self, input: EvaluationInput) -> EvaluationResult:
        """Work on the task, and evaluate the commit.

        Raises:
            ActivityError: the repository or its tests cannot be used.
            ChildWorkflowError: the agents failed for a reason that is not theirs.
        """
        require_id(evaluation_workflow_id(input.task_id))
        self.show("the agents work")
        began = workflow.now()
        try:
            await (self.one() if input.configuration.kind == "one" else self.council())
        except ChildWorkflowError as error:
            if type_of(error) not in OF_THE_AGENTS:
                raise
            self.note_failure(error)
        self.note(seconds=(workflow.now() - began).total_seconds())
        if self.result.commit and self.result.commit != input.base:
            await self.evaluate()
        elif not self.result.error:
            self.note(error=NOTHING_CHANGED)
        self.show("ended")
        return self.result

    async def one(self) -> None:
        """Let the first agent of the council work alone."""
        agent = await self.first_agent()
        request = self.implementation(agent)
        self.note(agents=[agent.agent_id])
        done: ImplementationResult = await workflow.execute_child_workflow(
            ImplementationWorkflow.run,
            request,
            id=implementation_workflow_id(request.task.task_id, agent.agent_id),
            parent_close_policy=workflow.ParentClosePolicy.REQUEST_CANCEL,
            task_timeout=TASK_TIMEOUT,
            static_summary=implementation_summary(request),
        )
        self.note(commit=done.commit, usage=done.usage, ended_by=done.ended_by, error=done.error)

    async def first_agent(self) -> Agent:
        council = await workflow.execute_activity_method(
            GraphStub.load_council,
            CouncilQuery(role=self.input.role, size=1),
            **(STORE | {"summary": f"council {self.input.role}"}),
        )
        return council.agents[0]

    def implementation(self, agent: Agent) -> ImplementationInput:
        request = self.input
        return ImplementationInput(
            repository=request.repository,
            base=request.base,
            head=request.base,
            task=Task(
                task_id=request.task_id,
                story_id=self.story_id,
                role=request.role,
                phase=PHASE,
                description=request.task.problem_statement,
            ),
            agent=agent,
            limits=WorkLimits(steps=request.steps, seconds=request.seconds),
            pack=ContextPack(),
            began=workflow.info().start_time.replace(microsecond=0),
        )

    async def council(self) -> None:
        """Let a council work, as for a task of a story."""
        request = self.input
        done: DeliberationResult = await workflow.execute_child_workflow(
            DeliberationWorkflow.run,
            DeliberationInput(
                task_id=request.task_id,
                role=request.role,
                phase=PHASE,
                description=request.task.problem_statement,
                agents=request.configuration.agents,
                rounds=request.configuration.rounds,
                timeout=request.seconds,
                work=RepositoryWork(
                    repository=request.repository,
                    story_id=self.story_id,
                    base=request.base,
                    steps=request.steps,
                ),
            ),
            id=deliberation_workflow_id(request.task_id),
            parent_close_policy=workflow.ParentClosePolicy.REQUEST_CANCEL,
            static_summary=f"{request.configuration.name}: {request.task.instance_id}",
        )
        self.note(
            commit=done.change.commit if done.change else "",
            usage=done.usage,
            agents=[each.agent_id for each in done.ranked],
            ended_by=done.status,
        )

    def note_failure(self, error: ChildWorkflowError) -> None:
        """Note why the agents made no commit, and the calls that were paid for."""
        failed = failed_deliberation(error) if self.input.configuration.kind != "one" else None
        usage: list[CallUsage] = failed.usage if failed else calls_of(error)
        self.note(usage=usage, ended_by=type_of(error), error=cause_of(error))

    async def evaluate(self) -> None:
        """Run the task's tests on the commit."""
        self.show("the tests run")
        request, task = self.input, self.input.task
        found: EvaluatedCommit = await workflow.execute_activity_method(
            EvaluationStub.evaluate_commit,
            EvaluateInput(
                repository=request.repository,
                base=request.base,
                commit=self.result.commit,
                fail_to_pass=task.fail_to_pass,
                pass_to_pass=task.pass_to_pass,
                test_patch=task.test_patch,
            ),
            **(evaluating(request.repository.limits) | {"summary": f"tests {task.instance_id}"}),
        )
        self.note(evaluated=found, resolved=found.resolved)

    @property
    def story_id(self) -> str:
        """The name of the run in refs and trailers."""
        return f"eval-{self.input.run}"

    def note(self, **fields: Any) -> None:
        self.result = self.result.model_copy(update=fields)

    def show(self, status: str) -> None:
        self.status = status
        workflow.set_current_details(evaluation_details(self.input, self.result, status))
