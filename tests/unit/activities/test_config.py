"""Every configuration file is read strictly: mistakes are named and refused, not ignored."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from temporalio.exceptions import ApplicationError

from activities.agents.profiles import Profiles
from activities.agents.prompts import InvalidPrompt, Prompts
from activities.checks.activities import Checks
from activities.config import CONFIG, InvalidConfig, read_yaml
from activities.graph.councils import load_councils
from activities.graph.scopes import load_scopes
from activities.planning import load_config
from activities.workspace.repositories import load_repositories

READERS: dict[str, Callable[[Path], Any]] = {
    "agile.fsm.yaml": load_config,
    "rigor.yaml": load_config,
    "checks.yaml": Checks,
    "policy.yaml": Checks,
    "councils.yaml": lambda folder: load_councils(folder / "councils.yaml"),
    "models.yaml": Profiles.load,
    "scopes.yaml": lambda folder: load_scopes(folder / "scopes.yaml"),
    "repositories.yaml": lambda folder: load_repositories(folder / "repositories.yaml"),
    "prompts/propose.md": lambda folder: Prompts.load(folder / "prompts"),
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Return a team's own copy of the shipped files."""
    return Path(shutil.copytree(CONFIG, tmp_path / "config"))


def first_key(text: str) -> str:
    """Return the first line with a top-level key, and the lines that belong to it."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line[:1].isalpha() and ":" in line)
    end = next((i for i in range(start + 1, len(lines)) if lines[i][:1].strip(" #")), len(lines))
    return "\n".join(lines[start:end])


def test_every_configuration_file_is_covered() -> None:
    assert {file.name for file in CONFIG.glob("*.yaml")} == {
        name for name in READERS if name.endswith(".yaml")
    }


@pytest.mark.parametrize("name", READERS)
def test_a_key_that_is_given_twice_is_refused_by_name(name: str, config: Path) -> None:
    file = config / name
    again = first_key(file.read_text())
    file.write_text(file.read_text().replace(again, f"{again}\n{again}", 1))

    with pytest.raises((InvalidConfig, InvalidPrompt, ApplicationError)) as refused:
        READERS[name](config)

    message = str(refused.value)
    assert str(file) in message
    assert f"key '{again.split(':')[0]}' is given twice; keep one" in message
    assert "line " in message


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_not_utf_8_is_refused_by_name(name: str, config: Path) -> None:
    file = config / name
    file.write_bytes(file.read_bytes() + "# é".encode("cp1252"))

    with pytest.raises((InvalidConfig, InvalidPrompt, ApplicationError)) as refused:
        READERS[name](config)

    assert str(file) in str(refused.value)
    assert "byte 0xe9 is not UTF-8; save it as UTF-8" in str(refused.value)


@pytest.mark.parametrize("name", READERS)
def test_a_byte_order_mark_is_read(name: str, config: Path) -> None:
    file = config / name
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())

    READERS[name](config)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: {b: 1, c: [{d: 1, d: 2}]}", "line 1: key 'd' is given twice"),
        ("a: 1\nb:\n  x: 1\n  y: 2\n  x: 3", "line 5: key 'x' is given twice"),
        ("a: &a {x: 1}\nb: {<<: *a, y: 1, y: 2}", "line 2: key 'y' is given twice"),
        ("a:\n\t- 1", "is not YAML"),
        ("a: 1\n---\na: 2", "is not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("a: 2026-13-45", "holds a value that cannot be read"),
        ("[" * 5_000, "is n"),
    ],
)
def test_a_mistake_is_reported_with_its_location(text: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text(text)

    with pytest.raises(InvalidConfig) as refused:
        read_yaml(file)

    assert str(refused.value).startswith(f"{file}: ")
    assert problem in str(refused.value)


def test_an_anchor_may_be_used_and_overridden(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("base: &base {x: 1, y: 2}\nother: {<<: *base, y: 3}\n")

    assert read_yaml(file)["other"] == {"x": 1, "y": 3}
