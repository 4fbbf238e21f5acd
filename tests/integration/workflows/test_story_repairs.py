"""A story on real servers whose tasks conflict, and whose merged branch has to be repaired."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client as Nats
from neo4j import AsyncDriver
from temporalio.client import Client, WorkflowHandle

from tests.integration.workflows.test_council_changes import ADDER, NEW_TEST, SUBTRACTS
from tests.integration.workflows.test_story_branch import CRITERIA_TESTS, STORY
from tests.support.checker import check
from tests.support.fleet import new_environment, whole_fleet
from tests.support.git_server import GitServer, credentials
from tests.support.llm_server import Call, LlmServer
from tests.support.repositories import PROJECT, config_with, in_store, make_repository
from tests.support.scripted_model import ScriptedModel, replace, write
from tests.support.servers import Servers
from workflows.models.ids import story_workflow_id
from workflows.models.plan import Plan
from workflows.models.story import StoryResult

DOUBLES = "\n\ndef double(number: int) -> int:\n    return 2 * number\n"
WRONG_TEST = NEW_TEST.replace("== 2", "== 3")

SCRIPTS = {
    "WRITE-SUBTRACT": [
        write("adder/__init__.py", ADDER + SUBTRACTS),
        write("tests/test_subtract.py", WRONG_TEST),
    ],
    "WRITE-DOUBLE": [write("adder/__init__.py", ADDER + DOUBLES)],
    "conflicts with the branch": [write("adder/__init__.py", ADDER + SUBTRACTS + DOUBLES)],
    "Repair the unit tests": [write("tests/test_subtract.py", NEW_TEST)],
    "Write tests for the acceptance criteria": [write("tests/test_criteria.py", CRITERIA_TESTS)],
    "Bring the documentation in this repository": [
        replace("README.md", "Adds numbers.", "Adds, subtracts and doubles numbers.")
    ],
}
"""What a prompt asks for -> the actions that do it."""

TASKS = [
    {
        "role": "DEV",
        "title": title,
        "description": f"{mark}: write the function.",
        "depends_on": [],
        "priority": 1,
    }
    for title, mark in (("Subtract", "WRITE-SUBTRACT"), ("Double", "WRITE-DOUBLE"))
]


CARELESS = SCRIPTS | {
    "WRITE-SUBTRACT": [replace("adder/__init__.py", ADDER, ADDER + SUBTRACTS)],
    "WRITE-DOUBLE": [replace("adder/__init__.py", ADDER, ADDER + DOUBLES)],
    "conflicts with the branch": [],
}
"""Both tasks insert at one place, and their authors leave the conflict as it is."""


def following(scripts: dict[str, list[dict[str, Any]]]) -> Callable[[Call], dict[str, Any]]:
    """Return a model that follows the script of the task, which a prompt names last."""

    def next_action(call: Call) -> dict[str, Any]:
        if "conflicts with the branch" in call.prompt:
            asked = "conflicts with the branch"
        else:
            asked = max(scripts, key=call.prompt.rfind)
        return ScriptedModel(scripts[asked])(call)

    return next_action


@asynccontextmanager
async def fleet_with_conflicts(
    servers: Servers,
    folder: Path,
    scripts: dict[str, list[dict[str, Any]]],
    store: Mapping[str, str],
) -> AsyncIterator[Client]:
    """Run a fleet whose repository is `adder` and whose plan has two tasks that conflict."""
    url = make_repository(folder / "adder", PROJECT | {"adder/__init__.py": ADDER})
    entry = {"url": url, "limits": {"seconds": 120, "steps": 4}}
    config = config_with(folder / "config", adder=entry)
    async with LlmServer(window=32_768) as llm:
        llm.documents["next_action"] = following(scripts)
        llm.documents["derive_plan"] = lambda _: {"tasks": TASKS}
        environment = await new_environment(
            servers,
            llm,
            FLEET_CONFIG=str(config),
            FLEET_HOME=str(folder),
            **store,
        )
        async with whole_fleet(environment) as client:
            yield client


@contextmanager
def store_on(place: str, folder: Path) -> Iterator[tuple[Path, Mapping[str, str]]]:
    """Yield where the store of `adder` is in the end, and the settings that say so."""
    (folder / "store").mkdir()
    path = folder / "store" / "adder.git"
    if place == "folder":
        yield path, {"WORKSPACE_STORE": str(folder / "store")}
        return
    server = GitServer(folder / "store")
    server.make("adder")
    with server.serving():
        yield (
            path,
            {
                "WORKSPACE_STORE": server.url,
                "WORKSPACE_TREES": str(folder / "trees"),
                "REPOSITORY_CREDENTIALS": str(credentials(folder / "credentials")),
            },
        )


async def start(client: Client, story_id: str) -> WorkflowHandle[Any, StoryResult]:
    return await client.start_workflow(
        "StoryWorkflow",
        STORY | {"story_id": story_id},
        id=story_workflow_id(story_id),
        task_queue="story",
        result_type=StoryResult,
        execution_timeout=timedelta(minutes=9),
    )


@pytest.mark.parametrize("place", ["folder", "git server"])
async def test_tasks_that_conflict_are_revised_and_a_branch_that_fails_is_repaired(
    place: str, servers: Servers, driver: AsyncDriver, nats_client: Nats, tmp_path: Path
) -> None:
    story_id = f"US-repairs-{place.replace(' ', '-')}"
    with store_on(place, tmp_path) as (store, settings):
        async with fleet_with_conflicts(servers, tmp_path, SCRIPTS, settings) as client:
            story = await start(client, story_id)
            result = await story.result()
            plan = await story.query("plan", result_type=Plan)
            faults = await check(client, nats_client, driver, [story_id])

    assert faults == []
    assert result.branch is not None
    head = result.branch.head
    whole = in_store(store, "show", f"{head}:adder/__init__.py")
    assert whole == (ADDER + SUBTRACTS + DOUBLES).strip()
    assert in_store(store, "show", f"{head}:tests/test_subtract.py") == NEW_TEST.strip()
    repair = plan.tasks[-1]
    assert (len(plan.tasks), repair.title) == (3, "Repair the unit tests")
    assert "test_it_subtracts" in repair.description
    log = in_store(store, "log", "--format=%s", head)
    assert "but for its conflicts" in log


async def test_a_task_that_conflicts_twice_is_tried_again_and_each_of_its_councils_has_one_winner(
    servers: Servers, driver: AsyncDriver, nats_client: Nats, tmp_path: Path
) -> None:
    with store_on("folder", tmp_path) as (store, settings):
        async with fleet_with_conflicts(servers, tmp_path, CARELESS, settings) as client:
            story = await start(client, "US-twice")
            result = await story.result()
            faults = await check(client, nats_client, driver, ["US-twice"])

    assert faults == []
    assert result.branch is not None
    whole = in_store(store, "show", f"{result.branch.head}:adder/__init__.py")
    assert SUBTRACTS.strip() in whole
    assert DOUBLES.strip() in whole
    found, _, _ = await driver.execute_query(
        "MATCH (p:Proposal {story_id: 'US-twice', rank: 1}) WHERE p.phase = 'BUILD' "
        "RETURN p.task_id AS task, count(DISTINCT p.run_id) AS runs, count(*) AS winners"
    )
    counted = {row["task"]: (row["runs"], row["winners"]) for row in found}
    assert sorted(counted[task] for task in ("US-twice-plan-1-t1", "US-twice-plan-1-t2")) == [
        (1, 1),
        (2, 2),
    ]
