"""The process: the state machine and the rigor, read from YAML; and a story's readiness.

Read anew for each story that starts, so that an edit counts from the next story on (design
section 3). Workers read it at start-up too, so that a faulty edit stops them with its problems.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import yaml
from temporalio import activity
from temporalio.exceptions import ApplicationError

from workflows.fsm import InvalidMachine, parse_machine
from workflows.models import (
    INVALID_INPUT,
    Machine,
    Process,
    Readiness,
    RigorLevel,
    StoryText,
    content_hash,
)
from workflows.readiness import score_story
from workflows.rigor import InvalidRigor, parse_rigor
from workflows.stubs import PlanningStub

INVALID_CONFIG = "InvalidConfig"

CONFIG = Path(__file__).parents[1] / "deploy" / "config"
FSM_FILE = "agile.fsm.yaml"
RIGOR_FILE = "rigor.yaml"

_T = TypeVar("_T")


class InvalidConfig(ValueError):
    """A configuration file does not hold together. `problems`: each names place and remedy."""

    def __init__(self, file: Path, problems: list[str]) -> None:
        super().__init__(f"{file}: " + "; ".join(problems))
        self.file = file
        self.problems = problems


@dataclass(frozen=True)
class ProcessConfig:
    """The process of a team: its machine, its rigor levels L0 to L3, and their content hash."""

    machine: Machine
    rigor: dict[str, RigorLevel]
    version: str


def load_config(directory: Path = CONFIG) -> ProcessConfig:
    """Read agile.fsm.yaml and rigor.yaml from `directory`.

    Raises:
        InvalidConfig: a file is missing, is no YAML, or does not hold together.
    """
    machine_document = _read(directory / FSM_FILE)
    rigor_document = _read(directory / RIGOR_FILE)
    return ProcessConfig(
        machine=_parse(directory / FSM_FILE, parse_machine, machine_document),
        rigor=_parse(directory / RIGOR_FILE, parse_rigor, rigor_document),
        version=content_hash({FSM_FILE: machine_document, RIGOR_FILE: rigor_document}),
    )


class Planning(PlanningStub):
    """Implements PlanningStub over the files of a directory."""

    def __init__(
        self, directory: Path = CONFIG, deliberation_timeout: timedelta | None = None
    ) -> None:
        """deliberation_timeout: what each deliberation of a story gets; None: an hour."""
        self._directory = directory
        self._timeout_s = deliberation_timeout.total_seconds() if deliberation_timeout else None

    @activity.defn
    async def load_process(self, rigor: str) -> Process:
        """What a story of this rigor keeps to from its start to its end.

        Raises:
            ApplicationError: not retryable; `InvalidConfig` names the file and its problems,
                `InvalidInput` an unknown rigor.
        """
        try:
            config = await asyncio.to_thread(load_config, self._directory)
        except InvalidConfig as error:
            raise ApplicationError(str(error), type=INVALID_CONFIG, non_retryable=True) from error
        if rigor not in config.rigor:
            raise ApplicationError(
                f"rigor: unknown level {rigor!r}; one of {', '.join(config.rigor)}",
                type=INVALID_INPUT,
                non_retryable=True,
            )
        return Process(
            machine=config.machine,
            rigor=config.rigor[rigor],
            version=config.version,
            deliberation_timeout=self._timeout_s,
        )

    @activity.defn
    async def score_story(self, text: StoryText) -> Readiness:
        """The story's Definition of Ready."""
        return score_story(text)


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is there twice: YAML forbids it, and PyYAML keeps the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.constructor.ConstructorError(
                None, None, f"key {twice!r} is there twice; keep one", node.start_mark
            )
        return mapping


def _read(file: Path) -> Any:
    try:
        return yaml.load(file.read_bytes(), Loader=_StrictLoader)  # noqa: S506  it is a SafeLoader
    except OSError as error:
        raise InvalidConfig(file, [f"cannot be read: {error.strerror}"]) from error
    except yaml.YAMLError as error:
        raise InvalidConfig(file, [f"is no YAML: {' '.join(str(error).split())}"]) from error


def _parse(file: Path, parse: Callable[[Any], _T], document: Any) -> _T:
    try:
        return parse(document)
    except (InvalidMachine, InvalidRigor) as error:
        raise InvalidConfig(file, error.problems) from error
