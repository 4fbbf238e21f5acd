"""Whatever is killed while an agent works in a repository: its commits are those without kills."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from temporalio.client import WorkflowHandle

from tests.support.checker import paid_twice
from tests.support.llm_server import LlmServer
from tests.support.repositories import config_with, in_store, make_repository
from tests.support.scripted_model import ScriptedModel, replace, run, write
from tests.support.site import Site, patient
from workflows.models.implementation import ImplementationResult

pytestmark = pytest.mark.timeout(300)

WORKERS = ("story", "agents", "context", "workspace")
STEPS = [
    run("ls && cat adder/__init__.py"),
    replace("adder/__init__.py", "left - right", "left + right"),
    run("echo checked >> NEWS.md && sleep 0.5"),
    write("adder/more.py", "def double(value: int) -> int:\n    return value * 2\n"),
    run('python -c "from adder.more import double; print(double(4))"'),
]


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[LlmServer]:
    async with LlmServer(delay_ms=300) as engine:
        engine.documents["next_action"] = ScriptedModel(STEPS)
        yield engine


@pytest.fixture(scope="module")
async def site(engine: LlmServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    home = tmp_path_factory.mktemp("site")
    config = config_with(home / "config", adder={"url": make_repository(home / "adder")})
    variables = {"FLEET_CONFIG": str(config), "WORKSPACE_STORE": str(home / "store")}
    async with Site(home, engine.url, workers=WORKERS, more=variables) as site:
        yield site


async def start(site: Site) -> WorkflowHandle[Any, ImplementationResult]:
    return await site.client.start_workflow(
        "ImplementationWorkflow",
        {
            "repository": "adder",
            "task": {"task_id": "T-1", "role": "DEV", "description": "Let it add."},
            "agent": {"agent_id": "agent-dev-1", "role": "DEV"},
            "began": "2026-03-01T12:00:00Z",
        },
        id="implementation-T-1-agent-dev-1",
        task_queue="story",
        result_type=ImplementationResult,
    )


async def until_in_progress(site: Site, activity: str, count: int) -> None:
    """Wait until the workflow has scheduled that activity so many times."""
    handle = site.client.get_workflow_handle("implementation-T-1-agent-dev-1")

    async def follow() -> int:
        found = 0
        async for event in handle.fetch_history_events(wait_new_event=True):
            scheduled = event.activity_task_scheduled_event_attributes
            found += scheduled.activity_type.name == activity
            if found == count:
                break
        return found

    assert await patient(follow) == count


async def test_a_worker_killed_in_any_step_changes_no_commit_and_pays_for_no_answer_twice(
    site: Site, engine: LlmServer
) -> None:
    undisturbed: ImplementationResult = await (await start(site)).result()
    engine.calls.clear()

    handle = await start(site)
    for step, kind in enumerate(["workspace", "agents", "workspace", "story", "workspace"], 1):
        await until_in_progress(site, "next_action" if kind == "agents" else "run_action", step)
        await site.kill_and_start(kind)
    result: ImplementationResult = await patient(handle.result)

    assert undisturbed.ended_by == "finish"
    assert result.commit == undisturbed.commit
    assert result.transcript_digest == undisturbed.transcript_digest
    assert paid_twice(call.model_dump() for call in engine.calls) == []
    ref = "refs/fleet/no-story/T-1/agent-dev-1"
    (store,) = (site.home / "store").glob("*.git")
    assert in_store(store, "rev-parse", ref) == result.commit
    steps = in_store(
        store, "log", "--format=%(trailers:key=Step,valueonly)", f"{result.base}..{ref}"
    )
    assert steps.split() == ["4", "3", "2"]
    assert site.orphans() == []
