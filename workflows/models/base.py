"""The base classes of all models, and the types of their fields."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    StringConstraints,
    ValidationError,
    model_validator,
)

from workflows.models.errors import invalid_input

Title = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=300)]


Line = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=4_000)]


Actor = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]


Rigor = Literal["L0", "L1", "L2", "L3"]


AgentType = Literal["RAY_VLLM", "VLLM", "NATS"]


class Model(BaseModel):
    """A frozen model that a history may hold; unknown fields are dropped."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Section(BaseModel):
    """A frozen part of a request; unknown fields are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Request(Section):
    """A frozen model that comes from outside.

    Raises:
        ApplicationError: type `InvalidInput`, not retryable, one line for each wrong field.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_clearly(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(value)
        except ValidationError as error:
            raise invalid_input(cls.__name__, error) from None


def content_hash(content: Any) -> str:
    """Return the first 16 hex digits of SHA-256 over canonical JSON."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


Count = Annotated[int, Field(ge=0, le=10**9, strict=True)]
Tokens = Annotated[int, Field(gt=0, le=10**12)]
"""A budget of tokens; far below the largest integer that Neo4j stores."""
