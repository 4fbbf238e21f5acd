"""Validation of the messages of orchestrator.v1; fields are named as in the contract.

The models come first, then one function for each message that parses it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
)

from activities.graph.scopes import Scope
from bridge.grpc.calls import parse_request
from bridge.grpc.wire import orchestrator_pb2 as pb
from workflows.models.agents import MAX_AGENTS, MAX_ROUNDS, refuse_mock
from workflows.models.base import Line, Request, Section
from workflows.models.errors import InvalidInput
from workflows.models.ids import ID_CHARACTERS, ID_PATTERN, LONG_ID_CHARACTERS, Id, LongId, Role

LONGEST_TEXT = 100_000

Text = Annotated[str, StringConstraints(max_length=LONGEST_TEXT)]
Identifier = Annotated[str, StringConstraints(max_length=100)]
MaybeId = Annotated[str, StringConstraints(pattern=rf"^$|{ID_PATTERN}", max_length=ID_CHARACTERS)]
MaybeLongId = Annotated[
    str, StringConstraints(pattern=rf"^$|{ID_PATTERN}", max_length=LONG_ID_CHARACTERS)
]
AskedType = Literal["", "RAY_VLLM", "VLLM", "NATS"]
"""An agent type in a request; empty means the default."""

Described = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=LONGEST_TEXT)
]


def _not_read(parameters: dict[str, str]) -> dict[str, str]:
    if parameters:
        raise ValueError(
            f"not read: take out {', '.join(sorted(parameters))[:40]}; a model is named in "
            "model_profile, notes in constraints.metadata"
        )
    return parameters


NotRead = Annotated[dict[str, str], AfterValidator(_not_read)]
"""custom_params, which must be empty, because the contract names no parameter."""


class Constraints(Section):
    """Checked fields of TaskConstraints.

    Zeros mean the defaults. `max_iterations` is the maximum number of rounds.
    """

    rubric: Text = ""
    requirements: list[Line] = Field(default=[], max_length=100)
    timeout_seconds: int = Field(default=0, ge=0, le=86_400)
    max_iterations: int = Field(default=0, ge=0)
    metadata: dict[Identifier, Text] = Field(default={}, max_length=50)

    @property
    def notes(self) -> str:
        """The metadata in Markdown, for the agents; empty without metadata."""
        lines = [f"- {name}: {text}" for name, text in sorted(self.metadata.items())]
        return "\n".join(["## Notes of the caller", *lines]) if lines else ""


class Options(Section):
    """The meaning of OrchestratorOptions; see `_options`."""

    deliberation_rounds: int = Field(default=0, ge=0, le=MAX_ROUNDS)
    peer_review: bool = True
    architect_selection: bool = True
    custom_params: NotRead = {}


FLAGS: dict[Scope, str] = {
    "MILESTONES": "include_timeline",
    "DECISIONS_GLOBAL": "include_decisions",
    "SUMMARY_LAST": "include_summaries",
}
"""Scope -> the field of ContextOptions that requests it."""

TIMELINE_EVENTS = 50
"""The number of events if `max_events` of ContextOptions is 0."""


class OfContext(Section):
    """Checked fields of ContextOptions."""

    include_timeline: bool = False
    include_decisions: bool = False
    include_summaries: bool = False
    max_events: int = Field(default=0, ge=0)
    scopes: list[Scope] = []

    @property
    def wanted(self) -> list[Scope]:
        """The requested scopes, each once."""
        flagged = [scope for scope, name in FLAGS.items() if getattr(self, name)]
        return list(dict.fromkeys([*flagged, *self.scopes]))


class Deliberating(Request):
    """A request to a council, by Deliberate, StreamDeliberation or Orchestrate."""

    task_description: Described
    role: Line
    constraints: Constraints
    rounds: int = Field(default=0, ge=0, le=MAX_ROUNDS)
    num_agents: int = Field(default=0, ge=0, le=MAX_AGENTS)
    options: Options = Options()
    context_options: OfContext = OfContext()
    task_id: MaybeLongId = ""
    case_id: MaybeId = ""
    story_id: MaybeId = ""
    plan_id: MaybeLongId = ""


class ByTask(Request):
    """A deliberation, by its task."""

    task_id: LongId


class OfAgent(Section):
    """Checked fields of AgentCapabilities."""

    supported_tasks: list[Line] = Field(default=[], max_length=100)
    model_profile: Identifier = ""
    max_concurrent_tasks: int = Field(default=0, ge=0)
    languages: list[Line] = Field(default=[], max_length=100)


class OfCouncil(Section):
    """Checked fields of CouncilConfig."""

    deliberation_rounds: int = Field(default=0, ge=0, le=MAX_ROUNDS)
    enable_peer_review: bool = False
    model_profile: Identifier = ""
    agent_type: AskedType = ""
    custom_params: NotRead = {}

    @field_validator("agent_type", mode="before")
    @classmethod
    def _no_mock(cls, value: Any) -> Any:
        return _in_capitals(refuse_mock(value))


class OfOwner(Section):
    """The fields of RegisterAgentRequest.metadata that are used."""

    agent_type: AskedType = ""
    persona: Annotated[str, StringConstraints(max_length=2_000)] = ""

    @field_validator("agent_type", mode="before")
    @classmethod
    def _no_mock(cls, value: Any) -> Any:
        return _in_capitals(refuse_mock(value))


READ = frozenset(OfOwner.model_fields)
"""The keys of an agent's metadata that are used; all others are only stored."""


class Registering(Request):
    """Checked fields of a RegisterAgentRequest."""

    agent_id: Id
    role: Line
    capabilities: OfAgent
    endpoint: Annotated[str, StringConstraints(max_length=500)] = ""
    metadata: OfOwner
    kept: dict[Identifier, Text] = Field(default={}, max_length=50)

    @field_validator("metadata")
    @classmethod
    def _on_the_bus(cls, metadata: OfOwner, info: ValidationInfo) -> OfOwner:
        if info.data.get("endpoint") and metadata.agent_type not in ("", "NATS"):
            raise ValueError(
                f"agent_type is {metadata.agent_type}, and an agent with an endpoint is NATS; "
                "leave one of them out"
            )
        return metadata


class Creating(Request):
    """Checked fields of a CreateCouncilRequest."""

    role: Role
    num_agents: int = Field(default=0, ge=0, le=MAX_AGENTS)
    config: OfCouncil


class Unregistering(Request):
    """Checked fields of an UnregisterAgentRequest.

    An empty `role` means the council that has the agent, whichever it is.
    """

    agent_id: Line
    role: Identifier = ""


class PlanningEvent(Request):
    """Checked fields of a PlanningEventRequest."""

    event_type: Line
    case_id: Id
    plan_id: MaybeLongId = ""
    from_state: Identifier = ""
    to_state: Identifier = ""
    timestamp_ms: int = Field(default=0, ge=0, lt=253_402_300_800_000)  # the end of year 9999
    metadata: dict[str, str] = {}


class Deriving(Request):
    """Checked fields of a DeriveSubtasksRequest.

    An empty `plan_id` means the story's newest plan, or its first.
    """

    case_id: Id
    plan_id: MaybeLongId = ""
    roles: list[Line] = Field(default=[], max_length=100)
    max_tasks_per_role: int = Field(default=0, ge=0)


class TaskContext(Request):
    """Checked fields of a GetTaskContextRequest."""

    task_id: MaybeLongId = ""
    story_id: Id
    role: Annotated[Identifier, StringConstraints(min_length=1)]
    phase: Identifier = ""
    options: OfContext


class Measuring(Request):
    """Checked fields of a GetMetricsRequest."""

    metric_type: Literal["performance", "agents", "councils", "all"]
    time_range_ms: int = Field(default=0, ge=0)


# --- messages -------------------------------------------------------------------------------------


def deliberating(request: pb.DeliberateRequest) -> Deliberating:
    """Parse a DeliberateRequest.

    Raises:
        InvalidInput: names each wrong field.
    """
    return parse_request(
        Deliberating,
        "DeliberateRequest",
        {
            "task_description": request.task_description,
            "role": request.role,
            "constraints": _constraints(request.constraints),
            "rounds": request.rounds,
            "num_agents": request.num_agents,
        },
    )


def orchestrating(request: pb.OrchestrateRequest) -> Deliberating:
    """Parse an OrchestrateRequest.

    Raises:
        InvalidInput: names each wrong field.
    """
    return parse_request(
        Deliberating,
        "OrchestrateRequest",
        {
            "task_description": request.task_description,
            "role": request.role,
            "constraints": _constraints(request.constraints),
            "options": _options(request.options),
            "context_options": _context_options(request.context_options),
            "task_id": request.task_id,
            "case_id": request.case_id,
            "story_id": request.story_id,
            "plan_id": request.plan_id,
        },
    )


def by_task(request: pb.GetDeliberationResultRequest) -> ByTask:
    """Parse a GetDeliberationResultRequest.

    Raises:
        InvalidInput: names each wrong field.
    """
    return parse_request(ByTask, "GetDeliberationResultRequest", {"task_id": request.task_id})


def creating(request: pb.CreateCouncilRequest) -> Creating:
    """Parse a CreateCouncilRequest.

    Raises:
        InvalidInput: names each wrong field.
        ApplicationError: `MockAgent`.
    """
    config = request.config
    return parse_request(
        Creating,
        "CreateCouncilRequest",
        {
            "role": request.role,
            "num_agents": request.num_agents,
            "config": {
                "deliberation_rounds": config.deliberation_rounds,
                "enable_peer_review": config.enable_peer_review,
                "model_profile": config.model_profile,
                "agent_type": config.agent_type,
                "custom_params": dict(config.custom_params),
            },
        },
    )


def registering(request: pb.RegisterAgentRequest) -> Registering:
    """Parse a RegisterAgentRequest.

    Raises:
        InvalidInput: names each wrong field.
        ApplicationError: `MockAgent`.
    """
    capabilities = request.capabilities
    return parse_request(
        Registering,
        "RegisterAgentRequest",
        {
            "agent_id": request.agent_id,
            "role": request.role,
            "capabilities": {
                "supported_tasks": list(capabilities.supported_tasks),
                "model_profile": capabilities.model_profile,
                "max_concurrent_tasks": capabilities.max_concurrent_tasks,
                "languages": list(capabilities.languages),
            },
            "endpoint": request.endpoint,
            "metadata": {k: v for k, v in request.metadata.items() if k in READ},
            "kept": {k: v for k, v in request.metadata.items() if k not in READ},
        },
        {"kept": "metadata"},
    )


def unregistering(request: pb.UnregisterAgentRequest) -> Unregistering:
    """Parse an UnregisterAgentRequest.

    Raises:
        InvalidInput: names each wrong field.
    """
    return parse_request(
        Unregistering,
        "UnregisterAgentRequest",
        {"agent_id": request.agent_id, "role": request.role},
    )


def planning_event(request: pb.PlanningEventRequest) -> PlanningEvent:
    """Parse a PlanningEventRequest.

    Raises:
        InvalidInput: names each wrong field.
    """
    return parse_request(
        PlanningEvent,
        "PlanningEventRequest",
        {
            "event_type": request.event_type,
            "case_id": request.case_id,
            "plan_id": request.plan_id,
            "from_state": request.from_state,
            "to_state": request.to_state,
            "timestamp_ms": request.timestamp_ms,
            "metadata": dict(request.metadata),
        },
    )


def deriving(request: pb.DeriveSubtasksRequest) -> Deriving:
    """Parse a DeriveSubtasksRequest.

    Raises:
        InvalidInput: names each wrong field.
    """
    return parse_request(
        Deriving,
        "DeriveSubtasksRequest",
        {
            "case_id": request.case_id,
            "plan_id": request.plan_id,
            "roles": list(request.roles),
            "max_tasks_per_role": request.strategy.max_tasks_per_role,
        },
    )


def task_context(request: pb.GetTaskContextRequest) -> TaskContext:
    """Parse a GetTaskContextRequest.

    Raises:
        InvalidInput: names each wrong field.
    """
    return parse_request(
        TaskContext,
        "GetTaskContextRequest",
        {
            "task_id": request.task_id,
            "story_id": request.story_id or request.case_id,
            "role": request.role,
            "phase": request.phase,
            "options": _context_options(request.options),
        },
    )


def measuring(request: pb.GetMetricsRequest) -> Measuring:
    """Parse a GetMetricsRequest.

    Raises:
        InvalidInput: names each wrong field.
    """
    return parse_request(
        Measuring,
        "GetMetricsRequest",
        {"metric_type": request.metric_type, "time_range_ms": request.time_range_ms},
    )


def _constraints(sent: pb.TaskConstraints) -> dict[str, Any]:
    return {
        "rubric": sent.rubric,
        "requirements": list(sent.requirements),
        "timeout_seconds": sent.timeout_seconds,
        "max_iterations": sent.max_iterations,
        "metadata": dict(sent.metadata),
    }


def _options(sent: pb.OrchestratorOptions) -> dict[str, Any]:
    """Decide whether proposals are reviewed and near ties judged.

    A client that sets neither flag gets both, because a client that does not know the flags sends
    false for both. If only one flag is true, the other one's false switches its part off.

    Raises:
        InvalidInput: rounds are requested of a review that is switched off.
    """
    review, architect = sent.enable_peer_review, sent.enable_architect_selection
    if architect and not review and sent.deliberation_rounds:
        rule = (
            f"is false, and deliberation_rounds asks for {sent.deliberation_rounds} rounds of it; "
            "set it, or leave deliberation_rounds 0"
        )
        raise InvalidInput("OrchestrateRequest", [("options.enable_peer_review", rule)])
    return {
        "deliberation_rounds": sent.deliberation_rounds,
        "peer_review": review or not architect,
        "architect_selection": architect or not review,
        "custom_params": dict(sent.custom_params),
    }


def _context_options(sent: pb.ContextOptions) -> dict[str, Any]:
    return {
        **{name: getattr(sent, name) for name in FLAGS.values()},
        "max_events": sent.max_events,
        "scopes": list(sent.scopes),
    }


def _in_capitals(value: Any) -> Any:
    return value.strip().upper() if isinstance(value, str) else value
