"""Validation of everything that is sent to a workflow, before the workflow receives it.

The SDK decodes inputs inside a workflow task. An input that it cannot decode fails that task, again
and again, and one with too many arguments fails it in the handler. Here such an input fails the
workflow, an update or query is rejected, and a signal reaches the workflow as `not_understood`.
Validation is a pure function of the payloads, so a replay has the same result. See
docs/design/0012-unreadable-inputs.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, get_type_hints

from pydantic import ValidationError
from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure
from temporalio.bridge.proto.workflow_activation import WorkflowActivation, WorkflowActivationJob
from temporalio.bridge.proto.workflow_commands import WorkflowCommand
from temporalio.exceptions import ApplicationError
from temporalio.worker import WorkflowInstanceDetails

from workers.payload_codec import PayloadAltered, payloads_of, unreadable
from workflows.models.errors import NOT_UNDERSTOOD, InvalidInput, invalid_input

BOM = b"\xef\xbb\xbf"
JSON = b"json/plain"
NULL = b"binary/null"
WHOLE = "(the whole)"
RESERVED = "__"
"""The prefix of names that belong to the SDK."""


class Payloads:
    """The validation of one workflow's inputs."""

    def __init__(self, details: WorkflowInstanceDetails) -> None:
        self._defn = details.defn
        self._converter = details.payload_converter_factory()
        self._failures = details.failure_converter_class()
        self._refusal: ApplicationError | None = None

    def judge(self, act: WorkflowActivation) -> tuple[WorkflowActivation, list[WorkflowCommand]]:
        """Return the activation without its invalid jobs, and the responses to those.

        Raises:
            ApplicationError: `PayloadKeyMissing`: the task is tried again, until a worker has the
                key. Updates and queries are rejected instead: they can be sent again.
        """
        jobs: list[WorkflowActivationJob] = []
        answers: list[WorkflowCommand] = []
        for job in act.jobs:
            if not (job.HasField("do_update") or job.HasField("query_workflow")):
                _require_keys(job)
            answer = self._answer(job)
            if answer is None:
                jobs.append(job)
            else:
                answers.append(answer)
        if self._refusal is not None:
            jobs = []
        if len(jobs) == len(act.jobs):
            return act, []
        rest = WorkflowActivation()
        rest.CopyFrom(act)
        del rest.jobs[:]
        rest.jobs.extend(jobs)
        return rest, answers

    def _answer(self, job: WorkflowActivationJob) -> WorkflowCommand | None:
        """Return the command that rejects the job; None if the workflow can receive it."""
        command = WorkflowCommand()
        if job.HasField("initialize_workflow"):
            start = job.initialize_workflow
            error = self._fault(self._defn.name or "input", self._defn.run_fn, start.arguments)
            if error is None:
                return None
            self._refusal = error
            command.fail_workflow_execution.failure.CopyFrom(self._failure(error))
            return command
        if job.HasField("signal_workflow"):
            self._rename_unreadable(job)
        elif job.HasField("do_update"):
            update = job.do_update
            updated = self._defn.updates.get(update.name)
            error = self._refusal or self._fault(
                update.name, updated.fn if updated else None, update.input
            )
            if error is not None:
                command.update_response.protocol_instance_id = update.protocol_instance_id
                command.update_response.rejected.CopyFrom(self._failure(error))
                return command
        elif job.HasField("query_workflow"):
            query = job.query_workflow
            definition = self._defn.queries.get(query.query_type)
            error = self._refusal or self._fault(
                query.query_type, definition.fn if definition else None, query.arguments
            )
            if error is not None:
                command.respond_to_query.query_id = query.query_id
                command.respond_to_query.failed.CopyFrom(self._failure(error))
                return command
        return None

    def _rename_unreadable(self, job: WorkflowActivationJob) -> None:
        """Turn a signal that is unknown or malformed into `not_understood`, with the reason."""
        signal = job.signal_workflow
        signals = self._defn.signals
        if NOT_UNDERSTOOD not in signals or signal.signal_name.startswith(RESERVED):
            return
        known = signals.get(signal.signal_name)
        if known is None:
            names = ", ".join(sorted(name for name in signals if name))
            reason = f"no signal has this name; correct it. Signals: {names}"
        else:
            error = self._fault(signal.signal_name, known.fn, signal.input)
            if error is None:
                return
            reason = error.message
        arguments = self._converter.to_payloads([signal.signal_name[:200], reason])
        signal.signal_name = NOT_UNDERSTOOD
        del signal.input[:]
        signal.input.extend(arguments)

    def _fault(
        self, what: str, called: Callable[..., Any] | None, payloads: Sequence[Payload]
    ) -> ApplicationError | None:
        """Return why `called` cannot take the payloads; remove a byte order mark from them.

        If `called` is None, the SDK handles the input, because it is not part of the workflow.
        """
        if called is None:
            return None
        signature, hints = _shape(called)
        try:
            signature.bind(None, *payloads)
        except TypeError as error:
            return InvalidInput(
                what, [("input", f"{len(payloads)} were given: {error}; give one JSON value")]
            )
        for hint, payload in zip(hints, payloads, strict=False):
            fault = self._unreadable(what, payload, hint)
            if fault is not None:
                return fault
        return None

    def _unreadable(self, what: str, payload: Payload, hint: Any) -> ApplicationError | None:
        encoding = payload.metadata.get("encoding", b"")
        match unreadable(payload):
            case ApplicationError(message=why) | PayloadAltered(args=(why,)):
                return InvalidInput(what, [(WHOLE, why)])
        if encoding not in (JSON, NULL):
            name = encoding.decode(errors="replace") or "none"
            return InvalidInput(what, [(WHOLE, f"has encoding {name}; send json/plain")])
        if payload.data.startswith(BOM):
            payload.data = payload.data.removeprefix(BOM)
        document = payload
        if encoding == NULL:
            document = Payload(metadata={"encoding": JSON}, data=b"null")
        try:
            self._converter.from_payload(document, hint)
        except ApplicationError as error:
            return error
        except ValidationError as error:
            return invalid_input(what, error)
        except Exception as error:  # any error is the payload's fault  # noqa: BLE001
            return InvalidInput(
                what, [(WHOLE, f"cannot be read ({type(error).__name__}); send JSON")]
            )
        return None

    def _failure(self, error: ApplicationError) -> Failure:
        failure = Failure()
        self._failures.to_failure(error, self._converter, failure)
        return failure


def _require_keys(job: WorkflowActivationJob) -> None:
    for payload in payloads_of(job):
        if isinstance(error := unreadable(payload), ApplicationError):
            raise error


@cache
def _shape(called: Callable[..., Any]) -> tuple[inspect.Signature, list[Any]]:
    """Return the signature, and the types of the parameters after `self`."""
    signature = inspect.signature(called)
    hints = get_type_hints(called, include_extras=True)
    return signature, [hints.get(name, Any) for name in [*signature.parameters][1:]]
