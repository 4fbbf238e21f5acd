"""Whatever is killed or restarted while agents work in a repository: the commits stay the same."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from temporalio.client import WorkflowHandle

from tests.chaos.conftest import TIME_LIMIT
from tests.support.checker import paid_twice
from tests.support.kept import forget_calls, kill_and_start
from tests.support.llm_server import Call, LlmServer
from tests.support.polling import until
from tests.support.repositories import config_with, in_store, make_repository
from tests.support.scripted_model import FINISH, ScriptedModel, replace, run, write
from tests.support.site import SERVERS, Site
from workflows.models.ids import plan_workflow_id
from workflows.models.implementation import ImplementationResult
from workflows.search_attributes import STORY_STATE

pytestmark = TIME_LIMIT

WORKERS = ("story", "agents", "context", "bridge", "workspace")
ID = "implementation-T-1-agent-dev-1"
STEPS = [
    run("ls && cat adder/__init__.py"),
    replace("adder/__init__.py", "left - right", "left + right"),
    run("echo checked >> NEWS.md && sleep 0.5"),
    write("adder/more.py", "def double(value: int) -> int:\n    return value * 2\n"),
    run('python -c "from adder.more import double; print(double(4))"'),
]

STORY_ID = "US-adds"
PLAN = plan_workflow_id(STORY_ID, f"{STORY_ID}-plan-1")
TASK = f"{STORY_ID}-plan-1-t1"
DEV = {"role": "DEV", "title": "Add", "description": "Let it add.", "depends_on": [], "priority": 1}
STORY_STEPS = [
    replace("adder/__init__.py", "left - right", "left + right"),
    run("date +%N > STAMP && sleep 0.5"),
]
"""The second step makes another commit in each run of it, so that a repetition shows."""


def story_action(call: Call) -> dict[str, Any]:
    """Answer the next action of a story's agent; a revision has nothing to add."""
    if "# Why earlier work was sent back" in call.prompt:
        return FINISH
    return ScriptedModel(STORY_STEPS)(call)


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[LlmServer]:
    async with LlmServer(delay_ms=300, window=32_768) as engine:
        engine.documents["next_action"] = ScriptedModel(STEPS)
        engine.documents["derive_plan"] = lambda _: {"tasks": [DEV]}
        yield engine


@pytest.fixture(scope="module")
async def site(engine: LlmServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    home = tmp_path_factory.mktemp("site")
    entry = {"url": make_repository(home / "adder"), "limits": {"steps": 8, "seconds": 120}}
    config = config_with(home / "config", adder=entry)
    variables = {
        "FLEET_CONFIG": str(config),
        "WORKSPACE_STORE": str(home / "store"),
        "DRAIN_SECONDS": "12",
    }
    async with Site(home, engine.url, workers=WORKERS, more=variables) as site:
        yield site


@pytest.fixture(scope="module")
async def undisturbed(site: Site) -> ImplementationResult:
    result: ImplementationResult = await site.patient((await start(site)).result)
    assert result.ended_by == "finish"
    return result


async def start(site: Site) -> WorkflowHandle[Any, ImplementationResult]:
    return await site.client.start_workflow(
        "ImplementationWorkflow",
        {
            "repository": "adder",
            "task": {"task_id": "T-1", "role": "DEV", "description": "Let it add."},
            "agent": {"agent_id": "agent-dev-1", "role": "DEV"},
            "began": "2026-03-01T12:00:00Z",
        },
        id=ID,
        task_queue="story",
        result_type=ImplementationResult,
    )


async def until_in_progress(site: Site, activity: str, count: int) -> None:
    """Wait until the workflow has scheduled that activity so many times."""
    handle = site.client.get_workflow_handle(ID)

    async def follow() -> int:
        found = 0
        async for event in handle.fetch_history_events(wait_new_event=True):
            scheduled = event.activity_task_scheduled_event_attributes
            found += scheduled.activity_type.name == activity
            if found == count:
                break
        return found

    assert await site.patient(follow) == count


def store_of(site: Site) -> Path:
    return site.home / "store" / "adder.git"


async def test_a_worker_killed_in_any_step_changes_no_commit_and_pays_for_no_answer_twice(
    site: Site, engine: LlmServer, undisturbed: ImplementationResult
) -> None:
    await forget_calls(site, engine)

    handle = await start(site)
    for step, kind in enumerate(["workspace", "agents", "workspace", "story", "workspace"], 1):
        await until_in_progress(site, "next_action" if kind == "agents" else "run_action", step)
        await kill_and_start(site, engine, kind)
    result: ImplementationResult = await site.patient(handle.result)

    assert result.commit == undisturbed.commit
    assert result.transcript_digest == undisturbed.transcript_digest
    assert paid_twice(call.model_dump() for call in engine.calls) == []
    ref = "refs/fleet/no-story/T-1/agent-dev-1"
    assert in_store(store_of(site), "rev-parse", ref) == result.commit
    steps = in_store(
        store_of(site), "log", "--format=%(trailers:key=Step,valueonly)", f"{result.base}..{ref}"
    )
    assert steps.split() == ["4", "3", "2"]
    assert site.orphans() == []


async def test_servers_that_restart_and_a_store_that_is_away_change_no_commit(
    site: Site, engine: LlmServer, undisturbed: ImplementationResult
) -> None:
    engine.calls.clear()

    handle = await start(site)
    await until_in_progress(site, "next_action", 1)
    away = store_of(site).parent.rename(site.home / "away")
    await until(lambda: last_failure(site), lambda failure: "the store" in failure)
    away.rename(store_of(site).parent)
    for step, server in enumerate(SERVERS, 2):
        await until_in_progress(site, "run_action", step)
        await site.kill_and_start(server)
    result: ImplementationResult = await site.patient(handle.result)

    assert result.commit == undisturbed.commit
    assert result.transcript_digest == undisturbed.transcript_digest
    assert paid_twice(call.model_dump() for call in engine.calls) == []


async def test_a_worker_that_drains_ends_its_command_or_hands_it_over(
    site: Site, engine: LlmServer
) -> None:
    """DRAIN_SECONDS is 12 here: the first command ends within them, the second does not."""
    steps = [run("sleep 2.125 && echo short > SHORT"), run("sleep 25.125 && echo long > LONG")]
    engine.documents["next_action"] = ScriptedModel(steps)

    handle = await start(site)
    for seconds in ("2.125", "25.125"):
        await until(partial(sleeping, seconds))
        await site.stop("workspace")
        assert not sleeping(seconds)
        await site.start("workspace")
    result: ImplementationResult = await site.patient(handle.result)

    assert [file.path for file in result.changed] == ["LONG", "SHORT"]
    assert await attempts(handle, "run_action") == [1, 2]


def sleeping(seconds: str) -> bool:
    """Return whether a process sleeps for so many seconds."""
    return any(
        process.info["cmdline"] == ["sleep", seconds]
        for process in psutil.process_iter(["cmdline"])
    )


async def attempts(handle: WorkflowHandle[Any, Any], activity: str) -> list[int]:
    """Return the attempt in which each activity of that type has completed."""
    scheduled: set[int] = set()
    found = []
    async for event in handle.fetch_history_events():
        if event.activity_task_scheduled_event_attributes.activity_type.name == activity:
            scheduled.add(event.event_id)
        started = event.activity_task_started_event_attributes
        if started.scheduled_event_id in scheduled:
            found.append(started.attempt)
    return found


async def last_failure(site: Site) -> str:
    """Return why the activity that is retried has failed last."""
    description = await site.patient(site.client.get_workflow_handle(ID).describe)
    pending = description.raw_description.pending_activities
    return " ".join(each.last_failure.message for each in pending)


async def test_kills_in_a_story_lose_no_commit_of_its_agents_and_repeat_no_answer(
    site: Site, engine: LlmServer
) -> None:
    engine.documents["next_action"] = story_action
    await forget_calls(site, engine)
    kept: dict[str, set[str]] = {}
    await site.begin(
        STORY_ID,
        rigor="L0",
        acceptance_criteria=["Given 2 and 3, when I add them, then the result is 5."],
        repository="adder",
        paths=["adder/**", "STAMP"],
    )
    for workflow_id, activity, kind in (
        (f"implementation-{TASK}-agent-dev-2", "run_action", "workspace"),
        (f"deliberation-{TASK}", "measure_change", "workspace"),
        (f"deliberation-{TASK}", "criticise", "agents"),
        (PLAN, "merge_change", "workspace"),
        (f"story-{STORY_ID}", "measure_change", "story"),
    ):
        await site.until_scheduled(workflow_id, activity)
        for ref, commit in agents_refs(site).items():
            kept.setdefault(ref, set()).add(commit)
        await kill_and_start(site, engine, kind)
    await until(
        lambda: site.attribute(STORY_ID, STORY_STATE), lambda state: state in ("TEST", "DOCS")
    )

    assert paid_twice(call.model_dump() for call in engine.calls) == []
    refs, store = agents_refs(site), store_of(site)
    assert len(refs) == 3
    for ref, commits in kept.items():
        for commit in commits:
            in_store(store, "merge-base", "--is-ancestor", commit, refs[ref])
    left_behind = (f"refs/fleet-old/{STORY_ID}", f"refs/fleet-left/{STORY_ID}")
    span = f"refs/base/main..story/{STORY_ID}"
    fields = "--format=%(trailers:key=Task,key=Step,valueonly,separator=%x20)"
    commits_of_branch = in_store(store, "log", "--reverse", fields, span).splitlines()
    assert [each for each in commits_of_branch if each.startswith(TASK)] == [
        f"{TASK} 1",
        f"{TASK} 2",
    ]
    assert in_store(store, "for-each-ref", *left_behind) == ""


def agents_refs(site: Site) -> dict[str, str]:
    """Return the commits of the story's agents."""
    lines = in_store(
        store_of(site),
        *("for-each-ref", "--format=%(refname) %(objectname)", f"refs/fleet/{STORY_ID}/"),
    )
    return dict(line.split(" ") for line in lines.splitlines())
