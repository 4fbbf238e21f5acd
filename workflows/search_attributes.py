"""The search attributes, in one registry: workers register them at start-up."""

from __future__ import annotations

from temporalio.common import SearchAttributeKey

STORY_STATE = SearchAttributeKey.for_keyword("StoryState")
PENDING_GATE = SearchAttributeKey.for_keyword("PendingGate")
RIGOR = SearchAttributeKey.for_keyword("Rigor")
DOR_SCORE = SearchAttributeKey.for_int("DorScore")
STORY_ROLE = SearchAttributeKey.for_keyword("StoryRole")
"""A story: the role that may open its pending gate. A deliberation: its council's role."""
OUTBOX_STUCK = SearchAttributeKey.for_keyword("OutboxStuck")
"""The kind of the entry that can be neither stored nor published, while there is one."""

TITLE_MEMO = "title"
"""Not searched for, but listed: the memo that holds a story's title."""

ALL: tuple[SearchAttributeKey[str] | SearchAttributeKey[int], ...] = (
    STORY_STATE,
    PENDING_GATE,
    RIGOR,
    DOR_SCORE,
    STORY_ROLE,
    OUTBOX_STUCK,
)
