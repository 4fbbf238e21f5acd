"""fleet.context.v1.ContextService: context packs for agents, and changes that others send.

Reads come only from the graph. An update runs in a workflow: the call is answered when its
transaction has committed, and the update is published on the bus even if this process fails.
"""

from __future__ import annotations

import time
import uuid

from google.protobuf.json_format import MessageToJson
from temporalio.client import Client

from activities.graph.activities import Graph
from activities.graph.scopes import check_scopes
from bridge.executions import find_execution
from bridge.grpc.auth import caller
from bridge.grpc.calls import (
    REQUEST_ID,
    Context,
    call_metadata,
    derived_id,
    in_time,
    move_update_id,
    named,
    parse_request,
)
from bridge.grpc.context.messages import created, phase_answer, rehydrated, require_size, verdict
from bridge.grpc.context.requests import (
    DEPTH,
    EVENTS,
    FIRST_PHASE,
    KEPT_S,
    CaseFields,
    DecisionFields,
    NodeFields,
    PackFields,
    PhaseFields,
    ScopeFields,
    SessionFields,
    TaskFields,
    require_time,
)
from bridge.grpc.context.updates import (
    ANSWERED_WITHIN_S,
    Updates,
    about_case,
    require_roles,
)
from bridge.grpc.planning import REMARK_KEYS, remarks
from bridge.grpc.roles import OPERATOR
from bridge.grpc.wire import context_pb2, context_pb2_grpc
from bridge.story_moves import move
from workflows.models.access import require_person
from workflows.models.base import content_hash
from workflows.models.context import ContextUpdate, PackQuery, PhaseChange
from workflows.models.errors import ErrorType, InvalidInput, application_error
from workflows.models.ids import story_workflow_id


class ContextServicer(context_pb2_grpc.ContextServiceServicer):
    """The context service, which has no state."""

    def __init__(self, temporal: Client, graph: Graph) -> None:
        self._temporal = temporal
        self._graph = graph
        self._updates = Updates(temporal)

    async def GetContext(  # noqa: N802
        self, request: context_pb2.GetContextRequest, context: Context
    ) -> context_pb2.GetContextResponse:
        """Return a context pack.

        Raises:
            ApplicationError: `UnknownStory`; `TooLarge`.
        """
        parsed = parse_request(
            PackFields,
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
            story_id=parsed.story_id,
            role=parsed.role,
            phase=parsed.phase,
            subtask_id=parsed.subtask_id or "",
            token_budget=parsed.token_budget,
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
        require_size(answer, f"the pack of {parsed.story_id}", "a smaller token_budget")
        return answer

    async def UpdateContext(  # noqa: N802
        self, request: context_pb2.UpdateContextRequest, context: Context
    ) -> context_pb2.UpdateContextResponse:
        """Store changes in one transaction; an invalid change becomes a warning.

        The other changes are stored. A request that is repeated with its `x-request-id` gets its
        first answer again. If the token lacks the role for one change, nothing is stored.
        """
        update = parse_request(
            ContextUpdate,
            "UpdateContextRequest",
            {
                "story_id": request.story_id,
                "task_id": request.task_id or None,
                "role": request.role,
                "actor": caller().actor,
                "roles": sorted(caller().roles),
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
        require_time(update.timestamp)
        async with in_time(context, ANSWERED_WITHIN_S):
            runs = about_case(update) and await self._updates.story_runs(update.story_id)
        require_roles(caller(), update, runs)
        answer = await self._updates.store(context, update)
        return context_pb2.UpdateContextResponse(
            version=answer.version, hash=answer.hash, warnings=answer.warnings
        )

    async def RehydrateSession(  # noqa: N802
        self, request: context_pb2.RehydrateSessionRequest, context: Context
    ) -> context_pb2.RehydrateSessionResponse:
        """Return what each role needs to resume a story; unknown roles get only the headers."""
        parsed = parse_request(
            SessionFields,
            "RehydrateSessionRequest",
            {
                "case_id": request.case_id,
                "roles": list(request.roles),
                "timeline_events": request.timeline_events,
                "ttl_seconds": request.ttl_seconds,
            },
        )
        events = (parsed.timeline_events or EVENTS) if request.include_timeline else 0
        async with in_time(context, ANSWERED_WITHIN_S):
            session = await self._graph.read_session(
                parsed.case_id, events, request.include_summaries
            )
            answer = rehydrated(session, self._graph.scopes, parsed.roles)
            require_size(
                answer, f"the session of {parsed.case_id}", "fewer roles, or fewer timeline_events"
            )
            if request.persist_bundle:
                answer_hash = content_hash(MessageToJson(answer, preserving_proto_field_name=True))
                answer.generated_at_ms = int(time.time() * 1000)
                text = MessageToJson(answer, preserving_proto_field_name=True, indent=None)
                await self._graph.keep_session(
                    parsed.case_id, answer_hash, text, parsed.ttl_seconds or KEPT_S
                )
        answer.generated_at_ms = answer.generated_at_ms or int(time.time() * 1000)
        return answer

    async def ValidateScope(  # noqa: N802
        self, request: context_pb2.ValidateScopeRequest, context: Context
    ) -> context_pb2.ValidateScopeResponse:
        """Check that these are exactly the scopes of a role in a phase: no fewer, and no more."""
        parsed = parse_request(
            ScopeFields,
            "ValidateScopeRequest",
            {
                "role": request.role,
                "phase": request.phase,
                "provided_scopes": list(request.provided_scopes),
            },
        )
        scopes = self._graph.scopes
        provided = set(parsed.provided_scopes)
        missing, extra = check_scopes(scopes, parsed.role, parsed.phase, provided)
        return context_pb2.ValidateScopeResponse(
            allowed=not missing and not extra,
            missing=missing,
            extra=extra,
            reason=verdict(scopes, parsed.role, parsed.phase, missing, extra),
        )

    async def InitializeProjectContext(  # noqa: N802
        self, request: context_pb2.InitializeProjectContextRequest, context: Context
    ) -> context_pb2.InitializeProjectContextResponse:
        """Record a case without starting a workflow; a story that is known is not changed."""
        parsed, phase = await self._case(request, "InitializeProjectContextRequest", context)
        return context_pb2.InitializeProjectContextResponse(
            context_id=context_id(parsed.story_id), story_id=parsed.story_id, current_phase=phase
        )

    async def CreateStory(  # noqa: N802
        self, request: context_pb2.CreateStoryRequest, context: Context
    ) -> context_pb2.CreateStoryResponse:
        """Do the same as InitializeProjectContext, under its later name."""
        parsed, phase = await self._case(request, "CreateStoryRequest", context)
        return context_pb2.CreateStoryResponse(
            context_id=context_id(parsed.story_id), story_id=parsed.story_id, current_phase=phase
        )

    async def _case(
        self,
        request: context_pb2.InitializeProjectContextRequest | context_pb2.CreateStoryRequest,
        name: str,
        context: Context,
    ) -> tuple[CaseFields, str]:
        parsed = parse_request(
            CaseFields,
            name,
            {
                "story_id": request.story_id,
                "title": request.title,
                "description": request.description,
                "initial_phase": request.initial_phase or FIRST_PHASE,
            },
        )
        payload = {
            "title": parsed.title,
            "description": parsed.description,
            "status": parsed.initial_phase,
        }
        change = created("CASE", parsed.story_id, payload, "recorded without a workflow")
        names = {"status": "initial_phase"}
        await self._updates.change(
            context, name, parsed.story_id, change, names=names, if_absent=True
        )
        async with in_time(context, ANSWERED_WITHIN_S):
            phase = await self._graph.story_status(parsed.story_id)
        return parsed, phase or parsed.initial_phase

    async def CreateTask(  # noqa: N802
        self, request: context_pb2.CreateTaskRequest, context: Context
    ) -> context_pb2.CreateTaskResponse:
        """Store a subtask of the story's current plan; without a plan, it waits for one."""
        name = "CreateTaskRequest"
        parsed = parse_request(
            TaskFields,
            name,
            {
                "story_id": request.story_id,
                "task_id": request.task_id,
                "title": request.title,
                "description": request.description,
                "role": request.role,
                "dependencies": list(request.dependencies),
                "priority": request.priority,
                "estimated_hours": request.estimated_hours,
            },
        )
        if parsed.task_id in parsed.dependencies:
            raise InvalidInput(name, [("dependencies", "a task cannot wait for itself")])
        payload = parsed.model_dump(exclude={"story_id", "task_id"})
        change = created(
            "SUBTASK", parsed.task_id, {key: value for key, value in payload.items() if value}
        )
        names = {"depends_on": "dependencies"}
        await self._updates.change(context, name, parsed.story_id, change, names=names)
        async with in_time(context, ANSWERED_WITHIN_S):
            status = await self._graph.task_status(parsed.story_id, parsed.task_id)
        return context_pb2.CreateTaskResponse(
            task_id=parsed.task_id, story_id=parsed.story_id, status=status
        )

    async def AddProjectDecision(  # noqa: N802
        self, request: context_pb2.AddProjectDecisionRequest, context: Context
    ) -> context_pb2.AddProjectDecisionResponse:
        """Store a decision under a new id; the same `x-request-id` is the same decision.

        With the role OPERATOR, `decided_by` in the metadata names who decided. Otherwise it is the
        caller.
        """
        name = "AddProjectDecisionRequest"
        metadata = dict(request.metadata)
        parsed = parse_request(
            DecisionFields,
            name,
            {
                "story_id": request.story_id,
                "decision_type": request.decision_type or None,
                "title": request.title,
                "rationale": request.rationale,
                "alternatives_considered": request.alternatives_considered,
                "decided_by": metadata.pop("decided_by", "") or caller().actor,
                "metadata": metadata,
            },
            {"decided_by": "metadata.decided_by"},
        )
        if not parsed.title and not parsed.rationale.strip():
            raise InvalidInput(name, [("title", "required; add it")])
        require_person(parsed.decided_by)
        if parsed.decided_by != caller().actor:
            caller().require_role(OPERATOR)
        payload = {
            "type": parsed.decision_type,
            "title": parsed.title,
            "rationale": parsed.rationale,
            "alternatives_considered": parsed.alternatives_considered,
            "decided_by": parsed.decided_by,
            "metadata": parsed.metadata,
        }
        request_id = call_metadata(context).get(REQUEST_ID) or uuid.uuid4().hex
        decision_id = f"decision-{derived_id(caller().actor, parsed.story_id, request_id)}"
        change = created(
            "DECISION", decision_id, {key: value for key, value in payload.items() if value}
        )
        names = {"type": "decision_type", "decided_by": "metadata.decided_by"}
        await self._updates.change(context, name, parsed.story_id, change, names=names)
        return context_pb2.AddProjectDecisionResponse(decision_id=decision_id)

    async def TransitionPhase(  # noqa: N802
        self, request: context_pb2.TransitionPhaseRequest, context: Context
    ) -> context_pb2.TransitionPhaseResponse:
        """Move a story: through its workflow if it has one, else in the graph.

        Raises:
            ApplicationError: `UnknownStory`; `Permission`: the token lacks the move's role;
                `IllegalMove` names the moves that are legal, none if the story has ended.
        """
        name = "TransitionPhaseRequest"
        parsed = parse_request(
            PhaseFields,
            name,
            {
                "story_id": request.story_id,
                "from_phase": request.from_phase,
                "to_phase": request.to_phase,
                "rationale": request.rationale,
            },
        )
        async with in_time(context, ANSWERED_WITHIN_S):
            if await find_execution(self._temporal, story_workflow_id(parsed.story_id)):
                return phase_answer(parsed, await self._move(parsed, context))
        moved = PhaseChange(
            from_phase=parsed.from_phase,
            to_phase=parsed.to_phase,
            event="transition_phase",
            reason=parsed.rationale,
            via="token",
        )
        await self._updates.transition(context, name, parsed.story_id, moved, "to_phase")
        return phase_answer(parsed, parsed.to_phase)

    async def _move(self, parsed: PhaseFields, context: Context) -> str:
        """Make the move of a story with a workflow between two phases and return its new state."""
        words = remarks(call_metadata(context))
        if parsed.rationale:
            words = words._replace(reason=parsed.rationale, comment=parsed.rationale)
        with named("TransitionPhaseRequest", REMARK_KEYS):
            after = await move(
                self._temporal,
                parsed.story_id,
                lambda now: now.between(parsed.from_phase, parsed.to_phase, caller().roles),
                caller(),
                words,
                move_update_id(context),
            )
        return after.state

    async def GetGraphRelationships(  # noqa: N802
        self, request: context_pb2.GetGraphRelationshipsRequest, context: Context
    ) -> context_pb2.GetGraphRelationshipsResponse:
        """Return a node and at most 200 neighbours; `message` reports if there are more."""
        parsed = parse_request(
            NodeFields,
            "GetGraphRelationshipsRequest",
            {
                "node_id": request.node_id,
                "node_type": request.node_type,
                "depth": request.depth or DEPTH,
            },
        )
        async with in_time(context, ANSWERED_WITHIN_S):
            found = await self._graph.neighbourhood(parsed.node_type, parsed.node_id, parsed.depth)
        if found is None:
            kind = parsed.node_type.capitalize()
            raise application_error(ErrorType.NOT_FOUND, f"node not found: {kind} {parsed.node_id}")
        answer = context_pb2.GetGraphRelationshipsResponse(
            node=context_pb2.GraphNode(**found.node._asdict()),
            neighbors=[context_pb2.GraphNode(**each._asdict()) for each in found.neighbours],
            relationships=[
                context_pb2.GraphRelationship(
                    from_node_id=edge.source,
                    to_node_id=edge.target,
                    type=edge.type,
                    properties=edge.properties,
                )
                for edge in found.edges
            ],
            success=True,
            message=f"{len(found.neighbours)} neighbours"
            + (": the nearest ones, for there are more" if found.cut else ""),
        )
        require_size(answer, f"what is near {parsed.node_id}", "a smaller depth")
        return answer


def context_id(story_id: str) -> str:
    """Return the id by which clients know a story's context."""
    return f"ctx-{story_id}"
