"""The Story coach (fleet.storycoach.v1): scores stories, and has an agent write better ones.

Only CoachWorkflow calls an LLM, on the `agents` queue; this service waits for it through Temporal.
Metadata `x-request-id`: a request with the same id from the same caller is carried out once, and
its answer is kept. Trailing metadata `x-reason`: why RefineStory returned the original, if it did.
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

from bridge.executions import summary
from bridge.grpc.auth import caller
from bridge.grpc.calls import (
    REQUEST_ID,
    Context,
    call_metadata,
    derived_id,
    in_time,
    parse_request,
    seconds_left,
)
from bridge.grpc.limits import Limits
from bridge.grpc.wire import storycoach_pb2 as pb
from bridge.grpc.wire import storycoach_pb2_grpc
from workflows.coach import CoachWorkflow
from workflows.models.base import Line, Request
from workflows.models.coach import CoachInput, CoachResult
from workflows.models.errors import InvalidInput
from workflows.models.ids import coach_workflow_id
from workflows.models.readiness import StoryText
from workflows.rules.readiness import score_story
from workflows.stubs import STORY_QUEUE

WRITTEN_WITHIN_S = 600.0
"""How long a call without a deadline may take.

An engine that is restarted is available again by then.
"""

OUTLIVES_S = 5.0
"""How long the workflow may run after its call's deadline if no one is left to cancel it."""

CANCELLED_WITHIN_S = 5.0


class Refine(Request):
    """The input of RefineStory: some part of a story, however rough."""

    title: str = Field(default="", max_length=1_000)
    description: str = Field(default="", max_length=100_000)
    ac: list[Line] = Field(default=[], max_length=100)


class Suggest(Request):
    """The input of SuggestStory."""

    goal: Line


class StoryCoachServicer(storycoach_pb2_grpc.StoryCoachServiceServicer):
    """The Story coach service."""

    def __init__(self, temporal: Client, limits: Limits = Limits()) -> None:  # noqa: B008 - frozen
        self._temporal = temporal
        self._limits = limits
        self._ending: set[asyncio.Task[None]] = set()

    async def ScoreStory(  # noqa: N802
        self, request: pb.ScoreStoryRequest, _: Context
    ) -> pb.ScoreStoryResponse:
        """Score any text by the Definition of Ready, as a story in DRAFT is scored."""
        readiness = score_story(text_of(request))
        return pb.ScoreStoryResponse(
            total=readiness.total,
            findings=[pb.Finding(**finding.model_dump()) for finding in readiness.findings],
        )

    async def RefineStory(  # noqa: N802
        self, request: pb.RefineStoryRequest, context: Context
    ) -> pb.RefineStoryResponse:
        """Improve the story; if the result would score lower, return the original.

        Raises:
            InvalidInput: names each wrong field.
            ApplicationError: `QuotaUsed`.
            WorkflowFailureError: the agent gave no answer, with the reason.
        """
        fields = {"title": request.title, "description": request.description, "ac": [*request.ac]}
        parse_request(Refine, "RefineStoryRequest", fields)
        if not any(text.strip() for text in (request.title, request.description, *request.ac)):
            rule = "give a title, a description or acceptance criteria"
            raise InvalidInput("RefineStoryRequest", [("title", rule)])
        result = await self._coached(
            CoachInput(story=text_of(request), actor=caller().actor), context
        )
        if result.reason:
            context.set_trailing_metadata((("x-reason", result.reason),))
        return pb.RefineStoryResponse(
            title=result.story.title,
            description=result.story.brief,
            ac=result.story.acceptance_criteria,
        )

    async def SuggestStory(  # noqa: N802
        self, request: pb.SuggestStoryRequest, context: Context
    ) -> pb.SuggestStoryResponse:
        """Write a story for a goal; if ScoreStory has findings, write it once more.

        Raises:
            InvalidInput: names each wrong field.
            ApplicationError, WorkflowFailureError: as RefineStory.
        """
        parsed = parse_request(Suggest, "SuggestStoryRequest", {"goal": request.goal})
        result = await self._coached(CoachInput(goal=parsed.goal, actor=caller().actor), context)
        return pb.SuggestStoryResponse(
            title=result.story.title,
            description=result.story.brief,
            ac=result.story.acceptance_criteria,
        )

    async def _coached(self, coach_input: CoachInput, context: Context) -> CoachResult:
        """Run the workflow to its end, at the latest until the call's deadline.

        A workflow without a request id belongs to this call alone, and ends with it. With a request
        id, a repeated call may wait for it, so it continues until its own deadline.
        """
        request_id = call_metadata(context).get(REQUEST_ID, "")
        within_s = seconds_left(context, WRITTEN_WITHIN_S)
        workflow_id = coach_workflow_id(coaching_id(request_id, coach_input))
        async with in_time(context, WRITTEN_WITHIN_S):
            await self._limits.require_tokens(self._temporal, caller().actor, workflow_id)
            try:
                handle = await self._start(coach_input, workflow_id, within_s)
                return await handle.result()
            except asyncio.CancelledError:
                if not request_id:
                    self._end(workflow_id)
                raise

    async def _start(
        self, coach_input: CoachInput, workflow_id: str, within_s: float
    ) -> WorkflowHandle[CoachWorkflow, CoachResult]:
        title = coach_input.story.title if coach_input.story else coach_input.goal
        with suppress(WorkflowAlreadyStartedError):  # it already has an answer
            return await self._temporal.start_workflow(
                CoachWorkflow.run,
                coach_input,
                id=workflow_id,
                task_queue=STORY_QUEUE,
                execution_timeout=timedelta(seconds=within_s + OUTLIVES_S),
                id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE_FAILED_ONLY,
                id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
                static_summary=summary(title),
            )
        return self._temporal.get_workflow_handle_for(CoachWorkflow.run, workflow_id)

    def _end(self, workflow_id: str) -> None:
        """Cancel in a separate task: the call's own has ended, and may be cancelled again."""
        ending = asyncio.create_task(self._cancel(workflow_id))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def _cancel(self, workflow_id: str) -> None:
        """Stop the generation in the engine; if Temporal is unavailable, the time-out stops it."""
        with suppress(RPCError, TimeoutError):
            async with asyncio.timeout(CANCELLED_WITHIN_S):
                await self._temporal.get_workflow_handle(workflow_id).cancel(
                    reason=f"the call of {caller().actor} has ended"
                )


def coaching_id(request_id: str, coach_input: CoachInput) -> str:
    """Return an id for the request.

    It is derived from the caller, the request id and the request. Without a request id, it is new.
    """
    if not request_id:
        return secrets.token_hex(8)
    return derived_id(caller().actor, request_id, coach_input.model_dump_json())


def text_of(request: pb.ScoreStoryRequest | pb.RefineStoryRequest) -> StoryText:
    """Convert the message to a story's text."""
    return StoryText(
        title=request.title, brief=request.description, acceptance_criteria=list(request.ac)
    )
