"""The writes of every entry and every deliberation: constant Cypher and its parameters.

A `Write` is one statement and one row. A statement reads its row's values from `row`, MERGEs by
key, and sets an immutable property only when it creates the node. Mutable values (a status, a
story's text) carry an order key, and an older value never replaces a newer one. Writes can thus be
repeated, delayed or reordered, and the graph ends up the same.

Every statement that has a story writes to the story's node before it compares or reads anything
else. This takes the node's lock, so that writers on one story run one after the other.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString, NamedTuple

from pydantic import ValidationError
from temporalio.exceptions import ApplicationError

from activities.graph.stories import STORY
from workflows.models.deliberation import DeliberationRecord, RankedProposal, RecordedDecision
from workflows.models.error_types import ErrorType, application_error
from workflows.models.errors import invalid_input
from workflows.models.events import (
    BODIES,
    ContextDecisionAdded,
    ContextMilestoneReached,
    ContextUpdated,
    DeliberationCompleted,
    DeliberationFailed,
    DeliberationStarted,
    Entry,
    EntrySkipped,
    EventBody,
    GateApproved,
    GateClosed,
    GateOpened,
    PlanApproved,
    PlanDerived,
    PlanFinished,
    RecordBatch,
    RequestRefused,
    RoundCompleted,
    StoryCancelled,
    StoryCreated,
    StorySpec,
    StoryTransitioned,
    TaskCreated,
    TaskDispatched,
    TaskFinished,
)
from workflows.models.ids import deliberation_workflow_id
from workflows.timestamps import iso

AHEAD_AT_MOST = timedelta(minutes=5)
"""How far a sender's clock may be ahead of ours; limited because the latest time wins."""

LAST_VERSION = 2**31 - 2**20
"""The highest context version that is accepted from others; ours count on from it as int32."""


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

KEY_BYTES = 2_000
"""The longest id that is stored, in UTF-8: Neo4j refuses keys of some 8,000 bytes in its index."""

OF_A_STORY = (StoryCreated, StorySpec, PlanDerived, TaskCreated, TaskFinished, PlanFinished)
"""Entries that require a story; refused without one."""

Row = dict[str, Any]


class Write(NamedTuple):
    """A constant statement and the row it reads as `row`."""

    cypher: str
    row: Row


class Claim(NamedTuple):
    """The id that a sender gave a message, and the hash of the message's content."""

    id: str
    content: str
    story_id: str
    at: str


class Change(NamedTuple):
    """A parsed entry: its body, its story and its position in time.

    Attributes:
        order: sorts as text by the body's time, then by the outbox and the position in it.
        line: id in the timeline's stream, `{start of its outbox in ms}-{position in it}`.
        workflow: id of the workflow whose outbox it comes from; empty if it came over the bus.
    """

    entry: Entry
    body: EventBody
    story_id: str
    at: datetime
    order: str
    line: str
    workflow: str = ""


def changes(batch: RecordBatch) -> list[Change]:
    """Parse the entries of a batch.

    Raises:
        ApplicationError: `InvalidEntry` (not retryable) names the entry, field and rule;
            `UnknownKind` (retryable) if a newer workflow writes a kind that this worker cannot
            store.
    """
    return [
        change(entry, batch.owner_started_ms, number, batch.owner)
        for number, entry in enumerate(batch.entries, batch.first)
    ]


def change(entry: Entry, started_ms: int, number: int, workflow: str = "") -> Change:
    """Parse one entry.

    Args:
        entry: the entry.
        started_ms: when its outbox or stream began.
        number: its position in the outbox or stream.
        workflow: id of the outbox's workflow; empty for a stream.

    Raises:
        ApplicationError: as in `changes`.
    """
    kind = BODIES.get(entry.kind)
    if kind is None:
        raise application_error(
            ErrorType.UNKNOWN_KIND,
            f"entry {entry.id}: this worker does not know the kind {entry.kind!r}; "
            "it is stored as soon as a worker of the workflow's version runs",
        )
    try:
        body = kind.model_validate(entry.body)
    except ValidationError as error:
        raise _refusal(invalid_input(f"entry {entry.id} ({entry.kind})", error).message) from None
    at = moment(body.timestamp, f"entry {entry.id}: timestamp")
    order = order_key(at, started_ms, number)
    line = f"{started_ms}-{number}"
    return Change(entry, body, body.story_id or entry.story_id, at, order, line, workflow)


def moment(text: str, field: str) -> datetime:
    """Parse an ISO 8601 time and return it in UTC; one without an offset is taken as UTC.

    Raises:
        ApplicationError: `InvalidEntry`, not retryable.
    """
    try:
        parsed = datetime.fromisoformat(text)
        return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)
    except (ValueError, OverflowError):
        raise _refusal(
            f"{field}: {text[:80]!r} is not ISO 8601, as in 2026-01-31T12:00:00Z"
        ) from None


def order_key(at: datetime, owner_started_ms: int, number: int) -> str:
    """Return a key that sorts as text by time, then by the position in the outbox."""
    micros = max(0, (at - EPOCH) // timedelta(microseconds=1))
    return f"{micros:018d}-{owner_started_ms:013d}-{number:09d}"


# --- statements -----------------------------------------------------------------------------------

_STORY = "\nWITH n, row WHERE row.story_id <> ''" + STORY
_OF_STORY = _STORY + "MERGE (n)-[:OF]->(s)\n"

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
    "MERGE (n:PhaseTransition {id: row.id}) ON CREATE SET n += row.node" + _OF_STORY + _STORY_STATUS
)

EVENT = (
    "MERGE (n:Event {case_id: row.story_id, id: row.id}) ON CREATE SET n += row.node" + _OF_STORY
)

CANCELLED = EVENT + _STORY_STATUS

FAILED_DELIBERATION = (
    """
MERGE (n:Deliberation {id: row.id})
WITH n, row
CALL (n, row) {
  WITH n, row WHERE row.order > coalesce(n.status_order, '')
  SET n += row.node, n.status_order = row.order
}
"""
    + _OF_STORY
)

CONTEXT_VERSION = """
MATCH (s:Case {id: row.story_id}) WHERE coalesce(s.context_version, 0) < row.version
SET s.context_version = row.version
"""

GATE_APPROVAL = "MERGE (n:GateApproval {id: row.id}) ON CREATE SET n += row.node" + _OF_STORY

_PLAN_STATUS = """
WITH p, row
CALL (p, row) {
  WITH p, row WHERE row.order > coalesce(p.status_order, '')
  SET p.status = row.status, p.status_order = row.order
}
"""

TAKE_UNPLANNED: LiteralString = """
CALL (s, p) {
  MATCH (t:Subtask {case_id: p.case_id}) USING INDEX t:Subtask(case_id)
  WHERE EXISTS { (t)-[:OF]->(s) } AND NOT EXISTS { (t)<-[:HAS_SUBTASK]-(:PlanVersion) }
  MERGE (p)-[:HAS_SUBTASK]->(t) SET t.plan_id = p.id
}
"""
"""Assigns subtasks that were stored before any plan to the first plan.

Uses the index of subtasks, because thousands of other nodes can be attached to the story.
"""

READ_AS_SUBTASK: LiteralString = """
  SET t.sub_id = t.id, t.type = coalesce(t.type, 'task'), t.last_status = t.status
"""
"""Sets the properties of a subtask `t` that other systems read."""

PLACEHOLDER: LiteralString = """
  MERGE (d:Subtask {case_id: row.story_id, id: needed})
    ON CREATE SET d.status = 'PENDING', d.last_status = 'PENDING', d.sub_id = needed,
                  d.type = 'task'
"""
"""Creates a subtask `d` that another subtask depends on and that is not stored yet."""

PLAN_APPROVAL = (
    "MERGE (n:PlanApproval {id: row.id}) ON CREATE SET n += row.node"
    + _OF_STORY
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

PLAN = (
    """
MERGE (n:PlanVersion {case_id: row.story_id, id: row.plan_id}) ON CREATE SET n.status = 'DRAFT'
SET n.plan_id = n.id, n.version = coalesce(row.version, n.version)
"""
    + _STORY
    + """
MERGE (s)-[:HAS_PLAN]->(n)
WITH n, row UNWIND row.tasks AS task
MERGE (t:Subtask {case_id: row.story_id, id: task.id}) ON CREATE SET t.status = 'PENDING'
SET t += task.node, t.plan_id = n.id
"""
    + READ_AS_SUBTASK
    + """
MERGE (n)-[:HAS_SUBTASK]->(t)
WITH row, t, task UNWIND task.depends_on AS needed
"""
    + PLACEHOLDER
    + "MERGE (t)-[:DEPENDS_ON]->(d)"
)

PLAN_STATUS = "MATCH (p:PlanVersion {case_id: row.story_id, id: row.plan_id})" + _PLAN_STATUS

TASK_STATUS = """
MATCH (t:Subtask {case_id: row.story_id, id: row.task_id})
WHERE row.order > coalesce(t.status_order, '')
SET t.status = row.status, t.last_status = row.status, t.status_order = row.order,
    t.assignee = CASE row.assignee WHEN '' THEN t.assignee ELSE row.assignee END
"""

DISPATCH = (
    "MERGE (n:TaskDispatch {id: row.id}) ON CREATE SET n += row.node"
    + _OF_STORY
    + "WITH row"  # without a task of that id, a council works on the story itself
    + TASK_STATUS
)

KEEP_REVISION: LiteralString = """
  MERGE (r:DecisionRevision {case_id: n.case_id, decision_id: n.id, order: kept.order})
    ON CREATE SET r += kept {.title, .rationale, .decided_by, .decided_at}
  MERGE (n)-[:HAS_REVISION]->(r)
"""
"""Stores `kept`, an earlier text of the decision `n`, with its order key."""

# A repeated text changes nothing: a deliberation's record and its event carry the same one.
DECISION = (
    """
MERGE (n:Decision {case_id: row.story_id, id: row.id})
  ON CREATE SET n += row.node, n.text_order = row.order
WITH n, row, row.order > coalesce(n.text_order, '') AS newer,
     coalesce(n.title <> row.node.title OR n.rationale <> row.node.rationale, true) AS other
CALL (n, row, newer, other) {
  WITH n, row, row.node AS node, newer, other
  WITH n, row, other, CASE WHEN newer
         THEN n {.title, .rationale, .decided_by, .decided_at, order: coalesce(n.text_order, '')}
         ELSE node {.title, .rationale, .decided_by, .decided_at, order: row.order} END AS kept
  WHERE other AND kept.title IS NOT NULL
"""
    + KEEP_REVISION
    + """
}
CALL (n, row, newer, other) {
  WITH n, row.node AS node, newer, other WHERE newer AND other
  SET n += node {.title, .rationale, .decided_by, .approved_by, .decided_at}
}
CALL (n, row, newer) {
  WITH n, row WHERE newer
  SET n.text_order = row.order
  WITH n, row WHERE size(row.node.affects) > 0 AND coalesce(n.affects <> row.node.affects, true)
  SET n.affects = row.node.affects
  WITH n MATCH (n)-[old:AFFECTS|DEPENDS_ON]->() DELETE old
}
"""
    + _OF_STORY
)


def _names(decision: LiteralString) -> LiteralString:
    """Return Cypher for the names in the decision's `affects` (a list or a text), in lower case."""
    return (
        "[name IN CASE WHEN "
        + decision
        + ".affects IS :: LIST<ANY> THEN "
        + decision
        + ".affects ELSE ["
        + decision
        + ".affects] END | toLower(trim(toStringOrNull(name)))]"
    )


def _is_named(node: LiteralString) -> LiteralString:
    """Return Cypher that tests whether `names` has the node's id or title.

    Others may have stored an id or title as a number.
    """
    return (
        "(toLower(toStringOrNull("
        + node
        + ".id)) IN names OR toLower(toStringOrNull("
        + node
        + ".title)) IN names)"
    )


DECISION_LINKS: LiteralString = (
    """
MATCH (d:Decision {case_id: row.story_id, id: row.id})
CALL (d) {
  WITH d, """
    + _names("d")
    + """ AS names
  MATCH (t:Subtask {case_id: d.case_id}) WHERE """
    + _is_named("t")
    + """
  MERGE (d)-[:AFFECTS]->(t)
}
CALL (d) {
  WITH d, """
    + _names("d")
    + """ AS names
  MATCH (o:Decision {case_id: d.case_id}) WHERE o <> d AND """
    + _is_named("o")
    + """
  MERGE (d)-[:DEPENDS_ON]->(o)
}
CALL (d) {
  MATCH (o:Decision {case_id: d.case_id})
  WITH d, o, """
    + _names("o")
    + """ AS names
  WHERE o <> d AND """
    + _is_named("d")
    + """
  MERGE (o)-[:DEPENDS_ON]->(d)
}
"""
)

TASK_LINKS: LiteralString = (
    """
MATCH (d:Decision {case_id: row.story_id})
WITH row, d, """
    + _names("d")
    + """ AS names WHERE size(names) > 0
UNWIND row.ids AS id
MATCH (t:Subtask {case_id: row.story_id, id: id}) WHERE """
    + _is_named("t")
    + """
MERGE (d)-[:AFFECTS]->(t)
"""
)

PROPOSAL = (
    """
MERGE (n:Proposal {id: row.id}) ON CREATE SET n += row.node
MERGE (a:Agent {id: row.agent_id}) ON CREATE SET a.role = row.role
MERGE (n)-[:BY]->(a)
"""
    + _OF_STORY
)

CLAIM: LiteralString = """
UNWIND $rows AS row
MERGE (n:Received {id: row.id})
  ON CREATE SET n.content = row.content, n.story_id = row.story_id, n.at = row.at,
                n.received_ms = timestamp()
WITH n, row WHERE n.content <> row.content
RETURN row AS claim
"""

FORGET: LiteralString = """
MATCH (n:Received) WHERE n.received_ms < timestamp() - $age_ms
WITH n LIMIT $limit DELETE n RETURN count(*) AS count
"""

DELIBERATION = "MERGE (n:Deliberation {id: row.id}) ON CREATE SET n += row.node" + _OF_STORY

CRITIQUE = """
MATCH (p:Proposal {id: row.proposal_id})
MERGE (n:Critique {id: row.id}) ON CREATE SET n += row.node
MERGE (n)-[:OF]->(p)
"""

CHECK = """
MATCH (p:Proposal {id: row.proposal_id})
MERGE (n:Check {id: row.id}) ON CREATE SET n += row.node
MERGE (n)-[:OF]->(p)
"""

DECISION_FROM = """
MATCH (d:Decision {case_id: row.story_id, id: row.id})
MATCH (p:Proposal {id: row.proposal_id})
MERGE (d)-[:FROM]->(p)
"""

PLAN_DECISION = """
MATCH (p:PlanVersion {case_id: row.story_id, id: row.plan_id})
MATCH (d:Decision {case_id: row.story_id, id: row.id})
MERGE (p)-[:CONTAINS_DECISION]->(d)
"""


# --- entries --------------------------------------------------------------------------------------


class Milestone(NamedTuple):
    """A readable event: the properties of an Event node and of a timeline line."""

    event_type: str
    description: str
    actor: str


def describe(change: Change) -> Milestone:
    """Describe the change. The type is its subject, or its kind if it is not published."""
    event_type = change.body.SUBJECT or change.entry.kind
    match change.body:
        case StoryCreated(title=title, created_by=actor):
            text, who = title, actor
        case StorySpec(title=title, revision=revision, created_by=actor):
            text, who = f"{title} (revision {revision})", actor
        case StoryTransitioned() as body:
            why = f": {body.reason}" if body.reason else ""
            text, who = f"{body.from_phase} -> {body.to_phase} by {body.event}{why}", body.actor
        case StoryCancelled(actor=actor, status=status, reason=reason):
            text, who = status.lower() + (f": {reason}" if reason else ""), actor
        case GateOpened(gate=gate, role=role):
            text, who = f"{gate} waits for {role}", ""
        case GateClosed(gate=gate, actor=actor):
            text, who = f"{gate} closed", actor or ""
        case GateApproved(gate=gate, actor=actor, role=role, comment=comment):
            text, who = f"{gate} approved as {role}" + (f": {comment}" if comment else ""), actor
        case PlanApproved(plan_id=plan_id, approved_by=actor):
            text, who = f"plan {plan_id} approved", actor
        case PlanDerived(plan_id=plan_id, tasks=tasks):
            text, who = f"plan {plan_id} with {len(tasks)} tasks", ""
        case PlanFinished(plan_id=plan_id, status=status):
            text, who = f"plan {plan_id} ended {status}", ""
        case TaskCreated(task_id=task_id, role=role):
            text, who = f"task {task_id} for {role}", ""
        case TaskDispatched(task_id=task_id, agent_id=actor):
            text, who = f"task {task_id} given to {actor}", actor
        case TaskFinished(task_id=task_id, status=status, assignee=actor):
            text, who = f"task {task_id} {status}", actor
        case DeliberationStarted(task_id=task_id, role=role):
            text, who = f"{role} deliberates {task_id}", ""
        case DeliberationCompleted() as body:
            text = f"{body.role} decided {body.task_id}, score {body.score:.2f}"
            who = body.winner_id
        case DeliberationFailed(task_id=task_id, role=role, error=error):
            text, who = f"{role} failed on {task_id}: {error}", ""
        case RoundCompleted(task_id=task_id, role=role, round=number):
            text, who = f"{role} ended round {number} of {task_id}", ""
        case ContextUpdated(version=version, changed=changed):
            text, who = f"context version {version}: {', '.join(changed)}", ""
        case ContextDecisionAdded(title=title, decided_by=actor):
            text, who = title, actor
        case ContextMilestoneReached(event_type=reached, description=text):
            event_type, who = reached, ""
        case RequestRefused(request=request, reason=reason):
            text, who = f"{request} refused: {reason}", ""
        case EntrySkipped(reason=reason, error=error):
            text, who = f"an entry was left out: {reason} ({error})", change.body.actor
        case _:
            raise AssertionError(f"no words for {change.entry.kind}")
    return Milestone(event_type, text[:2_000], who)


def writes(change: Change) -> list[Write]:
    """Return what an entry writes, in order.

    Raises:
        ApplicationError: `InvalidEntry`, not retryable, if an id is too long or an entry that
            requires a story has none.
    """
    entry, story = change.entry, _key("story_id", change.story_id)
    at = iso(change.at)
    status_of = {"order": change.order, "workflow": change.workflow}
    key = {"id": _key("entry id", entry.id), "story_id": story}
    begun = {"story_id": story, "timestamp": at}
    if isinstance(change.body, OF_A_STORY) and not story:
        raise _refusal("story_id: required; add it")

    def event(event_id: str = entry.id) -> Write:
        return Write(
            EVENT,
            {
                "id": _key("id", event_id),
                "story_id": story,
                "node": describe(change)._asdict()
                | {"timestamp_ms": int(change.at.timestamp() * 1000), "entry_id": entry.id},
            },
        )

    def plan(plan_id: str, tasks: list[Row], version: int | None = None) -> Write:
        return Write(
            PLAN,
            {
                "story_id": story,
                "plan_id": _key("plan_id", plan_id),
                "version": version,
                "tasks": tasks,
            },
        )

    match change.body:
        case StoryCreated() as body:
            text = body.model_dump(include={"title", "rigor", "created_by"})
            return [Write(CREATED, begun | text | {"status": "DRAFT"} | status_of)]
        case StorySpec() as body:
            text = body.model_dump(
                include={"title", "acceptance_criteria", "rigor", "created_by", "revision"}
            ) | {"description": body.brief}
            return [Write(SPEC, begun | {"text": text, "order": change.order})]
        case StoryTransitioned() as body:
            node = body.model_dump(exclude={"story_id"}) | {
                "story_id": story,
                "timestamp": at,
                "timestamp_ms": int(change.at.timestamp() * 1000),
            }
            row = {"node": node, "status": body.to_phase}
            return [Write(TRANSITION, key | row | status_of)]
        case StoryCancelled(status=status):
            return [Write(CANCELLED, event().row | {"status": status} | status_of)]
        case GateApproved() as body:
            node = body.model_dump(include={"gate", "actor", "role", "revision", "comment", "via"})
            node |= {"at": at, "story_id": story}
            row = {"id": _key("id", body.id), "story_id": story, "node": node}
            return [Write(GATE_APPROVAL, row)]
        case PlanDerived() as body:
            tasks = [
                _task_row(
                    task.task_id,
                    task.depends_on,
                    task.model_dump(include={"role", "title", "description", "priority"}),
                )
                for task in body.tasks
            ]
            return [
                plan(body.plan_id, tasks, body.version),
                Write(TASK_LINKS, {"story_id": story, "ids": [task["id"] for task in tasks]}),
            ]
        case TaskCreated() as body:
            return [
                plan(body.plan_id, [_task_row(body.task_id, body.depends_on, {"role": body.role})]),
                Write(TASK_LINKS, {"story_id": story, "ids": [body.task_id]}),
            ]
        case PlanApproved() as body:
            node = {
                "story_id": story,
                "plan_id": body.plan_id,
                "approved_by": body.approved_by,
                "roles": body.roles,
                "timestamp": at,
            }
            row = {
                "plan_id": _key("plan_id", body.plan_id),
                "node": node,
                "status": "APPROVED",
                "order": change.order,
            }
            return [Write(PLAN_APPROVAL, key | row)]
        case TaskDispatched() as body:
            node = body.model_dump(include={"task_id", "agent_id", "role"}) | {"timestamp": at}
            row = {
                "node": node | {"story_id": story, "status": "DISPATCHED"},
                "task_id": body.task_id,
                "assignee": body.agent_id,
                "status": "IN_PROGRESS",
                "order": change.order,
            }
            return [Write(DISPATCH, key | row)]
        case TaskFinished() as body:
            row = {
                "story_id": story,
                "task_id": body.task_id,
                "assignee": body.assignee,
                "status": body.status.upper(),
                "order": change.order,
            }
            return [
                plan(body.plan_id, [_task_row(body.task_id, [], {})]),
                Write(TASK_STATUS, row),
                # If the task is new here, decisions that name it may be stored already.
                Write(TASK_LINKS, {"story_id": story, "ids": [body.task_id]}),
            ]
        case PlanFinished() as body:
            row = {"story_id": story, "plan_id": body.plan_id}
            return [
                plan(body.plan_id, []),
                Write(PLAN_STATUS, row | {"status": body.status, "order": change.order}),
                event(),
            ]
        case DeliberationCompleted() as body:
            decided = [
                _decision(story, decision, body.role, body.winner_id, at, change.order)
                for decision in body.decisions
            ]
            found = [event(), *decided, *_decision_links(story, body.decisions)]
            if change.workflow:  # its proposals have more details
                return found
            kept = {"task_id", "role", "winner_id", "score", "duration_ms"}
            node = body.model_dump(include=kept) | {
                "story_id": story,
                "decisions": len(decided),
                "status": "COMPLETED",
                "ended_at": at,
            }
            return [*found, Write(DELIBERATION, key | {"node": node})]
        case ContextDecisionAdded() as body:
            added = RecordedDecision(
                id=body.decision_id, type="CONTEXT", title=body.title, rationale=body.rationale
            )
            return [
                _decision(story, added, "", body.decided_by, at, change.order),
                *_decision_links(story, [added]),
            ]
        case ContextMilestoneReached() as body:
            return [event(body.milestone_id)]
        case ContextUpdated(version=version) if version > LAST_VERSION:
            return [event()]
        case ContextUpdated(version=version):
            return [event(), Write(CONTEXT_VERSION, {"story_id": story, "version": version})]
        case DeliberationFailed() as body:
            node = body.model_dump(include={"task_id", "role", "error", "error_type"}) | {
                "story_id": story,
                "duration_ms": body.duration_ms,
                "status": "FAILED",
                "ended_at": at,
                "failed_agents": [each.model_dump_json() for each in body.failed_agents],
            }
            row = {"id": deliberation_workflow_id(body.task_id), "story_id": story, "node": node}
            return [event(), Write(FAILED_DELIBERATION, row | {"order": change.order})]
        case (
            GateOpened()
            | GateClosed()
            | DeliberationStarted()
            | RoundCompleted()
            | RequestRefused()
        ):
            return [event()]
        case EntrySkipped() as body:
            written = event()
            written.row["node"]["entry"] = body.entry
            return [written]
        case _:
            raise AssertionError(f"no statement for {entry.kind}")


def _task_row(task_id: str, depends_on: list[str], node: Row) -> Row:
    return {
        "id": _key("task_id", task_id),
        "node": node,
        "depends_on": [_key("depends_on", needed) for needed in depends_on],
    }


def _decision(
    story: str,
    decision: RecordedDecision,
    role: str,
    decided_by: str,
    decided_at: str,
    order: str,
) -> Write:
    affects = [decision.affected_subtask] if decision.affected_subtask else []
    node = {
        "title": decision.title,
        "rationale": decision.rationale,
        "type": decision.type,
        "status": "ACCEPTED",
        "role": role,
        "decided_by": decided_by,
        "approved_by": decided_by,
        "decided_at": decided_at,
        "affects": list(dict.fromkeys(affects + decision.affects)),
    }
    key = {"id": _key("decision id", decision.id), "story_id": story}
    return Write(DECISION, key | {"node": node, "order": order})


def _decision_links(story: str, decisions: list[RecordedDecision]) -> list[Write]:
    """Return the writes that link decisions by name within a story; none without a story."""
    if not story:
        return []
    return [Write(DECISION_LINKS, {"story_id": story, "id": decision.id}) for decision in decisions]


# --- deliberations --------------------------------------------------------------------------------


def deliberation_writes(record: DeliberationRecord) -> list[Write]:
    """Return what a finished deliberation writes: proposals first, then the nodes attached to them.

    Agents are ordered by id, so that two deliberations of one council cannot deadlock.
    """
    story = _key("story_id", record.story_id)
    at = moment(record.timestamp, f"deliberation {record.deliberation_id}: timestamp")
    ranked = sorted(record.ranked, key=lambda each: each.agent_id)
    winner = next((each.proposal_id for each in record.ranked if each.rank == 1), "")
    found = [_proposal(record, each) for each in ranked]
    found += [write for each in ranked for write in _critiques(each)]
    found += [write for each in ranked for write in _checks(each)]
    plan_id = _key("plan_id", record.plan_id) if story else ""
    if plan_id:
        no_tasks: list[Row] = []
        plan = {"story_id": story, "plan_id": plan_id, "version": None, "tasks": no_tasks}
        found.append(Write(PLAN, plan))
    for decision in record.decisions:
        row = {"story_id": story, "id": decision.id}
        found.append(
            _decision(story, decision, record.role, record.winner_id, iso(at), order_key(at, 0, 0))
        )
        found.append(Write(DECISION_FROM, row | {"proposal_id": winner}))
        if plan_id:
            found.append(Write(PLAN_DECISION, row | {"plan_id": plan_id}))
    return found + _decision_links(story, record.decisions)


def _proposal(record: DeliberationRecord, ranked: RankedProposal) -> Write:
    node = ranked.model_dump(
        include={"agent_id", "role", "score", "rank", "barred", "prompt_hash", "model", "drafts"}
    ) | {
        "story_id": record.story_id,
        "deliberation_id": record.deliberation_id,
        "run_id": record.run_id,
        "task_id": record.task_id,
        "phase": record.phase,
        "revision": len(ranked.drafts),
        "approach": ranked.proposal.approach,
        "content": ranked.proposal.content,
        "judged": record.judged if ranked.rank == 1 else "",
        "failed_agents": [each.model_dump_json() for each in record.failed_agents]
        if ranked.rank == 1
        else [],
        "recorded_at": iso(moment(record.timestamp, "timestamp")),
    }
    row = {
        "id": _key("proposal_id", ranked.proposal_id),
        "story_id": record.story_id,
        "agent_id": _key("agent_id", ranked.agent_id),
        "role": ranked.role,
        "node": node,
    }
    return Write(PROPOSAL, row)


def _critiques(ranked: RankedProposal) -> list[Write]:
    """Return a write for each critic and round; ids of a critic's second end in `/2`."""
    rounds: dict[str, int] = {}
    found = []
    critics = [*ranked.critics, *["unknown"] * len(ranked.critiques)]
    for critique, critic in zip(ranked.critiques, critics, strict=False):
        rounds[critic] = rounds.get(critic, 0) + 1
        suffix = f"/{rounds[critic]}" if rounds[critic] > 1 else ""
        node = {
            "critic": critic,
            "round": rounds[critic],
            "verdict": critique.verdict,
            "points": [f"{point.severity}: {point.text}" for point in critique.points],
            "suggestion": critique.suggestion,
        }
        row = {
            "id": f"{ranked.proposal_id}/critique/{critic}{suffix}",
            "proposal_id": ranked.proposal_id,
            "node": node,
        }
        found.append(Write(CRITIQUE, row))
    return found


def _checks(ranked: RankedProposal) -> list[Write]:
    return [
        Write(
            CHECK,
            {
                "id": f"{ranked.proposal_id}/check/{check.name}",
                "proposal_id": ranked.proposal_id,
                "node": check.model_dump(),
            },
        )
        for check in ranked.checks
    ]


def _key(field: str, value: str) -> str:
    if len(value.encode()) > KEY_BYTES:
        raise _refusal(f"{field}: {value[:60]!r}... is longer than {KEY_BYTES} bytes; shorten it")
    return value


def _refusal(message: str) -> ApplicationError:
    return application_error(ErrorType.INVALID_ENTRY, message)
