"""The service's answers, made from models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from google.protobuf.message import Message

from activities.graph.scopes import SCOPES, Scopes
from activities.graph.sessions import RoleShare, Session, known_role, known_roles, share_of
from bridge.grpc.context.requests import PhaseFields
from bridge.grpc.server import LARGEST_MESSAGE
from bridge.grpc.wire import context_pb2
from workflows.models.context import ContextChange
from workflows.models.errors import ErrorType, application_error
from workflows.timestamps import format_timestamp


def created(
    entity_type: str, entity_id: str, payload: Mapping[str, Any], reason: str = ""
) -> ContextChange:
    """Build the change that creates an entity."""
    return ContextChange(
        operation="CREATE",
        entity_type=entity_type,
        entity_id=entity_id,
        payload=json.dumps(payload, ensure_ascii=False),
        reason=reason,
    )


def phase_answer(parsed: PhaseFields, phase: str) -> context_pb2.TransitionPhaseResponse:
    """Build the answer with the story's phase and the current time."""
    return context_pb2.TransitionPhaseResponse(
        story_id=parsed.story_id,
        current_phase=phase,
        transitioned_at=format_timestamp(datetime.now(UTC)),
    )


def require_size(answer: Message, what: str, instead: str) -> None:
    """Refuse an answer that is too large for clients to read.

    Args:
        answer: The message.
        what: What it holds, for the error message.
        instead: What to ask for instead.

    Raises:
        ApplicationError: `TooLarge`.
    """
    if (size := answer.ByteSize()) > LARGEST_MESSAGE:
        words = f"{what} has {size} bytes, more than {LARGEST_MESSAGE}: ask for {instead}"
        raise application_error(ErrorType.TOO_LARGE, words)


def rehydrated(
    session: Session, scopes: Scopes, roles: list[str]
) -> context_pb2.RehydrateSessionResponse:
    """Build the packs, each under its role's name in the request; without roles, for all roles.

    `token_budget_hint` is `token_budget` of scopes.yaml: how much of a model's window one of this
    fleet's packs may take. `stats` count everything that is in any of the packs once.
    """
    meant = {name: scopes.role(name) for name in roles or known_roles(scopes)}
    shares = {role: share_of(session, scopes, role) for role in sorted(set(meant.values()))}
    known = {role for role in shares if known_role(scopes, role)}
    packs = {
        role: _pack(session, scopes, role, share, role in known) for role, share in shares.items()
    }
    return context_pb2.RehydrateSessionResponse(
        case_id=session.case["case_id"],
        packs={name: packs[role] for name, role in meant.items()},
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
        plan_header=context_pb2.PlanHeader(**session.plan) if session.plan else None,
        subtasks=[context_pb2.Subtask(**task) for task in share.tasks],
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


def verdict(scopes: Scopes, role: str, phase: str, missing: list[str], extra: list[str]) -> str:
    """Explain why scopes are allowed or not."""
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
        faults.append(f"{role} is not a role, and has the headers only")
    elif phase.upper() not in scopes.scopes:
        faults.append(f"{phase} is not a phase, and has the headers only")
    return "; ".join(faults)
