"""A deliberation: what starts it, its checks, its progress, its result and its record."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workflows.models.agents import MAX_AGENTS, MAX_ROUNDS, CallUsage, Critique, Proposal
from workflows.models.base import Model, Request
from workflows.models.context import DecisionAdded
from workflows.models.ids import Id, LongId, Role, WorkflowId
from workflows.models.measurement import Measurement
from workflows.models.report import ReportScore
from workflows.models.workspace import Change, RepositoryWork


class CheckInput(Model):
    """A proposal to check, and the agent that wrote it.

    Attributes:
        task: what the proposal is for; empty: not known.
        about: what it has to be about; empty: `task`.
    """

    agent_id: str
    proposal: Proposal
    task: str = ""
    about: str = ""


class Check(Model):
    """The result of one check of one proposal.

    Attributes:
        score: 0 to 1; None if the check did not apply or could not run.
    """

    name: str = Field(min_length=1, max_length=64)
    outcome: Literal["passed", "failed", "not_checked", "not_applicable"]
    score: float | None = None
    blocking: bool = False
    findings: list[str] = []
    errors: int = 0
    warnings: int = 0
    output: str = ""
    exit_code: int | None = None


class CheckReport(Model):
    """The checks of a proposal, and the weights from deploy/config/checks.yaml."""

    checks: list[Check]
    weights: dict[str, float]


class CouncilCheckInput(Model):
    """The proposals of a council to check.

    Attributes:
        proposals: by the agent that wrote each.
        task: what they are for; empty: not known.
        about: what they have to be about; empty: `task`.
    """

    proposals: dict[str, Proposal]
    task: str = ""
    about: str = ""


class CouncilCheckReport(Model):
    """The checks of each proposal by its agent, and the weights from deploy/config/checks.yaml."""

    checks: dict[str, list[Check]]
    weights: dict[str, float]

    def of(self, agent_id: str) -> CheckReport:
        """Return the report on an agent's proposal."""
        return CheckReport(checks=self.checks[agent_id], weights=self.weights)


class RankedProposal(Model):
    """A proposal with its rank.

    Attributes:
        score: 0 to 1.
        rank: 1 is the winner; barred proposals come last.
    """

    proposal_id: str
    agent_id: str
    role: str
    proposal: Proposal
    drafts: list[str] = []
    """Contents of the earlier revisions, oldest first."""
    critiques: list[Critique] = []
    critics: list[str] = []
    checks: list[Check] = []
    score: float
    rank: int
    barred: bool = False
    prompt_hash: str = ""
    model: str = ""
    created_at_ms: int = 0
    change: Change | None = None
    """What it changes in the repository, if the council works in one."""
    measurement: Measurement | None = None
    scored: ReportScore | None = None
    """The measurement's score by rigor."""


class FailedAgent(Model):
    """An agent that was left out, in which act, and why."""

    agent_id: str = Field(description="The agent that failed")
    act: str = Field(description="What it was asked to do")
    cause: str = Field(description="Why it failed")


class DeliberationInput(Request):
    """The input of DeliberationWorkflow.

    Attributes:
        subject: what the task is about, if `description` also says how to work; empty:
            `description` itself.
        timeout: in seconds.
        agents: None for all agents of the council.
    """

    task_id: LongId
    story_id: Id | None = None
    role: Role
    description: str = Field(min_length=1)
    subject: str = ""
    rubric: str = ""
    requirements: list[str] = []
    rounds: int = Field(default=1, ge=0, le=MAX_ROUNDS)
    agents: int | None = Field(default=None, ge=1, le=MAX_AGENTS)
    timeout: float = Field(default=300, gt=0, le=86_400)
    phase: str = "BUILD"
    feedback: list[str] = []
    plan_id: str = ""
    outbox_workflow_id: str = ""
    """The story's workflow, which publishes for its children; empty: publish from this workflow."""
    announced: bool = False
    """True: the workflow that starts it announces the start, and the event of the last round comes
    with the result, also if a judge is asked before."""
    ask_for_budget: bool = False
    """True if the story has a token budget: each wave then waits until the story grants it."""
    decisions: list[DecisionAdded] = []
    judged: bool = True
    """False: a rule decides near ties, without an architect."""
    background: str = ""
    """Text that the agents get after their context pack."""
    actor: str = ""
    """The caller of gRPC who asks, whose quota its tokens count for; empty: a story or plan."""
    work: RepositoryWork | None = None
    """None: the council deliberates in Markdown."""
    attempt: int = Field(default=1, ge=1)
    """Which try this is, if the work of a story's state has failed before."""
    visit: int = Field(default=0, ge=0)
    """The story's visit of the state that it works for; 0: it works for no story."""


class RecordedDecision(Model):
    """A winner's decision as the graph and the events hold it."""

    id: str = Field(description="The decision")
    type: str = Field("DESIGN", description="What kind of decision it is")
    title: str = Field(description="The decision in a line")
    rationale: str = Field("", description="Why it was decided so")
    affected_subtask: str = Field("", description="The task that it is about; else empty")
    affects: list[str] = Field([], description="What it touches, in the agent's words")


class DeliberationResult(Model):
    """The outcome of a deliberation; `ranked` is empty if it failed."""

    task_id: str
    deliberation_id: str
    story_id: str = ""
    role: str
    status: Literal["completed", "failed"]
    winner_id: str = ""
    score: float = 0.0
    winner: Proposal | None = None
    judged: str = ""
    """The architect's reason, or the rule, if a near tie was decided."""
    decisions: list[RecordedDecision] = []
    ranked: list[RankedProposal] = []
    failed_agents: list[FailedAgent] = []
    error: str = ""
    usage: list[CallUsage] = []
    duration_ms: int = 0
    change: Change | None = None
    """The winner's, if the council works in a repository."""
    measurement: Measurement | None = None
    """Of the winner's change."""


class Progress(Model):
    """The answer to the query `progress`: the current wave and who has answered in it."""

    status: str
    wave: str
    round: int = 0
    answered: list[str] = []
    waiting: list[str] = []
    failed: list[FailedAgent] = []
    tokens: int = 0


class DeliberationRecord(Model):
    """Everything that the graph keeps of a finished deliberation, with its provenance."""

    story_id: str = ""
    plan_id: str = ""
    task_id: str
    deliberation_id: str
    run_id: str
    role: str
    phase: str
    ranked: list[RankedProposal]
    winner_id: str
    judged: str = ""
    failed_agents: list[FailedAgent] = []
    decisions: list[RecordedDecision] = []
    timestamp: str


class WaveRequest(Model):
    """A child's request to its story to grant a wave.

    Attributes:
        usage: all of the child's calls so far.
        visit: the story's visit that the child works for; 0: the current one.
        phase: the state of that visit.
    """

    workflow_id: WorkflowId
    wave: str
    usage: list[CallUsage]
    visit: int = 0
    phase: str = ""


class ChildRun(Model):
    """A run of a deliberation or plan whose story has continued as new since it started."""

    workflow_id: str
    run_id: str
