"""A story's text, and what the Definition of Ready finds in it."""

from __future__ import annotations

from workflows.models.base import Model
from workflows.models.errors import InvalidInput

STORY_TEXT_BYTES = 64 * 1024
"""Longest brief, and longest acceptance criteria in total, in bytes of UTF-8."""


class StoryText(Model):
    """The text that a person wrote and that `approve_scope` approves."""

    title: str
    brief: str = ""
    acceptance_criteria: list[str] = []

    def require_fits(self, what: str, limit: int = STORY_TEXT_BYTES) -> None:
        """Raise InvalidInput for `what` if the brief or the criteria have more than `limit` bytes.

        Histories, the graph and prompts hold the text, each of them several times.
        """
        sizes = {
            "brief": len(self.brief.encode()),
            "acceptance_criteria": sum(len(line.encode()) for line in self.acceptance_criteria),
        }
        problems = [
            (field, f"has {size:,} bytes, and may have {limit:,}; shorten it, or split the story")
            for field, size in sizes.items()
            if size > limit
        ]
        if problems:
            raise InvalidInput(what, problems)


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
