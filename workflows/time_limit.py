"""A time limit on the waves of a deliberation."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any

from temporalio import workflow

SHORTEST = timedelta(milliseconds=1)
"""The shortest timer, for work that begins when no time is left."""


class TimeLimit:
    """A limit on the total time of tasks, of which one runs at a time.

    Attributes:
        spent: the time of the tasks that have ended.
        one_timer: whether all tasks share a timer, instead of one timer for each task. It is
            started again if time passed between tasks.
    """

    def __init__(self, limit: timedelta) -> None:
        self.limit = limit
        self.spent = timedelta()
        self.one_timer = False
        self._timer: asyncio.Task[None] | None = None
        self._began: datetime | None = None

    @property
    def left(self) -> timedelta:
        """The time that was left when the last task ended."""
        return self.limit - self.spent

    async def wait(self, task: asyncio.Task[Any], summary: str) -> None:
        """Wait until the task has ended; its time is then spent.

        Args:
            task: the work, which goes on if its time is up.
            summary: shown with the timer.

        Raises:
            TimeoutError: the time is up, and the task has not ended.
        """
        began = self._began = workflow.now()
        try:
            await self._until_done(task, summary)
        except (TimeoutError, asyncio.CancelledError):
            self._end(began)
            raise
        self._end(began)  # not in a `finally`, which also runs when a worker drops the workflow

    async def _until_done(self, task: asyncio.Task[Any], summary: str) -> None:
        if not self.one_timer:
            await workflow.wait_condition(
                task.done, timeout=max(self.left, SHORTEST), timeout_summary=summary
            )
            return
        timer = self._running_timer(summary)
        await workflow.wait_condition(lambda: task.done() or timer.done())
        if not task.done():
            raise TimeoutError

    def _end(self, began: datetime) -> None:
        self.spent += workflow.now() - began
        self._began = None

    def _running_timer(self, summary: str) -> asyncio.Task[None]:
        if self._timer is None:
            self._timer = asyncio.create_task(self._until_spent(summary))
        return self._timer

    async def _until_spent(self, summary: str) -> None:
        left = max(self.left, SHORTEST)
        while left > timedelta():
            await workflow.sleep(left, summary=summary)
            if self._began is None and workflow.patched("time-limits-rest-between-tasks"):
                await workflow.wait_condition(lambda: self._began is not None)
            running = workflow.now() - self._began if self._began else timedelta()
            left = self.left - running
