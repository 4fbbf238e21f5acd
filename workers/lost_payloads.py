"""Payloads of a story's histories that Valkey does not have or that were altered, and remedies.

A reset continues a run from the workflow task before the first event with a lost payload. What
happened after it happens again; Temporal applies later signals and updates again, except where they
hold what is lost.
"""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator, Sequence

from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import Client
from temporalio.converter import DataConverter

from bridge.mirror.histories import story_histories
from bridge.mirror.recovered_events import RunId
from workers.external_storage import PayloadDamaged, PayloadMissing
from workers.payload_codec import ENCRYPTED, PayloadAltered, payloads_of
from workflows.models.base import Model
from workflows.models.ids import story_workflow_id

APPLIED_AGAIN = {
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED: "Signal",
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_UPDATE_ACCEPTED: "Update",
}
"""Events that a reset applies again, and the name by which the `temporal` CLI leaves them out."""


RUN_ENDS = frozenset(
    {
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_COMPLETED,
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED,
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TIMED_OUT,
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCELED,
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TERMINATED,
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CONTINUED_AS_NEW,
    }
)


LEFT_OUT = "The run has ended: `fleet graph rebuild` and `fleet mirror replay` leave it out"


class LostPayload(Model):
    """A payload that cannot be read. event_id: the first event of the run that refers to it."""

    workflow_id: str
    run_id: str
    event_id: int
    event_type: str
    why: str


class LossOfRun(Model):
    """What a run has lost. remedy: what can be done about it; ended: nothing continues the run."""

    lost: list[LostPayload]
    ended: bool
    remedy: str


async def lost_by_story(client: Client, story_id: str) -> tuple[int, list[LossOfRun]]:
    """Check each payload of the story's histories; return the number of runs and the losses.

    The client needs the fleet's data converter.

    Raises:
        RPCError: Temporal does not answer.
        RedisError: Valkey does not answer.
        ApplicationError: `PayloadKeyMissing`.
    """
    losses: list[LossOfRun] = []
    histories = await story_histories(client, story_id)
    for run, events in sorted(histories.items()):
        lost = [each async for each in _lost(client.data_converter, run, events)]
        if lost:
            ended = events[-1].event_type in RUN_ENDS
            what = LEFT_OUT if ended else remedy(story_id, run, events, lost)
            losses.append(LossOfRun(lost=lost, ended=ended, remedy=what))
    return len(histories), losses


async def _lost(
    converter: DataConverter, run: RunId, events: Sequence[HistoryEvent]
) -> AsyncIterator[LostPayload]:
    known: set[bytes] = set()
    for event in events:
        for payload in payloads_of(event):
            content = payload.SerializeToString(deterministic=True)
            encrypted = payload.metadata.get("encoding") == ENCRYPTED
            if not (payload.external_payloads or encrypted) or content in known:
                continue
            known.add(content)
            try:
                await converter.decode([payload])
            except (PayloadMissing, PayloadDamaged, PayloadAltered) as error:
                yield LostPayload(
                    workflow_id=run.workflow_id,
                    run_id=run.run_id,
                    event_id=event.event_id,
                    event_type=EventType.Name(event.event_type).removeprefix("EVENT_TYPE_"),
                    why=str(error),
                )


def remedy(
    story_id: str, run: RunId, events: Sequence[HistoryEvent], lost: Sequence[LostPayload]
) -> str:
    """Return what can be done about the loss of a run that has not ended, except a restore."""
    workflow_id = shlex.quote(run.workflow_id)
    if run.workflow_id != story_workflow_id(story_id):
        return (
            "Terminate it; its story starts the work again: "
            f"temporal workflow terminate --workflow-id {workflow_id} --reason 'a payload is lost'"
        )
    before = [
        event.event_id
        for event in events
        if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED
        and event.event_id < lost[0].event_id
    ]
    if not before:
        return (
            "What the run started with is lost: terminate the story and start it again with "
            f"`fleet start`: temporal workflow terminate --workflow-id {workflow_id} "
            "--reason 'its input is lost'"
        )
    kinds = {events[each.event_id - 1].event_type for each in lost} & APPLIED_AGAIN.keys()
    left_out = "".join(f" --reapply-exclude {APPLIED_AGAIN[kind]}" for kind in sorted(kinds))
    return (
        f"Reset the story to before it: temporal workflow reset --workflow-id {workflow_id} "
        f"--run-id {run.run_id} --event-id {before[-1]}{left_out} --reason 'a payload is lost'"
    )
