"""The state of an outbox, which continue-as-new carries."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from workflows.models.access import Proof
from workflows.models.base import Actor, Model, Request
from workflows.models.deliberation import DeliberationRecord
from workflows.models.entries import Entry
from workflows.models.events import (
    DeliberationFailed,
    GateClosed,
    PlanFinished,
    StoryCancelled,
    TaskFailed,
)


class OutboxState(BaseModel):
    """The part of an outbox that continue-as-new carries: unfinished entries and two cursors.

    Positions count entries from 0 over all runs; `entries[0]` has position `published`.
    `deliberation` is recorded with the next entries.
    """

    started_ms: int = 0
    entries: list[Entry] = []
    recorded: int = 0
    published: int = 0
    deliberation: DeliberationRecord | None = None

    @property
    def end(self) -> int:
        return self.published + len(self.entries)


class OutboxStuck(Model):
    """An entry that was refused for good: it is retried every minute, or skipped.

    Attributes:
        step: the refused step.
        error_type: the type of the ApplicationError, which makes it final.
        story_id: its story; empty if it has none.
    """

    entry_id: str
    kind: str
    step: Literal["record", "publish"]
    error_type: str = ""
    error: str
    story_id: str = ""


class SkipEntry(Request):
    """A request to skip an entry that can never be stored; `reason` goes into the timeline."""

    entry_id: str
    actor: Actor
    reason: str = Field(min_length=1, max_length=2_000)
    proof: Proof = ""


class StoryClosure(BaseModel):
    """The input of StoryClosureWorkflow.

    Attributes:
        outbox: the outbox as the run left it.
        owner: the workflow whose outbox it is; empty: the story's.
        gates: the open gates.
        plan: the ends of the unfinished tasks of a plan, and its own.
        deliberation: the end of a deliberation.
        gate: the open gate of a closure that an earlier version has started.
        cancelled: None if the story had ended and only its outbox had not.
    """

    story_id: str
    run_id: str
    outbox: OutboxState
    owner: str = ""
    gate: GateClosed | None = None
    gates: list[GateClosed] = []
    plan: list[TaskFailed | PlanFinished] = []
    deliberation: DeliberationFailed | None = None
    cancelled: StoryCancelled | None = None
