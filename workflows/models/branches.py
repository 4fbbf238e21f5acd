"""A story's branch in its repository: what is pinned, merged, shown and delivered."""

from __future__ import annotations

import shlex
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
        tests: globs of the tests that the story may change.
        docs: globs of the documentation that the story may change.
    """

    repository: Repository
    base: Commit
    unmatched: list[str] = []
    tests: list[Glob] = []
    docs: list[Glob] = []


class MergedChange(Model):
    """A task's change in the story's branch: `base` is the branch's head before it."""

    task_id: str
    base: Commit
    commit: Commit


class BaseNow(Model):
    """The commit of a base branch, and how many commits it has that another one has not."""

    commit: Commit
    commits: int = 0


class BaseLook(Model):
    """What was seen of the base when a gate opened.

    Attributes:
        visit: the story's visit of the state.
        gate: the gate.
        commit: of the base branch; empty if it is unknown.
        commits: those since the base that the story has.
        unknown: why it is not known; empty if it is.
    """

    visit: int
    gate: str
    commit: str = ""
    commits: int = 0
    unknown: str = ""

    def is_at(self, visit: int, gate: str) -> bool:
        """Return whether this gate was open in this visit."""
        return (self.visit, self.gate) == (visit, gate)


class StoryBranch(Model):
    """A story's repository, pinned, and its branch.

    Attributes:
        branch: the name, without `refs/heads/`.
        base: the commit of the base branch that the story's changes are compared with.
        head: the last commit; empty until the scope is approved.
        paths: globs that the story may change; empty: everything but CI and git configuration.
        unmatched: those of them that no file of the base matches.
        tests: globs of the tests among them; empty: the story may change no test.
        docs: globs of the documentation among them; empty: the story may change none.
        merged: the tasks' changes, in order.
        seen: the base branch, when the last gate opened.
    """

    repository: Repository
    branch: str
    base: Commit
    head: str = ""
    paths: list[Glob] = []
    unmatched: list[str] = []
    tests: list[Glob] = []
    docs: list[Glob] = []
    merged: list[MergedChange] = []
    seen: BaseLook | None = None


class BranchView(Model):
    """What people see of a story's branch; the fields are those of StoryBranch.

    Attributes:
        base_branch: the name of the base branch.
        base_now: its commit when the last gate opened; empty if it is unknown.
        base_commits: the number of its commits since `base`.
        base_unknown: why it is unknown; empty if it is not.
    """

    repository: str
    branch: str
    base: str
    head: str = ""
    unmatched: list[str] = []
    base_branch: str = ""
    base_now: str = ""
    base_commits: int = 0
    base_unknown: str = ""

    def base_note(self, story_id: str) -> str:
        """Return what a person at a gate has to know of the base; empty if it has not moved."""
        if self.base_unknown:
            return f"whether {self.base_branch} has moved is unknown: {self.base_unknown}"
        if self.base_now in ("", self.base):
            return ""
        since, remedy = self.base[:12], f"`fleet rebase {shlex.quote(story_id)}` merges it"
        if self.base_commits:
            plural = "s" if self.base_commits > 1 else ""
            moved = f"has moved by {self.base_commits} commit{plural} since {since}"
        else:
            moved = f"is at {self.base_now[:12]}, which is older than {since}"
        return f"{self.base_branch} {moved}; {remedy}"


class BranchQuery(Model):
    """A query for a story's branch."""

    repository: Repository
    story_id: Id


class BranchPoint(BranchQuery):
    """A commit at which a story's branch is to be."""

    commit: Commit


class BaseQuery(BranchQuery):
    """A query for the base branch. `base`: the commit to count from."""

    base: Commit


class MergeRequest(BranchPoint):
    """A commit to merge into a story's branch.

    Attributes:
        task_id: the task that it is for.
        head: the branch's, as the story knows it.
        at: the date of a merge commit.
        message: of a merge commit; empty: it names the task.
    """

    task_id: LongId
    head: Commit
    at: datetime
    message: str = ""


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
