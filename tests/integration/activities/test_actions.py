"""Actions on real commits: what is committed, what is undone, and that none runs twice."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from temporalio.exceptions import ApplicationError

from activities.checks.sandbox import Sandbox
from activities.workspace import actions as module
from activities.workspace.actions import Actions
from activities.workspace.kept_results import KeptResult, KeptResults
from activities.workspace.refs import Move
from activities.workspace.stores import Stores
from activities.workspace.trees import Trees
from tests.support.projects import plain_git
from tests.support.repositories import PROJECT, in_store, make_repository
from workflows.models.implementation import (
    Action,
    ActionResult,
    ReplaceText,
    RunActionInput,
    RunCommand,
    WriteFile,
)
from workflows.models.workspace import Limits, Repository, Trailers

UNIQUE = RunCommand(command="head -c 16 /dev/urandom | od -x > stamp.txt; cat stamp.txt")
"""A command that has another effect each time it runs."""


@dataclass
class Bench:
    """A repository, its store, and one agent's steps."""

    repository: Repository
    store: Path
    actions: Actions
    base: str

    async def do(
        self, action: Action, parent: str = "", step: int = 1, **fields: Any
    ) -> ActionResult:
        return await self.actions.carry_out(self.request(action, parent, step, **fields))

    def request(
        self, action: Action, parent: str = "", step: int = 1, **fields: Any
    ) -> RunActionInput:
        return RunActionInput(
            repository=self.repository,
            base=self.base,
            parent=parent or self.base,
            action=action,
            trailers=Trailers(story="US-1", task="T-1", agent="agent-dev-1", step=step),
            at=datetime(2026, 3, 1, 12, 0, step, tzinfo=UTC),
            **fields,
        )

    @property
    def head(self) -> str:
        return in_store(self.store, "rev-parse", "refs/fleet/US-1/T-1/agent-dev-1")

    def text(self, commit: str, path: str) -> str:
        return in_store(self.store, "show", f"{commit}:{path}")


@pytest.fixture
async def bench(tmp_path: Path) -> Bench:
    return await make_bench(tmp_path, PROJECT)


async def make_bench(tmp_path: Path, files: dict[str, str]) -> Bench:
    url = make_repository(tmp_path / "adder", files)
    repository = Repository(key="adder", url=url, limits=Limits(seconds=30))
    (tmp_path / "store").mkdir()
    stores = Stores(tmp_path / "store")
    trees = Trees(tmp_path / "trees", 10**9)
    actions = Actions(stores, trees, tmp_path / "prepared", Sandbox())
    base = await (await stores.of(repository)).base_commit()
    return Bench(repository, tmp_path / "store" / "adder.git", actions, base)


async def test_each_step_that_changes_a_file_is_a_commit_on_the_agents_ref(bench: Bench) -> None:
    first = await bench.do(WriteFile(path="docs/a.md", content="one\n"))
    second = await bench.do(RunCommand(command="cat docs/a.md"), first.commit, step=2)
    third = await bench.do(
        ReplaceText(path="docs/a.md", old="one", new="two"), second.commit, step=3
    )

    assert (second.commit, second.exit_code, second.observation) == (first.commit, 0, "one\n")
    assert bench.head == third.commit
    log = in_store(bench.store, "log", "--format=%s|%ct", f"{bench.base}..{third.commit}")
    assert log.split("\n") == [
        "replace in docs/a.md: one -> two|1772366403",
        "write docs/a.md (4 characters)|1772366401",
    ]
    assert [(file.path, file.insertions) for file in third.changed] == [("docs/a.md", 1)]


async def test_an_action_that_was_committed_is_not_run_again(bench: Bench) -> None:
    first = await bench.do(UNIQUE)

    assert await bench.do(UNIQUE) == first
    assert bench.head == first.commit
    assert bench.text(first.commit, "stamp.txt") == first.observation.strip()


async def test_an_action_is_not_run_again_when_its_refs_and_objects_were_packed(
    bench: Bench,
) -> None:
    first = await bench.do(WriteFile(path="a.md", content="x"))
    second = await bench.do(UNIQUE, first.commit, step=2)
    in_store(bench.store, "gc", "--quiet")
    assert not [each for each in (bench.store / "refs").rglob("*") if each.is_file()]

    assert await bench.do(UNIQUE, first.commit, step=2) == second

    third = await bench.do(UNIQUE, second.commit, step=3)
    assert bench.head == third.commit != second.commit


async def test_a_step_starts_few_processes_of_git(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes milliseconds, and a step that follows another needs no comparison first."""
    started: list[str] = []
    start = asyncio.create_subprocess_exec

    async def counted(*command: Any, **options: Any) -> asyncio.subprocess.Process:
        if command[0] == "git":
            started.append(command[2])
        return await start(*command, **options)

    first = await bench.do(WriteFile(path="a.md", content="x"))
    second = await bench.do(WriteFile(path="b.md", content="x"), first.commit, step=2)
    monkeypatch.setattr(asyncio, "create_subprocess_exec", counted)

    looked = await bench.do(RunCommand(command="ls"), second.commit, step=3)
    looking = started.copy()
    started.clear()
    await bench.do(RunCommand(command="echo y > b.md"), looked.commit, step=4)

    stored = ["hash-object", "update-ref"]
    assert looking == ["ls-files", *stored]
    committed = ["ls-files", "add", "write-tree", "commit-tree", "ls-tree", "diff-tree"]
    assert started == [*committed, *stored]


async def test_an_action_whose_worker_died_before_the_ref_moved_is_not_run_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await bench.do(WriteFile(path="a.md", content="x"))

    async def dies(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(module, "next_step", lambda *_: None)
        patch.setattr(module, "move_agent", dies)
        with pytest.raises(RuntimeError, match="killed"):
            await bench.do(UNIQUE, first.commit, step=2)
    assert bench.head == first.commit
    request = bench.request(UNIQUE, first.commit, step=2)
    store = await Stores(bench.store.parent).of(bench.repository)
    left = await KeptResults(store, request.trailers).read()

    second = await bench.actions.carry_out(request)

    assert left
    assert second == left.result
    assert bench.head == second.commit


async def test_an_action_that_was_not_committed_runs_again_on_its_parent(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dies(*_: Any) -> None:
        raise RuntimeError("killed")

    action = RunCommand(command="echo x >> log.txt")
    with monkeypatch.context() as patch:
        patch.setattr(KeptResults, "keep", dies)
        with pytest.raises(RuntimeError, match="killed"):
            await bench.do(action)

    done = await bench.do(action)

    assert bench.text(done.commit, "log.txt") == "x"


async def test_of_two_attempts_at_once_one_counts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that was given up ends after another one has begun and ended."""
    keep = KeptResults.keep
    first: list[ActionResult] = []

    async def late(
        results: KeptResults, made: KeptResult, step: Move | None
    ) -> tuple[KeptResult, bool]:
        monkeypatch.setattr(KeptResults, "keep", keep)
        first.append(await bench.do(UNIQUE))
        return await keep(results, made, step)

    monkeypatch.setattr(KeptResults, "keep", late)
    second = await bench.do(UNIQUE)

    assert [second] == first
    assert bench.head == second.commit


async def test_an_attempt_that_ends_after_the_next_step_changes_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = KeptResults.keep
    next_step: list[ActionResult] = []

    async def late(
        results: KeptResults, made: KeptResult, step: Move | None
    ) -> tuple[KeptResult, bool]:
        monkeypatch.setattr(KeptResults, "keep", keep)
        first = await bench.do(UNIQUE)
        next_step.append(await bench.do(WriteFile(path="a.md", content="x"), first.commit, step=2))
        return await keep(results, made, step)

    monkeypatch.setattr(KeptResults, "keep", late)
    with pytest.raises(ApplicationError, match="the ref has moved"):
        await bench.do(UNIQUE)

    assert bench.head == next_step[0].commit


async def test_after_a_reset_the_agents_ref_moves_to_the_new_work(bench: Bench) -> None:
    old = await bench.do(WriteFile(path="a.md", content="old"))
    await bench.do(WriteFile(path="b.md", content="old"), old.commit, step=2)

    new = await bench.do(WriteFile(path="a.md", content="new"))

    assert bench.head == new.commit
    assert [file.path for file in new.changed] == ["a.md"]


async def test_the_same_steps_make_the_same_commits(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Actions(
        Stores(tmp_path / "other"), Trees(tmp_path / "t2", 10**9), tmp_path / "p2", Sandbox()
    )
    commits = []
    for actions in (bench.actions, other):
        first = await actions.carry_out(bench.request(WriteFile(path="a.md", content="x")))
        run = RunCommand(command="chmod +x a.md; ln -s a.md link; mkdir -p d && touch d/e")
        commits.append((await actions.carry_out(bench.request(run, first.commit, 2))).commit)

    assert commits[0] == commits[1]
    assert "120000 blob" in in_store(bench.store, "ls-tree", commits[0], "link")


@pytest.mark.parametrize(
    "command",
    [
        "echo x >> README.md",
        "rm -r adder",
        "mv adder other",
        "rm -r adder && ln -s /etc adder",
        "rm README.md && mkdir README.md && echo x > README.md/x",
        "chmod +x README.md",
        "mkdir -p .github/workflows && echo x > .github/workflows/ci.yml",
    ],
)
async def test_what_a_command_does_to_other_paths_is_undone(bench: Bench, command: str) -> None:
    done = await bench.do(
        RunCommand(command=f"mkdir docs && echo y > docs/a.md; {command}"), paths=["docs/**"]
    )

    assert [file.path for file in done.changed] == ["docs/a.md"]
    assert "[these changes are undone]" in done.observation
    assert bench.text(done.commit, "README.md").startswith("# Adder")


@pytest.mark.parametrize("path", ["setup.py", "../x", "/etc/passwd", ".git/config", "docs/../x"])
async def test_an_edit_of_another_path_changes_nothing(bench: Bench, path: str) -> None:
    done = await bench.do(WriteFile(path=path, content="x"), paths=["docs/**"])

    assert done.commit == bench.base
    assert done.observation.startswith("nothing was changed: ")


async def test_a_file_of_the_base_may_be_edited_whatever_its_name(tmp_path: Path) -> None:
    names = ["aux.py", "what: x.md", "docs/a.md", "docs/A.md", "docs/b\\c"]
    bench = await make_bench(tmp_path, dict.fromkeys(names, "old\n") | {"src/aux.py": "old\n"})
    commit = bench.base
    for step, name in enumerate(names, start=1):
        edit = ReplaceText(path=name, old="old", new="new")
        commit = (await bench.do(edit, commit, step, paths=["*", "docs/**"])).commit

    refused = await bench.do(
        WriteFile(path="src/aux.py", content="x"), commit, 6, paths=["*", "docs/**"]
    )

    assert [bench.text(commit, name) for name in names] == ["new"] * 5
    assert "the story may change only *, docs/**" in refused.observation


async def test_a_file_that_an_agent_writes_is_stored_even_if_git_ignores_it(bench: Bench) -> None:
    ran = await bench.do(RunCommand(command="mkdir .venv; echo x > .venv/a; echo x > a.pyc"))
    first = await bench.do(WriteFile(path="__pycache__/notes.md", content="one\n"))
    second = await bench.do(WriteFile(path=".coverage", content="x\n"), first.commit, step=2)
    third = await bench.do(
        ReplaceText(path="__pycache__/notes.md", old="one", new="two"), second.commit, step=3
    )
    same = await bench.do(WriteFile(path=".coverage", content="x\n"), third.commit, step=4)

    assert ran.commit == bench.base
    assert [file.path for file in third.changed] == [".coverage", "__pycache__/notes.md"]
    assert bench.text(third.commit, "__pycache__/notes.md") == "two"
    assert same.commit == third.commit


async def test_two_spellings_of_one_path_do_not_meet(bench: Bench) -> None:
    edited = await bench.do(WriteFile(path="readme.MD", content="x"))
    ran = await bench.do(RunCommand(command="echo x > Readme.md; ln -s /etc link"), step=2)
    linked = await bench.do(WriteFile(path="link/x", content="x"), ran.commit, step=3)

    assert edited.commit == bench.base
    assert "one file on some systems" in edited.observation
    assert [file.path for file in ran.changed] == ["link"]
    assert "one file on some systems" in ran.observation
    assert linked.commit == ran.commit
    assert "symbolic link" in linked.observation


async def test_what_was_undone_once_is_undone_again(bench: Bench) -> None:
    command = RunCommand(command="echo x >> README.md; echo y >> setup.py; echo z >> docs.md")

    first = await bench.do(command, paths=["docs.md"])
    again = await bench.do(command, first.commit, step=2, paths=["docs.md"])
    only = RunCommand(command="echo x >> README.md; cat README.md")
    third = await bench.do(only, again.commit, step=3, paths=["docs.md"])
    last = await bench.do(only, again.commit, step=4, paths=["docs.md"])

    assert bench.text(again.commit, "docs.md") == "z\nz"
    assert again.observation == first.observation
    assert third.commit == last.commit == again.commit
    assert third.observation == last.observation
    assert last.observation.startswith("# Adder\n\nAdds numbers.\nx\n")
    assert "[these changes are undone]\nREADME.md: " in last.observation


async def test_by_default_the_configuration_of_ci_and_git_may_not_be_changed(
    bench: Bench,
) -> None:
    done = await bench.do(WriteFile(path=".github/workflows/ci.yml", content="x"))
    free = await bench.do(WriteFile(path="anything/else.txt", content="x"))

    assert done.commit == bench.base
    assert free.commit != bench.base


async def test_a_command_that_is_stopped_changes_nothing(bench: Bench) -> None:
    bench.repository = bench.repository.model_copy(update={"limits": Limits(seconds=10)})

    done = await bench.do(RunCommand(command="echo x > README.md; echo begun; sleep 99"))

    assert (done.commit, done.exit_code) == (bench.base, None)
    assert done.stopped
    assert done.observation.startswith("begun\n")
    assert "its changes are undone" in done.observation


async def test_a_tree_of_an_earlier_step_is_not_mixed_with_another(bench: Bench) -> None:
    """Steps of two branches of work in random order, as after a reset."""
    choose = random.Random(7)
    heads = dict.fromkeys("abc", bench.base)
    for number in range(1, 10):
        name = choose.choice("abc")
        done = await bench.do(
            RunCommand(command=f"echo {number} >> {name}.txt; ls *.txt"), heads[name], number
        )
        assert done.observation == f"{name}.txt\n"
        heads[name] = done.commit


@pytest.mark.parametrize(
    "command",
    [
        "git init -q docs/a",
        "head -c 60000000 /dev/zero > docs/large",
        "cd docs && for n in $(seq 5001); do echo $n > f$n; done",
        r"touch '.git\x'",
        r"touch 'docs/a\git~1'",
        "ln -s a .gitmodules",
        f"cd docs && for n in $(seq 20); do mkdir {'d' * 200} && cd {'d' * 200}; done; "
        f"touch {'f' * 60}",
    ],
)
async def test_what_the_store_refuses_is_undone_and_reported(bench: Bench, command: str) -> None:
    done = await bench.do(RunCommand(command=f"mkdir docs && {command}"))

    next_one = await bench.do(RunCommand(command="ls -A"), step=2)

    assert (done.commit, done.exit_code) == (bench.base, 0)
    assert "[all changes are undone: " in done.observation
    assert next_one.observation == ".gitignore\nREADME.md\nadder\ntests\n"


@pytest.mark.parametrize(
    "command",
    [
        "mkfifo docs/.gitignore docs/.gitattributes docs/pipe",
        "mkfifo .gitattributes; rm .gitignore; mkfifo .gitignore; rm README.md; mkfifo README.md",
    ],
)
async def test_pipes_are_not_stored_and_stop_nothing(bench: Bench, command: str) -> None:
    action = RunCommand(command=f"mkdir docs; echo x > docs/a.md; {command}")

    done = await bench.do(action, paths=["docs/**"])
    await bench.do(RunCommand(command=f"{command}; exec sleep 60"), step=2, paths=["docs/**"])
    next_one = await bench.do(RunCommand(command="ls -A . docs"), done.commit, step=3)

    assert [file.path for file in done.changed] == ["docs/a.md"]
    assert next_one.observation.split() == [
        *(".:", ".gitignore", "README.md", "adder", "docs", "tests"),
        *("docs:", "a.md"),
    ]


@pytest.mark.parametrize(
    "name", ["docs/con.txt", "docs/a:b", "docs/e\u0301.md", "docs/caf\\351", "docs/x\u200b"]
)
async def test_a_name_that_some_system_cannot_have_is_undone(bench: Bench, name: str) -> None:
    command = f"mkdir docs && echo y > docs/a.md && echo x > \"$(printf '{name}')\""

    done = await bench.do(RunCommand(command=command), paths=["docs/**"])

    assert [file.path for file in done.changed] == ["docs/a.md"]
    assert "[these changes are undone]" in done.observation


async def test_a_renamed_file_that_may_not_go_stays(bench: Bench) -> None:
    command = "mkdir docs && mv README.md docs/README.md"

    done = await bench.do(RunCommand(command=command), paths=["docs/**"])

    assert [(file.path, file.status) for file in done.changed] == [("docs/README.md", "added")]
    assert bench.text(done.commit, "README.md").startswith("# Adder")


@pytest.mark.parametrize("more", ["", "; echo more >> readme.md"])
async def test_a_file_whose_move_is_undone_is_where_it_was(bench: Bench, more: str) -> None:
    done = await bench.do(RunCommand(command=f"mv README.md readme.md{more}; echo x > a.md"))
    moved = await bench.do(RunCommand(command="mv a.md b.txt"), done.commit, 2, paths=["*.md"])

    assert [file.path for file in done.changed] == ["a.md"]
    assert "readme.md: 'readme.md' and 'README.md' are one file" in done.observation
    assert "README.md: its move to readme.md is undone" in done.observation
    assert moved.commit == done.commit


@pytest.mark.parametrize(
    "command",
    [
        "rmdir vendor/sub",
        "rm -r vendor",
        "rmdir vendor/sub && echo x > vendor/sub",
        "cd vendor/sub && git init -q && touch x && git add x"
        " && git -c user.name=a -c user.email=b commit -qm x",
    ],
)
async def test_a_submodule_stays_as_it_is(tmp_path: Path, command: str) -> None:
    bench = await make_bench(tmp_path, PROJECT)
    linked = f"160000,{'1' * 40},vendor/sub"
    plain_git("update-index", "--add", "--cacheinfo", linked, cwd=tmp_path / "adder")
    plain_git("commit", "--quiet", "--message", "Add a submodule", cwd=tmp_path / "adder")
    bench.base = plain_git("rev-parse", "HEAD", cwd=tmp_path / "adder")
    await (await Stores(tmp_path / "store").of(bench.repository)).base_commit()

    done = await bench.do(RunCommand(command=f"echo x > a.md; {command}"))
    next_one = await bench.do(RunCommand(command="ls -A vendor/sub"), done.commit, step=2)

    assert [file.path for file in done.changed] == ["a.md"]
    assert "vendor/sub: it is a submodule, which stays as it is" in done.observation
    assert (next_one.exit_code, next_one.observation) == (0, "")


async def test_nothing_outside_of_a_tree_is_touched_when_changes_are_undone(tmp_path: Path) -> None:
    bench = await make_bench(tmp_path, PROJECT | {"lib/x/a.txt": "a\n"})
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.txt").write_text("secret\n")

    command = f"rm -r lib/x && ln -s {outside} lib/x"
    done = await bench.do(RunCommand(command=command), paths=["lib/*"])

    assert (outside / "a.txt").read_text() == "secret\n"
    assert bench.text(done.commit, "lib/x/a.txt") == "a"


async def test_a_set_up_that_fails_fails_the_first_command(bench: Bench) -> None:
    bench.repository = bench.repository.model_copy(update={"setup": "echo no packages; exit 3"})

    with pytest.raises(ApplicationError, match="set-up: it ended with exit code 3: no packages"):
        await bench.do(RunCommand(command="ls"))


async def test_a_set_up_that_the_agent_broke_is_what_it_reads_next(bench: Bench) -> None:
    bench.repository = bench.repository.model_copy(
        update={"setup": "grep -q good requirements.txt"}
    )
    first = await bench.do(WriteFile(path="requirements.txt", content="bad"))

    second = await bench.do(RunCommand(command="ls"), first.commit, step=2)
    third = await bench.do(WriteFile(path="requirements.txt", content="good"), first.commit, 3)
    fourth = await bench.do(RunCommand(command="ls"), third.commit, step=4)

    assert second.observation.startswith("the command was not run: set-up: ")
    assert (second.exit_code, second.commit) == (None, first.commit)
    assert fourth.exit_code == 0


async def test_actions_commands_trees_and_errors_of_the_store_are_counted(bench: Bench) -> None:
    def counted() -> list[float]:
        return [
            REGISTRY.get_sample_value(name, labels) or 0.0
            for name, labels in (
                ("fleet_workspace_actions_total", {"action": "run", "outcome": "failed"}),
                ("fleet_workspace_command_seconds_count", {"kind": "command"}),
                ("fleet_workspace_store_errors_total", {"type": "GitStoreAway"}),
            )
        ]

    before = counted()
    failing = RunCommand(command="exit 3")
    for _ in range(2):  # the result is kept, so the second one is not carried out
        await bench.do(failing)
    bench.store.parent.rename(bench.store.parent.with_name("away"))
    with pytest.raises(ApplicationError, match="the store"):
        await bench.do(failing, step=2)

    assert [now - then for now, then in zip(counted(), before, strict=True)] == [1, 1, 1]
    assert REGISTRY.get_sample_value("fleet_workspace_trees_bytes")
