"""The numbers that earlier runs of a story used, so that the ids of a new run are unique.

See docs/design/0009-story-ids-used-again.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from workflows.models.story import StoryRuns

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
    """Return the highest number of `{story}-plan-{n}`, and of `{story}-{state}-{n}` by state.

    Ids in another form come from other systems; no run of the fleet creates such ids.
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
