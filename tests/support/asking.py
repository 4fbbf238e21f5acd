"""A workflow that asks one agent once, with timeouts short enough for a test."""

from __future__ import annotations

from datetime import timedelta

from temporalio import workflow
from temporalio.common import RetryPolicy

from workflows.models.agents import ProposalAnswer, ProposeInput
from workflows.models.base import Model
from workflows.stubs import NATS_CALL, AgentStub


class Asking(Model):
    """A request to an agent, the longest silence in seconds, and the number of attempts."""

    request: ProposeInput
    silence_s: float = 60
    attempts: int = 1


@workflow.defn
class AskWorkflow:
    """A workflow that returns the agent's proposal."""

    @workflow.run
    async def run(self, asking: Asking) -> ProposalAnswer:
        retries = RetryPolicy(
            initial_interval=timedelta(milliseconds=50),
            maximum_interval=timedelta(milliseconds=200),
            maximum_attempts=asking.attempts,
        )
        silence = timedelta(seconds=asking.silence_s)
        options = NATS_CALL | {"heartbeat_timeout": silence, "retry_policy": retries}
        return await workflow.execute_activity_method(AgentStub.propose, asking.request, **options)
