"""The running deliberation or plan of a story, and the messages between the two.

A story may continue as new while its child is running. Temporal then asks the child to cancel,
because of the parent close policy, which exists for a story that is terminated. So the story first
signals `outlive`, after which the child ignores cancellations (workers/outliving.py). The next run
waits for the child with an activity, and ends it with the signal `stop`
(docs/design/0007-continue-as-new-with-a-child.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from temporalio import workflow
from temporalio.exceptions import FailureError

from workflows.stubs import FOLLOW, FOLLOW_CHILD

with workflow.unsafe.imports_passed_through():
    from workflows.models.context import DecisionsAdded, MilestonesAdded
    from workflows.models.deliberation import ChildRun
    from workflows.story_state import Story

ADD_DECISIONS = "add_decisions"
ADD_MILESTONES = "add_milestones"
OUTLIVE = "outlive"
STOP = "stop"
"""Signals that both deliberations and plans accept."""

NEWS_AT_ONCE = 5
"""Number of signals with news that a child gets without a pause."""

NEWS_PAUSE = timedelta(seconds=1)
NEWS_PAUSE_AT_MOST = timedelta(minutes=5)

Input = TypeVar("Input")
Output = TypeVar("Output")


class Child:
    """A story's child: at most one is running. `story` holds what the next run needs to know."""

    def __init__(self, story: Story) -> None:
        self.story = story
        self.runs = False
        """True while the child is running and can be signalled."""

    async def ended(
        self,
        run: Callable[[Any, Input], Awaitable[Output]],
        request: Input,
        result_type: type[Output],
        workflow_id: str,
        summary: str,
    ) -> Output:
        """Run the child to its end; if an earlier run of the story started it, wait for its end.

        Raises:
            FailureError: the child failed, or was stopped because this call was cancelled.
        """
        story = self.story
        try:
            if story.outlived:
                end = asyncio.create_task(self._followed(result_type))
            else:
                end = await self._started(run, request, workflow_id, summary)
            self.runs = True
            try:
                return await asyncio.shield(end)
            except asyncio.CancelledError:
                if story.outlived:
                    with suppress(FailureError):  # It has ended meanwhile.
                        await self._signal(STOP)
                else:
                    end.cancel()
                return await end
        finally:
            self.runs = False
            story.child, story.child_run, story.outlived = "", "", False

    async def _started(
        self,
        run: Callable[[Any, Input], Awaitable[Output]],
        request: Input,
        workflow_id: str,
        summary: str,
    ) -> workflow.ChildWorkflowHandle[Any, Output]:
        self.story.child = workflow_id
        self.story.sent(self.story.unsent_decisions, self.story.unsent_milestones)  # in the request
        handle = await workflow.start_child_workflow(
            run,
            request,
            id=workflow_id,
            parent_close_policy=workflow.ParentClosePolicy.REQUEST_CANCEL,
            static_summary=summary[:200],
        )
        self.story.child_run = handle.first_execution_run_id or ""
        return handle

    async def _followed(self, result_type: type[Output]) -> Output:
        story = self.story
        result: Output = await workflow.execute_activity(
            FOLLOW_CHILD,
            ChildRun(workflow_id=story.child, run_id=story.child_run),
            result_type=result_type,
            **(FOLLOW | {"summary": f"wait for {story.child}"}),
        )
        return result

    async def end_left(self) -> None:
        """Stop a child of an earlier run if this run was to wait for it and has not begun to."""
        story = self.story
        if not story.outlived or self.runs or not workflow.patched("children-left-are-stopped"):
            return
        with suppress(FailureError):  # It has ended meanwhile.
            await self._signal(STOP)
        with suppress(FailureError):  # It was stopped.
            await self._followed(object)
        story.child, story.child_run, story.outlived = "", "", False

    @property
    def may_be_left(self) -> bool:
        """True if the story may continue as new."""
        return not self.story.child or self.story.outlived

    async def outlives(self) -> bool:
        """Prepare the child for the story's next run; return False if it has ended meanwhile."""
        if not self.may_be_left:
            run = self.story.child_run
            try:
                await self._signal(OUTLIVE)
            except FailureError:
                return False
            if self.story.child_run != run:  # It ended in the same workflow task.
                return False
            self.story.outlived = True
        return True

    async def pass_on_news(self) -> None:
        """Signal decisions and milestones to the running child, in growing batches.

        The first few signals go at once. Then the pause after a signal grows with their number, so
        that a flood does not make the child's history long.
        """
        story, to, sent = self.story, "", 0
        while True:
            await workflow.wait_condition(lambda: self.runs and story.has_unsent)
            sent = sent + 1 if to == story.child else 1
            to = story.child
            decisions, milestones = story.unsent_decisions, story.unsent_milestones
            with suppress(FailureError):  # It has ended meanwhile: the graph has what is valid.
                if decisions:
                    await self._signal(ADD_DECISIONS, DecisionsAdded(decisions=decisions))
                if milestones:
                    await self._signal(ADD_MILESTONES, MilestonesAdded(milestones=milestones))
            # Only now: the server drops a signal whose run continues as new in the same workflow
            # task, and then the next run has to send it.
            story.sent(decisions, milestones)
            if sent <= NEWS_AT_ONCE:
                continue
            with suppress(TimeoutError):
                await workflow.wait_condition(
                    partial(self._is_over, to),
                    timeout=min((sent - NEWS_AT_ONCE) * NEWS_PAUSE, NEWS_PAUSE_AT_MOST),
                    timeout_summary="what comes meanwhile goes to the child then",
                )

    def _is_over(self, child: str) -> bool:
        return self.story.child != child

    async def _signal(self, name: str, *arguments: object) -> None:
        child = workflow.get_external_workflow_handle(self.story.child)
        await child.signal(name, args=arguments)
