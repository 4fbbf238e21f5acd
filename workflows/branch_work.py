"""What a story does with its branch: create, measure, merge, prove, show and deliver it.

A story in a repository has one BranchWork. Without a repository, it does nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from temporalio import workflow
from temporalio.exceptions import ActivityError, is_cancelled_exception

from workflows import story_branch
from workflows.execution import cause_of

with workflow.unsafe.imports_passed_through():
    from workflows.models.branches import MergedChange, StoryBranch
    from workflows.models.changes import MeasuredChange
    from workflows.models.events import CriteriaTested
    from workflows.models.story import Approve
    from workflows.models.workspace import RepositoryWork
    from workflows.rules.acceptance import not_tested
    from workflows.story_requests import require_approve

if TYPE_CHECKING:
    from workflows.story import StoryWorkflow


WORKS_IN_REPOSITORY = ("design", "plan", "deliberation")
"""What is done in states after the one whose gate approves the scope."""


class BranchWork:
    """The work on one story's branch. Its results become the story's."""

    def __init__(self, of: StoryWorkflow) -> None:
        self.of = of

    async def place(self) -> None:
        """Create the branch once the scope is approved.

        Before a plan runs, and after work was stopped that may have merged changes, it is put back
        to where the last work that ended has left it.
        """
        story = self.of.story
        if story.branch is None or story.outlived:
            return
        strays = story.strays and workflow.patched("stray-merges-undone")
        works = story.spec.work in WORKS_IN_REPOSITORY
        if not strays and (not works or (story.branch.head and story.spec.work != "plan")):
            return
        visit = story.visit
        branch = await story_branch.placed(story.story_id, story.branch)
        self.of.require_visit(visit)
        story.branch, story.strays = branch, False
        self.of.show()

    async def measure(self, branch: StoryBranch) -> MeasuredChange | None:
        """Measure the branch's head; if that is not possible, a person has to report."""
        story = self.of.story
        self.of.work_on(f"measuring {branch.branch} at {branch.head[:12]}")
        visit = story.visit
        job_id = f"fleet-{story.story_id}-{visit}-{branch.head[:12]}"
        self.of.asking = True
        try:
            found = await story_branch.measured(branch)
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            story.unmeasured = cause_of(error)
            self.of.milestone("NOT_MEASURED", f"commit {branch.head}: {story.unmeasured}")
            return None
        finally:
            self.of.asking = False
        self.of.require_visit(visit)
        self.of.take_report(found.report.model_copy(update={"job_id": job_id}), "")
        return found

    async def merge(self, work: RepositoryWork, task_id: str, commit: str) -> None:
        """Merge the change of the state's council into the branch.

        Raises:
            ApplicationError: `MergeConflict`: the branch has moved, and changed the same lines.
        """
        story, visit = self.of.story, self.of.story.visit
        assert story.branch is not None
        head = story.branch.head
        self.of.work_on(f"merging {commit[:12]} of {task_id}")
        self.of.asking = True
        try:
            answer = await story_branch.merged(work, task_id, head, commit)
        finally:
            self.of.asking = False
        self.of.require_visit(visit)
        if answer.conflict:
            raise story_branch.conflict(story.branch, task_id, answer.conflict)
        story.take_merged([MergedChange(task_id=task_id, base=head, commit=answer.head)])

    async def examine(self) -> None:
        """Measure what the state's council has merged, and run the tests of the criteria."""
        story = self.of.story
        if story.branch is None or story.spec.in_repository is None:
            return
        if story.outdated:
            await self.measure(story.branch)
        if story.tests_criteria and story.text.acceptance_criteria:
            await self.test_criteria(story.branch)

    async def test_criteria(self, branch: StoryBranch) -> None:
        """Find out which criteria are proved; those whose tests cannot be run are not."""
        story, visit = self.of.story, self.of.story.visit
        self.of.work_on(f"testing the acceptance criteria at {branch.head[:12]}")
        texts = story.text.acceptance_criteria
        self.of.asking = True
        try:
            acceptance = await story_branch.tested(story.story_id, branch, texts)
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            acceptance = not_tested(texts, branch.base, branch.head, cause_of(error))
        finally:
            self.of.asking = False
        self.of.require_visit(visit)
        story.take_acceptance(acceptance)
        self.of.emit(
            CriteriaTested(
                repository=branch.repository.key,
                commit=branch.head,
                base=branch.base,
                criteria=acceptance.criteria,
            )
        )

    async def require_shown_commit(self, request: Approve) -> None:
        """Refuse an approval if the branch has another commit than the gate shows.

        Raises:
            ApplicationError: `StaleRevision`; `GitStoreAway`: the store does not answer.
        """
        story, visit = self.of.story, self.of.story.visit
        if story.branch is None or not story.shows_commit:
            return
        require_approve(story, request)
        try:
            head = await story_branch.head_now(story.story_id, story.branch)
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            raise story_branch.not_readable(story.branch, cause_of(error)) from error
        if story.visit == visit and head != story.branch.head:
            shown = story.branch
            story.found_commit(head)
            self.of.settle()
            raise story_branch.moved(shown, head, story.revision)

    async def deliver(self) -> None:
        """Push the approved commit where the repository's entry says so, and announce it."""
        story, branch = self.of.story, self.of.story.branch
        if branch is None or not branch.head:
            return
        try:
            await story_branch.pushed(story.story_id, branch)
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            self.of.milestone("NOT_PUSHED", f"{branch.branch} was not pushed: {cause_of(error)}")
        self.of.emit(await story_branch.delivery(story.story_id, branch))
