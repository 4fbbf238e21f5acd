"""Deliberations that calls start, join, wait for, follow and leave, and results of old ones.

`bridge.grpc.orchestrator.messages` formats results and histories; this module gets them.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from neo4j import AsyncDriver
from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import (
    Client,
    WorkflowExecutionDescription,
    WorkflowExecutionStatus,
    WorkflowFailureError,
    WorkflowHandle,
)
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError
from temporalio.service import RPCError

from activities.graph.activities import Graph
from activities.graph.deliberations import find_ended, history
from activities.graph.scopes import scopes_for
from bridge.executions import find_execution, summary
from bridge.grpc.auth import caller
from bridge.grpc.calls import REQUEST_ID, Context, call_metadata, derived_id, seconds_left
from bridge.grpc.errors import status_of
from bridge.grpc.limits import Limits
from bridge.grpc.orchestrator.messages import Updates, result_metadata, results
from bridge.grpc.orchestrator.metrics import CALLED
from bridge.grpc.orchestrator.requests import TIMELINE_EVENTS, Deliberating
from bridge.grpc.roles import require_story_role
from bridge.grpc.wire import orchestrator_pb2 as pb
from workflows.deliberation import DeliberationWorkflow
from workflows.models.agents import CouncilQuery
from workflows.models.context import PackQuery
from workflows.models.deliberation import DeliberationInput, DeliberationResult
from workflows.models.errors import ErrorType, InvalidInput, application_error
from workflows.models.ids import called_deliberation_workflow_id, deliberation_workflow_id
from workflows.stubs import STORY_QUEUE

PHASE: str = DeliberationInput.model_fields["phase"].default
DEFAULT_TIMEOUT = timedelta(seconds=300)

TASK_ID = "x-task-id"
AGENTS = "x-agents"
"""Trailing metadata: `3 of 5`, if more agents were requested than the council has."""

ORCHESTRATED = "task-"
"""Prefix of the task ids that Orchestrate makes."""

Deliberation = WorkflowHandle[DeliberationWorkflow, DeliberationResult]


@dataclass
class Call:
    """A call that waits for a deliberation.

    `own`: no other call can wait for it. `agents`: see AGENTS; empty if as many agents deliberate
    as requested.
    """

    handle: Deliberation
    rounds: int
    own: bool
    agents: str = ""
    answered: bool = False


class Deliberations:
    """The deliberations of this service's calls, cancelled when their calls end early."""

    def __init__(
        self,
        temporal: Client,
        graph: Graph,
        driver: AsyncDriver,
        limits: Limits,
        timeout: timedelta | None = None,
    ) -> None:
        """Serve from Temporal, the graph and Neo4j, within the limits.

        `timeout` applies to a deliberation whose caller names none; None means DEFAULT_TIMEOUT.
        """
        self._timeout_s = (timeout or DEFAULT_TIMEOUT).total_seconds()
        self._temporal = temporal
        self._graph = graph
        self._driver = driver
        self._limits = limits
        self._leaving: set[asyncio.Task[None]] = set()

    async def begin(self, parsed: Deliberating, context: Context, prefix: str = CALLED) -> Call:
        """Start the deliberation or join it; it lasts at most until the call's deadline.

        Its task_id is sent at once, in the initial metadata TASK_ID. If the call ends before it is
        answered, a deliberation for which only this call waits is cancelled. If the council has
        fewer agents than requested, all of them take part; if it has more than the limit allows,
        as many as it allows. `prefix` begins the task's id if the request has none.

        Raises:
            ApplicationError: `UnknownCouncil` names the existing roles; `Permission`: the story has
                a workflow, and the token no role on it; `QuotaUsed`.
            InvalidInput: `context_options` without a story, or more agents or rounds than the
                limits allow.
        """
        self._limits.require_fits(
            "OrchestrateRequest" if prefix == ORCHESTRATED else "DeliberateRequest",
            {"num_agents": parsed.num_agents},
            {
                "rounds": parsed.rounds,
                "options.deliberation_rounds": parsed.options.deliberation_rounds,
            },
        )
        story_id = parsed.story_id or parsed.case_id
        await require_story_role(self._temporal, caller(), story_id)
        council = await self._graph.load_council(CouncilQuery(role=parsed.role))
        seats = len(council.agents)
        agents = f"{seats} of {parsed.num_agents}" if parsed.num_agents > seats else ""
        if agents:
            context.set_trailing_metadata(((AGENTS, agents),))
        given = call_metadata(context).get(REQUEST_ID, "")
        own = not (parsed.task_id or given)
        task_id = parsed.task_id or prefix + _task_id(parsed, given)
        rounds = parsed.rounds or parsed.options.deliberation_rounds or council.rounds or 1
        if not parsed.options.peer_review:
            rounds = 0
        if parsed.constraints.max_iterations:
            rounds = min(rounds, parsed.constraints.max_iterations)
        rounds = min(rounds, self._limits.rounds)
        most = min(seats, self._limits.agents)
        size = min(parsed.num_agents or most, most)
        actor, workflow_id = caller().actor, called_deliberation_workflow_id(task_id)
        await self._limits.require_tokens(self._temporal, actor, workflow_id)
        wanted = parsed.constraints.timeout_seconds or self._timeout_s
        timeout = min(wanted, seconds_left(context, wanted))
        task = DeliberationInput(
            task_id=task_id,
            story_id=story_id or None,
            role=parsed.role,
            description=parsed.task_description,
            rubric=parsed.constraints.rubric,
            requirements=parsed.constraints.requirements,
            rounds=rounds,
            agents=size if size < seats else None,
            timeout=max(timeout, 0.001),
            plan_id=parsed.plan_id,
            judged=parsed.options.architect_selection,
            background=await self._background(parsed),
            actor=actor,
        )
        call = Call(self._handle(workflow_id), rounds, own, agents)
        starting = asyncio.ensure_future(self._start(task))

        def ended(_: Context) -> None:
            self._leave(call, starting)

        context.add_done_callback(ended)  # type: ignore[arg-type]  # the stubs accept no function
        await asyncio.shield(starting)
        await context.send_initial_metadata(((TASK_ID, task_id),))
        return call

    async def result(self, call: Call) -> DeliberationResult:
        """Wait for the result.

        Raises:
            WorkflowFailureError: the deliberation failed.
        """
        try:
            return await call.handle.result()
        finally:
            # Not if the call itself was cancelled: `_leave` then handles its deliberation.
            task = asyncio.current_task()
            call.answered = not (task and task.cancelling())

    async def updates(self, call: Call) -> AsyncIterator[pb.DeliberationUpdate]:
        """Yield an update for each wave and answer from the beginning; the last has the winner.

        Raises:
            WorkflowFailureError: as `result`.
        """
        updates = Updates(call.rounds)
        yield updates.accepted()
        async for event in call.handle.fetch_history_events(wait_new_event=True):
            for update in updates.read(event, await self._summary(event)):
                yield update
        yield updates.complete(await self.result(call))

    async def find(self, task_id: str) -> pb.GetDeliberationResultResponse:
        """Return a task's deliberation from Temporal, or from the graph after Temporal's retention.

        If the fleet itself deliberated on a task of this id, its deliberation is returned, and not
        that of a caller who used the same id.

        Raises:
            ApplicationError: `NotFound`: neither knows it.
        """
        for workflow_id in (
            deliberation_workflow_id(task_id),
            called_deliberation_workflow_id(task_id),
        ):
            handle = self._handle(workflow_id)
            if described := await find_execution(self._temporal, workflow_id):
                return await _answer_from_run(task_id, handle, described)
            if recorded := await self._recorded(task_id, workflow_id):
                return recorded
        raise application_error(ErrorType.NOT_FOUND, f"deliberation of task {task_id} not found")

    async def _background(self, parsed: Deliberating) -> str:
        """Return the text after each context pack: the caller's notes and `context_options`."""
        wanted = parsed.context_options.wanted
        story_id = parsed.story_id or parsed.case_id
        if wanted and not story_id:
            rule = "need a story_id or case_id; name one, or leave them out"
            raise InvalidInput("OrchestrateRequest", [("context_options", rule)])
        there = scopes_for(self._graph.scopes, parsed.role, PHASE)
        past = await history(
            self._driver,
            PackQuery(story_id=story_id, role=parsed.role, phase=PHASE, subtask_id=parsed.task_id),
            [scope for scope in wanted if scope not in there],
            parsed.context_options.max_events or TIMELINE_EVENTS,
        )
        return "\n\n".join(filter(None, (parsed.constraints.notes, past)))

    def _handle(self, workflow_id: str) -> Deliberation:
        return self._temporal.get_workflow_handle_for(DeliberationWorkflow.run, workflow_id)

    async def _start(self, task: DeliberationInput) -> None:
        """Start the workflow, unless it is running or was completed."""
        with suppress(WorkflowAlreadyStartedError):
            await self._temporal.start_workflow(
                DeliberationWorkflow.run,
                task,
                id=called_deliberation_workflow_id(task.task_id),
                task_queue=STORY_QUEUE,
                id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
                id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE_FAILED_ONLY,
                static_summary=summary(f"{task.role}: {task.description}"),
            )

    def _leave(self, call: Call, starting: asyncio.Future[None]) -> None:
        """Cancel the deliberation of a call that has ended, if no other call can wait for it."""
        if call.answered or not call.own:
            return

        async def cancel() -> None:
            with suppress(RPCError):  # it has ended, or was never started
                await starting
                await call.handle.cancel()

        leaving = asyncio.get_running_loop().create_task(cancel())
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    async def _summary(self, event: HistoryEvent) -> str:
        """Return the text of an activity's summary; empty if it has none."""
        if not event.user_metadata.HasField("summary"):
            return ""
        (summary,) = await self._temporal.data_converter.decode(
            [event.user_metadata.summary], [str]
        )
        return str(summary)

    async def _recorded(
        self, task_id: str, deliberation_id: str
    ) -> pb.GetDeliberationResultResponse | None:
        """Return a deliberation from the graph; None if the graph does not have it."""
        ended = await find_ended(self._driver, deliberation_id)
        if ended is None:
            return None
        found = ended.result
        if found.status == "completed":
            return _completed(task_id, found, ended.ended_ms)
        late = ended.error_type == ErrorType.DELIBERATION_TIMEOUT
        return pb.GetDeliberationResultResponse(
            task_id=task_id,
            status=pb.DELIBERATION_STATUS_TIMEOUT if late else pb.DELIBERATION_STATUS_FAILED,
            error_message=found.error,
            duration_ms=found.duration_ms,
            metadata=result_metadata(found, deliberation_id, ended.ended_ms),
        )


def _task_id(parsed: Deliberating, request_id: str) -> str:
    """Return a task id for this request of this caller.

    It is derived from the caller, the request id and the request. Without a request id, it is new.
    """
    if not request_id:
        return uuid.uuid4().hex
    return derived_id(caller().actor, request_id, parsed.model_dump_json())


async def _answer_from_run(
    task_id: str, handle: Deliberation, described: WorkflowExecutionDescription
) -> pb.GetDeliberationResultResponse:
    """Build the answer from what Temporal knows of a deliberation."""
    status = described.status or WorkflowExecutionStatus.RUNNING
    answer = pb.GetDeliberationResultResponse(
        task_id=task_id,
        status="DELIBERATION_STATUS_IN_PROGRESS",
        metadata=pb.OrchestratorMetadata(execution_id=described.id, tags={"task_id": task_id}),
    )
    if status in (WorkflowExecutionStatus.RUNNING, WorkflowExecutionStatus.CONTINUED_AS_NEW):
        return answer
    ended = described.close_time or datetime.now(UTC)
    ended_ms = int(ended.timestamp() * 1000)
    try:
        return _completed(task_id, await handle.result(), ended_ms)
    except WorkflowFailureError as error:
        cause = error.cause
        late = isinstance(cause, ApplicationError) and cause.type == ErrorType.DELIBERATION_TIMEOUT
        late = late or status == WorkflowExecutionStatus.TIMED_OUT
        answer.status = pb.DELIBERATION_STATUS_TIMEOUT if late else pb.DELIBERATION_STATUS_FAILED
        words = status_of(error).message
        answer.error_message = words if isinstance(cause, ApplicationError) else str(cause)
        answer.duration_ms = int((ended - described.start_time).total_seconds() * 1000)
        failed = _failure(error)
        if failed:
            answer.metadata.CopyFrom(result_metadata(failed, described.id, ended_ms))
        return answer


def _failure(error: WorkflowFailureError) -> DeliberationResult | None:
    """Return the partial result of a failed deliberation, if its error has one."""
    cause = error.cause
    if isinstance(cause, ApplicationError) and cause.details:
        return DeliberationResult.model_validate(cause.details[0])
    return None


def _completed(
    task_id: str, found: DeliberationResult, ended_ms: int
) -> pb.GetDeliberationResultResponse:
    return pb.GetDeliberationResultResponse(
        task_id=task_id,
        status="DELIBERATION_STATUS_COMPLETED",
        results=results(found),
        winner_id=found.winner_id,
        duration_ms=found.duration_ms,
        metadata=result_metadata(found, found.deliberation_id, ended_ms),
    )
