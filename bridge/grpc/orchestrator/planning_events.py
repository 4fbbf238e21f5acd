"""Planning for the Orchestrator service: it moves stories, runs plans and derives tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from neo4j import AsyncDriver
from temporalio.client import Client
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from activities.graph.activities import Graph
from activities.graph.changes import change
from activities.graph.deliberations import has_story, last_plan
from bridge.grpc.auth import caller
from bridge.grpc.calls import (
    REQUEST_ID,
    Context,
    derived_id,
    said,
    seconds_left,
    summary,
    understood,
)
from bridge.grpc.orchestrator.requests import Happened
from bridge.grpc.planning import known
from bridge.grpc.wire import orchestrator_pb2 as wire
from bridge.plan_runs import require_plan
from workflows.derivation import DerivationWorkflow
from workflows.models.agents import PlannedTask
from workflows.models.error_types import ErrorType, application_error
from workflows.models.errors import InvalidInput
from workflows.models.events import (
    Entry,
    EventBody,
    PlanApproved,
    StoryCreated,
    StorySpec,
    StoryTransitioned,
)
from workflows.models.ids import derivation_workflow_id, plan_workflow_id, story_workflow_id
from workflows.models.plan import DerivationInput, DerivationResult, PlanInput, PlanQuery
from workflows.models.story import Approve, Move, Reject, StoryInput, StoryView
from workflows.plan import PlanWorkflow
from workflows.story import StoryWorkflow
from workflows.stubs import STORY_QUEUE
from workflows.timestamps import iso

STORY_WITHIN_S = 30.0
"""How long a story's workflow has to answer a call that has no deadline."""

DERIVED_WITHIN_S = 600.0
"""How long a plan's derivation has to answer a call that has no deadline."""

LAST_MS = 253_402_300_800_000
"""The end of the year 9999. All times in ms that a timestamp can hold are before it."""

MOVES = {
    "approve_scope": ("PO",),
    "approve_design": ("PO",),
    "qa_passed": ("QA",),
    "docs_ready": ("PO",),
    "reject_design": ("PO",),
    "reject_build": ("PO", "QA"),
    "reject_test": ("PO", "QA"),
    "reject_docs": ("PO",),
}
"""Events of the default state machine and the roles that they need.

The events of a team's own machine come from the story.
"""

PLAN_APPROVED = "plan.approved"
TRANSITION = "TRANSITION"
CASE_CREATED = "CASE_CREATED"
PREFIX = "planning."

CREATORS = ("PO", "OPERATOR", "DEV")
"""The roles that may report a new case."""


class Plans:
    """Stories that planning events move, and plans that are derived and run."""

    def __init__(
        self,
        temporal: Client,
        graph: Graph,
        driver: AsyncDriver,
        deliberation_timeout: timedelta | None = None,
    ) -> None:
        """Serve from Temporal, the graph and Neo4j.

        `deliberation_timeout` applies to each task of a plan that runs here; None means an hour.
        """
        self._temporal = temporal
        self._timeout_s = deliberation_timeout.total_seconds() if deliberation_timeout else None
        self._graph = graph
        self._driver = driver

    async def hear(self, event: Happened, context: Context) -> wire.PlanningEventResponse:
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
            return await self._keep_case(event)
        if name.upper() == TRANSITION:
            return await self._transition(event, context)
        return await self._move(event, name, context)

    async def newest(self, story_id: str) -> str:
        """Return the id of the story's newest plan, or of its first if it has none yet."""
        return await last_plan(self._driver, story_id) or f"{story_id}-plan-1"[:96].strip()

    async def derive(
        self, story_id: str, plan_id: str, announce: bool, context: Context
    ) -> list[PlannedTask]:
        """Return a plan's tasks: the stored ones, or those that are derived once from the story.

        The derivation runs in a workflow, which continues without this call and is joined by the
        next. `announce` publishes tasks that are derived now on the bus.

        Raises:
            ApplicationError: `NotFound`: the story does not exist.
            InvalidInput: names each wrong field.
            WorkflowFailureError: why no tasks were derived.
            TimeoutError: the call's time is over.
        """
        stored = await self._graph.load_plan(PlanQuery(story_id=story_id, plan_id=plan_id))
        if stored.tasks:
            return stored.tasks
        if stored.story is None:
            raise application_error(ErrorType.NOT_FOUND, f"case {story_id} not found")
        request = understood(
            DerivationInput,
            "DeriveSubtasksRequest",
            {"story_id": story_id, "plan_id": plan_id, "announce": announce},
            {"story_id": "case_id"},
        )
        workflow_id = derivation_workflow_id(story_id, plan_id)
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
        handle = self._temporal.get_workflow_handle_for(DerivationWorkflow.run, workflow_id)
        async with asyncio.timeout(seconds_left(context, DERIVED_WITHIN_S)):
            found: DerivationResult = await handle.result()
        return found.tasks

    async def _keep_case(self, event: Happened) -> wire.PlanningEventResponse:
        """Store a case from outside in the graph, without starting a workflow."""
        actor = caller()
        actor.acting_as(*CREATORS)
        story_id, told = event.case_id, event.metadata
        if await self._is_known(story_workflow_id(story_id)):
            words = f"story {story_id} has a workflow already"
        elif await has_story(self._driver, story_id):
            words = f"case {story_id} is known already"
        else:
            text = understood(
                StoryInput,
                "PlanningEventRequest",
                {
                    "story_id": story_id,
                    "title": told.get("title") or story_id,
                    "brief": told.get("description", ""),
                    "created_by": actor.actor,
                },
                {"story_id": "case_id", "title": "metadata.title"},
            )
            when = iso(datetime.now(UTC))
            created = StoryCreated(
                story_id=story_id,
                title=text.title,
                rigor=text.rigor,
                created_by=text.created_by,
                timestamp=when,
            )
            spec = StorySpec(
                story_id=story_id,
                title=text.title,
                brief=text.brief,
                acceptance_criteria=[],
                rigor=text.rigor,
                revision="",
                created_by=text.created_by,
                timestamp=when,
            )
            await self._store(story_id, f"grpc/{story_id}/created", created, spec)
            words = f"case {story_id} is stored"
        return wire.PlanningEventResponse(processed=True, message=words)

    async def _transition(self, event: Happened, context: Context) -> wire.PlanningEventResponse:
        """Make the story's move to `to_state`; if it has no workflow, store the transition.

        Raises:
            ApplicationError: `IllegalMove` names the moves that are legal; others are the
                story's own.
        """
        if not event.to_state:
            raise InvalidInput("PlanningEventRequest", [("to_state", "required; add it")])
        if not await self._is_known(story_workflow_id(event.case_id)):
            return await self._keep_transition(event)
        story = self._temporal.get_workflow_handle_for(
            StoryWorkflow.run, story_workflow_id(event.case_id)
        )
        within = _within(context)
        async with known(event.case_id):
            view = await story.query(StoryWorkflow.state, rpc_timeout=within)
            legal = await story.query(StoryWorkflow.transitions, rpc_timeout=within)
        if view.state == event.to_state and event.from_state != view.state:
            return await self._moved(event, view)
        for move in legal:
            if move.to == event.to_state:
                return await self._move(event, move.event, context)
        targets = ", ".join(f"{move.to} by {move.event}" for move in legal) or "none"
        raise application_error(
            ErrorType.ILLEGAL_MOVE,
            f"to_state: {event.case_id} is in {view.state}, and does not go to "
            f"{event.to_state}; legal now: {targets}",
        )

    async def _keep_transition(self, event: Happened) -> wire.PlanningEventResponse:
        """Store the transition as the inbox does with `planning.story.transitioned`."""
        actor = caller()
        actor.acting_as("PO")
        story_id = event.case_id
        if not await has_story(self._driver, story_id):
            raise application_error(ErrorType.NOT_FOUND, f"case {story_id} not found")
        at = (
            datetime.fromtimestamp(event.timestamp_ms / 1000, UTC)
            if 0 < event.timestamp_ms < LAST_MS
            else datetime.now(UTC)
        )
        body = StoryTransitioned(
            story_id=story_id,
            from_phase=event.from_state or "unknown",
            to_phase=event.to_state,
            event=TRANSITION,
            actor=actor.actor,
            reason=event.metadata.get("reason", ""),
            timestamp=iso(at),
        )
        what = derived_id(event.from_state, event.to_state, body.timestamp)
        await self._store(story_id, f"grpc/{story_id}/{what}", body)
        return wire.PlanningEventResponse(
            processed=True, message=f"case {story_id} has no workflow: its transition is stored"
        )

    async def _move(
        self, event: Happened, name: str, context: Context
    ) -> wire.PlanningEventResponse:
        story = self._temporal.get_workflow_handle_for(
            StoryWorkflow.run, story_workflow_id(event.case_id)
        )
        within = _within(context)
        try:
            async with known(event.case_id):
                view = await story.query(StoryWorkflow.state, rpc_timeout=within)
                legal = await story.query(StoryWorkflow.transitions, rpc_timeout=within)
        except ApplicationError as error:
            if error.type == ErrorType.NOT_FOUND and name not in MOVES:
                return _not_understood(event, [])
            raise
        move = next((each for each in legal if each.event == name), None)
        if move is None and name not in MOVES:
            return _not_understood(event, legal)
        if move and move.kind == "automatic":
            waits = f"; it waits for {', '.join(move.blocked_by)}" if move.blocked_by else ""
            return wire.PlanningEventResponse(
                processed=False, message=f"{name} is taken by the fleet itself{waits}"
            )
        role = caller().acting_as(*(move.roles if move and move.roles else MOVES.get(name, ())))
        _refuse_other_states(event, view, move)
        rejects = move.kind == "rejection" if move else name.startswith("reject_")
        update_id = _update_id(event, context)
        async with known(event.case_id):
            if rejects:
                rejection = _rejection(event, name, role)
                moved = await story.execute_update(
                    StoryWorkflow.reject, rejection, id=update_id, rpc_timeout=within
                )
            else:
                approval = _approval(event, name, role)
                moved = await story.execute_update(
                    StoryWorkflow.approve, approval, id=update_id, rpc_timeout=within
                )
        return await self._moved(event, moved)

    async def _moved(self, event: Happened, view: StoryView) -> wire.PlanningEventResponse:
        tasks = await self._tasks(event.case_id, event.plan_id or view.plan_id)
        return wire.PlanningEventResponse(
            processed=True,
            message=f"story {event.case_id} is in {view.state}",
            derived_task_ids=[task.task_id for task in tasks],
        )

    async def _run(self, event: Happened) -> wire.PlanningEventResponse:
        """Store the approval and run the plan, each once.

        The inbox does the same with `planning.plan.approved`.
        """
        role = caller().acting_as("PO")
        story_id, plan_id = event.case_id, event.plan_id
        if not plan_id:
            raise application_error(
                ErrorType.INVALID_INPUT, "PlanningEventRequest refused. plan_id: required; add it"
            )
        tasks = [task.task_id for task in await self._tasks(story_id, plan_id)]
        if await self._is_known(story_workflow_id(story_id)):
            return wire.PlanningEventResponse(
                processed=False,
                message=f"story {story_id} has a workflow, and runs its plans itself: send "
                "approve_design",
                derived_task_ids=tasks,
            )
        if await self._is_known(plan_workflow_id(story_id, plan_id)):
            await require_plan(self._temporal, story_id, plan_id)
        else:
            run = PlanInput(story_id=story_id, plan_id=plan_id, task_timeout=self._timeout_s)
            await self._store_approval(event)
            with suppress(WorkflowAlreadyStartedError):  # by another call, or from the bus
                await self._temporal.start_workflow(
                    PlanWorkflow.run,
                    run,
                    id=plan_workflow_id(story_id, plan_id),
                    task_queue=STORY_QUEUE,
                    id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                    static_summary=summary(f"plan {plan_id} of {story_id}, approved as {role}"),
                )
        return wire.PlanningEventResponse(
            processed=True,
            message=f"{plan_workflow_id(story_id, plan_id)} runs it",
            derived_task_ids=tasks,
        )

    async def _store_approval(self, event: Happened) -> None:
        body = PlanApproved(
            story_id=event.case_id,
            plan_id=event.plan_id,
            approved_by=caller().actor,
            timestamp=iso(datetime.now(UTC)),
        )
        entry_id = f"grpc/{plan_workflow_id(event.case_id, event.plan_id)}/approved"
        await self._store(event.case_id, entry_id, body)

    async def _store(self, story_id: str, entry_id: str, *bodies: EventBody) -> None:
        """Store events in the graph in the form of entries of a story's outbox."""
        now_ms = int(datetime.now(UTC).timestamp() * 1000)
        entries = [
            Entry(
                id=entry_id if number == 1 else f"{entry_id}/{number}",
                kind=type(body).__name__,
                subject=body.SUBJECT,
                source="/grpc/orchestrator",
                story_id=story_id,
                time=body.timestamp,
                body=body.model_dump(mode="json"),
            )
            for number, body in enumerate(bodies, start=1)
        ]
        await self._graph.store(
            [change(entry, now_ms, number) for number, entry in enumerate(entries, start=1)]
        )

    async def _is_known(self, workflow_id: str) -> bool:
        try:
            await self._temporal.get_workflow_handle(workflow_id).describe()
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            return False
        return True

    async def _tasks(self, story_id: str, plan_id: str) -> list[PlannedTask]:
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


def _within(context: Context) -> timedelta:
    """Return how long a story's workflow has to answer."""
    return timedelta(seconds=max(seconds_left(context, STORY_WITHIN_S), 0.001))


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


def _rejection(event: Happened, name: str, role: str) -> Reject:
    return understood(
        Reject,
        "PlanningEventRequest",
        {
            "event": name,
            "actor": caller().actor,
            "role": role,
            "reason": event.metadata.get("reason", ""),
        },
        {"reason": "metadata.reason"},
    )


def _approval(event: Happened, name: str, role: str) -> Approve:
    return understood(
        Approve,
        "PlanningEventRequest",
        {
            "gate": name,
            "actor": caller().actor,
            "role": role,
            "comment": event.metadata.get("comment", ""),
            "revision": event.metadata.get("revision") or None,
        },
        {"comment": "metadata.comment", "revision": "metadata.revision"},
    )


def _update_id(event: Happened, context: Context) -> str | None:
    """Return an update id by which a caller's repeated request is applied once.

    Returns:
        The id; None if the call has no `x-request-id`.
    """
    given = said(context).get(REQUEST_ID, "")
    return f"grpc-{derived_id(caller().actor, given, event.event_type)}" if given else None


def _not_understood(event: Happened, legal: Sequence[Move]) -> wire.PlanningEventResponse:
    moves = dict.fromkeys([*(move.event for move in legal), *MOVES])
    events = [*moves, PREFIX + PLAN_APPROVED, TRANSITION, CASE_CREATED]
    return wire.PlanningEventResponse(
        processed=False,
        message=f"{event.event_type[:100]} is not understood; understood are {', '.join(events)}",
    )


def _refuse_other_states(event: Happened, view: StoryView, move: Move | None) -> None:
    """Refuse an event that describes a different move than the story would make."""
    if event.from_state and event.from_state != view.state:
        raise application_error(
            ErrorType.ILLEGAL_MOVE,
            f"from_state: {event.from_state}, but {event.case_id} is in {view.state}",
        )
    if move and event.to_state and event.to_state != move.to:
        raise application_error(
            ErrorType.ILLEGAL_MOVE, f"to_state: {event.to_state}, but {move.event} is to {move.to}"
        )
