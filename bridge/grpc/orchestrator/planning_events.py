"""Planning for the Orchestrator service: it moves stories, runs plans and derives tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial

from neo4j import AsyncDriver
from temporalio.client import Client
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError

from activities.graph.activities import Graph
from activities.graph.changes import change
from activities.graph.deliberations import last_plan
from bridge.executions import find_execution, summary
from bridge.grpc.auth import caller
from bridge.grpc.calls import (
    Context,
    in_time,
    move_update_id,
    named,
    parse_request,
    seconds_left,
)
from bridge.grpc.context.messages import created
from bridge.grpc.context.requests import PhaseFields, require_time
from bridge.grpc.context.updates import Updates
from bridge.grpc.limits import Limits
from bridge.grpc.orchestrator.requests import PlanningEvent
from bridge.grpc.roles import PO, STARTERS, require_story_role
from bridge.grpc.wire import orchestrator_pb2 as pb
from bridge.plan_runs import run_approved_plan
from bridge.story_moves import Position, Remarks, move
from workflows.derivation import DerivationWorkflow
from workflows.models.agents import PlannedTask
from workflows.models.context import PhaseChange
from workflows.models.entries import Entry
from workflows.models.errors import ErrorType, InvalidInput, application_error
from workflows.models.events import PlanApproved
from workflows.models.ids import (
    derivation_workflow_id,
    numbered_plan_id,
    plan_workflow_id,
    story_workflow_id,
)
from workflows.models.plan import DerivationInput, DerivationResult, PlanInput, PlanQuery
from workflows.models.readiness import StoryText
from workflows.models.story import Move, StoryInput
from workflows.stubs import STORY_QUEUE
from workflows.timestamps import format_timestamp

STORY_WITHIN_S = 30.0
"""How long a story's workflow has to answer a call that has no deadline."""

DERIVED_WITHIN_S = 600.0
"""How long a plan's derivation has to answer a call that has no deadline."""

PHASE_FIELDS = {
    "story_id": "case_id",
    "from_phase": "from_state",
    "to_phase": "to_state",
    "rationale": "metadata.reason",
}
"""Field of PhaseFields -> the request's field that has it."""

REMARK_KEYS = {name: f"metadata.{name}" for name in Remarks._fields}
"""Field of a move's remarks -> the request's field that has it."""

CASE_KEYS = {name: f"metadata.{name}" for name in ("title", "description")}
"""Field of a case's payload -> the request's field that has it."""

PLAN_APPROVED = "plan.approved"
TRANSITION = "TRANSITION"
CASE_CREATED = "CASE_CREATED"
PREFIX = "planning."


class Plans:
    """Stories that planning events move, and plans that are derived and run."""

    def __init__(
        self,
        temporal: Client,
        graph: Graph,
        driver: AsyncDriver,
        limits: Limits,
        deliberation_timeout: timedelta | None = None,
    ) -> None:
        """Serve from Temporal, the graph and Neo4j.

        `deliberation_timeout` applies to each task of a plan that runs here; None means an hour.
        """
        self._temporal = temporal
        self._timeout_s = deliberation_timeout.total_seconds() if deliberation_timeout else None
        self._graph = graph
        self._driver = driver
        self._limits = limits
        self._updates = Updates(temporal)

    async def handle_planning_event(
        self, event: PlanningEvent, context: Context
    ) -> pb.PlanningEventResponse:
        """Move the event's story as the caller, or run a plan that was approved outside.

        Raises:
            ApplicationError: `Permission`; `NotFound`; `StoryUnreadable`; `IllegalMove`: the event
                describes a different move than the story would make, or the story has ended;
                `InvalidInput`, by field.
            WorkflowUpdateFailedError: the story refuses, with the reason.
        """
        name = event.event_type.removeprefix(PREFIX)
        if name == PLAN_APPROVED:
            return await self._run(event)
        if name.upper() == CASE_CREATED:
            return await self._keep_case(event, context)
        if name.upper() == TRANSITION:
            return await self._transition(event, context)
        if "." in name:  # no event of a state machine has a dot in its name
            return _invalid(event)
        return await self._move(event, partial(_named_move, event, name), context)

    async def newest(self, story_id: str) -> str:
        """Return the id of the story's newest plan, or of its first if it has none yet."""
        return await last_plan(self._driver, story_id) or numbered_plan_id(story_id, 1)

    async def derive(
        self, story_id: str, plan_id: str, announce: bool, context: Context
    ) -> list[PlannedTask]:
        """Return a plan's tasks: the stored ones, or those that are derived once from the story.

        The derivation runs in a workflow, which continues without this call and is joined by the
        next. `announce` publishes tasks that are derived now on the bus.

        Raises:
            ApplicationError: `NotFound`: the story does not exist; `Permission`: it has a workflow,
                and the token no role on it; `QuotaUsed`.
            InvalidInput: names each wrong field.
            WorkflowFailureError: why no tasks were derived.
            TimeoutError: the call's time is over.
        """
        await require_story_role(self._temporal, caller(), story_id)
        stored = await self._graph.load_plan(PlanQuery(story_id=story_id, plan_id=plan_id))
        if stored.tasks:
            return stored.tasks
        if stored.story is None:
            raise application_error(ErrorType.NOT_FOUND, f"case {story_id} not found")
        request = parse_request(
            DerivationInput,
            "DeriveSubtasksRequest",
            {
                "story_id": story_id,
                "plan_id": plan_id,
                "announce": announce,
                "actor": caller().actor,
                "max_tasks": self._limits.max_tasks,
            },
            {"story_id": "case_id"},
        )
        workflow_id = derivation_workflow_id(story_id, plan_id)
        await self._limits.require_tokens(self._temporal, caller().actor, workflow_id)
        with suppress(WorkflowAlreadyStartedError):
            await self._temporal.start_workflow(
                DerivationWorkflow.run,
                request,
                id=workflow_id,
                task_queue=STORY_QUEUE,
                id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
                id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE_FAILED_ONLY,
                static_summary=summary(f"tasks of {plan_id}: {stored.story.title}"),
            )
        handle = self._temporal.get_workflow_handle(workflow_id, result_type=DerivationResult)
        async with asyncio.timeout(seconds_left(context, DERIVED_WITHIN_S)):
            found: DerivationResult = await handle.result()
        return found.tasks

    async def _keep_case(self, event: PlanningEvent, context: Context) -> pb.PlanningEventResponse:
        """Store a case from outside, without starting a workflow for the story."""
        actor = caller()
        actor.require_role(*STARTERS)
        story_id, metadata = event.case_id, event.metadata
        if await find_execution(self._temporal, story_workflow_id(story_id)):
            words = f"story {story_id} has a workflow already"
        else:
            text = parse_request(
                StoryInput,
                "PlanningEventRequest",
                {
                    "story_id": story_id,
                    "title": metadata.get("title") or story_id,
                    "brief": metadata.get("description", ""),
                    "created_by": actor.actor,
                },
                {"story_id": "case_id", **CASE_KEYS},
            )
            with named("PlanningEventRequest", {"brief": "metadata.description"}):
                StoryText(title=text.title, brief=text.brief).require_fits(
                    "PlanningEventRequest", self._limits.text_bytes
                )
            payload = {"title": text.title, "description": text.brief, "rigor": text.rigor}
            new = created("CASE", story_id, payload, "recorded without a workflow")
            answer = await self._updates.change(
                context, "PlanningEventRequest", story_id, new, names=CASE_KEYS, if_absent=True
            )
            words = f"case {story_id} is {'stored' if answer.changed else 'known already'}"
        return pb.PlanningEventResponse(processed=True, message=words)

    async def _transition(self, event: PlanningEvent, context: Context) -> pb.PlanningEventResponse:
        """Make the story's move to `to_state`; if it has no workflow, store the transition.

        Raises:
            ApplicationError: `IllegalMove` names the moves that are legal; others are the
                story's own.
        """
        if not event.to_state:
            raise InvalidInput("PlanningEventRequest", [("to_state", "required; add it")])
        if not await find_execution(self._temporal, story_workflow_id(event.case_id)):
            return await self._keep_transition(event, context)
        return await self._move(event, partial(_move_to_state, event), context)

    async def _keep_transition(
        self, event: PlanningEvent, context: Context
    ) -> pb.PlanningEventResponse:
        """Store and publish the transition of a story without a workflow.

        Raises:
            InvalidInput: names each wrong field.
            ApplicationError: as `Updates.transition`.
        """
        caller().require_role(PO)
        moved = parse_request(
            PhaseFields,
            "PlanningEventRequest",
            {
                "story_id": event.case_id,
                "from_phase": event.from_state or "UNKNOWN",
                "to_phase": event.to_state,
                "rationale": event.metadata.get("reason", ""),
            },
            PHASE_FIELDS,
        )
        phases = PhaseChange(
            from_phase=moved.from_phase,
            to_phase=moved.to_phase,
            event=TRANSITION,
            reason=moved.rationale,
            via="token",
        )
        at = ""
        if event.timestamp_ms:
            at = format_timestamp(datetime.fromtimestamp(event.timestamp_ms / 1000, UTC))
            with named("PlanningEventRequest", {"timestamp": "timestamp_ms"}):
                require_time(at)
        await self._updates.transition(
            context, "PlanningEventRequest", event.case_id, phases, "to_state", at
        )
        return pb.PlanningEventResponse(
            processed=True,
            message=f"case {event.case_id} has no workflow: its transition is stored",
        )

    async def _move(
        self, event: PlanningEvent, choose: Callable[[Position], Move | None], context: Context
    ) -> pb.PlanningEventResponse:
        remarks = Remarks(
            reason=event.metadata.get("reason", ""),
            comment=event.metadata.get("comment", ""),
            revision=event.metadata.get("revision"),
        )
        with named("PlanningEventRequest", REMARK_KEYS):
            async with in_time(context, STORY_WITHIN_S):
                view = await move(
                    self._temporal,
                    event.case_id,
                    choose,
                    caller(),
                    remarks,
                    move_update_id(context),
                )
        tasks = await self.stored_tasks(event.case_id, event.plan_id or view.plan_id)
        return pb.PlanningEventResponse(
            processed=True,
            message=f"story {event.case_id} is in {view.state}",
            derived_task_ids=[task.task_id for task in tasks],
        )

    async def _run(self, event: PlanningEvent) -> pb.PlanningEventResponse:
        """Store the approval and run the plan, each once."""
        role = caller().require_role(PO)
        story_id, plan_id = event.case_id, event.plan_id
        if not plan_id:
            raise InvalidInput("PlanningEventRequest", [("plan_id", "required; add it")])
        plan = PlanInput(
            story_id=story_id,
            plan_id=plan_id,
            task_timeout=self._timeout_s,
            max_tasks=self._limits.max_tasks,
        )
        runs = await run_approved_plan(
            self._temporal, plan, f"as {role}", partial(self._store_approval, event)
        )
        tasks = await self.stored_tasks(story_id, plan_id)
        return pb.PlanningEventResponse(
            processed=runs,
            message=f"{plan_workflow_id(story_id, plan_id)} runs it"
            if runs
            else f"story {story_id} has a workflow, and runs its plans itself: send the event of "
            "the gate at which it waits",
            derived_task_ids=[task.task_id for task in tasks],
        )

    async def _store_approval(self, event: PlanningEvent) -> None:
        body = PlanApproved(
            story_id=event.case_id,
            plan_id=event.plan_id,
            approved_by=caller().actor,
            via="token",
            timestamp=format_timestamp(datetime.now(UTC)),
        )
        entry = Entry(
            id=f"grpc/{plan_workflow_id(event.case_id, event.plan_id)}/approved",
            kind=type(body).__name__,
            subject=body.SUBJECT,
            source="/grpc/orchestrator",
            story_id=event.case_id,
            time=body.timestamp,
            body=body.model_dump(mode="json"),
        )
        now_ms = int(datetime.now(UTC).timestamp() * 1000)
        await self._graph.store([change(entry, now_ms, 1)])

    async def stored_tasks(self, story_id: str, plan_id: str) -> list[PlannedTask]:
        """Return the tasks of a plan that has been derived; none if it has not been."""
        if not plan_id:
            return []
        return (await self._graph.load_plan(PlanQuery(story_id=story_id, plan_id=plan_id))).tasks


def refuse_more(tasks: Sequence[PlannedTask], most: int) -> None:
    """Refuse a plan with more than `most` tasks for one role; 0 means no limit.

    Raises:
        ApplicationError: `InvalidPlan`: a role has more.
    """
    for role in sorted({task.role for task in tasks}):
        number = sum(task.role == role for task in tasks)
        if most and number > most:
            raise application_error(
                ErrorType.INVALID_PLAN,
                f"max_tasks_per_role: the plan has {number} tasks for {role}, at most {most} were "
                "asked for; ask for more, or derive a new plan",
            )


def in_waves(tasks: Sequence[PlannedTask]) -> list[PlannedTask]:
    """Sort tasks into groups that may run at once, starting with those without dependencies."""
    left, done, waves = list(tasks), set[str](), list[PlannedTask]()
    ids = {task.task_id for task in tasks}
    while left:
        wave = [task for task in left if not (ids.intersection(task.depends_on) - done)]
        wave = wave or left  # a cycle that another system wrote to the graph
        waves += wave
        done |= {task.task_id for task in wave}
        left = [task for task in left if task.task_id not in done]
    return waves


def _named_move(event: PlanningEvent, name: str, now: Position) -> Move:
    """Return the move with that name; refuse an event that describes a different move."""
    if event.from_state and event.from_state != now.view.state:
        raise application_error(
            ErrorType.ILLEGAL_MOVE,
            f"from_state: {event.from_state}, but {event.case_id} is in {now.view.state}",
        )
    found = now.by_event(name)
    if event.to_state and event.to_state != found.to:
        raise application_error(
            ErrorType.ILLEGAL_MOVE,
            f"to_state: {event.to_state}, but {found.event} is to {found.to}",
        )
    return found


def _move_to_state(event: PlanningEvent, now: Position) -> Move | None:
    """Return the move to the event's state; None if the story is in that state already."""
    if now.view.state == event.to_state and event.from_state != event.to_state:
        return None
    return now.between(event.from_state or now.view.state, event.to_state, caller().roles)


def _invalid(event: PlanningEvent) -> pb.PlanningEventResponse:
    return pb.PlanningEventResponse(
        processed=False,
        message=f"{event.event_type[:100]} is not understood; understood are the events of the "
        f"story's state machine, {PREFIX}{PLAN_APPROVED}, {TRANSITION}, {CASE_CREATED}",
    )
