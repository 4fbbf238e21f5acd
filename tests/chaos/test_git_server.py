"""A store on a git server: whatever machine is lost while an agent works, the commits stay."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator

import pytest

from tests.chaos.conftest import TIME_LIMIT
from tests.chaos.test_implementation import STEPS, last_failure, start, until_in_progress
from tests.support.checker import paid_twice
from tests.support.git_server import GitServer, credentials
from tests.support.llm_server import LlmServer
from tests.support.polling import until
from tests.support.repositories import config_with, in_store, make_repository
from tests.support.scripted_model import ScriptedModel
from tests.support.site import Site
from workflows.models.implementation import ImplementationResult

pytestmark = TIME_LIMIT

REF = "refs/fleet/no-story/T-1/agent-dev-1"


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[LlmServer]:
    async with LlmServer(delay_ms=300, window=32_768) as engine:
        engine.documents["next_action"] = ScriptedModel(STEPS)
        yield engine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> GitServer:
    return GitServer(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
async def site(
    engine: LlmServer, server: GitServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Site]:
    home = tmp_path_factory.mktemp("site")
    entry = {"url": make_repository(home / "adder"), "limits": {"steps": 8, "seconds": 120}}
    variables = {
        "FLEET_CONFIG": str(config_with(home / "config", adder=entry)),
        "WORKSPACE_STORE": server.url,
        "WORKSPACE_TREES": str(home / "trees"),
        "REPOSITORY_CREDENTIALS": str(credentials(home / "credentials")),
    }
    server.make("adder")
    with server.serving():
        workers = ("story", "agents", "context", "bridge", "workspace")
        async with Site(home, engine.url, workers=workers, more=variables) as site:
            yield site


async def lose_machine(site: Site) -> None:
    """Kill the worker, remove all that its machine has, and start another."""
    await site.kill("workspace")
    shutil.rmtree(site.home / "trees")
    await site.start("workspace")


async def test_a_machine_that_is_lost_in_any_step_and_a_server_that_is_away_change_no_commit(
    site: Site, server: GitServer, engine: LlmServer
) -> None:
    undisturbed: ImplementationResult = await site.patient((await start(site)).result)
    assert undisturbed.ended_by == "finish"
    store = server.root / "adder.git"
    in_store(store, "update-ref", "-d", REF)
    engine.calls.clear()

    handle = await start(site)
    for step in (1, 2, 3):
        await until_in_progress(site, "run_action", step)
        await lose_machine(site)
    server.away = True
    await until(lambda: last_failure(site), lambda failure: "git server" in failure)
    server.away = False
    await until_in_progress(site, "run_action", 5)
    await lose_machine(site)
    result: ImplementationResult = await site.patient(handle.result)

    assert result.commit == undisturbed.commit
    assert result.transcript_digest == undisturbed.transcript_digest
    assert paid_twice(call.model_dump() for call in engine.calls) == []
    assert in_store(store, "rev-parse", REF) == result.commit
