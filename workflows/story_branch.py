"""The branch of a story that names a repository: from the pinned base to the delivered commit.

Each function is one step of a story or a plan, on the queue `workspace`.
"""

from __future__ import annotations

from temporalio import workflow
from temporalio.exceptions import ApplicationError

from workflows.models.errors import ErrorType, application_error
from workflows.stubs import (
    FETCH,
    LOOK,
    PUSH,
    WORKSPACE,
    AcceptanceStub,
    BranchStub,
    WorkspaceStub,
    measure_head,
)

with workflow.unsafe.imports_passed_through():
    from workflows.models.acceptance import Acceptance, AcceptanceQuery
    from workflows.models.branches import (
        BaseNow,
        BaseQuery,
        BranchPoint,
        BranchQuery,
        BranchSize,
        BranchSpan,
        MergeAnswer,
        MergeRequest,
        PinQuery,
        StoryBranch,
    )
    from workflows.models.changes import MeasuredChange, MeasureInput
    from workflows.models.events import StoryDelivered
    from workflows.models.ids import story_branch
    from workflows.models.story import StoryInput
    from workflows.models.workspace import RepositoryWork
    from workflows.rules.acceptance import judged


async def pinned(input: StoryInput) -> StoryBranch | None:
    """Return the repository that a story names and its base; None if it names none.

    Raises:
        ActivityError: it is unknown or does not answer, its base is gone, or a glob is wrong.
    """
    if input.repository is None:
        return None
    found = await workflow.execute_activity_method(
        BranchStub.pin_repository,
        PinQuery(repository=input.repository, paths=input.paths),
        **(WORKSPACE | {"summary": f"the repository {input.repository} and its base"}),
    )
    return StoryBranch(
        repository=found.repository,
        branch=story_branch(input.story_id),
        base=found.base,
        paths=input.paths,
        unmatched=found.unmatched,
        tests=found.tests,
        docs=found.docs,
    )


async def placed(story_id: str, branch: StoryBranch) -> StoryBranch:
    """Let the branch be at the commit that the story knows, at first its base."""
    commit = branch.head or branch.base
    await workflow.execute_activity_method(
        BranchStub.place_branch,
        BranchPoint(repository=branch.repository, story_id=story_id, commit=commit),
        **(WORKSPACE | {"summary": f"{branch.branch} at {commit[:12]}"}),
    )
    return branch.model_copy(update={"head": commit})


async def head_now(story_id: str, branch: StoryBranch) -> str:
    """Return the branch's commit in the store.

    Raises:
        ActivityError: the store does not answer at once.
    """
    return await workflow.execute_activity_method(
        BranchStub.branch_head,
        BranchQuery(repository=branch.repository, story_id=story_id),
        **(LOOK | {"summary": f"the commit of {branch.branch}"}),
    )


def moved(branch: StoryBranch, head: str, revision: str) -> ApplicationError:
    """Return why an approval is refused if the branch is not at the commit it showed."""
    return application_error(
        ErrorType.STALE_REVISION,
        f"revision: is stale: {branch.branch} was at {branch.head} when the gate was shown and is "
        f"at {head or 'no commit'} now; look at that, and approve {revision!r}"
        if revision
        else f"revision: is stale: {branch.branch} was at {branch.head} when the gate was shown "
        f"and is at {head or 'no commit'} now, for which the gate is not open",
    )


def not_readable(branch: StoryBranch, why: str) -> ApplicationError:
    """Return why an approval is refused if the branch cannot be read."""
    return application_error(
        ErrorType.GIT_STORE_AWAY,
        f"gate: {branch.branch} cannot be read now ({why}); check that a worker `workspace` runs, "
        "and try again",
    )


async def merged(work: RepositoryWork, task_id: str, head: str, commit: str) -> MergeAnswer:
    """Merge a task's commit into the branch, which is at `head`."""
    return await workflow.execute_activity_method(
        BranchStub.merge_change,
        MergeRequest(
            repository=work.repository,
            story_id=work.story_id,
            task_id=task_id,
            head=head,
            commit=commit,
            at=workflow.now().replace(microsecond=0),
        ),
        **(WORKSPACE | {"summary": f"merge {commit[:12]} of {task_id}"}),
    )


def conflict(branch: StoryBranch, task_id: str, files: list[str]) -> ApplicationError:
    """Return why the change of a council is not merged."""
    return application_error(
        ErrorType.MERGE_CONFLICT,
        f"{task_id}: {branch.branch} has moved, and changes the same lines of {', '.join(files)}; "
        "the council is asked again on the branch",
    )


async def base_now(story_id: str, branch: StoryBranch) -> BaseNow:
    """Return the base branch's commit in the project's repository.

    Raises:
        ActivityError: the repository does not answer, or has no such branch.
    """
    return await workflow.execute_activity_method(
        BranchStub.base_now,
        BaseQuery(repository=branch.repository, story_id=story_id, base=branch.base),
        **(FETCH | {"summary": f"the commit of {branch.repository.base}"}),
    )


async def rebased(story_id: str, branch: StoryBranch, base: str) -> MergeAnswer:
    """Merge a commit of the base branch into the story's branch.

    Raises:
        ActivityError: the store cannot be used.
    """
    name = branch.repository.base
    return await workflow.execute_activity_method(
        BranchStub.merge_change,
        MergeRequest(
            repository=branch.repository,
            story_id=story_id,
            task_id=f"{story_id}-rebase",
            head=branch.head,
            commit=base,
            at=workflow.now().replace(microsecond=0),
            message=f"Merge {name}",
        ),
        **(PUSH | {"summary": f"merge {name} at {base[:12]} into {branch.branch}"}),
    )


async def measured(branch: StoryBranch) -> MeasuredChange:
    """Measure the head of the branch against its base.

    Raises:
        ActivityError: it cannot be measured.
    """
    return await workflow.execute_activity_method(
        WorkspaceStub.measure_change,
        MeasureInput(
            repository=branch.repository,
            base=branch.base,
            commit=branch.head,
            paths=branch.paths,
        ),
        **(
            measure_head(branch.repository.limits)
            | {"summary": f"measure {branch.branch} at {branch.head[:12]}"}
        ),
    )


async def tested(story_id: str, branch: StoryBranch, criteria: list[str]) -> Acceptance:
    """Run the tests of the criteria on the branch and on its base; return which are proved.

    Raises:
        ActivityError: they cannot be run.
    """
    runs = await workflow.execute_activity_method(
        AcceptanceStub.test_criteria,
        AcceptanceQuery(
            repository=branch.repository,
            story_id=story_id,
            base=branch.base,
            commit=branch.head,
            criteria=len(criteria),
        ),
        **(
            measure_head(branch.repository.limits)
            | {"summary": f"acceptance tests of {branch.branch} at {branch.head[:12]}"}
        ),
    )
    return judged(criteria, runs)


async def pushed(story_id: str, branch: StoryBranch) -> None:
    """Push the approved commit, if the repository's entry says so.

    Raises:
        ActivityError: the repository refuses it, or does not answer.
    """
    if branch.repository.push:
        await workflow.execute_activity_method(
            BranchStub.push_branch,
            BranchPoint(repository=branch.repository, story_id=story_id, commit=branch.head),
            **(PUSH | {"summary": f"push {branch.branch} at {branch.head[:12]}"}),
        )


async def delivery(story_id: str, branch: StoryBranch) -> StoryDelivered:
    """Return the event that announces the branch."""
    size: BranchSize = await workflow.execute_activity_method(
        BranchStub.branch_size,
        BranchSpan(
            repository=branch.repository, story_id=story_id, base=branch.base, commit=branch.head
        ),
        **(WORKSPACE | {"summary": f"what {branch.branch} changes"}),
    )
    return StoryDelivered(
        repository=branch.repository.key,
        branch=branch.branch,
        commit=branch.head,
        base=branch.base,
        **size.model_dump(),
    )
