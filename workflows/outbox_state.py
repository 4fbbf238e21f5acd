"""An outbox's state: what continue-as-new carries."""

from __future__ import annotations

from pydantic import BaseModel

from workflows.events import Entry, GateClosed, StoryCancelled


class OutboxState(BaseModel):
    """What continue-as-new carries: the entries still to do and the two cursors.

    Positions count entries from 0 over all runs; `entries[0]` has position `published`.
    """

    started_ms: int = 0
    entries: list[Entry] = []
    recorded: int = 0
    published: int = 0

    @property
    def end(self) -> int:
        return self.published + len(self.entries)


class StoryClosure(BaseModel):
    """The input of StoryClosureWorkflow. outbox: as the story's last run left it.

    cancelled: None where the story had come to its end, and its outbox had not.
    """

    story_id: str
    run_id: str
    outbox: OutboxState
    gate: GateClosed | None = None
    cancelled: StoryCancelled | None = None
