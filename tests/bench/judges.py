"""The tasks of the benchmark of answers, and the judges: programs that hold a text to a rubric."""

from __future__ import annotations

import ast
import json
import math
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, RootModel, model_validator

from activities.agents.response_schemas import FEW_TASKS
from activities.checks.fences import UNCLEAR, code_blocks
from activities.checks.sandbox import Sandbox, python_program
from activities.config import read_config
from tests.bench import given_tests
from workflows.models.agents import Proposal

TASKS = Path(__file__).with_name("tasks")

BASIC_CHARACTERS = 300
OWN_WORDS = 2
"""How many different words of the task a text that is about it has at least."""

GRAM = 5
"""Words in a run that is compared with the prompt: shorter runs occur in every text by chance."""
COPIED_SHARE = 0.5
"""From this share of runs that the prompt or the schema has too, a text is a copy."""

Kind = Literal[
    "design", "code", "test_plan", "documentation", "data_model", "deployment", "critique", "plan"
]


class Task(BaseModel):
    """A task with its rubric.

    A `word|other*` in `mentions` and `defect` is met by any of its alternatives; one with a star
    stands for every word that starts so.

    Attributes:
        ask: the task's words, all that a plain call gets.
        words: words of the task, of which a text about it has at least two.
        sections: headings or labels that the text has.
        mentions: what the text names, each.
        tests: for code: a program of assertions that runs after the text's Python.
        proposal: for a critique: a proposal with a planted defect.
        defect: for a critique: words that name the planted defect.
        design: for a plan: the design that it splits into tasks.
        roles: for a plan: roles that have a task.
        tasks: for a plan: how many tasks are to be expected.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    kind: Kind
    role: str
    ask: str
    words: list[str] = Field(min_length=3)
    sections: list[str] = []
    mentions: list[str] = []
    tests: str = ""
    proposal: Proposal | None = None
    defect: str = ""
    design: Proposal | None = None
    roles: list[str] = []
    expected: int = Field(0, alias="tasks")

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> Self:
        needs = {
            "code": bool(self.tests),
            "critique": bool(self.proposal and self.defect),
            "plan": bool(self.design and self.roles and self.expected),
        }
        if not needs.get(self.kind, self.sections or self.mentions):
            raise ValueError(f"{self.id}: a task of kind {self.kind} needs its rubric")
        return self

    @property
    def material(self) -> Proposal | None:
        """The proposal that is criticised, or the design that is split."""
        return self.proposal or self.design

    @property
    def plain(self) -> str:
        """All that a plain call sends: the task's words, and the text that they are about."""
        if not self.material:
            return self.ask
        return f"{self.ask}\n\n{self.material.approach}\n\n{self.material.content}"


class _File(RootModel[list[Task]]):
    """The tasks of one kind."""


def load_tasks(folder: Path = TASKS) -> list[Task]:
    """Read the tasks, ordered by file and place.

    Raises:
        InvalidConfig: a file or a task is wrong; the message names the field and the rule.
    """
    return [
        task for file in sorted(folder.glob("*.yaml")) for task in read_config(file, _File).root
    ]


@dataclass(frozen=True)
class Judgement:
    """What the judges found in a text.

    Attributes:
        criteria: name -> why it is not met; empty if it is met.
        basic: whether it is long enough, about the task and not a copy.
        copied: the share of its runs of words that the prompt or the schema has too.
    """

    criteria: Mapping[str, str]
    basic: bool
    copied: float

    @property
    def is_copy(self) -> bool:
        return self.copied >= COPIED_SHARE

    @property
    def is_met(self) -> bool:
        return not self.is_copy and not any(self.criteria.values())


async def judge(task: Task, text: str, source: str, sandbox: Sandbox) -> Judgement:
    """Hold a text to its task's rubric.

    Args:
        task: the task.
        text: the answer.
        source: the prompt and the schema that it was an answer to.
        sandbox: runs the answer's code.

    Raises:
        CannotRun: the sandbox cannot run programs on this machine.
    """
    copied = copied_share(text, source)
    criteria = {
        "length": too_short(text),
        "task words": off_topic(text, task.words),
        **{f"section {name}": no_section(text, name) for name in task.sections},
        **{f"names {words.split('|')[0]}": unnamed(text, words) for words in task.mentions},
    }
    basic = not any(criteria[name] for name in ("length", "task words")) and copied < COPIED_SHARE
    if task.kind == "code":
        criteria |= await code_criteria(text, task.tests, sandbox)
    if task.kind == "critique":
        criteria["planted defect"] = unnamed(text, task.defect)
    if task.kind == "plan":
        criteria |= plan_criteria(text, task.roles, task.expected)
    return Judgement(criteria, basic, copied)


# --- text -----------------------------------------------------------------------------------------


def too_short(text: str) -> str:
    length = len(text.strip())
    return "" if length >= BASIC_CHARACTERS else f"{length} of {BASIC_CHARACTERS} characters"


def off_topic(text: str, words: list[str]) -> str:
    found = [word for word in words if names(text, word)]
    return "" if len(found) >= OWN_WORDS else f"has {found} of {words}, not {OWN_WORDS}"


def unnamed(text: str, alternatives: str) -> str:
    return "" if names(text, alternatives) else f"names none of {alternatives}"


def names(text: str, alternatives: str) -> bool:
    """Return whether the text has one of `word|other*`, in any case and inflection."""
    return any(re.search(_pattern(word), text, re.IGNORECASE) for word in alternatives.split("|"))


def _pattern(word: str) -> str:
    before = r"(?<!\w)" if word[0].isalnum() else ""
    if word.endswith("*"):
        return before + re.escape(word[:-1])
    after = r"(?:s|es|d|ed|ing)?(?!\w)" if word[-1].isalnum() else ""
    return before + re.escape(word) + after


def no_section(text: str, name: str) -> str:
    """Return an empty text if a heading or a label at the start of a line has that name."""
    heading = rf"#{{1,6}}[^\n]*(?<!\w){re.escape(name)}(?!\w)"
    label = rf"(?:[-*+]\s+|\d+[.)]\s+)?(?:\*\*|__)?{re.escape(name)}\s*(?::|\*\*|__|$)"
    found = re.search(rf"^\s*(?:{heading}|{label})", text, re.IGNORECASE | re.MULTILINE)
    return "" if found else f"has no section {name}"


def copied_share(text: str, source: str) -> float:
    """Return the share of the text's runs of five words that occur in the source, from 0 to 1.

    A text of fewer words is one run.
    """
    runs = list(_runs(_words(text)))
    if not runs:
        return 0.0
    known = set(_runs(_words(source), len(runs[0])))
    return sum(run in known for run in runs) / len(runs)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(words: list[str], size: int = GRAM) -> Iterator[tuple[str, ...]]:
    size = min(size, len(words))
    if size:
        yield from (tuple(words[i : i + size]) for i in range(len(words) - size + 1))


# --- code -----------------------------------------------------------------------------------------


async def code_criteria(text: str, tests: str, sandbox: Sandbox) -> dict[str, str]:
    """Judge whether the text's Python can be parsed, and passes the tests in the sandbox."""
    code = python_of(text)
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"parses": f"cannot be parsed: {error}", "tests": "not run, it cannot be parsed"}
    if not code.strip():
        return {"parses": "has no Python", "tests": "not run, there is no Python"}
    mark = secrets.token_hex(8)
    given = json.dumps({"code": code, "tests": tests, "mark": mark})
    run = await sandbox.run(python_program(Path(given_tests.__file__)), given.encode())
    output = run.output.decode(errors="replace").strip()
    lines = output.splitlines() or [f"ended by {run.ended}, exit code {run.exit_code}"]
    return {"parses": "", "tests": "" if lines[-1] == mark else lines[-1][:300]}


def python_of(text: str) -> str:
    """Return the Python of the text's code blocks, or the whole text if it has no block."""
    blocks = code_blocks(text)
    if not blocks:
        return text
    return "\n\n".join(block.text for block in blocks if block.language in ("python", UNCLEAR))


# --- plans ----------------------------------------------------------------------------------------

_ITEM = re.compile(r"^\s*(?:[-*+]\s|\d+[.):]|#{1,6}\s|\||\*\*|Task\b)", re.IGNORECASE)
"""The start of a line that may name a task: an item, a heading, a row of a table or a label."""


def plan_criteria(text: str, roles: list[str], expected: int) -> dict[str, str]:
    """Judge whether each role has a task, and whether there are enough tasks.

    Half of the expected tasks are enough, of which no more are asked for than fit a short answer.
    """
    items = [line for line in text.splitlines() if _ITEM.match(line)]
    enough = math.ceil(min(expected, FEW_TASKS) / 2)
    found = {
        f"role {role}": ""
        if any(re.search(rf"(?<!\w){role}(?!\w)", line) for line in items)
        else f"no task is for {role}"
        for role in roles
    }
    few = "" if len(items) >= enough else f"has {len(items)} tasks, fewer than {enough}"
    return {**found, "tasks": few}
