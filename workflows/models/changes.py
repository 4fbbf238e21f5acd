"""Changes of a council's agents: what the fleet measures of each, and what it is measured with."""

from __future__ import annotations

from workflows.models.base import Model
from workflows.models.deliberation import Check
from workflows.models.measurement import Measurement
from workflows.models.report import WorkspaceReport
from workflows.models.workspace import Change, Glob, Repository


class MeasureInput(Model):
    """A commit to check and measure, and the commit that it is compared with.

    Attributes:
        paths: globs that it may change; empty: everything but CI and git configuration.
        task: what the change is for.
    """

    repository: Repository
    base: str
    commit: str
    paths: list[Glob] = []
    task: str = ""


class MeasuredChange(Model):
    """What the fleet knows of a commit by itself.

    Attributes:
        diff: with context, cut to a size.
        checks: policy and substance, of what the commit adds.
        report: the measurement as rigor scores it.
    """

    change: Change
    diff: str = ""
    checks: list[Check] = []
    measurement: Measurement
    report: WorkspaceReport
