"""ContextUpdateWorkflow: an update of a story's context from outside, stored and then announced.

It is a workflow so that the announcement is never lost: `context.updated` goes through the outbox,
after the commit, however long NATS is away. Who asked waits for the commit alone.
"""

from __future__ import annotations

import asyncio

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError, FailureError

from workflows.outbox import Outbox
from workflows.outbox_state import OutboxState
from workflows.story import StoryWorkflow
from workflows.stubs import STORE, GraphStub

with workflow.unsafe.imports_passed_through():
    from workflows.clock import timestamp
    from workflows.events import ContextUpdated
    from workflows.models import (
        REQUEST_REUSED,
        ContextAnswer,
        ContextUpdate,
        ContextWrite,
        content_hash,
        story_workflow_id,
    )

GIVEN_UP = "Cancelled"
REUSED = "another update was sent with this x-request-id; send this one with its own"


@workflow.defn
class ContextUpdateWorkflow:
    """One update; it is stored once, told to the story that runs, and announced."""

    @workflow.init
    def __init__(self, input: ContextUpdate) -> None:
        self.input = input
        self.outbox = Outbox(OutboxState())
        self.answer: ContextAnswer | None = None
        self.refusal: ApplicationError | None = None

    @workflow.run
    async def run(self, input: ContextUpdate) -> ContextAnswer:
        """Store, tell, announce. Raises ApplicationError as GraphStub.update_context.

        A cancellation is not obeyed: what may be in the graph already is announced.
        """
        work = asyncio.create_task(self.carry_out())
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            return await work

    @workflow.update
    async def stored(self, request: str) -> ContextAnswer:
        """Wait for the commit; answer with what was stored. request: `request_hash` of the input.

        Raises:
            ApplicationError: `RequestReused`: this one carries out another request; or as `run`.
        """
        if request != request_hash(self.input):
            raise ApplicationError(REUSED, type=REQUEST_REUSED, non_retryable=True)
        await workflow.wait_condition(lambda: bool(self.answer or self.refusal))
        if self.answer is None:
            assert self.refusal
            raise self.refusal
        return self.answer

    # --- the steps, in order --------------------------------------------------------------------

    async def carry_out(self) -> ContextAnswer:
        self.outbox.start()
        answer = await self.store()
        self.outbox.append(
            ContextUpdated(
                story_id=self.input.story_id,
                version=answer.version,
                changed=list(answer.changed),
                timestamp=timestamp(),
            )
        )
        await self.tell_story(answer)
        await self.outbox.drained()
        await workflow.wait_condition(workflow.all_handlers_finished)
        return answer

    async def store(self) -> ContextAnswer:
        write = ContextWrite(
            update_id=workflow.info().workflow_id,
            at=self.input.timestamp or timestamp(),
            started_ms=int(workflow.info().start_time.timestamp() * 1000),
            update=self.input,
        )
        try:
            self.answer = await workflow.execute_activity_method(
                GraphStub.update_context,
                write,
                **(STORE | {"summary": f"store {len(self.input.changes)} changes"}),
            )
        except ActivityError as error:
            cause = error.cause
            self.refusal = (
                cause
                if isinstance(cause, ApplicationError)
                else ApplicationError(
                    f"given up: {cause or error}", type=GIVEN_UP, non_retryable=True
                )
            )
            await workflow.wait_condition(workflow.all_handlers_finished)
            raise
        return self.answer

    async def tell_story(self, answer: ContextAnswer) -> None:
        """Agents of a story that runs hear of what is new at their next wave.

        What it has been told stays said, though it be changed or deleted later: the next council
        reads the graph.
        """
        story = workflow.get_external_workflow_handle_for(
            StoryWorkflow.run, story_workflow_id(self.input.story_id)
        )
        try:
            await story.signal(StoryWorkflow.context_updated, answer.version)
            for decision in answer.decisions:
                await story.signal(StoryWorkflow.add_decision, decision)
            for milestone in answer.milestones:
                await story.signal(StoryWorkflow.add_milestone, milestone)
        except FailureError:
            return  # It does not run: whoever takes it up reads them in the graph.


def request_hash(update: ContextUpdate) -> str:
    """Tells a request that comes again from another one."""
    return content_hash(update.model_dump())
