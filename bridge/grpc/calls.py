"""The parts of a call outside its message: metadata, a deadline, its contract's field names."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc

from bridge.grpc.auth import caller
from workflows.models.base import Request
from workflows.models.errors import InvalidInput

ANSWERED_WITHIN_S = 10.0
"""How long a workflow has to answer a call without a deadline."""

REQUEST_ID = "x-request-id"
"""Metadata: requests with the same id from the same caller are carried out once."""

OF_STORY = {"repository": "x-repository", "paths": "x-paths", "steps": "x-steps"}
"""Field of a story -> metadata of CreateStory that has it; it is a part of the request."""

IN_WORDS = ("x-reason", "x-comment", "x-paths")
"""Metadata that people write; text that is not ASCII is sent in UTF-8 under the key with `-bin`."""

Context = grpc.aio.ServicerContext[Any, Any]
RequestT = TypeVar("RequestT", bound=Request)


def call_metadata(context: Context) -> dict[str, str]:
    """Return the call's metadata that is text; of a repeated key, the last value.

    `x-reason-bin` replaces `x-reason` if both are present, as with all keys of IN_WORDS.

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


def seconds_left(context: Context, default: float = ANSWERED_WITHIN_S) -> float:
    """Return the time until the call's deadline; `default` if it has none."""
    left: float | None = context.time_remaining()
    return default if left is None else left


def in_time(context: Context, default: float = ANSWERED_WITHIN_S) -> asyncio.Timeout:
    """Limit a block to the time until the call's deadline, or to `default` if it has none.

    The returned context manager raises TimeoutError after that time.
    """
    return asyncio.timeout(seconds_left(context, default))


def derived_id(*parts: str) -> str:
    """Return 16 hex digits that are unique to these parts."""
    prefixed = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.sha256(prefixed.encode()).hexdigest()[:16]


def parse_request(
    model: type[RequestT],
    message: str,
    fields: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
) -> RequestT:
    """Parse a message's fields into a model.

    Args:
        model: The model.
        message: The message's name, for the error.
        fields: Values by the model's field names.
        names: Model field -> field in the contract, if they differ.

    Raises:
        InvalidInput: names the message's wrong fields as the contract does.
    """
    with named(message, names):
        return model.model_validate(fields)


def move_update_id(context: Context) -> str | None:
    """Return the id of the update by which a call moves a story.

    Returns:
        The same id for a request that is repeated with its `x-request-id`; None without one.
    """
    given = call_metadata(context).get(REQUEST_ID)
    return f"grpc-{derived_id(caller().actor, given)}" if given else None


@contextmanager
def named(message: str, names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Let an InvalidInput of the block name a message and its fields as the contract does.

    Args:
        message: The message's name.
        names: Model field -> field in the contract, if they differ.
    """
    try:
        yield
    except InvalidInput as error:
        problems = [(_renamed(field, names or {}), rule) for field, rule in error.problems]
        raise InvalidInput(message, problems) from None


def _renamed(field: str, names: Mapping[str, str]) -> str:
    first, dot, rest = field.partition(".")
    return f"{names.get(first, first)}{dot}{rest}"
