"""What the decoder is made to write: each act's JSON schema, sized to the answer's tokens.

A string's `maxLength` is a share of the characters that the answer's tokens hold, so that even a
small model, which writes until it is stopped, closes its document in time; with a longer window,
or more `max_tokens` in the prompt's front matter, every field grows alike (design section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, StringConstraints, ValidationError, create_model

from workflows.dag import MAX_TASKS, number_tasks, plan_schema, validate
from workflows.models import (
    Critique,
    DraftTask,
    Part,
    Proposal,
    StoryText,
    Verdict,
    Wire,
)

CHARACTERS_PER_TOKEN = 3
"""Fewer than a token of prose or code has (about 4): what is left pays for the JSON around it."""

SHORTEST_TASK = 400
AROUND_A_TASK = 100
LONGEST_TASK_TITLE = 80
"""Characters: a planned task with its JSON, the JSON alone, a title that fits a summary."""

LONGEST_STORY_TITLE = 120
LEAST_CRITERIA, MOST_CRITERIA = 2, 6

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
PartT = TypeVar("PartT", bound=Part)


@dataclass(frozen=True)
class Form:
    """`schema`: the JSON schema of an answer. `read`: its text -> the answer's own fields."""

    schema: dict[str, Any]
    read: Callable[[str], Mapping[str, Any]]
    """Raises ValueError, which says what is wrong with the text."""


@lru_cache(maxsize=16)
def proposal_form(tokens: int) -> Form:
    """`approach`, `content`, 1 to 3 `decisions` that affect at most 2 things each."""
    size = _Sizes(tokens)

    class Decision(Part):
        title: Annotated[str, size.text(0.03)]
        rationale: Annotated[str, size.text(0.08)]
        affects: Annotated[list[Annotated[str, size.text(0.02)]], Field(max_length=2)]

    class Written(Part):
        approach: Annotated[str, size.text(0.12)]
        content: Annotated[str, size.text(0.43)]
        decisions: Annotated[list[Decision], Field(min_length=1, max_length=3)]

    return _form(Written, "proposal", Proposal)


@lru_cache(maxsize=16)
def critique_form(tokens: int) -> Form:
    """1 to 3 `points`, a `suggestion`, and then the `verdict` that follows from them."""
    size = _Sizes(tokens)

    class Point(Part):
        severity: Literal["low", "medium", "high"]
        text: Annotated[str, size.text(0.18)]

    class Written(Part):
        points: Annotated[list[Point], Field(min_length=1, max_length=3)]
        suggestion: Annotated[str, size.text(0.3)]
        verdict: Literal["accept", "revise", "reject"]

    return _form(Written, "critique", Critique)


def verdict_form(contender_ids: Sequence[str]) -> Callable[[int], Form]:
    """A `reason`, and then a `winner_id` that is one of the contenders'."""

    def form(tokens: int) -> Form:
        reason: Any = Annotated[str, _Sizes(tokens).text(0.85)]
        winner: Any = Literal.__getitem__(tuple(contender_ids))
        written = create_model(
            "Written", __base__=Part, reason=(reason, ...), winner_id=(winner, ...)
        )
        return _form(written, "verdict", Verdict)

    return form


def plan_form(roles: Sequence[str]) -> Callable[[int], Form]:
    """`tasks`, a DAG by construction; as many of MAX_TASKS as the answer has room for."""

    def form(tokens: int) -> Form:
        characters = tokens * CHARACTERS_PER_TOKEN
        most = min(MAX_TASKS, max(1, characters // SHORTEST_TASK))
        words = max(characters // most - AROUND_A_TASK, AROUND_A_TASK)
        title = min(words // 4, LONGEST_TASK_TITLE)

        def read(text: str) -> dict[str, list[DraftTask]]:
            plan = _validated(_WrittenPlan, text)
            drafts = [DraftTask.model_validate(task.model_dump()) for task in plan.tasks]
            validate(number_tasks("plan", drafts), roles, most)
            return {"tasks": drafts}

        return Form(plan_schema(roles, most, title, words - title), read)

    return form


@lru_cache(maxsize=16)
def story_form(tokens: int) -> Form:
    """`title`, `description`, and 2 to 6 acceptance criteria as `ac`."""
    size = _Sizes(tokens)
    title = StringConstraints(
        strip_whitespace=True,
        min_length=1,
        max_length=min(LONGEST_STORY_TITLE, size.longest(0.1)),
    )

    class Written(Part):
        title: Annotated[str, title]
        description: Annotated[str, size.text(0.3)]
        ac: Annotated[
            list[Annotated[str, size.text(0.09)]],
            Field(min_length=LEAST_CRITERIA, max_length=MOST_CRITERIA),
        ]

    def read(text: str) -> dict[str, StoryText]:
        story = _validated(Written, text)
        return {
            "story": StoryText(
                title=story.title, brief=story.description, acceptance_criteria=story.ac
            )
        }

    return Form(Written.model_json_schema(), read)


class _WrittenTask(DraftTask):
    title: Text
    description: Text


class _WrittenPlan(Part):
    tasks: list[_WrittenTask]


def _form(written: type[Part], field: str, wire: type[Wire]) -> Form:
    def read(text: str) -> dict[str, Wire]:
        return {field: wire.model_validate(_validated(written, text).model_dump())}

    return Form(written.model_json_schema(), read)


def _validated(written: type[PartT], text: str) -> PartT:
    try:
        return written.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(_problems(error)) from error


@dataclass(frozen=True)
class _Sizes:
    tokens: int

    def text(self, share: float) -> StringConstraints:
        """Text that is not blank and takes at most `share` of the answer's characters."""
        return StringConstraints(
            strip_whitespace=True, min_length=1, max_length=self.longest(share)
        )

    def longest(self, share: float) -> int:
        """Characters: `share` of the answer's, and one at least."""
        return max(int(share * self.tokens * CHARACTERS_PER_TOKEN), 1)


def _problems(error: ValidationError) -> str:
    """Each wrong field with its rule."""
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc']) or 'the document'}: {problem['msg']}"
        for problem in error.errors(include_url=False, include_input=False)
    )
