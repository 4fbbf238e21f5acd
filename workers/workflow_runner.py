"""The sandbox that workflow code runs in: strict for the workflows, open for what they stand on."""

from __future__ import annotations

from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

PASSED_THROUGH = (
    "pydantic",
    "pydantic_core",
    "annotated_types",
    "typing_extensions",
    "workflows.dag",
    "workflows.details",
    "workflows.events",
    "workflows.fsm",
    "workflows.models",
    "workflows.outbox_state",
    "workflows.ranking",
    "workflows.rigor",
    "workflows.search_attributes",
    "workflows.story_state",
    "workflows.stubs",
)
"""What is pure and keeps no state: imported once, not anew for each workflow."""


def workflow_runner() -> SandboxedWorkflowRunner:
    """The workflow runner of every story worker, in production, in tests and in replays."""
    restrictions = SandboxRestrictions.default.with_passthrough_modules(*PASSED_THROUGH)
    return SandboxedWorkflowRunner(restrictions=restrictions)
