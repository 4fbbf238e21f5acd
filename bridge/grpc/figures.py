"""Real counts and times of what the fleet does, from Temporal's visibility and its workflows.

Visibility follows a workflow within about a second, and knows one as long as the namespace keeps it
(its retention). Times are of the last `SAMPLE` that were completed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from math import ceil

from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from activities.graph.councils import StandingAgent, StandingCouncil
from bridge.grpc.wire import orchestrator_pb2 as wire
from workflows.deliberation import DeliberationWorkflow
from workflows.models import CallUsage, deliberation_workflow_id
from workflows.search_attributes import STORY_ROLE
from workflows.stubs import AGENTS_QUEUE, STORY_QUEUE

SAMPLE = 500
"""Completed deliberations whose times are looked at."""

CALLS_OF = 20
"""Completed deliberations whose agents' calls are looked at: each is a history to be read."""

ASKED_AT_ONCE = 100
"""Running deliberations that are asked who is at work in them."""

ASKED_WITHIN = timedelta(seconds=2)

CALLED = "call-"
"""Begins the task ids that Deliberate makes; Orchestrate's and the CLI's have others."""

ALL = "WorkflowType = 'DeliberationWorkflow'"
RUNNING = f"{ALL} AND ExecutionStatus = 'Running'"
COMPLETED = f"{ALL} AND ExecutionStatus = 'Completed'"
ENDED = f"{ALL} AND ExecutionStatus != 'Running'"

ALONE = " AND ParentWorkflowId IS NULL"
OF_CALLS = f"{ALONE} AND WorkflowId STARTS_WITH '{deliberation_workflow_id(CALLED)}'"


class Figures:
    """What is known of the fleet at work. Raises RPCError where Temporal does not answer."""

    def __init__(self, temporal: Client) -> None:
        self._temporal = temporal

    async def count(self, query: str) -> int:
        """How many there are."""
        try:
            return (await self._temporal.count_workflows(query)).count
        except RPCError as error:
            if error.status != RPCStatusCode.INVALID_ARGUMENT:
                raise
            return 0  # the search attribute is not registered: no deliberation has ever run

    async def orchestrations(self) -> int:
        """Deliberations that stand alone under a task's id: Orchestrate's, and the CLI's."""
        alone, of_calls = await asyncio.gather(self.count(ALL + ALONE), self.count(ALL + OF_CALLS))
        return max(0, alone - of_calls)

    async def durations_ms(self, query: str) -> list[float]:
        """From start to end, of the last that were closed."""
        found = self._temporal.list_workflows(query, limit=SAMPLE)
        return [
            (each.close_time - each.start_time).total_seconds() * 1000
            async for each in found
            if each.close_time
        ]

    async def orchestration_ms(self, query: str) -> list[float]:
        """As `durations_ms`, of those that `orchestrations` counts."""
        found = self._temporal.list_workflows(query + ALONE, limit=SAMPLE)
        return [
            (each.close_time - each.start_time).total_seconds() * 1000
            async for each in found
            if each.close_time and not each.id.startswith(deliberation_workflow_id(CALLED))
        ]

    async def calls(self, query: str) -> list[CallUsage]:
        """The agents' answered calls in the last few completed deliberations."""
        found = self._temporal.list_workflows(query, limit=CALLS_OF)
        handles = [
            self._temporal.get_workflow_handle_for(
                DeliberationWorkflow.run, each.id, run_id=each.run_id
            )
            async for each in found
        ]
        results = await asyncio.gather(*(each.result() for each in handles))
        return [call for result in results for call in result.usage]

    async def working(self) -> set[str]:
        """The agents who are asked at this moment, as far as their deliberations answer in time."""
        found = self._temporal.list_workflows(RUNNING, limit=ASKED_AT_ONCE)
        ids = [each.id async for each in found]
        waiting = await asyncio.gather(*map(self._waiting, ids))
        return {agent for agents in waiting for agent in agents}

    async def is_served(self) -> bool:
        """Whether workers have asked for workflows, and for agents' calls, in five minutes."""
        polled = await asyncio.gather(
            self._polled(STORY_QUEUE, TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW),
            self._polled(AGENTS_QUEUE, TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY),
        )
        return all(polled)

    async def stats(
        self, councils: Sequence[StandingCouncil], served: bool
    ) -> wire.OrchestratorStats:
        """What GetStatus tells of all deliberations; served: see `is_served`."""
        total, orchestrations, durations, by_role = await asyncio.gather(
            self.count(ALL),
            self.orchestrations(),
            self.durations_ms(COMPLETED),
            asyncio.gather(*(self.count(of_role(ALL, each.role)) for each in councils)),
        )
        return wire.OrchestratorStats(
            total_deliberations=total,
            total_orchestrations=orchestrations,
            avg_deliberation_time_ms=mean(durations),
            active_councils=len(_active(councils, served)),
            role_counts={
                council.role: number for council, number in zip(councils, by_role, strict=True)
            },
        )

    async def shown(
        self, councils: Sequence[StandingCouncil], with_agents: bool, default_model: str
    ) -> list[wire.CouncilInfo]:
        """The councils at this moment, and their agents where they are asked for.

        default_model: of agents of the fleet that name none; empty where it is not known.
        """
        running = await asyncio.gather(*(self._deliberates(each.role) for each in councils))
        status: Mapping[str, str] = {}
        if with_agents:
            status = await self.statuses(councils)
        return [
            _council_info(council, busy, status, default_model)
            for council, busy in zip(councils, running, strict=True)
        ]

    async def statuses(self, councils: Sequence[StandingCouncil]) -> dict[str, str]:
        """Agent -> ready, busy or offline (see ListCouncils)."""
        served, working = await asyncio.gather(self.is_served(), self.working())
        agents = [agent.agent_id for council in councils for agent in council.agents]
        idle = "ready" if served else "offline"
        return {agent: "busy" if served and agent in working else idle for agent in agents}

    async def performance(self, completed: str) -> wire.PerformanceMetrics:
        """Times of the deliberations of that query."""
        durations, orchestrations = await asyncio.gather(
            self.durations_ms(completed), self.orchestration_ms(completed)
        )
        return wire.PerformanceMetrics(
            avg_deliberation_ms=mean(durations),
            avg_orchestration_ms=mean(orchestrations),
            p50_latency_ms=percentile(durations, 50),
            p95_latency_ms=percentile(durations, 95),
            p99_latency_ms=percentile(durations, 99),
        )

    async def agents(
        self, councils: Sequence[StandingCouncil], status: Mapping[str, str], completed: str
    ) -> wire.AgentMetrics:
        """The councils' agents, and their response times; status: see `statuses`."""
        calls = await self.calls(completed)
        return wire.AgentMetrics(
            total_agents=len(status),
            active_agents=sum(each != "offline" for each in status.values()),
            agents_per_role={council.role: len(council.agents) for council in councils},
            avg_agent_response_time_ms=mean([call.latency_ms for call in calls]),
        )

    async def councils(
        self,
        councils: Sequence[StandingCouncil],
        status: Mapping[str, str],
        completed: str,
        ended: str,
    ) -> wire.CouncilMetrics:
        """The councils' health; completed, ended: queries, for the success rate."""
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
            self.count(of_role(completed, council.role)),
            self.count(of_role(ended, council.role)),
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

    async def _deliberates(self, role: str) -> bool:
        return await self.count(of_role(RUNNING, role)) > 0

    async def _waiting(self, workflow_id: str) -> list[str]:
        handle = self._temporal.get_workflow_handle_for(DeliberationWorkflow.run, workflow_id)
        try:
            progress = await handle.query(DeliberationWorkflow.progress, rpc_timeout=ASKED_WITHIN)
        except RPCError:
            return []  # it has ended, or no worker answers: then nobody is at work in it
        return progress.waiting

    async def _polled(self, queue: str, kind: TaskQueueType.ValueType) -> bool:
        told = await self._temporal.workflow_service.describe_task_queue(
            DescribeTaskQueueRequest(
                namespace=self._temporal.namespace,
                task_queue=TaskQueue(name=queue),
                task_queue_type=kind,
            )
        )
        return bool(told.pollers)


def of_role(query: str, role: str) -> str:
    """The query, of that council only."""
    quoted = role.replace("'", "''")
    return f"{query} AND {STORY_ROLE.name} = '{quoted}'"


def since(query: str, time_range_ms: int, now: datetime) -> str:
    """The query, of what was closed in that time; 0: whenever."""
    if not time_range_ms or time_range_ms >= now.timestamp() * 1000:
        return query
    begin = (now - timedelta(milliseconds=time_range_ms)).astimezone(UTC)
    return f"{query} AND CloseTime >= '{begin.isoformat(timespec='milliseconds')}'"


def mean(values: Sequence[float]) -> float:
    """0 where there is none."""
    return sum(values) / len(values) if values else 0.0


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent do not exceed; 0 where there is none."""
    ordered = sorted(values)
    return ordered[max(1, ceil(len(ordered) * percent / 100)) - 1] if ordered else 0.0


def _council_info(
    council: StandingCouncil, busy: bool, status: Mapping[str, str], default_model: str
) -> wire.CouncilInfo:
    """Where `status` is empty, the agents are not shown."""
    # What an external agent that names no model runs on is not known here.
    models = {
        agent.model or ("" if agent.agent_type == "NATS" else default_model)
        for agent in council.agents
    }
    return wire.CouncilInfo(
        council_id=council.council_id,
        role=council.role,
        num_agents=len(council.agents),
        agents=[_agent_info(agent, status[agent.agent_id]) for agent in council.agents]
        if status
        else [],
        status="busy" if busy else "idle",
        model=", ".join(sorted(filter(None, models))),
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
