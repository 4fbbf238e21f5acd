"""The task that repairs a story's branch whose build or unit tests fail. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from workflows.models.agents import PlannedTask
from workflows.models.measurement import Measurement, Step, SuiteResult
from workflows.models.plan import Plan
from workflows.rules.changes import NAMED, TAIL_CHARACTERS, fenced, named

MOST_REPAIRS = 2
"""After so many repairs of one plan's run, a person decides."""

REPAIRER = "DEV"


def repair_task(plan: Plan, measurement: Measurement, before: str = "") -> PlannedTask:
    """Return the task that repairs what was measured, numbered after the plan's tasks.

    Args:
        plan: the plan, with its earlier repairs.
        measurement: of the branch's head; its build or its unit tests fail.
        before: why the repair before this one failed, if it did.
    """
    needed = {dependency for task in plan.tasks for dependency in task.depends_on}
    roles = [task.role for task in plan.tasks]
    return PlannedTask(
        task_id=f"{plan.plan_id}-t{len(plan.tasks) + 1}",
        role=REPAIRER if REPAIRER in roles else roles[-1],
        title=f"Repair the {'unit tests' if measurement.build.ran else 'build'}",
        description=_description(measurement, before),
        depends_on=[task.task_id for task in plan.tasks if task.task_id not in needed],
    )


def passes(measurement: Measurement) -> bool:
    """Return whether the build and the unit tests pass."""
    return measurement.build.ran and measurement.unit.ok


def _description(measurement: Measurement, before: str) -> str:
    build, unit = measurement.build, measurement.unit
    paragraphs = [
        f"All tasks of the plan are merged. The fleet measured commit {measurement.commit}, and "
        "this failed. Repair the cause. Change or remove a test only if the test itself is wrong.",
        *([] if build.ran else _failure("build", build)),
        *([] if unit.ok else _failure("unit tests", unit)),
        *([f"The repair before this one failed: {before}"] if before else []),
    ]
    return "\n\n".join(paragraphs)


def _failure(name: str, step: Step) -> Iterator[str]:
    """Yield what a repair has to know of a step that failed."""
    if step.not_measured:
        yield f"{name.capitalize()}: not measured: {step.not_measured}"
        return
    ended = step.stopped or f"exit code {step.exit_code}"
    yield f"{name.capitalize()}: {ended}\n{fenced('', step.command)}"
    if isinstance(step, SuiteResult):
        lines = [f"- {each.name}: {each.message}" for each in step.failures[:NAMED]]
        if lines:
            yield "\n".join([f"{step.failed} of {step.tests} tests fail:", *lines])
        if step.broken:
            yield f"These passed on the base: {named(step.broken)}"
    if step.tail:
        yield f"The end of the output:\n{fenced('', step.tail[-TAIL_CHARACTERS:])}"
