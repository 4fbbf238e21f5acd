"""A workflow that outlives its parent's run: after the signal `outlive` it ignores cancellations.

Temporal requests a child's cancellation when its parent continues as new, as it does when the
parent is terminated (workflows/child.py). Here that request is removed before the workflow sees it,
and the signal `stop` becomes a cancellation. Both depend only on the history, so a replay has the
same result. A plan that continues as new itself notes in its memo that it outlives.
See docs/design/0007-continue-as-new-with-a-child.md.
"""

from __future__ import annotations

from temporalio.bridge.proto.workflow_activation import WorkflowActivation, WorkflowActivationJob
from temporalio.worker import WorkflowInstanceDetails

from workflows.child import OUTLIVE, STOP


class Outliving:
    """A filter of one workflow's cancellations, if the workflow handles both signals."""

    def __init__(self, details: WorkflowInstanceDetails) -> None:
        self._applies = {OUTLIVE, STOP} <= set(details.defn.signals)
        self._outlives = OUTLIVE in details.info.raw_memo

    def judge(self, act: WorkflowActivation) -> WorkflowActivation:
        """Return the activation that the workflow receives."""
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
