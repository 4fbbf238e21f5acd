"""Ten small tasks of SWE-bench's kind: a repository with seeded defects, and the rows of its tasks.

`python -m tests.evaluation DIR` makes them for `fleet eval DIR/tasks.jsonl`. The repository is
always the same one: each task's base is a commit with one defect, on a branch of its name.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
PROJECT = HERE / "project"
SEEDED = "tasks.yaml"
REPOSITORY = "stockroom"
AT = "2026-03-01T10:00:00+00:00"


@dataclass(frozen=True)
class Seeded:
    """A task: `good` code in a file, what the base has instead, and the tests of a repair."""

    instance_id: str
    problem_statement: str
    file: str
    good: str
    bad: str
    tests: str
    test: str
    pass_to_pass: tuple[str, ...] = ()

    @property
    def repaired(self) -> str:
        """The file without the defect."""
        return (PROJECT / self.file).read_text()

    @property
    def test_patch(self) -> str:
        """Add the tests to their file."""
        before = (PROJECT / self.tests).read_text()
        after = f"{before}\n\n{self.test}"
        return "".join(
            difflib.unified_diff(
                before.splitlines(keepends=True),
                after.splitlines(keepends=True),
                f"a/{self.tests}",
                f"b/{self.tests}",
            )
        )

    def row(self, repo: str, base_commit: str) -> dict[str, Any]:
        """Return the row of SWE-bench: two of its columns are JSON in a string."""
        added = [f"{self.tests}::{name}" for name in tests_in(self.test)]
        kept = [f"{self.tests}::{name}" for name in self.pass_to_pass]
        return {
            "instance_id": self.instance_id,
            "repo": repo,
            "base_commit": base_commit,
            "problem_statement": self.problem_statement,
            "hints_text": "",
            "version": "1.4",
            "test_patch": self.test_patch,
            "FAIL_TO_PASS": json.dumps([name for name in added if name not in kept]),
            "PASS_TO_PASS": json.dumps([*sorted(visible_tests()), *kept]),
        }


def tests_in(code: str) -> list[str]:
    return [each.name for each in ast.parse(code).body if isinstance(each, ast.FunctionDef)]


def visible_tests() -> Iterator[str]:
    """Yield the names of the tests that the project has."""
    for file in sorted((PROJECT / "tests").glob("test_*.py")):
        yield from (f"tests/{file.name}::{name}" for name in tests_in(file.read_text()))


def seeded() -> list[Seeded]:
    tasks = yaml.safe_load((HERE / SEEDED).read_text())["tasks"]
    return [
        Seeded(**task | {"pass_to_pass": tuple(task.get("pass_to_pass", ()))}) for task in tasks
    ]


def make_repository(folder: Path) -> dict[str, str]:
    """Make the repository; return the base commit of each task."""
    shutil.copytree(PROJECT, folder, ignore=shutil.ignore_patterns("__pycache__"))
    git(folder, "init", "--quiet", "--initial-branch", "main")
    commit(folder, "Add the parts of an inventory")
    bases = {}
    for task in seeded():
        git(folder, "checkout", "--quiet", "-b", task.instance_id, "main")
        file = folder / task.file
        code = file.read_text()
        assert code.count(task.good) == 1, f"{task.instance_id}: good: is not in {task.file} once"
        file.write_text(code.replace(task.good, task.bad))
        bases[task.instance_id] = commit(folder, "Change a part of the inventory")
    git(folder, "checkout", "--quiet", "main")
    return bases


def make(folder: Path) -> Path:
    """Make the repository and, beside it, the file of the tasks, which is returned."""
    bases = make_repository(folder / REPOSITORY)
    rows = [task.row(REPOSITORY, bases[task.instance_id]) for task in seeded()]
    file = folder / "tasks.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def commit(folder: Path, message: str) -> str:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", message)
    return git(folder, "rev-parse", "HEAD")


def git(folder: Path, *arguments: str) -> str:
    identity = {
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "ana"), ("EMAIL", "ana@example.org"), ("DATE", AT))
    }
    done = subprocess.run(
        ["git", *arguments],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        env={
            "PATH": os.environ["PATH"],
            "HOME": "/nonexistent",
            "GIT_CONFIG_NOSYSTEM": "1",
            **identity,
        },
    )
    return done.stdout.strip()
