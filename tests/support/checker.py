"""An independent checker that compares stories' histories with the streams and the graph.

It uses only the fleet's contracts: the activities `record` and `publish`, the signal `hand_on`,
the subjects and the labels. It imports none of the fleet's code, so that it does not repeat that
code's errors.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

import neo4j
from nats.aio.client import Client as Nats
from nats.errors import TimeoutError as NatsTimeout
from nats.js.api import AckPolicy, ConsumerConfig
from temporalio.api.common.v1 import Payloads
from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import Client, WorkflowExecutionStatus

ANNOUNCING = ("announce", "announce_outcome")
"""The activities that record entries and then publish them."""

ENDED = (
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCELED,
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED,
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TERMINATED,
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TIMED_OUT,
)
"""The last events of runs that neither completed nor were continued as new."""

STREAMS = ("PLANNING_EVENTS", "ORCHESTRATOR_EVENTS", "CONTEXT")

NODES = {
    "planning.story.created": ("Story", "story_id"),
    "planning.story.transitioned": ("PhaseTransition", None),
    "planning.plan.approved": ("PlanApproval", None),
    "planning.gate.approved": ("GateApproval", "id"),
    "planning.task.created": ("Subtask", "task_id"),
    "orchestration.task.completed": ("Subtask", "task_id"),
    "orchestration.task.failed": ("Subtask", "task_id"),
    "orchestration.task.dispatched": ("TaskDispatch", None),
    "context.decision.added": ("Decision", "decision_id"),
    "context.milestone.reached": ("Event", "milestone_id"),
}
"""Subject -> the label of its node and the body field with the node's id (None: the event's id).

Every other event is an `Event` node under its own id.
"""

FINAL_TASK = {"DONE", "FAILED", "NOT_RUN", "CANCELLED", "DELETED"}


@dataclass(frozen=True)
class Event:
    """An event as it is published."""

    id: str
    subject: str
    body: dict[str, Any]

    @property
    def node(self) -> tuple[str, str]:
        label, field_name = NODES.get(self.subject, ("Event", None))
        return label, str(self.body[field_name]) if field_name else self.id


@dataclass
class StoryHistory:
    """The contents of a story's histories and of its children's histories."""

    story_id: str
    events: list[Event] = field(default_factory=list)
    """Events in the order in which they were passed to `publish`."""
    handed_on: list[Event] = field(default_factory=list)
    """Events that children handed to the story for publishing."""
    states: list[str] = field(default_factory=list)
    """The values of StoryState in order, starting with the machine's initial state."""
    recorded: set[str] = field(default_factory=set)
    """Ids of the entries that `record` or `announce` has stored, in whichever run."""
    tried: list[tuple[str, Event]] = field(default_factory=list)
    """Events that were passed to `publish` or `announce`, with the workflow that did it."""
    published: set[str] = field(default_factory=set)
    """Ids of the events that one of them has published, in whichever run of its workflow."""
    deliberations: list[tuple[str, str]] = field(default_factory=list)
    """The deliberations that completed, as (id, run id): a task can be tried again."""
    cancelled: bool = False
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Published:
    """A message of a stream."""

    stream: str
    sequence: int
    event: Event
    story_id: str


# --- reading --------------------------------------------------------------------------------------


async def read_histories(client: Client, story_id: str) -> StoryHistory:
    """Read every run of the story's workflow, and every run of every child it started."""
    contents = StoryHistory(story_id)
    story = f"story-{story_id}"
    latest = await client.get_workflow_handle(story).describe()
    contents.cancelled = latest.status is WorkflowExecutionStatus.CANCELED
    first = latest.raw_description.workflow_execution_info.first_run_id
    to_read, read = [(story, first)], set[tuple[str, str]]()
    while to_read:
        workflow_id, run_id = to_read.pop(0)
        if (workflow_id, run_id) in read:
            continue
        read.add((workflow_id, run_id))
        handle = client.get_workflow_handle(workflow_id, run_id=run_id)
        history = [event async for event in handle.fetch_history_events()]
        for event in history:
            await _decrypt(client, event)
        to_read += _read_run(contents, workflow_id, history)
        match history[-1].event_type:
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CONTINUED_AS_NEW:
                ended = history[-1].workflow_execution_continued_as_new_event_attributes
                to_read.insert(0, (workflow_id, ended.new_execution_run_id))
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_COMPLETED:
                if workflow_id.startswith("deliberation-"):
                    contents.deliberations.append((workflow_id, run_id))
            case ended_by if ended_by not in ENDED:
                contents.faults.append(f"{workflow_id} still runs")
    contents.faults += [
        f"{workflow_id}: {event.subject} {event.id} was never published"
        for workflow_id, event in contents.tried
        if event.id not in contents.published
    ]
    return contents


async def _decrypt(client: Client, event: HistoryEvent) -> None:
    codec = client.data_converter.payload_codec
    scheduled = event.activity_task_scheduled_event_attributes
    signal = event.signal_external_workflow_execution_initiated_event_attributes
    completed = event.activity_task_completed_event_attributes
    for payloads in (scheduled.input, signal.input, completed.result):
        if codec and payloads.payloads:
            await codec.decode_wrapper(payloads)


def _read_run(
    contents: StoryHistory, workflow_id: str, history: Iterable[HistoryEvent]
) -> list[tuple[str, str]]:
    """Add one run to `contents` and return the workflow and run ids of its children."""
    recording: dict[int, list[str]] = {}
    publishing: dict[int, list[Event]] = {}
    announcing: dict[int, list[str]] = {}
    handing: dict[int, list[Event]] = {}
    children = []
    for event in history:
        match event.event_type:
            case EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED:
                scheduled = event.activity_task_scheduled_event_attributes
                name = scheduled.activity_type.name
                if name not in ("record", "publish", *ANNOUNCING):
                    continue
                entries = _arguments(scheduled.input)[0]["entries"]
                if name != "publish":
                    recording[event.event_id] = [entry["id"] for entry in entries]
                if name == "record":
                    continue
                events = _events(entries)
                publishing[event.event_id] = events
                if name in ANNOUNCING:
                    announcing[event.event_id] = [entry["id"] for entry in entries]
                    # The activity records before it sends.
                    contents.recorded.update(announcing[event.event_id])
                contents.faults += [
                    f"{workflow_id}: {each.subject} {each.id} announced before it was recorded"
                    for each in events
                    if each.id not in contents.recorded
                ]
                known = {each.id for each in contents.events}
                contents.events += [each for each in events if each.id not in known]
            case EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED:
                done = event.activity_task_completed_event_attributes.scheduled_event_id
                contents.recorded.update(recording.get(done, ()))
                completed = event.activity_task_completed_event_attributes
                sent = {each.id for each in publishing.get(done, ())}
                if done in announcing:
                    (answer,) = _arguments(completed.result)
                    sent &= set(announcing[done][: answer["published"]])
                contents.published |= sent
            case EventType.EVENT_TYPE_SIGNAL_EXTERNAL_WORKFLOW_EXECUTION_INITIATED:
                signal = event.signal_external_workflow_execution_initiated_event_attributes
                if signal.signal_name == "hand_on":
                    handing[event.event_id] = _events(_arguments(signal.input)[0])
            case EventType.EVENT_TYPE_EXTERNAL_WORKFLOW_EXECUTION_SIGNALED:
                signaled = event.external_workflow_execution_signaled_event_attributes
                contents.handed_on += handing.get(signaled.initiated_event_id, ())
            case EventType.EVENT_TYPE_CHILD_WORKFLOW_EXECUTION_STARTED:
                started = event.child_workflow_execution_started_event_attributes
                child = started.workflow_execution
                children.append((child.workflow_id, child.run_id))
            case EventType.EVENT_TYPE_UPSERT_WORKFLOW_SEARCH_ATTRIBUTES:
                upsert = event.upsert_workflow_search_attributes_event_attributes
                if payload := upsert.search_attributes.indexed_fields.get("StoryState"):
                    state = json.loads(payload.data)
                    if contents.states[-1:] != [state]:  # the next run sets it again
                        contents.states.append(state)
    contents.tried += [(workflow_id, each) for events in publishing.values() for each in events]
    return children


def _events(entries: list[dict[str, Any]]) -> list[Event]:
    """Return the entries for the bus; an entry without a subject is for the graph only."""
    return [Event(e["id"], e["subject"], e["body"]) for e in entries if e["subject"]]


def _arguments(payloads: Payloads) -> list[Any]:
    for payload in payloads.payloads:
        encoding = payload.metadata.get("encoding", b"").decode()
        if encoding != "json/plain":
            raise ValueError(f"a payload of encoding {encoding!r} cannot be read here")
    return [json.loads(payload.data) for payload in payloads.payloads]


async def read_streams(nats: Nats) -> list[Published]:
    """Read every message of the three streams, one stream after another, in stream order."""
    messages = []
    for stream in STREAMS:
        messages += [message async for message in _read_stream(nats, stream)]
    return messages


async def _read_stream(nats: Nats, stream: str) -> AsyncIterator[Published]:
    jetstream = nats.jetstream()
    left = (await jetstream.stream_info(stream)).state.messages
    if not left:
        return
    subscription = await jetstream.pull_subscribe(
        "", stream=stream, config=ConsumerConfig(ack_policy=AckPolicy.NONE)
    )
    while left > 0:
        try:
            messages = await subscription.fetch(min(left, 500), timeout=10)
        except NatsTimeout:
            break
        left -= len(messages)
        for message in messages:
            headers = message.headers or {}
            yield Published(
                stream,
                message.metadata.sequence.stream,
                Event(headers.get("ce-id", ""), message.subject, json.loads(message.data)),
                headers.get("ce-subject", ""),
            )
    await subscription.unsubscribe()


@dataclass(frozen=True)
class Graph:
    """The contents of the graph for one story."""

    nodes: frozenset[tuple[str, str]]
    """Pairs of label and id."""
    transitions: list[tuple[str, str, str]]
    """Transitions as (id, from, to), ordered by time."""
    status: str
    tasks: dict[str, str]
    plans: dict[str, str]
    """Plan id -> status."""
    deliberations: dict[tuple[str, str], int]
    """Id and run id of a deliberation -> number of its proposals with rank 1."""
    lost_decisions: list[str]
    """Ids of decisions without a link to a proposal."""


async def read_graph(driver: neo4j.AsyncDriver, story_id: str) -> Graph:
    async def ask(cypher: Any) -> list[list[Any]]:
        async with driver.session() as session:
            return await (await session.run(cypher, story=story_id)).values()

    nodes = await ask(
        "MATCH (s:Story {id: $story}) RETURN 'Story' AS label, s.id AS id UNION "
        "MATCH (n)-[:OF]->(:Story {id: $story}) UNWIND labels(n) AS label "
        "RETURN label, n.id AS id UNION "
        "MATCH (t:Subtask {case_id: $story}) RETURN 'Subtask' AS label, t.id AS id"
    )
    transitions = await ask(
        "MATCH (t:PhaseTransition {story_id: $story}) "
        "RETURN t.id, t.from_phase, t.to_phase ORDER BY t.timestamp"
    )
    status = await ask("MATCH (s:Story {id: $story}) RETURN s.status")
    tasks = await ask("MATCH (t:Subtask {case_id: $story}) RETURN t.id, t.status")
    plans = await ask(
        "MATCH (:Story {id: $story})-[:HAS_PLAN]->(p:PlanVersion) RETURN p.id, p.status"
    )
    winners = await ask(
        "MATCH (p:Proposal {story_id: $story, rank: 1}) "
        "RETURN p.deliberation_id, p.run_id, count(p)"
    )
    lost = await ask(
        "MATCH (d:Decision {case_id: $story}) WHERE NOT (d)-[:FROM]->(:Proposal)-[:BY]->(:Agent) "
        "AND d.type <> 'CONTEXT' RETURN d.id"
    )
    return Graph(
        nodes=frozenset((label, node) for label, node in nodes),
        transitions=[(number, source, target) for number, source, target in transitions],
        status=status[0][0] if status else "",
        tasks=dict(tasks),
        plans=dict(plans),
        deliberations={(each, run_id): count for each, run_id, count in winners},
        lost_decisions=[decision for (decision,) in lost],
    )


# --- comparing ------------------------------------------------------------------------------------


def differences(contents: StoryHistory, streams: Iterable[Published], graph: Graph) -> list[str]:
    """Return the differences between histories, streams and graph, one per line.

    The list is empty if all three agree.
    """
    mine = [message for message in streams if message.story_id == contents.story_id]
    return [
        f"{contents.story_id}: {fault}"
        for fault in [
            *contents.faults,
            *_streams_differ(contents, mine),
            *_graph_differs(contents, graph),
            *_left_open(mine, graph),
        ]
    ]


def _streams_differ(contents: StoryHistory, mine: list[Published]) -> Iterable[str]:
    expected = {event.id: event for event in contents.events}
    times = Counter(message.event.id for message in mine)
    for event in contents.events:
        if times[event.id] == 0:
            yield f"{event.subject} {event.id} is on no stream"
        elif times[event.id] > 1:
            yield f"{event.subject} {event.id} is {times[event.id]} times on the streams"
    for message in mine:
        event = message.event
        if event.id not in expected:
            yield f"{event.subject} {event.id} is on {message.stream}, and in no history"
        elif event != expected[event.id]:
            yield f"{event.subject} {event.id} on {message.stream} is not what the history says"
    for stream in STREAMS:
        there = [message.event.id for message in mine if message.stream == stream]
        unique = list(dict.fromkeys(number for number in there if number in expected))
        in_order = [event.id for event in contents.events if event.id in set(unique)]
        if unique != in_order:
            yield f"{stream} has the story's events in another order than the history"
    for event in contents.handed_on:
        if event.id not in expected:
            yield f"{event.subject} {event.id} was handed on and never published"
    moves = [m.event.body["to_phase"] for m in mine if m.event.subject.endswith("transitioned")]
    if moves != contents.states[1:]:
        yield f"the streams say {' '.join(moves)}; the history says {' '.join(contents.states[1:])}"


def _graph_differs(contents: StoryHistory, graph: Graph) -> Iterable[str]:
    for event in contents.events:
        label, node = event.node
        if (label, node) not in graph.nodes:
            yield f"the graph lacks {label} {node}, of {event.subject} {event.id}"
    moved = [
        (event.id, event.body["from_phase"], event.body["to_phase"])
        for event in contents.events
        if event.subject == "planning.story.transitioned"
    ]
    if graph.transitions != moved:
        there, wanted = _path(graph.transitions), _path(moved)
        yield f"the graph's transitions are {there}; the history's are {wanted}"
    status = "CANCELLED" if contents.cancelled else (contents.states or [graph.status])[-1]
    if graph.status != status:
        yield f"the graph says {graph.status}, the history {status}"
    for deliberation, run_id in contents.deliberations:
        winners = graph.deliberations.get((deliberation, run_id), 0)
        if winners != 1:
            yield f"the graph has {winners} winners of run {run_id} of {deliberation}"
    for decision in graph.lost_decisions:
        yield f"decision {decision} comes from no proposal"


def _left_open(mine: list[Published], graph: Graph) -> Iterable[str]:
    gates: Counter[str] = Counter()
    for message in mine:
        if message.event.subject == "planning.gate.opened":
            gates[message.event.body["gate"]] += 1
        if message.event.subject == "planning.gate.closed":
            gates[message.event.body["gate"]] -= 1
    yield from (f"gate {gate} is open" for gate, count in gates.items() if count != 0)
    for task, status in graph.tasks.items():
        if status not in FINAL_TASK:
            yield f"task {task} is {status}"
    for plan, status in graph.plans.items():
        if status not in ("COMPLETED", "PARTIAL", "CANCELLED", "FAILED", "NOTHING_TO_RUN"):
            yield f"plan {plan} is {status}"


def _path(transitions: Iterable[tuple[str, str, str]]) -> str:
    return ", ".join(f"{source} -> {target}" for _, source, target in transitions) or "none"


def paid_twice(calls: Iterable[dict[str, Any]]) -> list[str]:
    """Return the calls that the endpoint answered more than once, by act, prompt and seed."""
    answered = Counter(
        (call["act"], call["seed"], json.dumps(call["messages"]))
        for call in calls
        if call["end"] == "answered"
    )
    return [
        f"{act} with seed {seed} was answered {times} times"
        for (act, seed, _), times in answered.items()
        if times > 1
    ]


async def check(
    client: Client, nats: Nats, driver: neo4j.AsyncDriver, story_ids: Iterable[str]
) -> list[str]:
    """Return every difference found in these stories."""
    streams = await read_streams(nats)
    found = []
    for story_id in story_ids:
        contents = await read_histories(client, story_id)
        found += differences(contents, streams, await read_graph(driver, story_id))
    return found
