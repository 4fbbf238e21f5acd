"""The schema of a next action: only allowed actions and paths can be written, and all are read."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from activities.agents import requests
from activities.agents.action_schema import path_pattern
from activities.agents.prompts import Prompts
from tests.support.llm_server import document_of
from workflows.models.agents import Agent, Task
from workflows.models.context import ContextPack
from workflows.models.implementation import (
    EDITS,
    FileText,
    Finish,
    NextActionInput,
    Outline,
    RunCommand,
    StepRecord,
    WriteFile,
)

PROMPTS = Prompts.load(Path(__file__).parents[3] / "deploy" / "config" / "prompts")


def asked(**fields: Any) -> NextActionInput:
    fields = {"outline": Outline(text="README.md\nsrc/a.py")} | fields
    return NextActionInput(
        task=Task(task_id="t1", role="DEV", description="Add a section."),
        agent=Agent(agent_id="dev-1", role="DEV", persona="You doubt."),
        pack=ContextPack(context="Decided: JetStream."),
        wave=1,
        **fields,
    )


def accepts(request: NextActionInput, **action: Any) -> bool:
    schema = requests.next_action(request).form(1_000).schema
    return bool(Draft202012Validator(schema).is_valid(action))


def test_only_allowed_paths_can_be_written() -> None:
    request = asked(paths=["README.md", "docs/**"], editable=["README.md"])

    assert accepts(request, action="write", path="README.md", content="x")
    assert accepts(request, action="write", path="docs/new/page.md", content="x")
    assert not accepts(request, action="write", path="src/a.py", content="x")
    assert not accepts(request, action="write", path="docs/../src/a.py", content="x")
    assert not accepts(request, action="write", path="docs/.hidden", content="x")


def test_only_files_that_exist_can_be_replaced_in() -> None:
    request = asked(paths=["README.md", "docs/**"], editable=["README.md"])

    assert accepts(request, action="replace", path="README.md", old="a", new="")
    assert not accepts(request, action="replace", path="docs/new.md", old="a", new="b")
    assert not accepts(asked(paths=["NEWS.md"]), action="replace", path="NEWS.md", old="a", new="b")


def test_a_file_beyond_the_listed_ones_can_be_replaced_in() -> None:
    outline = Outline(text="many", more_editable=True)
    request = asked(paths=["src/**"], editable=["src/a.py"], outline=outline)

    assert accepts(request, action="replace", path="src/z.py", old="a", new="b")


def test_a_single_step_can_only_write_or_replace() -> None:
    request = asked(allowed=list(EDITS), paths=["README.md"], editable=["README.md"])

    assert accepts(request, action="write", path="README.md", content="x")
    assert not accepts(request, action="run", command="ls")
    assert not accepts(request, action="finish", summary="done", decisions=[])
    with pytest.raises(ValueError, match="one of write, replace"):
        requests.next_action(request).form(1_000).read('{"action": "run", "command": "ls"}')


GLOBS = {
    "src/**": (["src/a.py", "src/b/c/d.py"], ["srca.py", "lib/a.py", "src/../a.py", "src/"]),
    "*.md": (["README.md"], ["docs/README.md", "README.mdx"]),
    "**/*.py": (["a.py", "x/y/a.py"], ["a.pyc"]),
    "src/v?.py": (["src/v1.py"], ["src/v12.py"]),
    "a+(b).[x]/*": (["a+(b).[x]/c"], ["aab.x/c"]),
}


@pytest.mark.parametrize("glob", GLOBS)
def test_the_pattern_of_a_glob_matches_its_paths_only(glob: str) -> None:
    matching, others = GLOBS[glob]

    assert all(re.search(path_pattern(glob), path) for path in matching)
    assert not any(re.search(path_pattern(glob), path) for path in others)


@given(
    seed=st.integers(0, 10_000),
    tokens=st.sampled_from([64, 400, 8_192]),
    paths=st.sampled_from([["README.md"], ["README.md", "NEWS.md"]]),
)
def test_whatever_the_decoder_writes_is_read_as_an_action(
    seed: int, tokens: int, paths: list[str]
) -> None:
    form = requests.next_action(asked(paths=paths, editable=["README.md"])).form(tokens)
    document = document_of(form.schema, random.Random(seed))

    Draft202012Validator(form.schema).validate(document)
    action = form.read(json.dumps(document))["action"]

    assert action.model_dump() == document | action.model_dump(exclude=set(document))


def test_a_path_that_is_not_allowed_is_read_for_the_agent_to_see_that_it_is_refused() -> None:
    form = requests.next_action(asked(paths=["README.md"])).form(400)

    action = form.read('{"action": "write", "path": "setup.py", "content": ""}')["action"]

    assert action == WriteFile(path="setup.py", content="")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("I would first look around.", "JSON"),
        ('{"action": "sing"}', "action"),
        ('{"action": "run"}', "command"),
        ('{"action": "replace", "path": "a", "old": "", "new": ""}', "old"),
    ],
)
def test_an_answer_without_an_action_is_refused_by_its_field(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        requests.next_action(asked()).form(400).read(text)


def test_content_keeps_its_white_space() -> None:
    document = json.dumps({"action": "write", "path": "a.py", "content": "  if x:\n\treturn\n\n"})

    action = requests.next_action(asked()).form(400).read(document)["action"]

    assert action.content == "  if x:\n\treturn\n\n"


def steps(count: int) -> list[StepRecord]:
    return [
        StepRecord(
            step=number,
            action=RunCommand(command=f"cat {number}.py"),
            exit_code=0,
            observation=f"line {number}\n" * 40,
            commit="c" * 40,
        )
        for number in range(1, count + 1)
    ]


@pytest.mark.parametrize("window", [2_048, 8_192, 32_768])
def test_the_prompt_of_a_long_work_fits_the_window(window: int) -> None:
    outline = Outline(text="src/a.py\n" * 5_000, files=[FileText(path="a", text="x" * 50_000)])
    request = asked(steps=steps(100), outline=outline)

    prompt = requests.next_action(request).prompt(PROMPTS, window)

    sent = "".join(str(message["content"]) for message in prompt.messages)
    assert len(sent.encode()) / 4 + prompt.max_tokens <= window
    assert "## Step 100" in sent


def test_a_prompt_begins_with_the_one_of_the_step_before_it_up_to_the_new_step() -> None:
    sent = []
    for count in range(5, 9):
        request = asked(steps=steps(count), steps_left=40 - count)
        prompt = requests.next_action(request).prompt(PROMPTS, 32_768)
        sent.append("\n".join(str(message["content"]) for message in prompt.messages))

    for count, text in enumerate(sent[:-1], start=5):
        shared = text.partition("\n</data>\n\nActions left")[0]
        assert sent[count - 4].startswith(shared)
        assert f"## Step {count}\n" in shared


def test_the_persona_and_what_changes_come_last() -> None:
    prompt = requests.next_action(asked(steps=steps(2), steps_left=1)).prompt(PROMPTS, 8_192)

    text = str(prompt.messages[-1]["content"])
    assert text.index("# Your steps so far") < text.index("Actions left") < text.index("You doubt.")


def test_a_finish_keeps_its_decisions() -> None:
    document = {
        "action": "finish",
        "summary": "A section is added.",
        "decisions": [{"title": "One page", "rationale": "short", "affects": ["README.md"]}],
    }

    action = requests.next_action(asked()).form(400).read(json.dumps(document))["action"]

    assert isinstance(action, Finish)
    assert action.decisions[0].affects == ["README.md"]
