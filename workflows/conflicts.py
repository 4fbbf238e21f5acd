"""A change that conflicts with the story's branch: its author revises it once, on the merged base.

The revision begins at the branch's head with all of the change but the files that conflict. It is
measured as a proposal is, and merged by the plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from temporalio import workflow
from temporalio.exceptions import FailureError

from workflows.council_changes import SHARE_OF_TIME, calls_of
from workflows.deliberation import WAITING_TIMEOUT_S
from workflows.implementation import TASK_TIMEOUT, ImplementationWorkflow, summary
from workflows.models.errors import ErrorType, application_error
from workflows.stubs import (
    READ_CONFIG,
    STORE,
    WORKSPACE,
    BranchStub,
    GraphStub,
    PlanningStub,
    WorkspaceStub,
    measuring,
)

with workflow.unsafe.imports_passed_through():
    from workflows.models.agents import Agent, CouncilQuery, PlannedTask, Task
    from workflows.models.branches import MergedBase, MergeRequest
    from workflows.models.changes import MeasureInput
    from workflows.models.deliberation import DeliberationResult
    from workflows.models.ids import implementation_workflow_id
    from workflows.models.implementation import (
        ImplementationInput,
        ImplementationResult,
        WorkLimits,
    )
    from workflows.models.process import RigorLevel
    from workflows.models.workspace import RepositoryWork
    from workflows.rules import changes, conflicts, rigor

if TYPE_CHECKING:
    from workflows.plan import PlanWorkflow


async def revised(
    plan: PlanWorkflow, task: PlannedTask, result: DeliberationResult, work: RepositoryWork
) -> str:
    """Let a winner's author revise its change on the branch; return the commit to merge.

    Args:
        plan: the plan, which counts the calls of the revision.
        task: the task.
        result: of its council; its change conflicts.
        work: the repository, with the branch's head as the base.

    Raises:
        FailureError: the revision failed, or may not be merged.
    """
    assert result.change
    base: MergedBase = await workflow.execute_activity_method(
        BranchStub.merged_base,
        MergeRequest(
            repository=work.repository,
            story_id=work.story_id,
            task_id=task.task_id,
            head=work.base,
            commit=result.change.commit,
            at=workflow.now().replace(microsecond=0),
        ),
        **(WORKSPACE | {"summary": f"the branch with {task.task_id}, but for conflicts"}),
    )
    author = await author_of(task.role, result.winner_id)
    made = await implemented(plan, request(plan, task, author, work, base))
    if made.commit == base.commit:
        raise application_error(ErrorType.MERGE_CONFLICT, conflicts.still_in_conflict(base.files))
    await require_fit(task, work, base, made.commit)
    return made.commit


async def author_of(role: str, agent_id: str) -> Agent:
    """Return an agent as its council has it now.

    Raises:
        ApplicationError: it has left the council.
    """
    council = await workflow.execute_activity_method(
        GraphStub.load_council,
        CouncilQuery(role=role),
        **(STORE | {"summary": f"{agent_id} of council {role}"}),
    )
    found = next((agent for agent in council.agents if agent.agent_id == agent_id), None)
    if found is None:
        raise application_error(
            ErrorType.NOT_FOUND,
            f"agent {agent_id} not found: it has left the council {role}, and its change conflicts",
        )
    return found


def request(
    plan: PlanWorkflow, task: PlannedTask, author: Agent, work: RepositoryWork, base: MergedBase
) -> ImplementationInput:
    """Return the input of the revision; its steps are numbered on."""
    asked = plan.input
    timeout = asked.task_timeout or WAITING_TIMEOUT_S
    return ImplementationInput(
        repository=work.repository,
        base=work.base,
        head=base.commit,
        task=Task(
            task_id=task.task_id,
            story_id=work.story_id,
            role=task.role,
            phase=asked.phase,
            description=f"{task.title}\n\n{task.description}",
            feedback=asked.feedback,
            attempt=asked.attempt,
        ),
        agent=author,
        paths=work.paths,
        limits=WorkLimits(steps=work.steps, seconds=timeout * SHARE_OF_TIME),
        feedback=conflicts.conflict_feedback(base),
        decisions=plan.decisions,
        plan_id=asked.plan_id,
        outbox_workflow_id=asked.outbox_workflow_id,
        ask_for_budget=asked.ask_for_budget,
        first_step=base.steps + 1,
        began=workflow.now(),
        goal=work.goal,
    )


async def implemented(plan: PlanWorkflow, asked: ImplementationInput) -> ImplementationResult:
    """Run the revision; count its calls, also if it fails."""
    task_id = asked.task.task_id
    try:
        made: ImplementationResult = await workflow.execute_child_workflow(
            ImplementationWorkflow.run,
            asked,
            id=implementation_workflow_id(task_id, asked.agent.agent_id),
            parent_close_policy=workflow.ParentClosePolicy.REQUEST_CANCEL,
            task_timeout=TASK_TIMEOUT,
            static_summary=summary(asked),
        )
    except FailureError as error:
        plan.revised[task_id] = calls_of(error)
        raise
    plan.revised[task_id] = made.usage
    return made


async def require_fit(
    task: PlannedTask, work: RepositoryWork, base: MergedBase, commit: str
) -> None:
    """Measure the revision as a proposal is, against the branch that it began at.

    Raises:
        ApplicationError: `MergeConflict`: it is barred, as a proposal would be.
    """
    measured = await workflow.execute_activity_method(
        WorkspaceStub.measure_change,
        MeasureInput(
            repository=work.repository,
            base=work.base,
            commit=commit,
            paths=work.paths,
            task=task.description,
        ),
        **(measuring(work.repository.limits) | {"summary": f"measure {commit[:12]}"}),
    )
    scored = rigor.score_report(await level_of(work), work.rigor, measured.report)
    if problem := conflicts.barred(base.files, changes.checks(measured, scored)):
        raise application_error(ErrorType.MERGE_CONFLICT, problem)


async def level_of(work: RepositoryWork) -> RigorLevel:
    """Return the values of the rigor level: pinned by the story, or as they are configured."""
    if work.level:
        return work.level
    process = await workflow.execute_activity_method(
        PlanningStub.load_process,
        work.rigor,
        **(READ_CONFIG | {"summary": f"rigor {work.rigor}"}),
    )
    return process.rigor
