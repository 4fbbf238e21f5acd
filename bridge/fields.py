"""The meaning of each field of a message on the bus, with an example."""

from __future__ import annotations

from typing import Any, NamedTuple


class Field(NamedTuple):
    """The documentation of a field.

    meaning: one sentence without its full stop. example: a valid value; None if it is absent.
    """

    meaning: str
    example: Any


FIELDS: dict[str, Field] = {
    "story_id": Field("The story", "US-101"),
    "timestamp": Field("When it happened: ISO 8601, UTC", "2026-03-01T10:00:00.000Z"),
    "title": Field("The story's title", "Undo the deletion of a note"),
    "rigor": Field("The story's rigor level: L0 to L3", "L1"),
    "created_by": Field("Who handed the story in", "ana"),
    "from_phase": Field("The state that was left", "DRAFT"),
    "to_phase": Field("The state that was reached", "DESIGN"),
    "event": Field("The transition's event, as the machine names it", "approve_scope"),
    "actor": Field("Who did it; `policy:auto` where the story's policy did", "ana"),
    "reason": Field("Why, where a reason was given; else empty", ""),
    "gate": Field("The gate, as the machine names it; or `budget`", "approve_scope"),
    "role": Field("The council's role", "ARCHITECT"),
    "GateOpened.role": Field("The role that may open it", "PO"),
    "GateClosed.role": Field("The role that could open it", "PO"),
    "TaskCreated.role": Field("The role of the council that will work on it", "DEV"),
    "TaskDispatched.role": Field("The council's role", "DEV"),
    "revision": Field("The content hash of what the gate shows", "3f2a9c1e5b7d8042"),
    "GateClosed.actor": Field("Who passed it; absent where it closed without a person", "ana"),
    "StoryCancelled.status": Field(
        "`CANCELLED`; `FAILED`: the workflow failed or timed out", "CANCELLED"
    ),
    "StoryCancelled.reason": Field(
        "Why the workflow ended, where it was not cancelled; else empty", ""
    ),
    "plan_id": Field("The plan", "US-101-plan-1"),
    "roles": Field("The councils that deliberate where no one knows the story; else empty", []),
    "approved_by": Field("Who approved it", "ana"),
    "task_id": Field("The task, or the phase's work, that the council has", "US-101-design-1"),
    "TaskCreated.task_id": Field("The task", "US-101-plan-1-t2"),
    "TaskDispatched.task_id": Field("The task", "US-101-plan-1-t2"),
    "depends_on": Field("The tasks that must be done before it", ["US-101-plan-1-t1"]),
    "TaskCompleted.role": Field("The role of the council that worked on it", "DEV"),
    "TaskCompleted.task_id": Field("The task", "US-101-plan-1-t2"),
    "TaskCompleted.status": Field("Always `done`", "done"),
    "TaskCompleted.assignee": Field("The agent whose proposal won", "agent-dev-2"),
    "TaskFailed.role": Field("The role of the council that it was for", "DEV"),
    "TaskFailed.task_id": Field("The task", "US-101-plan-1-t2"),
    "TaskFailed.status": Field(
        "`failed`; `not_run`: a task that it depends on failed; `cancelled`: its plan was stopped",
        "failed",
    ),
    "TaskFailed.assignee": Field("Empty: no proposal won", ""),
    "TaskFailed.error": Field(
        "Every cause of the failure; else empty", "QuorumLost: 2 of 3 agents failed"
    ),
    "PlanFinished.status": Field(
        "`COMPLETED`; `PARTIAL`: some tasks were not done; `NOTHING_TO_RUN`; `FAILED`; `CANCELLED`",
        "PARTIAL",
    ),
    "PlanFinished.done": Field("The tasks that were done", ["US-101-plan-1-t1"]),
    "PlanFinished.failed": Field("The tasks that failed", ["US-101-plan-1-t2"]),
    "GateApproved.id": Field("The approval", "US-101-approve_scope-1-PO-6f1d2c9a"),
    "GateApproved.role": Field("The role that it was approved as", "PO"),
    "GateApproved.revision": Field(
        "The content hash of what was approved; empty where none was shown", "3f2a9c1e5b7d8042"
    ),
    "GateApproved.comment": Field("The person's comment; else empty", ""),
    "GateApproved.via": Field(
        "How the actor is known: `claim`, the actor and role as the caller named them", "claim"
    ),
    "TaskDispatched.agent_id": Field("The council that it was given to", "council-DEV"),
    "winner_id": Field("The agent whose proposal won", "agent-architect-2"),
    "score": Field("The winner's score: 0 to 1", 0.95),
    "decisions": Field(
        "What the winner decided",
        [
            {
                "id": "US-101-design-1-d1",
                "type": "DESIGN",
                "title": "Deleted notes are kept for a day",
                "rationale": "An undo needs the text",
                "affected_subtask": "",
                "affects": ["the store of notes"],
            }
        ],
    ),
    "RecordedDecision.id": Field("The decision", "US-101-design-1-d1"),
    "RecordedDecision.type": Field("What kind of decision it is", "DESIGN"),
    "RecordedDecision.title": Field("The decision in a line", "Deleted notes are kept for a day"),
    "rationale": Field("Why it was decided so", "An undo needs the text"),
    "affected_subtask": Field("The task that it is about; else empty", ""),
    "affects": Field("What it touches, in the agent's words", ["the store of notes"]),
    "duration_ms": Field("How long it took, in milliseconds", 41_250),
    "error_type": Field(
        "What it failed of: `QuorumLost`, `DeliberationTimeout`, `AllBarred`, `Cancelled` or the "
        "type of the error",
        "QuorumLost",
    ),
    "failed_agents": Field(
        "The agents that failed, each with what it was asked to do and why it failed",
        [{"agent_id": "agent-dev-2", "act": "propose", "cause": "LlmTimeout: silent for 60 s"}],
    ),
    "FailedAgent.agent_id": Field("The agent that failed", "agent-dev-2"),
    "FailedAgent.act": Field("What it was asked to do", "propose"),
    "cause": Field("Why it failed", "LlmTimeout: silent for 60 s"),
    "error": Field("Every cause of the failure", "QuorumLost: 2 of 3 agents failed"),
    "round": Field("Which round, from 1", 1),
    "version": Field("Grows with every change of the story's context", 3),
    "changed": Field("What has changed", ["title", "brief"]),
    "decision_id": Field("The decision", "US-101-design-1-d1"),
    "ContextDecisionAdded.title": Field(
        "The decision in a line", "Deleted notes are kept for a day"
    ),
    "decided_by": Field("The agent or person that decided", "agent-architect-2"),
    "milestone_id": Field("The milestone", "US-101-m1"),
    "event_type": Field("What kind of milestone it is", "PHASE_COMPLETED"),
    "description": Field("The milestone in words", "The design is approved"),
    "agent_id": Field("The agent that is asked", "agent-dev-1"),
    "act": Field("What it is asked to do", "propose"),
    "prompt": Field("The whole prompt, as text", "You are a developer …"),
    "call_id": Field("This one attempt: the answer bears it", "6f1d2c9a"),
    "answer_schema": Field("The JSON schema that the answer's content obeys", {"type": "object"}),
    "max_tokens": Field("How long the answer may be, in tokens", 1_024),
    "temperature": Field("How freely to sample", 0.7),
    "seed": Field("The seed to sample with", 42),
    "AgentResponse.agent_id": Field("The agent that answers", "agent-dev-1"),
    "AgentResponse.call_id": Field("The command's `call_id`", "6f1d2c9a"),
    "status": Field("`working`: alive and at it; `done`: has content; `failed`: has error", "done"),
    "content": Field("The answer: a JSON document of the command's `answer_schema`", "{}"),
    "AgentResponse.error": Field("Why the agent failed", None),
    "AgentResponse.timestamp": Field("When it was published: ISO 8601", "2026-03-01T10:00:41.250Z"),
    "AgentResponse.duration_ms": Field("How long the agent took, in milliseconds", 41_250),
    "model": Field("The model that answered", "SmolLM2-135M-Instruct"),
    "tokens_in": Field("How long the prompt was, in tokens", 1_830),
    "tokens_out": Field("How long the answer was, in tokens", 412),
}
"""Field -> its documentation; class and field, if the field has another meaning in that class."""


def words(model: str, field: str) -> Field:
    """Return the documentation of a field of that class.

    Raises:
        KeyError: the field is not documented.
    """
    return FIELDS.get(f"{model}.{field}") or FIELDS[field]
