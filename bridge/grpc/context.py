"""fleet.context.v1.ContextService: what agents are told of a story, and what others tell of it.

Reads come from the graph and nothing else. An update is a workflow's matter: it is answered when
its transaction has committed, and announced on the bus whatever happens here meanwhile.
"""

from __future__ import annotations

import time
import uuid
from datetime import UTC, datetime, timedelta
from typing import Annotated

from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from pydantic import Field, StringConstraints
from temporalio.client import Client, WithStartWorkflowOperation
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from activities.context import SCOPES, Scopes, check_scopes
from activities.graph import Graph
from activities.graph.sessions import RoleShare, Row, Session, known_role, known_roles, share_of
from activities.graph.statements import AHEAD_AT_MOST, moment
from bridge.grpc.access import caller
from bridge.grpc.calls import (
    REQUEST_ID,
    Context,
    derived_id,
    in_time,
    said,
    seconds_left,
    understood,
)
from bridge.grpc.errors import TOO_LARGE, refused
from bridge.grpc.server import LARGEST_MESSAGE
from bridge.grpc.wire import context_pb2, context_pb2_grpc
from workflows.context_update import REUSED, ContextUpdateWorkflow, request_hash
from workflows.ids import Id, LongId
from workflows.models import (
    REQUEST_REUSED,
    ContextAnswer,
    ContextUpdate,
    InvalidInput,
    PackQuery,
    Request,
    content_hash,
    context_workflow_id,
)
from workflows.stubs import STORY_QUEUE

ANSWERED_WITHIN_S = 60.0
"""How long a call without a deadline may take: the stores may be away meanwhile."""

EVENTS = 50
EVENTS_AT_MOST = 500
KEPT_S = 3_600
KEPT_AT_MOST_S = 7 * 24 * 3_600
TOKENS_AT_MOST = 100_000
ROLES_AT_MOST = 20
INT32 = (-(2**31), 2**31 - 1)

Word = Annotated[
    str, StringConstraints(strip_whitespace=True, pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,31}$")
]
"""A role or a phase, known or not."""


class PackAsked(Request):
    """A GetContextRequest. token_budget 0: the default of scopes.yaml."""

    story_id: Id
    role: Word
    phase: Annotated[Word, StringConstraints(to_upper=True)]
    subtask_id: LongId | None = None
    token_budget: int = Field(ge=0, le=TOKENS_AT_MOST)


class SessionAsked(Request):
    """A RehydrateSessionRequest. roles empty: all of scopes.yaml."""

    case_id: Id
    roles: list[Word] = Field(max_length=ROLES_AT_MOST)
    timeline_events: int = Field(ge=0, le=EVENTS_AT_MOST)
    ttl_seconds: int = Field(ge=0, le=KEPT_AT_MOST_S)


class ScopesAsked(Request):
    """A ValidateScopeRequest."""

    role: Word
    phase: Word
    provided_scopes: list[Annotated[str, StringConstraints(max_length=200)]] = Field(
        max_length=1_000
    )


class ContextServicer(context_pb2_grpc.ContextServiceServicer):
    """The context service; it has no state."""

    def __init__(self, temporal: Client, graph: Graph) -> None:
        self._temporal = temporal
        self._graph = graph

    async def GetContext(  # noqa: N802
        self, request: context_pb2.GetContextRequest, context: Context
    ) -> context_pb2.GetContextResponse:
        """A context pack; NOT_FOUND where the graph does not know the story."""
        asked = understood(
            PackAsked,
            "GetContextRequest",
            {
                "story_id": request.story_id,
                "role": request.role,
                "phase": request.phase,
                "subtask_id": request.subtask_id or None,
                "token_budget": request.token_budget,
            },
        )
        query = PackQuery(
            story_id=asked.story_id,
            role=asked.role,
            phase=asked.phase,
            subtask_id=asked.subtask_id or "",
            token_budget=asked.token_budget,
        )
        async with in_time(context, ANSWERED_WITHIN_S):
            pack = await self._graph.known_pack(query)
        blocks = context_pb2.PromptBlocks(
            system=pack.system, context=pack.context, tools=pack.tools
        )
        answer = context_pb2.GetContextResponse(
            context="\n\n".join(filter(None, (pack.system, pack.context, pack.tools))),
            token_count=pack.token_count,
            scopes=pack.scopes,
            version=pack.version,
            blocks=blocks,
        )
        require_size(answer, f"the pack of {asked.story_id}", "a smaller token_budget")
        return answer

    async def UpdateContext(  # noqa: N802
        self, request: context_pb2.UpdateContextRequest, context: Context
    ) -> context_pb2.UpdateContextResponse:
        """Store changes in one transaction; a bad one is a warning, and the others are stored.

        A request that comes again with its `x-request-id` gets the answer that it got.
        """
        update = understood(
            ContextUpdate,
            "UpdateContextRequest",
            {
                "story_id": request.story_id,
                "task_id": request.task_id or None,
                "role": request.role,
                "actor": caller().actor,
                "changes": [
                    {
                        "operation": change.operation,
                        "entity_type": change.entity_type,
                        "entity_id": change.entity_id,
                        "payload": change.payload,
                        "reason": change.reason,
                    }
                    for change in request.changes
                ],
                "timestamp": request.timestamp,
            },
        )
        _require_time(update.timestamp)
        request_id = said(context).get(REQUEST_ID) or uuid.uuid4().hex
        async with in_time(context, ANSWERED_WITHIN_S):
            answer = await self._stored(
                update,
                context_workflow_id(update.story_id, derived_id(update.actor, request_id)),
                timedelta(seconds=seconds_left(context, ANSWERED_WITHIN_S)),
            )
        return context_pb2.UpdateContextResponse(
            version=answer.version, hash=answer.hash, warnings=answer.warnings
        )

    async def RehydrateSession(  # noqa: N802
        self, request: context_pb2.RehydrateSessionRequest, context: Context
    ) -> context_pb2.RehydrateSessionResponse:
        """What each role is told as the story is taken up again; unknown roles get the headers."""
        asked = understood(
            SessionAsked,
            "RehydrateSessionRequest",
            {
                "case_id": request.case_id,
                "roles": list(request.roles),
                "timeline_events": request.timeline_events,
                "ttl_seconds": request.ttl_seconds,
            },
        )
        events = (asked.timeline_events or EVENTS) if request.include_timeline else 0
        async with in_time(context, ANSWERED_WITHIN_S):
            session = await self._graph.read_session(
                asked.case_id, events, request.include_summaries
            )
            answer = rehydrated(session, self._graph.scopes, asked.roles)
            require_size(
                answer, f"the session of {asked.case_id}", "fewer roles, or fewer timeline_events"
            )
            if request.persist_bundle:
                told = content_hash(MessageToJson(answer, preserving_proto_field_name=True))
                answer.generated_at_ms = int(time.time() * 1000)
                text = MessageToJson(answer, preserving_proto_field_name=True, indent=None)
                await self._graph.keep_session(
                    asked.case_id, told, text, asked.ttl_seconds or KEPT_S
                )
        answer.generated_at_ms = answer.generated_at_ms or int(time.time() * 1000)
        return answer

    async def ValidateScope(  # noqa: N802
        self, request: context_pb2.ValidateScopeRequest, context: Context
    ) -> context_pb2.ValidateScopeResponse:
        """Whether these are the scopes of a role in a phase: no fewer, and no more."""
        asked = understood(
            ScopesAsked,
            "ValidateScopeRequest",
            {
                "role": request.role,
                "phase": request.phase,
                "provided_scopes": list(request.provided_scopes),
            },
        )
        scopes = self._graph.scopes
        provided = set(asked.provided_scopes)
        missing, extra = check_scopes(scopes, asked.role, asked.phase, provided)
        return context_pb2.ValidateScopeResponse(
            allowed=not missing and not extra,
            missing=missing,
            extra=extra,
            reason=verdict(scopes, asked.role, asked.phase, missing, extra),
        )

    async def _stored(
        self, update: ContextUpdate, workflow_id: str, within: timedelta
    ) -> ContextAnswer:
        """Start the update's workflow, or find it, and wait until the update is stored."""
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
            ended = self._temporal.get_workflow_handle_for(ContextUpdateWorkflow.run, workflow_id)
        try:
            return await ended.get_update_handle_for(ContextUpdateWorkflow.stored, request).result(
                rpc_timeout=within
            )
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            raise refused(REQUEST_REUSED, REUSED) from None


def _require_time(timestamp: str) -> None:
    """Refuse a time that cannot be read, or has not come: what is later in time wins.

    Raises:
        InvalidInput: with the rule.
    """
    if not timestamp:
        return
    try:
        at = moment(timestamp, "timestamp")
    except ApplicationError as error:
        rule = error.message.removeprefix("timestamp: ")
        raise InvalidInput("UpdateContextRequest", [("timestamp", rule)]) from None
    now = datetime.now(UTC)
    if at > now + AHEAD_AT_MOST:
        rule = f"is later than now ({now:%Y-%m-%dT%H:%M:%SZ}); set your clock, or leave it out"
    elif at.year < 1970:
        rule = "is before 1970; leave it out"
    else:
        return
    raise InvalidInput("UpdateContextRequest", [("timestamp", rule)])


# --- models to messages ---------------------------------------------------------------------------


def require_size(answer: Message, what: str, instead: str) -> None:
    """Refuse what no client could read.

    Raises:
        ApplicationError: TOO_LARGE. instead: what to ask for.
    """
    if (size := answer.ByteSize()) > LARGEST_MESSAGE:
        words = f"{what} has {size} bytes, more than {LARGEST_MESSAGE}: ask for {instead}"
        raise refused(TOO_LARGE, words)


def rehydrated(
    session: Session, scopes: Scopes, roles: list[str]
) -> context_pb2.RehydrateSessionResponse:
    """The packs, each under the role as it was asked for; none asked for: all there are.

    `token_budget_hint` is scopes.yaml's `token_budget`: what a pack of this fleet's may take of a
    model's window. `stats` count what is in any of the packs, each thing once. A number of
    somebody else's that an int32 cannot hold is shown as the last that it can.
    """
    meant = {asked: scopes.role(asked) for asked in roles or known_roles(scopes)}
    shares = {role: share_of(session, scopes, role) for role in sorted(set(meant.values()))}
    known = {role for role in shares if known_role(scopes, role)}
    packs = {
        role: _pack(session, scopes, role, share, role in known) for role, share in shares.items()
    }
    return context_pb2.RehydrateSessionResponse(
        case_id=session.case["case_id"],
        packs={asked: packs[role] for asked, role in meant.items()},
        stats=context_pb2.RehydrationStats(
            decisions=len({row["id"] for share in shares.values() for row in share.decisions}),
            decision_edges=len({edge for share in shares.values() for edge in share.edges}),
            impacts=len(
                {
                    (decision, task["subtask_id"])
                    for share in shares.values()
                    for decision, task in share.impacts
                }
            ),
            events=len(session.milestones) if known else 0,
            roles=sorted(meant),
        ),
    )


def _pack(
    session: Session, scopes: Scopes, role: str, share: RoleShare, known: bool
) -> context_pb2.RoleContextPack:
    return context_pb2.RoleContextPack(
        role=role,
        case_header=context_pb2.CaseHeader(**session.case),
        plan_header=context_pb2.PlanHeader(**_bounded(session.plan, "version"))
        if session.plan
        else None,
        subtasks=[context_pb2.Subtask(**_bounded(task, "priority")) for task in share.tasks],
        decisions=[context_pb2.Decision(**decision) for decision in share.decisions],
        decision_deps=[
            context_pb2.DecisionRelation(src_id=src, dst_id=dst, relation_type="DEPENDS_ON")
            for src, dst in share.edges
        ],
        impacted=[
            context_pb2.ImpactedSubtask(
                decision_id=decision, subtask_id=task["subtask_id"], title=task["title"]
            )
            for decision, task in share.impacts
        ],
        milestones=[context_pb2.Milestone(**row) for row in session.milestones] if known else [],
        last_summary=session.summary if known else "",
        token_budget_hint=scopes.token_budget,
    )


def _bounded(row: Row, name: str) -> Row:
    low, high = INT32
    return row | {name: min(max(row[name], low), high)}


def verdict(scopes: Scopes, role: str, phase: str, missing: list[str], extra: list[str]) -> str:
    """In words, why scopes are allowed or not."""
    where = f"{scopes.role(role)} in {phase.upper()}"
    faults = []
    if missing:
        faults.append(f"{where} lacks {', '.join(missing)}")
    unknown = [scope for scope in extra if scope not in SCOPES]
    if known_extra := [scope for scope in extra if scope in SCOPES]:
        faults.append(f"{where} is not given {', '.join(known_extra)}")
    if unknown:
        faults.append(f"there is no scope {', '.join(unknown)}")
    if not faults:
        return f"these are the scopes of {where}"
    if not known_role(scopes, scopes.role(role)):
        faults.append(f"{role} is no role, and has the headers only")
    elif phase.upper() not in scopes.scopes:
        faults.append(f"{phase} is no phase, and has the headers only")
    return "; ".join(faults)
