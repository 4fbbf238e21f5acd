"""The search attributes of `workflows/search_attributes.py`, registered at start-up."""

import asyncio
from datetime import datetime

from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import (
    AddSearchAttributesRequest,
    ListSearchAttributesRequest,
)
from temporalio.client import Client
from temporalio.common import SearchAttributeKey
from temporalio.service import RPCError, RPCStatusCode

from workers.clients.connection import StartError
from workflows.search_attributes import ALL

Key = SearchAttributeKey[str] | SearchAttributeKey[int] | SearchAttributeKey[datetime]

KNOWN_WITHIN_S = 30.0
"""How long the server may take to know a new search attribute, in seconds."""

ASK_EVERY_S = 0.2


async def register(client: Client) -> list[str]:
    """Add missing attributes, and return their names when the server knows them.

    Repeatable, and safe from several processes at once. A workflow that sets an attribute which the
    server does not know would be stuck, so no worker runs before.

    Raises:
        StartError: an attribute exists with another type, or may not be added.
    """
    try:
        missing = await _missing(client)
        if missing:
            await _add(client, missing)
    except RPCError as error:
        raise StartError(
            f"Temporal refuses access to its search attributes: {error.message}. "
            f"{_by_hand(client, ALL)}"
        ) from error
    try:
        async with asyncio.timeout(KNOWN_WITHIN_S):
            while await _missing(client):
                await asyncio.sleep(ASK_EVERY_S)
    except TimeoutError as error:
        raise StartError(
            f"Temporal did not add its search attributes in {KNOWN_WITHIN_S:.0f} s. "
            f"{_by_hand(client, missing)}"
        ) from error
    return [key.name for key in missing]


async def _missing(client: Client) -> tuple[Key, ...]:
    """Return the attributes that the server does not know yet.

    Raises:
        StartError: an attribute exists with another type.
    """
    known = (
        await client.operator_service.list_search_attributes(
            ListSearchAttributesRequest(namespace=client.namespace)
        )
    ).custom_attributes
    for key in ALL:
        if known.get(key.name, key.indexed_value_type) != key.indexed_value_type:
            raise StartError(
                f"Temporal's search attribute {key.name} is not of type {_type_name(key)}. "
                f"Remove it: temporal operator search-attribute remove "
                f"--namespace {client.namespace} --name {key.name}"
            )
    return tuple(key for key in ALL if key.name not in known)


async def _add(client: Client, missing: tuple[Key, ...]) -> None:
    types = {key.name: IndexedValueType.ValueType(key.indexed_value_type) for key in missing}
    try:
        await client.operator_service.add_search_attributes(
            AddSearchAttributesRequest(namespace=client.namespace, search_attributes=types)
        )
    except RPCError as error:
        if error.status != RPCStatusCode.ALREADY_EXISTS:  # another process was first
            raise


def _by_hand(client: Client, keys: tuple[Key, ...]) -> str:
    named = " ".join(f"--name {key.name} --type {_type_name(key)}" for key in keys)
    return (
        "Add them by hand: temporal operator search-attribute create "
        f"--namespace {client.namespace} {named}"
    )


def _type_name(key: Key) -> str:
    return key.indexed_value_type.name.title().replace("_", "")
