"""A small model writes a paragraph, which becomes an action that adds it to the end of a file."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activities.agents.additions import Addition, addition_to
from activities.agents.markdown_answers import UNKNOWN
from activities.agents.non_answers import non_answer, relevance
from activities.agents.profiles import ModelProfile
from activities.agents.prompts import Prompts
from activities.agents.requests import next_action
from activities.config import CONFIG
from workflows.models.agents import Agent, Task
from workflows.models.context import ContextPack
from workflows.models.implementation import (
    ALL_ACTIONS,
    EDITS,
    FileText,
    NextActionInput,
    Outline,
    ReplaceText,
    WriteFile,
)
from workflows.models.workspace import ChangedFile

PROMPTS = Prompts.load(CONFIG / "prompts")
BRIEF = ModelProfile(models=["*"], brief=True)
README = "# A sample\n\nIt limits requests.\n\nTests: `tests/unit`.\n"
GOAL = ["Explain how to choose the limits", "It says that capacity is requests at once."]
PARAGRAPH = (
    "Choose the limits by what a client needs: capacity is how many requests it may make at once, "
    "and per_second is how many it may make in the long run."
)
LINES = st.lists(st.text("ab `#", max_size=4), max_size=6)


def asked(text: str | None = README, **fields: Any) -> NextActionInput:
    """Return the request of an agent that may change README.md; `text` is what it has."""
    files = [] if text is None else [FileText(path="README.md", text=text)]
    return NextActionInput.model_validate(
        {
            "task": Task(task_id="t1", role="DEV", description="Bring the docs up to date."),
            "agent": Agent(agent_id="dev-1", role="DEV"),
            "pack": ContextPack(context="Decided: JetStream."),
            "wave": 1,
            "outline": Outline(text="README.md", files=files),
            "paths": ["README.md"],
            "editable": [] if text is None else ["README.md"],
            "allowed": [*EDITS],
            "goal": GOAL,
        }
        | fields
    )


def changed(text: str, request: NextActionInput, answer: str) -> str:
    """Return the file after the action that an answer becomes."""
    addition = addition_to(request)
    assert addition
    match addition.action(answer):
        case WriteFile(content=content):
            return content
        case ReplaceText(old=old, new=new):
            assert text.count(old) == 1
            return text.replace(old, new)
    raise AssertionError


def test_a_paragraph_is_added_to_the_end_of_the_file() -> None:
    assert changed(README, asked(), f"\n{PARAGRAPH}\n") == f"{README}\n{PARAGRAPH}\n"


def test_a_revision_replaces_what_the_agent_added_before() -> None:
    before = f"{README}\nOnce.\n\nTwice.\n"
    mine = [ChangedFile(path="README.md", status="modified", insertions=4)]

    assert changed(before, asked(before, changed=mine), PARAGRAPH) == f"{README}\n{PARAGRAPH}\n"


def test_a_changed_mode_adds_nothing_that_a_revision_replaces() -> None:
    mine = [ChangedFile(path="README.md", status="modified")]

    assert changed(README, asked(changed=mine), PARAGRAPH) == f"{README}\n{PARAGRAPH}\n"


def test_the_text_of_others_stays_if_the_agent_changed_more_than_the_end() -> None:
    before = f"{README}\nOnce.\n"
    mine = [ChangedFile(path="README.md", status="modified", insertions=2, deletions=1)]

    after = changed(before, asked(before, changed=mine), PARAGRAPH)

    assert after == f"{before}\n{PARAGRAPH}\n"


@pytest.mark.parametrize("text", [None, "", "\n \n"])
def test_a_file_without_text_is_written(text: str | None) -> None:
    assert changed(text or "", asked(text), PARAGRAPH) == f"{PARAGRAPH}\n"


def test_an_own_new_file_is_written_again() -> None:
    mine = [ChangedFile(path="README.md", status="added", insertions=1)]

    assert changed("Once.\n", asked("Once.\n", changed=mine), PARAGRAPH) == f"{PARAGRAPH}\n"


def test_an_open_code_block_is_closed() -> None:
    assert changed(README, asked(), "```python\nlimit = 3").endswith("```python\nlimit = 3\n```\n")


@given(before=LINES, added=LINES)
def test_no_line_of_the_file_is_lost(before: list[str], added: list[str]) -> None:
    text = "\n".join(before)
    request = asked(text)
    if text.strip():
        after = changed(text, request, PARAGRAPH)
        assert after.startswith(f"{text.rstrip()}\n\n{PARAGRAPH}")
    longer = "\n".join([*before, *added, ""])
    mine = [ChangedFile(path="README.md", status="modified", insertions=len(added))]
    if longer.strip() and added and before:
        again = changed(longer, asked(longer, changed=mine), PARAGRAPH)
        assert again.startswith("\n".join(before).rstrip())


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed": [*ALL_ACTIONS]},
        {"paths": ["README.md", "docs/a.md"]},
        {"paths": ["docs/*.md"]},
        {"paths": []},
        {"text": None, "editable": ["README.md"]},
    ],
)
def test_an_agent_that_has_a_choice_is_asked_for_an_action(fields: dict[str, Any]) -> None:
    request = asked(**fields)

    prompt = next_action(request).prompt(PROMPTS, 2_048, BRIEF)

    assert addition_to(request) is None
    assert "Answer with one JSON document" in str(prompt.messages[-1]["content"])
    assert next_action(request).form_of(prompt).draft is None


def test_a_larger_model_is_asked_for_an_action() -> None:
    question = next_action(asked())

    prompt = question.prompt(PROMPTS, 8_192)

    assert "Answer with one JSON document" in str(prompt.messages[-1]["content"])
    assert question.form_of(prompt).draft is None


def test_the_prompt_of_an_addition_has_the_goal_only() -> None:
    prompt = next_action(asked()).prompt(PROMPTS, 2_048, BRIEF)

    assert [message["content"] for message in prompt.messages] == [
        "You work in the DEV council of a software team.",
        f"Write a paragraph of README.md: {GOAL[0]}\n- {GOAL[1]}",
    ]


def test_without_a_goal_the_prompt_has_the_task() -> None:
    prompt = next_action(asked(goal=[])).prompt(PROMPTS, 2_048, BRIEF)

    last = prompt.messages[-1]["content"]
    assert last == "Write a paragraph of README.md: Bring the docs up to date."


def test_an_action_as_json_is_read_too() -> None:
    question = next_action(asked())
    form = question.form_of(question.prompt(PROMPTS, 2_048, BRIEF))
    assert form.draft

    read = form.draft('{"action": "write", "path": "README.md", "content": "All."}', UNKNOWN)

    assert read.fields == {"action": WriteFile(path="README.md", content="All.")}


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (PARAGRAPH, ""),
        ("1128", "too short"),
        ("Rome was founded by two brothers on seven hills, says the legend. " * 2, "else"),
        ("This is a guide to choosing the limits. " * 9, "repeats itself"),
    ],
)
def test_a_paragraph_that_says_nothing_is_refused(answer: str, problem: str) -> None:
    question = next_action(asked())
    prompt = question.prompt(PROMPTS, 2_048, BRIEF)
    form = question.form_of(prompt)
    assert form.draft
    fields = form.draft(answer, UNKNOWN).fields

    found = non_answer(question, prompt, PROMPTS.instructions["next_action"], fields)

    assert (problem in found) if problem else not found


def test_what_the_file_had_does_not_count_as_the_answer() -> None:
    action = Addition("README.md", GOAL[1], GOAL[1]).action("Rome was founded by two brothers.")

    assert relevance({"action": action}, "\n".join(GOAL)) == 0
