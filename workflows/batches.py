"""A long plan: its tasks run in batches, and the plan continues as new between two of them.

Where the server suggests it, no further task begins in the run, and those that run end in it. The
next run has what was done. No child thus outlives a run, and no merge or revision is under way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from temporalio import workflow

from workflows.child import OUTLIVE

with workflow.unsafe.imports_passed_through():
    from workflows.models.agents import PlannedTask
    from workflows.models.plan import PlanInput, PlanProgress
    from workflows.models.workspace import RepositoryWork
    from workflows.rules.paths import one_file

if TYPE_CHECKING:
    from workflows.plan import PlanWorkflow

AT_ONCE = 60
"""Tasks that run at once: the end of each is news for the others, so they make histories long."""


def outgrown() -> bool:
    """Return whether the tasks that are ready have to wait for the next run.

    A run that an older release has brought this far goes on to its end.
    """
    suggested = workflow.info().is_continue_as_new_suggested()
    return suggested and workflow.patched("plans-continue-as-new")


def dispatchable(
    ready: list[PlannedTask], running: int, work: RepositoryWork | None
) -> list[PlannedTask]:
    """Return the tasks for which there is room beside those that run.

    If the story may change one file only, tasks at once would conflict: there they take turns.
    """
    if work and one_file(work.paths):
        if len(ready) + running > 1 and workflow.patched("tasks-of-one-file-take-turns"):
            return ready[: max(0, 1 - running)]
        return ready
    room = AT_ONCE - running
    if len(ready) > room and workflow.patched("plans-limit-tasks-at-once"):
        return ready[:room]
    return ready


async def continue_as_new(plan: PlanWorkflow) -> NoReturn:
    """Go on in another run once no signal of the plan is on its way, for it would be sent again."""
    await workflow.wait_condition(lambda: _is_quiet(plan))
    memo = {OUTLIVE: True} if plan.outlives else None  # for workers/outliving.py
    workflow.continue_as_new(_continued(plan), memo=memo)


def _is_quiet(plan: PlanWorkflow) -> bool:
    handed_on = plan.outbox.empty or not plan.outbox.publish_via
    return handed_on and workflow.all_handlers_finished()


def _continued(plan: PlanWorkflow) -> PlanInput:
    carried = PlanProgress(
        outcomes=list(plan.outcomes.values()),
        merged=plan.merged,
        outbox=plan.outbox.state,
        outlives=plan.outlives,
    )
    now = {"tasks": plan.tasks, "decisions": plan.decisions, "work": plan.work()}
    return plan.input.model_copy(update={**now, "carried": carried})
