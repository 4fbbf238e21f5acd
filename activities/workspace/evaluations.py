"""Evaluation of commits: the tests of a task, run on what agents made of it.

The agents' tests do not count. Test files are those of the base, with the task's test patch.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from temporalio import activity

from activities.checks.base import printable
from activities.checks.sandbox import Sandbox
from activities.workspace.activities import known_commit, pinned_entry, sandbox_errors
from activities.workspace.changes import change_of
from activities.workspace.errors import store_errors
from activities.workspace.git import GitFailed, git
from activities.workspace.junit import NAME_CHARACTERS, Outcomes
from activities.workspace.measuring import PYTHON, Tested, run_unit_tests
from activities.workspace.preparing import PreparationFailed, prepare
from activities.workspace.python_project import InvalidProject, command_of_tests, prepare_settings
from activities.workspace.store import Store
from activities.workspace.stores import Stores
from activities.workspace.trees import Trees
from workflows.models.errors import ErrorType, application_error
from workflows.models.evaluation import EvaluatedCommit, EvaluateInput, SuiteCount
from workflows.models.measurement import LISTED, FailedTest, Step
from workflows.models.workspace import Repository
from workflows.rules.globs import matches
from workflows.stubs import EvaluationStub

AT = datetime(2000, 1, 1, tzinfo=UTC)
"""The date of the commits that the tests run on: they are the same whenever they are made."""

COMMAND_CHARACTERS = 32_000
"""Of a command that names files; with more of them, all tests run."""

COMMITS_LISTED = 100

NOT_RUN = "it did not run"

_UNITTEST = re.compile(r"(\S+) \(([\w.]+)\)")
"""A test as unittest and Django name it: `test_name (module.Class)`."""


class Evaluations(EvaluationStub):
    """Runs tasks' tests on commits of stores."""

    def __init__(
        self,
        repositories: Mapping[str, Repository],
        stores: Stores,
        trees: Trees,
        prepared: Path,
        sandbox: Sandbox,
    ) -> None:
        """Create the activities.

        Args:
            repositories: key -> entry.
            stores: the repositories' stores.
            trees: where commits are checked out.
            prepared: the cache of prepared dependencies.
            sandbox: limits how many commands run at once.
        """
        self._repositories = repositories
        self._stores = stores
        self._trees = trees
        self._prepared = prepared
        self._sandbox = sandbox

    @activity.defn
    async def evaluate_commit(self, request: EvaluateInput) -> EvaluatedCommit:
        entry = pinned_entry(self._repositories, self._stores, request.repository)
        return await self.evaluated(request.model_copy(update={"repository": entry}))

    async def evaluated(self, request: EvaluateInput) -> EvaluatedCommit:
        """Return what the task's tests say of a commit.

        Raises:
            ApplicationError: the errors of the store; `InvalidInput`: the test patch does not
                apply; `PreparationFailed`, not retryable.
        """
        store = await self._stores.of(request.repository, request.base, request.commit)
        await known_commit(store, request.base)
        changed = await store.changed(request.base, request.commit)
        with sandbox_errors():
            tests = await self._tests(request, store)
        to_pass = counted(request.fail_to_pass, tests)
        passing = counted(request.pass_to_pass, tests)
        return EvaluatedCommit(
            resolved=to_pass.passed == to_pass.tests and passing.passed == passing.tests,
            run=tests.step,
            fail_to_pass=to_pass,
            pass_to_pass=passing,
            change=change_of(request.base, request.commit, changed),
            commits=(await store.log(request.base, request.commit))[:COMMITS_LISTED],
        )

    async def _tests(self, request: EvaluateInput, store: Store) -> Tested:
        """Run the tests of the base, with the test patch, on the rest of the commit."""
        tested = await with_tests_of_base(store, request)
        async with self._trees.at(store, tested, key=f"evaluated/{tested}") as tree:
            try:
                prepared = await prepare(
                    request.repository, tree, self._prepared, sandbox=self._sandbox
                )
            except PreparationFailed as failed:
                return Tested(Step(not_measured=str(failed)))
            entry = await asyncio.to_thread(entry_for_tests, request, tree)
            return await run_unit_tests(entry, tree, prepared=prepared, sandbox=self._sandbox)


async def with_tests_of_base(store: Store, request: EvaluateInput) -> str:
    """Return a commit like the request's, with the base's tests and the test patch.

    Raises:
        ApplicationError: `InvalidInput`: the test patch does not apply to the base.
    """
    changed = await store.changed(request.base, request.commit)
    touched = {path for file in changed for path in (file.path, file.old_path) if path}
    patch = request.test_patch.encode()
    with store_errors(), TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        await git("read-tree", request.commit, git_dir=store.path, index=index)
        named = await _patched_files(store, patch) if patch else set()
        restored = {each for each in touched if each in named or is_test(request, each)}
        if restored:
            await _restore(store, index, request.base, restored)
        if patch:
            await _apply(store, index, patch)
        tree = (await git("write-tree", git_dir=store.path, index=index)).decode().strip()
        return await store.commit_object(tree, [request.commit], "Evaluate\n", "fleet", AT)


def is_test(request: EvaluateInput, path: str) -> bool:
    """Return whether a file is a test, or decides how tests run."""
    named = {each.partition("::")[0] for each in (*request.fail_to_pass, *request.pass_to_pass)}
    return (
        path in named
        or PurePosixPath(path).name == "conftest.py"
        or matches(path, request.repository.test_paths)
    )


async def _patched_files(store: Store, patch: bytes) -> set[str]:
    try:
        listed = await git("apply", "--numstat", "-z", "-", git_dir=store.path, stdin=patch)
    except GitFailed as failure:
        raise _refused_patch(failure) from None
    return {
        part.split(b"\t")[-1].decode(errors="backslashreplace")
        for part in listed.split(b"\0")
        if part
    }


async def _restore(store: Store, index: Path, base: str, paths: Iterable[str]) -> None:
    """Let files of an index be those of the base, and be absent where it has none."""
    listed = await git("ls-tree", "-r", "-z", base, git_dir=store.path)
    known = {entry.split(b"\t", 1)[1]: entry for entry in listed.split(b"\0") if entry}
    lines = [known.get(path.encode(), b"0 " + b"0" * 40 + b"\t" + path.encode()) for path in paths]
    words = ("update-index", "-z", "--index-info")
    await git(*words, git_dir=store.path, index=index, stdin=b"\0".join(lines) + b"\0")


async def _apply(store: Store, index: Path, patch: bytes) -> None:
    words = ("apply", "--cached", "--whitespace=nowarn", "-")
    try:
        await git(*words, git_dir=store.path, index=index, stdin=patch)
    except GitFailed as failure:
        raise _refused_patch(failure) from None


def _refused_patch(failure: GitFailed) -> Exception:
    return application_error(
        ErrorType.INVALID_INPUT,
        f"test_patch: does not apply to base_commit; correct one of them ({failure.reason[:300]})",
    )


def entry_for_tests(request: EvaluateInput, tree: Path) -> Repository:
    """Return the entry with a command that runs the files of the task's tests.

    A command that the entry gives stays, and so does one of all tests if no files are named.
    """
    entry = request.repository
    if entry.unit or entry.image != PYTHON:
        return entry
    names = (*request.fail_to_pass, *request.pass_to_pass)
    files = sorted({each.partition("::")[0] for each in names if "::" in each})
    known = [each for each in files if (tree / each).is_file()]
    if not known or any("::" not in each for each in names):
        return entry
    try:
        prepare_settings(tree)
        command = command_of_tests(tree, known)
    except InvalidProject:
        return entry  # the run says what is wrong
    if len(command) > COMMAND_CHARACTERS:
        return entry
    return entry.model_copy(update={"unit": command})


def counted(names: Iterable[str], tests: Tested) -> SuiteCount:
    """Return how many tests of a list have passed, and why the others have not."""
    found = tests.found or Outcomes()
    wanted = list(dict.fromkeys(names))
    failed = []
    for name in wanted:
        known = reported_name(name)
        outcome = found.outcomes.get(known) or found.outcomes.get(name)
        if outcome != "passed":
            why = found.messages.get(known, "") or outcome or tests.step.not_measured or NOT_RUN
            failed.append(FailedTest(name=name, message=why))
    return SuiteCount(tests=len(wanted), passed=len(wanted) - len(failed), failed=failed[:LISTED])


def reported_name(test: str) -> str:
    """Return the name that a JUnit report gives a test of pytest, unittest or Django."""
    if found := _UNITTEST.fullmatch(test):
        return printable(f"{found[2]}::{found[1]}")[:NAME_CHARACTERS]
    path, *parts = _node_parts(test)
    if not parts:
        return test
    module = path.removesuffix(".py").replace("/", ".")
    return printable(f"{'.'.join((module, *parts[:-1]))}::{parts[-1]}")[:NAME_CHARACTERS]


def _node_parts(test: str) -> list[str]:
    """Split the name of a test at `::`, but not within its parameters."""
    name, bracket, parameters = test.partition("[")
    *parts, last = name.split("::")
    return [*parts, f"{last}{bracket}{parameters}"]
