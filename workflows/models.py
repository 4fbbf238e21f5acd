"""What crosses the wire between clients, workflows and activities, and the ids they share.

Every model is frozen. A `Request` comes from outside: unknown fields are refused, and a refusal
names the field, the rule and the remedy. A `Wire` model comes from a history or from our own code:
a new field has a default, and none is renamed while a history holds it (design sections 3 and 5).
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
"""The signal in whose place an unknown or malformed one comes, with its name and the reason."""

Title = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=300)]
Line = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=4_000)]
Actor = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
Rigor = Literal["L0", "L1", "L2", "L3"]
AgentType = Literal["RAY_VLLM", "VLLM", "NATS"]


class Wire(BaseModel):
    """A frozen model that a history may hold; fields it does not know are dropped."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Part(BaseModel):
    """A frozen part of a request; unknown fields are refused."""

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
    """A refused request. `problems`: each wrong field with its rule; lost on Temporal's wire."""

    def __init__(self, what: str, problems: list[tuple[str, str]]) -> None:
        lines = "; ".join(f"{field}: {rule}" for field, rule in problems)
        super().__init__(f"{what} refused. {lines}"[:2000], type=INVALID_INPUT, non_retryable=True)
        self.problems = problems


def invalid_input(what: str, error: ValidationError) -> InvalidInput:
    """The refusal of a request: each wrong field with its rule, cut to 2,000 characters."""
    problems = []
    for problem in error.errors(include_url=False, include_input=False):
        field = ".".join(str(part) for part in problem["loc"]) or "(the whole)"
        # Only our own words are a template: a message of pydantic's holds what was sent.
        remedy = _REMEDIES.get(problem["type"])
        rule = remedy.format(**problem.get("ctx", {})) if remedy else problem["msg"]
        problems.append((field, rule))
    return InvalidInput(what, problems)


def content_hash(content: Any) -> str:
    """The first 16 hex digits of SHA-256 over canonical JSON."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


# --- ids ----------------------------------------------------------------------------------------


# What comes from outside is encoded in them: see `workflows.ids`.


def story_workflow_id(story_id: str) -> str:
    return f"story-{encode_id(story_id)}"


def story_of(workflow_id: str) -> str:
    """The story's id in its workflow's."""
    return decode_id(workflow_id.removeprefix("story-"))


def plan_workflow_id(story_id: str, plan_id: str) -> str:
    return f"plan-{encode_id(story_id)}-{encode_id(plan_id)}"


def coach_workflow_id(request_id: str) -> str:
    return f"coach-{encode_id(request_id)}"


def deliberation_workflow_id(task_id: str) -> str:
    return f"deliberation-{encode_id(task_id)}"


def task_of(workflow_id: str) -> str:
    """The task's id in its deliberation's workflow id."""
    return decode_id(workflow_id.removeprefix("deliberation-"))


def derivation_workflow_id(story_id: str, plan_id: str) -> str:
    """The dot, which no encoded id has, keeps the plans of two stories apart."""
    return f"derivation-{encode_id(story_id)}.{encode_id(plan_id)}"


def former_derivation_workflow_id(story_id: str, plan_id: str) -> str:
    """The form under which histories of earlier versions, and clients of theirs, start one."""
    return f"derivation-{encode_id(story_id)}-{encode_id(plan_id)}"


def context_workflow_id(story_id: str, request_id: str) -> str:
    return f"context-{encode_id(story_id)}-{encode_id(request_id)}"


def closure_workflow_id(story_id: str, run_id: str) -> str:
    return f"closure-{encode_id(story_id)}-{encode_id(run_id)}"


def event_id(workflow_id: str, run_id: str, sequence: int) -> str:
    """The CloudEvents id: a pure function of workflow id, run and sequence number."""
    return f"{workflow_id}/{run_id}/{sequence}"


def run_after_reset(run_id: str, seed: int) -> str:
    """Names a run from where it was reset on, in ids.

    run_id: of the first run. seed: of the run that begins there, made of that run's own id by
    Temporal; unlike the id, every later run that goes on from here knows it.
    """
    return f"{run_id}-{seed:016x}"


# --- usage --------------------------------------------------------------------------------------


class CallUsage(Wire):
    """What one LLM call cost, answered or failed."""

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
    """How often the model was asked: 1, or more where an answer was cut off or did not parse."""
    prompt_hash: str = ""
    estimated: bool = False
    """Whether tokens that the endpoint did not state are computed from the text."""

    @property
    def tokens(self) -> int:
        return self.tokens_in + self.tokens_out


class UsageLine(Wire):
    """Calls, tokens and seconds of one phase, role and model; estimated: some of the tokens."""

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
    """What a person wrote: the thing that approve_scope approves."""

    title: str
    brief: str = ""
    acceptance_criteria: list[str] = []


class StoryInput(Request):
    """The input of StoryWorkflow (design section 3)."""

    story_id: Id
    title: Title
    brief: str = ""
    acceptance_criteria: list[Line] = Field(default=[], max_length=100)
    rigor: Rigor = "L1"
    created_by: Actor = "unknown"
    approvals: Literal["human", "auto"] = "human"
    token_budget: int | None = Field(default=None, gt=0)
    carried: dict[str, Any] | None = None
    """State of the run before this one. Set by continue-as-new only, refused from anyone else."""


class Approve(Request):
    """Open a gate. `revision`: the content hash that the gate showed."""

    gate: Line
    actor: Actor
    role: Role
    comment: str = Field(default="", max_length=4_000)
    revision: Annotated[str | None, AfterValidator(lambda text: (text or "").strip() or None)] = (
        None
    )


class Reject(Request):
    """Take a rejection transition; its reason goes into the next deliberation's context."""

    event: Line
    actor: Actor
    role: Role
    reason: Line


class Amend(Request):
    """Change the story's text. After approve_scope this opens that gate anew."""

    title: Title | None = None
    brief: str | None = None
    acceptance_criteria: list[Line] | None = Field(default=None, max_length=100)
    actor: Actor = "unknown"

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if self.title is None and self.brief is None and self.acceptance_criteria is None:
            # Outside of `_refuse_clearly`, which has judged the fields already.
            raise ApplicationError(
                "Amend refused. Give at least one of title, brief, acceptance_criteria",
                type=INVALID_INPUT,
                non_retryable=True,
            )
        return self


class RaiseBudget(Request):
    """Add `tokens` to the story's token budget."""

    tokens: int = Field(gt=0)
    actor: Actor
    role: Role


Count = Annotated[int, Field(ge=0, strict=True)]


class BuildResult(Part):
    """Whether the workspace built. `why`: what failed, in a line."""

    ok: bool
    why: str = Field(default="", max_length=1000)


class UnitResult(Part):
    """`coverage`: of the new code, in percent. `why`: the first failure, in a line."""

    ok: bool
    passed: Count
    failed: Count
    coverage: float = Field(ge=0, le=100)
    why: str = Field(default="", max_length=1000)


class SonarResult(Part):
    """What static analysis found in the new code."""

    project_key: str = ""
    quality_gate: Literal["OK", "WARN", "ERROR", "NONE"]
    new_critical: Count
    new_major: Count


class StaticResult(Part):
    """`lint_errors`: None where no linter ran; then `ok` stands for it."""

    ok: bool
    sonar: SonarResult
    lint_errors: Count | None = None


class E2EResult(Part):
    """The end-to-end tests; without any, none passed and none failed."""

    ok: bool
    passed: Count
    failed: Count


class PRResult(Part):
    """The pull request, where there is one."""

    url: str = ""


class Timings(Part):
    """How long the workspace took."""

    total_ms: Count = 0


class WorkspaceReport(Request):
    """What a workspace measured: shared/contracts/workspace.proto as JSON."""

    job_id: Line
    commit: str = Field(default="", max_length=200)
    build: BuildResult
    unit: UnitResult
    static: StaticResult
    e2e: E2EResult
    pr: PRResult = PRResult()
    timings: Timings = Timings()


class DecisionAdded(Request):
    """A decision from outside, or from a sibling deliberation."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    decision_id: Line
    title: Line
    rationale: str = ""
    decided_by: str = "unknown"
    withdrawn: bool = False
    """It was deleted: agents that know of it are told that it holds no longer."""


class MilestoneReached(Request):
    """Something that happened to a story outside, as its agents and its timeline are told."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    milestone_id: Line
    event_type: Line
    description: str = ""


class DecisionsAdded(Request):
    """Many decisions at once: new ones, corrections of earlier ones, and withdrawals."""

    decisions: list[DecisionAdded] = Field(max_length=1_000)


class MilestonesAdded(Request):
    """Many milestones at once."""

    milestones: list[MilestoneReached] = Field(max_length=1_000)


# --- the process: configuration, pinned in a history at its start -------------------------------


class Transition(Wire):
    """One row of the state machine. `roles`: who may take it by a rejection; empty otherwise."""

    source: str
    event: str
    target: str
    guards: list[str] = []
    roles: list[str] = []


class StateSpec(Wire):
    """A state and the work that the fleet does on entering it."""

    name: str
    work: Literal["none", "readiness", "design", "plan", "deliberation"] = "none"
    role: str = ""
    task: str = ""
    """What the council is asked, for the works that deliberate."""
    rubric: str = ""


class GuardSpec(Wire):
    """`role` is set for a human guard and empty for a computed one."""

    name: str
    role: str = ""


class Machine(Wire):
    """The state machine of deploy/config/agile.fsm.yaml, validated."""

    initial: str
    final: str
    states: list[StateSpec]
    guards: list[GuardSpec]
    gates: list[str]
    transitions: list[Transition]


class RigorLevel(Wire):
    """Thresholds and weights of one rigor level (deploy/config/rigor.yaml)."""

    dor_threshold: int
    weights: dict[str, float]
    """build, unit, static, e2e, coverage, lint: they sum to 1."""
    unit_pass_rate: float
    coverage: float
    quality_gates: list[str]
    max_critical: int
    max_major: int | None
    e2e_pass_rate: float
    max_lint_errors: int


class Process(Wire):
    """Everything a story's run depends on, read once at its start."""

    machine: Machine
    rigor: RigorLevel
    version: str
    """Content hash of the configuration files."""
    deliberation_timeout: float | None = None
    """Seconds that each of its deliberations gets; None: an hour."""


# --- readiness and report -----------------------------------------------------------------------


class Finding(Wire):
    """code: AC_MISSING, TITLE_VALUE, SMALL, AMBIGUOUS, DEPS. weight: points it costs."""

    code: str
    message: str
    weight: int


class Readiness(Wire):
    """The Definition of Ready: total 0 to 100, with what cost points."""

    total: int
    findings: list[Finding] = []


class ReportScore(Wire):
    """A workspace report, scored by rigor. score: 0 to 100."""

    score: int
    rigor: str
    gating_decision: Literal["pass", "warn", "block"]
    dimensions: dict[str, float] = {}
    reasons: list[str] = []


# --- councils, context, agents ------------------------------------------------------------------


class Agent(Wire):
    """A seat in a council. `model` empty: the default. `persona`: how it looks at things."""

    agent_id: str
    role: str
    agent_type: AgentType = "RAY_VLLM"
    model: str = ""
    persona: str = ""


class CouncilQuery(Wire):
    """`size` None: every agent of the council."""

    role: str
    size: int | None = None


class Council(Wire):
    """A council with its agents, in the order of their ids."""

    council_id: str
    role: str
    agents: list[Agent]
    judge: Agent | None = None
    """An ARCHITECT who judges near ties; None where the fleet has none."""
    roles: list[str] = []
    """The role of every council that there is: whom a plan's tasks may be given to."""
    rounds: int = 0
    """How often it reviews where nobody says; 0: as DeliberationInput has it."""


class PackQuery(Wire):
    """`token_budget` 0: the default of deploy/config/scopes.yaml."""

    story_id: str
    role: str
    phase: str
    subtask_id: str = ""
    token_budget: int = 0
    known: bool = False
    """True if the story's beginning was recorded: a graph without it has lost the story."""


class ContextPack(Wire):
    """A context pack: three blocks and the hash of their content."""

    system: str = ""
    context: str = ""
    tools: str = ""
    scopes: list[str] = []
    token_count: int = 0
    version: str = ""


class Task(Wire):
    """What a council is asked."""

    task_id: str
    story_id: str = ""
    role: str
    phase: str = ""
    description: str
    rubric: str = ""
    requirements: list[str] = []
    feedback: list[str] = []
    """Reasons of the rejections that brought the story back here, newest last."""


class Decision(Wire):
    """A decision of a proposal. `affects`: titles or ids of what it touches."""

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
    """What every LLM call is given. `wave` makes the call's key: workflow, run, wave, agent."""

    task: Task
    agent: Agent
    pack: ContextPack
    wave: int
    late_decisions: list[DecisionAdded] = []
    """Decisions that arrived while the deliberation ran."""
    late_milestones: list[MilestoneReached] = []
    """What happened to the story outside meanwhile."""


class ProposeInput(AgentCall):
    """A proposal is asked for."""


class CriticiseInput(AgentCall):
    """A critique of `author_id`'s proposal is asked for."""

    author_id: str
    proposal: Proposal


class ReviseInput(AgentCall):
    """A revision in the light of the critiques is asked for."""

    proposal: Proposal
    critiques: list[Critique]


class Contender(Wire):
    """A proposal in a near tie."""

    agent_id: str
    score: float
    proposal: Proposal


class JudgeInput(AgentCall):
    """A choice between near ties is asked for."""

    contenders: list[Contender]


class Verdict(Wire):
    """The judge's choice and why."""

    winner_id: str
    reason: str


class DerivePlanInput(AgentCall):
    """The design that won, to be cut into tasks by `agent`. `roles`: councils that exist."""

    design: Proposal
    roles: list[str]


class WriteStoryInput(AgentCall):
    """A story for `goal` is asked for, or `story` written better. findings: what cost it points."""

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
    """A task as the decoder writes it: `depends_on` are numbers of earlier tasks, from 1."""

    role: str
    title: str
    description: str
    depends_on: list[int] = []
    priority: int = 1


class ProposalAnswer(Wire):
    """A proposal and what it cost."""

    proposal: Proposal
    usage: CallUsage


class CritiqueAnswer(Wire):
    """A critique and what it cost."""

    critique: Critique
    usage: CallUsage


class JudgeAnswer(Wire):
    """A verdict and what it cost."""

    verdict: Verdict
    usage: CallUsage


class DerivePlanAnswer(Wire):
    """The drafts of a plan and what they cost."""

    tasks: list[DraftTask]
    usage: CallUsage


class WriteStoryAnswer(Wire):
    """A story as an agent wrote it, and what it cost."""

    story: StoryText
    usage: CallUsage


# --- checks and ranking -------------------------------------------------------------------------


class CheckInput(Wire):
    """An agent's proposal, to be checked."""

    agent_id: str
    proposal: Proposal


class Check(Wire):
    """One check of one proposal. score: 0 to 1, None where it did not apply or could not run."""

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
    """The checks of a proposal, and the weights in force (deploy/config/checks.yaml)."""

    checks: list[Check]
    weights: dict[str, float]


class RankedProposal(Wire):
    """A proposal with its place. score: 0 to 1; rank: 1 is the winner; barred ones come last."""

    proposal_id: str
    agent_id: str
    role: str
    proposal: Proposal
    drafts: list[str] = []
    """Content of the earlier revisions, oldest first."""
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

    agent_id: str
    act: str
    cause: str


# --- deliberation -------------------------------------------------------------------------------


class DeliberationInput(Request):
    """The input of DeliberationWorkflow. timeout: seconds. `agents` None: the council's size."""

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
    """The story's workflow, which publishes for its children; empty: publish on one's own."""
    ask_for_budget: bool = False
    """True where the story has a token budget: each wave then waits for the story's leave."""
    decisions: list[DecisionAdded] = []
    judged: bool = True
    """False: near ties go by the rule, without an architect."""
    background: str = ""
    """What the agents are given after their context pack."""


class RecordedDecision(Wire):
    """A winner's decision as the graph and the events hold it."""

    id: str
    type: str = "DESIGN"
    title: str
    rationale: str = ""
    affected_subtask: str = ""
    affects: list[str] = []


class DeliberationResult(Wire):
    """What a deliberation came to; `ranked` is empty where it failed."""

    task_id: str
    deliberation_id: str
    story_id: str = ""
    role: str
    status: Literal["completed", "failed"]
    winner_id: str = ""
    score: float = 0.0
    winner: Proposal | None = None
    judged: str = ""
    """The architect's reason, or the rule, where a near tie was decided."""
    decisions: list[RecordedDecision] = []
    ranked: list[RankedProposal] = []
    failed_agents: list[FailedAgent] = []
    error: str = ""
    usage: list[CallUsage] = []
    duration_ms: int = 0


class Progress(Wire):
    """Query `progress`: the wave under way and who has answered in it."""

    status: str
    wave: str
    round: int = 0
    answered: list[str] = []
    waiting: list[str] = []
    failed: list[FailedAgent] = []
    tokens: int = 0


class DeliberationRecord(Wire):
    """Everything of a finished deliberation that the graph keeps, with its provenance."""

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
    """The input of PlanWorkflow. `tasks` None: taken from the graph, else derived.

    roles: whose councils deliberate, once each, where the graph has neither tasks nor the story.
    task_timeout: seconds that each task's deliberation gets; None: an hour.
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
    """One task of a finished plan. not_run: something it depends on failed."""

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
    """status COMPLETED: every task done; PARTIAL: not all; NOTHING_TO_RUN: there was none."""

    plan_id: str
    story_id: str
    status: Literal["COMPLETED", "PARTIAL", "NOTHING_TO_RUN"]
    outcomes: list[TaskOutcome] = []


class PlanQuery(Wire):
    """Which plan to look for in the graph."""

    story_id: str
    plan_id: str


class DerivationInput(Request):
    """The input of DerivationWorkflow. announce: each task goes on the bus too."""

    story_id: Id
    plan_id: Annotated[Id, StringConstraints(max_length=96)]
    """Its tasks' ids are longer by up to four characters, and ids too."""
    phase: str = "BUILD"
    announce: bool = False


class DerivationResult(Wire):
    """A plan's tasks: at least one."""

    story_id: str
    plan_id: str
    tasks: list[PlannedTask]


class StoredPlan(Wire):
    """What the graph knows of a plan: its tasks, or else its story's text, or neither."""

    tasks: list[PlannedTask] = []
    story: StoryText | None = None


class WaveRequest(Wire):
    """A child asks its story for leave to start a wave; usage: all its calls so far."""

    workflow_id: str
    wave: str
    usage: list[CallUsage]


class ChildRun(Wire):
    """A run of a deliberation or plan whose story has continued as new since it began."""

    workflow_id: str
    run_id: str


class StoryRuns(Wire):
    """What earlier runs of a story have numbered: a story id may be used again after its end.

    councils: the state's name in lower case -> the highest number that a deliberation of its has.
    """

    plans: int = 0
    councils: dict[str, int] = {}


# --- the context's updates ----------------------------------------------------------------------

UNKNOWN_STORY = "UnknownStory"
REQUEST_REUSED = "RequestReused"


class ContextChange(Wire):
    """One change, as it was asked for; it is judged where it is stored. payload: a JSON object."""

    operation: str = ""
    entity_type: str = ""
    entity_id: str = ""
    payload: str = ""
    reason: str = ""


class PhaseChange(Wire):
    """A story's move from phase to phase, made outside of any workflow."""

    from_phase: str
    to_phase: str
    event: str
    reason: str = ""


class ContextUpdate(Request):
    """The input of ContextUpdateWorkflow. `actor`: who asks. `timestamp` empty: now."""

    story_id: Id
    task_id: LongId | None = None
    role: str = Field(default="", max_length=100)
    actor: Actor
    changes: list[ContextChange] = Field(default=[], max_length=1_000)
    timestamp: str = Field(default="", max_length=100)
    if_absent: bool = False
    """Nothing is stored or announced where the graph knows the story."""
    phase_change: PhaseChange | None = None
    """Announced with the changes, if they are stored."""
    changed: list[str] = []
    """Entity types that the story's workflow itself has changed: the update announces them."""


def request_hash(update: ContextUpdate) -> str:
    """Tells a request that comes again from another one.

    Fields that came later are left out where they say nothing: histories hold hashes without them.
    """
    later = {"if_absent", "phase_change", "changed"}
    said = update.model_dump(exclude=later) | update.model_dump(
        include=later, exclude_defaults=True
    )
    return content_hash(said)


class ContextWrite(Wire):
    """An update to store. update_id: what is stored under it is not stored again.

    `at` is the changes' time, ISO 8601; `started_ms` tells two updates of one time apart.
    """

    update_id: str
    at: str
    started_ms: int
    update: ContextUpdate


class ContextAnswer(Wire):
    """What became of an update. `changed`: entity types; `warnings`: one a refused change."""

    version: int
    hash: str
    warnings: list[str] = []
    changed: list[str] = []
    decisions: list[DecisionAdded] = []
    milestones: list[MilestoneReached] = []
    after: str = ""
    """The workflow that announces the version before this one; empty where none is known."""


# --- coaching -----------------------------------------------------------------------------------


class CoachInput(Request):
    """The input of CoachWorkflow: a goal to write a story for, or a story to write better."""

    goal: str = Field(default="", max_length=4_000)
    story: StoryText | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if bool(self.goal.strip()) == (self.story is not None):
            # Outside of `_refuse_clearly`, which has judged the fields already.
            raise InvalidInput("CoachInput", [("goal", "give a goal or a story, and not both")])
        return self


class CoachResult(Wire):
    """The story to take. reason: why the original comes back, where nothing better was written."""

    story: StoryText
    readiness: Readiness
    original: Readiness | None = None
    reason: str = ""
    usage: list[CallUsage] = []


# --- what people see ----------------------------------------------------------------------------


class Move(Wire):
    """A transition that leaves the present state, and what blocks it."""

    event: str
    to: str
    kind: Literal["gate", "rejection", "automatic"]
    roles: list[str] = []
    blocked_by: list[str] = []


class StoryView(Wire):
    """Query `state`, and the answer to every update."""

    story_id: str
    title: str
    state: str
    pending_gate: str = ""
    gate_role: str = ""
    open_gates: dict[str, str] = {}
    """Every open gate and the role that opens it; `pending_gate` is the first."""
    revision: str = ""
    rigor: str
    dor_score: int = 0
    findings: list[Finding] = []
    plan_id: str = ""
    report: ReportScore | None = None
    working_on: str = ""
    child: str = ""
    """The workflow id of the deliberation or plan at work; empty where none is."""
    token_budget: int | None = None
    tokens_used: int = 0
    cancelled: bool = False


class TimelineEntry(Wire):
    """One line of the story's timeline. at: ISO 8601."""

    at: str
    event: str
    actor: str = ""
    text: str = ""


class StoryResult(Wire):
    """How a story ended."""

    story_id: str
    state: str
    decisions: list[RecordedDecision] = []
    tokens_used: int = 0
