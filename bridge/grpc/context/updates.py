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
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from temporalio.client import (
    Client,
    WithStartWorkflowOperation,
    WorkflowExecutionStatus,
    WorkflowUpdateFailedError,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from activities.graph.context_update.payloads import (
    CasePayload,
    DecisionPayload,
    MilestonePayload,
    PlanPayload,
)
from activities.graph.context_update.rules import ParsedChange, RejectedChange, read_changes
from activities.tokens import Caller
from bridge.executions import find_execution
from bridge.grpc.auth import caller
from bridge.grpc.calls import (
    REQUEST_ID,
    Context,
    call_metadata,
    derived_id,
    in_time,
    named,
    seconds_left,
)
from bridge.grpc.roles import OPERATOR, PO, WRITERS
from workflows.context_update import ContextUpdateWorkflow
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
        if isinstance(change, RejectedChange):
            continue
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


def _read(update: ContextUpdate) -> Sequence[ParsedChange | RejectedChange]:
    now = datetime.now(UTC)
    write = ContextWrite(
        update_id="", at=format_timestamp(now), started_ms=int(time.time() * 1000), update=update
    )
    return read_changes(write)


def _require_readable(update: ContextUpdate) -> None:
    """Refuse an update of which a change cannot be read, before a workflow is started for it.

    Raises:
        InvalidInput: Names the wrong fields of the first such change.
    """
    for change in _read(update):
        if isinstance(change, RejectedChange):
            problems = list(change.problems) or [("(the whole)", str(change))]
            raise InvalidInput("ContextUpdate", problems)


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
        names: Mapping[str, str] | None = None,
        **more: Any,
    ) -> ContextAnswer:
        """Store one change in the caller's name.

        Args:
            context: The call.
            message: The name of its request in the contract.
            story_id: The story.
            change: The change.
            key: As for `store`.
            names: Field of the payload -> field in the contract, if they differ.
            **more: Further fields of the update.

        Raises:
            InvalidInput: The change breaks a rule.
            ApplicationError: As `store`.
        """
        update = ContextUpdate(
            story_id=story_id, actor=caller().actor, changes=[change], whole=True, **more
        )
        with named(message, names):
            _require_readable(update)
        try:
            return await self.store(context, update, key)
        except WorkflowUpdateFailedError as error:
            cause = error.cause
            if isinstance(cause, ApplicationError) and cause.type == ErrorType.INVALID_INPUT:
                raise InvalidInput(message, [("(the whole)", cause.message)]) from None
            raise

    async def transition(
        self,
        context: Context,
        message: str,
        story_id: str,
        moved: PhaseChange,
        to_phase: str,
        at: str = "",
    ) -> None:
        """Store and publish the transition of a story without a workflow.

        Args:
            context: The call.
            message: The name of its request in the contract.
            story_id: The story.
            moved: The transition.
            to_phase: The name that its `to_phase` has in the contract.
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
        names = {"status": to_phase}
        await self.change(
            context, message, story_id, change, key, names, phase_change=moved, timestamp=at
        )

    async def store(self, context: Context, update: ContextUpdate, key: str = "") -> ContextAnswer:
        """Store the update and return its answer.

        An update that is repeated with its `x-request-id` gets its first answer again; so does one
        without, if it has a `key`. After a refusal, which stored nothing, it is tried again.

        Raises:
            ApplicationError: `RequestReused`; as `GraphStub.update_context`.
        """
        given = call_metadata(context).get(REQUEST_ID) or key
        request_id = given or uuid.uuid4().hex
        workflow_id = context_workflow_id(
            update.story_id, derived_id(update.actor, request_id, request_hash(update))
        )
        async with in_time(context, ANSWERED_WITHIN_S):
            refused = await self._refused(workflow_id) if given else ""
            while True:
                within = timedelta(seconds=seconds_left(context, ANSWERED_WITHIN_S))
                try:
                    return await self._stored(update, workflow_id, refused, within)
                except (RPCError, WorkflowUpdateRPCTimeoutOrCancelledError) as error:
                    if not _unanswered(error):
                        raise
                    await asyncio.sleep(READY_EVERY_S)

    async def _refused(self, workflow_id: str) -> str:
        """Return the run in which the update was refused before; empty if there is none."""
        found = await find_execution(self._temporal, workflow_id)
        failed = found is not None and found.status == WorkflowExecutionStatus.FAILED
        return found.run_id if found and failed else ""

    async def _stored(
        self, update: ContextUpdate, workflow_id: str, refused: str, within: timedelta
    ) -> ContextAnswer:
        request = request_hash(update)
        start = WithStartWorkflowOperation(
            ContextUpdateWorkflow.run,
            update,
            id=workflow_id,
            task_queue=STORY_QUEUE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE_FAILED_ONLY,
            static_summary=f"{len(update.changes)} changes of {update.story_id}'s context",
        )
        try:
            return await self._temporal.execute_update_with_start_workflow(
                ContextUpdateWorkflow.stored,
                request,
                # Under the id that it had in the refused run, Temporal would answer for that run.
                id=f"{request}{refused}",
                start_workflow_operation=start,
                rpc_timeout=within,
            )
        except WorkflowAlreadyStartedError:  # and it has ended
            ended = self._temporal.get_workflow_handle_for(ContextUpdateWorkflow.run, workflow_id)
        return await ended.result(rpc_timeout=within)


def _unanswered(error: RPCError | WorkflowUpdateRPCTimeoutOrCancelledError) -> bool:
    """Return whether to repeat a call, which finds its workflow and update by their ids.

    If many workflows are started at once, Temporal stops waiting for a worker earlier than the
    caller would.
    """
    if isinstance(error, RPCError):
        return error.status == RPCStatusCode.DEADLINE_EXCEEDED or NOT_READY in error.message
    return True
