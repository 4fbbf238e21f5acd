"""What a call brings beside its message: metadata, a deadline, and names of its contract's own.

And how a workflow that it starts is called in the Web UI.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from typing import Any, TypeVar

import grpc

from workflows.models import InvalidInput, Request

ANSWERED_WITHIN_S = 10.0
"""How long a workflow has to answer a call that names no deadline."""

REQUEST_ID = "x-request-id"
"""Metadata: the same id from the same caller asks for the same thing, once."""

IN_WORDS = ("x-reason", "x-comment")
"""Metadata that people write: what is not ASCII comes as UTF-8 under the key with `-bin`."""

SUMMARY_BYTES = 200

Context = grpc.aio.ServicerContext[Any, Any]
RequestT = TypeVar("RequestT", bound=Request)


def said(context: Context) -> dict[str, str]:
    """The call's metadata that is text; of a key that comes twice, the last.

    `x-reason-bin` stands for `x-reason`, and holds where both are there; so with IN_WORDS.

    Raises:
        InvalidInput: a `-bin` value is not UTF-8.
    """
    metadata = context.invocation_metadata() or ()
    texts = {key: value for key, value in metadata if isinstance(value, str)}
    for key, value in metadata:
        if isinstance(value, bytes) and (name := key.removesuffix("-bin")) in IN_WORDS:
            try:
                texts[name] = value.decode()
            except UnicodeDecodeError:
                raise InvalidInput("metadata", [(key, "must be UTF-8")]) from None
    return texts


def seconds_left(context: Context, unless_told: float = ANSWERED_WITHIN_S) -> float:
    """Until the call's deadline; `unless_told` where it names none."""
    left: float | None = context.time_remaining()
    return unless_told if left is None else left


def in_time(context: Context, unless_told: float = ANSWERED_WITHIN_S) -> asyncio.Timeout:
    """Raises TimeoutError in the block when the call's time, or `unless_told`, is over."""
    return asyncio.timeout(seconds_left(context, unless_told))


def derived_id(*parts: str) -> str:
    """16 hex digits that only these parts give."""
    told = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def summary(text: str) -> str:
    """A workflow's static summary: one line, as long as Temporal's summaries may be."""
    return " ".join(text.split()).encode()[:SUMMARY_BYTES].decode(errors="ignore")


def understood(
    model: type[RequestT],
    message: str,
    fields: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
) -> RequestT:
    """The model of a message. names: of the model's fields in the contract, where they differ.

    Raises:
        InvalidInput: names the message's wrong fields as the contract does.
    """
    try:
        return model.model_validate(fields)
    except InvalidInput as error:
        problems = [(_renamed(field, names or {}), rule) for field, rule in error.problems]
        raise InvalidInput(message, problems) from None


def _renamed(field: str, names: Mapping[str, str]) -> str:
    first, dot, rest = field.partition(".")
    return f"{names.get(first, first)}{dot}{rest}"
