"""Waiting for the end of a deliberation or plan that an earlier run of its story started.

See docs/design/0007-continue-as-new-with-a-child.md.
"""

from __future__ import annotations

import asyncio
from typing import Any

from temporalio import activity
from temporalio.client import Client, WorkflowFailureError
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from workflows.models.deliberation import ChildRun
from workflows.models.errors import ErrorType, application_error
from workflows.stubs import FOLLOW_CHILD


class Children:
    """The activity that follows workflows by their runs."""

    def __init__(self, temporal: Client) -> None:
        self._temporal = temporal

    @activity.defn(name=FOLLOW_CHILD)
    async def follow(self, child: ChildRun) -> Any:
        """Wait for the child's end and return its result.

        Raises:
            ApplicationError: not retryable: the child's own error; of type ChildEnded if it was
                cancelled, terminated or timed out, or if Temporal does not have it.
            ApplicationError: retryable: of type WorkerDrains, if this worker stops.
            RPCError: Temporal does not answer.
        """
        handle = self._temporal.get_workflow_handle(child.workflow_id, run_id=child.run_id)
        result = asyncio.ensure_future(handle.result())
        draining = asyncio.ensure_future(activity.wait_for_worker_shutdown())
        try:
            await asyncio.wait((result, draining), return_when=asyncio.FIRST_COMPLETED)
            if not result.done():
                raise application_error(
                    ErrorType.WORKER_DRAINS, "the worker drains: another goes on waiting"
                )
            return result.result()
        except WorkflowFailureError as failure:
            cause = failure.cause
            if isinstance(cause, ApplicationError):
                raise ApplicationError(
                    cause.message, *cause.details, type=cause.type, non_retryable=True
                ) from failure
            raise _ended(child, repr(cause)) from failure
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            raise _ended(child, "Temporal does not have it") from error
        finally:
            result.cancel()
            draining.cancel()


def _ended(child: ChildRun, how: str) -> ApplicationError:
    return application_error(
        ErrorType.CHILD_ENDED, f"{child.workflow_id} ended without a result: {how}"
    )
