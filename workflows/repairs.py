"""The end of a plan in a repository: the branch's head is measured, and repaired at most twice.

A repair is a task of the plan, numbered after the others. The story's state holds it before it
runs, so that a retry, or the next run of a story that continues as new, goes on with it. A visit
that a person sends the story back for makes new repairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from temporalio import workflow

from workflows.derivation import plan_derived

with workflow.unsafe.imports_passed_through():
    from workflows.models.events import TaskCreated
    from workflows.models.measurement import Measurement
    from workflows.models.plan import Repair
    from workflows.rules.repairs import MOST_REPAIRS, passes, repair_task

if TYPE_CHECKING:
    from workflows.story import StoryWorkflow


async def measure_and_repair(of: StoryWorkflow) -> None:
    """Measure the branch until it passes, a repair task before each further measurement.

    After the last one a person decides, as if the fleet could not measure it.
    """
    story = of.story
    while story.branch is not None:
        repair = open_repair(of)
        if repair is None:
            found = await of.branch_work.measure(story.branch)
            if found is None or passes(found.measurement) or not may_repair(of):
                return
            repair = add_repair(of, found.measurement)
        await run_repair(of, repair)


def may_repair(of: StoryWorkflow) -> bool:
    """Return whether a repair is left; histories of older releases have none."""
    left = len(of.story.repairs_now) < MOST_REPAIRS
    return left and workflow.patched("repair-tasks")


def open_repair(of: StoryWorkflow) -> Repair | None:
    return next((repair for repair in of.story.repairs_now if repair.status == "open"), None)


def add_repair(of: StoryWorkflow, measurement: Measurement) -> Repair:
    """Add a repair task to the plan, and announce it as the derived ones."""
    story = of.story
    assert story.plan is not None
    earlier = story.repairs_now
    task = repair_task(story.plan, measurement, earlier[-1].error if earlier else "")
    repair = Repair(task_id=task.task_id, visit=story.visit)
    story.repairs = [*story.repairs, repair]
    story.plan = story.plan.model_copy(update={"tasks": [*story.plan.tasks, task]})
    of.milestone(
        "REPAIR_ADDED",
        f"{task.task_id} repairs commit {measurement.commit[:12]}: {len(earlier) + 1} of "
        f"{MOST_REPAIRS} repair tasks",
    )
    of.emit(plan_derived(story.plan))
    of.emit(
        TaskCreated(
            plan_id=story.plan.plan_id,
            task_id=task.task_id,
            role=task.role,
            depends_on=task.depends_on,
        )
    )
    return repair


async def run_repair(of: StoryWorkflow, repair: Repair) -> None:
    """Run a repair task as the plan's tasks are run; a failed one counts as made."""
    story = of.story
    assert story.plan is not None
    task = next(task for task in story.plan.tasks if task.task_id == repair.task_id)
    result = await of.state_work.run_plan(story.plan, [task.model_copy(update={"depends_on": []})])
    (outcome,) = result.outcomes
    if outcome.status == "done":
        story.end_repair(repair, "")
        return
    story.end_repair(repair, outcome.error or outcome.status)
    of.milestone("REPAIR_FAILED", f"{task.task_id}: {outcome.error or outcome.status}")
