"""A story's shape without the fleet: as many no-op activities, in the same order and batches."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from pydantic import BaseModel
from temporalio import activity, workflow


class Shape(BaseModel):
    """The activities and children of a workflow.

    `batches` are the numbers of activities scheduled at once, batch after batch; `children` are
    the shapes of its child workflows.
    """

    batches: list[int]
    children: list[Shape]

    @property
    def activities(self) -> int:
        return sum(self.batches) + sum(child.activities for child in self.children)


_COUNCIL = Shape(batches=[1, 1, 3, 3, 3, 3, 1], children=[])

A_STORY = Shape(batches=[1] * 52, children=[_COUNCIL] * 5)
"""The story that figures are compared with: 127 activities, 52 of its own and 15 in each council.

It stays as it is, so that a story of the fleet that needs fewer activities compares better.
"""


@activity.defn
async def noop() -> None:
    """Do nothing: only Temporal is measured."""


@workflow.defn(sandboxed=False)
class BareStory:
    """A workflow that runs a shape: its own batches and, concurrently, its children in turn."""

    @workflow.run
    async def run(self, shape: Shape) -> None:
        await asyncio.gather(self.activities(shape.batches), self.children(shape.children))

    async def activities(self, batches: list[int]) -> None:
        for batch in batches:
            await asyncio.gather(
                *(
                    workflow.execute_activity(noop, start_to_close_timeout=timedelta(seconds=30))
                    for _ in range(batch)
                )
            )

    async def children(self, children: list[Shape]) -> None:
        for child in children:
            await workflow.execute_child_workflow(BareStory.run, child)
