"""`fleet diff`, `log`, `checkout` and `rebase` on the branch of a story, in a real store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from temporalio.client import Client

from tests.support.branches import README, committing_councils
from tests.support.fleet import Environment
from tests.support.fleet_cli import done, refused
from tests.support.git_server import GitServer, credentials
from tests.support.projects import plain_git
from tests.support.repositories import in_store
from tests.support.servers import RunningServer
from tests.unit.conftest import RunningStory, StartStory, World
from tests.unit.workflows.test_story_branch import Repo, to_gate
from workflows.models.story import StoryView


@pytest.fixture
def repo(world: World, tmp_path: Path) -> Repo:
    return Repo(world, tmp_path)


@pytest.fixture
async def start(fleet: Client, world: World, repo: Repo) -> AsyncIterator[StartStory]:
    async with committing_councils(fleet, world) as queue:
        yield StartStory(fleet, world, queue)


@pytest.fixture
async def story(start: StartStory) -> RunningStory:
    """Return a story whose plan was merged into its branch."""
    story = await start(repository="sample")
    await to_gate(story, "qa_passed")
    return story


@pytest.fixture
def shell(temporal: RunningServer, repo: Repo) -> Environment:
    """Return the variables of a person's shell."""
    return {
        "TEMPORAL_ADDRESS": temporal.address,
        "WORKSPACE_STORE": str(repo.store.parent),
        "COLUMNS": "200",
    }


async def head_of(story: RunningStory) -> str:
    view: StoryView = await story.state()
    assert view.branch is not None
    return view.branch.head


async def test_diff_shows_the_branch_or_one_task(story: RunningStory, shell: Environment) -> None:
    whole = (await done(shell, "diff", story.story_id)).out
    task = f"{story.story_id}-plan-1-t2"
    part = (await done(shell, "diff", story.story_id, "--task", task)).out
    change = (await done(shell, "diff", story.story_id, "--json")).json
    stat = (await done(shell, "diff", story.story_id, "--stat")).out

    assert "+    return left + right\n" in whole
    assert "+## Use\n" in whole
    assert "+## Use\n" in part
    assert "left + right" not in part
    assert change["commit"] == await head_of(story)
    assert [file["path"] for file in change["files"]] == ["README.md", "adder/__init__.py"]
    assert (change["insertions"], change["deletions"]) == (5, 1)
    assert stat.splitlines()[-1] == "2 files changed, 5 insertions(+), 1 deletion(-)"


async def test_a_diff_can_be_applied(
    story: RunningStory, shell: Environment, repo: Repo, tmp_path: Path
) -> None:
    patch = (await done(shell, "diff", story.story_id)).out

    (tmp_path / "patch").write_text(patch)
    in_store(repo.origin / ".git", "-C", str(repo.origin), "apply", str(tmp_path / "patch"))

    assert (repo.origin / "README.md").read_text() == README["README.md"]


async def test_log_lists_the_commits_of_the_branch(
    story: RunningStory, shell: Environment, repo: Repo
) -> None:
    shown = (await done(shell, "log", story.story_id)).out
    commits = (await done(shell, "log", story.story_id, "--json")).json

    assert (await head_of(story))[:12] in shown
    assert [each["subject"] for each in commits] == ["Test it", "Build it"]
    assert commits[0]["trailers"]["Task"] == f"{story.story_id}-plan-1-t2"
    assert repo.base not in {each["commit"] for each in commits}


async def test_rebase_merges_the_base(story: RunningStory, shell: Environment, repo: Repo) -> None:
    why = await refused(shell, "rebase", story.story_id, "--role", "PO", "--actor", "ana")
    assert "there is nothing to merge" in why
    plain_git("commit", "--quiet", "--allow-empty", "-m", "Change main", cwd=repo.origin)

    await done(shell, "rebase", story.story_id, "--role", "PO", "--actor", "ana")

    base = repo.at(repo.origin / ".git", "main")
    assert in_store(repo.store, "merge-base", base, await head_of(story)) == base


async def test_checkout_clones_the_branch(
    story: RunningStory, shell: Environment, tmp_path: Path
) -> None:
    folder = tmp_path / "clone"

    await done(shell, "checkout", story.story_id, str(folder))

    assert (folder / "README.md").read_text() == README["README.md"]
    assert in_store(folder / ".git", "rev-parse", "HEAD") == await head_of(story)


async def test_checkout_leaves_a_folder_with_files_alone(
    story: RunningStory, shell: Environment, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")

    why = await refused(shell, "checkout", story.story_id, str(tmp_path / "mine"))

    assert "is not an empty folder; name a new one" in why
    assert [each.name for each in (tmp_path / "mine").iterdir()] == ["notes.txt"]


async def test_an_unknown_task_is_refused_with_the_known_ones(
    story: RunningStory, shell: Environment
) -> None:
    why = await refused(shell, "diff", story.story_id, "--task", "T-9")

    assert "T-9 has no change" in why
    assert f"{story.story_id}-plan-1-t1" in why


async def test_a_store_elsewhere_is_named(
    story: RunningStory, shell: Environment, tmp_path: Path
) -> None:
    elsewhere = shell | {"WORKSPACE_STORE": str(tmp_path / "other")}

    assert "set WORKSPACE_STORE" in await refused(elsewhere, "log", story.story_id)


async def test_a_branch_on_a_git_server_is_shown_too(
    story: RunningStory, shell: Environment, repo: Repo, tmp_path: Path
) -> None:
    with GitServer(repo.store.parent).serving() as server:
        elsewhere = shell | {
            "WORKSPACE_STORE": server.url,
            "REPOSITORY_CREDENTIALS": str(credentials(tmp_path / "credentials")),
            "WORKSPACE_TREES": str(tmp_path / "trees"),
        }
        change = (await done(elsewhere, "diff", story.story_id, "--json")).json
        commits = (await done(elsewhere, "log", story.story_id, "--json")).json
        await done(elsewhere, "checkout", story.story_id, str(tmp_path / "there"))

        server.away = True
        why = await refused(elsewhere, "log", story.story_id)

    assert change["commit"] == await head_of(story)
    assert commits
    assert (tmp_path / "there" / "README.md").exists()
    assert "the store's git server does not answer; check WORKSPACE_STORE" in why


async def test_a_place_of_the_store_with_a_password_in_it_is_refused(shell: Environment) -> None:
    with_password = shell | {"WORKSPACE_STORE": "https://ana:secret@git.example.org/fleet"}

    why = await refused(with_password, "log", "US-1")

    assert "WORKSPACE_STORE" in why
    assert "a URL has no credentials" in why


async def test_a_story_without_a_repository_has_no_diff(
    start_story: StartStory, shell: Environment
) -> None:
    story = await start_story()
    await story.until(gate="approve_scope")

    for words in (["diff"], ["log"]):
        assert "has no repository" in await refused(shell, *words, story.story_id)


async def test_a_branch_that_does_not_exist_yet_is_refused(
    start: StartStory, shell: Environment
) -> None:
    story = await start(repository="sample")
    await story.until(gate="approve_scope")

    assert "created when the scope is approved" in await refused(shell, "log", story.story_id)
