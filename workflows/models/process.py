"""The process of a story: the state machine and the levels of rigor, read from deploy/config."""

from __future__ import annotations

from typing import Literal

from workflows.models.agents import MAX_TASKS
from workflows.models.base import Model


class Transition(Model):
    """One row of the state machine. `roles`: who may take a rejection; otherwise empty."""

    source: str
    event: str
    target: str
    guards: list[str] = []
    roles: list[str] = []


class RepositoryTask(Model):
    """What a council is asked if the story has a repository.

    Attributes:
        changes: which paths of the repository it may change, of those that the story may.
    """

    changes: Literal["tests", "docs"]
    task: str
    rubric: str = ""


class StateSpec(Model):
    """A state and the work that the fleet does when it enters the state."""

    name: str
    work: Literal["none", "readiness", "design", "plan", "deliberation"] = "none"
    role: str = ""
    task: str = ""
    """The question to the council, for kinds of work that deliberate."""
    rubric: str = ""
    in_repository: RepositoryTask | None = None
    """None: the council writes Markdown in every story."""


class GuardSpec(Model):
    """A guard of the state machine. `role`: set for a human guard, empty for a computed one."""

    name: str
    role: str = ""


class Machine(Model):
    """The validated state machine of deploy/config/agile.fsm.yaml."""

    initial: str
    final: str
    states: list[StateSpec]
    guards: list[GuardSpec]
    gates: list[str]
    transitions: list[Transition]


class RigorLevel(Model):
    """The thresholds and weights of one rigor level (deploy/config/rigor.yaml)."""

    dor_threshold: int
    weights: dict[str, float]
    """Weights of build, unit, static, e2e, coverage and lint; they sum to 1."""
    unit_pass_rate: float
    coverage: float
    quality_gates: list[str]
    max_critical: int
    max_major: int | None
    e2e_pass_rate: float
    max_lint_errors: int


class Process(Model):
    """The configuration that a story's run depends on, read once at its start."""

    machine: Machine
    rigor: RigorLevel
    version: str
    """Content hash of the configuration files."""
    deliberation_timeout: float | None = None
    """Time limit of each deliberation in seconds; None: one hour."""
    text_bytes: int | None = None
    """Longest brief, and longest acceptance criteria in total, in bytes; None: no limit."""
    max_tasks: int = MAX_TASKS
    """The most tasks of a derived plan."""
