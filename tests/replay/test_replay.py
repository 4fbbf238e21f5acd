"""Replay of recorded histories against the current code: an upgrade breaks no running story."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from temporalio.client import WorkflowHistory
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.worker import Plugin as WorkerPlugin
from temporalio.worker import Replayer

from tests.replay.record import WIRE, portable, wire
from workers.workflow_runner import workflow_runner
from workflows.closure import StoryClosureWorkflow
from workflows.coach import CoachWorkflow
from workflows.context_update import ContextUpdateWorkflow
from workflows.deliberation import DeliberationWorkflow
from workflows.derivation import DerivationWorkflow
from workflows.plan import PlanWorkflow
from workflows.story import StoryWorkflow

HISTORIES = {
    path: path.read_text() for path in sorted((Path(__file__).parent / "histories").glob("*.json"))
}


def test_every_workflow_has_a_history() -> None:
    kinds = {path.name.split(".")[1] for path in HISTORIES}

    assert kinds == {
        *("story", "plan", "deliberation", "coach", "context", "derivation"),
        "closure",
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
    await replay(HISTORIES[path])


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
    replayer = Replayer(
        workflows=[
            StoryWorkflow,
            PlanWorkflow,
            DeliberationWorkflow,
            CoachWorkflow,
            ContextUpdateWorkflow,
            DerivationWorkflow,
            StoryClosureWorkflow,
        ],
        workflow_runner=workflow_runner(),
        data_converter=pydantic_data_converter,
        plugins=plugins,
    )
    history = json.loads(recorded)
    began = history["events"][0]["workflowExecutionStartedEventAttributes"]
    await replayer.replay_workflow(WorkflowHistory.from_json(began["workflowId"], history))
