"""DerivationWorkflow: splits a story from the graph into the tasks of a plan, once."""

from __future__ import annotations

from temporalio import workflow

from workflows.execution import require_id
from workflows.models.errors import ErrorType, application_error
from workflows.models.outbox import OutboxState
from workflows.outbox import Outbox
from workflows.stubs import STORE, AgentStub, GraphStub, agent_call

with workflow.unsafe.imports_passed_through():
    from workflows.call_costs import cancelled_as_such
    from workflows.models.agents import (
        Council,
        CouncilQuery,
        DerivePlanAnswer,
        DerivePlanInput,
        Proposal,
        Task,
    )
    from workflows.models.context import ContextPack
    from workflows.models.events import (
        EventBody,
        PlanDerived,
        PlanFinished,
        TaskCreated,
        TaskFailed,
    )
    from workflows.models.ids import derivation_workflow_id, former_derivation_workflow_id
    from workflows.models.plan import (
        DerivationInput,
        DerivationResult,
        Plan,
        PlanInput,
        PlanQuery,
    )
    from workflows.models.readiness import StoryText
    from workflows.rules import dag

PLANNER = "ARCHITECT"


async def load_planner(role: str = PLANNER) -> Council:
    """Load the council that derives plans: its first agent does, for the roles it names."""
    return await workflow.execute_activity_method(
        GraphStub.load_council,
        CouncilQuery(role=role, size=1),
        **(STORE | {"summary": "the planner, and the existing roles"}),
    )


async def request_plan(
    council: Council, task: Task, design: Proposal, max_tasks: int, wave: int = 1
) -> DerivePlanAnswer:
    """Return the drafts that the council's first agent writes from a design, and their cost.

    Args:
        council: As `load_planner` returns it.
        task: The request to the agent.
        design: The design that is split into tasks.
        max_tasks: The most tasks of the plan.
        wave: Number of the request, if the same plan is requested again.

    Raises:
        ActivityError: The agent gave no valid answer, or the call was cancelled.
    """
    planner = council.agents[0]
    return await workflow.execute_activity_method(
        AgentStub.derive_plan,
        DerivePlanInput(
            task=task,
            agent=planner,
            pack=ContextPack(),
            wave=wave,
            design=design,
            roles=council.roles,
            max_tasks=max_tasks,
        ),
        **(agent_call(planner) | {"summary": "derive the plan's tasks"}),
    )


async def derive_from_text(
    asked: PlanInput | DerivationInput, story: StoryText, actor: str = ""
) -> tuple[Plan, list[str]]:
    """Return the first version of a plan, derived from the story's text, and the existing roles.

    Args:
        asked: names the story, the plan, the state of its tasks and the most tasks.
        story: the story's text.
        actor: the caller of gRPC whose quota the tokens count for; empty: none.
    """
    story_id, plan_id = asked.story_id, asked.plan_id
    council = await load_planner()
    task = Task(
        task_id=plan_id,
        story_id=story_id,
        role=PLANNER,
        phase=asked.phase,
        description=story.title,
        requirements=story.acceptance_criteria,
        actor=actor,
    )
    with cancelled_as_such():
        answer = await request_plan(
            council, task, Proposal(approach=story.title, content=story.brief), asked.max_tasks
        )
    tasks = dag.number_tasks(plan_id, answer.tasks)
    return Plan(plan_id=plan_id, story_id=story_id, version=1, tasks=tasks), council.roles


def require_plan(plan: Plan, roles: list[str]) -> None:
    """Check a derived plan by the DAG's rules.

    Raises:
        ApplicationError: `InvalidPlan`, not retryable, names the task and the rule.
    """
    try:
        dag.validate(plan.tasks, roles)
    except dag.InvalidPlan as error:
        raise application_error(ErrorType.INVALID_PLAN, f"plan: {error}") from error


def plan_derived(plan: Plan) -> EventBody:
    """Return the record of a plan's tasks, for the graph."""
    return PlanDerived(plan_id=plan.plan_id, version=plan.version, tasks=plan.tasks)


def tasks_created(plan: Plan) -> list[EventBody]:
    """Return the events that announce a plan's tasks, in the plan's order."""
    return [
        TaskCreated(
            plan_id=plan.plan_id, task_id=task.task_id, role=task.role, depends_on=task.depends_on
        )
        for task in plan.tasks
    ]


def plan_never_ran(plan: Plan) -> list[TaskFailed | PlanFinished]:
    """Return the events that end a plan whose workflow was never started."""
    return [
        *(
            TaskFailed(
                plan_id=plan.plan_id, task_id=task.task_id, role=task.role, status="cancelled"
            )
            for task in plan.tasks
        ),
        PlanFinished(plan_id=plan.plan_id, status="CANCELLED", done=[], failed=[]),
    ]


@workflow.defn
class DerivationWorkflow:
    """The tasks of a plan: loaded from the graph, or derived from the story there and recorded."""

    @workflow.init
    def __init__(self, input: DerivationInput) -> None:
        self.outbox = Outbox(OutboxState(), input.story_id)

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
            plan, roles = await derive_from_text(input, stored.story, input.actor)
            require_plan(plan, roles)
            self.outbox.append(plan_derived(plan))
            for created in tasks_created(plan) if input.announce else []:
                self.outbox.append(created)
            await self.outbox.drained()
            tasks = plan.tasks
        return DerivationResult(story_id=input.story_id, plan_id=input.plan_id, tasks=tasks)
