"""One line for people about an event of the bus."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from workers.cli.render import plain
from workflows.models import events
from workflows.models.events import PUBLISHED, EventBody

LONGEST = 400

STYLES: dict[type[EventBody], str] = {
    events.StoryCreated: "green",
    events.StoryTransitioned: "bold cyan",
    events.StoryCancelled: "red",
    events.StoryDelivered: "bold green",
    events.CriteriaTested: "green",
    events.GateOpened: "yellow",
    events.GateClosed: "yellow",
    events.GateApproved: "green",
    events.PlanApproved: "green",
    events.TaskCompleted: "green",
    events.TaskFailed: "red",
    events.DeliberationCompleted: "green",
    events.DeliberationFailed: "red",
    events.RoundCompleted: "dim",
    events.ContextUpdated: "dim",
    events.ContextMilestoneReached: "green",
}
"""The colour of an event; without one, the terminal's own."""


def headline(subject: str, body: Any, read: Any = None) -> tuple[str, str]:
    """Return the text on one line, cut to LONGEST characters, and the colour to show it in.

    Args:
        subject: The message's.
        body: Its JSON.
        read: Its fields as the inbox reads them, if it does.
    """
    event = whole(subject, body) or parsed(subject, read) or parsed(subject, body)
    if event is None:
        words, style = f"{subject} {json.dumps(body, ensure_ascii=False)}", "dim"
    else:
        kind = f"{event.label}: " if event.label != subject else ""
        what, who = event.summary(), event.by()
        by = f" ({who})" if who and who not in what else ""
        words, style = f"{kind}{what}{by}", STYLES.get(type(event), "")
    line = " ".join(plain(words).split())
    return (line if len(line) <= LONGEST else f"{line[:LONGEST]}…"), style


def whole(subject: str, body: Any) -> EventBody | None:
    """Return the event if the body has its fields as the fleet writes them."""
    kind = PUBLISHED.get(subject)
    try:
        return kind.model_validate(body) if kind else None
    except ValidationError:
        return None


def parsed(subject: str, body: Any) -> EventBody | None:
    """Return the event; a missing text reads as `?`, because anyone may publish.

    None if it has no known subject or cannot be read.
    """
    kind = PUBLISHED.get(subject)
    if kind is None or not isinstance(body, Mapping):
        return None
    missing = {name: "?" for name, field in kind.model_fields.items() if field.is_required()}
    try:
        return kind.model_validate(missing | dict(body))
    except ValidationError:
        return None
