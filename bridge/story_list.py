"""The query that lists stories from Temporal's visibility."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from temporalio.client import Client, WorkflowExecution, WorkflowExecutionStatus

from bridge.executions import find_execution
from workflows.search_attributes import OUTBOX_STUCK, PENDING_GATE, STORY_ROLE, STORY_STATE

WORD = r"^[A-Za-z][A-Za-z0-9_-]{0,63}$"
"""The values that may be quoted in a visibility query."""

DESCRIBED_AT_ONCE = 32

STUCK_RUNS = f"ExecutionStatus = 'Running' AND {OUTBOX_STUCK.name} IS NOT NULL"
"""The visibility query for workflows of any type with an outbox entry that is refused for good."""


def stories_query(
    *,
    running: bool = False,
    waiting: bool = False,
    role: str | None = None,
    state: str | None = None,
) -> str:
    """Return the visibility query, as `temporal workflow list --query` takes it.

    A run that continued as new is part of its story's past, and is left out.

    Args:
        running: Only stories that have not ended.
        waiting: Only those that wait for a person; a story that has ended does not.
        role: Only those that wait for this role; matches WORD.
        state: Only those in this state; matches WORD.
    """
    status = "= 'Running'" if running or waiting or role else "!= 'ContinuedAsNew'"
    terms = ["WorkflowType = 'StoryWorkflow'", f"ExecutionStatus {status}"]
    if waiting or role:
        terms.append(f"{PENDING_GATE.name} IS NOT NULL")
    for key, value in ((STORY_ROLE, role), (STORY_STATE, state)):
        if value is not None:
            terms.append(f"{key.name} = '{value}'")
    return " AND ".join(terms)


async def newest_runs(
    temporal: Client, executions: Sequence[WorkflowExecution]
) -> list[WorkflowExecution]:
    """Return the executions without the ended ones whose id a later run has.

    Raises:
        RPCError: Temporal does not answer.
    """
    at_once = asyncio.Semaphore(DESCRIBED_AT_ONCE)

    async def is_newest(execution: WorkflowExecution) -> bool:
        if execution.status == WorkflowExecutionStatus.RUNNING:
            return True
        async with at_once:
            newest = await find_execution(temporal, execution.id)
        return newest is None or newest.run_id == execution.run_id

    newest = await asyncio.gather(*map(is_newest, executions))
    return [each for each, shown in zip(executions, newest, strict=True) if shown]
