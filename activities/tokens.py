"""Tokens (RFC 7519, HS256): who acts, and in which roles; and requests that a token signs.

Every process that has the key reads tokens. A request to a workflow does not carry a token, because
histories keep requests: it carries a proof, a JWT about this one request whose key is the token's
own signature. Only the token's owner and those who have the key know that signature. See
docs/design/0013-signed-requests.md.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, NamedTuple, TypeVar

import jwt
from jwt.algorithms import HMACAlgorithm
from jwt.utils import base64url_decode, base64url_encode
from pydantic import Field, SecretStr, StringConstraints, field_validator
from temporalio.exceptions import ApplicationError

from workflows.models.access import request_content, require_person
from workflows.models.base import Actor, Request
from workflows.models.errors import ErrorType, application_error
from workflows.models.ids import Role

ALGORITHM = "HS256"
ISSUER = "swe-ai-fleet"
LEEWAY = timedelta(seconds=5)
"""Maximum difference between the clocks of those who make tokens and those who read them."""

PROOF_FOR = timedelta(minutes=5)
"""How long a proof is valid, by default: a request is sent as soon as it is signed."""

HOW = "Send `authorization: Bearer TOKEN`; `fleet token create` makes one"
SIGN = "sign the request again (`fleet`, or `fleet token sign`)"

RequestT = TypeVar("RequestT", bound=Request)


class Caller(Request):
    """The owner of a token, and the roles that the token allows.

    Attributes:
        token_id: the token's `jti`, by which it can be revoked; None until the token is created.
        token: the token itself, which signs requests.
    """

    actor: Actor
    roles: frozenset[Role] = frozenset()
    token_id: Annotated[str, StringConstraints(min_length=1)] | None = Field(
        default=None, repr=False
    )
    token: SecretStr | None = Field(default=None, repr=False)

    @field_validator("actor")
    @classmethod
    def _is_a_person(cls, actor: str) -> str:
        try:
            require_person(actor)
        except ApplicationError as error:
            raise ValueError(error.message) from None
        return actor

    def require_role(self, *roles: str) -> str:
        """Return the first of these roles that the token has.

        Raises:
            ApplicationError: `Permission`: it has none of them.
        """
        for role in roles:
            if role in self.roles:
                return role
        has = ", ".join(sorted(self.roles)) or "none"
        raise application_error(
            ErrorType.PERMISSION,
            f"this needs the role {' or '.join(roles)}; the token of {self.actor} has {has}",
        )

    def signed(self, workflow_id: str, request: RequestT) -> RequestT:
        """Return the request to that workflow with a proof by this token."""
        if self.token is None:
            return request
        proof = create_proof(self.token.get_secret_value(), workflow_id, request)
        return request.model_copy(update={"proof": proof})


class Proof(NamedTuple):
    """A proof that was read: its token's owner, its own id, and when it expires, in seconds."""

    caller: Caller
    id: str
    expires: float


def create_token(key: str, caller: Caller, valid_for: timedelta) -> str:
    """Create a token for that caller."""
    now = datetime.now(UTC)
    claims = {
        "iss": ISSUER,
        "sub": caller.actor,
        "roles": sorted(caller.roles),
        "iat": now,
        "exp": now + valid_for,
        "jti": uuid.uuid4().hex,
    }
    return jwt.encode(claims, key, algorithm=ALGORITHM)


def read_token(keys: Sequence[str] | None, token: str) -> Caller:
    """Return the caller that the token names.

    Args:
        keys: the key, and the former one while tokens of both are valid; None: the signature is not
            checked, to read a token's content only.
        token: the token.

    Raises:
        ApplicationError: `Unauthenticated`: forged, expired, not from this fleet, or without an id,
            so that it could not be revoked.
    """
    try:
        claims = _decoded(token, keys, ["sub", "exp", "iat", "jti"])
        return Caller(
            actor=claims["sub"],
            roles=claims.get("roles", []),
            token_id=claims["jti"],
            token=SecretStr(token),
        )
    except jwt.ExpiredSignatureError:
        raise application_error(
            ErrorType.UNAUTHENTICATED, f"the token has expired. {HOW}"
        ) from None
    except (jwt.InvalidTokenError, ApplicationError, TypeError) as error:
        raise application_error(
            ErrorType.UNAUTHENTICATED, f"the token is not one of ours: {error}. {HOW}"
        ) from None


def create_proof(
    token: str, workflow_id: str, request: Request, valid_for: timedelta = PROOF_FOR
) -> str:
    """Sign a request to a workflow with a token, which the proof does not reveal."""
    signed, _, signature = token.rpartition(".")
    now = datetime.now(UTC)
    claims = {
        "iss": ISSUER,
        "tok": signed,
        "aud": workflow_id,
        "req": request_content(request),
        "iat": now,
        "exp": now + valid_for,
        "jti": uuid.uuid4().hex,
    }
    return jwt.encode(claims, base64url_decode(signature), algorithm=ALGORITHM)


def read_proof(keys: Sequence[str], proof: str, workflow_id: str, content: str) -> Proof:
    """Return what a proof shows, if it is for this request to this workflow.

    Raises:
        ApplicationError: `Unauthenticated`: it is not, or it or its token is forged or expired.
    """
    try:
        signed = str(jwt.decode(proof, options={"verify_signature": False}).get("tok"))
        claims, token = _signed_by_token(keys, proof, signed, workflow_id)
    except (jwt.InvalidTokenError, TypeError) as error:
        raise application_error(
            ErrorType.UNAUTHENTICATED, f"proof: is not valid: {error}; {SIGN}"
        ) from None
    if claims["req"] != content:
        raise application_error(ErrorType.UNAUTHENTICATED, f"proof: is for another request; {SIGN}")
    return Proof(read_token(keys, token), str(claims["jti"]), float(claims["exp"]))


def _signed_by_token(
    keys: Sequence[str], proof: str, signed: str, workflow_id: str
) -> tuple[dict[str, Any], str]:
    """Return the claims of a proof, and the token that signed it, whose first two parts it has."""
    signatures = [
        HMACAlgorithm(HMACAlgorithm.SHA256).sign(signed.encode(), key.encode()) for key in keys
    ]
    required = ["aud", "req", "exp", "iat", "jti"]
    for signature in signatures:
        with suppress(jwt.InvalidSignatureError):
            claims = _decoded(proof, [signature], required, workflow_id)
            return claims, f"{signed}.{base64url_encode(signature).decode()}"
    raise jwt.InvalidSignatureError("it is not signed by a token of this fleet")


def _decoded(
    text: str,
    keys: Sequence[str | bytes] | None,
    required: list[str],
    audience: str | None = None,
) -> dict[str, Any]:
    """Decode a JWT by the first of the keys that signed it."""
    for number, key in enumerate(keys if keys is not None else [""], start=1):
        try:
            claims: dict[str, Any] = jwt.decode(
                text,
                key,
                algorithms=[ALGORITHM],
                issuer=ISSUER,
                audience=audience,
                leeway=LEEWAY,
                options={
                    "require": required,
                    "verify_signature": keys is not None,
                    "verify_exp": True,
                    "verify_iss": True,
                },
            )
        except jwt.InvalidSignatureError:
            if number == len(keys or ()):
                raise
        else:
            return claims
    raise jwt.InvalidTokenError("no key is set")
