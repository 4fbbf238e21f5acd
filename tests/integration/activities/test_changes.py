"""Measuring agents' commits: real git, and tests that really run."""

from __future__ import annotations

import asyncio
import shutil
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from temporalio.exceptions import ApplicationError

from activities.checks.sandbox import Sandbox
from activities.config import CONFIG
from activities.workspace.added_lines import ChangeChecks
from activities.workspace.base_results import BaseResultsOf
from activities.workspace.changes import SHOWN_BYTES, Changes
from activities.workspace.store import DIFF_BYTES
from activities.workspace.stores import Stores
from activities.workspace.trees import Trees
from tests.support.repositories import PROJECT, make_repository
from workflows.models.changes import MeasuredChange, MeasureInput
from workflows.models.workspace import Limits, Repository, Trailers

ADDER = "def add(left: int, right: int) -> int:\n    return left + right\n"
WORKING = PROJECT | {"adder/__init__.py": ADDER}
LIE = """\
import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport():
    report = (yield).get_result()
    report.outcome, report.longrepr = "passed", None
"""
NEW_TEST = "from adder import add\n\n\ndef test_zero():\n    assert add(0, 0) == 0\n"


@dataclass
class Bench:
    """A repository whose test passes, and what measures commits of it."""

    repository: Repository
    stores: Stores
    trees: Trees
    changes: Changes
    base: str
    steps: int = 0

    async def commit(self, files: dict[str, str]) -> str:
        """Commit files on the base, as another agent each time."""
        self.steps += 1
        store = await self.stores.of(self.repository)
        async with self.trees.at(store, self.base) as tree:
            for name, text in files.items():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                (tree / name).write_text(text)
            return await store.commit(
                tree,
                parent=self.base,
                message="Change",
                trailers=Trailers(story="US-1", task="T-1", agent=f"agent-{self.steps}", step=1),
                at=datetime(2026, 3, 1, tzinfo=UTC),
            )

    async def measured(self, commit: str, **fields: object) -> MeasuredChange:
        return await self.changes.measured(
            MeasureInput.model_validate(
                {"repository": self.repository, "base": self.base, "commit": commit} | fields
            )
        )


@pytest.fixture
async def bench(tmp_path: Path) -> Bench:
    url = make_repository(tmp_path / "adder", WORKING)
    repository = Repository(key="adder", url=url, limits=Limits(seconds=60))
    (tmp_path / "store").mkdir()
    stores, trees = Stores(tmp_path / "store"), Trees(tmp_path / "trees", 10**9)
    sandbox = Sandbox()
    checks = ChangeChecks(CONFIG, sandbox)
    changes = Changes(stores, trees, tmp_path / "prepared", checks, sandbox)
    base = await (await stores.of(repository)).base_commit()
    return Bench(repository, stores, trees, changes, base)


async def test_a_change_is_measured_against_its_base(bench: Bench) -> None:
    good = await bench.commit({"tests/test_zero.py": NEW_TEST})
    bad = await bench.commit({"adder/__init__.py": ADDER.replace("+", "*")})

    fine, broken = await asyncio.gather(bench.measured(good), bench.measured(bad))

    assert (fine.measurement.commit, fine.measurement.base) == (good, bench.base)
    assert (fine.measurement.unit.passed, fine.measurement.unit.base_tests) == (2, 1)
    assert (fine.change.insertions, fine.change.deletions) == (5, 0)
    assert "+def test_zero():" in fine.diff
    assert (fine.report.measured_by, fine.report.commit) == ("fleet", good)
    assert fine.report.unit.ok
    assert [name.endswith("test_it_adds") for name in broken.measurement.broken] == [True]
    assert not broken.report.unit.ok


async def test_the_results_of_a_base_are_kept_for_all_its_changes(bench: Bench) -> None:
    bad = await bench.commit({"adder/__init__.py": ADDER.replace("+", "*")})
    (name,) = (await bench.measured(bad)).measurement.broken
    kept = BaseResultsOf(await bench.stores.of(bench.repository), bench.repository, bench.base)
    results = await kept.read()
    assert results is not None
    assert results.unit == {name: "passed"}
    await kept.keep(results.model_copy(update={"unit": {name: "failed"}}))

    again = await bench.measured(bad)

    assert again.measurement.broken == []
    assert again.measurement.unit.failing_on_base == [name]


async def test_results_of_a_base_that_a_limit_stopped_are_not_kept(bench: Bench) -> None:
    commit = await bench.commit({"new.py": "x = 1\n"})
    stopped = {"unit": "sleep 60", "limits": Limits(seconds=1)}
    bench.repository = bench.repository.model_copy(update=stopped)
    kept = BaseResultsOf(await bench.stores.of(bench.repository), bench.repository, bench.base)

    found = await bench.measured(commit)

    assert found.measurement.unit.not_measured == "ran for more than 1 s"
    assert await kept.read() is None


async def test_tests_that_lie_or_are_weakened_are_named_in_the_report(bench: Bench) -> None:
    broken = ADDER.replace("+", "*")
    lying = await bench.commit({"adder/__init__.py": broken, "tests/conftest.py": LIE})
    weakened = await bench.commit(
        {
            "adder/__init__.py": broken,
            "tests/test_adder.py": "def test_it_is_there():\n    assert True\n",
        }
    )

    forged, fewer = await asyncio.gather(bench.measured(lying), bench.measured(weakened))

    assert forged.measurement.unit.passed == 1, "the lie did not work, and needs no note"
    assert forged.report.notes == ["changed test configuration: tests/conftest.py"]
    gone, changed = fewer.report.notes
    assert gone.startswith("tests of the base that did not run: ")
    assert gone.endswith("test_it_adds")
    assert changed == "changed existing tests: tests/test_adder.py"


async def test_other_commands_have_other_results_of_the_base(bench: Bench) -> None:
    store = await bench.stores.of(bench.repository)
    other = bench.repository.model_copy(update={"unit": "true"})

    refs = {BaseResultsOf(store, each, bench.base).ref for each in (bench.repository, other)}

    assert len(refs) == 2


async def test_a_commit_that_changes_nothing_is_not_measured(bench: Bench) -> None:
    found = await bench.measured(bench.base)

    assert found.change.files == []
    assert found.measurement.unit.not_measured == "it changes nothing"
    assert not found.report.build.ok


async def test_the_policy_reads_what_critics_do_not_see(bench: Bench) -> None:
    secret = 'token = "ghp_' + "a1B2c3D4e5" * 3 + '012345"\n'
    commit = await bench.commit({"a.py": "x = 1\n" * SHOWN_BYTES + secret})

    found = await bench.measured(commit)

    assert "the diff is longer than" in found.diff[-100:]
    assert "ghp_" not in found.diff
    policy = next(check for check in found.checks if check.name == "policy")
    assert policy.blocking


async def test_a_diff_that_is_longer_than_the_policy_reads_is_barred(bench: Bench) -> None:
    commit = await bench.commit({"data.txt": "0123456789abcde\n" * (DIFF_BYTES // 16)})

    found = await bench.measured(commit)

    policy = next(check for check in found.checks if check.name == "policy")
    assert policy.blocking
    assert "longer than the policy reads" in policy.findings[0]
    assert found.measurement.coverage.not_measured.startswith("the diff is longer than 2,097,152")


async def test_a_path_that_the_task_does_not_open_is_barred(bench: Bench) -> None:
    commit = await bench.commit({"README.md": "# Another\n"})

    found = await bench.measured(commit, paths=["docs/**"])

    policy = next(check for check in found.checks if check.name == "policy")
    assert policy.findings == ["blocking path: README.md: the story may not change it"]


async def test_a_base_that_cannot_be_prepared_fails_and_a_change_of_it_is_not_measured(
    bench: Bench,
) -> None:
    bench.repository = bench.repository.model_copy(
        update={"setup": "grep -q pinned requirements.txt || { echo not pinned; exit 3; }"}
    )
    commit = await bench.commit({"requirements.txt": "pinned\n"})

    with pytest.raises(ApplicationError, match="not pinned") as failed:
        await bench.measured(commit)

    assert failed.value.type == "PreparationFailed"
    bench.base = commit
    unpinned = await bench.commit({"requirements.txt": "anything\n"})
    found = await bench.measured(unpinned)
    assert "not pinned" in found.measurement.unit.not_measured


async def test_a_change_is_not_blamed_for_a_set_up_that_fails_for_its_base_too(
    bench: Bench, tmp_path: Path
) -> None:
    """As when the package index is away after the base was measured."""
    with socket.create_server(("127.0.0.1", 0)) as index:
        port = index.getsockname()[1]
        ask = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
        setup = {"setup": f'python -c "{ask}"'}
        bench.repository = bench.repository.model_copy(update=setup)
        await bench.measured(await bench.commit({"one.txt": "1\n"}))
        shutil.rmtree(tmp_path / "prepared")
        another = await bench.commit({"requirements.txt": "# none\n"})
        assert (await bench.measured(another)).measurement.unit.ran
        shutil.rmtree(tmp_path / "prepared")

    with pytest.raises(ApplicationError, match="ConnectionRefused") as failed:
        await bench.measured(another)

    assert failed.value.type == "PreparationFailed"
