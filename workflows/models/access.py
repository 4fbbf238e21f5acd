"""Who acts: how the actor of a request is known, and the check of that."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from workflows.models.base import Model, Request
from workflows.models.errors import ErrorType, application_error

Via = Literal["token", "claim", "policy", ""]
"""`token`: the request is signed by the actor's token; `claim`: the actor is as the sender named
it; `policy`: the story's own policy acted; empty: the fleet itself, or not known."""

Proof = Annotated[str, StringConstraints(max_length=8_000)]
"""The signature of a request by its actor's token; empty: the actor is a claim."""

POLICY = "policy:"
"""The prefix of the actors that stand for the fleet's own policies."""


class ActorCheck(Model):
    """A request whose actor is to be checked.

    Attributes:
        workflow_id: the workflow that received it.
        roles: the token needs one of these; empty: any token will do.
        content: what the request asks for, as `request_content` returns it.
        proof: its signature; empty: none.
    """

    workflow_id: str
    actor: str
    roles: list[str] = []
    content: str
    proof: str = ""


class CheckedActor(Model):
    """How an actor is known. `proof_id`: a proof counts once, until it expires (in seconds)."""

    via: Via
    proof_id: str = ""
    expires: float = Field(default=0, ge=0)


def require_person(actor: str) -> None:
    """Refuse the name of a policy as the actor of a request.

    Raises:
        ApplicationError: `Permission`.
    """
    if is_policy(actor):
        raise application_error(ErrorType.PERMISSION, f"actor: {reserved(actor)}")


def reserved(actor: str) -> str:
    """Return why a name of a policy is refused."""
    return (
        f"{actor[:60]!r} is reserved: names that begin with {POLICY!r} stand for the fleet's own "
        "policies; send your own name"
    )


def is_policy(actor: str) -> bool:
    """Return whether the name stands for one of the fleet's own policies."""
    return actor.strip().lower().startswith(POLICY)


def request_content(request: Request) -> str:
    """Return a hash of what a request asks for: all of it but its proof.

    Fields that have their default are left out, so that a client of another release comes to the
    same hash.
    """
    fields = request.model_dump(mode="json", exclude={"proof"}, exclude_defaults=True)
    canonical = json.dumps([type(request).__name__, fields], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
