"""A story: its input, what people send to it, and what it shows."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from workflows.models.acceptance import Acceptance
from workflows.models.access import Proof, Via
from workflows.models.base import Actor, Line, Model, Request, Rigor, Title, Tokens
from workflows.models.branches import BranchView
from workflows.models.deliberation import RecordedDecision
from workflows.models.errors import ErrorType, application_error
from workflows.models.ids import Id, Role
from workflows.models.readiness import Finding
from workflows.models.report import ReportScore
from workflows.models.workspace import Glob, RepositoryKey


class StoryInput(Request):
    """The input of StoryWorkflow.

    Attributes:
        repository: a key of repositories.yaml; None: the story has no repository.
        paths: globs that the story may change; empty: everything but CI and git configuration.
        steps: of each agent's work on a task; None: those of the repository.
    """

    story_id: Id
    title: Title
    brief: str = ""
    acceptance_criteria: list[Line] = Field(default=[], max_length=100)
    rigor: Rigor = "L1"
    created_by: Actor = "unknown"
    approvals: Literal["human", "auto"] = "human"
    token_budget: Tokens | None = None
    repository: RepositoryKey | None = None
    paths: list[Glob] = Field(default=[], max_length=100)
    steps: int | None = Field(default=None, ge=1, le=1_000)
    carried: dict[str, Any] | None = None
    """State of the previous run. Only continue-as-new may set it; others are rejected."""

    @field_validator("paths", "steps")
    @classmethod
    def _of_a_repository(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("repository", "") is None:
            raise ValueError("is for stories with a repository; name one, or remove it")
        return value


class Approve(Request):
    """A request to open a gate. `revision`: the content hash that the gate showed."""

    gate: Line
    actor: Actor
    role: Role
    comment: str = Field(default="", max_length=4_000)
    revision: Annotated[str | None, AfterValidator(lambda text: (text or "").strip() or None)] = (
        None
    )
    proof: Proof = ""


class Reject(Request):
    """A request to take a rejection transition; its reason is context for the next deliberation."""

    event: Line
    actor: Actor
    role: Role
    reason: Line
    proof: Proof = ""


class Amend(Request):
    """A request to change the story's text. After `approve_scope`, that gate opens again."""

    title: Title | None = None
    brief: str | None = None
    acceptance_criteria: list[Line] | None = Field(default=None, max_length=100)
    actor: Actor = "unknown"
    proof: Proof = ""

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if self.title is None and self.brief is None and self.acceptance_criteria is None:
            # Outside of `_refuse_clearly`, which has already validated the fields.
            raise application_error(
                ErrorType.INVALID_INPUT,
                "Amend refused. Give at least one of title, brief, acceptance_criteria",
            )
        return self


class RaiseBudget(Request):
    """A request to add `tokens` to the story's token budget."""

    tokens: Tokens
    actor: Actor
    role: Role
    proof: Proof = ""


class Rebase(Request):
    """A request to merge the repository's base branch into the story's branch."""

    actor: Actor
    role: Role
    proof: Proof = ""


class StoryRuns(Model):
    """The numbers that earlier runs of a story have used.

    A story id can be used again after its end (docs/design/0009-story-ids-used-again.md).

    Attributes:
        councils: the state's name in lower case -> the highest number of its deliberations.
    """

    plans: int = 0
    councils: dict[str, int] = {}


class Move(Model):
    """A transition that leaves the current state, and what blocks it."""

    event: str
    to: str
    kind: Literal["gate", "rejection", "automatic"]
    roles: list[str] = []
    blocked_by: list[str] = []


class StoryView(Model):
    """The answer to the query `state` and to every update."""

    story_id: str
    title: str
    state: str
    pending_gate: str = ""
    gate_role: str = ""
    open_gates: dict[str, str] = {}
    """Every open gate and the role that opens it; `pending_gate` is the first one."""
    revision: str = ""
    rigor: str
    dor_score: int = 0
    findings: list[Finding] = []
    plan_id: str = ""
    report: ReportScore | None = None
    working_on: str = ""
    child: str = ""
    """The workflow id of the current deliberation or plan; empty if there is none."""
    token_budget: int | None = None
    tokens_used: int = 0
    cancelled: bool = False
    branch: BranchView | None = None
    """Of the story's repository; None without one."""
    acceptance: Acceptance | None = None
    """Which criteria are proved; None without a repository, and until the tests were run."""


class TimelineEntry(Model):
    """One line of the story's timeline. `at`: ISO 8601. `via`: how the actor is known."""

    at: str
    event: str
    actor: str = ""
    via: Via = ""
    text: str = ""


class StoryResult(Model):
    """The final state of a story."""

    story_id: str
    state: str
    decisions: list[RecordedDecision] = []
    tokens_used: int = 0
    branch: BranchView | None = None
