"""Names of tests: as tasks give them, and as JUnit reports have them."""

from pathlib import Path

import pytest
from temporalio.exceptions import ApplicationError

from activities.workspace.activities import pinned_entry
from activities.workspace.evaluations import counted, reported_name
from activities.workspace.junit import Outcomes
from activities.workspace.measuring import Tested as SuiteRun
from activities.workspace.repositories import load_repositories
from activities.workspace.stores import Stores
from workflows.models.measurement import Step
from workflows.models.workspace import Repository


@pytest.mark.parametrize(
    ("test", "reported"),
    [
        ("tests/test_a.py::test_one", "tests.test_a::test_one"),
        ("tests/test_a.py::TestIt::test_one", "tests.test_a.TestIt::test_one"),
        ("tests/test_a.py::test_one[a::b-c/d.py]", "tests.test_a::test_one[a::b-c/d.py]"),
        ("test_one (app.tests.TestIt)", "app.tests.TestIt::test_one"),
        ("TestAdd/zero", "TestAdd/zero"),
    ],
)
def test_a_test_is_found_in_the_report(test: str, reported: str) -> None:
    assert reported_name(test) == reported


def test_only_a_test_that_ran_and_passed_counts() -> None:
    found = Outcomes()
    for name, outcome in (("passes", "passed"), ("fails", "failed"), ("skips", "skipped")):
        found.add(f"tests.test_a::{name}", outcome, "it is 4")  # type: ignore[arg-type]
    names = [f"tests/test_a.py::{name}" for name in ("passes", "fails", "skips", "absent")]

    count = counted(names, SuiteRun(Step(), found))

    assert (count.tests, count.passed) == (4, 1)
    assert [each.message for each in count.failed] == ["it is 4", "skipped", "it did not run"]


def test_the_reason_of_a_run_without_results_is_named() -> None:
    count = counted(["tests/test_a.py::test_one"], SuiteRun(Step(not_measured="no sandbox")))

    assert [each.message for each in count.failed] == ["no sandbox"]


def test_the_url_of_an_imported_repository_is_its_store_whatever_was_asked(tmp_path: Path) -> None:
    asked = Repository(key="local-adder", url="file:///etc")

    entry = pinned_entry({}, Stores(tmp_path), asked)

    assert entry.url == (tmp_path / "local-adder.git").as_uri()


def test_an_entry_with_the_key_of_an_imported_repository_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "repositories.yaml"
    file.write_text("repositories:\n  local-adder:\n    url: file:///srv/adder.git\n")

    with pytest.raises(ApplicationError, match="local-adder: local- begins the keys that"):
        load_repositories(file)
