"""The Planning service (fleet.planning.v1), in which each story is a workflow.

Metadata carries what the contract has no field for: `x-request-id` (CreateStory: the same id from
the same caller is the same story), `x-repository`, `x-paths` and `x-steps` (of CreateStory),
`x-reason` (of a rejection), `x-comment` and `x-revision` (of an approval), `x-state`, `x-waiting`,
`x-role`, `x-page-size` and `x-page-token` (of ListStories).
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Annotated

from neo4j import AsyncDriver
from pydantic import Field, StringConstraints
from temporalio.client import (
    Client,
    WorkflowExecution,
    WorkflowExecutionStatus,
    WorkflowQueryFailedError,
    WorkflowUpdateFailedError,
)
from temporalio.common import WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError
from temporalio.service import RPCError

from activities.graph.deliberations import find_plan
from activities.workspace.repositories import require_known
from bridge.executions import require_no_failure, summary
from bridge.grpc.auth import caller
from bridge.grpc.calls import (
    OF_STORY,
    REQUEST_ID,
    Context,
    call_metadata,
    derived_id,
    in_time,
    move_update_id,
    named,
    parse_request,
    seconds_left,
)
from bridge.grpc.wire import planning_pb2 as pb
from bridge.grpc.wire import planning_pb2_grpc
from bridge.story_list import WORD, newest_runs, stories_query
from bridge.story_moves import NOT_BEGUN, Remarks, Story, known, move
from workflows.models.base import Line, Request
from workflows.models.errors import ErrorType, InvalidInput
from workflows.models.ids import Id, story_of, story_workflow_id
from workflows.models.readiness import STORY_TEXT_BYTES, StoryText
from workflows.models.story import Move, StoryInput, StoryView
from workflows.rules.paths import glob_problem
from workflows.search_attributes import (
    DOR_SCORE,
    STORY_STATE,
    TITLE_MEMO,
)
from workflows.story import StoryWorkflow
from workflows.stubs import STORY_QUEUE

ALL_RECORDED = frozenset(
    {
        WorkflowExecutionStatus.COMPLETED,
        WorkflowExecutionStatus.FAILED,
        WorkflowExecutionStatus.CANCELED,
    }
)
"""Statuses of stories that emptied their outbox before they ended: the graph has all of them.

See docs/design/0001-outbox.md.
"""

REMARK_KEYS = {"reason": "x-reason", "comment": "x-comment", "revision": "x-revision"}
"""Field of a move's remarks -> the metadata that has it."""

SCORED_WITHIN_S = 5.0
SCORED_EVERY_S = 0.05
ANSWER_TAKES_S = 0.5
"""How much of its deadline CreateStory leaves for its answer.

It waits up to SCORED_WITHIN_S for the story's first score.
"""

Identifier = Annotated[str, StringConstraints(pattern=WORD)]


class Named(Request):
    """A story, by its id."""

    story_id: Id


class TransitionRequest(Named):
    """A story, and an event of its state machine."""

    event: Line


class Listing(Request):
    """The filters and the page of ListStories."""

    state: Identifier | None = None
    waiting: bool = False
    role: Identifier | None = None
    page_size: int = Field(default=100, ge=1, le=1_000)
    page_token: str = ""


class PlanningServicer(planning_pb2_grpc.PlanningServiceServicer):
    """The service that starts, lists, shows and moves stories.

    `bridge.grpc.roles` lists the roles that each method needs. A call that ends early undoes
    nothing: its request may have been carried out.
    """

    def __init__(
        self,
        temporal: Client,
        driver: AsyncDriver,
        text_bytes: int = STORY_TEXT_BYTES,
        repositories: Collection[str] = (),
    ) -> None:
        """Serve from Temporal.

        Args:
            temporal: The client that starts and follows stories.
            driver: Neo4j's, for the plans of stories that have ended.
            text_bytes: The setting STORY_TEXT_BYTES.
            repositories: The keys of repositories.yaml, which stories may name.
        """
        self._repositories = repositories
        self._text_bytes = text_bytes
        self._temporal = temporal
        self._driver = driver

    async def CreateStory(  # noqa: N802
        self, request: pb.CreateStoryRequest, context: Context
    ) -> pb.CreateStoryResponse:
        """Start a story at rigor L1, and answer when it has its first score, or after 5 s.

        Until it is scored, its state is BACKLOG or the one it has reached, and its score is 0. If
        the caller has used the request id before, the answer is that request's story in its current
        state.

        Metadata: `x-repository` (a key of repositories.yaml), `x-paths` (globs that the story may
        change, with commas between them), `x-steps` (of each agent's work on a task).

        Raises:
            InvalidInput: names each wrong field.
            ApplicationError: `UnknownRepository`.
            WorkflowFailureError: the repository cannot be used, and the story has failed.
        """
        metadata = call_metadata(context)
        story = parse_request(
            StoryInput,
            "CreateStoryRequest",
            {
                "story_id": new_story_id(caller().actor, metadata.get(REQUEST_ID, "")),
                "title": request.title,
                "brief": request.brief,
                "acceptance_criteria": list(request.ac),
                "created_by": caller().actor,
                **repository_fields(metadata),
            },
            {"acceptance_criteria": "ac", **OF_STORY},
        )
        if story.repository:
            require_known(self._repositories, story.repository)
        text = StoryText(
            title=story.title, brief=story.brief, acceptance_criteria=story.acceptance_criteria
        )
        with named("CreateStoryRequest", {"acceptance_criteria": "ac"}):
            text.require_fits("CreateStoryRequest", self._text_bytes)
        async with in_time(context):
            # Already started by the same request: its story is the answer.
            with suppress(WorkflowAlreadyStartedError):
                await self._temporal.start_workflow(
                    StoryWorkflow.run,
                    story,
                    id=story_workflow_id(story.story_id),
                    task_queue=STORY_QUEUE,
                    # A request that is repeated after its story's end does not start it again.
                    id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                    static_summary=summary(story.title),
                    memo={TITLE_MEMO: story.title},
                )
        patience = min(SCORED_WITHIN_S, seconds_left(context) - ANSWER_TAKES_S)
        now = await first_score(
            self._story(story.story_id), patience, may_fail=story.repository is not None
        )
        return pb.CreateStoryResponse(
            story_id=story.story_id,
            state=(now.state if now else "") or NOT_BEGUN,
            dor_score=now.dor_score if now else 0,
        )

    async def ListStories(  # noqa: N802
        self, _: pb.ListStoriesRequest, context: Context
    ) -> pb.ListStoriesResponse:
        """List stories from visibility, ended ones included: running ones first, the newest first.

        A story whose id was used again is listed once, with its newest run, so a page may be
        shorter than asked for.

        Metadata: `x-state`, `x-waiting` (true: only stories that wait for a person), `x-role` (only
        those that wait for this role), `x-page-size` (100), `x-page-token`. The answer's trailing
        `x-next-page-token` is the token of the next page. `brief` is empty here; GetStory returns
        it.

        Raises:
            InvalidInput: names each wrong key.
        """
        parsed = listing(call_metadata(context))
        query = stories_query(waiting=parsed.waiting, role=parsed.role, state=parsed.state)
        pages = self._temporal.list_workflows(
            query,
            page_size=parsed.page_size,
            next_page_token=page_read(parsed.page_token, query),
        )
        async with in_time(context):
            await pages.fetch_next_page()
            runs = await newest_runs(self._temporal, pages.current_page or [])
            stories = [await row(execution) for execution in runs]
        if pages.next_page_token:
            token = page_token(pages.next_page_token, query)
            context.set_trailing_metadata((("x-next-page-token", token),))
        return pb.ListStoriesResponse(stories=stories)

    async def GetStory(  # noqa: N802
        self, request: pb.GetStoryRequest, context: Context
    ) -> pb.GetStoryResponse:
        """Return a story with its current text, and in plan_json its state and its next moves.

        Raises:
            ApplicationError: `NotFound`, `StoryUnreadable`; `InvalidInput`: no id.
            WorkflowFailureError: the story could not begin.
        """
        parsed = parse_request(Named, "GetStoryRequest", {"story_id": request.story_id})
        story = self._story(parsed.story_id)
        async with in_time(context), known(parsed.story_id):
            # The state comes first, so that text and moves are never older than it.
            now = await story.query(StoryWorkflow.state)
            if not now.state:
                await require_no_failure(story)
            text, moves = await asyncio.gather(
                story.query(StoryWorkflow.text), story.query(StoryWorkflow.transitions)
            )
        return pb.GetStoryResponse(
            story=pb.Story(
                story_id=now.story_id,
                title=text.title,
                state=now.state or NOT_BEGUN,
                dor_score=now.dor_score,
                brief=text.brief,
            ),
            ac=text.acceptance_criteria,
            plan_json=next_json(now, moves),
        )

    async def Transition(  # noqa: N802
        self, request: pb.TransitionRequest, context: Context
    ) -> pb.TransitionResponse:
        """Open a gate or make a rejection, as the token's actor and in one of its roles.

        The request's `actor` is ignored. If a guard blocks the move, the answer names the guard and
        the reason, and the state is unchanged.

        Raises:
            ApplicationError: `NotFound`; `IllegalMove`: the event does not leave this state, or is
                taken by the fleet itself, and the message names the moves that are legal;
                `Permission`: the token has no role for it; any refusal of the story itself.
        """
        parsed = parse_request(
            TransitionRequest,
            "TransitionRequest",
            {"story_id": request.story_id, "event": request.event},
        )
        async with in_time(context), known(parsed.story_id):
            try:
                with named("TransitionRequest", REMARK_KEYS):
                    after = await move(
                        self._temporal,
                        parsed.story_id,
                        lambda now: now.by_event(parsed.event),
                        caller(),
                        remarks(call_metadata(context)),
                        move_update_id(context),
                    )
            except WorkflowUpdateFailedError as error:
                cause = error.cause
                if not (
                    isinstance(cause, ApplicationError) and cause.type == ErrorType.GUARD_BLOCKED
                ):
                    raise
                now = await self._story(parsed.story_id).query(StoryWorkflow.state)
                return blocked(now, cause.message)
        if role := after.open_gates.get(parsed.event):
            return blocked(after, f"{parsed.event}: waits for {role} too")
        return pb.TransitionResponse(story_id=after.story_id, state=after.state)

    async def GetPlan(  # noqa: N802
        self, request: pb.GetPlanRequest, context: Context
    ) -> pb.GetPlanResponse:
        """Return the story's plan as JSON (plan_id, story_id, version, tasks); `{}` without a plan.

        The plan of a story that has ended is read from the graph, because its workflow would have
        to be replayed.

        Raises:
            ApplicationError: as GetStory.
        """
        parsed = parse_request(Named, "GetPlanRequest", {"story_id": request.story_id})
        story = self._story(parsed.story_id)
        async with in_time(context), known(parsed.story_id):
            described = await story.describe()
            plan = None
            if described.status in ALL_RECORDED:
                plan = await find_plan(self._driver, parsed.story_id)
            plan = plan or await story.query(StoryWorkflow.plan)
        return pb.GetPlanResponse(json=plan.model_dump_json() if plan else "{}")

    def _story(self, story_id: str) -> Story:
        return self._temporal.get_workflow_handle_for(
            StoryWorkflow.run, story_workflow_id(story_id)
        )


# --- stories --------------------------------------------------------------------------------------


def new_story_id(actor: str, request_id: str) -> str:
    """Derive a story id from the actor and the request id; without a request id, make a new one."""
    return f"US-{derived_id(actor, request_id) if request_id else secrets.token_hex(8)}"


def repository_fields(metadata: Mapping[str, str]) -> dict[str, str | list[str]]:
    """Return the fields of a story that say in which repository it works, and how.

    Raises:
        InvalidInput: a glob in `x-paths` is not valid.
    """
    fields: dict[str, str | list[str]] = {
        field: metadata[key] for field, key in OF_STORY.items() if metadata.get(key)
    }
    if "paths" in fields:
        globs = [each.strip() for each in metadata[OF_STORY["paths"]].split(",")]
        problems = {each: glob_problem(each) if each else "is empty" for each in globs}
        found = [f"{each!r}: {problem}" for each, problem in problems.items() if problem]
        if found:
            raise InvalidInput("CreateStoryRequest", [("x-paths", "; ".join(found))])
        fields["paths"] = globs
    return fields


async def first_score(story: Story, within_s: float, *, may_fail: bool = False) -> StoryView | None:
    """Return the story when it is scored or waits at a gate, or its last state after `within_s`.

    Args:
        story: The story, which was started.
        within_s: How long to wait, in seconds.
        may_fail: Whether its start may fail, as that of a story in a repository.

    Returns:
        The story; None if no worker has answered by then.

    Raises:
        WorkflowFailureError: why the story has failed.
    """
    now = None
    try:
        async with asyncio.timeout(max(within_s, 0)):
            while now is None or not (now.dor_score or now.findings or now.pending_gate):
                now = await story.query(StoryWorkflow.state)
                if may_fail and not now.state:
                    await require_no_failure(story)
                await asyncio.sleep(SCORED_EVERY_S)
    except (TimeoutError, RPCError, WorkflowQueryFailedError):
        return now  # The story is started, as requested.
    return now


def next_json(now: StoryView, moves: list[Move]) -> str:
    """Encode the story's state and its next moves as JSON."""
    return json.dumps(
        {
            "state": now.state or NOT_BEGUN,
            "pending_gate": now.pending_gate,
            "gate_role": now.gate_role,
            "revision": now.revision,
            "working_on": now.working_on,
            "plan_id": now.plan_id,
            "next": [move.model_dump() for move in moves],
        }
    )


# --- moves ----------------------------------------------------------------------------------------


def remarks(metadata: Mapping[str, str]) -> Remarks:
    """Return what a call's metadata says about a move; every rejection has a reason."""
    silence = f"{caller().actor} sent it back over gRPC and gave no reason"
    return Remarks(
        reason=metadata.get("x-reason", "").strip() or silence,
        comment=metadata.get("x-comment", ""),
        revision=metadata.get("x-revision"),
    )


def blocked(now: StoryView, reason: str) -> pb.TransitionResponse:
    """Build the answer for a move that a guard blocks: the state is unchanged."""
    return pb.TransitionResponse(
        story_id=now.story_id, state=now.state, blocked=True, reason=reason
    )


# --- lists ----------------------------------------------------------------------------------------


def listing(metadata: Mapping[str, str]) -> Listing:
    """Parse the metadata of ListStories.

    Raises:
        InvalidInput: names each wrong key.
    """
    keys = {field: f"x-{field.replace('_', '-')}" for field in Listing.model_fields}
    fields = {field: metadata[key] for field, key in keys.items() if key in metadata}
    return parse_request(Listing, "ListStories", fields, keys)


def page_token(token: bytes, query: str) -> str:
    """Build our page token from Temporal's and a checksum of it and the query.

    The checksum is needed because Temporal fails on an invalid token.
    """
    encoded = base64.urlsafe_b64encode(token).decode()
    return f"{derived_id(query, encoded)}.{encoded}"


def page_read(token: str, query: str) -> bytes | None:
    """Return Temporal's page token from ours.

    Returns:
        The token; None if ours is empty.

    Raises:
        InvalidInput: the token does not belong to a page of this query.
    """
    _, _, encoded = token.partition(".")
    if not token:
        return None
    with suppress(ValueError):  # not base64
        read = base64.urlsafe_b64decode(encoded)
        if page_token(read, query) == token:
            return read
    rule = "is not a page of this list; take it from x-next-page-token, with the same filters"
    raise InvalidInput("ListStories", [("x-page-token", rule)])


async def row(execution: WorkflowExecution) -> pb.Story:
    """Build a story from its visibility record.

    A story that began before titles were stored there has an empty title.
    """
    found = execution.typed_search_attributes
    return pb.Story(
        story_id=story_of(execution.id),
        title=await execution.memo_value(TITLE_MEMO, default="", type_hint=str),
        state=found.get(STORY_STATE) or NOT_BEGUN,
        dor_score=found.get(DOR_SCORE) or 0,
    )
