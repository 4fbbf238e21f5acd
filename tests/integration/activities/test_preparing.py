"""Prepared dependencies: made once, read-only, and made again when a lock file changes."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from activities.workspace.preparing import PreparationFailed, prepare
from activities.workspace.sandbox import run_in_project
from activities.workspace.toolchains import toolchain
from tests.support.polling import until
from workflows.models.workspace import Limits, Repository

REPOSITORY = Repository(
    key="shop",
    url="file:///shop.git",
    setup="echo 'WORD = 1' > $PACKAGES/greeting.py; mkdir .venv left; echo made > .venv/made",
    limits=Limits(seconds=60),
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "requirements.txt").write_text("greeting==1\n")
    (folder / "README.md").write_text("# Shop\n")
    return folder


def preparations(cache: Path) -> list[str]:
    return sorted(each.name for each in cache.iterdir() if each.is_dir())


async def test_commands_see_what_was_prepared_and_cannot_change_it(
    tree: Path, tmp_path: Path
) -> None:
    prepared = await prepare(REPOSITORY, tree, tmp_path / "cache")

    done = await run_in_project(
        "cat .venv/made; PYTHONPATH=$PACKAGES python -c 'import greeting; print(greeting.WORD)'; "
        "ls; rm -f .venv/made $PACKAGES/greeting.py",
        tree,
        limits=REPOSITORY.limits,
        toolchain=toolchain("python"),
        prepared=prepared,
    )

    assert done.output.startswith("made\n1\nREADME.md\nrequirements.txt\n")
    assert done.output.count("Read-only file system") == 2


async def test_only_a_changed_lock_file_or_command_prepares_again(
    tree: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first = await prepare(REPOSITORY, tree, cache)
    (tree / "README.md").write_text("# Other\n")
    same = await prepare(REPOSITORY, tree, cache)
    (tree / "requirements.txt").write_text("greeting==2\n")
    changed = await prepare(REPOSITORY, tree, cache)
    other = await prepare(REPOSITORY.model_copy(update={"setup": "true"}), tree, cache)

    assert first == same
    assert len({first, changed, other}) == 3
    assert len(preparations(cache)) == 3


async def test_workers_that_share_a_cache_prepare_once(tree: Path, tmp_path: Path) -> None:
    counting = REPOSITORY.model_copy(
        update={"setup": "python -c 'import uuid; print(uuid.uuid4())' > $PACKAGES/id"}
    )

    made = await asyncio.gather(*(prepare(counting, tree, tmp_path / "cache") for _ in range(3)))

    assert len(set(made)) == 1
    assert len(preparations(tmp_path / "cache")) == 1


async def test_without_a_set_up_command_nothing_is_prepared(tree: Path, tmp_path: Path) -> None:
    bare = REPOSITORY.model_copy(update={"setup": ""})

    assert await prepare(bare, tree, tmp_path / "cache") is None


async def test_a_set_up_that_fails_shows_its_output_and_is_tried_again(
    tree: Path, tmp_path: Path
) -> None:
    failing = REPOSITORY.model_copy(update={"setup": "echo no such package; exit 3"})

    for _ in range(2):
        with pytest.raises(PreparationFailed, match="exit code 3: no such package"):
            await prepare(failing, tree, tmp_path / "cache")

    assert preparations(tmp_path / "cache") == []


async def test_a_set_up_that_does_not_end_is_stopped(tree: Path, tmp_path: Path) -> None:
    endless = REPOSITORY.model_copy(update={"setup": "sleep 600", "limits": Limits(seconds=10)})

    with pytest.raises(PreparationFailed, match="ran for more than 10 s"):
        await prepare(endless, tree, tmp_path / "cache")


async def test_a_set_up_that_is_cancelled_leaves_nothing(tree: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    running = asyncio.create_task(
        prepare(REPOSITORY.model_copy(update={"setup": "sleep 600"}), tree, cache)
    )
    await until(lambda: preparations(cache))

    running.cancel()

    await asyncio.wait([running], timeout=60)
    assert running.cancelled()
    assert preparations(cache) == []


async def test_the_cache_keeps_what_was_used_last(tree: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    old = await prepare(REPOSITORY, tree, cache)
    recent = await prepare(
        REPOSITORY.model_copy(update={"setup": "echo > $PACKAGES/x"}), tree, cache
    )
    assert old is not None
    assert recent is not None
    os.utime(old, (1, 1))

    last = await prepare(
        REPOSITORY.model_copy(update={"setup": "echo > $PACKAGES/y"}), tree, cache, cache_bytes=1
    )

    assert last is not None
    assert preparations(cache) == sorted([recent.name, last.name])  # one may still be in use


async def test_links_in_place_of_lock_files_are_not_read(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cr3t")
    before = await prepare(REPOSITORY, tree, tmp_path / "cache")
    (tree / "uv.lock").symlink_to(tmp_path / "secret")
    subprocess.run(["mkfifo", tree / "go.sum"], check=True)  # noqa: ASYNC221  it is at once

    assert await prepare(REPOSITORY, tree, tmp_path / "cache") == before


def make_wheel(folder: Path) -> None:
    """Make the wheel of a package `greeting`, with a program."""
    about = "greeting-1.0.dist-info"
    files = {
        "greeting.py": "def main() -> None:\n    print('hello')\n",
        f"{about}/METADATA": "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/entry_points.txt": "[console_scripts]\ngreet = greeting:main\n",
    }
    record = "".join(f"{name},,\n" for name in (*files, f"{about}/RECORD"))
    folder.mkdir()
    with ZipFile(folder / "greeting-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in (files | {f"{about}/RECORD": record}).items():
            wheel.writestr(name, content)


async def test_uv_sync_prepares_what_the_lock_of_a_project_names(
    tree: Path, tmp_path: Path
) -> None:
    make_wheel(tree / "wheels")
    (tree / "pyproject.toml").write_text(
        '[project]\nname = "shop"\nversion = "1"\nrequires-python = ">=3.11"\n'
        'dependencies = ["greeting"]\n'
        '[tool.uv.sources]\ngreeting = { path = "wheels/greeting-1.0-py3-none-any.whl" }\n'
    )
    lock = [f"{sys.prefix}/bin/uv", "lock", "--offline", "--quiet", "--no-config"]
    subprocess.run(lock, cwd=tree, check=True)  # noqa: ASYNC221  it is at once
    repository = REPOSITORY.model_copy(update={"setup": "uv sync --frozen --quiet"})

    prepared = await prepare(repository, tree, tmp_path / "cache")
    done = await run_in_project(
        "greet && uv run greet && touch .venv/x",
        tree,
        limits=repository.limits,
        toolchain=toolchain("python"),
        prepared=prepared,
    )

    assert done.output.startswith("hello\nhello\n")
    assert "Read-only file system" in done.output
