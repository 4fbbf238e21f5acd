"""A check of the messages on the streams against the AsyncAPI document (docs/asyncapi.yaml)."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator  # type: ignore[import-untyped]
from nats.aio.client import Client as Nats
from nats.js.api import AckPolicy, ConsumerConfig
from nats.js.errors import NotFoundError

DOCUMENT = Path(__file__).parents[2] / "docs" / "asyncapi.yaml"

STREAMS = (
    "PLANNING_EVENTS",
    "CONTEXT",
    "ORCHESTRATOR_EVENTS",
    "AGENT_COMMANDS",
    "AGENT_RESPONSES",
    "DEAD_LETTERS",
)


@dataclass(frozen=True)
class Sent:
    """A message as stored on its stream."""

    stream: str
    subject: str
    headers: dict[str, str]
    data: bytes


@cache
def described() -> dict[str, Any]:
    """Load the document as it is checked in."""
    loaded: dict[str, Any] = yaml.safe_load(DOCUMENT.read_text())
    return loaded


async def everything(nats: Nats) -> list[Sent]:
    """Read every message of every existing stream."""
    return [message for stream in STREAMS async for message in _read(nats, stream)]


async def _read(nats: Nats, stream: str) -> AsyncIterator[Sent]:
    jetstream = nats.jetstream()
    try:
        left = (await jetstream.stream_info(stream)).state.messages
    except NotFoundError:
        return
    subscription = await jetstream.pull_subscribe(
        "", stream=stream, config=ConsumerConfig(ack_policy=AckPolicy.NONE)
    )
    while left > 0:
        messages = await subscription.fetch(min(left, 500), timeout=10)
        left -= len(messages)
        for message in messages:
            yield Sent(stream, message.subject, dict(message.headers or {}), message.data)
    await subscription.unsubscribe()


def faults(document: dict[str, Any], messages: Iterable[Sent]) -> list[str]:
    """Return where messages differ from the document or are missing from it, one per line."""
    return [fault for message in messages for fault in _faults(document, message)]


def channel_of(document: dict[str, Any], subject: str) -> dict[str, Any] | None:
    """Return the channel whose address matches the subject, or None."""
    for channel in document["channels"].values():
        pattern = re.escape(channel["address"])
        for parameter in channel.get("parameters", {}):
            # Only a dead letter's parameter contains dots: it is a whole subject.
            token = ".+" if parameter == "subject" else r"[^.]+"
            pattern = pattern.replace(re.escape("{" + parameter + "}"), token)
        if re.fullmatch(pattern, subject):
            found: dict[str, Any] = channel
            return found
    return None


def _faults(document: dict[str, Any], message: Sent) -> Iterable[str]:
    where = f"{message.subject} {message.headers.get('Nats-Msg-Id', '')}"
    channel = channel_of(document, message.subject)
    if channel is None:
        yield f"{where}: no channel of the document has this subject"
        return
    if (stream := channel["x-jetstream"]["stream"]) != message.stream:
        yield f"{where}: on {message.stream}, and not on {stream}"
    (reference,) = channel["messages"].values()
    message_schema = _follow(document, reference)
    for fault in _broken(document, message_schema["headers"], message.headers):
        yield f"{where}: headers: {fault}"
    payload = _follow(document, message_schema["payload"])
    if "properties" not in payload:
        return
    try:
        body = json.loads(message.data)
    except ValueError:
        yield f"{where}: the body is no JSON"
        return
    for fault in _broken(document, payload, body):
        yield f"{where}: {fault}"


def _broken(document: dict[str, Any], schema: dict[str, Any], value: Any) -> Iterable[str]:
    """Yield the schema rules that the value violates; an unknown field is a violation too."""
    validator = Draft7Validator(_closed(document, schema), format_checker=CHECKER)
    for error in validator.iter_errors(value):
        yield f"{'.'.join(str(step) for step in error.absolute_path)} {error.message}"[:300]


CHECKER = Draft7Validator.FORMAT_CHECKER


@CHECKER.checks("date-time", raises=ValueError)  # type: ignore[untyped-decorator]
def _is_time(text: object) -> bool:
    return not isinstance(text, str) or datetime.fromisoformat(text).tzinfo is not None


def _closed(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema with its references resolved and no additional properties allowed.

    Consumers must accept unknown fields; the fleet itself sends only documented ones.
    """
    schema = _follow(document, schema)
    if "allOf" in schema:
        merged: dict[str, Any] = {"type": "object", "properties": {}, "required": []}
        for part in schema["allOf"]:
            each = _closed(document, part)
            for name, rule in each["properties"].items():
                merged["properties"][name] = merged["properties"].get(name, {}) | rule
            merged["required"] += each.get("required", [])
        return merged | {"additionalProperties": False}
    closed = dict(schema)
    if "items" in schema:
        closed["items"] = _closed(document, schema["items"])
    if "properties" in schema:
        closed["properties"] = {
            name: _closed(document, rule) for name, rule in schema["properties"].items()
        }
        closed["additionalProperties"] = False
    return closed


def _follow(document: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in value:
        found: Any = document
        for step in value["$ref"].removeprefix("#/").split("/"):
            found = found[step]
        value = found
    return value
