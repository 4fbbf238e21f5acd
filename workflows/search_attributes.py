"""The search attributes of a story's workflows: one registry (design section 3).

Workflows upsert these; `workers/search_attributes.py` registers `ALL` at start-up. Cancelled or
done, a story keeps its last values, so a closed story is found by them too.
"""

from typing import Any

from temporalio.common import SearchAttributeKey

STORY_STATE = SearchAttributeKey.for_keyword("StoryState")
"""The state of the story's machine: DRAFT, DESIGN and so on."""

PENDING_GATE = SearchAttributeKey.for_keyword("PendingGate")
"""The gate that waits for a person; unset where none does."""

RIGOR = SearchAttributeKey.for_keyword("Rigor")
"""L0 to L3."""

DOR_SCORE = SearchAttributeKey.for_int("DorScore")
"""Definition of Ready, 0 to 100."""

STORY_ROLE = SearchAttributeKey.for_keyword("StoryRole")
"""On a story: the role its pending gate waits for. On a deliberation: the council's role."""

ALL: tuple[SearchAttributeKey[Any], ...] = (
    STORY_STATE,
    PENDING_GATE,
    RIGOR,
    DOR_SCORE,
    STORY_ROLE,
)
