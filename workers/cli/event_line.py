"""One line for people about an event of the bus."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from workers.cli.render import plain

LONGEST = 400

GATE, MOVE, WORK, GOOD, BAD, QUIET = "yellow", "bold cyan", "", "green", "red", "dim"


class Told(Mapping[str, Any]):
    """An event body whose missing fields read as `?`, because anyone may publish."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body

    def __getitem__(self, name: str) -> Any:
        return self._body.get(name, "?")

    def __iter__(self) -> Any:
        return iter(self._body)

    def __len__(self) -> int:
        return len(self._body)

    def list(self, name: str) -> str:
        """Return the items of a list, separated by commas."""
        items = self._body.get(name)
        return ", ".join(str(item) for item in items) if isinstance(items, list) else "?"


def _story_created(told: Told) -> str:
    return f"created: {told['title']} (rigor {told['rigor']}, by {told['created_by']})"


def _transitioned(told: Told) -> str:
    because = f": {told['reason']}" if told.get("reason") not in ("", None, "?") else ""
    moved = f"{told['from_phase']} -> {told['to_phase']}"
    return f"{moved} by {told['event']}, {told['actor']}{because}"


def _gate_closed(told: Told) -> str:
    by = told["actor"]
    return f"gate {told['gate']} passed by {by}" if by != "?" else f"gate {told['gate']} closed"


def _task_created(told: Told) -> str:
    after = told.list("depends_on")
    behind = f", after {after}" if after not in ("", "?") else ""
    return f"task {told['task_id']} of {told['plan_id']} for {told['role']}{behind}"


def _task_failed(told: Told) -> str:
    error = told.get("error")
    cause = f": {error}" if error not in ("", None, "?") else ""
    return f"task {told['task_id']} {told['status']}{cause}"


def _plan_completed(told: Told) -> str:
    counts = [
        f"{len(ids)} {name}"
        for name in ("done", "failed")
        if isinstance(ids := told.get(name), list)
    ]
    return f"plan {told['plan_id']} ended {told['status']}" + "".join(
        f", {each}" for each in counts
    )


def _deliberation_completed(told: Told) -> str:
    decisions = told["decisions"]
    count = len(decisions) if isinstance(decisions, list) else 0
    return (
        f"{told['role']} council decided {told['task_id']}: {told['winner_id']} with score "
        f"{told['score']}, {count} decision{'s' * (count != 1)}, {_seconds(told)}"
    )


def _seconds(told: Told) -> str:
    took = told["duration_ms"]
    return f"{took / 1000:.0f} s" if isinstance(took, int | float) else "?"


LINES: dict[str, tuple[str, Callable[[Told], str]]] = {
    "planning.story.created": (GOOD, _story_created),
    "planning.story.transitioned": (MOVE, _transitioned),
    "planning.story.cancelled": (BAD, lambda told: f"cancelled by {told['actor']}"),
    "planning.gate.opened": (GATE, lambda t: f"gate {t['gate']} waits for {t['role']}"),
    "planning.gate.closed": (GATE, _gate_closed),
    "planning.plan.approved": (
        GOOD,
        lambda told: f"plan {told['plan_id']} approved by {told['approved_by']}",
    ),
    "planning.gate.approved": (
        GOOD,
        lambda told: f"gate {told['gate']} approved by {told['actor']} as {told['role']}",
    ),
    "planning.plan.completed": (WORK, _plan_completed),
    "planning.task.created": (WORK, _task_created),
    "orchestration.task.completed": (
        GOOD,
        lambda told: f"task {told['task_id']} is done, by {told['assignee']}",
    ),
    "orchestration.task.failed": (BAD, _task_failed),
    "orchestration.task.dispatched": (
        WORK,
        lambda told: f"task {told['task_id']} given to {told['agent_id']}",
    ),
    "orchestration.deliberation.started": (
        WORK,
        lambda told: f"{told['role']} council deliberates {told['task_id']}",
    ),
    "orchestration.deliberation.completed": (GOOD, _deliberation_completed),
    "orchestration.deliberation.failed": (
        BAD,
        lambda told: f"{told['role']} council failed at {told['task_id']}: {told['error']}",
    ),
    "orchestration.round.completed": (
        QUIET,
        lambda told: f"round {told['round']} of {told['task_id']} is over",
    ),
    "context.updated": (
        QUIET,
        lambda told: f"context version {told['version']}: {told.list('changed')}",
    ),
    "context.decision.added": (
        WORK,
        lambda told: f"decision {told['decision_id']}: {told['title']} (by {told['decided_by']})",
    ),
    "context.milestone.reached": (
        GOOD,
        lambda told: f"milestone {told['event_type']}: {told['description']}",
    ),
}
"""The colour of each subject, and the function that makes the text from the body."""


def headline(subject: str, body: Any) -> tuple[str, str]:
    """Return the text on one line, cut to LONGEST characters, and the colour to show it in."""
    style, words = LINES.get(subject, (QUIET, None))
    if words and isinstance(body, Mapping):
        said = words(Told(body))
    else:
        said = f"{subject} {json.dumps(body, ensure_ascii=False)}"
    line = " ".join(plain(said).split())
    return (line if len(line) <= LONGEST else f"{line[:LONGEST]}…"), style
