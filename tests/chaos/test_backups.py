"""Backups of the stores: wiped and restored while stories go on, as docs/operations.md says."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from tests.chaos.conftest import TIME_LIMIT
from tests.support.llm_server import LlmServer
from tests.support.polling import until
from tests.support.site import SERVERS, WORKERS, Site
from workers.environment import ROOT
from workflows.search_attributes import STORY_STATE

pytestmark = TIME_LIMIT


@pytest.fixture(scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with (
        LlmServer() as engine,
        Site(tmp_path_factory.mktemp("site"), engine.url) as site,
    ):
        yield site


async def fleet(site: Site, *arguments: str) -> bool:
    """Run the CLI; return whether it succeeded. A store that has just started may be slow."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "workers.cli", *arguments),
        env=site.env | {"FLEET_HOME": str(site.home), "PATH": "/usr/bin:/bin"},
        cwd=ROOT,
    )
    return await process.wait() == 0


async def backed_up(site: Site, name: str, to: Path) -> None:
    """Copy a store's folder while the store is stopped."""
    await asyncio.to_thread(shutil.copytree, site.home / name, to / name)


async def restored(site: Site, name: str, backup: Path) -> None:
    """Wipe the folder of a store that is stopped, and copy the backup back."""
    await asyncio.to_thread(shutil.rmtree, site.home / name)
    await asyncio.to_thread(shutil.copytree, backup / name, site.home / name)


async def until_build(site: Site, story_id: str) -> None:
    """Wait until the story waits for its report."""
    await until(lambda: site.attribute(story_id, STORY_STATE), lambda state: state == "BUILD")


@pytest.mark.parametrize(
    ("store", "writers", "repair"),
    [
        ("neo4j", [], ["graph", "rebuild"]),
        ("nats", ["bridge"], ["mirror", "replay"]),  # else newer events are published first
        ("valkey", [], ["graph", "rebuild"]),
    ],
    ids=["neo4j", "nats", "valkey"],
)
async def test_a_store_restored_from_an_older_backup_is_brought_up_to_date(
    site: Site, tmp_path: Path, store: str, writers: list[str], repair: list[str]
) -> None:
    before, after = f"US-{store}-before", f"US-{store}-after"
    await site.begin(before)
    await until_build(site, before)
    await site.stop(store)
    await backed_up(site, store, tmp_path)
    await site.start(store)
    await site.begin(after)  # the backup does not know this story
    await until_build(site, after)

    await site.stop(*writers)
    await site.kill(store)
    await restored(site, store, tmp_path)
    await site.start(store)
    for story_id in (before, after):
        await until(partial(fleet, site, *repair, story_id))
    await site.start(*writers)

    assert [await site.finish(story_id) for story_id in (before, after)] == ["DONE", "DONE"]
    assert await site.differences(before, after) == []


async def test_all_stores_restored_from_one_backup_go_on_from_there(
    site: Site, tmp_path: Path
) -> None:
    await site.begin("US-all")
    await until_build(site, "US-all")
    await site.stop(*WORKERS)
    await site.stop(*SERVERS)
    for name in SERVERS:
        await backed_up(site, name, tmp_path)
    await site.start(*SERVERS)
    await site.start(*WORKERS)
    assert await site.finish("US-all") == "DONE"

    await site.kill(*WORKERS, *SERVERS)
    for name in SERVERS:
        await restored(site, name, tmp_path)
    await site.start(*SERVERS)
    await site.start(*WORKERS)

    assert await site.attribute("US-all", STORY_STATE) == "BUILD"
    assert await site.finish("US-all") == "DONE"
    assert await site.differences("US-all") == []
