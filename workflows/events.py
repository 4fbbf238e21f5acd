"""The events of the bridge, and the records that only the graph gets.

Each class is one body. `SUBJECT` is the NATS subject and the CloudEvents type. Classes with an
empty SUBJECT are recorded in the graph and cache and not published.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from workflows.models import FailedAgent, PlannedTask, RecordedDecision, Wire


class EventBody(Wire):
    """A flat JSON body. timestamp: ISO 8601, UTC."""

    SUBJECT: ClassVar[str] = ""

    story_id: str = ""
    timestamp: str


class StoryCreated(EventBody):
    """A story has begun."""

    SUBJECT: ClassVar[str] = "planning.story.created"
    title: str
    rigor: str
    created_by: str


class StoryTransitioned(EventBody):
    """The story took a transition of its machine."""

    SUBJECT: ClassVar[str] = "planning.story.transitioned"
    from_phase: str
    to_phase: str
    event: str
    actor: str
    reason: str = ""


class StoryCancelled(EventBody):
    """The story was cancelled, or its workflow was terminated, timed out or failed."""

    SUBJECT: ClassVar[str] = "planning.story.cancelled"
    actor: str
    status: Literal["CANCELLED", "FAILED"] = "CANCELLED"
    reason: str = ""


class GateOpened(EventBody):
    """A gate waits for a person. `revision`: the content hash of what it shows."""

    SUBJECT: ClassVar[str] = "planning.gate.opened"
    gate: str
    role: str
    revision: str = ""


class GateClosed(EventBody):
    """A gate was passed, or closed because what it showed no longer holds."""

    SUBJECT: ClassVar[str] = "planning.gate.closed"
    gate: str
    role: str
    actor: str | None = None


class GateApproved(EventBody):
    """A person, or the story's policy, approved what a gate shows."""

    SUBJECT: ClassVar[str] = "planning.gate.approved"
    id: str
    gate: str
    actor: str
    role: str
    revision: str
    comment: str = ""
    via: str = "claim"


class PlanApproved(EventBody):
    """A plan was approved: it may be run."""

    SUBJECT: ClassVar[str] = "planning.plan.approved"
    plan_id: str
    approved_by: str
    roles: list[str] = []
    """Where no one knows the story: the councils that deliberate, once each."""


class TaskCreated(EventBody):
    """A task of a derived plan."""

    SUBJECT: ClassVar[str] = "planning.task.created"
    plan_id: str
    task_id: str
    role: str
    depends_on: list[str] = []


class TaskFinished(EventBody):
    """How a task of a plan ended. Histories of older releases hold it; see its two subclasses."""

    plan_id: str
    task_id: str
    role: str = ""
    status: Literal["done", "failed", "not_run", "cancelled"]
    assignee: str = ""


class TaskCompleted(TaskFinished):
    """A task of a plan is done."""

    SUBJECT: ClassVar[str] = "orchestration.task.completed"


class TaskFailed(TaskFinished):
    """A task of a plan ended without a result: it failed, or was not run, or was cancelled."""

    SUBJECT: ClassVar[str] = "orchestration.task.failed"
    error: str = ""


class PlanFinished(EventBody):
    """A plan ended. Tasks in neither list were not run."""

    SUBJECT: ClassVar[str] = "planning.plan.completed"
    plan_id: str
    status: str
    done: list[str] = []
    failed: list[str] = []


class TaskDispatched(EventBody):
    """A task was given to its council."""

    SUBJECT: ClassVar[str] = "orchestration.task.dispatched"
    task_id: str
    agent_id: str
    """The council that the task was given to."""
    role: str


class DeliberationStarted(EventBody):
    """A council has begun."""

    SUBJECT: ClassVar[str] = "orchestration.deliberation.started"
    task_id: str
    role: str


class DeliberationCompleted(EventBody):
    """A council has decided."""

    SUBJECT: ClassVar[str] = "orchestration.deliberation.completed"
    task_id: str
    role: str
    winner_id: str
    score: float
    decisions: list[RecordedDecision] = []
    duration_ms: int


class DeliberationFailed(EventBody):
    """A council could not decide; `error` holds every cause."""

    SUBJECT: ClassVar[str] = "orchestration.deliberation.failed"
    task_id: str
    role: str
    error: str
    duration_ms: int
    error_type: str = ""
    failed_agents: list[FailedAgent] = []


class RoundCompleted(EventBody):
    """A round of critique and revision is over."""

    SUBJECT: ClassVar[str] = "orchestration.round.completed"
    task_id: str
    role: str
    round: int


class ContextUpdated(EventBody):
    """A story's context has changed; `version` grows per story."""

    SUBJECT: ClassVar[str] = "context.updated"
    version: int
    changed: list[str]


class ContextDecisionAdded(EventBody):
    """A decision was made."""

    SUBJECT: ClassVar[str] = "context.decision.added"
    decision_id: str
    title: str
    rationale: str
    decided_by: str


class ContextMilestoneReached(EventBody):
    """A milestone of the story."""

    SUBJECT: ClassVar[str] = "context.milestone.reached"
    milestone_id: str
    event_type: str
    description: str


# --- recorded, not published --------------------------------------------------------------------


class StorySpec(EventBody):
    """The story's text, as created or amended."""

    title: str
    brief: str
    acceptance_criteria: list[str]
    rigor: str
    created_by: str
    revision: str


class PlanDerived(EventBody):
    """A plan's tasks, as derived from the design."""

    plan_id: str
    version: int
    tasks: list[PlannedTask]


class RequestRefused(EventBody):
    """A signal that could not be obeyed, with the reason that an update would have answered."""

    request: str
    reason: str


class EntrySkipped(EventBody):
    """A person left out an entry that could not be stored. entry: the entry, as JSON."""

    reason: str
    actor: str
    error: str
    entry: str


class Entry(Wire):
    """One entry of an outbox.

    `id` is the CloudEvents id. `kind` is the body's class name; `subject` is empty if the entry is
    recorded and not published. `story_id` orders the bus: one story's entries stay in order.
    """

    id: str
    kind: str
    subject: str = ""
    source: str
    """Id of the workflow where the change happened: the path of the CloudEvents source."""
    story_id: str = ""
    time: str
    body: dict[str, Any]


# --- external agents ----------------------------------------------------------------------------


class AgentCommand(Wire):
    """A call to an external agent, on `agent.cmd.{role}`.

    `call_id` is this one attempt's: an answer bears it. `prompt` is the whole prompt as text, and
    the answer's content is a JSON document of `answer_schema`.
    """

    task_id: str
    story_id: str = ""
    agent_id: str
    act: str
    prompt: str
    timestamp: str
    call_id: str
    answer_schema: dict[str, Any]
    max_tokens: int
    temperature: float
    seed: int


class AgentResponse(Wire):
    """An external agent's word on `agent.response.{task_id}`.

    `working` says that it is alive and at it; `done` has `content`, `failed` has `error`.
    """

    task_id: str
    agent_id: str
    call_id: str
    status: Literal["working", "done", "failed"]
    content: str | None = None
    error: str | None = None
    duration_ms: int = 0
    timestamp: str = ""
    model: str = ""
    tokens_in: int = 0
    tokens_out: int = 0


def _bodies(base: type[EventBody]) -> Iterator[type[EventBody]]:
    for body in base.__subclasses__():
        yield body
        yield from _bodies(body)


BODIES: dict[str, type[EventBody]] = {body.__name__: body for body in _bodies(EventBody)}
"""Class name -> class, for every event and record."""

PUBLISHED: dict[str, type[EventBody]] = {
    body.SUBJECT: body for body in BODIES.values() if body.SUBJECT
}
"""Subject -> class, for every published event."""

LATER_PUBLISHED = frozenset(
    body.SUBJECT for body in (TaskCompleted, TaskFailed, PlanFinished, GateApproved)
)
"""Subjects that the first release only recorded: its histories do not publish them."""


class RecordBatch(Wire):
    """Entries to store in the graph and the cache, in order.

    `owner` and `first` number the entries in their outbox. With the owner's start time they form
    the ids of the timeline's stream, so that a batch stored twice adds each line once.
    """

    owner: str
    owner_started_ms: int
    first: int
    entries: list[Entry]


class PublishBatch(Wire):
    """Entries to publish to JetStream, in order; all of them have a subject."""

    entries: list[Entry]
