"""The events of the bridge, and the records that only the graph gets.

Each class is one body and describes itself: its fields by a description and an example, and what
happened by `summary`. The graph, the timeline, the CLI, docs/asyncapi.yaml and docs/events.md use
these. `SUBJECT` is the NATS subject and the CloudEvents type; classes with an empty SUBJECT are
recorded in the graph and cache and not published. A new event is a class here and its writer in
`activities.graph.events`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from workflows.models.acceptance import Criterion
from workflows.models.access import Via as HowKnown
from workflows.models.agents import PlannedTask
from workflows.models.base import Model
from workflows.models.deliberation import FailedAgent, RecordedDecision


def about(description: str, *examples: Any) -> Any:
    """Describe a field, with examples of its values.

    The first examples of a class's fields together are a body that the code can emit.
    """
    return Field(description=description, examples=list(examples))


def example(model: type[BaseModel]) -> dict[str, Any]:
    """Return an example body: the first example of each field that has one."""
    fields = model.model_fields.items()
    return {name: field.examples[0] for name, field in fields if field.examples}


PlanId = Annotated[str, about("The plan", "US-101-plan-1")]
TaskId = Annotated[str, about("The task", "US-101-plan-1-t1")]
WorkId = Annotated[
    str, about("The task, or the phase's work, that the council has", "US-101-design-1")
]
CouncilRole = Annotated[str, about("The council's role", "ARCHITECT")]
Actor = Annotated[str, about("Who did it; `policy:auto` where the story's policy did", "ana")]
Via = Annotated[
    HowKnown,
    about(
        "How the actor is known: `token`, by a signed token; `claim`, as the sender named it; "
        "`policy`, the story's own policy; empty: the fleet itself, or not known",
        "token",
    ),
]
Gate = Annotated[str, about("The gate, as the machine names it; or `budget`", "approve_scope")]
Title = Annotated[str, about("The story's title", "Undo the deletion of a note")]
Rigor = Annotated[str, about("The story's rigor level: L0 to L3", "L1")]
Creator = Annotated[str, about("Who handed the story in", "ana")]
Timestamp = Annotated[str, about("When it happened: ISO 8601, UTC", "2026-03-01T10:00:00.000Z")]
DurationMs = Annotated[int, about("How long it took, in milliseconds", 41_250)]


class EventBody(Model):
    """A flat JSON body. Story and time are empty until an outbox or a parser sets them."""

    SUBJECT: ClassVar[str] = ""

    story_id: Annotated[str, about("The story", "US-101")] = ""
    timestamp: Timestamp = ""

    @property
    def label(self) -> str:
        """What kind of event it is: its subject, or its class name if it is not published."""
        return self.SUBJECT or type(self).__name__

    def summary(self) -> str:
        """Say what happened, in a line for people."""
        raise NotImplementedError

    def by(self) -> str:
        """Return who did it: a person, an agent or a council; empty if no one is named."""
        fields = self.__dict__  # `getattr` of a field that a model lacks is slow
        named = (fields.get(field) for field in ACTOR_FIELDS)
        return next((str(name) for name in named if name), "")


ACTOR_FIELDS = (
    *(
        "actor",
        "amended_by",
        "created_by",
        "approved_by",
        "decided_by",
        "winner_id",
        "assignee",
        "agent_id",
    ),
)


class StoryCreated(EventBody):
    """A story has begun."""

    SUBJECT: ClassVar[str] = "planning.story.created"
    title: Title
    rigor: Rigor
    created_by: Creator

    def summary(self) -> str:
        return f"created: {self.title}, rigor {self.rigor}"


class StoryTransitioned(EventBody):
    """The story took a transition of its machine."""

    SUBJECT: ClassVar[str] = "planning.story.transitioned"
    from_phase: Annotated[str, about("The state that was left", "DRAFT")]
    to_phase: Annotated[str, about("The state that was reached", "DESIGN")]
    event: Annotated[str, about("The transition's event, as the machine names it", "approve_scope")]
    actor: Actor
    reason: Annotated[str, about("Why, where a reason was given; else empty", "")] = ""
    via: Via = ""

    def summary(self) -> str:
        return _because(f"{self.from_phase} -> {self.to_phase} by {self.event}", self.reason)


class StoryCancelled(EventBody):
    """The story was cancelled, or its workflow was terminated, timed out or failed."""

    SUBJECT: ClassVar[str] = "planning.story.cancelled"
    actor: Actor
    status: Annotated[
        Literal["CANCELLED", "FAILED"],
        about("`CANCELLED`; `FAILED`: the workflow failed or timed out", "CANCELLED"),
    ] = "CANCELLED"
    reason: Annotated[
        str, about("Why the workflow ended, where it was not cancelled; else empty", "")
    ] = ""

    def summary(self) -> str:
        return _because(self.status.lower(), self.reason)


class StoryDelivered(EventBody):
    """A story with a repository is done: the branch ends at the commit that was approved.

    The branch is in the store, and in the repository where its entry says `push: true`.
    """

    SUBJECT: ClassVar[str] = "planning.story.delivered"
    repository: Annotated[str, about("The repository's key in repositories.yaml", "sample")]
    branch: Annotated[str, about("The story's branch, without `refs/heads/`", "story/US-101")]
    commit: Annotated[
        str, about("The branch's last commit", "9fceb02d0ae598e95dc970b74767f19372d61af8")
    ]
    base: Annotated[
        str,
        about("The commit that the branch begins at", "e83c5163316f89bfbde7d9ab23ca2e25604af290"),
    ]
    files_changed: Annotated[int, about("How many files differ from the base", 2)]
    insertions: Annotated[int, about("How many lines were added", 5)]
    deletions: Annotated[int, about("How many lines were removed", 1)]

    def summary(self) -> str:
        size = f"{self.files_changed} files, +{self.insertions} -{self.deletions}"
        return f"delivered {self.branch} of {self.repository} at {self.commit[:12]}: {size}"


class CriteriaTested(EventBody):
    """The fleet ran a story's tests, and knows which acceptance criteria are proved.

    A criterion is proved if a test for it fails on the base and passes on the branch.
    """

    SUBJECT: ClassVar[str] = "planning.criteria.tested"
    repository: Annotated[str, about("The repository's key in repositories.yaml", "sample")]
    commit: Annotated[str, about("The branch's commit", "9fceb02d0ae598e95dc970b74767f19372d61af8")]
    base: Annotated[
        str,
        about("The commit that the branch begins at", "e83c5163316f89bfbde7d9ab23ca2e25604af290"),
    ]
    criteria: Annotated[
        list[Criterion],
        about(
            "The criteria, in the story's order, each with its tests",
            [
                {
                    "number": 1,
                    "text": "Given a deleted note, when I undo, then it is back",
                    "proved": True,
                    "why": "",
                    "tests": [
                        {
                            "name": "tests.test_undo::test_ac1_an_undo_restores_the_note",
                            "suite": "unit",
                            "criteria": [1],
                            "before": "failed",
                            "after": "passed",
                            "why": "AttributeError: 'Notes' object has no attribute 'undo'",
                            "flaky": False,
                        }
                    ],
                }
            ],
        ),
    ]

    def summary(self) -> str:
        proved = sum(criterion.proved for criterion in self.criteria)
        return f"{proved} of {len(self.criteria)} criteria are proved at {self.commit[:12]}"


class GateOpened(EventBody):
    """A gate waits for a person. `revision`: the content hash of what it shows."""

    SUBJECT: ClassVar[str] = "planning.gate.opened"
    gate: Gate
    role: Annotated[str, about("The role that may open it", "PO")]
    revision: Annotated[
        str, about("The content hash of what the gate shows", "8ef3c7fab3b897bc")
    ] = ""

    def summary(self) -> str:
        return f"gate {self.gate} waits for {self.role}"


class GateClosed(EventBody):
    """A gate was passed, or closed because what it showed has changed."""

    SUBJECT: ClassVar[str] = "planning.gate.closed"
    gate: Gate
    role: Annotated[str, about("The role that could open it", "PO")]
    actor: Annotated[
        str | None, about("Who passed it; absent where it closed without a person", "ana")
    ] = None

    def summary(self) -> str:
        return f"gate {self.gate} closed"


class GateApproved(EventBody):
    """A person, or the story's policy, approved what a gate shows."""

    SUBJECT: ClassVar[str] = "planning.gate.approved"
    id: Annotated[str, about("The approval", "US-101-approve_scope-2-PO-c21e8951")]
    gate: Gate
    actor: Actor
    role: Annotated[str, about("The role that it was approved as", "PO")]
    revision: Annotated[
        str,
        about(
            "The content hash of what was approved; empty where none was shown", "8ef3c7fab3b897bc"
        ),
    ]
    comment: Annotated[str, about("The person's comment; else empty", "")] = ""
    via: Via = "claim"

    def summary(self) -> str:
        return _because(f"gate {self.gate} approved as {self.role}", self.comment)


class PlanApproved(EventBody):
    """A plan was approved: it may be run."""

    SUBJECT: ClassVar[str] = "planning.plan.approved"
    plan_id: PlanId
    approved_by: Annotated[str, about("Who approved it", "ana")]
    roles: Annotated[
        list[str],
        about("The councils that deliberate where no one knows the story; else empty", []),
    ] = []
    via: Via = ""

    def summary(self) -> str:
        return f"plan {self.plan_id} approved"


class TaskCreated(EventBody):
    """A task of a derived plan."""

    SUBJECT: ClassVar[str] = "planning.task.created"
    plan_id: PlanId
    task_id: Annotated[str, about("The task", "US-101-plan-1-t2")]
    role: Annotated[str, about("The role of the council that will work on it", "QA")]
    depends_on: Annotated[
        list[str], about("The tasks that must be done before it", ["US-101-plan-1-t1"])
    ] = []

    def summary(self) -> str:
        after = f", after {', '.join(self.depends_on)}" if self.depends_on else ""
        return f"task {self.task_id} for {self.role}{after}"


class TaskFinished(EventBody):
    """How a task of a plan ended. Histories of older releases hold it; see its two subclasses."""

    plan_id: PlanId
    task_id: TaskId
    role: Annotated[str, about("The role of the council that it was for", "DEV")] = ""
    status: Annotated[
        Literal["done", "failed", "not_run", "cancelled"], about("How it ended", "done")
    ]
    assignee: Annotated[str, about("The agent whose proposal won; else empty", "agent-dev-3")] = ""

    def summary(self) -> str:
        return f"task {self.task_id} {self.status}"


class TaskCompleted(TaskFinished):
    """A task of a plan is done."""

    SUBJECT: ClassVar[str] = "orchestration.task.completed"
    status: Annotated[
        Literal["done", "failed", "not_run", "cancelled"], about("Always `done`", "done")
    ]


class TaskFailed(TaskFinished):
    """A task of a plan ended without a result: it failed, or was not run, or was cancelled."""

    SUBJECT: ClassVar[str] = "orchestration.task.failed"
    status: Annotated[
        Literal["done", "failed", "not_run", "cancelled"],
        about(
            "`failed`; `not_run`: a task that it depends on failed; `cancelled`: its plan was "
            "stopped, or never started",
            "failed",
        ),
    ]
    assignee: Annotated[str, about("Empty: no proposal won", "")] = ""
    error: Annotated[
        str,
        about(
            "Every cause of the failure; else empty",
            "QuorumLost: 0 of 3 agents left, a quorum is more than half. "
            "agent-dev-1 (propose): LlmRefused: the engine is down; "
            "agent-dev-2 (propose): LlmRefused: the engine is down; "
            "agent-dev-3 (propose): LlmRefused: the engine is down",
        ),
    ] = ""

    def summary(self) -> str:
        return _because(super().summary(), self.error)


class PlanFinished(EventBody):
    """A plan ended. Tasks in neither list were not run."""

    SUBJECT: ClassVar[str] = "planning.plan.completed"
    plan_id: PlanId
    status: Annotated[
        str,
        about(
            "`COMPLETED`; `PARTIAL`: some tasks were not done; `NOTHING_TO_RUN`; `FAILED`; "
            "`CANCELLED`",
            "COMPLETED",
        ),
    ]
    done: Annotated[
        list[str], about("The tasks that were done", ["US-101-plan-1-t1", "US-101-plan-1-t2"])
    ] = []
    failed: Annotated[list[str], about("The tasks that failed", [])] = []

    def summary(self) -> str:
        counts = f"{len(self.done)} done, {len(self.failed)} failed"
        return f"plan {self.plan_id} ended {self.status}: {counts}"


class TaskDispatched(EventBody):
    """A task was given to its council."""

    SUBJECT: ClassVar[str] = "orchestration.task.dispatched"
    task_id: TaskId
    agent_id: Annotated[str, about("The council that it was given to", "council-dev")]
    role: Annotated[str, about("The council's role", "DEV")]

    def summary(self) -> str:
        return f"task {self.task_id} given to {self.agent_id}"


class DeliberationStarted(EventBody):
    """A council has begun."""

    SUBJECT: ClassVar[str] = "orchestration.deliberation.started"
    task_id: WorkId
    role: CouncilRole

    def summary(self) -> str:
        return f"{self.role} council deliberates {self.task_id}"


class DeliberationCompleted(EventBody):
    """A council has decided."""

    SUBJECT: ClassVar[str] = "orchestration.deliberation.completed"
    task_id: WorkId
    role: CouncilRole
    winner_id: Annotated[str, about("The agent whose proposal won", "agent-architect-3")]
    score: Annotated[float, about("The winner's score: 0 to 1", 1.0)]
    decisions: Annotated[
        list[RecordedDecision],
        about(
            "What the winner decided",
            [
                {
                    "id": "US-101-design-1-580e3a2a-d1",
                    "type": "DESIGN",
                    "title": "Deleted notes are kept for a day",
                    "rationale": "An undo needs the text",
                    "affected_subtask": "",
                    "affects": ["the store of notes"],
                }
            ],
        ),
    ] = []
    duration_ms: DurationMs

    def summary(self) -> str:
        took = f"in {round(self.duration_ms, -3) // 1000} s"
        return f"{self.role} council decided {self.task_id} {took}, score {self.score:.2f}"


class DeliberationFailed(EventBody):
    """A council could not decide; `error` holds every cause."""

    SUBJECT: ClassVar[str] = "orchestration.deliberation.failed"
    task_id: WorkId
    role: CouncilRole
    error: Annotated[
        str,
        about(
            "Every cause of the failure",
            "QuorumLost: 1 of 3 agents left, a quorum is more than half. "
            "agent-architect-1 (propose): LlmRefused: the engine is down; "
            "agent-architect-2 (propose): LlmRefused: the engine is down",
        ),
    ]
    duration_ms: DurationMs
    error_type: Annotated[
        str,
        about(
            "What it failed of: `QuorumLost`, `DeliberationTimeout`, `AllBarred`, `Cancelled`, "
            "`Terminated`, `TimedOut` or the type of the error",
            "QuorumLost",
        ),
    ] = ""
    failed_agents: Annotated[
        list[FailedAgent],
        about(
            "The agents that failed, each with what it was asked to do and why it failed",
            [
                {
                    "agent_id": f"agent-architect-{number}",
                    "act": "propose",
                    "cause": "LlmRefused: the engine is down",
                }
                for number in (1, 2)
            ],
        ),
    ] = []

    def summary(self) -> str:
        return f"{self.role} council failed on {self.task_id}: {self.error}"


class RoundCompleted(EventBody):
    """A round of critique and revision is over."""

    SUBJECT: ClassVar[str] = "orchestration.round.completed"
    task_id: WorkId
    role: CouncilRole
    round: Annotated[int, about("Which round, from 1", 1)]

    def summary(self) -> str:
        return f"{self.role} council ended round {self.round} of {self.task_id}"


class ContextUpdated(EventBody):
    """A story's context has changed; `version` grows per story."""

    SUBJECT: ClassVar[str] = "context.updated"
    version: Annotated[int, about("Grows with every change of the story's context", 3)]
    changed: Annotated[list[str], about("What has changed", ["DECISION", "MILESTONE"])]

    def summary(self) -> str:
        return f"context version {self.version}: {', '.join(self.changed)}"


class ContextDecisionAdded(EventBody):
    """A decision was made."""

    SUBJECT: ClassVar[str] = "context.decision.added"
    decision_id: Annotated[str, about("The decision", "US-101-design-1-580e3a2a-d1")]
    title: Annotated[str, about("The decision in a line", "Deleted notes are kept for a day")]
    rationale: Annotated[str, about("Why it was decided so", "An undo needs the text")]
    decided_by: Annotated[str, about("The agent or person that decided", "agent-architect-3")]

    def summary(self) -> str:
        return f"decision {self.decision_id}: {self.title}"


class ContextMilestoneReached(EventBody):
    """A milestone of the story."""

    SUBJECT: ClassVar[str] = "context.milestone.reached"
    milestone_id: Annotated[str, about("The milestone", "US-101-m8-929cfd72")]
    event_type: Annotated[str, about("What kind of milestone it is", "PHASE_ENTERED")]
    description: Annotated[
        str, about("The milestone in words", "DESIGN, from DRAFT by approve_scope")
    ]
    actor: Annotated[str, about("Who reached it, where a person did; else empty", "ana")] = ""
    via: Via = ""

    @property
    def label(self) -> str:
        """The milestone's own kind."""
        return self.event_type

    def summary(self) -> str:
        return self.description


# --- recorded, not published --------------------------------------------------------------------


class StorySpec(EventBody):
    """The story's text, as created or amended."""

    title: Title
    brief: Annotated[str, about("The story's text", "A deleted note can be restored for a day.")]
    acceptance_criteria: Annotated[
        list[str], about("What must hold", ["Given a deleted note, when I undo, then it is back"])
    ]
    rigor: Rigor
    created_by: Creator
    revision: Annotated[str, about("The content hash of the text", "8ef3c7fab3b897bc")]
    amended_by: Annotated[str, about("Who amended it; empty: it is as created", "ben")] = ""
    via: Via = ""

    def summary(self) -> str:
        return f"{self.title} (revision {self.revision})"


class PlanDerived(EventBody):
    """A plan's tasks, as derived from the design."""

    plan_id: PlanId
    version: Annotated[int, about("Counts the story's plans, from 1", 1)]
    tasks: Annotated[
        list[PlannedTask],
        about(
            "The tasks",
            [
                {
                    "task_id": "US-101-plan-1-t1",
                    "role": "DEV",
                    "title": "Keep deleted notes",
                    "description": "Move them to a second table.",
                    "depends_on": [],
                    "priority": 1,
                },
                {
                    "task_id": "US-101-plan-1-t2",
                    "role": "QA",
                    "title": "Test the undo",
                    "description": "Delete a note, and undo it.",
                    "depends_on": ["US-101-plan-1-t1"],
                    "priority": 1,
                },
            ],
        ),
    ]

    def summary(self) -> str:
        return f"plan {self.plan_id} with {len(self.tasks)} tasks"


class RequestRefused(EventBody):
    """A signal that could not be obeyed, with the reason that an update would have answered."""

    request: Annotated[str, about("The request's model", "Approve")]
    reason: Annotated[
        str,
        about(
            "Field, rule and remedy",
            "revision: '8ef3c7fab3b897bc' is stale: since then title amended by ana; the gate "
            "shows '62e45f92dbf8708f'; look at it and approve that",
        ),
    ]

    def summary(self) -> str:
        return f"{self.request} refused: {self.reason}"


SKIPPED = "/skipped"
"""The end of the id of a skipped entry's record; before it stands the id of the entry."""


class EntrySkipped(EventBody):
    """A person left out an entry that could not be stored. entry: the entry, as JSON."""

    reason: Annotated[str, about("Why it was left out", "the title is too long for the graph")]
    actor: Annotated[str, about("Who left it out", "ana")]
    via: Via = ""
    error: Annotated[str, about("Its kind, the step and the error", "StoryCreated, publish: no")]
    step: Annotated[str, about("The step that was refused: record or publish", "publish")] = ""
    entry: Annotated[
        str,
        about(
            "The whole entry, as JSON",
            '{"id":"story-US-101/01a21fe7-ab93-7a9d-aefd-822a94012be6/1","kind":"StoryCreated",'
            '"subject":"planning.story.created","source":"story-US-101","story_id":"US-101",'
            '"time":"2026-03-01T10:00:00.000Z","body":{"story_id":"US-101",'
            '"timestamp":"2026-03-01T10:00:00.000Z","title":"Undo the deletion of a note",'
            '"rigor":"L1","created_by":"ana"}}',
        ),
    ]

    def summary(self) -> str:
        return f"an entry was skipped: {self.reason} ({self.error})"


def _because(what: str, why: str) -> str:
    return f"{what}: {why}" if why else what


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
