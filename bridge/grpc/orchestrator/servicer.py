"""The Orchestrator service (orchestrator.v1): deliberations, councils, plans and planning events.

Metadata carries what the contract has no field for: `x-request-id` (Deliberate, StreamDeliberation,
Orchestrate without a task_id: the same id and request from the same caller is the same
deliberation). A deliberation's task_id is sent at once, in the initial metadata `x-task-id`. A
client that loses the call passes it to GetDeliberationResult.
"""

from __future__ import annotations

import json
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from datetime import UTC, datetime, timedelta

from neo4j import AsyncDriver
from temporalio.client import Client

from activities.graph.activities import Graph
from activities.graph.context_packs import count_tokens
from activities.graph.councils import (
    NewAgent,
    NewCouncil,
    create_council,
    find_councils,
    register_agent,
    unregister_agent,
)
from activities.graph.deliberations import history
from activities.graph.sessions import known_roles
from bridge.grpc.calls import Context
from bridge.grpc.limits import Limits
from bridge.grpc.orchestrator.deliberations import ORCHESTRATED, Deliberations
from bridge.grpc.orchestrator.messages import result_metadata, results
from bridge.grpc.orchestrator.metrics import COMPLETED, ENDED, Metrics, since
from bridge.grpc.orchestrator.planning_events import Plans, in_waves, refuse_more
from bridge.grpc.orchestrator.requests import (
    FLAGS,
    TIMELINE_EVENTS,
    by_task,
    creating,
    deliberating,
    deriving,
    measuring,
    orchestrating,
    planning_event,
    registering,
    task_context,
    unregistering,
)
from bridge.grpc.wire import orchestrator_pb2 as pb
from bridge.grpc.wire import orchestrator_pb2_grpc
from workflows.models.base import AgentType, content_hash
from workflows.models.context import PackQuery
from workflows.models.errors import InvalidInput
from workflows.models.ids import council_id, derivation_workflow_id

DEFAULT_AGENTS = 3


class OrchestratorServicer(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """Deliberations, councils, plans and metrics, read from Temporal and the graph.

    `bridge.grpc.roles` lists the roles that each method needs.
    """

    def __init__(
        self,
        temporal: Client,
        graph: Graph,
        driver: AsyncDriver,
        agent_type: AgentType,
        deliberation_timeout: timedelta | None = None,
        default_model: Callable[[], Awaitable[str]] | None = None,
        limits: Limits = Limits(),  # noqa: B008 - it is frozen
    ) -> None:
        """Serve from Temporal and the graph.

        Args:
            temporal: The client that starts and follows workflows.
            graph: Councils, plans and context packs.
            driver: Neo4j's, for data that only this service reads.
            agent_type: The type of agents for which none is named.
            deliberation_timeout: The setting DELIBERATION_TIMEOUT.
            default_model: Returns the model of agents that name none; None: not known.
            limits: Limits of what calls may ask of agents.
        """
        self._default_model = default_model
        self._graph = graph
        self._driver = driver
        self._agent_type = agent_type
        self._metrics = Metrics(temporal)
        self._limits = limits
        self._deliberations = Deliberations(temporal, graph, driver, limits, deliberation_timeout)
        self._plans = Plans(temporal, graph, driver, limits, deliberation_timeout)

    # --- deliberations --------------------------------------------------------------------------

    async def Deliberate(  # noqa: N802
        self, request: pb.DeliberateRequest, context: Context
    ) -> pb.DeliberateResponse:
        """Start a deliberation and wait for its result.

        `constraints.metadata` is passed to the agents after their context, as notes of the caller.
        A call that ends early cancels its deliberation, unless it has an `x-request-id`. If more
        agents are requested than the council has, all of them deliberate, and the trailing metadata
        `x-agents` and the answer's tag `agents` show it: `3 of 5`.

        Raises:
            ApplicationError: `InvalidInput`; `UnknownCouncil` names the existing roles; the cause
                of a failed deliberation.
        """
        call = await self._deliberations.begin(deliberating(request), context)
        found = await self._deliberations.result(call)
        return pb.DeliberateResponse(
            results=results(found),
            winner_id=found.winner_id,
            duration_ms=found.duration_ms,
            metadata=result_metadata(found, found.deliberation_id, _now_ms(), call.agents),
        )

    async def Orchestrate(  # noqa: N802
        self, request: pb.OrchestrateRequest, context: Context
    ) -> pb.OrchestrateResponse:
        """Deliberate on a task and select; tags.judged is the architect's reason for a near tie.

        If the task_id is being deliberated or was completed, the call joins it and answers with its
        result. A failed one is started again.

        `options`: if only one of `enable_peer_review` and `enable_architect_selection` is true, the
        part of the other one is switched off: no rounds, or near ties decided by the rule. A client
        that sets neither sends false for both: then both parts take place. `context_options` add
        what they name to the agents' context: timeline, decisions, summaries, further scopes.
        `custom_params` are refused, because none is known.

        Raises:
            ApplicationError: as Deliberate.
        """
        call = await self._deliberations.begin(orchestrating(request), context, ORCHESTRATED)
        found = await self._deliberations.result(call)
        ranked = results(found)
        return pb.OrchestrateResponse(
            winner=ranked[0],
            candidates=ranked,
            execution_id=found.deliberation_id,
            duration_ms=found.duration_ms,
            metadata=result_metadata(found, found.deliberation_id, _now_ms(), call.agents),
        )

    async def StreamDeliberation(  # noqa: N802
        self, request: pb.DeliberateRequest, context: Context
    ) -> AsyncIterator[pb.DeliberationUpdate]:
        """Start a deliberation and stream an update at each wave and answer.

        The last update has the winner. With an `x-request-id` it can be called again, on any
        replica, and then sends all updates from the beginning.

        Raises:
            ApplicationError: as Deliberate.
        """
        call = await self._deliberations.begin(deliberating(request), context)
        async for update in self._deliberations.updates(call):
            yield update

    async def GetDeliberationResult(  # noqa: N802
        self, request: pb.GetDeliberationResultRequest, context: Context
    ) -> pb.GetDeliberationResultResponse:
        """Return a task's deliberation from Temporal, or from the graph after Temporal's retention.

        A result from the graph lacks what the graph does not keep (see `find_deliberation`).

        Raises:
            ApplicationError: `NotFound`.
        """
        return await self._deliberations.find(by_task(request).task_id)

    # --- councils -------------------------------------------------------------------------------

    async def CreateCouncil(  # noqa: N802
        self, request: pb.CreateCouncilRequest, context: Context
    ) -> pb.CreateCouncilResponse:
        """Create a council of agents that differ only in their ids, and thus in their seeds.

        deliberation_rounds applies to deliberations that name no number. If it is 0,
        enable_peer_review means one round, and false the default. model_profile is the agents'
        model. custom_params are refused, because none is known.

        Raises:
            ApplicationError: `Permission`; `InvalidInput`; `MockAgent`; `AlreadyExists`.
        """
        parsed = creating(request)
        self._limits.require_fits(
            "CreateCouncilRequest",
            {"num_agents": parsed.num_agents},
            {"config.deliberation_rounds": parsed.config.deliberation_rounds},
        )
        council = NewCouncil(
            role=parsed.role,
            size=parsed.num_agents or min(DEFAULT_AGENTS, self._limits.agents),
            agent_type=parsed.config.agent_type or self._agent_type,
            model=parsed.config.model_profile,
            rounds=parsed.config.deliberation_rounds or int(parsed.config.enable_peer_review),
        )
        agents = await create_council(self._driver, council)
        return pb.CreateCouncilResponse(
            council_id=council_id(council.role), agents_created=len(agents), agent_ids=agents
        )

    async def ListCouncils(  # noqa: N802
        self, request: pb.ListCouncilsRequest, context: Context
    ) -> pb.ListCouncilsResponse:
        """List the councils; with a role, only that role's, and none if it has no council.

        The role may be written as scopes.yaml allows: `dev` and `developer` are DEV.

        `model` has the models in use in the council: an agent's own or the one that is served. It
        is empty if the LLM's endpoint does not report one. A council is busy while a deliberation
        of its role runs. An agent is busy while a deliberation waits for its answer, offline if no
        worker has polled for agents' calls in the last five minutes, else ready. Whether an agent
        on the bus listens is known only when it is called.

        Raises:
            InvalidInput: the role is unknown.
        """
        councils = await find_councils(self._driver)
        known = {each.role for each in councils}.union(known_roles(self._graph.scopes))
        wanted = self._roles([request.role_filter] if request.role_filter else [])
        require_roles_there("ListCouncilsRequest", {"role_filter": wanted}, known)
        shown = [each for each in councils if not wanted or each.role in wanted]
        model = await self._default_model() if self._default_model else ""
        return pb.ListCouncilsResponse(
            councils=await self._metrics.council_infos(shown, request.include_agents, model)
        )

    async def RegisterAgent(  # noqa: N802
        self, request: pb.RegisterAgentRequest, context: Context
    ) -> pb.RegisterAgentResponse:
        """Add an agent to an existing council, or change it if it is already a member.

        An agent with an endpoint is external and is called on the bus (NATS). Otherwise its type is
        metadata `agent_type`; without one, a member keeps its type, and a new agent gets the
        default. Metadata `persona` is the agent's point of view; all
        other metadata is stored, but not used.

        Raises:
            ApplicationError: `Permission`; `InvalidInput`; `MockAgent`; `UnknownCouncil` names the
                existing roles; `AlreadyExists`: the agent is in another council.
        """
        parsed = registering(request)
        elsewhere: AgentType | None = "NATS" if parsed.endpoint else None
        agent = NewAgent(
            agent_id=parsed.agent_id,
            agent_type=parsed.metadata.agent_type or elsewhere,
            model=parsed.capabilities.model_profile,
            persona=parsed.metadata.persona,
            endpoint=parsed.endpoint,
            supported_tasks=parsed.capabilities.supported_tasks,
            languages=parsed.capabilities.languages,
            max_concurrent_tasks=parsed.capabilities.max_concurrent_tasks,
            metadata=_as_json(parsed.kept),
        )
        council = await register_agent(self._driver, parsed.role, agent, self._agent_type)
        return pb.RegisterAgentResponse(
            success=True,
            message=f"{agent.agent_id} sits in the {parsed.role} council",
            council_id=council,
        )

    async def UnregisterAgent(  # noqa: N802
        self, request: pb.UnregisterAgentRequest, context: Context
    ) -> pb.UnregisterAgentResponse:
        """Remove an agent from its council.

        Its proposals stay under its id, and it may be registered again.

        Raises:
            ApplicationError: `Permission`; `UnknownCouncil`; `NotFound`; `CouncilTooSmall`: no
                agent would be left.
        """
        parsed = unregistering(request)
        role = await unregister_agent(self._driver, parsed.agent_id, parsed.role)
        return pb.UnregisterAgentResponse(
            success=True, message=f"{parsed.agent_id} has left the {role} council"
        )

    # --- planning -------------------------------------------------------------------------------

    async def ProcessPlanningEvent(  # noqa: N802
        self, request: pb.PlanningEventRequest, context: Context
    ) -> pb.PlanningEventResponse:
        """Move a story by an event of its state machine, or run a plan that was approved outside.

        TRANSITION makes the story's move to `to_state`; for a case without a workflow, the
        transition is stored. CASE_CREATED stores a case that is not known (metadata `title`,
        `description`). Moves are made as the actor of the caller's token. metadata: `reason` of a
        rejection, `comment` and `revision` of an approval. from_state and to_state, if given, must
        be the story's.

        Raises:
            ApplicationError: `InvalidInput`; `Permission`; `NotFound`; any refusal of the story.
        """
        return await self._plans.handle_planning_event(planning_event(request), context)

    async def DeriveSubtasks(  # noqa: N802
        self, request: pb.DeriveSubtasksRequest, context: Context
    ) -> pb.DeriveSubtasksResponse:
        """Return a plan's tasks: the stored ones, or those that are derived once from the story.

        roles: only tasks of these roles are returned; `dev` and `developer` are DEV.
        `dependency_order` sorts the answer by role; `parallel_execution` groups tasks that may run
        at once, those without dependencies first. A plan always runs in such groups. A plan with
        more tasks for a role than `max_tasks_per_role` is refused and not cut, because a cut plan
        would be incomplete. `auto_publish_to_nats`: tasks that are derived now are published on the
        bus.

        Raises:
            ApplicationError: `InvalidInput`; `NotFound`; `InvalidPlan`.
        """
        parsed = deriving(request)
        roles, order = self._roles(parsed.roles), self._roles(request.strategy.dependency_order)
        plan_id = parsed.plan_id or await self._plans.newest(parsed.case_id)
        stored = await self._plans.stored_tasks(parsed.case_id, plan_id)
        councils = await find_councils(self._driver)
        require_roles_there(
            "DeriveSubtasksRequest",
            {"roles": roles, "strategy.dependency_order": order},
            {each.role for each in councils}
            | {each.role for each in stored}
            | set(known_roles(self._graph.scopes)),
        )
        announce = request.strategy.auto_publish_to_nats
        tasks = await self._plans.derive(parsed.case_id, plan_id, announce, context)
        refuse_more(tasks, parsed.max_tasks_per_role)
        shown = [task for task in tasks if not roles or task.role in roles]
        shown.sort(key=lambda task: order.index(task.role) if task.role in order else len(order))
        if request.strategy.parallel_execution:
            shown = in_waves(shown)
        return pb.DeriveSubtasksResponse(
            tasks=[
                pb.AtomicTask(
                    task_id=task.task_id,
                    role=task.role,
                    description=f"{task.title}\n\n{task.description}",
                    dependencies=task.depends_on,
                    case_id=parsed.case_id,
                    plan_id=plan_id,
                    priority=task.priority,
                )
                for task in shown
            ],
            derivation_id=derivation_workflow_id(parsed.case_id, plan_id),
            total_tasks=len(shown),
        )

    async def GetTaskContext(  # noqa: N802
        self, request: pb.GetTaskContextRequest, context: Context
    ) -> pb.GetTaskContextResponse:
        """Return a context pack, with the requested history.

        history: what the options request, newest first; else empty. The pack's scopes are those of
        role and phase (deploy/config/scopes.yaml). Scopes of `options.scopes` that the pack lacks
        are also in history. max_events: 50 when 0.

        Raises:
            ApplicationError: `InvalidInput`; `UnknownStory`.
        """
        parsed = task_context(request)
        query = PackQuery(
            story_id=parsed.story_id,
            role=parsed.role,
            phase=parsed.phase,
            subtask_id=parsed.task_id,
        )
        pack = await self._graph.known_pack(query)
        past = await history(
            self._driver,
            query.model_copy(update={"role": self._graph.scopes.role(query.role)}),
            [
                scope
                for scope in parsed.options.wanted
                if scope not in pack.scopes or scope in FLAGS
            ],
            parsed.options.max_events or TIMELINE_EVENTS,
        )
        blocks = [pack.system, pack.context, pack.tools, past]
        return pb.GetTaskContextResponse(
            context_text="\n\n".join(block for block in blocks if block),
            blocks=pb.ContextBlocks(
                system=pack.system, context=pack.context, tools=pack.tools, history=past
            ),
            token_count=pack.token_count + count_tokens(past),
            version_hash=content_hash([pack.version, past]) if past else pack.version,
        )

    def _roles(self, names: Iterable[str]) -> list[str]:
        return [self._graph.scopes.role(name) for name in names]

    # --- metrics --------------------------------------------------------------------------------

    async def GetStatus(  # noqa: N802
        self, request: pb.GetStatusRequest, context: Context
    ) -> pb.GetStatusResponse:
        """Report whether the fleet is healthy, and its statistics.

        healthy: workers poll for workflows and agents' calls; degraded: they do not. uptime: of
        this process. Deliberations are all that Temporal still knows, role_counts those of each
        council, orchestrations those with a task's id, as Orchestrate starts them. avg: of the last
        completed ones; 0: none. A council is active while workers poll for agents' calls.
        """
        served = await self._metrics.is_served()
        answer = pb.GetStatusResponse(
            status="healthy" if served else "degraded", uptime_seconds=int(_uptime_s())
        )
        if request.include_stats:
            councils = await find_councils(self._driver)
            answer.stats.CopyFrom(await self._metrics.stats(councils, served))
        return answer

    async def GetMetrics(  # noqa: N802
        self, request: pb.GetMetricsRequest, context: Context
    ) -> pb.GetMetricsResponse:
        """Return metrics of the deliberations that were closed in the time range; 0: not known.

        time_range_ms 0: all that Temporal still knows. Times are of the last `metrics.SAMPLE`
        deliberations, agents' response times of the last `metrics.CALLS_OF`. success_rate: the
        completed share of the closed deliberations.

        Raises:
            ApplicationError: `InvalidInput`.
        """
        parsed = measuring(request)
        completed = since(COMPLETED, parsed.time_range_ms, datetime.now(UTC))
        ended = since(ENDED, parsed.time_range_ms, datetime.now(UTC))
        answer = pb.GetMetricsResponse()
        if parsed.metric_type in ("performance", "all"):
            answer.performance.CopyFrom(await self._metrics.performance(completed))
        if parsed.metric_type != "performance":
            councils = await find_councils(self._driver)
            status = await self._metrics.statuses(councils)
            if parsed.metric_type in ("agents", "all"):
                answer.agents.CopyFrom(await self._metrics.agents(councils, status, completed))
            if parsed.metric_type in ("councils", "all"):
                health = await self._metrics.councils(councils, status, completed, ended)
                answer.councils.CopyFrom(health)
        return answer


def require_roles_there(
    message: str, given: Mapping[str, Sequence[str]], known: Collection[str]
) -> None:
    """Refuse roles that nothing here has: a filter by one of them would only seem to work.

    Args:
        message: The name of the request in the contract.
        given: Field in the contract -> the roles that it names.
        known: The roles there are.

    Raises:
        InvalidInput: Names each field with such a role.
    """
    problems = [
        (field, f"{role[:40]!r} is unknown; roles are {', '.join(sorted(known))}")
        for field, roles in given.items()
        for role in roles
        if role not in known
    ]
    if problems:
        raise InvalidInput(message, problems)


def _as_json(fields: Mapping[str, str]) -> str:
    return json.dumps(dict(fields), sort_keys=True) if fields else ""


def _now_ms() -> int:
    return int(datetime.now(UTC).timestamp() * 1000)


_STARTED = time.monotonic()


def _uptime_s() -> float:
    return time.monotonic() - _STARTED
