"""The check of who acts, for requests to stories."""

from __future__ import annotations

from collections.abc import Sequence

from temporalio import activity

from activities.revoked import RevokedTokens
from activities.tokens import read_proof
from workflows.models.access import ActorCheck, CheckedActor, require_person
from workflows.models.errors import ErrorType, application_error
from workflows.stubs import AccessStub


class Access(AccessStub):
    """Checks proofs with the fleet's keys."""

    def __init__(
        self, keys: Sequence[str], require_tokens: bool, revoked: RevokedTokens | None = None
    ) -> None:
        """Check with these keys; without a key, every actor is a claim.

        Args:
            keys: the keys of tokens; empty: proofs are not checked.
            require_tokens: whether claims are refused.
            revoked: the tokens that were revoked; None: none was.
        """
        self._keys = keys
        self._require_tokens = require_tokens
        self._revoked = revoked

    @activity.defn
    async def check_actor(self, check: ActorCheck) -> CheckedActor:
        """Return how the actor is known."""
        require_person(check.actor)
        if not check.proof or not self._keys:
            if self._require_tokens:
                raise application_error(
                    ErrorType.UNAUTHENTICATED,
                    f"actor: {check.actor!r} is a claim, and this fleet takes only signed requests "
                    "(REQUIRE_TOKENS). Use `fleet` with FLEET_TOKEN, or sign the JSON with "
                    "`fleet token sign`",
                )
            return CheckedActor(via="claim")
        proof = read_proof(self._keys, check.proof, check.workflow_id, check.content)
        if self._revoked is not None:
            await self._revoked.require_valid(proof.caller)
        if proof.caller.actor != check.actor:
            raise application_error(
                ErrorType.PERMISSION,
                f"actor: the request names {check.actor}, and {proof.caller.actor} signed it; act "
                "in your own name",
            )
        if check.roles:
            proof.caller.require_role(*check.roles)
        return CheckedActor(via="token", proof_id=proof.id, expires=proof.expires)
