"""Plans and their runs, and derivations of plans."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from workflows.models.agents import LARGEST_PLAN, MAX_TASKS, CallUsage, PlannedTask
from workflows.models.base import Model, Request
from workflows.models.branches import MergedChange
from workflows.models.context import DecisionAdded
from workflows.models.deliberation import RecordedDecision
from workflows.models.ids import LONG_ID_CHARACTERS, Id, LongId, Role
from workflows.models.outbox import OutboxState
from workflows.models.readiness import StoryText
from workflows.models.workspace import RepositoryWork


class Plan(Model):
    """A version of a story's plan."""

    plan_id: str
    story_id: str
    version: int = 1
    tasks: list[PlannedTask]


MaxTasks = Annotated[int, Field(ge=1, le=LARGEST_PLAN)]


class TaskOutcome(Model):
    """The outcome of one task of a plan. Status `not_run`: a task that it depends on failed.

    Attributes:
        revised: the calls of its winner's author in a revision after a conflict.
    """

    task_id: str
    role: str
    title: str
    status: Literal["done", "failed", "not_run"]
    winner_id: str = ""
    score: float = 0.0
    decisions: list[RecordedDecision] = []
    error: str = ""
    usage: list[CallUsage] = []
    revised: list[CallUsage] = []


class PlanProgress(Model):
    """What a plan carries to its next run, with an input that has its tasks and decisions.

    Attributes:
        outlives: whether the plan ignores cancellations, as after the signal `outlive`.
    """

    outcomes: list[TaskOutcome] = []
    merged: list[MergedChange] = []
    outbox: OutboxState = OutboxState()
    outlives: bool = False


class PlanInput(Request):
    """The input of PlanWorkflow.

    Attributes:
        tasks: None to load them from the graph, or to derive them if it has none.
        roles: the councils that deliberate, once each, if the graph has neither tasks nor the
            story.
        task_timeout: time limit of each task's deliberation in seconds; None: one hour.
        work: the repository that the tasks change, from the head of the story's branch; None: its
            councils deliberate in Markdown.
        max_tasks: the most tasks, if they are derived.
        attempt: which try this is, if the work of the story's state has failed before.
        visit: the story's visit of the state that runs the plan; 0: it runs without a story.
        carried: set by continue-as-new only.
    """

    story_id: Id
    plan_id: LongId
    tasks: list[PlannedTask] | None = None
    phase: str = "BUILD"
    feedback: list[str] = []
    outbox_workflow_id: str = ""
    ask_for_budget: bool = False
    decisions: list[DecisionAdded] = []
    task_timeout: float | None = Field(default=None, gt=0, le=86_400)
    roles: list[Role] = Field(default=[], max_length=60)
    work: RepositoryWork | None = None
    max_tasks: MaxTasks = MAX_TASKS
    attempt: int = Field(default=1, ge=1)
    visit: int = Field(default=0, ge=0)
    carried: PlanProgress | None = None


class Repair(Model):
    """A task that repairs what the fleet's measurement of the branch found.

    Attributes:
        task_id: the task, which the story's plan holds.
        visit: the story's visit of the state that runs the plan.
        status: `open`: it runs, or has to run.
        error: why it failed.
    """

    task_id: str
    visit: int
    status: Literal["open", "done", "failed"] = "open"
    error: str = ""


class PlanResult(Model):
    """The outcome of a plan.

    Attributes:
        status: COMPLETED: every task is done; PARTIAL: not all are; NOTHING_TO_RUN: there were
            none.
        merged: the changes in the story's branch, in order.
    """

    plan_id: str
    story_id: str
    status: Literal["COMPLETED", "PARTIAL", "NOTHING_TO_RUN"]
    outcomes: list[TaskOutcome] = []
    merged: list[MergedChange] = []


class PlanQuery(Model):
    """A query for a plan in the graph."""

    story_id: str
    plan_id: str


class DerivationInput(Request):
    """The input of DerivationWorkflow.

    Attributes:
        announce: whether each task is also published.
        actor: the caller of gRPC who asks, whose quota its tokens count for; empty: none.
        max_tasks: the most tasks that are derived.
    """

    story_id: Id
    plan_id: Annotated[LongId, StringConstraints(max_length=LONG_ID_CHARACTERS - 4)]
    """The ids of its tasks, which are ids too, are up to four characters longer."""
    phase: str = "BUILD"
    announce: bool = False
    actor: str = ""
    max_tasks: MaxTasks = MAX_TASKS


class DerivationResult(Model):
    """The tasks of a plan, at least one."""

    story_id: str
    plan_id: str
    tasks: list[PlannedTask]


class StoredPlan(Model):
    """The graph's content for a plan: its tasks, or else its story's text, or neither."""

    tasks: list[PlannedTask] = []
    story: StoryText | None = None
