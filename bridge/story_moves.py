"""Moves of running stories that are made from outside.

The story's workflow knows the state machine: its query `transitions` names the legal moves, with
the roles that may make each, and its updates `approve` and `reject` make them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import NamedTuple, Protocol, TypeVar

from temporalio.client import Client, WorkflowHandle, WorkflowQueryFailedError
from temporalio.service import RPCError, RPCStatusCode

from workflows.models.base import Request
from workflows.models.errors import ErrorType, application_error
from workflows.models.ids import story_workflow_id
from workflows.models.story import Approve, Move, Reject, StoryResult, StoryView
from workflows.story import StoryWorkflow

NOT_BEGUN = "BACKLOG"
"""The state of a story that no worker has started yet."""

Story = WorkflowHandle[StoryWorkflow, StoryResult]
RequestT = TypeVar("RequestT", bound=Request)


class Mover(Protocol):
    """The person or program that makes a move."""

    @property
    def actor(self) -> str:
        """The name that the move is recorded under."""

    def require_role(self, *roles: str) -> str:
        """Return the first of these roles that the mover has.

        Raises:
            ApplicationError: `Permission`: the mover has none of them.
        """

    def signed(self, workflow_id: str, request: RequestT) -> RequestT:
        """Return the request to that workflow with a proof of who sends it."""


class Remarks(NamedTuple):
    """What a mover says about a move.

    reason: of a rejection; comment and revision: of an approval.
    """

    reason: str = ""
    comment: str = ""
    revision: str | None = None


class Position(NamedTuple):
    """A story's state and the moves that leave it."""

    view: StoryView
    moves: list[Move]

    def by_event(self, event: str) -> Move:
        """Return the move with the event's name.

        Raises:
            ApplicationError: `IllegalMove`: the event does not leave this state, or the fleet takes
                it itself; names the moves that are legal.
        """
        found = next((move for move in self.moves if move.event == event), None)
        by_hand = ", ".join(m.event for m in self.moves if m.kind != "automatic") or "none"
        legal = f"{self._state}; legal now: {by_hand}"
        if found is None:
            raise application_error(
                ErrorType.ILLEGAL_MOVE, f"event: {event[:100]!r} is not legal now; {legal}"
            )
        if found.kind == "automatic":
            waits = "; ".join(found.blocked_by) or "nothing"
            raise application_error(
                ErrorType.ILLEGAL_MOVE,
                f"event: {event!r} is the fleet's own to take, as soon as its guards hold; "
                f"it waits for {waits}; {legal}",
            )
        return found

    def between(self, source: str, target: str, roles: Collection[str]) -> Move:
        """Return the move from one state to another.

        If there are several, one that the roles may make is preferred.

        Raises:
            ApplicationError: `IllegalMove` names the moves that are legal.
        """
        leading = [move for move in self.moves if source == self.view.state and move.to == target]
        if not leading:
            legal = ", ".join(f"{move.event} to {move.to}" for move in self.moves) or "none"
            raise application_error(
                ErrorType.ILLEGAL_MOVE,
                f"no move leads from {source} to {target}; {self._state}; legal now: {legal}",
            )
        best = min(
            leading,
            key=lambda move: (move.kind == "automatic", not set(move.roles).intersection(roles)),
        )
        return self.by_event(best.event)

    def roles(self, move: Move) -> list[str]:
        """Return the roles that may make the move.

        For a gate of several roles, the role whose turn it is comes first.
        """
        turn = self.view.open_gates.get(move.event)
        return [turn, *move.roles] if turn else move.roles

    @property
    def _state(self) -> str:
        return f"the story is in {self.view.state or NOT_BEGUN}"


async def move(
    temporal: Client,
    story_id: str,
    choose: Callable[[Position], Move | None],
    mover: Mover,
    remarks: Remarks,
    update_id: str | None = None,
) -> StoryView:
    """Make a move of a running story and return the story's new state.

    Args:
        temporal: The client.
        story_id: The story.
        choose: Returns the move for the story's position; None to make none.
        mover: Who makes the move; has to have one of its roles.
        remarks: What is recorded with it.
        update_id: Makes a repeated request one move: it gets the first one's answer.

    Raises:
        ApplicationError: `NotFound`; `StoryUnreadable`; `IllegalMove`; `Permission`; as `choose`.
        InvalidInput: The remarks break a rule.
        WorkflowUpdateFailedError: The story refuses, with the reason.
    """
    story: Story = temporal.get_workflow_handle(story_workflow_id(story_id))
    async with known(story_id):
        if update_id and (earlier := await _outcome(story, update_id)):
            return earlier
        # The state comes first, so that the moves are never older than it.
        now = Position(
            await story.query(StoryWorkflow.state), await story.query(StoryWorkflow.transitions)
        )
        chosen = choose(now)
        if chosen is None:
            return now.view
        actor, role = mover.actor, mover.require_role(*now.roles(chosen))
        if chosen.kind == "rejection":
            rejection = Reject(event=chosen.event, actor=actor, role=role, reason=remarks.reason)
            return await story.execute_update(
                StoryWorkflow.reject, mover.signed(story.id, rejection), id=update_id
            )
        approval = Approve(
            gate=chosen.event,
            actor=actor,
            role=role,
            comment=remarks.comment,
            revision=remarks.revision,
        )
        return await story.execute_update(
            StoryWorkflow.approve, mover.signed(story.id, approval), id=update_id
        )


async def _outcome(story: Story, update_id: str) -> StoryView | None:
    """Return the answer of an earlier update; None if the story has accepted none of that id."""
    earlier = story.get_update_handle_for(StoryWorkflow.approve, update_id)  # or its reject
    try:
        return await earlier.result()
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise
        return None


@asynccontextmanager
async def known(story_id: str) -> AsyncIterator[None]:
    """Turn errors of Temporal about a story into errors for the caller.

    Raises:
        ApplicationError: `StoryUnreadable`; `NotFound`; `IllegalMove`: the story has ended.
    """
    try:
        yield
    except WorkflowQueryFailedError as error:
        raise application_error(
            ErrorType.STORY_UNREADABLE, f"story {story_id} cannot answer: {error}"
        ) from error
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise
        if "already completed" in error.message:
            raise application_error(
                ErrorType.ILLEGAL_MOVE, f"story {story_id} has ended; legal now: none"
            ) from error
        raise application_error(ErrorType.NOT_FOUND, f"story {story_id} not found") from error
