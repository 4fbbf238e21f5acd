"""The AsyncAPI 3 document of every subject, generated from the models that the code uses.

`python -m bridge.asyncapi` prints it as YAML (docs/asyncapi.yaml), and with `--page` as Markdown
(docs/events.md). Both files are checked in, and a test compares them with the generated text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml
from pydantic import BaseModel

from bridge.agents.activity import EXPIRY
from bridge.inbox.parsing import DECISION, IDS_OF, READING, Reading
from bridge.jetstream.consumers import CONSUMERS
from bridge.jetstream.dead_letters import ORIGINAL, PREFIX
from bridge.jetstream.streams import Stream, stream_of
from bridge.mirror.source import SOURCE_PREFIX
from workflows.models.agent_messages import AgentCommand, AgentResponse
from workflows.models.events import PUBLISHED, EventBody, example

Json = dict[str, Any]

CONTRACT_VERSION = "1.0.0"
"""Version of subjects and bodies; a change that would break a consumer raises the major number."""

INFO = (
    "What the fleet says on NATS JetStream, and what it listens to. Every event is a flat JSON "
    "body with CloudEvents 1.0 attributes in the headers. One story's events are in order, and "
    "each is on its stream once within the stream's duplicate window; after it, one that comes "
    "again has the same `ce-id`. An event is on the bus only once the graph holds it."
    "\n\nFrom outside are read: a flat body with or without CloudEvents headers (names in any "
    "case), CloudEvents structured mode (`application/cloudevents+json`), and the envelope "
    "`{event_type, payload, idempotency_key, timestamp, producer}`. Times are ISO 8601 (UTC where "
    "there is no offset), or seconds or milliseconds since 1970, as a number or a text. An "
    "event's identity is its `ce-id`, else `idempotency_key`, else its stream and sequence; a "
    "second message with a used identity and another body is a dead letter. Unknown fields are "
    "ignored. U+0000 and numbers out of range are refused."
)

TRACE = {
    "traceparent": {"type": "string", "description": "The W3C trace it was sent in"},
    "tracestate": {"type": "string", "description": "The trace's state, if present"},
}

JETSTREAM = {
    "Nats-Expected-Stream": {
        "type": "string",
        "description": "The stream that the sender asked for; JetStream keeps it",
    },
}

EVENT_HEADERS: Json = {
    "type": "object",
    "properties": {
        "Nats-Msg-Id": {
            "type": "string",
            "description": "What JetStream knows a message again by: `ce-id`, as the fleet sends",
        },
        "Content-Type": {"const": "application/json", "description": "What the body is"},
        "ce-specversion": {"const": "1.0", "description": "CloudEvents' version"},
        "ce-id": {
            "type": "string",
            "description": "Made of workflow id, run and sequence number: `{workflow}/{run}/{n}`",
        },
        "ce-source": {
            "type": "string",
            "description": f"Where it happened. The fleet's own: `{SOURCE_PREFIX}"
            "{cluster id}/{namespace}/{workflow id}`",
        },
        "ce-type": {"type": "string", "description": "The subject"},
        "ce-time": {"type": "string", "format": "date-time", "description": "When it happened"},
        "ce-subject": {
            "type": "string",
            "description": "The story id; absent where there is no story",
        },
        **TRACE,
        **JETSTREAM,
    },
    "required": ["Nats-Msg-Id", "Content-Type", "ce-specversion", "ce-id", "ce-source", "ce-type",
                 "ce-time"],
}  # fmt: skip

COMMAND_HEADERS: Json = {
    "type": "object",
    "properties": {
        **EVENT_HEADERS["properties"],
        "Nats-Msg-Id": {"type": "string", "description": "What JetStream knows it again by"},
        "ce-id": {"type": "string", "description": "The command's `call_id`"},
        EXPIRY: {
            "type": "string",
            "format": "date-time",
            "description": "After this time another is asked, and an agent need not begin",
        },
    },
    "required": [*EVENT_HEADERS["required"], EXPIRY],
}

RESPONSE_HEADERS: Json = {
    "type": "object",
    "description": "An agent need not send any",
    "properties": {
        **EVENT_HEADERS["properties"],
        "Nats-Msg-Id": {"type": "string", "description": "What JetStream knows it again by"},
        "ce-id": {"type": "string", "description": "The response's own id"},
        "ce-source": {"type": "string", "description": "The agent"},
    },
}

DEAD_HEADERS: Json = {
    "type": "object",
    "properties": {
        "Nats-Msg-Id": {"type": "string", "description": "Made of consumer, stream and sequence"},
        "Dead-Subject": {"type": "string", "description": "The original's subject"},
        "Dead-Stream": {"type": "string", "description": "The original's stream"},
        "Dead-Sequence": {
            "type": "string",
            "pattern": "^[0-9]+$",
            "description": "The original's sequence in its stream",
        },
        "Dead-Consumer": {"type": "string", "description": "The consumer that gave it up"},
        "Dead-Reason": {"type": "string", "description": "Why: field, rule and remedy"},
        "Dead-Error": {"type": "string", "description": "What was raised, where something was"},
        "Dead-Deliveries": {
            "type": "string",
            "pattern": "^[0-9]+$",
            "description": "How often it was tried",
        },
        "Dead-Received": {
            "type": "string",
            "format": "date-time",
            "description": "When JetStream stored the original",
        },
        "Dead-Size": {
            "type": "string",
            "pattern": "^[0-9]+$",
            "description": "Bytes of the original's body: more than are here where it was cut",
        },
        **JETSTREAM,
    },
    "patternProperties": {
        f"^{ORIGINAL}": {"type": "string", "description": "A header of the original"}
    },
    "required": ["Nats-Msg-Id", "Dead-Subject", "Dead-Stream", "Dead-Sequence", "Dead-Consumer",
                 "Dead-Reason", "Dead-Deliveries", "Dead-Received", "Dead-Size"],
}  # fmt: skip

AGENT_COMMAND, AGENT_RESPONSE, DEAD_LETTER = "agent.cmd", "agent.response", "deadletter"


def document() -> Json:
    """Build the AsyncAPI 3.0 document as plain data."""
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "SWE AI Fleet", "version": CONTRACT_VERSION, "description": INFO},
        "defaultContentType": "application/json",
        "servers": {
            "nats": {
                "host": "127.0.0.1:4222",
                "protocol": "nats",
                "description": "NATS with JetStream, at NATS_URL",
            }
        },
        "channels": {
            **{subject: _channel(subject, body) for subject, body in PUBLISHED.items()},
            AGENT_COMMAND: _agent_commands(),
            AGENT_RESPONSE: _agent_responses(),
            DEAD_LETTER: _dead_letters(),
        },
        "operations": dict(_operations()),
        "components": {
            "messages": {
                **{body.__name__: _event_message(body) for body in PUBLISHED.values()},
                "AgentCommand": _message(AgentCommand, _ref("schemas", "CommandHeaders")),
                "AgentResponse": _message(AgentResponse, _ref("schemas", "ResponseHeaders")),
                "DeadLetter": {
                    "name": "DeadLetter",
                    "summary": "A message that was given up.",
                    "headers": _ref("schemas", "DeadLetterHeaders"),
                    "payload": _ref("schemas", "DeadLetter"),
                },
            },
            "schemas": {
                "EventHeaders": EVENT_HEADERS,
                "CommandHeaders": COMMAND_HEADERS,
                "ResponseHeaders": RESPONSE_HEADERS,
                "DeadLetterHeaders": DEAD_HEADERS,
                **_schemas(),
                "DeadLetter": {
                    "description": "The original's body, whatever it is; or its beginning, where "
                    "the server's limit left no room for all of it",
                },
            },
        },
    }


# --- channels -------------------------------------------------------------------------------------


def _channel(subject: str, body: type[EventBody]) -> Json:
    return {
        "address": subject,
        "description": _meaning(body),
        "messages": {body.__name__: _ref("messages", body.__name__)},
        **_stored(subject),
    }


def _agent_commands() -> Json:
    return {
        "address": "agent.cmd.{role}",
        "description": _meaning(AgentCommand),
        "parameters": {"role": {"description": "The agent's role, such as DEV"}},
        "messages": {"AgentCommand": _ref("messages", "AgentCommand")},
        **_stored("agent.cmd.DEV"),
    }


def _agent_responses() -> Json:
    return {
        "address": "agent.response.{task_id}",
        "description": _meaning(AgentResponse),
        "parameters": {
            "task_id": {
                "description": "The task of the command that is answered; its id percent-encoded"
            }
        },
        "messages": {"AgentResponse": _ref("messages", "AgentResponse")},
        **_stored("agent.response.US-101-design-1"),
    }


def _dead_letters() -> Json:
    return {
        "address": PREFIX + "{subject}",
        "description": "A message that no retry can fix, or that failed its last delivery.",
        "parameters": {"subject": {"description": "The original's subject, its dots included"}},
        "messages": {"DeadLetter": _ref("messages", "DeadLetter")},
        **_stored(f"{PREFIX}context.updated"),
    }


def _stored(subject: str) -> Json:
    stream = stream_of(subject)
    assert stream, f"no declared stream takes {subject}"
    return {"x-jetstream": _limits(stream)}


def _limits(stream: Stream) -> Json:
    return {
        "stream": stream.name,
        "max_age_s": int(stream.max_age.total_seconds()),
        "max_bytes": stream.max_bytes,
        "duplicate_window_s": int(stream.duplicate_window.total_seconds()),
        **({"max_messages": stream.max_messages} if stream.max_messages else {}),
    }


# --- who sends, who receives ----------------------------------------------------------------------

TAKES = {
    "context": "Stores it in the graph, and drops stale context packs",
    "orch": "Notifies the story's workflow",
}
"""What a durable consumer does with a message, by the first word of its name."""


def _operations() -> list[tuple[str, Json]]:
    """Return the operations by name; `send` and `receive` are the fleet's actions."""
    return [
        *(
            (
                f"mirror-{subject.replace('.', '-')}",
                _operation("send", subject, "The mirror, from the workflow's outbox"),
            )
            for subject in PUBLISHED
        ),
        *(
            (
                consumer.name,
                _operation(
                    "receive",
                    consumer.subject,
                    TAKES[consumer.name.partition("-")[0]],
                    _may_lack(PUBLISHED[consumer.subject]),
                )
                | {"x-durable-consumer": consumer.name},
            )
            for consumer in CONSUMERS
        ),
        (
            "ask-agent",
            _operation("send", AGENT_COMMAND, "The agents' worker; an external agent answers"),
        ),
        ("take-answer", _operation("receive", AGENT_RESPONSE, "The external agents' listener")),
        ("dead-letter", _operation("send", DEAD_LETTER, "The consumer that gives a message up")),
        (
            "put-back",
            _operation("receive", DEAD_LETTER, "`fleet dead-letters`, when a person asks"),
        ),
    ]


def _operation(action: str, channel: str, summary: str, description: str = "") -> Json:
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel}"},
        "summary": summary,
        **({"description": description} if description else {}),
    }


def _may_lack(body: type[EventBody]) -> str:
    reading = READING[body]
    needed = [*IDS_OF[body], *(["to_phase"] if "to_phase" in body.model_fields else [])]
    sentences = [
        f"From outside, only {_names(needed)} must be there.",
        f"Taken for what is missing, null or blank: `timestamp` (JetStream's own), "
        f"{_defaults(reading)}.",
    ]
    if "decisions" in body.model_fields:
        sentences.append(f"In each of `decisions`: {_defaults(DECISION)}; {_spelled(DECISION)}.")
    sentences.append(f"Also read: {_spelled(reading)}.")
    sentences.append(
        "The fleet's own events are known by their `ce-source`, and not applied twice."
    )
    return " ".join(sentences)


def _spelled(reading: Reading) -> str:
    return ", ".join(f"{_names(other)} for `{name}`" for name, other in reading.spellings.items())


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _defaults(reading: Reading) -> str:
    return ", ".join(
        f"`{name}` ({reading.words.get(name) or _shown(value)})"
        for name, value in reading.defaults.items()
    )


def _shown(value: Any) -> str:
    return "empty" if value == "" or value == [] else repr(value)


# --- messages -------------------------------------------------------------------------------------


def _event_message(body: type[EventBody]) -> Json:
    own_type = {"properties": {"ce-type": {"const": body.SUBJECT}}}
    return _message(body, {"allOf": [_ref("schemas", "EventHeaders"), own_type]})


def _message(body: type[BaseModel], headers: Json) -> Json:
    return {
        "name": body.__name__,
        "summary": _meaning(body),
        "headers": headers,
        "payload": _ref("schemas", body.__name__),
        "examples": [{"name": "example", "payload": example(body)}],
    }


def _meaning(body: type[BaseModel]) -> str:
    return " ".join((body.__doc__ or "").split())


# --- schemas --------------------------------------------------------------------------------------


BODIES: tuple[type[BaseModel], ...] = (*PUBLISHED.values(), AgentCommand, AgentResponse)


ANNOTATIONS = ("title", "default", "description", "examples")
"""What pydantic writes about a field and its schema here does not repeat."""


def _schemas() -> Json:
    """Return the schemas of every body and its nested models, by class name."""
    schemas: Json = {}
    for body in BODIES:
        # An agent writes the response, and may leave out fields that have a default.
        written_here = body is not AgentResponse
        made = body.model_json_schema(
            mode="serialization" if written_here else "validation",
            ref_template="#/components/schemas/{model}",
        )
        for name, schema in {**made.pop("$defs", {}), body.__name__: made}.items():
            schemas[name] = _schema(schema, all_there=written_here)
    return schemas


def _schema(schema: Json, *, all_there: bool) -> Json:
    """Build the schema of one model.

    all_there: the sender writes every field except those that are None.
    """
    rules, fields = schema["properties"], {}
    nullable = [field for field, rule in rules.items() if {"type": "null"} in rule.get("anyOf", ())]
    for field, rule in rules.items():
        if field in nullable:
            (kept,) = [each for each in rule["anyOf"] if each != {"type": "null"}]
        else:
            kept = {key: value for key, value in rule.items() if key not in ANNOTATIONS}
        if not all_there and rule.get("default") not in (None, ""):
            kept = {**kept, "default": rule["default"]}
        if field == "timestamp" and all_there:
            kept = {**kept, "format": "date-time"}
        fields[field] = {**kept, "description": rule["description"]}
    required = [
        field
        for field in rules
        if field not in nullable and (all_there or field in schema.get("required", ()))
    ]
    return {
        "type": "object",
        "description": " ".join(schema.get("description", "").split()),
        "properties": fields,
        "required": required,
    }


def _ref(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


# --- as text --------------------------------------------------------------------------------------

HEADER = "# Generated from workflows/models/events.py by `python -m bridge.asyncapi`: do not edit\n"


class _Plain(yaml.SafeDumper):
    """A dumper that writes repeated values in full, without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def as_yaml() -> str:
    """Return the text of docs/asyncapi.yaml."""
    return HEADER + yaml.dump(
        document(), Dumper=_Plain, sort_keys=False, allow_unicode=True, width=100
    )
