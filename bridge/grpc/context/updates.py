"""Writes of others into a story's context: who may change what, and the workflow that stores it.

Every write of the context service is a ContextUpdateWorkflow, and so is every case or transition
that the Orchestrator service receives for a story without a workflow. The call is answered when the
transaction has committed, and the update is published on the bus even if this process fails.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from temporalio.client import (
    Client,
    WithStartWorkflowOperation,
    WorkflowExecutionStatus,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from activities.graph.context_update.payloads import (
    CasePayload,
    DecisionPayload,
    MilestonePayload,
    PlanPayload,
)
from activities.graph.context_update.rules import ParsedChange, read_changes
from activities.tokens import Caller
from bridge.executions import find_execution
from bridge.grpc.auth import caller
from bridge.grpc.calls import (
    REQUEST_ID,
    Context,
    call_metadata,
    derived_id,
    in_time,
    seconds_left,
)
from bridge.grpc.roles import OPERATOR, PO, WRITERS
from workflows.context_update import REUSED, ContextUpdateWorkflow
from workflows.models.access import require_person
from workflows.models.context import (
    ContextAnswer,
    ContextChange,
    ContextUpdate,
    ContextWrite,
    PhaseChange,
    request_hash,
)
from workflows.models.errors import ErrorType, InvalidInput, application_error
from workflows.models.ids import context_workflow_id, story_workflow_id
from workflows.stubs import STORY_QUEUE
from workflows.timestamps import format_timestamp

ANSWERED_WITHIN_S = 60.0
"""How long a call without a deadline may take.

The stores may be unavailable for a part of this time.
"""

NOT_READY = "Workflow Task in failed state"
"""Temporal's message while a task is tried again because its worker was too busy.

The call is then repeated.
"""

READY_EVERY_S = 0.2


# --- who may change what --------------------------------------------------------------------------


def about_case(update: ContextUpdate) -> bool:
    """Return whether a change is about the case itself.

    If it is, it matters whether a workflow runs the story.
    """
    return any(change.entity_type.strip().upper() == "CASE" for change in update.changes)


def require_roles(caller: Caller, update: ContextUpdate, story_runs: bool) -> None:
    """Refuse the whole update if the caller may not make one of its changes.

    Changes that cannot be read are refused when the update is stored.

    Raises:
        ApplicationError: `Permission` names the change and the roles that may make it; `StoryRuns`:
            a workflow holds what the change is about.
    """
    for change in _read(update):
        if change.entity_type == "CASE" and story_runs and _about_our_fields(change):
            raise application_error(
                ErrorType.STORY_RUNS,
                f"change {change.number} ({change}): the workflow of story {update.story_id} "
                "holds its text and its state. Change the text with the update `amend` "
                "(fleet amend, role PO), the state with Transition or TransitionPhase",
            )
        require_person(_other_name(change, caller.actor))
        roles = roles_for(change, caller.actor)
        if not caller.roles.intersection(roles):
            has = ", ".join(sorted(caller.roles)) or "none"
            raise application_error(
                ErrorType.PERMISSION,
                f"change {change.number} ({change}) needs the role {' or '.join(roles)}"
                f"{_why(change, caller.actor)}; the token of {caller.actor} has {has}",
            )
    caller.require_role(*WRITERS)  # for what cannot be read, too


def roles_for(change: ParsedChange, actor: str) -> tuple[str, ...]:
    """Return the roles that may make the change; one of them is enough."""
    if change.operation == "DELETE":
        return (PO,)
    if change.entity_type == "CASE" or _other_name(change, actor):
        return (OPERATOR,)
    if isinstance(change.payload, PlanPayload):
        plan = change.payload
        if plan.version is not None or plan.status not in (None, "DRAFT"):
            return (PO,)
    return WRITERS


def _read(update: ContextUpdate) -> Iterable[ParsedChange]:
    now = datetime.now(UTC)
    write = ContextWrite(
        update_id="", at=format_timestamp(now), started_ms=int(time.time() * 1000), update=update
    )
    return (change for change in read_changes(write) if isinstance(change, ParsedChange))


def _about_our_fields(change: ParsedChange) -> bool:
    """Return whether the change is about fields that a story's workflow holds.

    A workflow does not hold the fields that others add to a case.
    """
    payload = change.payload
    return change.operation != "UPDATE" or bool(payload and payload.model_dump(exclude_none=True))


def _other_name(change: ParsedChange, actor: str) -> str:
    """Return the name in which the change is made, if it is not the caller's; else empty."""
    match change.payload:
        case DecisionPayload(decided_by=str(name)) | MilestonePayload(actor=str(name)):
            return name if name != actor else ""
        case CasePayload(created_by=str(name)):
            return name if name != actor else ""
    return ""


def _why(change: ParsedChange, actor: str) -> str:
    name = _other_name(change, actor) if change.operation != "DELETE" else ""
    return f", for it speaks in the name of {name[:60]}" if name else ""


# --- the workflow ---------------------------------------------------------------------------------


class Updates:
    """The context updates of the services' calls."""

    def __init__(self, temporal: Client) -> None:
        self._temporal = temporal

    async def story_runs(self, story_id: str) -> bool:
        """Return whether a workflow runs the story.

        Raises:
            RPCError: Temporal is unavailable.
        """
        found = await find_execution(self._temporal, story_workflow_id(story_id))
        return found is not None and found.status == WorkflowExecutionStatus.RUNNING

    async def change(
        self,
        context: Context,
        message: str,
        story_id: str,
        change: ContextChange,
        key: str = "",
        **more: Any,
    ) -> ContextAnswer:
        """Store one change in the caller's name.

        Args:
            context: The call.
            message: The name of its request in the contract.
            story_id: The story.
            change: The change.
            key: As for `store`.
            **more: Further fields of the update.

        Raises:
            InvalidInput: The change breaks a rule.
            ApplicationError: As `store`.
        """
        update = ContextUpdate(story_id=story_id, actor=caller().actor, changes=[change], **more)
        answer = await self.store(context, update, key)
        if answer.warnings and not answer.changed:
            rule = answer.warnings[0].partition("): ")[2]
            raise InvalidInput(message, [("(the whole)", rule)])
        return answer

    async def transition(
        self, context: Context, message: str, story_id: str, moved: PhaseChange, at: str = ""
    ) -> None:
        """Store and publish the transition of a story without a workflow.

        Args:
            context: The call.
            message: The name of its request in the contract.
            story_id: The story.
            moved: The transition.
            at: Its time, ISO 8601; empty for now. Repeated with the same time, it is stored once.

        Raises:
            InvalidInput: The transition breaks a rule, or is older than what is stored.
            ApplicationError: As `store`.
        """
        change = ContextChange(
            operation="UPDATE",
            entity_type="CASE",
            payload=json.dumps({"status": moved.to_phase}),
            reason=moved.reason,
        )
        key = derived_id(moved.from_phase, moved.to_phase, moved.reason, at) if at else ""
        await self.change(context, message, story_id, change, key, phase_change=moved, timestamp=at)

    async def store(self, context: Context, update: ContextUpdate, key: str = "") -> ContextAnswer:
        """Store the update and return its answer.

        An update that is repeated with its `x-request-id` gets its first answer again; so does one
        without, if it has a `key`.

        Raises:
            ApplicationError: `RequestReused`; as `GraphStub.update_context`.
        """
        request_id = call_metadata(context).get(REQUEST_ID) or key or uuid.uuid4().hex
        workflow_id = context_workflow_id(update.story_id, derived_id(update.actor, request_id))
        async with in_time(context, ANSWERED_WITHIN_S):
            while True:
                within = timedelta(seconds=seconds_left(context, ANSWERED_WITHIN_S))
                try:
                    return await self._stored(update, workflow_id, within)
                except (RPCError, WorkflowUpdateRPCTimeoutOrCancelledError) as error:
                    if not _unanswered(error):
                        raise
                    await asyncio.sleep(READY_EVERY_S)

    async def _stored(
        self, update: ContextUpdate, workflow_id: str, within: timedelta
    ) -> ContextAnswer:
        request = request_hash(update)
        start = WithStartWorkflowOperation(
            ContextUpdateWorkflow.run,
            update,
            id=workflow_id,
            task_queue=STORY_QUEUE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
            static_summary=f"{len(update.changes)} changes of {update.story_id}'s context",
        )
        try:
            return await self._temporal.execute_update_with_start_workflow(
                ContextUpdateWorkflow.stored,
                request,
                id=request,
                start_workflow_operation=start,
                rpc_timeout=within,
            )
        except WorkflowAlreadyStartedError:  # and it has ended
            ended = self._temporal.get_workflow_handle(workflow_id)
        try:
            return await ended.get_update_handle_for(ContextUpdateWorkflow.stored, request).result(
                rpc_timeout=within
            )
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            raise application_error(ErrorType.REQUEST_REUSED, REUSED) from None


def _unanswered(error: RPCError | WorkflowUpdateRPCTimeoutOrCancelledError) -> bool:
    """Return whether to repeat a call, which finds its workflow and update by their ids.

    If many workflows are started at once, Temporal stops waiting for a worker earlier than the
    caller would.
    """
    if isinstance(error, RPCError):
        return error.status == RPCStatusCode.DEADLINE_EXCEEDED or NOT_READY in error.message
    return True
