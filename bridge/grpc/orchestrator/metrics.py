"""Real counts and times of the fleet's work, from Temporal's visibility and its workflows.

Visibility follows a workflow within about a second, and keeps it for the namespace's retention.
Times are of the last `SAMPLE` completed deliberations.
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

from activities.graph.councils import StandingAgent, StoredCouncil
from bridge.grpc.wire import orchestrator_pb2 as pb
from workflows.deliberation import DeliberationWorkflow
from workflows.models.agents import CallUsage
from workflows.models.ids import called_deliberation_workflow_id
from workflows.search_attributes import STORY_ROLE
from workflows.stubs import AGENTS_QUEUE, STORY_QUEUE

SAMPLE = 500
"""Maximum number of completed deliberations whose times are used."""

CALLS_OF = 20
"""Maximum number of completed deliberations whose agents' calls are used.

Each of them is a history to read.
"""

ASKED_AT_ONCE = 100
"""Maximum number of running deliberations that are queried for their agents at work."""

ASKED_WITHIN = timedelta(seconds=2)

CALLED = "call-"
"""Prefix of the task ids that Deliberate makes; those of Orchestrate and the CLI have others."""

ALL = "WorkflowType = 'DeliberationWorkflow'"
RUNNING = f"{ALL} AND ExecutionStatus = 'Running'"
COMPLETED = f"{ALL} AND ExecutionStatus = 'Completed'"
ENDED = f"{ALL} AND ExecutionStatus != 'Running'"

ALONE = " AND ParentWorkflowId IS NULL"
OF_CALLS = f"{ALONE} AND WorkflowId STARTS_WITH '{called_deliberation_workflow_id(CALLED)}'"


class Metrics:
    """Metrics of the running fleet.

    All methods raise RPCError if Temporal does not answer.
    """

    def __init__(self, temporal: Client) -> None:
        self._temporal = temporal

    async def count(self, query: str) -> int:
        """Count the workflows that match the query."""
        try:
            return (await self._temporal.count_workflows(query)).count
        except RPCError as error:
            if error.status != RPCStatusCode.INVALID_ARGUMENT:
                raise
            return 0  # the search attribute is not registered: no deliberation has ever run

    async def orchestrations(self) -> int:
        """Count the deliberations without a parent that have a task's id.

        Orchestrate and the CLI start such deliberations.
        """
        alone, of_calls = await asyncio.gather(self.count(ALL + ALONE), self.count(ALL + OF_CALLS))
        return max(0, alone - of_calls)

    async def durations_ms(self, query: str) -> list[float]:
        """Return the times in ms from start to end of the last deliberations that were closed."""
        found = self._temporal.list_workflows(query, limit=SAMPLE)
        return [
            (each.close_time - each.start_time).total_seconds() * 1000
            async for each in found
            if each.close_time
        ]

    async def orchestration_ms(self, query: str) -> list[float]:
        """Return times as `durations_ms` does, of deliberations that `orchestrations` counts."""
        found = self._temporal.list_workflows(query + ALONE, limit=SAMPLE)
        return [
            (each.close_time - each.start_time).total_seconds() * 1000
            async for each in found
            if each.close_time and not each.id.startswith(called_deliberation_workflow_id(CALLED))
        ]

    async def calls(self, query: str) -> list[CallUsage]:
        """Return the agents' answered calls in the last `CALLS_OF` deliberations of the query."""
        found = self._temporal.list_workflows(query, limit=CALLS_OF)
        handles = [
            self._temporal.get_workflow_handle_for(
                DeliberationWorkflow.run, each.id, run_id=each.run_id
            )
            async for each in found
        ]
        results = await asyncio.gather(*(each.result() for each in handles))
        return [call for result in results for call in result.usage]

    async def busy_agents(self) -> set[str]:
        """Return the agents whose answers running deliberations wait for.

        Deliberations that do not answer in time are left out.
        """
        found = self._temporal.list_workflows(RUNNING, limit=ASKED_AT_ONCE)
        ids = [each.id async for each in found]
        waiting = await asyncio.gather(*map(self._waiting, ids))
        return {agent for agents in waiting for agent in agents}

    async def is_served(self) -> bool:
        """Return whether workers polled for workflows and for agents' calls in five minutes."""
        polled = await asyncio.gather(
            self._polled(STORY_QUEUE, TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW),
            self._polled(AGENTS_QUEUE, TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY),
        )
        return all(polled)

    async def stats(self, councils: Sequence[StoredCouncil], served: bool) -> pb.OrchestratorStats:
        """Return the statistics of all deliberations for GetStatus; `served`: see `is_served`."""
        total, orchestrations, durations, by_role = await asyncio.gather(
            self.count(ALL),
            self.orchestrations(),
            self.durations_ms(COMPLETED),
            asyncio.gather(*(self.count(of_role(ALL, each.role)) for each in councils)),
        )
        return pb.OrchestratorStats(
            total_deliberations=total,
            total_orchestrations=orchestrations,
            avg_deliberation_time_ms=mean(durations),
            active_councils=len(_active(councils, served)),
            role_counts={
                council.role: number for council, number in zip(councils, by_role, strict=True)
            },
        )

    async def council_infos(
        self, councils: Sequence[StoredCouncil], with_agents: bool, default_model: str
    ) -> list[pb.CouncilInfo]:
        """Return the councils' current state, with their agents if requested.

        `default_model` is that of the fleet's agents that name none; empty if it is not known.
        """
        running = await asyncio.gather(*(self._deliberates(each.role) for each in councils))
        status: Mapping[str, str] = {}
        if with_agents:
            status = await self.statuses(councils)
        return [
            _council_info(council, busy, status, default_model)
            for council, busy in zip(councils, running, strict=True)
        ]

    async def statuses(self, councils: Sequence[StoredCouncil]) -> dict[str, str]:
        """Return agent -> ready, busy or offline (see ListCouncils)."""
        served, busy = await asyncio.gather(self.is_served(), self.busy_agents())
        agents = [agent.agent_id for council in councils for agent in council.agents]
        idle = "ready" if served else "offline"
        return {agent: "busy" if served and agent in busy else idle for agent in agents}

    async def performance(self, completed: str) -> pb.PerformanceMetrics:
        """Return the times of the deliberations of the query."""
        durations, orchestrations = await asyncio.gather(
            self.durations_ms(completed), self.orchestration_ms(completed)
        )
        return pb.PerformanceMetrics(
            avg_deliberation_ms=mean(durations),
            avg_orchestration_ms=mean(orchestrations),
            p50_latency_ms=percentile(durations, 50),
            p95_latency_ms=percentile(durations, 95),
            p99_latency_ms=percentile(durations, 99),
        )

    async def agents(
        self, councils: Sequence[StoredCouncil], status: Mapping[str, str], completed: str
    ) -> pb.AgentMetrics:
        """Return counts and response times of the councils' agents; `status`: see `statuses`."""
        calls = await self.calls(completed)
        return pb.AgentMetrics(
            total_agents=len(status),
            active_agents=sum(each != "offline" for each in status.values()),
            agents_per_role={council.role: len(council.agents) for council in councils},
            avg_agent_response_time_ms=mean([call.latency_ms for call in calls]),
        )

    async def councils(
        self,
        councils: Sequence[StoredCouncil],
        status: Mapping[str, str],
        completed: str,
        ended: str,
    ) -> pb.CouncilMetrics:
        """Return the health of the councils.

        `completed` and `ended` are queries, for the success rate. `status`: see `statuses`.
        """
        health = await asyncio.gather(
            *(self._council_health(each, status, completed, ended) for each in councils)
        )
        return pb.CouncilMetrics(
            total_councils=len(councils),
            active_councils=sum(each.status != "offline" for each in health),
            health_per_council={
                council.role: each for council, each in zip(councils, health, strict=True)
            },
        )

    async def _council_health(
        self, council: StoredCouncil, status: Mapping[str, str], completed: str, ended: str
    ) -> pb.CouncilHealth:
        good, all_ended, deliberates = await asyncio.gather(
            self.count(of_role(completed, council.role)),
            self.count(of_role(ended, council.role)),
            self._deliberates(council.role),
        )
        states = [status[agent.agent_id] for agent in council.agents]
        offline = not states or "offline" in states
        return pb.CouncilHealth(
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
            return []  # it has ended, or no worker answers: then no agent works in it
        return progress.waiting

    async def _polled(self, queue: str, kind: TaskQueueType.ValueType) -> bool:
        described = await self._temporal.workflow_service.describe_task_queue(
            DescribeTaskQueueRequest(
                namespace=self._temporal.namespace,
                task_queue=TaskQueue(name=queue),
                task_queue_type=kind,
            )
        )
        return bool(described.pollers)


def of_role(query: str, role: str) -> str:
    """Limit the query to the council of that role."""
    quoted = role.replace("'", "''")
    return f"{query} AND {STORY_ROLE.name} = '{quoted}'"


def since(query: str, time_range_ms: int, now: datetime) -> str:
    """Limit the query to what was closed in the last `time_range_ms`; 0 means no limit."""
    if not time_range_ms or time_range_ms >= now.timestamp() * 1000:
        return query
    begin = (now - timedelta(milliseconds=time_range_ms)).astimezone(UTC)
    return f"{query} AND CloseTime >= '{begin.isoformat(timespec='milliseconds')}'"


def mean(values: Sequence[float]) -> float:
    """Return the mean; 0 without values."""
    return sum(values) / len(values) if values else 0.0


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the smallest value that `percent` % of the values do not exceed; 0 without values."""
    ordered = sorted(values)
    return ordered[max(1, ceil(len(ordered) * percent / 100)) - 1] if ordered else 0.0


def _council_info(
    council: StoredCouncil, busy: bool, status: Mapping[str, str], default_model: str
) -> pb.CouncilInfo:
    """Build the info of a council; without `status`, its agents are not included."""
    # The model of an external agent that names none is not known here.
    models = {
        agent.model or ("" if agent.agent_type == "NATS" else default_model)
        for agent in council.agents
    }
    return pb.CouncilInfo(
        council_id=council.council_id,
        role=council.role,
        num_agents=len(council.agents),
        agents=[_agent_info(agent, status[agent.agent_id]) for agent in council.agents]
        if status
        else [],
        status="busy" if busy else "idle",
        model=", ".join(sorted(filter(None, models))),
    )


def _agent_info(agent: StandingAgent, status: str) -> pb.AgentInfo:
    return pb.AgentInfo(
        agent_id=agent.agent_id,
        role=agent.role,
        status=status,
        capabilities=pb.AgentCapabilities(
            supported_tasks=agent.supported_tasks,
            model_profile=agent.model,
            max_concurrent_tasks=agent.max_concurrent_tasks,
            languages=agent.languages,
        ),
    )


def _active(councils: Sequence[StoredCouncil], served: bool) -> list[StoredCouncil]:
    return [council for council in councils if served and council.agents]
