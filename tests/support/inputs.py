"""What can be sent to each workflow: its start, and its updates and signals by name."""

from __future__ import annotations

from typing import Any

from workflows.closure import StoryClosureWorkflow
from workflows.coach import CoachWorkflow
from workflows.context_update import ContextUpdateWorkflow
from workflows.deliberation import DeliberationWorkflow
from workflows.derivation import DerivationWorkflow
from workflows.evaluation import EvaluationWorkflow
from workflows.implementation import ImplementationWorkflow
from workflows.models.events import DeliberationStarted, example
from workflows.plan import PlanWorkflow
from workflows.story import StoryWorkflow

STORY = "US-101"
CHILD = f"deliberation-{STORY}-design-1"
DECISION = {"decision_id": "d", "title": "t", "rationale": "r", "decided_by": "ana"}
MILESTONE = {"milestone_id": "m", "event_type": "DEMO", "description": "shown"}
USAGE = {"act": "propose", "agent_id": "a", "role": "DEV", "model": "m", "tokens_in": 1}
ENTRY = {
    "id": f"{CHILD}/run/1",
    "kind": "DeliberationStarted",
    "subject": DeliberationStarted.SUBJECT,
    "source": CHILD,
    "story_id": STORY,
    "time": "2026-03-01T10:00:00.000Z",
    "body": example(DeliberationStarted),
}
NEWS: dict[str, Any] = {
    "add_decision": DECISION,
    "add_decisions": {"decisions": [DECISION]},
    "add_milestone": MILESTONE,
    "add_milestones": {"milestones": [MILESTONE]},
    "not_understood": "x",
}
REPORT: dict[str, Any] = {
    "job_id": "j",
    "commit": "c0ffee1",
    "actor": "ana",
    "build": {"ok": True},
    "unit": {"ok": True, "passed": 1, "failed": 0, "coverage": 95.0},
    "static": {"ok": True, "sonar": {"quality_gate": "OK", "new_critical": 0, "new_major": 0}},
    "e2e": {"ok": True, "passed": 1, "failed": 0},
}
RUN: dict[str, Any] = {**NEWS, "outlive": None, "stop": None}

SENT: dict[type, tuple[dict[str, Any], dict[str, Any]]] = {
    StoryWorkflow: (
        {"story_id": STORY, "title": "t", "brief": "b", "acceptance_criteria": ["a"]},
        {
            **NEWS,
            "approve": {"gate": "approve_scope", "actor": "ana", "role": "PO", "comment": "c"},
            "reject": {"event": "reject_design", "actor": "ana", "role": "PO", "reason": "r"},
            "amend": {"title": "t", "brief": "b", "acceptance_criteria": ["a"], "actor": "ana"},
            "raise_budget": {"tokens": 10, "actor": "ana", "role": "PO"},
            "rebase": {"actor": "ana", "role": "PO"},
            "report": REPORT,
            "hand_on": [ENTRY],
            "request_wave": {"workflow_id": CHILD, "wave": "propose", "usage": [USAGE]},
            "context_updated": 3,
        },
    ),
    DeliberationWorkflow: (
        {"task_id": "t", "role": "DEV", "description": "d", "decisions": [DECISION]},
        {
            **RUN,
            "grant_wave": "propose",
            "request_wave": {"workflow_id": CHILD, "wave": "run/1", "usage": [USAGE]},
        },
    ),
    PlanWorkflow: ({"story_id": STORY, "plan_id": "p", "roles": ["DEV"]}, RUN),
    ContextUpdateWorkflow: (
        {"story_id": STORY, "actor": "ana", "changes": [{"operation": "CREATE", "payload": "{}"}]},
        {"stored": "hash", "follow": "context-US-101-x", "precede": None},
    ),
    ImplementationWorkflow: (
        {
            "repository": "sample",
            "task": {"task_id": "t", "role": "DEV", "description": "d"},
            "agent": {"agent_id": "a", "role": "DEV"},
            "paths": ["README.md"],
            "decisions": [DECISION],
        },
        {**NEWS, "grant_wave": "run/1"},
    ),
    EvaluationWorkflow: (
        {
            "run": "r",
            "task": {"instance_id": "i", "problem_statement": "p", "fail_to_pass": ["t"]},
            "configuration": {"kind": "one"},
            "repository": {"key": "sample", "url": "file:///r"},
            "base": "0" * 40,
        },
        {},
    ),
    DerivationWorkflow: ({"story_id": STORY, "plan_id": "p"}, {}),
    CoachWorkflow: ({"goal": "g"}, {}),
    StoryClosureWorkflow: (
        {"story_id": STORY, "run_id": "r", "outbox": {"entries": [ENTRY]}, "owner": CHILD},
        {},
    ),
}
"""Workflow -> an input of its run, and an input of each update and signal."""
