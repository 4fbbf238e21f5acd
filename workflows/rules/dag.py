"""A plan's tasks: the rules for them, and which of them can run.

Pure. A plan is a directed acyclic graph of atomic tasks. Every document that satisfies the JSON
schema from `plan_schema` is a valid plan, so that a decoder bound to it cannot write an invalid
one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from workflows.models.agents import MAX_TASKS, DraftTask, PlannedTask
from workflows.models.ids import ID_PATTERN, ID_RULE, LONG_ID_CHARACTERS

LONGEST_PREFIX = 160
"""Maximum number of characters before the role in a task's id."""


class InvalidPlan(ValueError):
    """The tasks are not a plan. `faults`: each names the task, the rule and the remedy."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


def validate(
    tasks: Sequence[PlannedTask],
    roles: Sequence[str] | None = None,
    max_tasks: int | None = None,
) -> None:
    """Reject tasks that are not a valid plan.

    Args:
        tasks: the tasks of the plan.
        roles: the existing roles; None for any.
        max_tasks: the maximum number of tasks; None for any number.

    Raises:
        InvalidPlan: names every fault.
    """
    if faults := list(_faults(tasks, roles, max_tasks)):
        raise InvalidPlan(faults)


def ready(
    tasks: Sequence[PlannedTask], done: Collection[str], started: Collection[str]
) -> list[PlannedTask]:
    """Return the tasks to dispatch now: not started, and all their dependencies are done.

    Args:
        tasks: the plan's tasks.
        done: ids of the tasks that are done.
        started: ids of all tasks that run or have ended, however they ended.

    Returns:
        The tasks by priority, then id.
    """
    dispatchable = [
        task
        for task in tasks
        if task.task_id not in done
        and task.task_id not in started
        and all(dependency in done for dependency in task.depends_on)
    ]
    # Shorter ids first, so that t2 comes before t10.
    return sorted(dispatchable, key=lambda t: (t.priority, len(t.task_id), t.task_id))


def task_of_each_role(story_id: str, plan_id: str, roles: Sequence[str]) -> list[PlannedTask]:
    """Return one independent task for each role, for a plan of which only the ids are known."""
    place = f"{story_id}-{plan_id}"[:LONGEST_PREFIX].rstrip()
    return [
        PlannedTask(
            task_id=f"{place}-{role.lower()}",
            role=role,
            title=f"{role}'s part of plan {plan_id}",
            description=(
                f"Plan {plan_id} of story {story_id} was approved for the roles "
                f"{', '.join(roles)}; its tasks and the story's text are not known. Deliberate "
                f"what {role} has to do by the story's context, and name what is missing."
            ),
        )
        for role in dict.fromkeys(roles)
    ]


def number_tasks(plan_id: str, drafts: Sequence[DraftTask]) -> list[PlannedTask]:
    """Return a decoder's tasks with ids `{plan_id}-t{n}` from 1; merge duplicate dependencies."""
    return [
        PlannedTask(
            task_id=f"{plan_id}-t{number}",
            role=draft.role,
            title=draft.title,
            description=draft.description,
            depends_on=[f"{plan_id}-t{earlier}" for earlier in sorted(set(draft.depends_on))],
            priority=draft.priority,
        )
        for number, draft in enumerate(drafts, start=1)
    ]


def plan_schema(
    roles: Sequence[str],
    max_tasks: int = MAX_TASKS,
    title_length: int = 80,
    description_length: int = 300,
) -> dict[str, Any]:
    """Return the JSON schema of `{"tasks": [DraftTask, ...]}` that only valid plans satisfy.

    Each position has its own schema, in which a task can depend only on earlier numbers, so that
    cycles and dangling dependencies cannot be written. Lengths are in characters. The decoder does
    not enforce that a dependency is named only once; `number_tasks` does.
    """

    def task(number: int) -> dict[str, Any]:
        depends_on: dict[str, Any] = {"type": "array", "maxItems": number - 1}
        if number > 1:
            depends_on["items"] = {"enum": list(range(1, number))}
        properties = {
            "title": {"type": "string", "minLength": 1, "maxLength": title_length},
            "description": {"type": "string", "minLength": 1, "maxLength": description_length},
            "role": {"enum": list(roles)},
            "depends_on": depends_on,
            "priority": {"enum": [1, 2, 3]},
        }
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }

    return {
        "type": "object",
        "properties": {
            "tasks": {
                "type": "array",
                "prefixItems": [task(number) for number in range(1, max_tasks + 1)],
                "items": False,
                "minItems": 1,
                "maxItems": max_tasks,
            }
        },
        "required": ["tasks"],
        "additionalProperties": False,
    }


def _faults(
    tasks: Sequence[PlannedTask], roles: Sequence[str] | None, max_tasks: int | None
) -> Iterator[str]:
    if not tasks:
        yield "a plan needs at least 1 task"
    if max_tasks is not None and len(tasks) > max_tasks:
        yield f"{len(tasks)} tasks; at most {max_tasks}: join some, or split the story"
    for task_id, times in Counter(task.task_id for task in tasks).items():
        if not re.fullmatch(ID_PATTERN, task_id) or len(task_id) > LONG_ID_CHARACTERS:
            yield f"task {task_id[:120]!r}: an id is {ID_RULE}"
        if times > 1:
            yield f"task {task_id!r}: there {times} times; give each its own id"
    known = {task.task_id for task in tasks}
    for task in tasks:
        if roles is not None and task.role not in roles:
            yield f"task {task.task_id!r}: unknown role {task.role!r}; one of {', '.join(roles)}"
        for dependency in dict.fromkeys(task.depends_on):
            if dependency not in known:
                yield (
                    f"task {task.task_id!r}: depends on {dependency!r}, which is not in the plan; "
                    "add that task, or remove the dependency"
                )
    for cycle in _cycles(tasks):
        yield f"tasks {' -> '.join(cycle)}: each waits for the next; remove one dependency"


def _cycles(tasks: Sequence[PlannedTask]) -> Iterator[list[str]]:
    """Yield cycles that share no task, so that each is named; each task depends on the next one."""
    waits_for: dict[str, list[str]] = {}
    for task in tasks:
        waits_for.setdefault(task.task_id, []).extend(task.depends_on)
    while True:
        try:
            TopologicalSorter(waits_for).prepare()
        except CycleError as error:
            cycle: list[str] = error.args[1][::-1]
            yield cycle
            for task_id in cycle[1:]:
                del waits_for[task_id]
        else:
            return
