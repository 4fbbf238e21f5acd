"""A workflow that outlives its parent's run: from the signal `outlive` on, cancellations pass by.

Temporal asks a child to cancel when its parent continues as new, as when it is terminated
(workflows/child.py). Here that request is taken out before the workflow has it, and the signal
`stop` becomes a cancellation. Both follow from the history alone, so a replay comes to the same.
"""

from __future__ import annotations

from temporalio.bridge.proto.workflow_activation import WorkflowActivation, WorkflowActivationJob
from temporalio.worker import WorkflowInstanceDetails

from workflows.child import OUTLIVE, STOP


class Outliving:
    """Judges one workflow's cancellations. Only workflows that take both signals are judged."""

    def __init__(self, details: WorkflowInstanceDetails) -> None:
        self._applies = {OUTLIVE, STOP} <= set(details.defn.signals)
        self._outlives = False

    def judge(self, act: WorkflowActivation) -> WorkflowActivation:
        """The activation that the workflow has."""
        if not self._applies:
            return act
        jobs = [judged for job in act.jobs if (judged := self._judged(job))]
        part = WorkflowActivation()
        part.CopyFrom(act)
        del part.jobs[:]
        part.jobs.extend(jobs)
        return part

    def _judged(self, job: WorkflowActivationJob) -> WorkflowActivationJob | None:
        if job.HasField("cancel_workflow") and self._outlives:
            return None
        if job.HasField("signal_workflow"):
            name = job.signal_workflow.signal_name
            self._outlives = self._outlives or name == OUTLIVE
            if name == STOP:
                stop = WorkflowActivationJob()
                stop.cancel_workflow.reason = STOP
                return stop
        return job
