"""The runner of workflow code: without the SDK's sandbox, which the tests use.

The sandbox imports the modules of a workflow again for each workflow. That takes time and memory,
and finds nothing in deployed code that the tests did not find: the unit tests and the replays of
recorded histories run in it (tests/support/sandbox.py).
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

from temporalio.bridge.proto.workflow_activation import WorkflowActivation, WorkflowActivationJob
from temporalio.bridge.proto.workflow_completion import WorkflowActivationCompletion
from temporalio.converter import SerializationContext, StorageDriverStoreContext
from temporalio.worker import (
    UnsandboxedWorkflowRunner,
    WorkflowInstance,
    WorkflowInstanceDetails,
)
from temporalio.workflow import Info

from workers.outliving import Outliving
from workers.payloads import Payloads
from workflows.models.ids import run_after_reset


class ResetFirst(WorkflowInstance):
    """A workflow instance that handles a reset before the signals that came after it.

    Inputs that cannot be decoded are rejected first (workers/payloads.py).

    After a reset, one activation has both, and the SDK delivers signals and updates first. The
    events that these append to the outbox would be taken for those that the previous run had
    appended at the same position. If a run was reset to its very beginning, `make` creates its
    instance again, with the run name of the reset. See docs/design/0002-event-ids-and-resets.md.
    """

    def __init__(
        self,
        details: WorkflowInstanceDetails,
        make: Callable[[WorkflowInstanceDetails], WorkflowInstance],
    ) -> None:
        self._details, self._make = details, make
        self._payloads = Payloads(details)
        self._outliving = Outliving(details)
        self._inner = make(details)

    def activate(self, act: WorkflowActivation) -> WorkflowActivationCompletion:
        act, answers = self._payloads.judge(self._outliving.judge(act))
        if act.jobs and not answers:
            return self._activated(act)
        completion = WorkflowActivationCompletion()
        completion.successful.SetInParent()
        if act.jobs:
            completion = self._activated(act)
        if not completion.HasField("failed"):
            completion.successful.commands.extend(answers)
        return completion

    def _activated(self, act: WorkflowActivation) -> WorkflowActivationCompletion:
        reset = [job for job in act.jobs if job.HasField("update_random_seed")]
        others = [job for job in act.jobs if not job.HasField("update_random_seed")]
        begins = any(job.HasField("initialize_workflow") for job in others)
        if reset and begins:
            self._inner = asyncio.run(self._made(_reset_details(self._details, reset[-1])))
        if not reset or not others or begins:
            return self._inner.activate(act)
        first = self._inner.activate(_with_jobs(act, reset))
        if first.HasField("failed"):
            return first
        then = self._inner.activate(_with_jobs(act, others))
        if not then.HasField("failed"):
            commands = [*first.successful.commands, *then.successful.commands]
            del then.successful.commands[:]
            then.successful.commands.extend(commands)
            flags = {*first.successful.used_internal_flags, *then.successful.used_internal_flags}
            del then.successful.used_internal_flags[:]
            then.successful.used_internal_flags.extend(sorted(flags))
        return then

    async def _made(self, details: WorkflowInstanceDetails) -> WorkflowInstance:
        """Create an instance; the SDK needs a running loop for that, and activations have none."""
        return self._make(details)

    def get_serialization_context(self, command_info: Any) -> SerializationContext | None:
        return self._inner.get_serialization_context(command_info)

    def get_external_store_context(self, command_info: Any) -> StorageDriverStoreContext:
        return self._inner.get_external_store_context(command_info)

    def get_info(self) -> Info:
        return self._inner.get_info()

    def get_thread_id(self) -> int | None:
        return self._inner.get_thread_id()


class Runner(UnsandboxedWorkflowRunner):
    """The runner of the SDK, with instances that handle a reset first."""

    def create_instance(self, det: WorkflowInstanceDetails) -> WorkflowInstance:
        """Create a workflow."""
        return ResetFirst(det, super().create_instance)


def _reset_details(
    details: WorkflowInstanceDetails, reset: WorkflowActivationJob
) -> WorkflowInstanceDetails:
    """Return the details of a run that keeps nothing from before its reset."""
    run = run_after_reset(
        details.info.original_execution_run_id, reset.update_random_seed.randomness_seed
    )
    info = dataclasses.replace(details.info, original_execution_run_id=run)
    return dataclasses.replace(details, info=info)


def _with_jobs(act: WorkflowActivation, jobs: list[WorkflowActivationJob]) -> WorkflowActivation:
    """Return the same activation with only these jobs."""
    part = WorkflowActivation()
    part.CopyFrom(act)
    del part.jobs[:]
    part.jobs.extend(jobs)
    return part
