"""What earlier runs of a story have numbered, so that a new run's ids are its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from workflows.models import StoryRuns

NUMBERED = """
MATCH (s:Case {id: $story_id})
CALL (s) {
  MATCH (s)-[:HAS_PLAN]->(p:PlanVersion) RETURN p.id AS id, 'plan' AS kind
  UNION
  MATCH (s)<-[:OF]-(d:Proposal|Deliberation) RETURN d.task_id AS id, 'council' AS kind
}
RETURN DISTINCT kind, id
"""


def numbered(story_id: str, rows: Sequence[dict[str, Any]]) -> StoryRuns:
    """The highest number of `{story}-plan-{n}`, and of `{story}-{state}-{n}` for each state.

    Ids of another form were given by others: no run of the fleet makes one like them.
    """
    plans, councils = 0, dict[str, int]()
    form = re.compile(re.escape(story_id) + r"-(.+)-([0-9]{1,9})")
    for row in rows:
        found = form.fullmatch(row["id"]) if isinstance(row["id"], str) else None
        if found is None:
            continue
        name, number = found[1], int(found[2])
        if row["kind"] == "plan" and name == "plan":
            plans = max(plans, number)
        elif row["kind"] == "council":
            councils[name] = max(councils.get(name, 0), number)
    return StoryRuns(plans=plans, councils=councils)
