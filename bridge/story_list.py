"""The query that lists stories from Temporal's visibility."""

from __future__ import annotations

from workflows.search_attributes import OUTBOX_STUCK, PENDING_GATE, STORY_ROLE, STORY_STATE

WORD = r"^[A-Za-z][A-Za-z0-9_-]{0,63}$"
"""The values that may be quoted in a visibility query."""

STUCK_RUNS = f"ExecutionStatus = 'Running' AND {OUTBOX_STUCK.name} IS NOT NULL"
"""The visibility query for workflows of any type with an outbox entry that is refused for good."""


def stories_query(
    *,
    running: bool = False,
    waiting: bool = False,
    role: str | None = None,
    state: str | None = None,
) -> str:
    """Return the visibility query, as `temporal workflow list --query` takes it.

    A run that continued as new is part of its story's past, and is left out.

    Args:
        running: Only stories that have not ended.
        waiting: Only those that wait for a person.
        role: Only those that wait for this role; matches WORD.
        state: Only those in this state; matches WORD.
    """
    status = "= 'Running'" if running else "!= 'ContinuedAsNew'"
    terms = ["WorkflowType = 'StoryWorkflow'", f"ExecutionStatus {status}"]
    if waiting or role:
        terms.append(f"{PENDING_GATE.name} IS NOT NULL")
    for key, value in ((STORY_ROLE, role), (STORY_STATE, state)):
        if value is not None:
            terms.append(f"{key.name} = '{value}'")
    return " AND ".join(terms)
