"""Unwrapping of a message into its fields, identity, source and time. Pure.

Four formats are accepted: a flat JSON object; the same with CloudEvents attributes in headers
(binary mode), whose names may be in any case; CloudEvents structured mode
(`application/cloudevents+json`); and the envelope
`{event_type, payload, idempotency_key, timestamp, producer, ...}`.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from workflows.models.events import PUBLISHED

MAX_BODY_BYTES = 1024 * 1024
LARGEST_INTEGER = 2**63 - 1

STRUCTURED = "application/cloudevents+json"
CLOUDEVENTS = "application/cloudevents"
Json = dict[str, Any]


class InvalidMessage(ValueError):
    """A message that no retry can apply; the text names the field, the rule and the remedy."""


@dataclass(frozen=True)
class Sent:
    """A message without its envelope. An empty value was not given by the sender.

    story_id and time are the envelope's, used if the fields have none.
    """

    fields: Json
    identity: str = ""
    source: str = ""
    story_id: str = ""
    time: Any = ""


def in_lower_case(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Return the headers by lower-case names; senders may write the names in any case."""
    return {name.lower(): value for name, value in (headers or {}).items()}


def unwrap(subject: str, headers: Mapping[str, str], data: bytes, ids: Collection[str]) -> Sent:
    """Extract a message from its envelope.

    Args:
        subject: the message's subject.
        headers: by names in lower case.
        data: the body.
        ids: the ids that a flat body of this subject has; without them it may be an envelope.

    Raises:
        InvalidMessage: it is not a JSON object, or its envelope breaks a rule.
    """
    body = _object(data, "body")
    _require_storable(body, "")
    _require_same_subject("ce-type", headers.get("ce-type"), subject)
    sent = Sent(
        fields=body,
        identity=headers.get("ce-id", ""),
        source=headers.get("ce-source", ""),
        story_id=headers.get("ce-subject", ""),
        time=headers.get("ce-time", ""),
    )
    if _is_structured(headers, body):
        sent = _structured(sent, subject)
    if "payload" in sent.fields and not all(name in sent.fields for name in ids):
        sent = _enveloped(sent, subject)
    elif not any(name in sent.fields for name in ids) and _names_an_envelope(sent.fields):
        raise InvalidMessage("payload: required in an envelope; add it")
    return replace(sent, identity=sent.identity or _text(sent.fields, "idempotency_key"))


def stated_identity(headers: Mapping[str, str], data: bytes) -> str:
    """Return the identity that the sender gave a message, even if the message cannot be parsed."""
    try:
        body = _object(data, "body")
        event_id = _text(body, "id") if _is_structured(headers, body) else ""
    except InvalidMessage:
        return headers.get("ce-id", "")
    return event_id or headers.get("ce-id", "") or _text(body, "idempotency_key")


def _is_structured(headers: Mapping[str, str], body: Json) -> bool:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith(CLOUDEVENTS) and kind != STRUCTURED:
        raise InvalidMessage(f"content-type: {kind[:80]} is not read; send {STRUCTURED}")
    return kind == STRUCTURED or {"specversion", "type", "source"} <= body.keys()


def _structured(sent: Sent, subject: str) -> Sent:
    event = sent.fields
    if (version := event.get("specversion")) is not None and not str(version).startswith("1."):
        raise InvalidMessage(f"specversion: {str(version)[:20]!r} is not read; send 1.0")
    _require_same_subject("type", event.get("type"), subject)
    return Sent(
        fields=_structured_data(event),
        identity=_text(event, "id") or sent.identity,
        source=_text(event, "source") or sent.source,
        story_id=_text(event, "subject") or sent.story_id,
        time=event.get("time") or sent.time,
    )


def _structured_data(event: Json) -> Json:
    encoded = event.get("data_base64")
    if encoded is None:
        return _inner(event.get("data"), "data")
    try:
        data = base64.b64decode(encoded, validate=True)
    except (TypeError, ValueError):
        raise InvalidMessage("data_base64: is not base64; correct it") from None
    return _inner(data, "data_base64")


def _enveloped(sent: Sent, subject: str) -> Sent:
    envelope = sent.fields
    _require_same_subject("event_type", envelope.get("event_type"), subject)
    return Sent(
        fields=_inner(envelope["payload"], "payload"),
        identity=sent.identity or _text(envelope, "idempotency_key"),
        source=sent.source or _text(envelope, "producer"),
        story_id=_text(envelope, "story_id") or sent.story_id,
        time=envelope.get("timestamp") or sent.time,
    )


def _names_an_envelope(body: Json) -> bool:
    return "event_type" in body and "idempotency_key" in body


def _inner(value: Any, field: str) -> Json:
    """Return the object inside an envelope, which is given as an object or as JSON text."""
    if value is None:
        raise InvalidMessage(f"{field}: required; add it")
    if isinstance(value, str | bytes):
        value = _object(value.encode() if isinstance(value, str) else value, field)
        _require_storable(value, f"{field}.")
    if not isinstance(value, dict):
        raise InvalidMessage(f"{field}: is JSON, but not an object; send a flat JSON object")
    return value


def _require_same_subject(field: str, given: Any, subject: str) -> None:
    """Refuse a type that belongs to another subject, because the subject defines the event."""
    if isinstance(given, str) and given != subject and given in PUBLISHED:
        raise InvalidMessage(f"{field}: {given} on the subject {subject}; publish it on its own")


def _text(body: Json, field: str) -> str:
    value = body.get(field)
    return "" if value is None or isinstance(value, bool | dict | list) else str(value)


# --- JSON -----------------------------------------------------------------------------------------


def _object(data: bytes, field: str) -> Json:
    if len(data) > MAX_BODY_BYTES:
        raise InvalidMessage(
            f"{field}: {len(data)} bytes; at most {MAX_BODY_BYTES}: leave out what is not asked for"
        )
    try:
        found = json.loads(data)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # not UTF-8, not JSON, a number of thousands of digits
        raise InvalidMessage(f"{field}: is not JSON ({error}); send a flat JSON object") from None
    if not isinstance(found, dict):
        raise InvalidMessage(f"{field}: is JSON, but not an object; send a flat JSON object")
    return found


def _require_storable(body: Json, prefix: str) -> None:
    try:
        for name, value in body.items():
            _require_part(value, f"{prefix}{name}")
    except RecursionError:
        raise _too_deep() from None


def _require_part(value: Any, field: str) -> None:
    match value:
        case str():
            _require_text(value, field)
        case float() if not math.isfinite(value):
            raise InvalidMessage(f"{field}: the number is out of range; send a finite one")
        case int() if abs(value) > LARGEST_INTEGER:
            raise InvalidMessage(f"{field}: the number has more than 64 bits; send a smaller one")
        case dict():
            for name, part in value.items():
                _require_part(part, f"{field}.{name}")
        case list():
            for number, part in enumerate(value):
                _require_part(part, f"{field}.{number}")


def _require_text(text: str, field: str) -> None:
    if "\0" in text:
        raise InvalidMessage(f"{field}: has the character U+0000; remove it")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidMessage(f"{field}: has half a surrogate pair; send Unicode") from None


def _too_deep() -> InvalidMessage:
    return InvalidMessage("body: nested too deeply; an event is a flat JSON object")
