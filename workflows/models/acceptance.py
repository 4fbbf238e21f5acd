"""Acceptance tests: what each proves of a story's criteria, and what it was run on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workflows.models.base import Model
from workflows.models.ids import Id
from workflows.models.workspace import Commit, Repository

Status = Literal["passed", "failed", "error", "skipped", "missing", "not run"]
"""The outcome of a test. `error`: it could not be loaded; `missing`: it is not in the run."""


class AcceptanceQuery(Model):
    """A branch whose tests are run on its head, and on its base with the head's tests.

    Attributes:
        commit: the branch's head.
        criteria: how many the story has.
    """

    repository: Repository
    story_id: Id
    base: Commit
    commit: Commit
    criteria: int = Field(ge=1)


class AcceptanceTest(Model):
    """A test that names criteria, and its outcome before and after the branch's change."""

    name: str = Field(description="The test, as its runner reports it")
    suite: Literal["unit", "e2e"] = Field("unit", description="The suite that it is in")
    criteria: list[int] = Field(description="The numbers of its criteria, from 1")
    before: Status = Field(description="Its outcome on the base with the branch's tests")
    after: Status = Field(description="Its outcome on the branch")
    why: str = Field("", description="Its failure in a line; if both failed, that on the branch")
    flaky: bool = Field(False, description="It passed on the branch only when it was run once more")

    @property
    def proves(self) -> bool:
        """Whether it fails without the branch's change and passes with it."""
        return self.before in ("failed", "error") and self.after == "passed"


class AcceptanceRuns(Model):
    """What the fleet ran to find out which criteria are proved.

    Attributes:
        tests: those that name a criterion.
        changed_tests: test files of the base that the branch changes or removes.
        not_run: why a suite was not run, or not counted, on one of the commits.
    """

    base: Commit
    commit: Commit
    tests: list[AcceptanceTest] = []
    changed_tests: list[str] = []
    not_run: list[str] = []


class Criterion(Model):
    """An acceptance criterion, its tests, and whether they prove it."""

    number: int = Field(description="Its place among the story's criteria, from 1")
    text: str = Field(description="What must hold")
    proved: bool = Field(False, description="A test fails on the base and passes on the branch")
    why: str = Field("", description="Why it is not proved; empty if it is")
    tests: list[AcceptanceTest] = Field([], description="Its tests, those that decide first")


class Acceptance(Model):
    """Which acceptance criteria are proved of a commit; the lists are those of AcceptanceRuns."""

    base: str
    commit: str
    criteria: list[Criterion]
    changed_tests: list[str] = []
    not_run: list[str] = []

    @property
    def proved(self) -> int:
        """How many criteria are proved."""
        return sum(criterion.proved for criterion in self.criteria)
