"""Acceptance tests: run on the branch, and on its base with the branch's test files over it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from temporalio import activity

from activities.checks.sandbox import Sandbox
from activities.workspace.activities import known_commit, sandbox_errors
from activities.workspace.base_results import DECIDING
from activities.workspace.errors import store_errors
from activities.workspace.git import git
from activities.workspace.junit import Outcomes
from activities.workspace.kept_blobs import KeptBlob
from activities.workspace.measuring import SUITES, Suite, Tested, run_suites
from activities.workspace.preparing import PreparationFailed, prepare
from activities.workspace.repositories import find_repository
from activities.workspace.store import Store
from activities.workspace.stores import Stores
from activities.workspace.trees import Trees
from workflows.models.acceptance import AcceptanceQuery, AcceptanceRuns, AcceptanceTest
from workflows.models.base import content_hash
from workflows.models.ids import ref_part
from workflows.models.measurement import Step
from workflows.models.workspace import Repository
from workflows.rules.acceptance import listed, named, status
from workflows.rules.globs import matches
from workflows.stubs import AcceptanceStub

Runs = dict[Suite, Tested]
Names = dict[Suite, list[str]]
"""Names of tests, by suite."""

_IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (
        ("NAME", "SWE AI Fleet"),
        ("EMAIL", "fleet@fleet.invalid"),
        ("DATE", "@0 +0000"),
    )
}


class AcceptanceTests(AcceptanceStub):
    """Runs the tests of stories' acceptance criteria."""

    def __init__(
        self,
        repositories: Mapping[str, Repository],
        stores: Stores,
        trees: Trees,
        prepared: Path,
        sandbox: Sandbox,
    ) -> None:
        """Set the folders.

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
    async def test_criteria(self, query: AcceptanceQuery) -> AcceptanceRuns:
        entry = find_repository(self._repositories, query.repository.key)
        entry = query.repository.model_copy(update={"url": entry.url})
        query = query.model_copy(update={"repository": entry})
        store = await self._stores.of(entry, query.base, query.commit)
        kept = KeptBlob(store, kept_ref(query), AcceptanceRuns)
        found = await kept.read()
        if found is None:
            await known_commit(store, query.base)
            with sandbox_errors():
                found, complete = await self._found(query, store)
            if complete:
                await kept.keep(found)
        return found

    async def _found(self, query: AcceptanceQuery, store: Store) -> tuple[AcceptanceRuns, bool]:
        """Return what ran, and whether all of it ran to its end."""
        globs = query.repository.test_paths
        changed = [
            file.old_path or file.path
            for file in await store.changed(query.base, query.commit)
            if file.status != "added" and matches(file.old_path or file.path, globs)
        ]
        runs = AcceptanceRuns(base=query.base, commit=query.commit, changed_tests=changed)
        after = await self._run(query.repository, store, query.commit)
        if not _tests_named(after, query.criteria):
            nothing = runs.model_copy(update={"not_run": _not_run({"the branch": after})})
            return nothing, _ended(after)
        laid = await laid_over(store, query.base, query.commit, globs)
        before = await self._run(query.repository, store, laid)
        complete = _ended(before) and _ended(after)
        flaky = await self._flaky(query, store, after)
        if any(flaky.values()):
            # What may fail without cause has to fail twice on the base.
            once_more = await self._run(query.repository, store, laid)
            before = _with_passed(before, _passed(once_more, flaky))
            after = _with_passed(after, flaky)
        found = runs.model_copy(
            update={
                "tests": compared(before, after, query.criteria, flaky),
                "not_run": _not_run({"the branch": after, "the base": before}),
            }
        )
        return found, complete

    async def _flaky(self, query: AcceptanceQuery, store: Store, first: Runs) -> Names:
        """Return which of the criteria's tests fail on the branch, and pass in one more run."""
        failing = _failing(first, query.criteria)
        if not any(failing.values()):
            return {}
        return _passed(await self._run(query.repository, store, query.commit), failing)

    async def _run(self, repository: Repository, store: Store, commit: str) -> Runs:
        async with self._trees.at(store, commit, key=f"measured/{commit}") as tree:
            try:
                prepared = await prepare(repository, tree, self._prepared, sandbox=self._sandbox)
            except PreparationFailed as failed:
                return {"unit": Tested(Step(not_measured=str(failed)))}
            return await run_suites(repository, tree, prepared=prepared, sandbox=self._sandbox)


def kept_ref(query: AcceptanceQuery) -> str:
    """Return the ref of a query's result, beside the story's other results."""
    fields = query.model_dump(mode="json", exclude={"repository", "commit"})
    entry = query.repository.model_dump(mode="json", include={*DECIDING, "test_paths"})
    asked = content_hash([fields, entry])
    return f"refs/fleet-results/{ref_part(query.story_id)}/acceptance/{query.commit}-{asked}"


def compared(
    before: Runs, after: Runs, criteria: int, flaky: Mapping[Suite, list[str]]
) -> list[AcceptanceTest]:
    """Return the tests that name a criterion, with both outcomes; of a criterion the first few.

    Args:
        before: of the base with the branch's tests.
        after: of the branch.
        criteria: how many there are.
        flaky: the tests that passed on the branch only when they were run once more.
    """
    tests = [
        test.model_copy(update={"flaky": test.name in flaky.get(suite, [])})
        for suite in SUITES
        for test in _of_suite(suite, _found(before, suite), _found(after, suite), criteria)
    ]
    kept = {
        (test.suite, test.name): test
        for number in range(1, criteria + 1)
        for test in listed(test for test in tests if number in test.criteria)
    }
    return list(kept.values())


def _failing(runs: Runs, criteria: int) -> Names:
    """Return the failed tests that name a criterion."""
    return {
        suite: [name for name in tested.found.names("failed") if named(name, criteria)]
        for suite, tested in runs.items()
        if tested.found
    }


def _passed(runs: Runs, names: Names) -> Names:
    """Return the tests among `names` that passed."""
    return {
        suite: [
            name for name in names.get(suite, []) if tested.found.outcomes.get(name) == "passed"
        ]
        for suite, tested in runs.items()
        if tested.found
    }


def _with_passed(runs: Runs, names: Names) -> Runs:
    """Return runs in which the tests among `names` count as passed."""
    return {
        suite: replace(
            tested, found=tested.found and tested.found.with_passed(names.get(suite, []))
        )
        for suite, tested in runs.items()
    }


def _found(runs: Runs, suite: Suite) -> Outcomes | None:
    return runs[suite].found if suite in runs else None


def _of_suite(
    suite: Suite, before: Outcomes | None, after: Outcomes | None, criteria: int
) -> Iterator[AcceptanceTest]:
    was, now = (found.outcomes if found else None for found in (before, after))
    for name in {**(now or {}), **(was or {})}:
        if not (numbers := named(name, criteria)):
            continue
        first, failed_before = status(name, was, now)
        second, failed_after = status(name, now, was)
        yield AcceptanceTest(
            name=name,
            suite=suite,
            criteria=numbers,
            before=first,
            after=second,
            why=_message(after, failed_after or name) or _message(before, failed_before or name),
        )


def _message(found: Outcomes | None, name: str) -> str:
    return found.messages.get(name, "") if found else ""


def _ended(runs: Runs) -> bool:
    """Return whether no command was stopped at a limit."""
    return not any(tested.step.stopped for tested in runs.values())


def _tests_named(runs: Runs, criteria: int) -> bool:
    found = [tested.found for tested in runs.values() if tested.found]
    return any(named(name, criteria) for each in found for name in each.outcomes)


def _not_run(runs: Mapping[str, Runs]) -> list[str]:
    """Return why suites were not run, or not counted; one without a command is left out."""
    return [
        f"{suite} tests on {where}: {tested.step.not_measured}"
        for where, suites in runs.items()
        for suite, tested in suites.items()
        if tested.step.not_measured
    ]


async def laid_over(store: Store, base: str, head: str, globs: list[str]) -> str:
    """Return a commit of the base with the head's files that match the globs, and no others such.

    Args:
        store: has both commits.
        base: the commit to lay the files over.
        head: the commit that they are from.
        globs: of paths, such as those of tests.
    """
    with store_errors(), TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        await git("read-tree", base, git_dir=store.path, index=index)
        wanted = await _entries(store, head, globs)
        gone = (await _entries(store, base, globs)).keys() - wanted.keys()
        removed = [b"0 " + b"0" * 40 + b"\t" + path + b"\0" for path in sorted(gone)]
        lines = b"".join([*removed, *(entry + b"\0" for entry in wanted.values())])
        await git(
            "update-index", "-z", "--index-info", git_dir=store.path, index=index, stdin=lines
        )
        tree = (await git("write-tree", git_dir=store.path, index=index)).decode().strip()
        message = f"Tests of {head} on {base}\n".encode()
        made = await git(
            *("commit-tree", tree, "-p", base, "-F", "-"),
            git_dir=store.path,
            stdin=message,
            env=_IDENTITY,
        )
    return made.decode().strip()


async def _entries(store: Store, commit: str, globs: list[str]) -> dict[bytes, bytes]:
    """Return path -> mode, type, object and path, as git lists them, of files that match."""
    listing = await git("ls-tree", "-r", "-z", commit, git_dir=store.path)
    entries = {each.partition(b"\t")[2]: each for each in listing.split(b"\0") if each}
    return {p: each for p, each in entries.items() if matches(os.fsdecode(p), globs)}
