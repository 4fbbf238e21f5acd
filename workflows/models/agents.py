"""Agents, and the requests and answers of each of their acts."""

from __future__ import annotations

from typing import Literal, TypeVar

from pydantic import Field

from workflows.models.base import AgentType, Model
from workflows.models.context import ContextPack, DecisionAdded, MilestoneReached
from workflows.models.errors import ErrorType, application_error
from workflows.models.readiness import Finding, StoryText

AnyType = TypeVar("AnyType")

MAX_AGENTS = 50
MAX_ROUNDS = 10
"""Limits of every council."""

TOKENS_PER_HOUR = 5_000_000
"""The default of the setting GRPC_TOKENS_PER_HOUR: about a hundred deliberations of five agents."""

MOCK_REFUSED = "Mock agents not allowed in production"


def is_mock(agent_type: object) -> bool:
    """Return whether an agent's type, as someone wrote it, names a mock."""
    return isinstance(agent_type, str) and agent_type.strip().upper().startswith("MOCK")


def refuse_mock(agent_type: AnyType) -> AnyType:
    """Return the type of an agent unchanged, unless it names a mock.

    Raises:
        ApplicationError: `MockAgent`, not retryable.
    """
    if is_mock(agent_type):
        raise application_error(ErrorType.MOCK_AGENT, MOCK_REFUSED)
    return agent_type


class CallUsage(Model):
    """The cost of one LLM call, answered or failed."""

    act: str
    agent_id: str
    role: str
    model: str
    tokens_in: int = Field(0, ge=0)
    tokens_out: int = Field(0, ge=0)
    cached_tokens: int = Field(0, ge=0)
    latency_ms: int = 0
    seed: int = 0
    asks: int = 1
    """Number of requests to the model: more than 1 if an answer was cut off or did not parse."""
    prompt_hash: str = ""
    estimated: bool = False
    """True if tokens that the endpoint did not report are computed from the text."""
    calls: int = 1
    """More than 1 if the costs of several calls are summed up."""

    @property
    def tokens(self) -> int:
        return self.tokens_in + self.tokens_out


class UsageLine(Model):
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


class Agent(Model):
    """An agent of a council. `model` empty: the default. `persona`: its point of view."""

    agent_id: str
    role: str
    agent_type: AgentType = "RAY_VLLM"
    model: str = ""
    persona: str = ""


class CouncilQuery(Model):
    """A query for a council. `size`: None for all of its agents."""

    role: str
    size: int | None = None


class Council(Model):
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


class Task(Model):
    """The task that a council works on."""

    task_id: str
    story_id: str = ""
    role: str
    phase: str = ""
    description: str
    subject: str = ""
    """What it is about, if `description` also says how to work; empty: `description` itself."""
    rubric: str = ""
    requirements: list[str] = []
    feedback: list[str] = []
    """Reasons of the rejections that returned the story to this state, newest last."""
    actor: str = ""
    """The caller of gRPC whose quota its tokens count for; empty: none."""
    attempt: int = 1
    """Counts the tries of a story's work, so that a further try is sampled with other seeds."""

    @property
    def about(self) -> str:
        """What an answer has to be about: the subject and the requirements."""
        return "\n".join([self.subject or self.description, *self.requirements])


class Decision(Model):
    """A decision of a proposal. `affects`: titles or ids of the affected items."""

    title: str
    rationale: str = ""
    affects: list[str] = []


class Proposal(Model):
    """An agent's structured answer. `content` is Markdown, code in fenced blocks."""

    approach: str
    content: str
    decisions: list[Decision] = []


class CritiquePoint(Model):
    """One point of a critique."""

    severity: Literal["low", "medium", "high"]
    text: str


class Critique(Model):
    """One agent's critique of another's proposal."""

    verdict: Literal["accept", "revise", "reject"]
    points: list[CritiquePoint] = []
    suggestion: str = ""


class AgentCall(Model):
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


class Contender(Model):
    """A proposal in a near tie."""

    agent_id: str
    score: float
    proposal: Proposal


class JudgeInput(AgentCall):
    """The input of a call that asks a judge to choose between near ties."""

    contenders: list[Contender]


class Verdict(Model):
    """The judge's choice and its reason."""

    winner_id: str
    reason: str


MAX_TASKS = 60
"""The most tasks of a derived plan where a team sets no other limit."""

LARGEST_PLAN = 200
"""What a team may set it to: the schema of an answer grows with the square of it."""


class DerivePlanInput(AgentCall):
    """The input of a call that asks `agent` to split the winning design into tasks.

    Attributes:
        roles: the councils that exist.
        max_tasks: the most tasks of the plan.
    """

    design: Proposal
    roles: list[str]
    max_tasks: int = MAX_TASKS


class WriteStoryInput(AgentCall):
    """The input of a call that asks for a story for `goal`, or for a better version of `story`.

    Attributes:
        findings: what cost `story` points.
    """

    goal: str = ""
    story: StoryText | None = None
    findings: list[Finding] = []


class PlannedTask(Model):
    """A task of a plan. `depends_on`: task ids in the same plan. priority: 1 is first."""

    task_id: str
    role: str
    title: str
    description: str
    depends_on: list[str] = []
    priority: int = 1


class DraftTask(Model):
    """A task as the decoder writes it. `depends_on`: numbers of earlier tasks, starting at 1."""

    role: str
    title: str
    description: str
    depends_on: list[int] = []
    priority: int = 1


class ProposalAnswer(Model):
    """A proposal and its cost.

    Attributes:
        problem: why a revision says nothing, after every ask; the author's proposal then stands.
    """

    proposal: Proposal
    usage: CallUsage
    problem: str = ""


class CritiqueAnswer(Model):
    """A critique and its cost."""

    critique: Critique
    usage: CallUsage


class JudgeAnswer(Model):
    """A verdict and its cost."""

    verdict: Verdict
    usage: CallUsage


class DerivePlanAnswer(Model):
    """The drafts of a plan's tasks and their cost."""

    tasks: list[DraftTask]
    usage: CallUsage


class WriteStoryAnswer(Model):
    """A story written by an agent, and its cost."""

    story: StoryText
    usage: CallUsage
