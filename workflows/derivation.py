"""DerivationWorkflow: splits a story from the graph into the tasks of a plan, once."""

from __future__ import annotations

from temporalio import workflow

from workflows.deliberation import require_id
from workflows.errors import ErrorType, application_error
from workflows.outbox import Outbox
from workflows.outbox_state import OutboxState
from workflows.stubs import STORE, AgentStub, GraphStub, agent_call

with workflow.unsafe.imports_passed_through():
    from workflows import dag
    from workflows.call_costs import cancelled_as_such
    from workflows.clock import timestamp
    from workflows.events import EventBody, PlanDerived, TaskCreated
    from workflows.models import (
        ContextPack,
        CouncilQuery,
        DerivationInput,
        DerivationResult,
        DerivePlanInput,
        PlannedTask,
        PlanQuery,
        Proposal,
        StoryText,
        Task,
        derivation_workflow_id,
        former_derivation_workflow_id,
    )

PLANNER = "ARCHITECT"


async def derive_tasks(
    story_id: str, plan_id: str, phase: str, story: StoryText
) -> tuple[list[PlannedTask], list[str]]:
    """Return the tasks that the planner derives from the story's text, and the existing roles."""
    council = await workflow.execute_activity_method(
        GraphStub.load_council,
        CouncilQuery(role=PLANNER, size=1),
        **(STORE | {"summary": "the planner"}),
    )
    planner = council.agents[0]
    with cancelled_as_such():
        answer = await workflow.execute_activity_method(
            AgentStub.derive_plan,
            DerivePlanInput(
                task=Task(
                    task_id=plan_id,
                    story_id=story_id,
                    role=PLANNER,
                    phase=phase,
                    description=story.title,
                    requirements=story.acceptance_criteria,
                ),
                agent=planner,
                pack=ContextPack(),
                wave=1,
                design=Proposal(approach=story.title, content=story.brief),
                roles=council.roles,
            ),
            **(agent_call(planner) | {"summary": "derive the plan's tasks"}),
        )
    return dag.number_tasks(plan_id, answer.tasks), council.roles


def require_plan(tasks: list[PlannedTask], roles: list[str]) -> None:
    """Check a derived plan by the DAG's rules.

    Raises:
        ApplicationError: `InvalidPlan`, not retryable, names the task and the rule.
    """
    try:
        dag.validate(tasks, roles)
    except dag.InvalidPlan as error:
        raise application_error(ErrorType.INVALID_PLAN, f"plan: {error}") from error


def plan_derived(story_id: str, plan_id: str, version: int, tasks: list[PlannedTask]) -> EventBody:
    """Return the record of a plan's tasks, for the graph."""
    return PlanDerived(
        story_id=story_id, plan_id=plan_id, version=version, tasks=tasks, timestamp=timestamp()
    )


def tasks_created(story_id: str, plan_id: str, tasks: list[PlannedTask]) -> list[EventBody]:
    """Return the events that announce a plan's tasks, in the plan's order."""
    return [
        TaskCreated(
            story_id=story_id,
            plan_id=plan_id,
            task_id=task.task_id,
            role=task.role,
            depends_on=task.depends_on,
            timestamp=timestamp(),
        )
        for task in tasks
    ]


@workflow.defn
class DerivationWorkflow:
    """The tasks of a plan: loaded from the graph, or derived from the story there and recorded."""

    @workflow.init
    def __init__(self, input: DerivationInput) -> None:
        self.outbox = Outbox(OutboxState())

    @workflow.run
    async def run(self, input: DerivationInput) -> DerivationResult:
        """Load or derive the plan's tasks.

        Raises:
            ApplicationError: NotFound or InvalidPlan.
        """
        require_id(
            derivation_workflow_id(input.story_id, input.plan_id),
            former_derivation_workflow_id(input.story_id, input.plan_id),
        )
        self.outbox.start()
        stored = await workflow.execute_activity_method(
            GraphStub.load_plan,
            PlanQuery(story_id=input.story_id, plan_id=input.plan_id),
            **(STORE | {"summary": "the story, and the plan's tasks in the graph"}),
        )
        tasks = stored.tasks
        if not tasks:
            if stored.story is None:
                raise application_error(ErrorType.NOT_FOUND, f"story {input.story_id} not found")
            tasks, roles = await derive_tasks(
                input.story_id, input.plan_id, input.phase, stored.story
            )
            self.record(input, tasks, roles)
            await self.outbox.drained()
        return DerivationResult(story_id=input.story_id, plan_id=input.plan_id, tasks=tasks)

    def record(self, input: DerivationInput, tasks: list[PlannedTask], roles: list[str]) -> None:
        """Record the plan in the graph; publish each task if the input asks for it."""
        require_plan(tasks, roles)
        self.outbox.append(plan_derived(input.story_id, input.plan_id, 1, tasks))
        for body in tasks_created(input.story_id, input.plan_id, tasks) if input.announce else []:
            self.outbox.append(body)
