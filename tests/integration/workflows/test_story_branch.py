"""A story in a repository on real servers: from its text to the branch that is delivered."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from neo4j import AsyncGraphDatabase

from tests.integration.workflows.test_council_changes import ADDER, NEW_TEST, SUBTRACTS
from tests.support.fleet import Environment, new_environment, whole_fleet
from tests.support.fleet_cli import done, refused
from tests.support.llm_server import LlmServer
from tests.support.repositories import PROJECT, config_with, in_store, make_repository
from tests.support.scripted_model import ScriptedModel, run, write
from tests.support.servers import Servers
from workflows.models.ids import story_workflow_id
from workflows.models.story import StoryResult

STORY = {
    "story_id": "US-subtracts",
    "title": "Let the adder subtract",
    "brief": "As a clerk I want to subtract so that I can correct a sum.",
    "acceptance_criteria": [
        "Given 5 and 3, when I subtract them, then the result is 2.",
        "Given 3 and 3, when I subtract them, then the result is 0.",
    ],
    "rigor": "L0",
    "approvals": "auto",
    "repository": "adder",
    "paths": ["adder/**", "tests/**"],
}

PLAN = {
    "tasks": [
        {
            "role": "DEV",
            "title": "Subtract",
            "description": "Write the function and a test.",
            "depends_on": [],
            "priority": 1,
        }
    ]
}


async def why_of_lines(environment: Environment) -> None:
    """`fleet why FILE:LINE` leads from a line to its proposal, or says why it does not."""

    async def why(line: str, *more: str) -> str:
        return await refused(environment, "why", line, *more)

    story = ("--story", "US-subtracts")
    found = (await done(environment, "why", "./adder/__init__.py:5", *story, "--json")).json
    shown = (await done(environment, "why", "adder/__init__.py:5", *story)).out

    origin, change = found["line"]["origin"], found["change"]
    assert found["line"]["text"] == "def subtract(left: int, right: int) -> int:"
    assert (origin["trailers"]["Story"], origin["trailers"]["Step"]) == ("US-subtracts", "1")
    assert (change["role"], change["rank"]) == ("DEV", 1)
    assert [each["critic"] for each in change["critiques"]]
    assert {each["name"] for each in change["checks"]} >= {"policy"}
    assert "qa_passed" in {each["gate"] for each in change["passed_by"]}
    for text in ("def subtract", origin["trailers"]["Agent"], "model test-model", "qa_passed"):
        assert text in shown
    assert "did not write adder/__init__.py:1" in await why("adder/__init__.py:1", *story)
    assert "Add the adder" in await why("adder/__init__.py:1", *story)
    assert "has 6 lines" in await why("adder/__init__.py:7", *story)
    assert "has no file adder/none.py" in await why("adder/none.py:1", *story)
    assert "name its story" in await why("adder/__init__.py:1")


async def test_a_story_in_a_repository_is_delivered_as_a_measured_branch(
    servers: Servers, tmp_path: Path
) -> None:
    origin = tmp_path / "adder"
    url = make_repository(origin, PROJECT | {"adder/__init__.py": ADDER})
    base = in_store(origin / ".git", "rev-parse", "main")
    entry = {"url": url, "push": True, "limits": {"seconds": 120, "steps": 8}}
    config = config_with(tmp_path / "config", adder=entry)
    async with LlmServer(window=32_768) as llm:
        llm.documents["next_action"] = ScriptedModel(
            [
                write("adder/__init__.py", ADDER + SUBTRACTS),
                write("tests/test_subtract.py", NEW_TEST),
                run("python -m pytest -q -p no:cacheprovider"),
            ]
        )
        llm.documents["derive_plan"] = lambda _: PLAN
        environment = await new_environment(
            servers,
            llm,
            FLEET_CONFIG=str(config),
            FLEET_HOME=str(tmp_path),
            WORKSPACE_STORE=str(tmp_path / "store"),
        )
        async with whole_fleet(environment) as client:
            result = await client.execute_workflow(
                "StoryWorkflow",
                STORY,
                id=story_workflow_id("US-subtracts"),
                task_queue="story",
                result_type=StoryResult,
                execution_timeout=timedelta(minutes=5),
            )
            shown = (await done(environment, "diff", "US-subtracts")).out
            await why_of_lines(environment)

    branch = result.branch
    assert branch is not None
    assert (result.state, branch.base) == ("DONE", base)
    assert in_store(origin / ".git", "rev-parse", "story/US-subtracts") == branch.head
    assert in_store(origin / ".git", "rev-parse", "main") == base
    assert "+def subtract" in shown
    neo4j = servers.neo4j
    auth = (neo4j.user or "", neo4j.password or "")
    async with AsyncGraphDatabase.driver(neo4j.address, auth=auth) as driver:
        rows, _, _ = await driver.execute_query(
            "MATCH (e:Event {event_type: 'planning.story.delivered'})-[:OF]->"
            "(s:Story {id: 'US-subtracts'}) RETURN e.commit AS commit, e.files_changed AS files, "
            "s.branch AS branch, s.commit AS head"
        )
    assert [dict(row) for row in rows] == [
        {
            "commit": branch.head,
            "files": 2,
            "branch": "story/US-subtracts",
            "head": branch.head,
        }
    ]
