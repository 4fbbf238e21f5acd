"""The Story coach (fleet.storycoach.v1): scores stories, and has an agent write better ones.

An LLM is asked by CoachWorkflow alone, on the `agents` queue: nothing here waits for an engine but
through Temporal. Metadata `x-request-id`: the same id from the same caller is asked once, and its
answer is kept; trailing metadata `x-reason`: why RefineStory's original comes back, where it does.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from datetime import timedelta

from pydantic import Field
from temporalio.client import Client, WorkflowHandle
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError

from bridge.grpc.access import caller
from bridge.grpc.calls import (
    REQUEST_ID,
    Context,
    derived_id,
    in_time,
    said,
    seconds_left,
    summary,
    understood,
)
from bridge.grpc.wire import storycoach_pb2 as wire
from bridge.grpc.wire import storycoach_pb2_grpc
from workflows.coach import CoachWorkflow
from workflows.models import (
    CoachInput,
    CoachResult,
    InvalidInput,
    Line,
    Request,
    StoryText,
    coach_workflow_id,
)
from workflows.readiness import score_story
from workflows.stubs import STORY_QUEUE

WRITTEN_WITHIN_S = 600.0
"""Of a call without a deadline: an engine that is started anew is back by then."""

OUTLIVES_S = 5.0
"""How long the workflow may go on after its call's deadline, where nobody is left to cancel it."""

CANCELLED_WITHIN_S = 5.0


class Refine(Request):
    """What RefineStory is given: something of a story, however rough."""

    title: str = Field(default="", max_length=1_000)
    description: str = Field(default="", max_length=100_000)
    ac: list[Line] = Field(default=[], max_length=100)


class Suggest(Request):
    """What SuggestStory is given."""

    goal: Line


class StoryCoachServicer(storycoach_pb2_grpc.StoryCoachServiceServicer):
    """Any valid token may ask."""

    def __init__(self, temporal: Client) -> None:
        self._temporal = temporal
        self._ending: set[asyncio.Task[None]] = set()

    async def ScoreStory(  # noqa: N802
        self, request: wire.ScoreStoryRequest, _: Context
    ) -> wire.ScoreStoryResponse:
        """The Definition of Ready of any text, by the function that scores a story in DRAFT."""
        readiness = score_story(text_of(request))
        return wire.ScoreStoryResponse(
            total=readiness.total,
            findings=[wire.Finding(**finding.model_dump()) for finding in readiness.findings],
        )

    async def RefineStory(  # noqa: N802
        self, request: wire.RefineStoryRequest, context: Context
    ) -> wire.RefineStoryResponse:
        """The story written better: it never scores lower, or the original comes back.

        Raises:
            InvalidInput: names each wrong field.
            WorkflowFailureError: the agent gave no answer, and why.
        """
        fields = {"title": request.title, "description": request.description, "ac": [*request.ac]}
        understood(Refine, "RefineStoryRequest", fields)
        if not any(text.strip() for text in (request.title, request.description, *request.ac)):
            rule = "give a title, a description or acceptance criteria"
            raise InvalidInput("RefineStoryRequest", [("title", rule)])
        result = await self._coached(CoachInput(story=text_of(request)), context)
        if result.reason:
            context.set_trailing_metadata((("x-reason", result.reason),))
        return wire.RefineStoryResponse(
            title=result.story.title,
            description=result.story.brief,
            ac=result.story.acceptance_criteria,
        )

    async def SuggestStory(  # noqa: N802
        self, request: wire.SuggestStoryRequest, context: Context
    ) -> wire.SuggestStoryResponse:
        """A story for a goal; where ScoreStory finds fault with it, it is written once more.

        Raises:
            As RefineStory.
        """
        asked = understood(Suggest, "SuggestStoryRequest", {"goal": request.goal})
        result = await self._coached(CoachInput(goal=asked.goal), context)
        return wire.SuggestStoryResponse(
            title=result.story.title,
            description=result.story.brief,
            ac=result.story.acceptance_criteria,
        )

    async def _coached(self, asked: CoachInput, context: Context) -> CoachResult:
        """Run the workflow to its end, which is the call's deadline at the latest.

        A workflow without a request id is this call's alone, and ends with it. One with a request
        id may be waited for by a repeated call: it goes on to its own deadline.
        """
        request_id = said(context).get(REQUEST_ID, "")
        within_s = seconds_left(context, WRITTEN_WITHIN_S)
        workflow_id = coach_workflow_id(coaching_id(request_id, asked))
        async with in_time(context, WRITTEN_WITHIN_S):
            try:
                handle = await self._start(asked, workflow_id, within_s)
                return await handle.result()
            except asyncio.CancelledError:
                if not request_id:
                    self._end(workflow_id)
                raise

    async def _start(
        self, asked: CoachInput, workflow_id: str, within_s: float
    ) -> WorkflowHandle[CoachWorkflow, CoachResult]:
        title = asked.story.title if asked.story else asked.goal
        with suppress(WorkflowAlreadyStartedError):  # it has an answer already
            return await self._temporal.start_workflow(
                CoachWorkflow.run,
                asked,
                id=workflow_id,
                task_queue=STORY_QUEUE,
                execution_timeout=timedelta(seconds=within_s + OUTLIVES_S),
                id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE_FAILED_ONLY,
                id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
                static_summary=summary(title),
            )
        return self._temporal.get_workflow_handle_for(CoachWorkflow.run, workflow_id)

    def _end(self, workflow_id: str) -> None:
        """Cancel in a task of its own: the call's has ended, and may be cancelled once more."""
        ending = asyncio.create_task(self._cancel(workflow_id))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def _cancel(self, workflow_id: str) -> None:
        """Stop the generation in the engine; where Temporal is away, the time-out stops it."""
        with suppress(RPCError, TimeoutError):
            async with asyncio.timeout(CANCELLED_WITHIN_S):
                await self._temporal.get_workflow_handle(workflow_id).cancel(
                    reason=f"the call of {caller().actor} has ended"
                )


def coaching_id(request_id: str, asked: CoachInput) -> str:
    """Of the caller, the request id and what is asked, where there is one; else nobody's."""
    if not request_id:
        return secrets.token_hex(8)
    return derived_id(caller().actor, request_id, asked.model_dump_json())


def text_of(request: wire.ScoreStoryRequest | wire.RefineStoryRequest) -> StoryText:
    """The story's text as the workflows know it."""
    return StoryText(
        title=request.title, brief=request.description, acceptance_criteria=list(request.ac)
    )
