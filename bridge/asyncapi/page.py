"""Generation of docs/events.md: the AsyncAPI document as a page for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

Json = dict[str, Any]

PLURAL = {"string": "texts", "integer": "numbers", "number": "numbers", "object": "objects"}


def page(document: Json) -> str:
    """Return the page, in Markdown."""
    return "\n".join(_lines(document)) + "\n"


def resolved(document: Json, value: Any) -> Any:
    """Resolve `value` in the document; return it unchanged if it is not a reference."""
    while isinstance(value, dict) and "$ref" in value:
        found: Any = document
        for step in value["$ref"].removeprefix("#/").split("/"):
            found = found[step]
        value = found
    return value


def _lines(document: Json) -> Iterator[str]:
    yield "# Events"
    yield ""
    yield "Made by `python -m bridge.asyncapi --page`, from the same document as `asyncapi.yaml`."
    yield ""
    yield document["info"]["description"]
    yield ""
    yield "| subject | stream | what it means |"
    yield "|---|---|---|"
    for name, channel in document["channels"].items():
        link = f"[`{channel['address']}`](#{_anchor(name)})"
        yield f"| {link} | {channel['x-jetstream']['stream']} | {_cell(channel['description'])} |"
    yield ""
    yield "## Streams"
    yield ""
    yield from _streams(document)
    yield ""
    yield "## Headers"
    for name, what in (
        ("EventHeaders", "Of every event"),
        ("CommandHeaders", "Of a command to an external agent"),
        ("ResponseHeaders", "Of an external agent's response, where it sends any"),
        ("DeadLetterHeaders", "Of a dead letter"),
    ):
        yield ""
        yield f"{what}:"
        yield ""
        yield from _fields(document["components"]["schemas"][name], "header")
    for name, channel in document["channels"].items():
        yield ""
        yield from _channel(document, name, channel)


def _streams(document: Json) -> Iterator[str]:
    streams = {
        channel["x-jetstream"]["stream"]: channel["x-jetstream"]
        for channel in document["channels"].values()
    }
    yield "| stream | kept for | messages at most | size at most | duplicate window |"
    yield "|---|---|---|---|---|"
    for name, limits in streams.items():
        most = f"{limits['max_messages']:,}" if "max_messages" in limits else "no limit"
        kept, window = _span(limits["max_age_s"]), _span(limits["duplicate_window_s"])
        size = f"{limits['max_bytes'] // 1024**2:,} MiB"
        yield f"| {name} | {kept} | {most} | {size} | {window} |"


def _channel(document: Json, name: str, channel: Json) -> Iterator[str]:
    yield f'<a id="{_anchor(name)}"></a>'
    yield ""
    yield f"## {channel['address']}"
    yield ""
    yield channel["description"]
    yield ""
    for parameter, definition in channel.get("parameters", {}).items():
        yield f"`{{{parameter}}}`: {definition['description']}."
        yield ""
    yield from _who(document, name)
    for reference in channel["messages"].values():
        message = resolved(document, reference)
        payload = resolved(document, message["payload"])
        yield ""
        if "properties" not in payload:
            yield f"Body: {payload['description'][0].lower()}{payload['description'][1:]}."
            continue
        yield from _fields(payload, "field")
        for part in _parts(document, payload):
            yield ""
            yield f"Each of `{part[0]}`:"
            yield ""
            yield from _fields(part[1], "field")
        for example in message["examples"]:
            yield ""
            yield "```json"
            yield json.dumps(example["payload"], indent=2, ensure_ascii=False)
            yield "```"


def _who(document: Json, name: str) -> Iterator[str]:
    mine = [
        operation
        for operation in document["operations"].values()
        if operation["channel"]["$ref"] == f"#/channels/{name}"
    ]
    yield "| | who |"
    yield "|---|---|"
    for operation in mine:
        who = operation["summary"]
        if durable := operation.get("x-durable-consumer"):
            who = f"`{durable}`: {who[0].lower()}{who[1:]}. {operation['description']}"
        yield f"| {operation['action']}s | {_cell(who)} |"


def _fields(schema: Json, what: str) -> Iterator[str]:
    yield f"| {what} | type | there | what it is |"
    yield "|---|---|---|---|"
    for field, rule in schema["properties"].items():
        there = "always" if field in schema.get("required", ()) else "may be"
        yield f"| `{field}` | {_type(rule)} | {there} | {_cell(rule.get('description', ''))} |"
    for pattern, rule in schema.get("patternProperties", {}).items():
        name = pattern.removeprefix("^") + "*"
        yield f"| `{name}` | {_type(rule)} | may be | {_cell(rule.get('description', ''))} |"


def _parts(document: Json, schema: Json) -> Iterator[tuple[str, Json]]:
    for field, rule in schema["properties"].items():
        if "$ref" in rule.get("items", {}):
            yield field, resolved(document, rule["items"])


def _type(rule: Json) -> str:
    if "const" in rule:
        return f"`{rule['const']}`"
    if "enum" in rule:
        return ", ".join(f"`{value}`" for value in rule["enum"])
    kind = str(rule.get("type", "anything"))
    if kind == "array":
        items = rule["items"]
        inner = "objects" if "$ref" in items else PLURAL.get(str(items.get("type")), "anything")
        return f"list of {inner}"
    shown = {"string": "text", "integer": "whole number"}.get(kind, kind)
    if rule.get("format") == "date-time":
        return "time"
    if pattern := rule.get("pattern"):
        return f"{shown}, `{pattern}`"
    return f"{shown}, else {rule['default']}" if "default" in rule else shown


def _span(seconds: int) -> str:
    span = timedelta(seconds=seconds)
    return f"{span.days} d" if span.days else f"{seconds // 3600} h"


def _anchor(name: str) -> str:
    return name.replace(".", "-")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
