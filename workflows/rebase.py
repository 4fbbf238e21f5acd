"""The base of a story's branch: what gates say of it once it moves, and the update `rebase`.

A rebase merges the project's base into the story's branch. No council works on the branch then,
and what starts meanwhile waits. The new head is measured if the old one was; until it passes, no
gate opens.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError, is_cancelled_exception

from workflows import story_branch
from workflows.execution import cause_of, type_of
from workflows.models.errors import ErrorType, application_error

with workflow.unsafe.imports_passed_through():
    from workflows.models.access import Via
    from workflows.models.branches import BaseLook, BaseNow, StoryBranch
    from workflows.models.story import Rebase
    from workflows.rules import machine as fsm
    from workflows.rules.changes import named

if TYPE_CHECKING:
    from workflows.story import StoryWorkflow
    from workflows.story_state import Story

REASON_CHARACTERS = 300


class Rebasing:
    """A story's base: looks at it at each gate, and merges it when a person asks for that."""

    def __init__(self, of: StoryWorkflow) -> None:
        self.of = of
        self.merging = False
        """True while a rebase changes the branch."""
        self.rests_in = 0
        """The visit whose work has failed and is not running now."""

    # --- at gates -------------------------------------------------------------------------------

    async def look_at_gates(self) -> None:
        """Look at the base whenever a gate opens; histories of older releases do not."""
        while True:
            await workflow.wait_condition(self.has_to_look)
            if not workflow.patched("base-shown-at-gates"):
                return
            await self.look()

    def has_to_look(self) -> bool:
        story, branch = self.of.story, self.of.story.branch
        if branch is None or not story.gate or self.merging:
            return False
        return branch.seen is None or not branch.seen.is_at(story.visit, story.gate)

    async def look(self) -> None:
        """Note by how much the base has moved, or why that is unknown."""
        story, branch = self.of.story, self.of.story.branch
        assert branch is not None
        visit, gate = story.visit, story.gate
        try:
            now = await story_branch.base_now(story.story_id, branch)
            seen = self.seen(now, visit, gate)
        except ActivityError as error:
            unknown = cause_of(error)[:REASON_CHARACTERS]
            seen = BaseLook(visit=visit, gate=gate, unknown=unknown)
        if story.branch and story.branch.base == branch.base:
            story.branch = story.branch.model_copy(update={"seen": seen})
            self.of.show()

    @staticmethod
    def seen(now: BaseNow, visit: int, gate: str) -> BaseLook:
        return BaseLook(visit=visit, gate=gate, commit=now.commit, commits=now.commits)

    # --- rebase ---------------------------------------------------------------------------------

    async def require_no_merge(self) -> None:
        """Return when no rebase changes the branch; refuse an approval that came before its end.

        Raises:
            ApplicationError: `StaleRevision`.
        """
        story, shown = self.of.story, self.of.story.branch
        if not self.merging or shown is None:
            return
        await workflow.wait_condition(lambda: not self.merging)
        if story.branch and story.branch.head != shown.head:
            raise story_branch.moved(shown, story.branch.head, story.revision)

    async def measured(self) -> None:
        """Return when no rebase changes the branch, and none waits for its measurement."""
        story = self.of.story
        if self.merging or story.remeasure:
            await workflow.wait_condition(lambda: not (self.merging or story.remeasure))

    def require(self, request: Rebase) -> StoryBranch:
        """Return the branch, if it may be rebased now.

        Raises:
            ApplicationError: `IllegalMove` or `GateRole`.
        """
        story = self.of.story
        branch = require_rebase(story, request)
        rests = story.work_done or self.rests_in == story.visit
        if self.merging or story.working_on or not rests:
            busy = "another rebase" if self.merging else story.working_on or "the fleet"
            raise application_error(
                ErrorType.ILLEGAL_MOVE,
                f"rebase: {busy} is at work on {branch.branch}; wait until the story waits for a "
                "person",
            )
        return branch

    async def rebase(self, request: Rebase, via: Via) -> None:
        """Merge the base into the branch; then the gate shows another revision.

        Raises:
            ApplicationError: it may not be rebased now; `MergeConflict` names the files;
                `RepositoryAway` or `GitStoreAway`. Nothing is changed then.
        """
        of, story = self.of, self.of.story
        branch = self.require(request)
        self.merging = True
        try:
            now = await story_branch.base_now(story.story_id, branch)
            if now.commit == branch.base:
                raise nothing_to_merge(branch)
            head = await self.merge(branch, now)
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            raise not_merged(branch, error) from error
        finally:
            self.merging = False
        story.take_base(
            branch.model_copy(
                update={
                    "base": now.commit,
                    "head": head,
                    "seen": BaseLook(visit=story.visit, gate=story.gate, commit=now.commit),
                }
            ),
            request.actor,
        )
        of.milestone(
            "REBASED",
            f"{branch.repository.base} at {now.commit[:12]} was merged into {branch.branch} "
            f"(commits since {branch.base[:12]}: {now.commits})"
            f"{f'; its head is {head}' if head else ''}",
            request.actor,
            via,
        )
        of.settle()

    async def merge(self, branch: StoryBranch, now: BaseNow) -> str:
        """Return the branch's head with the base in it; empty if the branch is not created yet.

        Raises:
            ApplicationError: `MergeConflict`.
        """
        if not branch.head:
            return ""
        answer = await story_branch.rebased(self.of.story.story_id, branch, now.commit)
        if answer.conflict:
            raise application_error(
                ErrorType.MERGE_CONFLICT,
                f"rebase: {branch.repository.base} at {now.commit[:12]} conflicts with "
                f"{branch.branch} in {named(answer.conflict)}; nothing is changed. Merge it by "
                "hand once the branch is delivered, or start the story again under another id",
            )
        return answer.head

    async def measure_after(self) -> None:
        """Measure the branch whenever a rebase has changed a head that was measured."""
        story = self.of.story
        while True:
            await workflow.wait_condition(lambda: story.remeasure)
            await self.measure()

    async def measure(self) -> None:
        story, visit = self.of.story, self.of.story.visit
        assert story.branch is not None
        try:
            await self.of.branch_work.measure(story.branch)
            if story.tests_criteria and story.acceptance:
                await self.of.branch_work.test_criteria(story.branch)
        except asyncio.CancelledError:
            if story.visit == visit:
                raise
            return  # the story has moved, and does not need it
        if story.visit == visit:
            story.remeasure, story.working_on = False, ""
            self.of.settle()


def require_rebase(story: Story, request: Rebase) -> StoryBranch:
    """Return the branch of a story that a person of this role may rebase.

    Raises:
        ApplicationError: `IllegalMove` or `GateRole`.
    """
    branch = story.branch
    if branch is None:
        raise application_error(
            ErrorType.ILLEGAL_MOVE, "rebase: the story has no repository, and so no base to merge"
        )
    if story.done or story.cancelled:
        raise application_error(
            ErrorType.ILLEGAL_MOVE, f"rebase: the story has ended; {story.legal()}"
        )
    moves = fsm.moves(story.machine, story.state, story.facts)
    roles = sorted({role for move in moves for role in move.roles})
    if request.role not in roles:
        raise application_error(
            ErrorType.GATE_ROLE,
            f"role: a rebase in {story.state} is for {' or '.join(roles) or 'no role'}, as its "
            f"moves are, not {request.role!r}",
        )
    return branch


def nothing_to_merge(branch: StoryBranch) -> ApplicationError:
    """Return why a rebase is refused whose base has not moved."""
    return application_error(
        ErrorType.ILLEGAL_MOVE,
        f"rebase: {branch.repository.base} is still at {branch.base}; there is nothing to merge",
    )


def not_merged(branch: StoryBranch, error: ActivityError) -> ApplicationError:
    """Return why a rebase is refused if the repository or the store cannot be used."""
    cause = type_of(error)
    known = cause in {each.value for each in ErrorType}
    return application_error(
        ErrorType(cause) if known else ErrorType.GIT_STORE_AWAY,
        f"rebase: {branch.branch} is as it was ({cause_of(error)}); try again",
    )
