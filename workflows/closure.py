"""StoryClosureWorkflow: publishes what a workflow left unpublished when it ended early."""

from __future__ import annotations

from temporalio import workflow

from workflows.outbox import Outbox

with workflow.unsafe.imports_passed_through():
    from workflows.models.ids import story_workflow_id
    from workflows.models.outbox import StoryClosure


@workflow.defn
class StoryClosureWorkflow:
    """The remaining outbox of a run that ended early.

    The run was terminated, timed out or failed, or was cancelled while an entry was stuck. Its
    remaining entries are published first; then the open gates close, a plan or a deliberation that
    had not ended does, and so does the story.
    """

    @workflow.init
    def __init__(self, input: StoryClosure) -> None:
        self.outbox = Outbox(
            input.outbox, input.story_id, owner=input.owner or story_workflow_id(input.story_id)
        )

    @workflow.run
    async def run(self, input: StoryClosure) -> None:
        self.outbox.start()
        for gate in [input.gate] if input.gate else input.gates:
            self.outbox.append(gate)
        for end in input.plan:
            self.outbox.append(end)
        if input.deliberation:
            self.outbox.append(input.deliberation)
        if input.cancelled:
            self.outbox.append(input.cancelled)
        await workflow.wait_condition(lambda: self.outbox.empty)
