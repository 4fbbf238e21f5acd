"""Files of tasks for `fleet eval`: SWE-bench's rows as they are, and what is refused, with why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.repositories import make_repository
from workers.cli.eval_tasks import default_run, entry_key, find_repositories, read_tasks
from workers.cli.session import CommandError
from workflows.models.evaluation import parse_configuration
from workflows.models.workspace import Repository

ROW: dict[str, Any] = {
    "repo": "astropy/astropy",
    "instance_id": "astropy__astropy-12907",
    "base_commit": "d16bfe05a744909de4b27f5875fe0d4ed41ce607",
    "patch": "diff --git a/x b/x\n",
    "test_patch": "diff --git a/tests/test_x.py b/tests/test_x.py\n",
    "problem_statement": "Modeling's `separability_matrix` is wrong for nested models",
    "hints_text": "",
    "created_at": "2022-03-03T15:14:54Z",
    "version": "4.3",
    "FAIL_TO_PASS": '["astropy/modeling/tests/test_separable.py::test_separable[compound_model6]"]',
    "PASS_TO_PASS": '["astropy/modeling/tests/test_separable.py::test_coord_matrix"]',
    "environment_setup_commit": "298ccb478e6bf092953bca67a3d29dc6c35f6752",
    "difficulty": "15 min - 1 hour",
}


def written(folder: Path, *rows: object, name: str = "tasks.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def refusal(file: Path) -> str:
    with pytest.raises(CommandError) as refused:
        read_tasks(file)
    return str(refused.value)


def test_a_row_of_swe_bench_is_read_as_it_is(tmp_path: Path) -> None:
    (found,) = read_tasks(written(tmp_path, ROW))

    assert found.task.instance_id == "astropy__astropy-12907"
    assert found.task.fail_to_pass == [
        "astropy/modeling/tests/test_separable.py::test_separable[compound_model6]"
    ]
    assert found.row.base_commit == ROW["base_commit"]


def test_tests_may_be_lists_and_the_file_a_json_list(tmp_path: Path) -> None:
    file = tmp_path / "tasks.json"
    other = ROW | {"instance_id": "two", "FAIL_TO_PASS": ["tests/test_a.py::test_a"]}
    del other["PASS_TO_PASS"]
    file.write_text(json.dumps([ROW, other], indent=2))

    _, second = read_tasks(file)

    assert second.task.fail_to_pass == ["tests/test_a.py::test_a"]
    assert second.task.pass_to_pass == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"base_commit": "main"}, "base_commit: must be the id of a commit, in full: 40 hex"),
        ({"FAIL_TO_PASS": "[]"}, "FAIL_TO_PASS: List should have at least 1 item"),
        ({"FAIL_TO_PASS": "test_a"}, "FAIL_TO_PASS: must be a list of tests, or one in a string"),
        ({"problem_statement": ""}, "problem_statement: String should have at least 1 character"),
        ({"instance_id": "../x"}, "instance_id: must match"),
    ],
)
def test_a_wrong_field_is_refused_with_its_line_and_the_rule(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    error = refusal(written(tmp_path, ROW, ROW | {"instance_id": "two"} | fields))

    assert error.startswith(f"tasks.jsonl:2: {words}")


def test_every_wrong_row_is_named(tmp_path: Path) -> None:
    nameless = {name: value for name, value in ROW.items() if name != "repo"}

    error = refusal(written(tmp_path, ROW, nameless, ROW, 7))

    assert "tasks.jsonl:2: repo: required; add it" in error
    assert "tasks.jsonl:3: instance_id: astropy__astropy-12907 is also in tasks.jsonl:1" in error
    assert "tasks.jsonl:4: (the whole): must be a JSON object" in error


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no tasks; give one JSON object in each line"),
        (b"{]\n", "tasks.jsonl:1: is not JSON"),
        (b"[{]", "tasks.jsonl: is not JSON"),
        (b"\xff\xfe", "give a file of tasks in UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_bytes(content)

    assert words in refusal(file)


def test_a_repository_is_an_entry_or_a_folder(tmp_path: Path) -> None:
    make_repository(tmp_path / "adder")
    rows = [ROW, ROW | {"instance_id": "two", "repo": "adder"}]
    entry = Repository(key="astropy__astropy", url="file:///srv/astropy.git")

    found = find_repositories(read_tasks(written(tmp_path, *rows)), {entry.key: entry}, tmp_path)

    assert found["astropy/astropy"] == entry
    assert found["adder"].url == (tmp_path / "adder").as_uri()
    assert found["adder"].key.startswith("local-adder-")


def test_an_unknown_repository_is_refused_with_the_entry_that_it_needs(tmp_path: Path) -> None:
    tasks = read_tasks(written(tmp_path, ROW))

    with pytest.raises(CommandError, match="add the entry astropy__astropy, or give a path"):
        find_repositories(tasks, {}, tmp_path)


def test_the_key_of_an_entry_follows_from_owner_and_name() -> None:
    assert entry_key("Scikit-Learn/scikit.learn") == "scikit-learn__scikit-learn"


def test_the_name_of_a_run_follows_from_its_tasks_and_limits(tmp_path: Path) -> None:
    file = written(tmp_path, ROW)
    tasks, others = read_tasks(file), read_tasks(written(tmp_path, ROW | {"base_commit": "c" * 40}))

    names = {default_run(file, tasks, 60), default_run(file, tasks, 70), default_run(file, others)}

    assert default_run(file, tasks, 60) in names
    assert len(names) == 3
    assert all(name.startswith("tasks-") for name in names)


@pytest.mark.parametrize("name", ["one", "best-of:3", "council:3x2"])
def test_the_name_of_a_configuration_is_read_back(name: str) -> None:
    assert parse_configuration(name).name == name


@pytest.mark.parametrize("name", ["", "two", "best-of:0", "best-of:51", "council:3", "council:3x0"])
def test_another_configuration_is_refused_with_the_rule(name: str) -> None:
    with pytest.raises(ValueError, match="write one, best-of:N or council:NxR"):
        parse_configuration(name)
