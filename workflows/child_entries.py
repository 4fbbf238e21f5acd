"""Entries that a story's children hand on: which of them a child may have sent. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from workflows.models.entries import Entry
from workflows.models.events import (
    BODIES,
    CriteriaTested,
    EntrySkipped,
    GateApproved,
    GateClosed,
    GateOpened,
    PlanApproved,
    StoryCancelled,
    StoryCreated,
    StoryDelivered,
    StorySpec,
    StoryTransitioned,
)
from workflows.models.ids import context_workflow_id, deliberation_workflow_id, plan_workflow_id

if TYPE_CHECKING:
    from workflows.story_state import Story

OF_STORIES_ALONE = frozenset(
    kind.__name__
    for kind in (
        *(StoryCreated, StorySpec, StoryTransitioned, StoryCancelled),
        *(GateOpened, GateClosed, GateApproved, PlanApproved, EntrySkipped, StoryDelivered),
        CriteriaTested,
    )
)
"""Kinds of entries that no child of a story sends."""


def is_of_child(story: Story, entry: Entry) -> bool:
    """Return whether a child of the story may have sent the entry.

    Only the story itself says that it was created, moved, amended or approved, what a person
    left out, and how an actor is known.
    """
    children = (
        deliberation_workflow_id(f"{story.story_id}-"),
        plan_workflow_id(story.story_id, ""),
        context_workflow_id(story.story_id, ""),
    )
    return (
        entry.story_id == story.story_id
        and entry.source.startswith(children)
        and entry.id.startswith(f"{entry.source}/")
        and entry.kind not in OF_STORIES_ALONE
        and not entry.body.get("via")
        and _is_readable(entry)
    )


def _is_readable(entry: Entry) -> bool:
    """Return whether the body is one of its kind; a newer worker's kind is not known here."""
    kind = BODIES.get(entry.kind)
    try:
        return kind is None or bool(kind.model_validate(entry.body))
    except ValidationError:
        return False
