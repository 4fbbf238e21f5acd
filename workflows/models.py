"""Messages between clients, workflows and activities, and the ids that they share.

Every model is frozen. A `Request` comes from outside: unknown fields are rejected, and the error
names the field, the rule and the remedy. A `Wire` model comes from a history or from the product's
own code: a new field has a default, and no field is renamed while a history holds it
(docs/design/0012-unreadable-inputs.md).
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    StringConstraints,
    ValidationError,
    model_validator,
)
from temporalio.exceptions import ApplicationError

from workflows.ids import ID_RULE, Id, LongId, Role, decode_id, encode_id

INVALID_INPUT = "InvalidInput"

NOT_UNDERSTOOD = "not_understood"
"""The signal that replaces an unknown or malformed one, with its name and the reason."""

Title = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=300)]
Line = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=4_000)]
Actor = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
Rigor = Literal["L0", "L1", "L2", "L3"]
AgentType = Literal["RAY_VLLM", "VLLM", "NATS"]


class Wire(BaseModel):
    """A frozen model that a history may hold; unknown fields are dropped."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Part(BaseModel):
    """A frozen part of a request; unknown fields are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Request(Part):
    """A frozen model that comes from outside.

    Raises:
        ApplicationError: type `InvalidInput`, not retryable, one line for each wrong field.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_clearly(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(value)
        except ValidationError as error:
            raise invalid_input(cls.__name__, error) from None


_REMEDIES = {
    "extra_forbidden": "unknown field; remove it or correct its name",
    "json_invalid": "is not JSON ({error}); send one JSON value in UTF-8",
    "model_type": "must be a JSON object; send {{...}}",
    "missing": "required; add it",
    "string_pattern_mismatch": f"must match {{pattern}}; an id is {ID_RULE}",
}


class InvalidInput(ApplicationError):
    """A rejected request.

    Attributes:
        problems: each wrong field with its rule; lost when Temporal serialises the error.
    """

    def __init__(self, what: str, problems: list[tuple[str, str]]) -> None:
        lines = "; ".join(f"{field}: {rule}" for field, rule in problems)
        super().__init__(f"{what} refused. {lines}"[:2000], type=INVALID_INPUT, non_retryable=True)
        self.problems = problems


def invalid_input(what: str, error: ValidationError) -> InvalidInput:
    """Build a rejected request's error: each wrong field with its rule, cut to 2,000 characters."""
    problems = []
    for problem in error.errors(include_url=False, include_input=False):
        field = ".".join(str(part) for part in problem["loc"]) or "(the whole)"
        # Only our own texts are templates: pydantic's messages contain what was sent.
        remedy = _REMEDIES.get(problem["type"])
        rule = remedy.format(**problem.get("ctx", {})) if remedy else problem["msg"]
        problems.append((field, rule))
    return InvalidInput(what, problems)


def content_hash(content: Any) -> str:
    """Return the first 16 hex digits of SHA-256 over canonical JSON."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


# --- ids ----------------------------------------------------------------------------------------


# The parts that come from outside are encoded: see `workflows.ids`.


def story_workflow_id(story_id: str) -> str:
    return f"story-{encode_id(story_id)}"


def story_of(workflow_id: str) -> str:
    """Return the story id that a story's workflow id contains."""
    return decode_id(workflow_id.removeprefix("story-"))


def plan_workflow_id(story_id: str, plan_id: str) -> str:
    return f"plan-{encode_id(story_id)}-{encode_id(plan_id)}"


def coach_workflow_id(request_id: str) -> str:
    return f"coach-{encode_id(request_id)}"


def deliberation_workflow_id(task_id: str) -> str:
    return f"deliberation-{encode_id(task_id)}"


def task_of(workflow_id: str) -> str:
    """Return the task id that a deliberation's workflow id contains."""
    return decode_id(workflow_id.removeprefix("deliberation-"))


def derivation_workflow_id(story_id: str, plan_id: str) -> str:
    """Return the workflow id of a derivation.

    The dot, which no encoded id contains, keeps the plans of two stories apart.
    """
    return f"derivation-{encode_id(story_id)}.{encode_id(plan_id)}"


def former_derivation_workflow_id(story_id: str, plan_id: str) -> str:
    """Return a derivation's workflow id in the form that older histories and clients use."""
    return f"derivation-{encode_id(story_id)}-{encode_id(plan_id)}"


def context_workflow_id(story_id: str, request_id: str) -> str:
    return f"context-{encode_id(story_id)}-{encode_id(request_id)}"


def closure_workflow_id(story_id: str, run_id: str) -> str:
    return f"closure-{encode_id(story_id)}-{encode_id(run_id)}"


def event_id(workflow_id: str, run_id: str, sequence: int) -> str:
    """Return the CloudEvents id: a pure function of workflow id, run and sequence number."""
    return f"{workflow_id}/{run_id}/{sequence}"


def run_after_reset(run_id: str, seed: int) -> str:
    """Return the name that a run has in ids from the point where it was reset.

    Args:
        run_id: the first run.
        seed: the random seed of the run that starts at the reset, which Temporal derives from that
            run's id. Unlike the id, it is known to every later run that continues from here.
    """
    return f"{run_id}-{seed:016x}"


# --- usage --------------------------------------------------------------------------------------


class CallUsage(Wire):
    """The cost of one LLM call, answered or failed."""

    act: str
    agent_id: str
    role: str
    model: str
    tokens_in: int = 0
    tokens_out: int = 0
    cached_tokens: int = 0
    latency_ms: int = 0
    seed: int = 0
    asks: int = 1
    """Number of requests to the model: more than 1 if an answer was cut off or did not parse."""
    prompt_hash: str = ""
    estimated: bool = False
    """True if tokens that the endpoint did not report are computed from the text."""

    @property
    def tokens(self) -> int:
        return self.tokens_in + self.tokens_out


class UsageLine(Wire):
    """Calls, tokens and seconds of one phase, role and model.

    Attributes:
        estimated: True if some of the tokens are estimated.
    """

    phase: str
    role: str
    model: str
    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    estimated: bool = False


# --- the story's requests -----------------------------------------------------------------------


class StoryText(Wire):
    """The text that a person wrote and that `approve_scope` approves."""

    title: str
    brief: str = ""
    acceptance_criteria: list[str] = []


class StoryInput(Request):
    """The input of StoryWorkflow."""

    story_id: Id
    title: Title
    brief: str = ""
    acceptance_criteria: list[Line] = Field(default=[], max_length=100)
    rigor: Rigor = "L1"
    created_by: Actor = "unknown"
    approvals: Literal["human", "auto"] = "human"
    token_budget: int | None = Field(default=None, gt=0)
    carried: dict[str, Any] | None = None
    """State of the previous run. Only continue-as-new may set it; others are rejected."""


class Approve(Request):
    """A request to open a gate. `revision`: the content hash that the gate showed."""

    gate: Line
    actor: Actor
    role: Role
    comment: str = Field(default="", max_length=4_000)
    revision: Annotated[str | None, AfterValidator(lambda text: (text or "").strip() or None)] = (
        None
    )


class Reject(Request):
    """A request to take a rejection transition; its reason is context for the next deliberation."""

    event: Line
    actor: Actor
    role: Role
    reason: Line


class Amend(Request):
    """A request to change the story's text. After `approve_scope`, that gate opens again."""

    title: Title | None = None
    brief: str | None = None
    acceptance_criteria: list[Line] | None = Field(default=None, max_length=100)
    actor: Actor = "unknown"

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if self.title is None and self.brief is None and self.acceptance_criteria is None:
            # Outside of `_refuse_clearly`, which has already validated the fields.
            raise ApplicationError(
                "Amend refused. Give at least one of title, brief, acceptance_criteria",
                type=INVALID_INPUT,
                non_retryable=True,
            )
        return self


class RaiseBudget(Request):
    """A request to add `tokens` to the story's token budget."""

    tokens: int = Field(gt=0)
    actor: Actor
    role: Role


Count = Annotated[int, Field(ge=0, strict=True)]


class BuildResult(Part):
    """The result of the workspace's build. `why`: what failed, in one line."""

    ok: bool
    why: str = Field(default="", max_length=1000)


class UnitResult(Part):
    """The results of the unit tests.

    Attributes:
        coverage: coverage of the new code, in percent.
        why: the first failure, in one line.
    """

    ok: bool
    passed: Count
    failed: Count
    coverage: float = Field(ge=0, le=100)
    why: str = Field(default="", max_length=1000)


class SonarResult(Part):
    """The findings of static analysis in the new code."""

    project_key: str = ""
    quality_gate: Literal["OK", "WARN", "ERROR", "NONE"]
    new_critical: Count
    new_major: Count


class StaticResult(Part):
    """The results of static analysis and linting.

    Attributes:
        lint_errors: None if no linter ran; `ok` then decides.
    """

    ok: bool
    sonar: SonarResult
    lint_errors: Count | None = None


class E2EResult(Part):
    """The results of the end-to-end tests; both counts are 0 if there are none."""

    ok: bool
    passed: Count
    failed: Count


class PRResult(Part):
    """The pull request, if there is one."""

    url: str = ""


class Timings(Part):
    """The time that the workspace took."""

    total_ms: Count = 0


class WorkspaceReport(Request):
    """The measurements of a workspace: shared/contracts/workspace.proto as JSON."""

    job_id: Line
    commit: str = Field(default="", max_length=200)
    build: BuildResult
    unit: UnitResult
    static: StaticResult
    e2e: E2EResult
    pr: PRResult = PRResult()
    timings: Timings = Timings()


class DecisionAdded(Request):
    """A decision from outside or from a sibling deliberation."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    decision_id: Line
    title: Line
    rationale: str = ""
    decided_by: str = "unknown"
    withdrawn: bool = False
    """True if it was deleted: agents that know of it are notified that it no longer holds."""


class MilestoneReached(Request):
    """A milestone of a story from outside, for its agents and its timeline."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    milestone_id: Line
    event_type: Line
    description: str = ""


class DecisionsAdded(Request):
    """Several decisions in one signal: new ones, corrections of earlier ones, and withdrawals."""

    decisions: list[DecisionAdded] = Field(max_length=1_000)


class MilestonesAdded(Request):
    """Several milestones in one signal."""

    milestones: list[MilestoneReached] = Field(max_length=1_000)


# --- the process: configuration, pinned in a history at its start -------------------------------


class Transition(Wire):
    """One row of the state machine. `roles`: who may take a rejection; otherwise empty."""

    source: str
    event: str
    target: str
    guards: list[str] = []
    roles: list[str] = []


class StateSpec(Wire):
    """A state and the work that the fleet does when it enters the state."""

    name: str
    work: Literal["none", "readiness", "design", "plan", "deliberation"] = "none"
    role: str = ""
    task: str = ""
    """The question to the council, for kinds of work that deliberate."""
    rubric: str = ""


class GuardSpec(Wire):
    """A guard of the state machine. `role`: set for a human guard, empty for a computed one."""

    name: str
    role: str = ""


class Machine(Wire):
    """The validated state machine of deploy/config/agile.fsm.yaml."""

    initial: str
    final: str
    states: list[StateSpec]
    guards: list[GuardSpec]
    gates: list[str]
    transitions: list[Transition]


class RigorLevel(Wire):
    """The thresholds and weights of one rigor level (deploy/config/rigor.yaml)."""

    dor_threshold: int
    weights: dict[str, float]
    """Weights of build, unit, static, e2e, coverage and lint; they sum to 1."""
    unit_pass_rate: float
    coverage: float
    quality_gates: list[str]
    max_critical: int
    max_major: int | None
    e2e_pass_rate: float
    max_lint_errors: int


class Process(Wire):
    """The configuration that a story's run depends on, read once at its start."""

    machine: Machine
    rigor: RigorLevel
    version: str
    """Content hash of the configuration files."""
    deliberation_timeout: float | None = None
    """Time limit of each deliberation in seconds; None: one hour."""


# --- readiness and report -----------------------------------------------------------------------


class Finding(Wire):
    """A finding that costs readiness points.

    Attributes:
        code: AC_MISSING, TITLE_VALUE, SMALL, AMBIGUOUS or DEPS.
        weight: the points that it costs.
    """

    code: str
    message: str
    weight: int


class Readiness(Wire):
    """The Definition of Ready score: a total from 0 to 100 and the findings that cost points."""

    total: int
    findings: list[Finding] = []


class ReportScore(Wire):
    """The score of a workspace report by rigor. `score`: 0 to 100."""

    score: int
    rigor: str
    gating_decision: Literal["pass", "warn", "block"]
    dimensions: dict[str, float] = {}
    reasons: list[str] = []


# --- councils, context, agents ------------------------------------------------------------------


class Agent(Wire):
    """An agent of a council. `model` empty: the default. `persona`: its point of view."""

    agent_id: str
    role: str
    agent_type: AgentType = "RAY_VLLM"
    model: str = ""
    persona: str = ""


class CouncilQuery(Wire):
    """A query for a council. `size`: None for all of its agents."""

    role: str
    size: int | None = None


class Council(Wire):
    """A council with its agents, in the order of their ids."""

    council_id: str
    role: str
    agents: list[Agent]
    judge: Agent | None = None
    """The ARCHITECT who judges near ties; None if the fleet has none."""
    roles: list[str] = []
    """The roles of all existing councils, to which a plan's tasks can be assigned."""
    rounds: int = 0
    """Default number of review rounds; 0: the default of DeliberationInput."""


class PackQuery(Wire):
    """A query for a context pack. `token_budget` 0: the default of deploy/config/scopes.yaml."""

    story_id: str
    role: str
    phase: str
    subtask_id: str = ""
    token_budget: int = 0
    known: bool = False
    """True if the story's start was recorded. A graph that does not have it has lost the story."""


class ContextPack(Wire):
    """A context pack: three blocks and the hash of their content."""

    system: str = ""
    context: str = ""
    tools: str = ""
    scopes: list[str] = []
    token_count: int = 0
    version: str = ""


class Task(Wire):
    """The task that a council works on."""

    task_id: str
    story_id: str = ""
    role: str
    phase: str = ""
    description: str
    rubric: str = ""
    requirements: list[str] = []
    feedback: list[str] = []
    """Reasons of the rejections that returned the story to this state, newest last."""


class Decision(Wire):
    """A decision of a proposal. `affects`: titles or ids of the affected items."""

    title: str
    rationale: str = ""
    affects: list[str] = []


class Proposal(Wire):
    """An agent's structured answer. `content` is Markdown, code in fenced blocks."""

    approach: str
    content: str
    decisions: list[Decision] = []


class CritiquePoint(Wire):
    """One point of a critique."""

    severity: Literal["low", "medium", "high"]
    text: str


class Critique(Wire):
    """One agent's critique of another's proposal."""

    verdict: Literal["accept", "revise", "reject"]
    points: list[CritiquePoint] = []
    suggestion: str = ""


class AgentCall(Wire):
    """The common input of every LLM call.

    Attributes:
        wave: with workflow, run and agent, it forms the call's key.
    """

    task: Task
    agent: Agent
    pack: ContextPack
    wave: int
    late_decisions: list[DecisionAdded] = []
    """Decisions that arrived while the deliberation ran."""
    late_milestones: list[MilestoneReached] = []
    """Milestones that arrived while the deliberation ran."""


class ProposeInput(AgentCall):
    """The input of a call that asks for a proposal."""


class CriticiseInput(AgentCall):
    """The input of a call that asks for a critique of the proposal by `author_id`."""

    author_id: str
    proposal: Proposal


class ReviseInput(AgentCall):
    """The input of a call that asks for a revision based on the critiques."""

    proposal: Proposal
    critiques: list[Critique]


class Contender(Wire):
    """A proposal in a near tie."""

    agent_id: str
    score: float
    proposal: Proposal


class JudgeInput(AgentCall):
    """The input of a call that asks a judge to choose between near ties."""

    contenders: list[Contender]


class Verdict(Wire):
    """The judge's choice and its reason."""

    winner_id: str
    reason: str


class DerivePlanInput(AgentCall):
    """The input of a call that asks `agent` to split the winning design into tasks.

    Attributes:
        roles: the councils that exist.
    """

    design: Proposal
    roles: list[str]


class WriteStoryInput(AgentCall):
    """The input of a call that asks for a story for `goal`, or for a better version of `story`.

    Attributes:
        findings: what cost `story` points.
    """

    goal: str = ""
    story: StoryText | None = None
    findings: list[Finding] = []


class PlannedTask(Wire):
    """A task of a plan. `depends_on`: task ids in the same plan. priority: 1 is first."""

    task_id: str
    role: str
    title: str
    description: str
    depends_on: list[str] = []
    priority: int = 1


class DraftTask(Wire):
    """A task as the decoder writes it. `depends_on`: numbers of earlier tasks, starting at 1."""

    role: str
    title: str
    description: str
    depends_on: list[int] = []
    priority: int = 1


class ProposalAnswer(Wire):
    """A proposal and its cost."""

    proposal: Proposal
    usage: CallUsage


class CritiqueAnswer(Wire):
    """A critique and its cost."""

    critique: Critique
    usage: CallUsage


class JudgeAnswer(Wire):
    """A verdict and its cost."""

    verdict: Verdict
    usage: CallUsage


class DerivePlanAnswer(Wire):
    """The drafts of a plan's tasks and their cost."""

    tasks: list[DraftTask]
    usage: CallUsage


class WriteStoryAnswer(Wire):
    """A story written by an agent, and its cost."""

    story: StoryText
    usage: CallUsage


# --- checks and ranking -------------------------------------------------------------------------


class CheckInput(Wire):
    """A proposal to check, and the agent that wrote it."""

    agent_id: str
    proposal: Proposal


class Check(Wire):
    """The result of one check of one proposal.

    Attributes:
        score: 0 to 1; None if the check did not apply or could not run.
    """

    name: Literal["policy", "lint", "dry_run"]
    outcome: Literal["passed", "failed", "not_checked", "not_applicable"]
    score: float | None = None
    blocking: bool = False
    findings: list[str] = []
    errors: int = 0
    warnings: int = 0
    output: str = ""
    exit_code: int | None = None


class CheckReport(Wire):
    """The checks of a proposal, and the weights from deploy/config/checks.yaml."""

    checks: list[Check]
    weights: dict[str, float]


class RankedProposal(Wire):
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


class FailedAgent(Wire):
    """An agent that was left out, in which act, and why."""

    agent_id: str = Field(description="The agent that failed")
    act: str = Field(description="What it was asked to do")
    cause: str = Field(description="Why it failed")


# --- deliberation -------------------------------------------------------------------------------


class DeliberationInput(Request):
    """The input of DeliberationWorkflow.

    Attributes:
        timeout: in seconds.
        agents: None for all agents of the council.
    """

    task_id: LongId
    story_id: Id | None = None
    role: Role
    description: str = Field(min_length=1)
    rubric: str = ""
    requirements: list[str] = []
    rounds: int = Field(default=1, ge=0, le=10)
    agents: int | None = Field(default=None, ge=1, le=50)
    timeout: float = Field(default=300, gt=0, le=86_400)
    phase: str = "BUILD"
    feedback: list[str] = []
    plan_id: str = ""
    outbox_workflow_id: str = ""
    """The story's workflow, which publishes for its children; empty: publish from this workflow."""
    ask_for_budget: bool = False
    """True if the story has a token budget: each wave then waits until the story grants it."""
    decisions: list[DecisionAdded] = []
    judged: bool = True
    """False: a rule decides near ties, without an architect."""
    background: str = ""
    """Text that the agents get after their context pack."""


class RecordedDecision(Wire):
    """A winner's decision as the graph and the events hold it."""

    id: str = Field(description="The decision")
    type: str = Field("DESIGN", description="What kind of decision it is")
    title: str = Field(description="The decision in a line")
    rationale: str = Field("", description="Why it was decided so")
    affected_subtask: str = Field("", description="The task that it is about; else empty")
    affects: list[str] = Field([], description="What it touches, in the agent's words")


class DeliberationResult(Wire):
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


class Progress(Wire):
    """The answer to the query `progress`: the current wave and who has answered in it."""

    status: str
    wave: str
    round: int = 0
    answered: list[str] = []
    waiting: list[str] = []
    failed: list[FailedAgent] = []
    tokens: int = 0


class DeliberationRecord(Wire):
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


# --- plan ---------------------------------------------------------------------------------------


class Plan(Wire):
    """A version of a story's plan."""

    plan_id: str
    story_id: str
    version: int = 1
    tasks: list[PlannedTask]


class PlanInput(Request):
    """The input of PlanWorkflow.

    Attributes:
        tasks: None to load them from the graph, or to derive them if it has none.
        roles: the councils that deliberate, once each, if the graph has neither tasks nor the
            story.
        task_timeout: time limit of each task's deliberation in seconds; None: one hour.
    """

    story_id: Id
    plan_id: LongId
    tasks: list[PlannedTask] | None = None
    phase: str = "BUILD"
    feedback: list[str] = []
    outbox_workflow_id: str = ""
    ask_for_budget: bool = False
    decisions: list[DecisionAdded] = []
    task_timeout: float | None = Field(default=None, gt=0, le=86_400)
    roles: list[Role] = Field(default=[], max_length=60)


class TaskOutcome(Wire):
    """The outcome of one task of a plan. Status `not_run`: a task that it depends on failed."""

    task_id: str
    role: str
    title: str
    status: Literal["done", "failed", "not_run"]
    winner_id: str = ""
    score: float = 0.0
    decisions: list[RecordedDecision] = []
    error: str = ""
    usage: list[CallUsage] = []


class PlanResult(Wire):
    """The outcome of a plan.

    Attributes:
        status: COMPLETED: every task is done; PARTIAL: not all are; NOTHING_TO_RUN: there were
            none.
    """

    plan_id: str
    story_id: str
    status: Literal["COMPLETED", "PARTIAL", "NOTHING_TO_RUN"]
    outcomes: list[TaskOutcome] = []


class PlanQuery(Wire):
    """A query for a plan in the graph."""

    story_id: str
    plan_id: str


class DerivationInput(Request):
    """The input of DerivationWorkflow. `announce`: whether each task is also published."""

    story_id: Id
    plan_id: Annotated[Id, StringConstraints(max_length=96)]
    """The ids of its tasks, which are ids too, are up to four characters longer."""
    phase: str = "BUILD"
    announce: bool = False


class DerivationResult(Wire):
    """The tasks of a plan, at least one."""

    story_id: str
    plan_id: str
    tasks: list[PlannedTask]


class StoredPlan(Wire):
    """The graph's content for a plan: its tasks, or else its story's text, or neither."""

    tasks: list[PlannedTask] = []
    story: StoryText | None = None


class WaveRequest(Wire):
    """A child's request to its story to grant a wave. `usage`: all of the child's calls so far."""

    workflow_id: str
    wave: str
    usage: list[CallUsage]


class ChildRun(Wire):
    """A run of a deliberation or plan whose story has continued as new since it started."""

    workflow_id: str
    run_id: str


class StoryRuns(Wire):
    """The numbers that earlier runs of a story have used.

    A story id can be used again after its end (docs/design/0009-story-ids-used-again.md).

    Attributes:
        councils: the state's name in lower case -> the highest number of its deliberations.
    """

    plans: int = 0
    councils: dict[str, int] = {}


# --- the context's updates ----------------------------------------------------------------------

UNKNOWN_STORY = "UnknownStory"
REQUEST_REUSED = "RequestReused"


class ContextChange(Wire):
    """One change as requested; it is validated where it is stored. `payload`: a JSON object."""

    operation: str = ""
    entity_type: str = ""
    entity_id: str = ""
    payload: str = ""
    reason: str = ""


class PhaseChange(Wire):
    """A story's move from one phase to another, made outside any workflow."""

    from_phase: str
    to_phase: str
    event: str
    reason: str = ""


class ContextUpdate(Request):
    """The input of ContextUpdateWorkflow. `actor`: the requester. `timestamp`: empty for now."""

    story_id: Id
    task_id: LongId | None = None
    role: str = Field(default="", max_length=100)
    actor: Actor
    changes: list[ContextChange] = Field(default=[], max_length=1_000)
    timestamp: str = Field(default="", max_length=100)
    if_absent: bool = False
    """True: nothing is stored or published if the graph knows the story."""
    phase_change: PhaseChange | None = None
    """The move to publish with the changes, if they are stored."""
    changed: list[str] = []
    """Entity types that the story's workflow has already changed; the update publishes them."""


def request_hash(update: ContextUpdate) -> str:
    """Return a hash by which a repeated request is recognised.

    Fields that were added later are left out if they have their default: histories hold hashes
    without them.
    """
    later = {"if_absent", "phase_change", "changed"}
    said = update.model_dump(exclude=later) | update.model_dump(
        include=later, exclude_defaults=True
    )
    return content_hash(said)


class ContextWrite(Wire):
    """An update to store.

    Attributes:
        update_id: the key of the update; a second write under the same key stores nothing.
        at: the time of the changes, ISO 8601.
        started_ms: distinguishes two updates with the same time.
    """

    update_id: str
    at: str
    started_ms: int
    update: ContextUpdate


class ContextAnswer(Wire):
    """The result of an update. `changed`: entity types. `warnings`: one per rejected change."""

    version: int
    hash: str
    warnings: list[str] = []
    changed: list[str] = []
    decisions: list[DecisionAdded] = []
    milestones: list[MilestoneReached] = []
    after: str = ""
    """The workflow that publishes the previous version; empty if none is known."""


# --- coaching -----------------------------------------------------------------------------------


class CoachInput(Request):
    """The input of CoachWorkflow: either a goal to write a story for, or a story to improve."""

    goal: str = Field(default="", max_length=4_000)
    story: StoryText | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if bool(self.goal.strip()) == (self.story is not None):
            # Outside of `_refuse_clearly`, which has already validated the fields.
            raise InvalidInput("CoachInput", [("goal", "give a goal or a story, and not both")])
        return self


class CoachResult(Wire):
    """The story to use. `reason`: why the original is returned, if no better one was written."""

    story: StoryText
    readiness: Readiness
    original: Readiness | None = None
    reason: str = ""
    usage: list[CallUsage] = []


# --- views --------------------------------------------------------------------------------------


class Move(Wire):
    """A transition that leaves the current state, and what blocks it."""

    event: str
    to: str
    kind: Literal["gate", "rejection", "automatic"]
    roles: list[str] = []
    blocked_by: list[str] = []


class StoryView(Wire):
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


class TimelineEntry(Wire):
    """One line of the story's timeline. `at`: ISO 8601."""

    at: str
    event: str
    actor: str = ""
    text: str = ""


class StoryResult(Wire):
    """The final state of a story."""

    story_id: str
    state: str
    decisions: list[RecordedDecision] = []
    tokens_used: int = 0
