"""Decisions, milestones, context packs, and changes of a story's context that others send."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from workflows.models.access import Via
from workflows.models.base import Actor, Line, Model, Request, content_hash
from workflows.models.ids import Id, LongId


class DecisionAdded(Request):
    """A decision from outside or from a sibling deliberation."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    decision_id: Line
    title: Line
    rationale: str = ""
    decided_by: str = "unknown"
    withdrawn: bool = False
    """True if it was deleted: agents that know of it are notified that it is void."""


class MilestoneReached(Request):
    """A milestone of a story from outside, for its agents and its timeline."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    milestone_id: Line
    event_type: Line
    description: str = ""


class DecisionsAdded(Request):
    """Several decisions in one signal: new ones, corrections of earlier ones, and withdrawals."""

    decisions: list[DecisionAdded] = Field(max_length=1_000)


class MilestonesAdded(Request):
    """Several milestones in one signal."""

    milestones: list[MilestoneReached] = Field(max_length=1_000)


class PackQuery(Model):
    """A query for a context pack. `token_budget` 0: the default of deploy/config/scopes.yaml."""

    story_id: str
    role: str
    phase: str
    subtask_id: str = ""
    token_budget: int = 0
    known: bool = False
    """True if the story's start was recorded. A graph that does not have it has lost the story."""
    background: str = ""
    """What a kept pack has in addition, at the end of its context."""


class ContextPack(Model):
    """A context pack: three blocks and the hash of their content.

    Attributes:
        kept_at: the key in Valkey that has the pack; the blocks are empty then, so that a history
            holds the key and not the same text in every call.
    """

    system: str = ""
    context: str = ""
    tools: str = ""
    scopes: list[str] = []
    token_count: int = 0
    version: str = ""
    kept_at: str = ""


class ContextChange(Model):
    """One change as requested; it is validated where it is stored. `payload`: a JSON object."""

    operation: str = ""
    entity_type: str = ""
    entity_id: str = ""
    payload: str = ""
    reason: str = ""


class PhaseChange(Model):
    """A story's move from one phase to another, made outside any workflow."""

    from_phase: str
    to_phase: str
    event: str
    reason: str = ""
    via: Via = ""


class ContextUpdate(Request):
    """The input of ContextUpdateWorkflow. `actor`: the requester. `timestamp`: empty for now."""

    story_id: Id
    task_id: LongId | None = None
    role: str = Field(default="", max_length=100)
    actor: Actor
    changes: list[ContextChange] = Field(default=[], max_length=1_000)
    timestamp: str = Field(default="", max_length=100)
    if_absent: bool = False
    """True: nothing is stored or published if the graph knows the story."""
    phase_change: PhaseChange | None = None
    """The move to publish with the changes, if they are stored."""
    changed: list[str] = []
    """Entity types that the story's workflow has already changed; the update publishes them."""
    roles: list[str] | None = None
    """The roles of the requester's token, for what depends on what is stored; None: the fleet."""
    whole: bool = False
    """True: the update is refused, and not only warned about, if none of its changes is stored."""


def request_hash(update: ContextUpdate) -> str:
    """Return a hash by which a repeated request is recognised.

    Fields that were added later are left out if they have their default: histories hold hashes
    without them. A token's roles do not change what it asks for.
    """
    later = {"if_absent", "phase_change", "changed", "whole"}
    fields = update.model_dump(exclude={*later, "roles"}) | update.model_dump(
        include=later, exclude_defaults=True
    )
    return content_hash(fields)


class ContextWrite(Model):
    """An update to store.

    Attributes:
        update_id: the key of the update; a second write under the same key stores nothing.
        at: the time of the changes, ISO 8601.
        started_ms: distinguishes two updates with the same time.
    """

    update_id: str
    at: str
    started_ms: int
    update: ContextUpdate


class ContextAnswer(Model):
    """The result of an update. `changed`: entity types. `warnings`: one per rejected change."""

    version: int
    hash: str
    warnings: list[str] = []
    changed: list[str] = []
    decisions: list[DecisionAdded] = []
    milestones: list[MilestoneReached] = []
    after: str = ""
    """The workflow that publishes the previous version; empty if none is known."""
