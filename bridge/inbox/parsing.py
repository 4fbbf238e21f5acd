"""Parsing of messages from outside: a change, or a refusal with its reason. Pure.

`bridge.inbox.envelopes` extracts the fields from their envelope; this module makes them the body of
an event. Only the ids of the event and the `to_phase` of a transition are required. READING defines
the defaults of everything else. See docs/design/0010-reading-what-others-write.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Self

from nats.aio.msg import Msg
from pydantic import TypeAdapter, ValidationError
from temporalio.exceptions import ApplicationError

from activities.graph.changes import MAX_CLOCK_SKEW, Change, positioned
from activities.graph.events import summary
from activities.graph.values import instant
from bridge.inbox.envelopes import InvalidMessage, Json, Sent, in_lower_case, unwrap
from bridge.jetstream.dead_letters import place
from workflows.models.access import is_policy
from workflows.models.base import content_hash
from workflows.models.context import DecisionAdded, MilestoneReached
from workflows.models.entries import Entry
from workflows.models.errors import invalid_input
from workflows.models.events import (
    ACTOR_FIELDS,
    PUBLISHED,
    ContextDecisionAdded,
    ContextMilestoneReached,
    ContextUpdated,
    DeliberationCompleted,
    EventBody,
    PlanApproved,
    StoryTransitioned,
    TaskDispatched,
)
from workflows.models.ids import ID_RULE, Id, LongId, Role

MAX_ID_CHARACTERS = 1_000
MAX_DECISIONS = 500
"""Most decisions in one message: so many are linked in one transaction of the graph."""

MAX_VERSION = 2**31
MAX_TITLE = 300
UNKNOWN = "unknown"

Default = Any | Callable[[Json], Any]


@dataclass(frozen=True)
class Reading:
    """Rules for reading a body from outside.

    spellings: other names of a field; the first one present counts. defaults: the value of a field
    that is missing, null or blank; a function computes it from the fields that are present.
    words: a description of what such a function returns, for docs/events.md.
    """

    defaults: Mapping[str, Default]
    spellings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)


def _first_line(text: Any) -> str:
    lines = str(text or "").strip().splitlines()
    return lines[0].strip()[:MAX_TITLE] if lines else ""


def _title_of(fields: Json) -> str:
    return _first_line(fields.get("rationale")) or str(fields.get("decision_id", ""))


STORY = {"story_id": ("case_id",)}
TIME = ("timestamp_ms", "ts_ms")

READING: dict[type[EventBody], Reading] = {
    StoryTransitioned: Reading(
        defaults={"from_phase": UNKNOWN, "event": "", "actor": UNKNOWN, "reason": ""},
        spellings={
            "from_phase": ("from_state",),
            "to_phase": ("to_state",),
            "actor": ("transitioned_by",),
            "timestamp": ("transitioned_at", *TIME),
            **STORY,
        },
    ),
    PlanApproved: Reading(
        defaults={"approved_by": UNKNOWN, "roles": []},
        spellings={"timestamp": ("approved_at", *TIME), **STORY},
    ),
    DeliberationCompleted: Reading(
        defaults={
            "role": UNKNOWN,
            "winner_id": "",
            "score": 0.0,
            "decisions": [],
            "duration_ms": 0,
        },
        spellings={"timestamp": ("completed_at", *TIME), **STORY},
    ),
    TaskDispatched: Reading(
        defaults={"agent_id": UNKNOWN, "role": UNKNOWN},
        spellings={"timestamp": ("dispatched_at", *TIME), **STORY},
    ),
    ContextUpdated: Reading(
        defaults={"version": 0, "changed": []},
        spellings={"timestamp": ("updated_at", *TIME), **STORY},
    ),
    ContextDecisionAdded: Reading(
        defaults={"title": _title_of, "rationale": "", "decided_by": UNKNOWN},
        spellings={"decision_id": ("id",), "timestamp": ("decided_at", *TIME), **STORY},
        words={"title": "the first line of `rationale`, else the decision's id"},
    ),
    ContextMilestoneReached: Reading(
        defaults={
            "event_type": "MILESTONE",
            "description": lambda fields: fields.get("event_type", "MILESTONE"),
        },
        spellings={
            "milestone_id": ("id",),
            "event_type": ("type", "event"),
            "description": ("title",),
            "timestamp": ("reached_at", *TIME),
            **STORY,
        },
        words={"description": "`event_type`"},
    ),
}
"""The only table of the fields that a body may lack and their defaults, by kind of event."""

DECISION = Reading(
    defaults={
        "id": lambda fields: f"{fields['task_id']}-{content_hash(fields)}",
        "title": lambda fields: _first_line(fields.get("rationale")) or str(fields["id"]),
        "type": "DESIGN",
        "rationale": "",
        "affected_subtask": "",
        "affects": [],
    },
    spellings={"id": ("decision_id",)},
    words={
        "id": "the task's id and the hash of the decision",
        "title": "the first line of `rationale`, else the decision's id",
    },
)
"""Rules for reading each decision of a deliberation."""

IDS: dict[str, TypeAdapter[str]] = {
    "story_id": TypeAdapter(Id),
    **{name: TypeAdapter(LongId) for name in ("plan_id", "task_id", "decision_id", "milestone_id")},
}

IDS_OF: dict[type[EventBody], tuple[str, ...]] = {
    kind: tuple(name for name in kind.model_fields if name in IDS) for kind in PUBLISHED.values()
}

LISTS = ("roles", "changed", "affects")
"""Fields that are lists of strings; a single string is read as a list of one."""

_LONG_ID: TypeAdapter[str] = TypeAdapter(LongId)
_ROLE: TypeAdapter[str] = TypeAdapter(Role)


@dataclass(frozen=True)
class Received:
    """A message as received. time: when JetStream stored it. headers: by names in lower case."""

    subject: str
    stream: str
    sequence: int
    time: datetime
    headers: Mapping[str, str]
    data: bytes

    @classmethod
    def of(cls, message: Msg) -> Self:
        """Return a message of a stream."""
        about = message.metadata
        return cls(
            subject=message.subject,
            stream=about.stream,
            sequence=about.sequence.stream,
            time=about.timestamp,
            headers=in_lower_case(message.headers),
            data=message.data,
        )


@dataclass(frozen=True)
class ParsedEvent:
    """The change of a message, and the hash that detects a reused identity.

    content: the hash of what the sender wrote; empty if the sender gave no identity.
    """

    change: Change
    content: str


def parse_event(received: Received) -> ParsedEvent:
    """Parse a message into its change.

    Raises:
        InvalidMessage: it is not a JSON object, lacks a required field, or breaks a rule.
    """
    kind = PUBLISHED[received.subject]
    sent = unwrap(received.subject, received.headers, received.data, IDS_OF[kind])
    identity = sent.identity or place(received.stream, received.sequence, received.time)
    if len(identity) > MAX_ID_CHARACTERS:
        raise InvalidMessage(f"ce-id: longer than {MAX_ID_CHARACTERS} characters; shorten it")
    body, given = _body(kind, sent, received.time)
    entry = Entry(
        id=identity,
        kind=kind.__name__,
        subject=received.subject,
        source=sent.source or f"/nats/{received.stream}",
        story_id=body.story_id,
        time=body.timestamp,
        body=body.model_dump(mode="json", exclude_none=True),
    )
    try:
        started_ms = int(received.time.timestamp() * 1000)
        found = positioned(entry, body, started_ms, received.sequence)
        if isinstance(body, ContextDecisionAdded | ContextMilestoneReached):
            news(found)  # stored only if the story can accept it
    except ApplicationError as error:
        raise InvalidMessage(error.message) from None
    content = content_hash([received.subject, given]) if sent.identity else ""
    return ParsedEvent(found, content)


def news(change: Change) -> DecisionAdded | MilestoneReached:
    """Build the decision or milestone that a running story and its agents receive for a change.

    Raises:
        ApplicationError: `InvalidInput`, not retryable, if a text is empty or too long.
    """
    body = change.body
    if isinstance(body, ContextDecisionAdded):
        return DecisionAdded(**body.model_dump(include=set(DecisionAdded.model_fields)))
    milestone = body.milestone_id if isinstance(body, ContextMilestoneReached) else change.entry.id
    return MilestoneReached(
        milestone_id=milestone, event_type=body.label, description=summary(body)
    )


# --- fields ---------------------------------------------------------------------------------------


def _body(kind: type[EventBody], sent: Sent, received: datetime) -> tuple[EventBody, Json]:
    """Build the body; return it with the fields that the sender gave."""
    reading = READING[kind]
    names = dict.fromkeys(name for name in kind.model_fields if name != "via")
    given = _given(names, reading, sent.fields)
    if "story_id" not in given and sent.story_id:
        given["story_id"] = sent.story_id
    fields = {name: _plain(name, value) for name, value in given.items()}
    if isinstance(took := fields.get("duration_ms"), float):
        fields["duration_ms"] = round(took)
    for name in IDS_OF[kind]:
        fields[name] = _id(name, fields.get(name), IDS[name])
    for name in ACTOR_FIELDS:
        _refuse_policy(name, fields.get(name))
    if "via" in kind.model_fields:
        fields["via"] = "claim" if any(fields.get(name) for name in ACTOR_FIELDS) else ""
    fields["timestamp"] = _time(fields.get("timestamp") or sent.time, received)
    match kind.__name__:
        case DeliberationCompleted.__name__:
            fields["decisions"] = _decisions(fields.get("decisions") or [], fields["task_id"])
        case PlanApproved.__name__:
            fields["roles"] = _roles(fields.get("roles") or [])
        case ContextUpdated.__name__:
            _require_version(fields.get("version", 0))
    if isinstance(role := fields.get("role"), str):
        fields["role"] = role.strip().upper()
    try:
        return kind.model_validate(_complete(reading, fields)), given
    except ValidationError as error:
        raise InvalidMessage(invalid_input(kind.SUBJECT, error).message) from None


def _given(names: Mapping[str, Any], reading: Reading, fields: Json) -> Json:
    """Return the fields that are present, by our names; null or blank counts as missing."""
    found = {}
    for name in names:
        for spelling in (name, *reading.spellings.get(name, ())):
            value = fields.get(spelling)
            if value is not None and not (isinstance(value, str) and not value.strip()):
                found[name] = [value] if name in LISTS and isinstance(value, str) else value
                break
    return found


def _complete(reading: Reading, fields: Json) -> Json:
    complete = dict(fields)
    for name, default in reading.defaults.items():
        if name not in complete:
            complete[name] = default(complete) if callable(default) else default
    return complete


def _plain(name: str, value: Any) -> Any:
    """Convert an integer to a string if the field is not a number; refuse booleans."""
    if isinstance(value, bool):
        raise InvalidMessage(f"{name}: is {str(value).lower()}; send a text or a number")
    numbers = ("timestamp", "version", "score", "duration_ms")
    return str(value) if isinstance(value, int) and name not in numbers else value


def _id(name: str, value: Any, rule: TypeAdapter[str]) -> str:
    if value is None:
        raise InvalidMessage(f"{name}: required; add it")
    try:
        return rule.validate_python(value.strip() if isinstance(value, str) else value)
    except ValidationError:
        raise InvalidMessage(
            f"{name}: {str(value)[:60]!r} is not an id: {ID_RULE}; rename it"
        ) from None


def _refuse_policy(name: str, actor: Any) -> None:
    if is_policy(str(actor or "")):
        raise InvalidMessage(
            f"{name}: {str(actor)[:60]!r} is reserved for the fleet's own policies; name who did it"
        )


def _decisions(given: Any, task_id: str) -> list[Json]:
    if not isinstance(given, list):
        raise InvalidMessage("decisions: must be a list; send a list of objects")
    if len(given) > MAX_DECISIONS:
        raise InvalidMessage(
            f"decisions: {len(given)} in one message; at most {MAX_DECISIONS}: send several"
        )
    found = []
    for number, each in enumerate(given):
        where = f"decisions.{number}"
        if not isinstance(each, dict):
            raise InvalidMessage(f"{where}: must be an object; send id, type, title, rationale")
        names = dict.fromkeys((*DECISION.defaults, "affects"))
        fields = _given(names, DECISION, each)
        fields = {name: _plain(f"{where}.{name}", value) for name, value in fields.items()}
        made = _complete(DECISION, fields | {"task_id": task_id})
        made["id"] = _id(f"{where}.id", made["id"], _LONG_ID)
        found.append(made)
    return found


def _roles(given: Any) -> list[str]:
    """Return each role once, in capitals."""
    if not isinstance(given, list):
        raise InvalidMessage("roles: must be a list; send a list of roles, such as DEV")
    found = []
    for number, role in enumerate(given):
        try:
            found.append(
                _ROLE.validate_python(role.strip().upper() if isinstance(role, str) else role)
            )
        except ValidationError:
            raise InvalidMessage(
                f"roles.{number}: {str(role)[:60]!r} is not a role; send one such as DEV"
            ) from None
    return list(dict.fromkeys(found))


def _require_version(version: Any) -> None:
    try:
        number = float(version)
    except (TypeError, ValueError):
        return  # the model's validation names the rule
    if not 0 <= number <= MAX_VERSION:
        raise InvalidMessage(
            f"version: {str(version)[:40]} is not from 0 to {MAX_VERSION}; send the story's version"
        )


def _time(given: Any, received: datetime) -> str:
    """Return the time as ISO 8601 in UTC; the message's own time if none is given."""
    if given in (None, ""):
        return received.astimezone(UTC).isoformat()
    at, shown = instant(given), str(given)[:60]
    if at is None:
        raise InvalidMessage(
            f"timestamp: {shown!r} is not a time; send ISO 8601, as in 2026-01-31T12:00:00Z, or "
            "seconds or milliseconds since 1970"
        )
    if at > received + MAX_CLOCK_SKEW:
        raise InvalidMessage(
            f"timestamp: {shown} is later than the message itself; set the sender's clock, or "
            "leave it out"
        )
    if at.year < 1970:
        raise InvalidMessage(f"timestamp: {shown} is before 1970; leave it out")
    return at.isoformat()
