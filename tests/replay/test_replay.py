"""Replay of recorded histories against the current code: an upgrade breaks no running story."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from temporalio.api.common.v1 import Payload
from temporalio.client import WorkflowHistory
from temporalio.worker import Plugin as WorkerPlugin
from temporalio.worker import Replayer

from tests.replay.record import WIRE, portable, wire
from tests.support.sandbox import sandboxed_runner
from workers.payload_codec import EncryptionCodec, encrypting_converter
from workers.processes.story import WORKFLOWS

HISTORIES = {
    path: path.read_text() for path in sorted((Path(__file__).parent / "histories").glob("*.json"))
}

KEY, FORMER_KEY = bytes(32), bytes(range(32))


def test_every_workflow_has_a_history() -> None:
    kinds = {path.name.split(".")[1] for path in HISTORIES}

    assert kinds == {
        *("story", "plan", "deliberation", "coach", "context", "derivation"),
        *("closure", "implementation", "evaluation"),
    }


def test_a_model_that_histories_hold_loses_no_field_and_gains_none_without_a_default() -> None:
    """Without a default for a new field, older histories cannot be read."""
    recorded, today = json.loads(WIRE.read_text()), wire()

    assert sorted(recorded) == sorted(today), "run python -m tests.replay.record; remove no model"
    for name, then in recorded.items():
        now = today[name]
        assert set(then["fields"]) <= set(now["fields"]), f"{name} has lost a field"
        assert set(now["required"]) <= set(then["required"]), f"{name}: a field without a default"


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.stem)
def test_a_recorded_history_does_not_name_its_machine(path: Path) -> None:
    history = json.loads(HISTORIES[path])

    assert portable(history) == history


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.stem)
async def test_a_recorded_history_replays(path: Path) -> None:
    """The worker has keys, and the history is from a time without encryption."""
    await replay(HISTORIES[path])


SHORTEST = {
    path.name.split(".")[1]: path
    for path in sorted(HISTORIES, key=lambda path: len(HISTORIES[path]), reverse=True)
}
"""The shortest history of each workflow."""


@pytest.mark.parametrize("path", SHORTEST.values(), ids=lambda path: path.stem)
async def test_an_encrypted_history_replays(path: Path) -> None:
    """Its payloads are encrypted with a key that has been replaced since."""
    history = parsed(HISTORIES[path])
    codec = EncryptionCodec([FORMER_KEY])
    for event in history.events:
        for payload in encoded_payloads(event):
            (encrypted,) = await codec.encode([payload])
            payload.CopyFrom(encrypted)

    await replayer().replay_workflow(history)


def test_histories_replay_with_tracing_and_export_no_span_twice() -> None:
    """Tracing may be switched on while stories run."""
    some = [str(path) for path in HISTORIES if path.name.startswith("amended_in_order.")]
    replayed = subprocess.run(
        [sys.executable, "-m", "tests.replay.traced", *some],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (replayed.returncode, replayed.stdout) == (0, ""), replayed.stderr


async def replay(recorded: str, plugins: Sequence[WorkerPlugin] = ()) -> None:
    """Replay a recorded history against the current code."""
    await replayer(plugins).replay_workflow(parsed(recorded))


def parsed(recorded: str) -> WorkflowHistory:
    history = json.loads(recorded)
    began = history["events"][0]["workflowExecutionStartedEventAttributes"]
    return WorkflowHistory.from_json(began["workflowId"], history)


def replayer(plugins: Sequence[WorkerPlugin] = ()) -> Replayer:
    return Replayer(
        workflows=WORKFLOWS,
        workflow_runner=sandboxed_runner(),
        data_converter=encrypting_converter([KEY, FORMER_KEY]),
        plugins=plugins,
    )


OF_THE_SDK = ("patch-data", "data")
"""What the SDK itself writes into markers: no codec encodes it."""


def encoded_payloads(message: Message) -> Iterator[Payload]:
    """Yield the payloads that a codec encodes: not those of headers and search attributes."""
    for field, value in message.ListFields():
        if field.type != FieldDescriptor.TYPE_MESSAGE or field.name in ("header", "indexed_fields"):
            continue
        if isinstance(value, Message):
            values = [value]
        elif isinstance(value, Mapping):
            values = [each for key, each in value.items() if key not in OF_THE_SDK]
        else:
            values = list(value)
        for each in values:
            if isinstance(each, Payload):
                yield each
            elif isinstance(each, Message):
                yield from encoded_payloads(each)
