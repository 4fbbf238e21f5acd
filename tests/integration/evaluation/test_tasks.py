"""The ten tasks of tests/evaluation: each base fails its tests, and each repair passes them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from temporalio.exceptions import ApplicationError

from activities.checks.sandbox import Sandbox
from activities.workspace.evaluations import Evaluations
from activities.workspace.store import Store
from activities.workspace.stores import Stores
from activities.workspace.trees import Trees
from tests.evaluation.make import REPOSITORY, Seeded, make, seeded
from workflows.models.evaluation import EvaluatedCommit, EvaluateInput
from workflows.models.workspace import Repository, Trailers

SEEDED = {task.instance_id: task for task in seeded()}


@dataclass
class Bench:
    """The repository of the tasks, and what evaluates commits of it."""

    repository: Repository
    store: Store
    trees: Trees
    evaluations: Evaluations
    rows: dict[str, dict[str, Any]]
    commits: int = 0

    async def commit(self, base: str, files: dict[str, str]) -> str:
        self.commits += 1
        trailers = Trailers(story="US-1", task="T-1", agent=f"agent-{self.commits}", step=1)
        async with self.trees.at(self.store, base) as tree:
            for path, text in files.items():
                (tree / path).write_text(text)
            return await self.store.commit(
                tree,
                parent=base,
                message="Change",
                trailers=trailers,
                at=datetime(2026, 3, 1, tzinfo=UTC),
            )

    async def evaluated(self, instance_id: str, commit: str, **fields: Any) -> EvaluatedCommit:
        row = self.rows[instance_id]
        request = {
            "repository": self.repository,
            "base": row["base_commit"],
            "commit": commit,
            "fail_to_pass": json.loads(row["FAIL_TO_PASS"]),
            "pass_to_pass": json.loads(row["PASS_TO_PASS"]),
            "test_patch": row["test_patch"],
        }
        return await self.evaluations.evaluated(EvaluateInput.model_validate(request | fields))

    async def repaired(self, task: Seeded, **more: str) -> str:
        """Return a commit with the code that is right, and more files."""
        base = self.rows[task.instance_id]["base_commit"]
        return await self.commit(base, {task.file: task.repaired} | more)


@pytest.fixture(scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    home = tmp_path_factory.mktemp("evaluation")
    file = make(home)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    repository = Repository(key="stockroom", url=f"file://{home / REPOSITORY}")
    (home / "store").mkdir()
    stores, trees = Stores(home / "store"), Trees(home / "trees", 10**9)
    store = await stores.import_commits(repository, [row["base_commit"] for row in rows])
    evaluations = Evaluations(
        {repository.key: repository}, stores, trees, home / "prepared", Sandbox()
    )
    return Bench(repository, store, trees, evaluations, {row["instance_id"]: row for row in rows})


@pytest.mark.parametrize("task", SEEDED.values(), ids=SEEDED)
async def test_a_task_fails_on_its_base_and_passes_with_its_repair(
    bench: Bench, task: Seeded
) -> None:
    base = bench.rows[task.instance_id]["base_commit"]
    repair = await bench.repaired(task)

    before, after = await asyncio.gather(
        bench.evaluated(task.instance_id, base), bench.evaluated(task.instance_id, repair)
    )

    assert (before.resolved, before.fail_to_pass.passed) == (False, 0)
    assert before.pass_to_pass.failed == []
    assert after.resolved, after.fail_to_pass.failed + after.pass_to_pass.failed
    assert after.pass_to_pass.tests >= 20
    assert [file.path for file in after.change.files] == [task.file]


def test_the_repository_is_always_the_same_one(tmp_path: Path) -> None:
    one, other = (make(tmp_path / name) for name in ("one", "other"))

    assert len(one.read_text().splitlines()) == 10
    assert one.read_text() == other.read_text()


async def test_tests_that_an_agent_changes_do_not_count(bench: Bench) -> None:
    """Neither a weakened test nor a conftest.py that lets everything pass."""
    task = SEEDED["stockroom-1"]
    lie = "import pytest\n\n\n@pytest.fixture(autouse=True)\ndef lie(monkeypatch):\n    "
    lie += "monkeypatch.setattr('stockroom.money.parse', lambda text: 1250)\n"
    base = bench.rows[task.instance_id]["base_commit"]
    changed = await bench.commit(
        base, {"conftest.py": lie, task.tests: "def test_nothing():\n    assert True\n"}
    )

    found = await bench.evaluated(task.instance_id, changed)

    assert not found.resolved
    assert found.fail_to_pass.passed == 0
    assert found.pass_to_pass.failed == []


async def test_a_repair_that_breaks_another_test_resolves_nothing(bench: Bench) -> None:
    task = SEEDED["stockroom-1"]
    stock = "def nothing() -> None:\n    pass\n"
    commit = await bench.repaired(task, **{"stockroom/stock.py": stock})

    found = await bench.evaluated(task.instance_id, commit)

    assert found.fail_to_pass.passed == found.fail_to_pass.tests
    assert found.pass_to_pass.passed < found.pass_to_pass.tests
    assert not found.resolved


async def test_a_run_that_hangs_resolves_nothing(bench: Bench) -> None:
    task = SEEDED["stockroom-2"]
    hasty = bench.repository.model_copy(
        update={"limits": bench.repository.limits.model_copy(update={"seconds": 2})}
    )
    evaluations = bench.evaluations
    hangs = await bench.repaired(task, **{"stockroom/__init__.py": "while True:\n    pass\n"})

    found = await evaluations.evaluated(
        EvaluateInput(
            repository=hasty,
            base=bench.rows[task.instance_id]["base_commit"],
            commit=hangs,
            fail_to_pass=["tests/test_money.py::test_an_amount_has_cents"],
        )
    )

    assert not found.resolved
    assert found.run.stopped
    assert found.fail_to_pass.failed[0].message == found.run.not_measured


async def test_a_test_patch_that_does_not_apply_is_refused_with_the_reason(bench: Bench) -> None:
    task = SEEDED["stockroom-3"]
    patch = bench.rows["stockroom-1"]["test_patch"].replace("test_money", "test_pages")
    repair = await bench.repaired(task)

    with pytest.raises(ApplicationError) as refused:
        await bench.evaluated(task.instance_id, repair, test_patch=patch)

    assert refused.value.type == "InvalidInput"
    assert refused.value.message.startswith("test_patch: does not apply to base_commit")
