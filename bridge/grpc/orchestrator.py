"""The Orchestrator service (orchestrator.v1): councils deliberate, plans are derived, events heard.

What the contract has no field for comes as metadata: `x-request-id` (Deliberate,
StreamDeliberation, Orchestrate without a task_id: the same id and request from the same caller is
the same deliberation). A deliberation's task_id goes out at once, in the initial metadata
`x-task-id`: who loses the call asks GetDeliberationResult for it.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

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
from temporalio.service import RPCError, RPCStatusCode

from activities.context import Scope, count_tokens
from activities.graph import Graph
from activities.graph.councils import (
    NewAgent,
    NewCouncil,
    StandingAgent,
    StandingCouncil,
    council_id,
    create_council,
    find_councils,
    register_agent,
    unregister_agent,
)
from activities.graph.deliberations import find_deliberation, history, last_plan
from activities.graph.statements import change
from bridge.grpc import figures
from bridge.grpc.access import caller
from bridge.grpc.calls import REQUEST_ID, Context, derived_id, said, seconds_left, understood
from bridge.grpc.deliberations import Updates, metadata, results
from bridge.grpc.errors import NOT_FOUND, refused, status_of
from bridge.grpc.figures import Figures, mean, of_role, percentile, since
from bridge.grpc.orchestrator_requests import (
    ByTask,
    Creating,
    Deliberating,
    Deriving,
    Happened,
    Measuring,
    OfOwner,
    Registering,
    TaskContext,
    Unregistering,
)
from bridge.grpc.planning import known
from bridge.grpc.wire import orchestrator_pb2 as wire
from bridge.grpc.wire import orchestrator_pb2_grpc
from workflows.clock import iso
from workflows.deliberation import TIMED_OUT, DeliberationWorkflow
from workflows.derivation import DerivationWorkflow
from workflows.events import Entry, PlanApproved
from workflows.models import (
    AgentType,
    Approve,
    CouncilQuery,
    DeliberationInput,
    DeliberationResult,
    DerivationInput,
    DerivationResult,
    Move,
    PackQuery,
    PlanInput,
    PlannedTask,
    PlanQuery,
    Reject,
    StoryView,
    content_hash,
    deliberation_workflow_id,
    derivation_workflow_id,
    plan_workflow_id,
    story_workflow_id,
)
from workflows.plan import PlanWorkflow
from workflows.story import StoryWorkflow
from workflows.story_state import ILLEGAL_MOVE
from workflows.stubs import STORY_QUEUE

COUNCIL_ROLES = ("OPERATOR", "PO")
"""Who may change councils: those who run the fleet, or the product's owner."""

DEFAULT_AGENTS = 3
DEFAULT_TIMEOUT_S = 300
SUMMARY_BYTES = 200

TASK_ID = "x-task-id"
ORCHESTRATED = "task-"
"""Begins the task ids that Orchestrate makes."""

STORY_WITHIN_S = 30.0
"""How long a story's workflow, or a plan's derivation, has to answer where no deadline is given."""

DERIVED_WITHIN_S = 600.0

TIMELINE_EVENTS = 50

READ = frozenset(OfOwner.model_fields)
"""Of an agent's metadata; all else is kept."""

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
"""Events of the machine that ships, and the roles they ask for; a team's own are the story's."""

PLAN_APPROVED = "plan.approved"
PREFIX = "planning."

Deliberation = WorkflowHandle[DeliberationWorkflow, DeliberationResult]


@dataclass
class Call:
    """A call that waits for a deliberation. own: nobody else can wait for it."""

    handle: Deliberation
    rounds: int
    own: bool
    answered: bool = False


class OrchestratorServicer(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """Deliberations, councils, plans and figures, as Temporal and the graph have them.

    Any valid token may deliberate and read. Its roles say which gates it opens, and whether it may
    change councils (COUNCIL_ROLES).
    """

    def __init__(
        self, temporal: Client, graph: Graph, driver: AsyncDriver, agent_type: AgentType
    ) -> None:
        """agent_type: of agents for whom nobody names one."""
        self._temporal = temporal
        self._graph = graph
        self._driver = driver
        self._agent_type = agent_type
        self._figures = Figures(temporal)
        self._leaving: set[asyncio.Task[None]] = set()

    # --- deliberations --------------------------------------------------------------------------

    async def Deliberate(  # noqa: N802
        self, request: wire.DeliberateRequest, context: Context
    ) -> wire.DeliberateResponse:
        """Wait for a new deliberation's result.

        A call that ends before takes its deliberation with it, unless it has an `x-request-id`.

        Raises:
            ApplicationError: `InvalidInput`; `UnknownCouncil` names the roles there are;
                `CouncilTooSmall`; what the deliberation failed of.
        """
        call = await self._begin(_deliberating("DeliberateRequest", request), context)
        found = await self._result(call)
        return wire.DeliberateResponse(
            results=results(found),
            winner_id=found.winner_id,
            duration_ms=found.duration_ms,
            metadata=metadata(found, found.deliberation_id, _now_ms()),
        )

    async def Orchestrate(  # noqa: N802
        self, request: wire.OrchestrateRequest, context: Context
    ) -> wire.OrchestrateResponse:
        """Deliberate on a task and select; tags.judged is the architect's reason for a near tie.

        A task_id that has been deliberated, or is, is joined: its result is the answer. One that
        failed is begun anew. Proposals are always reviewed and near ties always judged, so
        `enable_peer_review` and `enable_architect_selection` say nothing; the context comes by role
        and phase, not by `context_options`.

        Raises:
            ApplicationError: as Deliberate.
        """
        call = await self._begin(_orchestrating(request), context, ORCHESTRATED)
        found = await self._result(call)
        ranked = results(found)
        return wire.OrchestrateResponse(
            winner=ranked[0],
            candidates=ranked,
            execution_id=found.deliberation_id,
            duration_ms=found.duration_ms,
            metadata=metadata(found, found.deliberation_id, _now_ms()),
        )

    async def StreamDeliberation(  # noqa: N802
        self, request: wire.DeliberateRequest, context: Context
    ) -> AsyncIterator[wire.DeliberationUpdate]:
        """As Deliberate, with an update at each wave and each answer; the last has the winner.

        With an `x-request-id` it can be called again, on any replica, and tells all from the
        beginning.

        Raises:
            ApplicationError: as Deliberate.
        """
        call = await self._begin(_deliberating("DeliberateRequest", request), context)
        updates = Updates(call.rounds)
        yield updates.accepted()
        async for event in call.handle.fetch_history_events(wait_new_event=True):
            for update in updates.read(event, await self._summary(event)):
                yield update
        yield updates.complete(await self._result(call))

    async def GetDeliberationResult(  # noqa: N802
        self, request: wire.GetDeliberationResultRequest, context: Context
    ) -> wire.GetDeliberationResultResponse:
        """A task's deliberation: from Temporal, and once that has forgotten it, from the graph.

        What the graph does not keep (see `find_deliberation`) is missing then.

        Raises:
            ApplicationError: `NotFound`.
        """
        task_id = understood(
            ByTask, "GetDeliberationResultRequest", {"task_id": request.task_id}
        ).task_id
        handle = self._deliberation(task_id)
        try:
            described = await handle.describe()
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            return await self._recorded(task_id)
        return await _told(task_id, handle, described)

    # --- councils -------------------------------------------------------------------------------

    async def CreateCouncil(  # noqa: N802
        self, request: wire.CreateCouncilRequest, context: Context
    ) -> wire.CreateCouncilResponse:
        """Make a council of agents that differ in nothing but their ids, so in their seeds.

        deliberation_rounds: of its deliberations that name no number. model_profile: the agents'
        model. custom_params are kept, and not read.

        Raises:
            ApplicationError: `Permission`; `InvalidInput`; `MockAgent`; `AlreadyExists`.
        """
        caller().acting_as(*COUNCIL_ROLES)
        config = request.config
        asked = understood(
            Creating,
            "CreateCouncilRequest",
            {
                "role": request.role,
                "num_agents": request.num_agents,
                "config": {
                    "deliberation_rounds": config.deliberation_rounds,
                    "model_profile": config.model_profile,
                    "agent_type": config.agent_type,
                },
            },
        )
        council = NewCouncil(
            role=asked.role,
            size=asked.num_agents or DEFAULT_AGENTS,
            agent_type=asked.config.agent_type or self._agent_type,
            model=asked.config.model_profile,
            rounds=asked.config.deliberation_rounds,
            custom_params=_as_json(config.custom_params),
        )
        agents = await create_council(self._driver, council)
        return wire.CreateCouncilResponse(
            council_id=council_id(council.role), agents_created=len(agents), agent_ids=agents
        )

    async def ListCouncils(  # noqa: N802
        self, request: wire.ListCouncilsRequest, context: Context
    ) -> wire.ListCouncilsResponse:
        """The councils; of one role, where it is given, and none where that has none.

        A council is busy while a deliberation of its role runs. An agent is busy while a
        deliberation waits for its answer; offline while no worker has asked for agents' calls in
        the last five minutes; else ready. Whether an agent on the bus listens is known only when
        it is called.
        """
        councils = await find_councils(self._driver)
        shown = [each for each in councils if request.role_filter in ("", each.role)]
        running = await asyncio.gather(*(self._deliberates(each.role) for each in shown))
        status: Mapping[str, str] = {}
        if request.include_agents:
            status = await self._statuses(shown)
        return wire.ListCouncilsResponse(
            councils=[
                _council_info(council, busy, status)
                for council, busy in zip(shown, running, strict=True)
            ]
        )

    async def RegisterAgent(  # noqa: N802
        self, request: wire.RegisterAgentRequest, context: Context
    ) -> wire.RegisterAgentResponse:
        """Seat an agent in a council that exists; one that sits there already is changed.

        With an endpoint it lives elsewhere and is called on the bus (NATS); else it is of
        metadata `agent_type`, or the default. metadata `persona` is how it looks at things; all
        else there is kept, and not read.

        Raises:
            ApplicationError: `Permission`; `InvalidInput`; `MockAgent`; `UnknownCouncil` names the
                roles there are; `AlreadyExists`: it sits in another council.
        """
        caller().acting_as(*COUNCIL_ROLES)
        told = request.capabilities
        asked = understood(
            Registering,
            "RegisterAgentRequest",
            {
                "agent_id": request.agent_id,
                "role": request.role,
                "capabilities": {
                    "supported_tasks": list(told.supported_tasks),
                    "model_profile": told.model_profile,
                    "max_concurrent_tasks": told.max_concurrent_tasks,
                    "languages": list(told.languages),
                },
                "endpoint": request.endpoint,
                "metadata": {k: v for k, v in request.metadata.items() if k in READ},
                "kept": {k: v for k, v in request.metadata.items() if k not in READ},
            },
            {"kept": "metadata"},
        )
        elsewhere: AgentType | None = "NATS" if asked.endpoint else None
        agent = NewAgent(
            agent_id=asked.agent_id,
            agent_type=asked.metadata.agent_type or elsewhere or self._agent_type,
            model=asked.capabilities.model_profile,
            persona=asked.metadata.persona,
            endpoint=asked.endpoint,
            supported_tasks=asked.capabilities.supported_tasks,
            languages=asked.capabilities.languages,
            max_concurrent_tasks=asked.capabilities.max_concurrent_tasks,
            metadata=_as_json(asked.kept),
        )
        council = await register_agent(self._driver, asked.role, agent)
        return wire.RegisterAgentResponse(
            success=True,
            message=f"{agent.agent_id} sits in the {asked.role} council",
            council_id=council,
        )

    async def UnregisterAgent(  # noqa: N802
        self, request: wire.UnregisterAgentRequest, context: Context
    ) -> wire.UnregisterAgentResponse:
        """Take an agent out of its council; what it proposed stays its own, and it may come back.

        Raises:
            ApplicationError: `Permission`; `UnknownCouncil`; `NotFound`; `CouncilTooSmall`: nobody
                would be left.
        """
        caller().acting_as(*COUNCIL_ROLES)
        asked = understood(
            Unregistering,
            "UnregisterAgentRequest",
            {"agent_id": request.agent_id, "role": request.role},
        )
        role = await unregister_agent(self._driver, asked.agent_id, asked.role)
        return wire.UnregisterAgentResponse(
            success=True, message=f"{asked.agent_id} has left the {role} council"
        )

    # --- planning -------------------------------------------------------------------------------

    async def ProcessPlanningEvent(  # noqa: N802
        self, request: wire.PlanningEventRequest, context: Context
    ) -> wire.PlanningEventResponse:
        """Move a story by an event of its machine, or run a plan that was approved outside.

        The caller's token is who moves it. metadata: `reason` of a rejection, `comment` and
        `revision` of an approval. from_state and to_state, where given, must be the story's.

        Raises:
            ApplicationError: `InvalidInput`; `Permission`; `NotFound`; what the story refuses.
        """
        event = understood(
            Happened,
            "PlanningEventRequest",
            {
                "event_type": request.event_type,
                "case_id": request.case_id,
                "plan_id": request.plan_id,
                "from_state": request.from_state,
                "to_state": request.to_state,
                "timestamp_ms": request.timestamp_ms,
                "metadata": dict(request.metadata),
            },
        )
        name = event.event_type.removeprefix(PREFIX)
        if name == PLAN_APPROVED:
            return await self._run_plan(event)
        return await self._move(event, name, context)

    async def DeriveSubtasks(  # noqa: N802
        self, request: wire.DeriveSubtasksRequest, context: Context
    ) -> wire.DeriveSubtasksResponse:
        """A plan's tasks: those that there are, else derived once from the story.

        roles: only these are shown. Tasks run in parallel as their dependencies allow, whatever
        `parallel_execution` says; `dependency_order` orders the answer by role. A plan with more
        tasks for a role than `max_tasks_per_role` is refused, not cut: what is left would be no
        plan. `auto_publish_to_nats`: tasks that are derived now are announced on the bus.

        Raises:
            ApplicationError: `InvalidInput`; `NotFound`; `InvalidPlan`.
        """
        asked = understood(
            Deriving,
            "DeriveSubtasksRequest",
            {
                "case_id": request.case_id,
                "plan_id": request.plan_id,
                "roles": list(request.roles),
                "max_tasks_per_role": request.strategy.max_tasks_per_role,
            },
        )
        plan_id = (
            asked.plan_id
            or await last_plan(self._driver, asked.case_id)
            or f"{asked.case_id}-plan-1"[:96]
        )
        tasks = await self._tasks(asked.case_id, plan_id)
        if not tasks:
            announce = request.strategy.auto_publish_to_nats
            tasks = await self._derive(asked.case_id, plan_id, announce, context)
        _refuse_more(tasks, asked.max_tasks_per_role)
        shown = [task for task in tasks if not asked.roles or task.role in asked.roles]
        order = list(request.strategy.dependency_order)
        shown.sort(key=lambda task: order.index(task.role) if task.role in order else len(order))
        return wire.DeriveSubtasksResponse(
            tasks=[
                wire.AtomicTask(
                    task_id=task.task_id,
                    role=task.role,
                    description=f"{task.title}\n\n{task.description}",
                    dependencies=task.depends_on,
                    case_id=asked.case_id,
                    plan_id=plan_id,
                    priority=task.priority,
                )
                for task in shown
            ],
            derivation_id=derivation_workflow_id(asked.case_id, plan_id),
            total_tasks=len(shown),
        )

    async def GetTaskContext(  # noqa: N802
        self, request: wire.GetTaskContextRequest, context: Context
    ) -> wire.GetTaskContextResponse:
        """A context pack. history: what the options ask for, newest first; else empty.

        The pack's scopes are those of role and phase (deploy/config/scopes.yaml); `options.scopes`
        are checked, and change nothing. max_events: 50 when 0, and at most.

        Raises:
            ApplicationError: `InvalidInput`; `UnknownStory`.
        """
        options = request.options
        asked = understood(
            TaskContext,
            "GetTaskContextRequest",
            {
                "task_id": request.task_id,
                "story_id": request.story_id or request.case_id,
                "role": request.role,
                "phase": request.phase,
                "options": {"max_events": options.max_events, "scopes": list(options.scopes)},
            },
        )
        pack = await self._graph.known_pack(
            PackQuery(
                story_id=asked.story_id,
                role=asked.role,
                phase=asked.phase,
                subtask_id=asked.task_id,
            )
        )
        wanted: list[tuple[bool, Scope]] = [
            (options.include_timeline, "MILESTONES"),
            (options.include_decisions, "DECISIONS_GLOBAL"),
            (options.include_summaries, "SUMMARY_LAST"),
        ]
        past = await history(
            self._driver,
            asked.story_id,
            [scope for asks, scope in wanted if asks],
            asked.options.max_events or TIMELINE_EVENTS,
        )
        blocks = [pack.system, pack.context, pack.tools, past]
        return wire.GetTaskContextResponse(
            context_text="\n\n".join(block for block in blocks if block),
            blocks=wire.ContextBlocks(
                system=pack.system, context=pack.context, tools=pack.tools, history=past
            ),
            token_count=pack.token_count + count_tokens(past),
            version_hash=content_hash([pack.version, past]) if past else pack.version,
        )

    # --- figures --------------------------------------------------------------------------------

    async def GetStatus(  # noqa: N802
        self, request: wire.GetStatusRequest, context: Context
    ) -> wire.GetStatusResponse:
        """healthy: workers ask for workflows and agents' calls; degraded: they do not.

        uptime: of this process. Deliberations are all that Temporal still knows, role_counts those
        of each council; orchestrations those under a task's id, as Orchestrate begins them.
        avg: of the last that were completed; 0: none was. A council is active while workers ask
        for agents' calls.
        """
        served = await self._figures.is_served()
        answer = wire.GetStatusResponse(
            status="healthy" if served else "degraded", uptime_seconds=int(_uptime_s())
        )
        if not request.include_stats:
            return answer
        councils = await find_councils(self._driver)
        total, orchestrations, durations, by_role = await asyncio.gather(
            self._figures.count(figures.ALL),
            self._figures.orchestrations(),
            self._figures.durations_ms(figures.COMPLETED),
            asyncio.gather(
                *(self._figures.count(of_role(figures.ALL, each.role)) for each in councils)
            ),
        )
        answer.stats.CopyFrom(
            wire.OrchestratorStats(
                total_deliberations=total,
                total_orchestrations=orchestrations,
                avg_deliberation_time_ms=mean(durations),
                active_councils=len(_active(councils, served)),
                role_counts={
                    council.role: number for council, number in zip(councils, by_role, strict=True)
                },
            )
        )
        return answer

    async def GetMetrics(  # noqa: N802
        self, request: wire.GetMetricsRequest, context: Context
    ) -> wire.GetMetricsResponse:
        """Figures of the deliberations that were closed in the time range; 0: what is not known.

        time_range_ms 0: all that Temporal still knows. Times are of the last `figures.SAMPLE`,
        agents' response times of the last `figures.CALLS_OF`. success_rate: completed among
        those that were closed.

        Raises:
            ApplicationError: `InvalidInput`.
        """
        asked = understood(
            Measuring,
            "GetMetricsRequest",
            {"metric_type": request.metric_type, "time_range_ms": request.time_range_ms},
        )
        completed = since(figures.COMPLETED, asked.time_range_ms, datetime.now(UTC))
        ended = since(figures.ENDED, asked.time_range_ms, datetime.now(UTC))
        answer = wire.GetMetricsResponse()
        if asked.metric_type in ("performance", "all"):
            answer.performance.CopyFrom(await self._performance(completed))
        if asked.metric_type != "performance":
            councils = await find_councils(self._driver)
            status = await self._statuses(councils)
            if asked.metric_type in ("agents", "all"):
                answer.agents.CopyFrom(await self._agents(councils, status, completed))
            if asked.metric_type in ("councils", "all"):
                answer.councils.CopyFrom(await self._health(councils, status, completed, ended))
        return answer

    # --- deliberations: the steps ---------------------------------------------------------------

    def _deliberation(self, task_id: str) -> Deliberation:
        return self._temporal.get_workflow_handle_for(
            DeliberationWorkflow.run, deliberation_workflow_id(task_id)
        )

    async def _begin(
        self, asked: Deliberating, context: Context, prefix: str = figures.CALLED
    ) -> Call:
        """Start the deliberation, or join it; it lasts no longer than the call's deadline.

        prefix: of the task's id, where it has none.
        """
        council = await self._graph.load_council(
            CouncilQuery(role=asked.role, size=asked.num_agents or None)
        )
        given = said(context).get(REQUEST_ID, "")
        own = not (asked.task_id or given)
        task_id = asked.task_id or prefix + _task_id(asked, given)
        rounds = asked.rounds or asked.options.deliberation_rounds or council.rounds or 1
        if asked.constraints.max_iterations:
            rounds = min(rounds, asked.constraints.max_iterations)
        timeout = seconds_left(context, asked.constraints.timeout_seconds or DEFAULT_TIMEOUT_S)
        task = DeliberationInput(
            task_id=task_id,
            story_id=asked.story_id or asked.case_id or None,
            role=asked.role,
            description=asked.task_description,
            rubric=asked.constraints.rubric,
            requirements=asked.constraints.requirements,
            rounds=rounds,
            agents=asked.num_agents or None,
            timeout=max(timeout, 0.001),
            plan_id=asked.plan_id,
        )
        call = Call(self._deliberation(task_id), rounds, own)
        starting = asyncio.ensure_future(self._start(task))

        def ended(_: Context) -> None:
            self._leave(call, starting)

        context.add_done_callback(ended)  # type: ignore[arg-type]  # the stubs know no function
        await asyncio.shield(starting)
        await context.send_initial_metadata(((TASK_ID, task_id),))
        return call

    async def _start(self, task: DeliberationInput) -> None:
        """Start it, unless it runs or was completed: then there is nothing to begin anew."""
        with suppress(WorkflowAlreadyStartedError):
            await self._temporal.start_workflow(
                DeliberationWorkflow.run,
                task,
                id=deliberation_workflow_id(task.task_id),
                task_queue=STORY_QUEUE,
                id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
                id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE_FAILED_ONLY,
                static_summary=_cut(f"{task.role}: {task.description}"),
            )

    async def _result(self, call: Call) -> DeliberationResult:
        try:
            return await call.handle.result()
        finally:
            # Not where the call itself was ended: `_leave` sees to its deliberation then.
            task = asyncio.current_task()
            call.answered = not (task and task.cancelling())

    def _leave(self, call: Call, starting: asyncio.Future[None]) -> None:
        """The call is over: what only it waited for goes with it."""
        if call.answered or not call.own:
            return

        async def cancel() -> None:
            with suppress(RPCError):  # it has ended, or was never begun
                await starting
                await call.handle.cancel()

        leaving = asyncio.get_running_loop().create_task(cancel())
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    async def _summary(self, event: HistoryEvent) -> str:
        """What an activity's summary says; empty where there is none."""
        if not event.user_metadata.HasField("summary"):
            return ""
        (said,) = await self._temporal.data_converter.decode([event.user_metadata.summary], [str])
        return str(said)

    async def _recorded(self, task_id: str) -> wire.GetDeliberationResultResponse:
        deliberation_id = deliberation_workflow_id(task_id)
        found = await find_deliberation(self._driver, deliberation_id)
        if found is None:
            raise refused(NOT_FOUND, f"no deliberation of task {task_id} found")
        ended_ms = max(each.created_at_ms for each in found.ranked)
        return _completed(task_id, found, ended_ms)

    # --- councils: the steps --------------------------------------------------------------------

    async def _deliberates(self, role: str) -> bool:
        return await self._figures.count(of_role(figures.RUNNING, role)) > 0

    async def _statuses(self, councils: Sequence[StandingCouncil]) -> dict[str, str]:
        """Agent -> ready, busy or offline (see ListCouncils)."""
        served, working = await asyncio.gather(self._figures.is_served(), self._figures.working())
        agents = [agent.agent_id for council in councils for agent in council.agents]
        idle = "ready" if served else "offline"
        return {agent: "busy" if served and agent in working else idle for agent in agents}

    # --- planning: the steps --------------------------------------------------------------------

    async def _move(
        self, event: Happened, name: str, context: Context
    ) -> wire.PlanningEventResponse:
        story = self._temporal.get_workflow_handle_for(
            StoryWorkflow.run, story_workflow_id(event.case_id)
        )
        within = timedelta(seconds=max(seconds_left(context, STORY_WITHIN_S), 0.001))
        try:
            async with known(event.case_id):
                view = await story.query(StoryWorkflow.state, rpc_timeout=within)
                legal = await story.query(StoryWorkflow.transitions, rpc_timeout=within)
        except ApplicationError as error:
            if error.type == NOT_FOUND and name not in MOVES:
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
        if (move.kind == "rejection") if move else name.startswith("reject_"):
            reject = understood(
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
            async with known(event.case_id):
                moved = await story.execute_update(
                    StoryWorkflow.reject, reject, id=_update_id(event, context), rpc_timeout=within
                )
        else:
            approve = understood(
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
            async with known(event.case_id):
                moved = await story.execute_update(
                    StoryWorkflow.approve,
                    approve,
                    id=_update_id(event, context),
                    rpc_timeout=within,
                )
        return await self._moved(event, moved)

    async def _moved(self, event: Happened, view: StoryView) -> wire.PlanningEventResponse:
        tasks = await self._tasks(event.case_id, event.plan_id or view.plan_id)
        return wire.PlanningEventResponse(
            processed=True,
            message=f"story {event.case_id} is in {view.state}",
            derived_task_ids=[task.task_id for task in tasks],
        )

    async def _run_plan(self, event: Happened) -> wire.PlanningEventResponse:
        """As the inbox does with `planning.plan.approved`: stored, then run, once."""
        role = caller().acting_as("PO")
        story_id, plan_id = event.case_id, event.plan_id
        if not plan_id:
            raise refused("InvalidInput", "PlanningEventRequest refused. plan_id: required; add it")
        tasks = [task.task_id for task in await self._tasks(story_id, plan_id)]
        if await self._is_known(story_workflow_id(story_id)):
            return wire.PlanningEventResponse(
                processed=False,
                message=f"story {story_id} has a workflow, and runs its plans itself: send "
                "approve_design",
                derived_task_ids=tasks,
            )
        if not await self._is_known(plan_workflow_id(story_id, plan_id)):
            run = PlanInput(story_id=story_id, plan_id=plan_id)
            await self._store_approval(event)
            with suppress(WorkflowAlreadyStartedError):  # by another call, or from the bus
                await self._temporal.start_workflow(
                    PlanWorkflow.run,
                    run,
                    id=plan_workflow_id(story_id, plan_id),
                    task_queue=STORY_QUEUE,
                    id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                    static_summary=_cut(f"plan {plan_id} of {story_id}, approved as {role}"),
                )
        return wire.PlanningEventResponse(
            processed=True,
            message=f"{plan_workflow_id(story_id, plan_id)} runs it",
            derived_task_ids=tasks,
        )

    async def _store_approval(self, event: Happened) -> None:
        now = datetime.now(UTC)
        body = PlanApproved(
            story_id=event.case_id,
            plan_id=event.plan_id,
            approved_by=caller().actor,
            timestamp=iso(now),
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
        await self._graph.store([change(entry, int(now.timestamp() * 1000), 1)])

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

    async def _derive(
        self, story_id: str, plan_id: str, announce: bool, context: Context
    ) -> list[PlannedTask]:
        """Derive them in a workflow: it goes on without this call, and is joined by the next."""
        stored = await self._graph.load_plan(PlanQuery(story_id=story_id, plan_id=plan_id))
        if stored.tasks:
            return stored.tasks
        if stored.story is None:
            raise refused(NOT_FOUND, f"case {story_id} not found")
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
                static_summary=_cut(f"tasks of {plan_id}: {stored.story.title}"),
            )
        handle = self._temporal.get_workflow_handle_for(DerivationWorkflow.run, workflow_id)
        async with asyncio.timeout(seconds_left(context, DERIVED_WITHIN_S)):
            found: DerivationResult = await handle.result()
        return found.tasks

    # --- figures: the steps ---------------------------------------------------------------------

    async def _performance(self, completed: str) -> wire.PerformanceMetrics:
        durations, orchestrations = await asyncio.gather(
            self._figures.durations_ms(completed), self._figures.orchestration_ms(completed)
        )
        return wire.PerformanceMetrics(
            avg_deliberation_ms=mean(durations),
            avg_orchestration_ms=mean(orchestrations),
            p50_latency_ms=percentile(durations, 50),
            p95_latency_ms=percentile(durations, 95),
            p99_latency_ms=percentile(durations, 99),
        )

    async def _agents(
        self, councils: Sequence[StandingCouncil], status: Mapping[str, str], completed: str
    ) -> wire.AgentMetrics:
        calls = await self._figures.calls(completed)
        return wire.AgentMetrics(
            total_agents=len(status),
            active_agents=sum(each != "offline" for each in status.values()),
            agents_per_role={council.role: len(council.agents) for council in councils},
            avg_agent_response_time_ms=mean([call.latency_ms for call in calls]),
        )

    async def _health(
        self,
        councils: Sequence[StandingCouncil],
        status: Mapping[str, str],
        completed: str,
        ended: str,
    ) -> wire.CouncilMetrics:
        health = await asyncio.gather(
            *(self._council_health(each, status, completed, ended) for each in councils)
        )
        return wire.CouncilMetrics(
            total_councils=len(councils),
            active_councils=sum(each.status != "offline" for each in health),
            health_per_council={
                council.role: each for council, each in zip(councils, health, strict=True)
            },
        )

    async def _council_health(
        self, council: StandingCouncil, status: Mapping[str, str], completed: str, ended: str
    ) -> wire.CouncilHealth:
        good, all_ended, deliberates = await asyncio.gather(
            self._figures.count(of_role(completed, council.role)),
            self._figures.count(of_role(ended, council.role)),
            self._deliberates(council.role),
        )
        states = [status[agent.agent_id] for agent in council.agents]
        offline = not states or "offline" in states
        return wire.CouncilHealth(
            status="offline" if offline else "busy" if deliberates else "idle",
            available_agents=states.count("ready"),
            busy_agents=states.count("busy"),
            success_rate=good / all_ended if all_ended else 0.0,
        )


# --- messages -------------------------------------------------------------------------------------


def _deliberating(message: str, request: wire.DeliberateRequest) -> Deliberating:
    return understood(
        Deliberating,
        message,
        {
            "task_description": request.task_description,
            "role": request.role,
            "constraints": _constraints(request.constraints),
            "rounds": request.rounds,
            "num_agents": request.num_agents,
        },
    )


def _orchestrating(request: wire.OrchestrateRequest) -> Deliberating:
    return understood(
        Deliberating,
        "OrchestrateRequest",
        {
            "task_description": request.task_description,
            "role": request.role,
            "constraints": _constraints(request.constraints),
            "options": {"deliberation_rounds": request.options.deliberation_rounds},
            "task_id": request.task_id,
            "case_id": request.case_id,
            "story_id": request.story_id,
            "plan_id": request.plan_id,
        },
    )


def _constraints(told: wire.TaskConstraints) -> dict[str, Any]:
    return {
        "rubric": told.rubric,
        "requirements": list(told.requirements),
        "timeout_seconds": told.timeout_seconds,
        "max_iterations": told.max_iterations,
    }


def _task_id(asked: Deliberating, request_id: str) -> str:
    """Of one caller's request of that id, and no other; without an id, of this call alone."""
    if not request_id:
        return uuid.uuid4().hex
    return derived_id(caller().actor, request_id, asked.model_dump_json())


def _update_id(event: Happened, context: Context) -> str | None:
    """The same request of the same caller is applied once."""
    given = said(context).get(REQUEST_ID, "")
    return f"grpc-{derived_id(caller().actor, given, event.event_type)}" if given else None


async def _told(
    task_id: str, handle: Deliberation, described: WorkflowExecutionDescription
) -> wire.GetDeliberationResultResponse:
    """What Temporal knows of a deliberation."""
    status = described.status or WorkflowExecutionStatus.RUNNING
    answer = wire.GetDeliberationResultResponse(
        task_id=task_id,
        status="DELIBERATION_STATUS_IN_PROGRESS",
        metadata=wire.OrchestratorMetadata(execution_id=described.id, tags={"task_id": task_id}),
    )
    if status in (WorkflowExecutionStatus.RUNNING, WorkflowExecutionStatus.CONTINUED_AS_NEW):
        return answer
    ended = described.close_time or datetime.now(UTC)
    ended_ms = int(ended.timestamp() * 1000)
    try:
        return _completed(task_id, await handle.result(), ended_ms)
    except WorkflowFailureError as error:
        cause = error.cause
        late = isinstance(cause, ApplicationError) and cause.type == TIMED_OUT
        late = late or status == WorkflowExecutionStatus.TIMED_OUT
        answer.status = (
            wire.DELIBERATION_STATUS_TIMEOUT if late else wire.DELIBERATION_STATUS_FAILED
        )
        words = status_of(error).message
        answer.error_message = words if isinstance(cause, ApplicationError) else str(cause)
        answer.duration_ms = int((ended - described.start_time).total_seconds() * 1000)
        failed = _failure(error)
        if failed:
            answer.metadata.CopyFrom(metadata(failed, described.id, ended_ms))
        return answer


def _failure(error: WorkflowFailureError) -> DeliberationResult | None:
    """What a deliberation that failed had come to, where it says so."""
    cause = error.cause
    if isinstance(cause, ApplicationError) and cause.details:
        return DeliberationResult.model_validate(cause.details[0])
    return None


def _completed(
    task_id: str, found: DeliberationResult, ended_ms: int
) -> wire.GetDeliberationResultResponse:
    return wire.GetDeliberationResultResponse(
        task_id=task_id,
        status="DELIBERATION_STATUS_COMPLETED",
        results=results(found),
        winner_id=found.winner_id,
        duration_ms=found.duration_ms,
        metadata=metadata(found, found.deliberation_id, ended_ms),
    )


def _council_info(
    council: StandingCouncil, busy: bool, status: Mapping[str, str]
) -> wire.CouncilInfo:
    """Where `status` is empty, the agents are not shown."""
    models = sorted({agent.model for agent in council.agents if agent.model})
    return wire.CouncilInfo(
        council_id=council.council_id,
        role=council.role,
        num_agents=len(council.agents),
        agents=[_agent_info(agent, status[agent.agent_id]) for agent in council.agents]
        if status
        else [],
        status="busy" if busy else "idle",
        model=", ".join(models),
    )


def _agent_info(agent: StandingAgent, status: str) -> wire.AgentInfo:
    return wire.AgentInfo(
        agent_id=agent.agent_id,
        role=agent.role,
        status=status,
        capabilities=wire.AgentCapabilities(
            supported_tasks=agent.supported_tasks,
            model_profile=agent.model,
            max_concurrent_tasks=agent.max_concurrent_tasks,
            languages=agent.languages,
        ),
    )


def _active(councils: Sequence[StandingCouncil], served: bool) -> list[StandingCouncil]:
    return [council for council in councils if served and council.agents]


def _not_understood(event: Happened, legal: Sequence[Move]) -> wire.PlanningEventResponse:
    known = [*dict.fromkeys([*(move.event for move in legal), *MOVES]), PREFIX + PLAN_APPROVED]
    return wire.PlanningEventResponse(
        processed=False,
        message=f"{event.event_type[:100]} is not understood; understood are {', '.join(known)}",
    )


def _refuse_other_states(event: Happened, view: StoryView, move: Move | None) -> None:
    """An event that tells of another move than the story would make is not this story's."""
    if event.from_state and event.from_state != view.state:
        raise refused(
            ILLEGAL_MOVE, f"from_state: {event.from_state}, but {event.case_id} is in {view.state}"
        )
    if move and event.to_state and event.to_state != move.to:
        raise refused(ILLEGAL_MOVE, f"to_state: {event.to_state}, but {move.event} is to {move.to}")


def _refuse_more(tasks: Sequence[PlannedTask], most: int) -> None:
    for role in sorted({task.role for task in tasks}):
        number = sum(task.role == role for task in tasks)
        if most and number > most:
            raise refused(
                "InvalidPlan",
                f"max_tasks_per_role: the plan has {number} tasks for {role}, at most {most} were "
                "asked for; ask for more, or plan anew",
            )


def _as_json(told: Mapping[str, str]) -> str:
    return json.dumps(dict(told), sort_keys=True) if told else ""


def _cut(text: str) -> str:
    """One line, as long as Temporal's summaries may be."""
    return " ".join(text.split()).encode()[:SUMMARY_BYTES].decode(errors="ignore")


def _now_ms() -> int:
    return int(datetime.now(UTC).timestamp() * 1000)


_STARTED = time.monotonic()


def _uptime_s() -> float:
    return time.monotonic() - _STARTED
