"""A story on real servers whose tasks conflict, and whose merged branch has to be repaired."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.integration.workflows.test_council_changes import ADDER, NEW_TEST, SUBTRACTS
from tests.integration.workflows.test_story_branch import CRITERIA_TESTS, STORY
from tests.support.fleet import new_environment, whole_fleet
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


def next_action(call: Call) -> dict[str, Any]:
    """Follow the script of the task, which a prompt names after its context."""
    if "conflicts with the branch" in call.prompt:
        asked = "conflicts with the branch"
    else:
        asked = max(SCRIPTS, key=call.prompt.rfind)
    return ScriptedModel(SCRIPTS[asked])(call)


async def test_tasks_that_conflict_are_revised_and_a_branch_that_fails_is_repaired(
    servers: Servers, tmp_path: Path
) -> None:
    origin = tmp_path / "adder"
    url = make_repository(origin, PROJECT | {"adder/__init__.py": ADDER})
    entry = {"url": url, "limits": {"seconds": 120, "steps": 4}}
    config = config_with(tmp_path / "config", adder=entry)
    async with LlmServer(window=32_768) as llm:
        llm.documents["next_action"] = next_action
        llm.documents["derive_plan"] = lambda _: {"tasks": TASKS}
        environment = await new_environment(
            servers,
            llm,
            FLEET_CONFIG=str(config),
            FLEET_HOME=str(tmp_path),
            WORKSPACE_STORE=str(tmp_path / "store"),
        )
        async with whole_fleet(environment) as client:
            story = await client.start_workflow(
                "StoryWorkflow",
                STORY | {"story_id": "US-repairs"},
                id=story_workflow_id("US-repairs"),
                task_queue="story",
                result_type=StoryResult,
                execution_timeout=timedelta(minutes=9),
            )
            result = await story.result()
            plan = await story.query("plan", result_type=Plan)

    assert result.branch is not None
    head, store = result.branch.head, tmp_path / "store" / "adder.git"
    whole = in_store(store, "show", f"{head}:adder/__init__.py")
    assert whole == (ADDER + SUBTRACTS + DOUBLES).strip()
    assert in_store(store, "show", f"{head}:tests/test_subtract.py") == NEW_TEST.strip()
    repair = plan.tasks[-1]
    assert (len(plan.tasks), repair.title) == (3, "Repair the unit tests")
    assert "test_it_subtracts" in repair.description
    log = in_store(store, "log", "--format=%s", head)
    assert "but for its conflicts" in log
