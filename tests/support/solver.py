"""A model that repairs some of the tasks of tests/evaluation, and only writes a note for others."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from tests.evaluation.make import Seeded, seeded
from tests.support.llm_server import Call
from tests.support.scripted_model import ScriptedModel, run, write

PYTEST = "python -m pytest -q -p no:cacheprovider"


class Solver:
    """Answers `next_action` with the repair of each task in `solved`; of the others with a note."""

    def __init__(self, solved: Collection[str]) -> None:
        self.solved = set(solved)
        self._tasks = seeded()

    def __call__(self, call: Call) -> dict[str, Any]:
        """Answer a call of an LLM server."""
        task = self.task(call.prompt)
        done = task.instance_id in self.solved
        edit = (
            write(task.file, task.repaired) if done else write("NOTES.md", task.problem_statement)
        )
        return ScriptedModel([run(f"cat {task.file}"), edit, run(PYTEST)])(call)

    def task(self, prompt: str) -> Seeded:
        """Return the task that a prompt is about."""
        (found,) = (each for each in self._tasks if each.problem_statement[:60] in prompt)
        return found
