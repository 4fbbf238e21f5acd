"""Limits of the agents' work that calls start: tokens, agents, rounds, and the text of a case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.exceptions import ApplicationError

from activities.quota import TokenQuota
from bridge.executions import find_execution
from workflows.models.agents import MAX_AGENTS, MAX_ROUNDS, MAX_TASKS
from workflows.models.errors import ErrorType, InvalidInput
from workflows.models.readiness import STORY_TEXT_BYTES

JOINED = (
    WorkflowExecutionStatus.RUNNING,
    WorkflowExecutionStatus.CONTINUED_AS_NEW,
    WorkflowExecutionStatus.COMPLETED,
)
"""Statuses of a workflow whose result a repeated call gets, so that it uses no tokens."""


@dataclass(frozen=True)
class Limits:
    """The limits of this process.

    Attributes:
        quota: each actor's tokens in an hour; None: no limit.
        agents: the setting GRPC_MAX_AGENTS.
        rounds: the setting GRPC_MAX_ROUNDS.
        text_bytes: the setting STORY_TEXT_BYTES.
        max_tasks: the setting PLAN_MAX_TASKS.
    """

    quota: TokenQuota | None = None
    agents: int = MAX_AGENTS
    rounds: int = MAX_ROUNDS
    text_bytes: int = STORY_TEXT_BYTES
    max_tasks: int = MAX_TASKS

    def require_fits(
        self, message: str, agents: Mapping[str, int], rounds: Mapping[str, int]
    ) -> None:
        """Refuse a council that is too large, or too many rounds.

        Args:
            message: the request's name.
            agents: its fields that name a number of agents.
            rounds: its fields that name a number of rounds.

        Raises:
            InvalidInput: names each wrong field.
        """
        wrong = [
            (field, f"at most {most} here ({setting}); ask for fewer")
            for fields, most, setting in (
                (agents, self.agents, "GRPC_MAX_AGENTS"),
                (rounds, self.rounds, "GRPC_MAX_ROUNDS"),
            )
            for field, number in fields.items()
            if number > most
        ]
        if wrong:
            raise InvalidInput(message, wrong)

    async def require_tokens(self, temporal: Client, actor: str, workflow_id: str) -> None:
        """Refuse to start a workflow for an actor whose tokens of this hour are used.

        A call that joins a workflow uses no tokens, and is not refused.

        Raises:
            ApplicationError: `QuotaUsed`; or by `activities.cache_errors.TABLE`, if Valkey does
                not answer.
        """
        if self.quota is None:
            return
        try:
            await self.quota.require_left(actor)
        except ApplicationError as error:
            if error.type != ErrorType.QUOTA_USED:
                raise
            found = await find_execution(temporal, workflow_id)
            if found is None or found.status not in JOINED:
                raise
