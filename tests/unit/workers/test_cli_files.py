"""Files that the commands of `fleet` are given: a fault of one is one line, without servers."""

from datetime import timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from activities.tokens import Caller, create_token
from workers.cli import app as cli

TASK = (
    '{"instance_id": "a__b-1", "repo": "sample", "base_commit": "%s", "problem_statement": "p", '
    '"FAIL_TO_PASS": ["tests/test_a.py::test_a"]}'
) % ("a" * 40)

CALLER = Caller(actor="ana", roles=frozenset({"PO"}))
TOKEN = create_token("k" * 64, CALLER, timedelta(hours=1))


def refused(*arguments: str, **env: str) -> str:
    """Return what a command that must be refused writes to stderr, without its line breaks."""
    ended = CliRunner().invoke(cli.app, arguments, env=env)
    assert isinstance(ended.exception, SystemExit), ended.exception
    assert ended.exit_code == 1
    return ended.stderr


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "latin.json").write_bytes('{"actor": "José"}'.encode("latin-1"))
    (tmp_path / "tasks.jsonl").write_text(TASK)
    return tmp_path


@pytest.mark.parametrize("name", ["missing.json", "latin.json", "."])
@pytest.mark.parametrize("command", [("token", "sign", "US-1", "approve"), ("start",), ("eval",)])
def test_a_file_that_cannot_be_read_is_refused_in_one_line(
    files: Path, name: str, command: tuple[str, ...]
) -> None:

    words = refused(*command, str(files / name), FLEET_TOKEN=TOKEN)

    assert "in UTF-8" in words
    assert words.count("\n") == 1


def test_a_file_with_a_byte_order_mark_is_signed(files: Path) -> None:
    marked = files / "marked.json"
    marked.write_text('{"gate": "approve_scope", "actor": "ana", "role": "PO"}', "utf-8-sig")

    ended = CliRunner().invoke(
        cli.app,
        ["token", "sign", "US-1", "approve", str(marked)],
        env={"FLEET_TOKEN": TOKEN},
    )

    assert ended.exit_code == 0, ended.stderr
    assert '"proof"' in ended.stdout


@pytest.mark.parametrize("place", ["missing/results.json", "."])
def test_a_place_for_results_that_does_not_exist_is_refused_before_the_evaluations(
    files: Path, place: str
) -> None:
    words = refused("eval", str(files / "tasks.jsonl"), "--json", str(files / place))

    assert "--json:" in words
    assert "cannot be written" in words


def test_tasks_find_an_entry_whose_url_has_a_variable(files: Path) -> None:
    config = files / "repositories.yaml"
    config.write_text("repositories:\n  sample:\n    url: file://${PLACE}/sample\n")

    words = refused(
        "eval", str(files / "tasks.jsonl"), FLEET_CONFIG=str(files), PLACE=str(files / "none")
    )

    assert "not in repositories.yaml" not in words


def test_a_folder_without_a_commit_is_refused_before_it_is_measured(files: Path) -> None:
    words = refused("report", "US-1", str(files))

    assert "commit the project first" in words
