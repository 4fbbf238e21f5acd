"""A story's branch in its repository: what is pinned, merged, shown and delivered."""

from __future__ import annotations

from datetime import datetime

from workflows.models.base import Model
from workflows.models.ids import Id, LongId
from workflows.models.workspace import Commit, Glob, Repository, RepositoryKey


class PinQuery(Model):
    """What a story names: an entry of repositories.yaml, and the globs that it may change."""

    repository: RepositoryKey
    paths: list[Glob] = []


class PinnedRepository(Model):
    """A repository as it is when a story starts.

    Attributes:
        base: the commit of the base branch.
        unmatched: the globs that no file of it matches.
    """

    repository: Repository
    base: Commit
    unmatched: list[str] = []


class MergedChange(Model):
    """A task's change in the story's branch: `base` is the branch's head before it."""

    task_id: str
    base: Commit
    commit: Commit


class StoryBranch(Model):
    """A story's repository, pinned, and its branch.

    Attributes:
        branch: the name, without `refs/heads/`.
        base: the commit that the branch begins at.
        head: the last commit; empty until the scope is approved.
        paths: globs that the story may change; empty: everything but CI and git configuration.
        unmatched: those of them that no file of the base matches.
        merged: the tasks' changes, in order.
    """

    repository: Repository
    branch: str
    base: Commit
    head: str = ""
    paths: list[Glob] = []
    unmatched: list[str] = []
    merged: list[MergedChange] = []


class BranchView(Model):
    """What people see of a story's branch; the fields are those of StoryBranch."""

    repository: str
    branch: str
    base: str
    head: str = ""
    unmatched: list[str] = []


class BranchQuery(Model):
    """A query for a story's branch."""

    repository: Repository
    story_id: Id


class BranchPoint(BranchQuery):
    """A commit at which a story's branch is to be."""

    commit: Commit


class MergeRequest(BranchPoint):
    """A commit to merge into a story's branch.

    Attributes:
        task_id: the task that it is for.
        head: the branch's, as the story knows it.
        at: the date of a merge commit.
    """

    task_id: LongId
    head: Commit
    at: datetime


class MergeAnswer(Model):
    """The branch's head after a merge; `conflict`: the files for which it did not take place."""

    head: Commit
    conflict: list[str] = []


class MergedBase(Model):
    """A commit on which the author of a change that conflicts works once more.

    Attributes:
        commit: the branch's head with all of the change but the files that conflict.
        files: these.
        branch_diff: what the branch changed in them since the change began, cut to a size.
        change_diff: what the change changed in them, cut to a size.
        steps: the number of the last step of the change.
    """

    commit: Commit
    files: list[str] = []
    branch_diff: str = ""
    change_diff: str = ""
    steps: int = 0


class BranchSpan(BranchPoint):
    """The commits of a story's branch after `base`."""

    base: Commit


class BranchSize(Model):
    """How much a branch changes."""

    files_changed: int
    insertions: int
    deletions: int
