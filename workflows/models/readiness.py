"""A story's text, and what the Definition of Ready finds in it."""

from __future__ import annotations

from workflows.models.base import Model


class StoryText(Model):
    """The text that a person wrote and that `approve_scope` approves."""

    title: str
    brief: str = ""
    acceptance_criteria: list[str] = []


class Finding(Model):
    """A finding that costs readiness points.

    Attributes:
        code: AC_MISSING, TITLE_VALUE, SMALL, AMBIGUOUS or DEPS.
        weight: the points that it costs.
    """

    code: str
    message: str
    weight: int


class Readiness(Model):
    """The Definition of Ready score: a total from 0 to 100 and the findings that cost points."""

    total: int
    findings: list[Finding] = []
