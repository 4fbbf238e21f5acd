"""An agent's work in a repository: its actions, the steps it took, and what came of them."""

from __future__ import annotations

from datetime import datetime
from re import fullmatch
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, StringConstraints, field_validator

from workflows.models.agents import Agent, AgentCall, CallUsage, Decision, Task
from workflows.models.base import Model, Request, Section, Tokens
from workflows.models.context import ContextPack, DecisionAdded, MilestoneReached
from workflows.models.ids import (
    ID_CHARACTERS,
    ID_PATTERN,
    ID_RULE,
    LONG_ID_CHARACTERS,
    WORKFLOW_ID_CHARACTERS,
)
from workflows.models.workspace import (
    ChangedFile,
    Commit,
    Glob,
    Repository,
    RepositoryKey,
    Trailers,
)

COMMAND_CHARACTERS = 4_000
PATH_CHARACTERS = 400
TEXT_CHARACTERS = 200_000
"""Limits of an action; the decoder's are lower, by the tokens of the answer."""

Path = Annotated[str, StringConstraints(min_length=1, max_length=PATH_CHARACTERS)]
"""A path relative to the repository's root."""


# --- actions --------------------------------------------------------------------------------------


class RunCommand(Model):
    """Run a shell command in the working tree."""

    action: Literal["run"] = "run"
    command: Annotated[str, StringConstraints(min_length=1, max_length=COMMAND_CHARACTERS)]


class WriteFile(Model):
    """Create a file, or replace all of its content."""

    action: Literal["write"] = "write"
    path: Path
    content: Annotated[str, StringConstraints(max_length=TEXT_CHARACTERS)]


class ReplaceText(Model):
    """Replace a text that a file has exactly once."""

    action: Literal["replace"] = "replace"
    path: Path
    old: Annotated[str, StringConstraints(min_length=1, max_length=TEXT_CHARACTERS)]
    new: Annotated[str, StringConstraints(max_length=TEXT_CHARACTERS)]


class Finish(Model):
    """End the work."""

    action: Literal["finish"] = "finish"
    summary: str
    decisions: list[Decision] = []


Action = Annotated[RunCommand | WriteFile | ReplaceText | Finish, Field(discriminator="action")]

ActionName = Literal["run", "write", "replace", "finish"]

ALL_ACTIONS: tuple[ActionName, ...] = ("run", "write", "replace", "finish")
EDITS: tuple[ActionName, ...] = ("write", "replace")


class StepRecord(Model):
    """A step: the action, and what the agent sees of its effect.

    Attributes:
        exit_code: of a command; None if it was stopped at a limit, which `stopped` then names.
        observation: a command's output, or what became of an edit.
        commit: the commit after the step.
        changed: True if the step made this commit.
        elided: True if old texts of the step were removed to save room.
        fingerprint: a hash of the action and its effect; equal for a step that repeats another.
    """

    step: int
    action: Action
    exit_code: int | None = None
    stopped: str = ""
    observation: str = ""
    commit: str
    changed: bool = False
    elided: bool = False
    fingerprint: str = ""


class FileText(Model):
    """A file's text."""

    path: str
    text: str


class Outline(Model):
    """What an agent knows of a repository before it looks.

    Attributes:
        text: the paths, folders with many files as a count.
        editable: files that may change, at most MAX_EDITABLE of them.
        more_editable: True if there are more.
        files: their content, if it is little.
    """

    text: str
    editable: list[str] = []
    more_editable: bool = False
    files: list[FileText] = []


# --- the workflow ---------------------------------------------------------------------------------


class WorkLimits(Section):
    """The limits of one implementation.

    Attributes:
        steps: None for those of the repository. With 1, the agent can only write and replace.
        tokens: of all calls together; None: not limited.
        seconds: of the whole work; waiting for a token budget does not count.
    """

    steps: int | None = Field(default=None, ge=1, le=1_000)
    tokens: Tokens | None = None
    seconds: float = Field(default=3_600, gt=0, le=86_400)


EndedBy = Literal["finish", "steps", "tokens", "seconds", "loop", "failure"]
"""What ended the work; `failure`: the agent gave no usable answer any more."""


class StartedWork(Model):
    """What one run of an implementation leaves to the next.

    Attributes:
        base: the commit that changes are counted from.
        commit: the last commit.
        head: the commit that the work began with.
        usage: calls, summed up by act and model.
    """

    repository: Repository
    pack: ContextPack
    outline: Outline
    base: str
    commit: str
    head: str
    began: datetime
    steps: list[StepRecord] = []
    step: int = 0
    digest: str = ""
    changed: list[ChangedFile] = []
    usage: list[CallUsage] = []
    seconds: float = 0.0
    decisions: list[DecisionAdded] = []
    milestones: list[MilestoneReached] = []
    refused: list[str] = []


class ImplementationInput(Request):
    """The input of ImplementationWorkflow.

    Attributes:
        repository: its entry, pinned; or its key in repositories.yaml.
        base: the commit that the work is compared with; None: the base branch's head.
        head: the commit to continue from, such as a proposal that was criticised; None: `base`.
        paths: globs that may change; empty: everything but CI and git configuration.
        limits: of this work; those of a command are the repository's.
        feedback: critiques and reasons, newest last.
        pack: None: loaded for the task's role and phase.
        outbox_workflow_id: the story's workflow, which grants the budget.
        ask_for_budget: True if the story has a token budget: each step waits until it is granted.
        first_step: more than 1 for work that continues `head`, so that its commits are counted on.
        began: commits are dated from then on, a second a step; None: the start of the workflow.
        goal: the title and criteria of the story; empty: the task says it all.
        carried: what the run before this one has done.
    """

    repository: Repository | RepositoryKey
    base: Commit | None = None
    head: Commit | None = None
    task: Task
    agent: Agent
    paths: list[Glob] = Field(default=[], max_length=100)
    limits: WorkLimits = WorkLimits()
    feedback: list[str] = []
    decisions: list[DecisionAdded] = []
    pack: ContextPack | None = None
    background: str = ""
    plan_id: str = ""
    outbox_workflow_id: str = Field(default="", max_length=WORKFLOW_ID_CHARACTERS)
    ask_for_budget: bool = False
    first_step: int = Field(default=1, ge=1, le=100_000)
    began: AwareDatetime | None = None
    goal: list[str] = []
    carried: StartedWork | None = None

    @field_validator("task")
    @classmethod
    def _has_ids(cls, task: Task) -> Task:
        """Refuse ids that no ref and no trailer of a commit can have."""
        _require_id("task_id", task.task_id, LONG_ID_CHARACTERS)
        if task.story_id:
            _require_id("story_id", task.story_id, ID_CHARACTERS)
        return task

    @field_validator("agent")
    @classmethod
    def _has_id(cls, agent: Agent) -> Agent:
        _require_id("agent_id", agent.agent_id, LONG_ID_CHARACTERS)
        return agent

    @field_validator("paths")
    @classmethod
    def _are_relative(cls, paths: list[str]) -> list[str]:
        for path in paths:
            if path.startswith("/") or ".." in path.split("/") or "\\" in path or "\0" in path:
                raise ValueError(
                    f"{path[:100]!r} must be a glob relative to the repository's root, with '/' "
                    "and without '..'; write it as in docs/**"
                )
        return paths


def _require_id(field: str, value: str, most: int) -> None:
    if not fullmatch(ID_PATTERN, value) or len(value) > most:
        raise ValueError(f"{field} must have {ID_RULE}")


class ImplementationProgress(Model):
    """The answer to the query `progress`.

    Attributes:
        steps: how many it may take; 0 until the repository is known.
        last: the last action in a line.
        refused: the last signals that could not be read, with the reason.
    """

    status: Literal["starting", "waiting for budget", "asking", "acting", "ended"]
    step: int = 0
    steps: int = 0
    last: str = ""
    last_command: str = ""
    exit_code: int | None = None
    changed: list[ChangedFile] = []
    tokens: int = 0
    commit: str = ""
    ended_by: str = ""
    refused: list[str] = []


class ImplementationResult(Model):
    """The outcome of an implementation: the diff from `base` to `commit`, whatever ended it.

    Attributes:
        steps: the number of its steps.
        transcript_digest: a hash of all steps.
        error: what failed, if a failure ended it.
    """

    task_id: str
    agent_id: str
    repository: str
    base: str
    commit: str
    changed: list[ChangedFile] = []
    ended_by: EndedBy
    error: str = ""
    summary: str = ""
    decisions: list[Decision] = []
    usage: list[CallUsage] = []
    steps: int = 0
    transcript_digest: str = ""
    model: str = ""
    prompt_hash: str = ""
    duration_ms: int = 0


# --- activities -----------------------------------------------------------------------------------


class WorkQuery(Model):
    """The fields of an ImplementationInput that its start depends on."""

    repository: Repository | RepositoryKey
    base: str | None = None
    head: str | None = None
    paths: list[str] = []


class WorkStart(Model):
    """The repository's entry, the commits that exist, and the outline of `head`.

    Attributes:
        changed: what `head` changes since `base`.
    """

    repository: Repository
    base: str
    head: str
    outline: Outline
    changed: list[ChangedFile] = []


class NextActionInput(AgentCall):
    """The input of a call that asks for the next action. `wave`: the step.

    Attributes:
        editable: files that exist and may change.
        steps: the transcript so far.
        allowed: the actions to choose from.
        steps_left: with this one.
        goal: as in ImplementationInput, if the agent has one step.
        changed: what the agent has changed already, if it has one step.
    """

    outline: Outline
    paths: list[str] = []
    editable: list[str] = []
    steps: list[StepRecord] = []
    allowed: list[ActionName] = list(ALL_ACTIONS)
    steps_left: int = 1
    goal: list[str] = []
    changed: list[ChangedFile] = []


class NextActionAnswer(Model):
    """An action and its cost."""

    action: Action
    usage: CallUsage


class RunActionInput(Model):
    """An action to carry out on a commit.

    Attributes:
        base: the commit that `changed` is counted from.
        parent: the commit to act on.
        at: the date of the commit that it may make.
    """

    repository: Repository
    base: str
    parent: str
    action: Action
    paths: list[str] = []
    trailers: Trailers
    at: datetime


class ActionResult(Model):
    """The effect of an action: the fields of StepRecord, and all changes since the base."""

    exit_code: int | None = None
    stopped: str = ""
    observation: str = ""
    commit: str
    changed: list[ChangedFile] = []
