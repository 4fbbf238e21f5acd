"""The registry of search attributes; workers register them at start-up."""

from __future__ import annotations

from datetime import datetime

from temporalio.common import SearchAttributeKey

STORY_STATE = SearchAttributeKey.for_keyword("StoryState")
PENDING_GATE = SearchAttributeKey.for_keyword("PendingGate")
RIGOR = SearchAttributeKey.for_keyword("Rigor")
DOR_SCORE = SearchAttributeKey.for_int("DorScore")
GATE_OPENED_AT = SearchAttributeKey.for_datetime("GateOpenedAt")
STORY_ROLE = SearchAttributeKey.for_keyword("StoryRole")
"""Story: the role that may open its pending gate. Deliberation: its council's role."""
OUTBOX_STUCK = SearchAttributeKey.for_keyword("OutboxStuck")
"""The kind of the entry that can be neither stored nor published, while one is stuck."""

TITLE_MEMO = "title"
"""The memo for a story's title: listed, but not searched."""

ALL: tuple[
    SearchAttributeKey[str] | SearchAttributeKey[int] | SearchAttributeKey[datetime], ...
] = (
    STORY_STATE,
    PENDING_GATE,
    GATE_OPENED_AT,
    RIGOR,
    DOR_SCORE,
    STORY_ROLE,
    OUTBOX_STUCK,
)
