"""What a message from outside says, understood or refused with its reason. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError
from temporalio.exceptions import ApplicationError

from activities.graph.statements import AHEAD_AT_MOST, Change, change, describe, moment
from bridge.dead_letters import identity
from workflows.events import (
    PUBLISHED,
    ContextDecisionAdded,
    ContextMilestoneReached,
    DeliberationCompleted,
    Entry,
    EventBody,
    PlanApproved,
)
from workflows.ids import Id, LongId
from workflows.models import DecisionAdded, MilestoneReached, invalid_input

MAX_BODY_BYTES = 1024 * 1024
MAX_ID_CHARACTERS = 200

UNTOLD: dict[type[EventBody], dict[str, Any]] = {
    PlanApproved: {"approved_by": "unknown"},
    DeliberationCompleted: {"winner_id": "", "score": 0.0, "duration_ms": 0},
}
"""What a body may lack, and what is then taken; a missing `timestamp` is the message's own."""

IDS: dict[str, TypeAdapter[str]] = {
    "story_id": TypeAdapter(Id),
    **{
        name: TypeAdapter(LongId)
        for name in ("plan_id", "task_id", "decision_id", "milestone_id", "decisions.id")
    },
}


IDS_OF: dict[type[EventBody], tuple[str, ...]] = {
    kind: tuple(name for name in kind.model_fields if name in IDS) for kind in PUBLISHED.values()
}


class NotUnderstood(ValueError):
    """A message that no retry mends; the words name the field, the rule and the remedy."""


@dataclass(frozen=True)
class Received:
    """A message as it came. time: when JetStream stored it."""

    subject: str
    stream: str
    sequence: int
    time: datetime
    headers: Mapping[str, str]
    data: bytes

    @property
    def identity(self) -> str:
        """See `dead_letters.identity`."""
        return identity(self.headers, self.stream, self.sequence, self.time)


def understand(received: Received) -> Change:
    """The change that a message tells of.

    Raises:
        NotUnderstood: it is no JSON object, lacks what nobody can know, or breaks a rule.
    """
    kind = PUBLISHED[received.subject]
    if len(received.identity) > MAX_ID_CHARACTERS:
        raise NotUnderstood(f"ce-id: longer than {MAX_ID_CHARACTERS} characters; shorten it")
    told = {**UNTOLD.get(kind, {}), "timestamp": received.time.astimezone(UTC).isoformat()}
    given = {name: value for name, value in _object(received.data).items() if value is not None}
    try:
        body = kind.model_validate(told | given)
    except ValidationError as error:
        raise NotUnderstood(invalid_input(received.subject, error).message) from None
    _require_ids(body)
    _require_time(body.timestamp, received.time)
    entry = Entry(
        id=received.identity,
        kind=kind.__name__,
        subject=received.subject,
        source=received.headers.get("ce-source") or f"/nats/{received.stream}",
        story_id=body.story_id,
        time=body.timestamp,
        body=body.model_dump(mode="json", exclude_none=True),
    )
    try:
        found = change(entry, int(received.time.timestamp() * 1000), received.sequence)
        if isinstance(body, ContextDecisionAdded | ContextMilestoneReached):
            news(found)  # stored only if the story can be told of it
    except ApplicationError as error:
        raise NotUnderstood(error.message) from None
    return found


def news(told: Change) -> DecisionAdded | MilestoneReached:
    """What a running story, and its agents, are told of a change.

    Raises:
        ApplicationError: `InvalidInput`, not retryable, where a text is empty or too long.
    """
    body = told.body
    if isinstance(body, ContextDecisionAdded):
        return DecisionAdded(**body.model_dump(include=set(DecisionAdded.model_fields)))
    milestone = body.milestone_id if isinstance(body, ContextMilestoneReached) else told.entry.id
    said = describe(told)
    return MilestoneReached(
        milestone_id=milestone, event_type=said.event_type, description=said.description
    )


def _object(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BODY_BYTES:
        raise NotUnderstood(
            f"body: {len(data)} bytes; at most {MAX_BODY_BYTES}: leave out what is not asked for"
        )
    try:
        found = json.loads(data, parse_constant=_no_constant)
    except RecursionError:
        raise NotUnderstood("body: nested too deeply; an event is a flat JSON object") from None
    except ValueError as error:  # not UTF-8, not JSON, a number of thousands of digits
        raise NotUnderstood(f"body: is no JSON ({error}); send a flat JSON object") from None
    if not isinstance(found, dict):
        raise NotUnderstood("body: is JSON, but no object; send a flat JSON object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _require_ids(body: EventBody) -> None:
    """Ids become workflow ids, subjects and keys: nothing else may be in them."""
    ids = [(name, getattr(body, name)) for name in IDS_OF[type(body)]]
    if isinstance(body, DeliberationCompleted):
        ids += [("decisions.id", decision.id) for decision in body.decisions]
    for name, value in ids:
        if not value:
            raise NotUnderstood(f"{name}: required; add it")
        try:
            IDS[name].validate_python(value)
        except ValidationError:
            raise NotUnderstood(
                f"{name}: {value[:60]!r} is no id: letters, digits, '-' or '_', beginning with a "
                "letter or digit; rename it"
            ) from None


def _require_time(timestamp: str, received: datetime) -> None:
    try:
        at = moment(timestamp, "timestamp")
    except ApplicationError as error:
        raise NotUnderstood(error.message) from None
    if at > received + AHEAD_AT_MOST:
        raise NotUnderstood(
            f"timestamp: {timestamp[:40]} is later than the message itself; set the sender's "
            "clock, or leave it out"
        )
    if at.year < 1970:
        raise NotUnderstood(f"timestamp: {timestamp[:40]} is before 1970; leave it out")
