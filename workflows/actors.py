"""The check of who sends a request to a workflow (docs/design/0013-signed-requests.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError

from workflows.stubs import CHECK_ACTOR, CHECK_ACTOR_LOCALLY, AccessStub

with workflow.unsafe.imports_passed_through():
    from workflows.models.access import (
        ActorCheck,
        CheckedActor,
        is_policy,
        request_content,
        reserved,
    )
    from workflows.models.base import Request
    from workflows.models.context import DecisionAdded
    from workflows.models.events import RequestRefused


async def check_actor(request: Request, actor: str, *roles: str, since: str) -> CheckedActor | None:
    """Return how a request's actor is known; None in histories of older releases.

    A proof, which older histories do not have, is checked in any case.

    Args:
        request: what is asked of the workflow.
        actor: who asks.
        roles: the token needs one of these; none: any token will do.
        since: the patch with which this check came.

    Raises:
        ApplicationError: `Unauthenticated` or `Permission`; or why it cannot be checked.
    """
    proof = getattr(request, "proof", "")
    if not proof and not workflow.patched(since):
        return None
    check = ActorCheck(
        workflow_id=workflow.info().workflow_id,
        actor=actor,
        roles=list(roles),
        content=request_content(request),
        proof=proof,
    )
    # Not in a local activity: one during which people query the workflow does not replay
    # (docs/design/0013-signed-requests.md).
    remotely = workflow.patched("actors-checked-by-activities")
    try:
        if remotely:
            return await workflow.execute_activity_method(
                AccessStub.check_actor,
                check,
                **(CHECK_ACTOR | {"summary": f"check of {actor}"[:200]}),
            )
        return await workflow.execute_local_activity_method(
            AccessStub.check_actor, check, **CHECK_ACTOR_LOCALLY
        )
    except ActivityError as error:
        if isinstance(error.cause, ApplicationError):
            raise error.cause from None  # A caller needs its type and message.
        raise


def decisions_of_people(
    decisions: Iterable[DecisionAdded], refuse: Callable[[RequestRefused], object]
) -> list[DecisionAdded]:
    """Return the decisions that do not name a policy as their author; `refuse` gets the others."""
    taken = list(decisions)
    policies = [each for each in taken if is_policy(each.decided_by)]
    if not policies or not workflow.patched("policy-actors-reserved"):
        return taken
    for each in policies:
        reason = f"decision {each.decision_id}: decided_by: {reserved(each.decided_by)}"
        refuse(RequestRefused(request=DecisionAdded.__name__, reason=reason))
    return [each for each in taken if each not in policies]
