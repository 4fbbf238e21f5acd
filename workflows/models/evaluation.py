"""Evaluation: tasks whose solution is known by its tests, and what the fleet makes of them."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from workflows.models.agents import MAX_AGENTS, MAX_ROUNDS, CallUsage
from workflows.models.base import Model, Request, Section
from workflows.models.ids import ID_PATTERN, Role
from workflows.models.measurement import FailedTest, Step
from workflows.models.workspace import Change, Commit, LoggedCommit, Repository

RUN_CHARACTERS = 60
INSTANCE_CHARACTERS = 100
"""With the configuration, they are the id of a task, which has at most 200 characters."""

RunName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=RUN_CHARACTERS)
]
InstanceId = Annotated[str, StringConstraints(pattern=ID_PATTERN, max_length=INSTANCE_CHARACTERS)]
TestName = Annotated[str, StringConstraints(min_length=1, max_length=2_000)]

TEST_PATCH_CHARACTERS = 2_000_000
MOST_TESTS = 20_000

_NAMES = re.compile(r"one|best-of:([0-9]{1,3})|council:([0-9]{1,3})x([0-9]{1,3})")


class EvaluationTask(Section):
    """A task of SWE-bench's kind: a problem, and the tests that a solution has to pass.

    Attributes:
        problem_statement: what the agents get.
        fail_to_pass: tests that fail on the base, and pass with a solution.
        pass_to_pass: tests that pass on the base, and still pass with a solution.
        test_patch: applied before the tests run; the agents never see it.
    """

    instance_id: InstanceId
    problem_statement: str = Field(min_length=1, max_length=200_000)
    fail_to_pass: list[TestName] = Field(min_length=1, max_length=MOST_TESTS)
    pass_to_pass: list[TestName] = Field(default=[], max_length=MOST_TESTS)
    test_patch: str = Field(default="", max_length=TEST_PATCH_CHARACTERS)


class Configuration(Section):
    """Who works on a task: one agent, the best of several, or a council with rounds of critique."""

    kind: Literal["one", "best-of", "council"]
    agents: int = Field(default=1, ge=1, le=MAX_AGENTS)
    rounds: int = Field(default=0, ge=0, le=MAX_ROUNDS)

    @property
    def name(self) -> str:
        """The name that `parse_configuration` reads."""
        match self.kind:
            case "one":
                return "one"
            case "best-of":
                return f"best-of:{self.agents}"
            case "council":
                return f"council:{self.agents}x{self.rounds}"


def parse_configuration(name: str) -> Configuration:
    """Return the configuration of a name: `one`, `best-of:N` or `council:NxR`.

    Raises:
        ValueError: it is none of these, or N or R is over its limit.
    """
    found = _NAMES.fullmatch(name)
    best, agents, rounds = (int(each or 0) for each in found.groups()) if found else (0, 0, 0)
    if name == "one":
        return Configuration(kind="one")
    if 1 <= best <= MAX_AGENTS:
        return Configuration(kind="best-of", agents=best)
    if 1 <= agents <= MAX_AGENTS and 1 <= rounds <= MAX_ROUNDS:
        return Configuration(kind="council", agents=agents, rounds=rounds)
    raise ValueError(
        f"{name[:60]!r} is not a configuration; write one, best-of:N or council:NxR, with N from 1 "
        f"to {MAX_AGENTS} agents and R from 1 to {MAX_ROUNDS} rounds"
    )


def evaluated_task_id(run: str, instance_id: str, configuration: Configuration) -> str:
    """Return the id of the task that the agents get."""
    return f"eval-{run}-{instance_id}-{configuration.name}"


class EvaluationInput(Request):
    """The input of EvaluationWorkflow.

    Attributes:
        run: names the run; with task and configuration, it is the workflow's id.
        repository: its entry, pinned.
        role: of the council that works on the task.
        seconds: that the agents have.
        steps: of each agent; None for those of the repository.
    """

    run: RunName
    task: EvaluationTask
    configuration: Configuration
    repository: Repository
    base: Commit
    role: Role = "DEV"
    seconds: float = Field(default=3_600, gt=0, le=86_400)
    steps: int | None = Field(default=None, ge=1, le=1_000)

    @property
    def task_id(self) -> str:
        return evaluated_task_id(self.run, self.task.instance_id, self.configuration)


class EvaluateInput(Model):
    """A commit, and the tests that decide whether it solves a task."""

    repository: Repository
    base: str
    commit: str
    fail_to_pass: list[str]
    pass_to_pass: list[str] = []
    test_patch: str = ""


class SuiteCount(Model):
    """How many tests of a list passed. `failed`: the others, at most LISTED of them."""

    tests: int = 0
    passed: int = 0
    failed: list[FailedTest] = []


class EvaluatedCommit(Model):
    """The tests of a task, run on a commit.

    Attributes:
        resolved: all of them passed.
        run: the command that ran them.
        change: from the base to the commit, without the test patch.
        commits: of the change, newest first; their trailers name model, prompt and step.
    """

    resolved: bool
    run: Step
    fail_to_pass: SuiteCount
    pass_to_pass: SuiteCount
    change: Change
    commits: list[LoggedCommit] = []


class EvaluationResult(Model):
    """What became of a task.

    Attributes:
        asked: the hash of the input.
        task_id: with agent and wave, the seeds of the calls follow from it.
        agents: those that worked; of a council that failed, none are named.
        evaluated: None if the agents changed nothing, or failed.
        ended_by: why the winner's work ended, or how the deliberation did.
        error: why the agents made no change.
        seconds: of the agents' work.
    """

    asked: str
    run: str
    instance_id: str
    configuration: str
    task_id: str
    base: str
    commit: str = ""
    resolved: bool = False
    evaluated: EvaluatedCommit | None = None
    agents: list[str] = []
    ended_by: str = ""
    error: str = ""
    usage: list[CallUsage] = []
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(call.tokens for call in self.usage)

    @property
    def calls(self) -> int:
        return sum(call.calls for call in self.usage)
