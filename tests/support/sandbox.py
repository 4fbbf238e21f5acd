"""The SDK's sandbox of workflow code: strict for workflows, open for what they build on.

It refuses calls that a replay would not repeat, such as `datetime.now()`. The unit tests and the
replays use it; the story worker does not, because it makes each workflow slower.
"""

from __future__ import annotations

from temporalio.worker import WorkflowInstance, WorkflowInstanceDetails
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

from workers.workflow_runner import ResetFirst

PASSED_THROUGH = (
    "pydantic",
    "pydantic_core",
    "annotated_types",
    "typing_extensions",
    "workflows.current_details",
    "workflows.models",
    "workflows.rules",
    "workflows.search_attributes",
    "workflows.story_state",
    "workflows.stubs",
)
"""Modules that are pure and keep no state: imported once, not again for each workflow."""


class SandboxedRunner(SandboxedWorkflowRunner):
    """The sandbox of the SDK, with instances that handle a reset first."""

    def create_instance(self, det: WorkflowInstanceDetails) -> WorkflowInstance:
        """Create a workflow in its sandbox."""
        return ResetFirst(det, super().create_instance)


def sandboxed_runner() -> SandboxedRunner:
    """Return a runner for the workers of a test, or for a replay."""
    restrictions = SandboxRestrictions.default.with_passthrough_modules(*PASSED_THROUGH)
    return SandboxedRunner(restrictions=restrictions)
