"""Acceptance tests that really run: on the branch, and on its base with the branch's tests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from activities.checks.sandbox import Sandbox
from activities.workspace.acceptance import AcceptanceTests, laid_over
from activities.workspace.stores import Stores
from activities.workspace.trees import Trees
from tests.support.projects import Project, make_project, plain_git
from tests.support.recovering import Recovering
from workflows.models.acceptance import Acceptance, AcceptanceQuery, AcceptanceRuns
from workflows.models.workspace import Limits, Repository
from workflows.rules.acceptance import judged

CALC = "def add(a, b):\n    return a + b\n"
SUBTRACTS = CALC + "\n\ndef subtract(a, b):\n    return a - b\n"
TESTS = """
import calc


def test_ac1_subtracts():
    assert calc.subtract(5, 3) == 2


def test_ac2_adds():
    assert calc.add(2, 3) == 5


def test_ac3_multiplies():
    assert calc.multiply(2, 3) == 6
"""
IMPORTS = "from calc import subtract\n\n\nclass TestZero:\n    def test_AC_5(self):\n        "
IMPORTS += "assert subtract(1, 1) == 0\n"


NODE_SUM = "export const sum = (a, b) => a + b;\n"
NODE_TESTS = """
import assert from 'node:assert';
import { describe, test } from 'node:test';
import { sum } from '../sum.mjs';

describe('sum', () => {
  test('AC-1: adds two numbers', () => assert.equal(sum(2, 3), 5));
});
"""


@dataclass
class Bench:
    """A project, and the activity that tests its criteria."""

    project: Project
    entry: Repository
    stores: Stores
    tests: AcceptanceTests
    base: str

    def branch(self, files: Mapping[str, str | bytes | None], name: str = "story/US-1") -> str:
        """Commit files on the base, push them as a story's branch, and return the commit."""
        clone = self.project.clone
        plain_git("checkout", "--quiet", "-B", "work", self.base, cwd=clone)
        for path, content in files.items():
            file = clone / path
            file.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                file.unlink()
            else:
                file.write_bytes(content if isinstance(content, bytes) else content.encode())
        plain_git("add", "--all", "--force", cwd=clone)
        plain_git("commit", "--quiet", "-m", "Change", cwd=clone)
        store = self.store_path.as_uri()
        plain_git("push", "--quiet", "--force", store, f"work:refs/heads/{name}", cwd=clone)
        return plain_git("rev-parse", "HEAD", cwd=clone)

    @property
    def store_path(self) -> Path:
        return self.tests._stores._root / f"{self.entry.key}.git"

    async def run(self, commit: str, criteria: int = 5) -> AcceptanceRuns:
        query = AcceptanceQuery(
            repository=self.entry,
            story_id="US-1",
            base=self.base,
            commit=commit,
            criteria=criteria,
        )
        return await ActivityEnvironment().run(self.tests.test_criteria, query)

    async def judged(self, commit: str, criteria: int = 5) -> Acceptance:
        return judged([f"criterion {n + 1}" for n in range(criteria)], await self.run(commit))


@pytest.fixture
async def bench(tmp_path: Path) -> Bench:
    project = make_project(tmp_path)
    base = project.commit({"calc.py": CALC, "src/app.py": None, "tests/test_app.py": None})
    entry = project.entry(limits=Limits(seconds=120))
    (tmp_path / "stores").mkdir()
    stores = Stores(tmp_path / "stores")
    await stores.of(entry)
    trees = Trees(tmp_path / "trees", 10**9)
    made = AcceptanceTests({entry.key: entry}, stores, trees, tmp_path / "prepared", Sandbox())
    return Bench(project, entry, stores, made, base)


async def test_a_criterion_is_proved_by_a_test_that_fails_on_the_base_and_passes_on_the_branch(
    bench: Bench,
) -> None:
    commit = bench.branch(
        {"calc.py": SUBTRACTS, "tests/test_calc.py": TESTS, "tests/test_zero.py": IMPORTS}
    )

    found = await bench.judged(commit)

    shown = {
        criterion.number: (criterion.proved, [(t.before, t.after) for t in criterion.tests])
        for criterion in found.criteria
    }
    assert shown == {
        1: (True, [("failed", "passed")]),
        2: (False, [("passed", "passed")]),
        3: (False, [("failed", "failed")]),
        4: (False, []),
        5: (True, [("error", "passed")]),
    }
    why = [criterion.why for criterion in found.criteria]
    assert why[1] == "its tests pass on the base too"
    assert why[2].endswith("::test_ac3_multiplies fails on the branch")
    assert why[3] == "no test names it"
    assert "ImportError" in found.criteria[4].tests[0].why
    assert found.changed_tests == []
    bench.tests._sandbox = Sandbox("/nonexistent/bwrap")
    assert await bench.judged(commit) == found, "the results are not kept"
    with pytest.raises(ApplicationError, match="nonexistent"):
        await bench.run(commit, criteria=2)


FLAKY = """
from pathlib import Path

import calc


def test_ac1_subtracts():
    assert Path("service").exists()
    assert calc.subtract(5, 3) == 2


def test_ac2_answers():
    assert Path("service").exists()


def test_ac3_never():
    assert Path("nothing").exists()
"""


async def test_one_more_run_decides_whether_a_failing_test_proves_its_criterion(
    bench: Bench,
) -> None:
    commit = bench.branch({"calc.py": SUBTRACTS, "tests/test_calc.py": FLAKY})
    sandbox = bench.tests._sandbox = Recovering(away=2)

    found = await bench.judged(commit, 3)

    shown = {
        criterion.number: (
            criterion.proved,
            [(t.before, t.after, t.flaky) for t in criterion.tests],
        )
        for criterion in found.criteria
    }
    assert shown == {
        1: (True, [("failed", "passed", True)]),
        2: (False, [("passed", "passed", True)]),  # on the base, one more run passed it too
        3: (False, [("failed", "failed", False)]),
    }
    assert sandbox.test_runs == 4


async def test_tests_that_were_not_run_prove_nothing(bench: Bench) -> None:
    bench.entry = bench.entry.model_copy(update={"unit": "echo no report; exit 0"})
    commit = bench.branch({"calc.py": SUBTRACTS, "tests/test_calc.py": TESTS})

    found = await bench.judged(commit)

    assert [criterion.proved for criterion in found.criteria] == [False] * 5
    assert "no JUnit XML file" in found.criteria[0].why


async def test_a_run_that_a_limit_stopped_is_not_kept(bench: Bench) -> None:
    stopped = {"unit": "sleep 60", "limits": Limits(seconds=1)}
    bench.entry = bench.entry.model_copy(update=stopped)
    commit = bench.branch({"calc.py": SUBTRACTS, "tests/test_calc.py": TESTS})

    found = await bench.run(commit)

    assert found.not_run[0].startswith("unit tests on the branch: ran for more than 1 s")
    assert plain_git("for-each-ref", "refs/fleet-results", cwd=bench.store_path) == ""


async def test_a_base_on_which_nothing_runs_proves_nothing(bench: Bench) -> None:
    bench.entry = bench.entry.model_copy(
        update={"unit": "grep -q subtract calc.py || exit 0; pytest -q --junitxml=$REPORTS/u.xml"}
    )
    commit = bench.branch({"calc.py": SUBTRACTS, "tests/test_calc.py": TESTS})

    found = await bench.judged(commit)

    (test,) = found.criteria[0].tests
    assert (test.before, test.after) == ("not run", "passed")
    assert found.criteria[0].why.startswith("its tests were not run on the base; unit tests on ")


async def test_a_node_test_whose_file_does_not_load_on_the_base_fails_there(bench: Bench) -> None:
    bench.entry = bench.entry.model_copy(
        update={
            "image": "node",
            "unit": "node --test --test-reporter=junit "
            "--test-reporter-destination=$REPORTS/unit.xml test/",
        }
    )
    commit = bench.branch({"sum.mjs": NODE_SUM, "test/sum.test.mjs": NODE_TESTS})

    found = await bench.judged(commit)

    assert [(t.before, t.after) for t in found.criteria[0].tests] == [("error", "passed")]
    assert found.criteria[0].proved


async def test_tests_that_the_branch_weakens_or_removes_are_listed(bench: Bench) -> None:
    bench.base = bench.project.commit({"tests/test_calc.py": TESTS, "tests/test_more.py": "x = 1"})
    bench.entry = bench.entry.model_copy(update={"unit": "true"})
    await (await bench.stores.of(bench.entry)).base_commit()
    commit = bench.branch(
        {"tests/test_calc.py": TESTS.replace("== 5", "> 0"), "tests/test_more.py": None}
    )

    found = await bench.run(commit)

    assert found.changed_tests == ["tests/test_calc.py", "tests/test_more.py"]


async def test_test_files_laid_over_the_base_replace_its_own(bench: Bench) -> None:
    clone = bench.project.clone
    (clone / "tests").mkdir(exist_ok=True)
    os.symlink("/etc", clone / "tests" / "data")  # noqa: PTH211
    bench.base = bench.project.commit({"tests/test_gone.py": "x = 1\n"})
    store = await bench.stores.of(bench.entry)
    await store.base_commit()
    (clone / "tests" / "data").unlink()
    commit = bench.branch(
        {"tests/data/new.txt": "new", "tests/test_gone.py": None, "calc.py": SUBTRACTS}
    )

    laid = await laid_over(store, bench.base, commit, bench.entry.test_paths)

    listed = plain_git("ls-tree", "-r", "--name-only", laid, cwd=bench.store_path).splitlines()
    assert listed == ["README.md", "calc.py", "tests/data/new.txt"]
    assert plain_git("show", f"{laid}:calc.py", cwd=bench.store_path) == CALC.strip()
    assert laid == await laid_over(store, bench.base, commit, bench.entry.test_paths)
