"""What a report names for people when a change touches the tests that measure it."""

from __future__ import annotations

from typing import Literal

import pytest

from activities.workspace.changed_tests import notes_on_tests
from activities.workspace.measuring import not_measured
from workflows.models.measurement import Measurement, SuiteResult
from workflows.models.workspace import ChangedFile, Repository

TEST_PATHS = Repository(key="sample", url="file:///sample.git").test_paths
NOTHING = not_measured("nothing ran")

Status = Literal["added", "modified", "deleted", "renamed"]


def notes(
    path: str, status: Status = "modified", old: str = "", measured: Measurement = NOTHING
) -> list[str]:
    files = [ChangedFile(path=path, old_path=old, status=status)]
    return notes_on_tests(files, measured, TEST_PATHS)


@pytest.mark.parametrize(
    "path",
    [
        *("conftest.py", "tests/unit/conftest.py", "pyproject.toml", "src/app.pth", "tox.ini"),
        *("package.json", "web/vitest.config.ts", ".mocharc.yml", "Makefile"),
    ],
)
def test_what_decides_how_tests_run_is_named_also_if_it_is_new(path: str) -> None:
    for status in ("added", "modified", "deleted"):
        assert notes(path, status) == [f"changed test configuration: {path}"]


def test_existing_tests_that_change_are_named_and_new_ones_are_not() -> None:
    named = ["changed existing tests: tests/test_a.py"]

    assert notes("tests/test_a.py") == named
    assert notes("tests/test_a.py", "deleted") == named
    assert notes("old/a.py", "renamed", old="tests/test_a.py") == [
        "changed existing tests: old/a.py"
    ]
    assert notes("tests/test_a.py", "added") == []
    assert notes("src/app.py") == []


def test_tests_of_the_base_that_did_not_run_are_named_up_to_a_limit() -> None:
    gone = [f"t.test_{number}" for number in range(12)]
    measured = NOTHING.model_copy(update={"unit": SuiteResult(passed=1, missing=gone)})

    (note,) = notes("src/app.py", measured=measured)

    assert note.startswith("tests of the base that did not run: t.test_0, t.test_1, ")
    assert note.endswith("t.test_9 and 2 more")
