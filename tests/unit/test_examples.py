"""The examples in the documents and in the help of `fleet` can be run as they stand."""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from typer.core import TyperGroup

from tests.unit.workflows.test_events import comparable, recorded
from workers.cli.app import COMMANDS, load
from workflows.models.outbox import SkipEntry
from workflows.models.story import Amend, Approve, RaiseBudget, Rebase, Reject, StoryInput
from workflows.rules.machine_file import parse_machine

ROOT = Path(__file__).parents[2]
PAGES = {page.name: page.read_text() for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}

MODELS: dict[str, type[BaseModel]] = {
    "approve": Approve,
    "reject": Reject,
    "amend": Amend,
    "raise_budget": RaiseBudget,
    "rebase": Rebase,
    "skip_entry": SkipEntry,
}


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(command, TyperGroup):
        for name, each in command.commands.items():
            yield from commands(each, f"{path} {name}")
    else:
        yield path, command


HELP = {path: each for name in COMMANDS for path, each in commands(load(name), f"fleet {name}")}
HELP = {path: command for path, command in HELP.items() if command.epilog}
TEXTS = PAGES | {path: command.epilog for path, command in HELP.items()}


@functools.cache
def emitted_ids() -> set[str]:
    """Return every id of the recorded histories, as `comparable` writes them."""
    found: set[str] = set()
    for kind, entries in recorded().items():
        for entry in entries:
            ids = comparable(kind, [entry.source, *entry.body.values()], entry.story_id)
            found.update(each for each in ids if isinstance(each, str))
    return found


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_an_id_in_an_example_has_a_form_that_the_code_makes(text: str) -> None:
    ids = re.findall(r"\b(?:[a-z]+-)?US-\d+(?:-\w+)*", text)
    shown = {comparable("", re.sub(r"US-\d+", "US-101", each), "US-101") for each in ids}

    closures = {"closure-US-101-RUN"}
    assert shown - closures - {"US-101"} <= emitted_ids()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_input_of_an_update_is_one_that_the_story_takes(text: str) -> None:
    machine = parse_machine(yaml.safe_load((ROOT / "deploy/config/agile.fsm.yaml").read_text()))
    events = {transition.event for transition in machine.transitions}

    for name, body in re.findall(r"--name (\w+)\s+(?:\\\s+)?--input\s+'(\{\"[^']*)'", text):
        request = MODELS[name].model_validate_json(body)
        named = {getattr(request, field, "") for field in ("gate", "event")} - {""}
        assert named <= events


def test_the_story_of_the_quickstart_is_a_valid_one() -> None:
    (story,) = re.findall(r"```json\n(.*?)```", PAGES["quickstart.md"], re.DOTALL)

    assert StoryInput.model_validate(json.loads(story)).story_id == "US-7"


@pytest.mark.parametrize("path", HELP)
def test_an_example_of_the_help_is_a_valid_command_line(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    lines = [line for line in HELP[path].epilog.split("·") if path in line]
    assert lines

    for line in lines:
        arguments = shlex.split(re.split(r"[|>]", line.partition(path)[2])[0])
        HELP[path].make_context(path, arguments).close()
