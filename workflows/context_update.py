"""ContextUpdateWorkflow: stores an update of a story's context and then publishes it.

It is a workflow so that the event is never lost: `context.updated` goes through the outbox after
the commit, however long NATS is unavailable. The requester waits only for the commit.

A story's versions are assigned in one place, the graph, under the story's lock, and are published
in order: each update waits for the previous one. A running story publishes for its updates, and
sends its own changes through an update as well.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError, FailureError

from workflows.models.errors import ErrorType, application_error
from workflows.models.outbox import OutboxState
from workflows.outbox import Outbox
from workflows.story import StoryWorkflow
from workflows.stubs import STORE, GraphStub

with workflow.unsafe.imports_passed_through():
    from workflows.models.context import (
        ContextAnswer,
        ContextUpdate,
        ContextWrite,
        DecisionsAdded,
        MilestonesAdded,
        request_hash,
    )
    from workflows.models.events import ContextUpdated, StoryTransitioned
    from workflows.models.ids import WORKFLOW_ID_CHARACTERS, story_workflow_id
    from workflows.timestamps import timestamp

__all__ = ["REUSED", "ContextUpdateWorkflow", "request_hash"]

ASK_AGAIN_AFTER = timedelta(minutes=1)
"""How often an update checks that the previous one still exists: it may have been terminated."""

REUSED = "another update was sent with this x-request-id; send this one with its own"


@workflow.defn
class ContextUpdateWorkflow:
    """One update: stored once, sent to the story if it is running, and published."""

    @workflow.init
    def __init__(self, input: ContextUpdate) -> None:
        self.input = input
        self.outbox = Outbox(OutboxState(), input.story_id)
        self.answer: ContextAnswer | None = None
        self.refusal: ApplicationError | None = None
        self.followers: list[str] = []
        self.preceded = False

    @workflow.run
    async def run(self, input: ContextUpdate) -> ContextAnswer:
        """Store, notify the story, publish.

        A cancellation is ignored: the update may already be in the graph and has to be published.

        Raises:
            ApplicationError: as GraphStub.update_context.
        """
        work = asyncio.create_task(self.carry_out())
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            return await work

    @workflow.update
    async def stored(self, request: str) -> ContextAnswer:
        """Wait for the commit and return what was stored.

        Args:
            request: `request_hash` of the input.

        Raises:
            ApplicationError: `RequestReused` if this workflow handles another request; otherwise as
                `run`.
        """
        if request != request_hash(self.input):
            raise application_error(ErrorType.REQUEST_REUSED, REUSED)
        await workflow.wait_condition(lambda: bool(self.answer or self.refusal))
        if self.answer is None:
            assert self.refusal
            raise self.refusal
        return self.answer

    @workflow.signal
    def follow(self, workflow_id: str) -> None:
        """Register the update with the next version, which waits until this one is published.

        No workflow has an id that Temporal refuses: this workflow could not signal it, and not end.
        """
        if 0 < len(workflow_id) <= WORKFLOW_ID_CHARACTERS:
            self.followers.append(workflow_id)
        else:
            workflow.logger.warning(f"follow: {workflow_id[:60]!r} is not the id of a workflow")

    @workflow.signal
    def precede(self) -> None:
        """Receive the notice that the update with the previous version is published."""
        self.preceded = True

    # --- the steps, in order --------------------------------------------------------------------

    async def carry_out(self) -> ContextAnswer:
        self.outbox.start()
        answer = await self.store()
        if self.input.if_absent and not answer.changed:
            await workflow.wait_condition(workflow.all_handlers_finished)
            return answer
        if workflow.patched("context-versions-in-order"):
            if await self.notify_story(answer):
                self.outbox.publish_via = story_workflow_id(self.input.story_id)
            self.outbox.held = True
            self.announce(answer)
            await self.wait_for(answer.after)
            self.outbox.held = False
        else:
            self.announce(answer)
            await self.notify_story(answer)
        await self.outbox.drained()
        while self.followers:
            await self.release(self.followers.pop(0))
        await workflow.wait_condition(workflow.all_handlers_finished)
        return answer

    def announce(self, answer: ContextAnswer) -> None:
        move = self.input.phase_change
        if move and answer.changed:
            self.outbox.append(StoryTransitioned(actor=self.input.actor, **move.model_dump()))
        self.outbox.append(ContextUpdated(version=answer.version, changed=list(answer.changed)))

    async def wait_for(self, predecessor: str) -> None:
        """Wait until the previous version is published, or its update has ended."""
        if not predecessor:
            return
        handle = workflow.get_external_workflow_handle(predecessor)
        while not self.preceded:
            try:
                await handle.signal(ContextUpdateWorkflow.follow, workflow.info().workflow_id)
            except FailureError:
                return  # It has ended and has published its events.
            with suppress(TimeoutError):
                await workflow.wait_condition(lambda: self.preceded, timeout=ASK_AGAIN_AFTER)

    async def release(self, follower: str) -> None:
        handle = workflow.get_external_workflow_handle(follower)
        try:
            await handle.signal(ContextUpdateWorkflow.precede)
        except FailureError:
            return  # It asks again each minute, and does not wait for this one.

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
                else application_error(ErrorType.CANCELLED, f"given up: {cause or error}")
            )
            await workflow.wait_condition(workflow.all_handlers_finished)
            raise
        return self.answer

    async def notify_story(self, answer: ContextAnswer) -> bool:
        """Notify a running story: its agents get the update in their next wave, deletions included.

        Returns:
            Whether the story is running.
        """
        story = workflow.get_external_workflow_handle(story_workflow_id(self.input.story_id))
        try:
            await story.signal(StoryWorkflow.context_updated, answer.version)
            if not workflow.patched("news-in-lists"):
                for decision in answer.decisions:
                    await story.signal(StoryWorkflow.add_decision, decision)
                for milestone in answer.milestones:
                    await story.signal(StoryWorkflow.add_milestone, milestone)
                return True
            if answer.decisions:
                await story.signal(
                    StoryWorkflow.add_decisions, DecisionsAdded(decisions=answer.decisions)
                )
            if answer.milestones:
                await story.signal(
                    StoryWorkflow.add_milestones, MilestonesAdded(milestones=answer.milestones)
                )
        except FailureError:
            return False  # It is not running: the one that continues it reads them from the graph.
        return True
