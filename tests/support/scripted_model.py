"""A model that works in a repository by a script: it answers `next_action` with the next action.

The prompt says how many steps were taken, so that the same prompt always gets the same answer, and
a call that is repeated after a crash does not take the script further.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tests.support.llm_server import Call

STEP = re.compile(r"^## Step (\d+)$", re.MULTILINE)
FINISH: dict[str, Any] = {"action": "finish", "summary": "All is done.", "decisions": []}


class ScriptedModel:
    """The actions of an agent, in order; after the last one it finishes."""

    def __init__(self, actions: Sequence[dict[str, Any]], first_step: int = 1) -> None:
        self.actions = list(actions)
        self.first_step = first_step

    def __call__(self, call: Call) -> dict[str, Any]:
        """Answer a call of an LLM server."""
        return self.next(call.prompt)

    def next(self, prompt: str) -> dict[str, Any]:
        """Return the action that follows the steps in the prompt."""
        taken = max(map(int, STEP.findall(prompt)), default=self.first_step - 1)
        left = self.actions[taken - self.first_step + 1 :]
        return left[0] if left else FINISH


class ScriptedPhases:
    """Scripts by a phrase of the task; a task without any of them gets the one under ``""``."""

    def __init__(self, scripts: Mapping[str, Sequence[dict[str, Any]]]) -> None:
        self.models = {phrase: ScriptedModel(actions) for phrase, actions in scripts.items()}

    def __call__(self, call: Call) -> dict[str, Any]:
        """Answer a call of an LLM server."""
        asked = next(
            phrase for phrase in sorted(self.models, reverse=True) if phrase in call.prompt
        )
        return self.models[asked](call)


def run(command: str) -> dict[str, Any]:
    return {"action": "run", "command": command}


def write(path: str, content: str) -> dict[str, Any]:
    return {"action": "write", "path": path, "content": content}


def replace(path: str, old: str, new: str) -> dict[str, Any]:
    return {"action": "replace", "path": path, "old": old, "new": new}
