"""What each event writes to the graph: one writer for each class of `workflows.models.events`.

Entries are recorded in the order of their outbox, but can be repeated, delayed or reordered:
`activities.graph.changes` says how writes stay correct.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from activities.graph.acceptance import acceptance
from activities.graph.changes import LAST_VERSION, OF_STORY, Change, Row, Write, invalid_entry, key
from activities.graph.decisions import TASK_LINKS, decision_links, decision_write
from activities.graph.plans import TAKE_UNPLANNED, plan_write, task_row
from activities.graph.stories import STORY
from workflows.models.deliberation import RecordedDecision
from workflows.models.events import (
    ContextDecisionAdded,
    ContextMilestoneReached,
    ContextUpdated,
    CriteriaTested,
    DeliberationCompleted,
    DeliberationFailed,
    DeliberationStarted,
    EntrySkipped,
    EventBody,
    GateApproved,
    GateClosed,
    GateOpened,
    PlanApproved,
    PlanDerived,
    PlanFinished,
    RequestRefused,
    RoundCompleted,
    StoryCancelled,
    StoryCreated,
    StoryDelivered,
    StorySpec,
    StoryTransitioned,
    TaskCompleted,
    TaskCreated,
    TaskDispatched,
    TaskFailed,
    TaskFinished,
)
from workflows.models.ids import called_deliberation_workflow_id, deliberation_workflow_id
from workflows.timestamps import format_timestamp

BodyT = TypeVar("BodyT", bound=EventBody)

Writer = Callable[[Change, BodyT], list[Write]]

WRITERS: dict[type[EventBody], Writer[Any]] = {}
"""Event -> what it writes, in order; filled by `writer`."""

OF_A_STORY = (StoryCreated, StorySpec, PlanDerived, TaskCreated, TaskFinished, PlanFinished)
"""Entries that require a story; refused without one."""


def writer(*kinds: type[BodyT]) -> Callable[[Writer[BodyT]], Writer[BodyT]]:
    """Register the decorated function as the writer of these events."""

    def register(write: Writer[BodyT]) -> Writer[BodyT]:
        WRITERS.update(dict.fromkeys(kinds, write))
        return write

    return register


def writes(change: Change) -> list[Write]:
    """Return what an entry writes, in order.

    Raises:
        ApplicationError: `InvalidEntry`, not retryable, if an id is too long or an entry that
            requires a story has none.
    """
    key("story_id", change.story_id)
    key("entry id", change.entry.id)
    if isinstance(change.body, OF_A_STORY) and not change.story_id:
        raise invalid_entry("story_id: required; add it")
    return WRITERS[type(change.body)](change, change.body)


# --- readable events ------------------------------------------------------------------------------

EVENT = "MERGE (n:Event {case_id: row.story_id, id: row.id}) ON CREATE SET n += row.node" + OF_STORY


def event(change: Change, body: EventBody, event_id: str = "", **more: Any) -> list[Write]:
    """Write an event as people read it.

    Args:
        change: The change.
        body: Its body.
        event_id: The event's id, if it is not the entry's.
        more: More properties of the node.
    """
    node = {
        "event_type": body.label,
        "description": summary(body),
        "actor": body.by(),
        "timestamp_ms": _ms(change),
        "entry_id": change.entry.id,
    }
    if via := getattr(body, "via", ""):
        node["via"] = via
    row = {"id": key("id", event_id or change.entry.id), "story_id": change.story_id}
    return [Write(EVENT, row | {"node": node | more})]


writer(GateOpened, GateClosed, DeliberationStarted, RoundCompleted, RequestRefused)(event)


def summary(body: EventBody) -> str:
    """Return what happened, cut to what the graph and the timeline hold."""
    return body.summary()[:2_000]


@writer(ContextMilestoneReached)
def milestone_reached(change: Change, body: ContextMilestoneReached) -> list[Write]:
    return event(change, body, body.milestone_id)


@writer(EntrySkipped)
def entry_skipped(change: Change, body: EntrySkipped) -> list[Write]:
    return event(change, body, entry=body.entry)


# --- stories --------------------------------------------------------------------------------------

# If a workflow runs a story, the workflow owns its status: its first status marks the node, and
# statuses from outside are ignored from then on. An earlier one from outside is replaced.
_STORY_STATUS = """
WITH s, row
CALL (s, row) {
  WITH s, row, row.order > coalesce(s.status_order, '') AS newer
  WHERE CASE row.workflow WHEN '' THEN s.workflow_id IS NULL AND newer
        ELSE s.workflow_id IS NULL OR newer END
  SET s.status = row.status, s.status_order = row.order
}
CALL (s, row) {
  WITH s, row WHERE row.workflow <> '' SET s.workflow_id = row.workflow
}
"""

# Times of the same type are compared; a time of another type, written by others, is not changed.
_BEGUN = (
    STORY
    + """
SET s.created_at = CASE WHEN coalesce(s.created_at <= row.timestamp, s.created_at IS NOT NULL)
  THEN s.created_at ELSE row.timestamp END
"""
)

CREATED = (
    _BEGUN
    + """
SET s.title = coalesce(s.title, row.title), s.rigor = coalesce(s.rigor, row.rigor),
    s.created_by = coalesce(s.created_by, row.created_by)
"""
    + _STORY_STATUS
)

SPEC = (
    _BEGUN
    + """
SET s.status = CASE s.status WHEN 'UNKNOWN' THEN 'DRAFT' ELSE s.status END
WITH s, row WHERE row.order > coalesce(s.text_order, '')
SET s += row.text, s.text_order = row.order
"""
)

TRANSITION = (
    "MERGE (n:PhaseTransition {id: row.id}) ON CREATE SET n += row.node" + OF_STORY + _STORY_STATUS
)

CANCELLED = EVENT + _STORY_STATUS


@writer(StoryCreated)
def story_created(change: Change, body: StoryCreated) -> list[Write]:
    text = body.model_dump(include={"title", "rigor", "created_by"})
    return [Write(CREATED, _begun(change) | text | {"status": "DRAFT"} | _status(change))]


@writer(StorySpec)
def story_spec(change: Change, body: StorySpec) -> list[Write]:
    text = body.model_dump(
        include={"title", "acceptance_criteria", "rigor", "created_by", "revision", "amended_by"}
    )
    text |= {"description": body.brief, "amended_via": body.via}
    row = {"text": text, "order": change.order}
    return [Write(SPEC, _begun(change) | row)]


@writer(StoryTransitioned)
def story_transitioned(change: Change, body: StoryTransitioned) -> list[Write]:
    node = body.model_dump() | {
        "story_id": change.story_id,
        "timestamp": format_timestamp(change.at),
        "timestamp_ms": _ms(change),
    }
    row = {"node": node, "status": body.to_phase}
    return [Write(TRANSITION, _id(change) | row | _status(change))]


DELIVERED = (
    EVENT + "SET s.repository = row.repository, s.branch = row.branch, s.commit = row.commit"
)


@writer(StoryDelivered)
def story_delivered(change: Change, body: StoryDelivered) -> list[Write]:
    node = body.model_dump(exclude={"story_id", "timestamp"})
    (written,) = event(change, body, **node)
    return [
        Write(DELIVERED, written.row | body.model_dump(include={"repository", "branch", "commit"}))
    ]


@writer(CriteriaTested)
def criteria_tested(change: Change, body: CriteriaTested) -> list[Write]:
    return [*event(change, body, commit=body.commit, base=body.base), *acceptance(change, body)]


@writer(StoryCancelled)
def story_cancelled(change: Change, body: StoryCancelled) -> list[Write]:
    (written,) = event(change, body)
    return [Write(CANCELLED, written.row | {"status": body.status} | _status(change))]


# --- approvals ------------------------------------------------------------------------------------

GATE_APPROVAL = "MERGE (n:GateApproval {id: row.id}) ON CREATE SET n += row.node" + OF_STORY

_PLAN_STATUS = """
WITH p, row
CALL (p, row) {
  WITH p, row WHERE row.order > coalesce(p.status_order, '')
  SET p.status = row.status, p.status_order = row.order
}
"""

PLAN_APPROVAL = (
    "MERGE (n:PlanApproval {id: row.id}) ON CREATE SET n += row.node"
    + OF_STORY
    + """
MERGE (p:PlanVersion {case_id: row.story_id, id: row.plan_id}) ON CREATE SET p.status = 'DRAFT'
SET p.plan_id = p.id
MERGE (s)-[:HAS_PLAN]->(p)
MERGE (n)-[:APPROVES]->(p)
WITH s, p, row
"""
    + TAKE_UNPLANNED
    + _PLAN_STATUS
)


@writer(GateApproved)
def gate_approved(change: Change, body: GateApproved) -> list[Write]:
    node = body.model_dump(include={"gate", "actor", "role", "revision", "comment", "via"})
    node |= {"at": format_timestamp(change.at), "story_id": change.story_id}
    row = {"id": key("id", body.id), "story_id": change.story_id, "node": node}
    return [Write(GATE_APPROVAL, row)]


@writer(PlanApproved)
def plan_approved(change: Change, body: PlanApproved) -> list[Write]:
    node = body.model_dump(include={"plan_id", "approved_by", "roles", "via"})
    row = {
        "plan_id": key("plan_id", body.plan_id),
        "node": node | {"story_id": change.story_id, "timestamp": format_timestamp(change.at)},
        "status": "APPROVED",
        "order": change.order,
    }
    return [Write(PLAN_APPROVAL, _id(change) | row)]


# --- plans and tasks ------------------------------------------------------------------------------

PLAN_STATUS = "MATCH (p:PlanVersion {case_id: row.story_id, id: row.plan_id})" + _PLAN_STATUS

TASK_STATUS = """
MATCH (t:Subtask {case_id: row.story_id, id: row.task_id})
CALL (row, t) {
  WITH row, t WHERE row.order > coalesce(t.status_order, '')
  SET t.status = row.status, t.last_status = row.status, t.status_order = row.order,
      t.assignee = CASE row.assignee WHEN '' THEN t.assignee ELSE row.assignee END
}
"""

DISPATCH = (
    "MERGE (n:TaskDispatch {id: row.id}) ON CREATE SET n += row.node"
    + OF_STORY
    + "WITH row"  # without a task of that id, a council works on the story itself
    + TASK_STATUS
)


@writer(PlanDerived)
def plan_derived(change: Change, body: PlanDerived) -> list[Write]:
    tasks = [
        task_row(
            task.task_id,
            task.depends_on,
            task.model_dump(include={"role", "title", "description", "priority"}),
        )
        for task in body.tasks
    ]
    return [
        plan_write(change.story_id, body.plan_id, tasks, body.version),
        _task_links(change, [task["id"] for task in tasks]),
    ]


@writer(TaskCreated)
def task_created(change: Change, body: TaskCreated) -> list[Write]:
    task = task_row(body.task_id, body.depends_on, {"role": body.role})
    return [
        plan_write(change.story_id, body.plan_id, [task]),
        _task_links(change, [body.task_id]),
    ]


@writer(TaskDispatched)
def task_dispatched(change: Change, body: TaskDispatched) -> list[Write]:
    node = body.model_dump(include={"task_id", "agent_id", "role"}) | {
        "timestamp": format_timestamp(change.at),
        "story_id": change.story_id,
        "status": "DISPATCHED",
    }
    status = _task_status(change, body.task_id, body.agent_id, "IN_PROGRESS")
    return [Write(DISPATCH, _id(change) | {"node": node} | status, together=True)]


@writer(TaskFinished, TaskCompleted, TaskFailed)
def task_finished(change: Change, body: TaskFinished) -> list[Write]:
    status = _task_status(change, body.task_id, body.assignee, body.status.upper())
    return [
        plan_write(change.story_id, body.plan_id, [task_row(body.task_id, [], {})]),
        Write(TASK_STATUS, status),
        # If the task is new here, decisions that name it may be stored already.
        _task_links(change, [body.task_id]),
    ]


@writer(PlanFinished)
def plan_finished(change: Change, body: PlanFinished) -> list[Write]:
    row = {"story_id": change.story_id, "plan_id": body.plan_id}
    return [
        plan_write(change.story_id, body.plan_id),
        Write(PLAN_STATUS, row | {"status": body.status, "order": change.order}),
        *event(change, body),
    ]


def _task_status(change: Change, task_id: str, assignee: str, status: str) -> Row:
    return {
        "story_id": change.story_id,
        "task_id": task_id,
        "assignee": assignee,
        "status": status,
        "order": change.order,
    }


def _task_links(change: Change, task_ids: list[str]) -> Write:
    return Write(TASK_LINKS, {"story_id": change.story_id, "ids": task_ids})


# --- councils -------------------------------------------------------------------------------------

DELIBERATION = "MERGE (n:Deliberation {id: row.id}) ON CREATE SET n += row.node" + OF_STORY

FAILED_DELIBERATION = (
    """
MERGE (n:Deliberation {id: row.id})
WITH n, row
CALL (n, row) {
  WITH n, row WHERE row.order > coalesce(n.status_order, '')
  SET n += row.node, n.status_order = row.order
}
"""
    + OF_STORY
)


@writer(DeliberationCompleted)
def deliberation_completed(change: Change, body: DeliberationCompleted) -> list[Write]:
    story, at = change.story_id, format_timestamp(change.at)
    decided = [
        decision_write(story, decision, body.role, body.winner_id, at, change.order)
        for decision in body.decisions
    ]
    found = [*event(change, body), *decided, *decision_links(story, body.decisions)]
    if change.workflow:  # its proposals have more details
        return found
    kept = {"task_id", "role", "winner_id", "score", "duration_ms"}
    node = body.model_dump(include=kept) | {
        "story_id": story,
        "decisions": len(decided),
        "status": "COMPLETED",
        "ended_at": at,
    }
    return [*found, Write(DELIBERATION, _id(change) | {"node": node})]


@writer(DeliberationFailed)
def deliberation_failed(change: Change, body: DeliberationFailed) -> list[Write]:
    node = body.model_dump(include={"task_id", "role", "error", "error_type", "duration_ms"}) | {
        "story_id": change.story_id,
        "status": "FAILED",
        "ended_at": format_timestamp(change.at),
        "failed_agents": [each.model_dump_json() for each in body.failed_agents],
    }
    called = called_deliberation_workflow_id(body.task_id)
    is_called = change.entry.source == called
    row = {
        "id": called if is_called else deliberation_workflow_id(body.task_id),
        "story_id": change.story_id,
    }
    failed = Write(FAILED_DELIBERATION, row | {"node": node, "order": change.order})
    return [*event(change, body), failed]


# --- context --------------------------------------------------------------------------------------

CONTEXT_VERSION = """
MATCH (s:Case {id: row.story_id}) WHERE coalesce(s.context_version, 0) < row.version
SET s.context_version = row.version
"""


@writer(ContextUpdated)
def context_updated(change: Change, body: ContextUpdated) -> list[Write]:
    found = event(change, body)
    if body.version <= LAST_VERSION:
        row = {"story_id": change.story_id, "version": body.version}
        found.append(Write(CONTEXT_VERSION, row))
    return found


@writer(ContextDecisionAdded)
def decision_added(change: Change, body: ContextDecisionAdded) -> list[Write]:
    story, at = change.story_id, format_timestamp(change.at)
    added = RecordedDecision(
        id=body.decision_id, type="CONTEXT", title=body.title, rationale=body.rationale
    )
    return [
        decision_write(story, added, "", body.decided_by, at, change.order),
        *decision_links(story, [added]),
    ]


# --- what rows have in common ---------------------------------------------------------------------


def _id(change: Change) -> Row:
    return {"id": change.entry.id, "story_id": change.story_id}


def _begun(change: Change) -> Row:
    return {"story_id": change.story_id, "timestamp": format_timestamp(change.at)}


def _status(change: Change) -> Row:
    return {"order": change.order, "workflow": change.workflow}


def _ms(change: Change) -> int:
    return int(change.at.timestamp() * 1000)
