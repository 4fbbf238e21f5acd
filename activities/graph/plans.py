"""Plans and their tasks in the graph."""

from __future__ import annotations

from typing import LiteralString

from activities.graph.changes import IN_STORY, Row, Write, key

TAKE_UNPLANNED: LiteralString = """
CALL (s, p) {
  MATCH (t:Subtask {case_id: p.case_id}) USING INDEX t:Subtask(case_id)
  WHERE EXISTS { (t)-[:OF]->(s) } AND NOT EXISTS { (t)<-[:HAS_SUBTASK]-(:PlanVersion) }
  MERGE (p)-[:HAS_SUBTASK]->(t) SET t.plan_id = p.id
}
"""
"""Assigns subtasks that were stored before any plan to the first plan.

Uses the index of subtasks, because thousands of other nodes can be attached to the story.
"""

READ_AS_SUBTASK: LiteralString = """
  SET t.sub_id = t.id, t.type = coalesce(t.type, 'task'), t.last_status = t.status
"""
"""Sets the properties of a subtask `t` that other systems read."""

PLACEHOLDER: LiteralString = """
  MERGE (d:Subtask {case_id: row.story_id, id: needed})
    ON CREATE SET d.status = 'PENDING', d.last_status = 'PENDING', d.sub_id = needed,
                  d.type = 'task'
"""
"""Creates a subtask `d` that another subtask depends on and that is not stored yet."""

PLAN = (
    """
MERGE (n:PlanVersion {case_id: row.story_id, id: row.plan_id}) ON CREATE SET n.status = 'DRAFT'
SET n.plan_id = n.id, n.version = coalesce(row.version, n.version)
"""
    + IN_STORY
    + """
MERGE (s)-[:HAS_PLAN]->(n)
WITH n, row UNWIND row.tasks AS task
MERGE (t:Subtask {case_id: row.story_id, id: task.id}) ON CREATE SET t.status = 'PENDING'
SET t += task.node, t.plan_id = n.id
"""
    + READ_AS_SUBTASK
    + """
MERGE (n)-[:HAS_SUBTASK]->(t)
WITH row, t, task UNWIND task.depends_on AS needed
"""
    + PLACEHOLDER
    + "MERGE (t)-[:DEPENDS_ON]->(d)"
)


def plan_write(
    story: str, plan_id: str, tasks: list[Row] | None = None, version: int | None = None
) -> Write:
    """Return the write of a plan and its tasks.

    Args:
        story: The story's id.
        plan_id: The plan's id.
        tasks: As `task_row` returns them.
        version: None if it is not known.
    """
    row = {"story_id": story, "plan_id": key("plan_id", plan_id), "version": version}
    return Write(PLAN, row | {"tasks": tasks or []})


def task_row(task_id: str, depends_on: list[str], node: Row) -> Row:
    """Return a plan's task as `plan_write` takes it."""
    return {
        "id": key("task_id", task_id),
        "node": node,
        "depends_on": [key("depends_on", needed) for needed in depends_on],
    }
