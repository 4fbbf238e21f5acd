"""Requests to the story coach, and its results."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from workflows.models.agents import CallUsage
from workflows.models.base import Model, Request
from workflows.models.errors import InvalidInput
from workflows.models.readiness import Readiness, StoryText


class CoachInput(Request):
    """The input of CoachWorkflow: either a goal to write a story for, or a story to improve.

    Attributes:
        actor: the caller of gRPC who asks, whose quota its tokens count for; empty: none.
    """

    goal: str = Field(default="", max_length=4_000)
    story: StoryText | None = None
    actor: str = ""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if bool(self.goal.strip()) == (self.story is not None):
            # Outside of `_refuse_clearly`, which has already validated the fields.
            raise InvalidInput("CoachInput", [("goal", "give a goal or a story, and not both")])
        return self


class CoachResult(Model):
    """The story to use. `reason`: why the original is returned, if no better one was written."""

    story: StoryText
    readiness: Readiness
    original: Readiness | None = None
    reason: str = ""
    usage: list[CallUsage] = []
