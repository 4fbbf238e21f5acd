"""The answers of each act: Markdown or JSON, with a JSON schema sized to the answer's tokens.

Proposals and critiques are Markdown (docs/design/0017-answers-as-text.md); their schema is for
agents that still answer with a document. The decoder writes the others by their schema.

A string's `maxLength` is a share of the characters that the answer's tokens can hold, so that even
a small model, which writes until it is stopped, closes its document in time. With a longer window,
or more `max_tokens` in the prompt's front matter, all fields grow in proportion, up to the limits
of the graph and the API.

Not every endpoint enforces the schema, so an answer is validated by the same rules as in the
schema. A document may be embedded in other text, such as thoughts or a fence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from pydantic import Field, StringConstraints, TypeAdapter, ValidationError, create_model

from activities.agents.action_schema import action_schema
from activities.agents.additions import Addition
from activities.agents.markdown_answers import (
    LONGEST_LINE,
    LONGEST_TEXT,
    LONGEST_TITLE,
    UNKNOWN,
    Asked,
    Draft,
    critique_draft,
    proposal_draft,
)
from workflows.models.agents import Critique, DraftTask, Proposal, Verdict
from workflows.models.base import Model, Section
from workflows.models.implementation import Action, NextActionInput
from workflows.models.readiness import StoryText
from workflows.rules.dag import number_tasks, plan_schema, validate

CHARACTERS_PER_TOKEN = 3
"""Less than in prose or code (about 4); the difference leaves room for the JSON syntax."""

SHORTEST_TASK = 400
AROUND_A_TASK = 100
LONGEST_TASK_TITLE = 80
"""Characters of a planned task with its JSON, of the JSON alone, and of a title in a summary."""

FEW_TASKS, LARGE_TASK = 12, 800
"""The number of tasks from which each needs more characters, and how many."""

LONGEST_STORY_TITLE = 120
LEAST_CRITERIA, MOST_CRITERIA = 2, 6

CANDIDATES = 64
"""How many opening braces of an answer are tried as the start of its document."""

_THOUGHTS = re.compile(r"\A.*</think(ing)?>", re.DOTALL | re.IGNORECASE)
_THINKING = re.compile(r"<think(ing)?>", re.IGNORECASE)
_DECODER = json.JSONDecoder(strict=False, parse_constant=lambda name: _not_json(name))
"""Lenient, because models make mistakes such as a line break within a string."""

_ACTION: TypeAdapter[Action] = TypeAdapter(Action)

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
PartT = TypeVar("PartT", bound=Section)
FieldsT = TypeVar("FieldsT", bound=Mapping[str, Any])


@dataclass(frozen=True)
class ResponseSchema:
    """The form of an answer. `schema`: its JSON schema; `read`: its text -> its fields.

    `read` and `draft` raise ValueError with the problem of the text.

    Attributes:
        document: reads JSON alone, whose end can be seen in the text.
        draft: None if the answer is JSON; otherwise it is Markdown, a document that obeys the
            schema is also read, and the draft may lack what another question completes. Its second
            argument is what it is for.
    """

    schema: dict[str, Any]
    document: Callable[[str], Mapping[str, Any]]
    draft: Callable[[str, Asked], Draft] | None = None
    lacking: str = ""
    """What a draft may lack, for a message."""

    def read(self, text: str) -> Mapping[str, Any]:
        if self.draft is None:
            return self.document(text)
        found = self.draft(text, UNKNOWN)
        if found.missing:
            raise ValueError(f"it has no {self.lacking}, as the prompt asks for")
        return found.fields

    def is_whole(self, text: str) -> bool:
        """Return whether a text is a whole document, so that nothing of it is missing."""
        try:
            self.document(text)
        except ValueError:
            return False
        return True


@lru_cache(maxsize=16)
def proposal_form(tokens: int) -> ResponseSchema:
    """Return the form of `approach`, `content`, and 1 to 3 `decisions` with at most 2 `affects`."""
    size = _Sizes(tokens)

    class Decision(Section):
        title: Annotated[str, size.text(0.03, LONGEST_TITLE)]
        rationale: Annotated[str, size.text(0.08, LONGEST_LINE)]
        affects: Annotated[
            list[Annotated[str, size.text(0.02, LONGEST_TITLE)]], Field(max_length=2)
        ]

    class Written(Section):
        approach: Annotated[str, size.text(0.12)]
        content: Annotated[str, size.text(0.43)]
        decisions: Annotated[list[Decision], Field(min_length=1, max_length=3)]

    return _text_form(_form(Written, "proposal", Proposal), proposal_draft, "decisions")


@lru_cache(maxsize=16)
def critique_form(tokens: int) -> ResponseSchema:
    """Return the form of 1 to 3 `points`, a `suggestion`, and the `verdict` based on them."""
    size = _Sizes(tokens)

    class Point(Section):
        severity: Literal["low", "medium", "high"]
        text: Annotated[str, size.text(0.18)]

    class Written(Section):
        points: Annotated[list[Point], Field(min_length=1, max_length=3)]
        suggestion: Annotated[str, size.text(0.3)]
        verdict: Literal["accept", "revise", "reject"]

    return _text_form(_form(Written, "critique", Critique), critique_draft, "severities or verdict")


def verdict_form(contender_ids: Sequence[str]) -> Callable[[int], ResponseSchema]:
    """Return the form of a `reason`, followed by a `winner_id` that is one of the contenders."""

    def form(tokens: int) -> ResponseSchema:
        reason: Any = Annotated[str, _Sizes(tokens).text(0.85)]
        winner: Any = Literal.__getitem__(tuple(contender_ids))
        written = create_model(
            "Written", __base__=Section, reason=(reason, ...), winner_id=(winner, ...)
        )
        return _form(written, "verdict", Verdict)

    return form


def plan_form(roles: Sequence[str], max_tasks: int) -> Callable[[int], ResponseSchema]:
    """Return the form of `tasks`, a DAG by construction: as many as the answer has room for.

    More than FEW_TASKS are allowed only where the description of each can still be a paragraph.
    """

    def form(tokens: int) -> ResponseSchema:
        characters = tokens * CHARACTERS_PER_TOKEN
        few = min(FEW_TASKS, max(1, characters // SHORTEST_TASK))
        most = min(max_tasks, max(few, characters // LARGE_TASK))
        words = max(characters // most - AROUND_A_TASK, AROUND_A_TASK)
        title = min(words // 4, LONGEST_TASK_TITLE)
        schema = plan_schema(roles, most, title, min(words - title, LONGEST_TEXT))
        rules = Draft202012Validator(schema)

        def plan_of(document: Any) -> dict[str, list[DraftTask]]:
            if faults := [_fault(error) for error in rules.iter_errors(document)]:
                raise ValueError("; ".join(faults))
            plan = _validated(_WrittenPlan, document)
            drafts = [DraftTask.model_validate(task.model_dump()) for task in plan.tasks]
            validate(number_tasks("plan", drafts), roles, most)
            return {"tasks": drafts}

        return ResponseSchema(schema, lambda text: read_document(text, plan_of))

    return form


@lru_cache(maxsize=16)
def story_form(tokens: int) -> ResponseSchema:
    """Return the form of `title`, `description`, and 2 to 6 acceptance criteria as `ac`."""
    size = _Sizes(tokens)
    title = StringConstraints(
        strip_whitespace=True,
        min_length=1,
        max_length=min(LONGEST_STORY_TITLE, size.longest(0.1)),
    )

    class Written(Section):
        title: Annotated[str, title]
        description: Annotated[str, size.text(0.3)]
        ac: Annotated[
            list[Annotated[str, size.text(0.09, LONGEST_LINE)]],
            Field(min_length=LEAST_CRITERIA, max_length=MOST_CRITERIA),
        ]

    def story_of(document: Any) -> dict[str, StoryText]:
        story = _validated(Written, document)
        return {
            "story": StoryText(
                title=story.title, brief=story.description, acceptance_criteria=story.ac
            )
        }

    return ResponseSchema(Written.model_json_schema(), lambda text: read_document(text, story_of))


def action_form(request: NextActionInput) -> Callable[[int], ResponseSchema]:
    """Return the form of an action.

    The schema has the allowed paths only. A path that is not allowed is read nevertheless, where an
    endpoint does not enforce the schema: the agent then sees that nothing was changed.
    """

    def action_of(document: Any) -> dict[str, Action]:
        try:
            action = _ACTION.validate_python(document)
        except ValidationError as error:
            raise ValueError(_problems(error)) from error
        if action.action not in request.allowed:
            raise ValueError(f"action: must be one of {', '.join(request.allowed)}")
        return {"action": action}

    def form(tokens: int) -> ResponseSchema:
        schema = action_schema(
            request.allowed,
            request.paths,
            request.editable,
            request.outline.more_editable,
            _Sizes(tokens).longest,
        )
        return ResponseSchema(schema, lambda text: read_document(text, action_of))

    return form


def addition_form(action: ResponseSchema, addition: Addition) -> ResponseSchema:
    """Return the form of a paragraph that is added to a file, or of the action as JSON."""

    def added(text: str, _: Asked) -> Draft:
        return Draft({"action": addition.action(text)})

    return _text_form(action, added, "paragraph")


class _WrittenTask(DraftTask):
    title: Text
    description: Text


class _WrittenPlan(Section):
    tasks: list[_WrittenTask]


def _form(written: type[Section], field: str, wire: type[Model]) -> ResponseSchema:
    def fields_of(document: Any) -> dict[str, Model]:
        return {field: wire.model_validate(_validated(written, document).model_dump())}

    return ResponseSchema(written.model_json_schema(), lambda text: read_document(text, fields_of))


def _text_form(
    form: ResponseSchema, of_markdown: Callable[[str, Asked], Draft], lacking: str
) -> ResponseSchema:
    """Return the form of an answer that is Markdown, or a document of the older form.

    Args:
        form: the form as JSON.
        of_markdown: reads the Markdown.
        lacking: what an incomplete draft lacks.
    """

    def draft(text: str, asked: Asked) -> Draft:
        answer = cleaned(without_thoughts(text))
        if "{" in answer:
            try:
                return Draft(dict(form.document(answer)))
            except ValueError:
                if answer.startswith(("{", "```json")):
                    raise
        return of_markdown(answer, asked)

    return ResponseSchema(form.schema, form.document, draft, lacking)


# --- reading --------------------------------------------------------------------------------------


def read_document(text: str, fields_of: Callable[[Any], FieldsT]) -> FieldsT:
    """Return the fields of the last document in the text that `fields_of` accepts.

    Raises:
        ValueError: the problem of the document, or of the JSON if the text has no document.
    """
    answer = without_thoughts(text)
    problem: ValueError | None = None
    accepted: list[FieldsT] = []
    for document, size in _documents(answer):
        try:
            accepted.append(fields_of(document))
        except ValueError as error:
            if 2 * size > len(answer):  # otherwise a part of a document that was cut off
                problem = error
    if not accepted:
        raise problem or ValueError(_json_problem(answer))
    return accepted[-1]


def without_thoughts(text: str) -> str:
    """Return the answer that follows a model's thoughts; empty while it is still thinking."""
    text = text.strip("\ufeff \t\r\n")
    if text.startswith("{"):  # a document, whose texts may contain such a tag
        return text
    answer = _THOUGHTS.sub("", text).strip("\ufeff \t\r\n")
    return "" if _THINKING.match(answer) else answer


def _documents(text: str) -> Iterator[tuple[Any, int]]:
    """Yield the JSON objects in the text, in order, with their length in it."""
    place = text.find("{")
    for _ in range(CANDIDATES):
        if place < 0:
            return
        try:
            document, end = _DECODER.raw_decode(text, place)
            document = cleaned(document)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            yield document, end - place
        place = text.find("{", end)


def _json_problem(answer: str) -> str:
    """Return the reason why the text is not a JSON object."""
    try:
        _DECODER.decode(answer)
    except json.JSONDecodeError as error:
        return f"Invalid JSON: {error.msg} at line {error.lineno} column {error.colno}"
    except (ValueError, RecursionError) as error:
        return f"Invalid JSON: {error}"
    return "Invalid JSON: not an object"


def _not_json(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def cleaned(value: Any) -> Any:
    """Clean a value for the stores: remove U+0000, replace lone surrogates by U+FFFD."""
    match value:
        case str():
            return (
                value.replace("\0", "")
                .encode("utf-16-le", "surrogatepass")
                .decode("utf-16-le", "replace")
            )
        case dict():
            return {cleaned(key): cleaned(each) for key, each in value.items()}
        case list():
            return [cleaned(each) for each in value]
    return value


def _validated(written: type[PartT], document: Any) -> PartT:
    try:
        return written.model_validate(document)
    except ValidationError as error:
        raise ValueError(_problems(error)) from error


def _fault(error: Any) -> str:
    """Describe a violation of a JSON schema: the field and the rule."""
    place = ".".join(map(str, error.absolute_path)) or "the document"
    rule = f"must keep {error.validator} {error.validator_value}"[:300]
    return f"{place}: {error.message if len(error.message) <= 200 else rule}"


@dataclass(frozen=True)
class _Sizes:
    tokens: int

    def text(self, share: float, most: int = LONGEST_TEXT) -> StringConstraints:
        """Return constraints: not blank, at most `share` of the answer's characters and `most`."""
        return StringConstraints(
            strip_whitespace=True, min_length=1, max_length=min(self.longest(share), most)
        )

    def longest(self, share: float) -> int:
        """Return `share` of the answer's characters, at least one."""
        return max(int(share * self.tokens * CHARACTERS_PER_TOKEN), 1)


def _problems(error: ValidationError) -> str:
    """Describe each invalid field and its rule."""
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc']) or 'the document'}: {problem['msg']}"
        for problem in error.errors(include_url=False, include_input=False)
    )
