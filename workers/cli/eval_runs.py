"""The workflows of `fleet eval`: started, joined or reused, and cancelled with the command."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from temporalio.client import Client, WorkflowFailureError, WorkflowHandle
from temporalio.common import WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError

from workers.cli.session import CommandError
from workflows.evaluation import EvaluationWorkflow
from workflows.execution import cause_of
from workflows.models.base import content_hash
from workflows.models.evaluation import EvaluationInput, EvaluationResult
from workflows.models.ids import evaluation_workflow_id
from workflows.stubs import STORY_QUEUE

ENDS_WITHIN_S = 60.0
"""How long the command waits, when it is interrupted, until what it cancelled has ended."""

FAILED = "failed"
"""How an evaluation ended that has no result: the next run of its name starts it again."""

Evaluation = WorkflowHandle[EvaluationWorkflow, EvaluationResult]


async def evaluate_all(
    client: Client,
    requests: Sequence[EvaluationInput],
    jobs: int,
    on_result: Callable[[EvaluationResult], None],
) -> list[EvaluationResult]:
    """Evaluate, so many at once, and return the results in the order of the requests.

    Args:
        client: of Temporal.
        requests: the tasks in their configurations.
        jobs: how many run at once.
        on_result: called with each result as it is known.

    Raises:
        CommandError: Temporal does not answer, or the run has another task of the same name.
    """
    places = asyncio.Semaphore(jobs)

    async def one(request: EvaluationInput) -> EvaluationResult:
        async with places:
            result = await evaluated(client, request)
        on_result(result)
        return result

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(each)) for each in requests]
    except* CommandError as errors:
        raise CommandError(str(errors.exceptions[0])) from None
    except* RPCError as errors:
        where = client.service_client.config.target_host
        raise CommandError(
            f"Temporal at {where}: {errors.exceptions[0]}. `make status` shows what runs; the same "
            "command goes on where it stopped"
        ) from None
    return [task.result() for task in tasks]


async def evaluated(client: Client, request: EvaluationInput) -> EvaluationResult:
    """Evaluate one task, or return the result of the run's evaluation of it.

    Raises:
        CommandError: the run has another task of this name.
        RPCError: Temporal does not answer.
    """
    handle, is_ours = await started(client, request)
    try:
        result = await handle.result()
    except WorkflowFailureError as error:
        return failed(request, cause_of(error))
    except asyncio.CancelledError:
        if is_ours:
            await cancelled(handle)
        raise
    if result.asked != asked(request):
        raise CommandError(
            f"--run: {request.run} has evaluated another {request.task.instance_id}, or with other "
            "limits; give this run another name"
        )
    return result


async def started(client: Client, request: EvaluationInput) -> tuple[Evaluation, bool]:
    """Start an evaluation; return its handle, and whether this call has started it."""
    workflow_id = evaluation_workflow_id(request.task_id)
    try:
        handle = await client.start_workflow(
            EvaluationWorkflow.run,
            request,
            id=workflow_id,
            task_queue=STORY_QUEUE,
            id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE_FAILED_ONLY,
            static_summary=f"{request.task.instance_id}, {request.configuration.name}",
        )
    except WorkflowAlreadyStartedError:
        return client.get_workflow_handle_for(EvaluationWorkflow.run, workflow_id), False
    return handle, True


async def cancelled(handle: Evaluation) -> None:
    """Cancel an evaluation, and wait until its agents and sandboxes have ended."""
    with suppress(RPCError, WorkflowFailureError, TimeoutError):
        await handle.cancel()
        async with asyncio.timeout(ENDS_WITHIN_S):
            await handle.result()


def asked(request: EvaluationInput) -> str:
    """Return the hash that the result of a request has."""
    return content_hash(request.model_dump(mode="json"))


def failed(request: EvaluationInput, cause: str) -> EvaluationResult:
    """Return the result of a request whose workflow failed."""
    return EvaluationResult(
        asked=asked(request),
        run=request.run,
        instance_id=request.task.instance_id,
        configuration=request.configuration.name,
        task_id=request.task_id,
        base=request.base,
        ended_by=FAILED,
        error=cause,
    )
