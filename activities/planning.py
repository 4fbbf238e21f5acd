"""The process: the state machine and the rigor, read from YAML; and a story's readiness.

The files are read again for each story that starts, so that an edit applies from the next story on.
Workers also read them at start-up, so that an invalid edit stops them and reports its problems.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from temporalio import activity

from activities.config import CONFIG, InvalidConfig, read_yaml
from activities.graph.councils import load_councils
from workflows.models.agents import MAX_TASKS
from workflows.models.base import content_hash
from workflows.models.errors import ErrorType, application_error
from workflows.models.process import Machine, Process, RigorLevel
from workflows.models.readiness import STORY_TEXT_BYTES, Readiness, StoryText
from workflows.rules.machine_file import InvalidMachine, parse_machine
from workflows.rules.readiness import score_story
from workflows.rules.rigor import InvalidRigor, parse_rigor
from workflows.stubs import PlanningStub

FSM_FILE = "agile.fsm.yaml"
RIGOR_FILE = "rigor.yaml"
COUNCILS_FILE = "councils.yaml"

_T = TypeVar("_T")


@dataclass(frozen=True)
class ProcessConfig:
    """The process of a team: its machine, its rigor levels L0 to L3, and their content hash."""

    machine: Machine
    rigor: dict[str, RigorLevel]
    version: str


def load_config(directory: Path = CONFIG) -> ProcessConfig:
    """Read agile.fsm.yaml and rigor.yaml from `directory`, and check them against councils.yaml.

    Raises:
        InvalidConfig: a file is missing, not YAML, or inconsistent.
        ApplicationError: as in `load_councils`.
    """
    machine_document = read_yaml(directory / FSM_FILE)
    rigor_document = read_yaml(directory / RIGOR_FILE)
    machine = _parse(directory / FSM_FILE, parse_machine, machine_document)
    _require_councils(directory, machine)
    return ProcessConfig(
        machine=machine,
        rigor=_parse(directory / RIGOR_FILE, parse_rigor, rigor_document),
        version=content_hash({FSM_FILE: machine_document, RIGOR_FILE: rigor_document}),
    )


class Planning(PlanningStub):
    """The implementation of PlanningStub with the files of a directory."""

    def __init__(
        self,
        directory: Path = CONFIG,
        deliberation_timeout: timedelta | None = None,
        text_bytes: int = STORY_TEXT_BYTES,
        max_tasks: int = MAX_TASKS,
    ) -> None:
        """Create the activities.

        Args:
            directory: the folder of the configuration files.
            deliberation_timeout: the time-out of each deliberation of a story; None: an hour.
            text_bytes: the setting STORY_TEXT_BYTES.
            max_tasks: the setting PLAN_MAX_TASKS.
        """
        self._max_tasks = max_tasks
        self._text_bytes = text_bytes
        self._directory = directory
        self._timeout_s = deliberation_timeout.total_seconds() if deliberation_timeout else None

    @activity.defn
    async def load_process(self, rigor: str) -> Process:
        """Return the process that a story of this rigor follows from its start to its end.

        Raises:
            ApplicationError: not retryable; `InvalidConfig` names the file and its problems,
                `InvalidInput` an unknown rigor.
        """
        try:
            config = await asyncio.to_thread(load_config, self._directory)
        except InvalidConfig as error:
            raise error.final() from error
        if rigor not in config.rigor:
            raise application_error(
                ErrorType.INVALID_INPUT,
                f"rigor: unknown level {rigor!r}; one of {', '.join(config.rigor)}",
            )
        return Process(
            machine=config.machine,
            rigor=config.rigor[rigor],
            version=config.version,
            deliberation_timeout=self._timeout_s,
            text_bytes=self._text_bytes,
            max_tasks=self._max_tasks,
        )

    @activity.defn
    async def score_story(self, text: StoryText) -> Readiness:
        """Score the story against the Definition of Ready."""
        return score_story(text)


def _parse(file: Path, parse: Callable[[Any], _T], document: Any) -> _T:
    try:
        return parse(document)
    except (InvalidMachine, InvalidRigor) as error:
        raise InvalidConfig(file, error.problems) from error


def _require_councils(directory: Path, machine: Machine) -> None:
    """Check that every role of a state has a council.

    Raises:
        InvalidConfig: a role has no council, so that its deliberations could never start.
    """
    councils = load_councils(directory / COUNCILS_FILE).councils
    missing = [
        f"state {state.name!r}: role {state.role!r} has no council in {COUNCILS_FILE}; "
        f"add it there, or use one of {', '.join(sorted(councils))}"
        for state in machine.states
        if state.role and state.role not in councils
    ]
    if missing:
        raise InvalidConfig(directory / FSM_FILE, missing)
