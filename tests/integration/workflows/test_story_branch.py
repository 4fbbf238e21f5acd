"""A story in a repository on real servers: from its text to the branch that is delivered."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from neo4j import AsyncGraphDatabase

from tests.integration.workflows.test_council_changes import ADDER, SUBTRACTS
from tests.support.fleet import Environment, new_environment, whole_fleet
from tests.support.fleet_cli import done, refused
from tests.support.llm_server import LlmServer
from tests.support.repositories import PROJECT, config_with, in_store, make_repository
from tests.support.scripted_model import ScriptedPhases, replace, run, write
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
    "paths": ["adder/**", "tests/**", "README.md"],
}

CRITERIA_TESTS = (
    "import adder\n\n\n"
    "def test_ac1_five_less_three_is_two() -> None:\n    assert adder.subtract(5, 3) == 2\n\n\n"
    "def test_ac2_three_less_three_is_zero() -> None:\n    assert adder.subtract(3, 3) == 0\n"
)

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
    proved = {each["number"]: each["tests"] for each in change["criteria"]}
    assert [test.rpartition("::")[2] for test in proved[1]] == ["test_ac1_five_less_three_is_two"]
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
        llm.documents["next_action"] = ScriptedPhases(
            {
                "": [
                    write("adder/__init__.py", ADDER + SUBTRACTS),
                    run("python -m pytest -q -p no:cacheprovider"),
                ],
                "Write tests for the acceptance criteria": [
                    write("adder/__init__.py", "raise SystemExit\n"),
                    write("tests/test_subtract.py", CRITERIA_TESTS),
                ],
                "Bring the documentation in this repository": [
                    replace("README.md", "Adds numbers.", "Adds numbers, and subtracts them.")
                ],
            }
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
                execution_timeout=timedelta(minutes=9),
            )
            shown = (await done(environment, "diff", "US-subtracts")).out
            page = (await done(environment, "show", "US-subtracts", "--wide")).out
            await why_of_lines(environment)

    branch = result.branch
    assert branch is not None
    assert (result.state, branch.base) == ("DONE", base)
    assert in_store(origin / ".git", "rev-parse", "story/US-subtracts") == branch.head
    assert in_store(origin / ".git", "rev-parse", "main") == base
    assert "+def subtract" in shown
    assert "raise SystemExit" not in shown
    assert "+Adds numbers, and subtracts them." in shown
    assert "2 of 2 proved" in page
    neo4j = servers.neo4j
    auth = (neo4j.user or "", neo4j.password or "")
    async with AsyncGraphDatabase.driver(neo4j.address, auth=auth) as driver:
        rows, _, _ = await driver.execute_query(
            "MATCH (e:Event {event_type: 'planning.story.delivered'})-[:OF]->"
            "(s:Story {id: 'US-subtracts'}) RETURN e.commit AS commit, e.files_changed AS files, "
            "s.branch AS branch, s.commit AS head"
        )
        proofs, _, _ = await driver.execute_query(
            "MATCH (t:AcceptanceTest)-[:PROVES]->(c:Criterion)-[:OF]->(:Story {id: 'US-subtracts'})"
            " RETURN c.number AS number, c.proved AS proved, t.name AS test, t.before AS before, "
            "t.after AS after, t.base AS base ORDER BY number"
        )
    assert [dict(proof) for proof in proofs] == [
        {
            "number": number,
            "proved": True,
            "test": f"tests.test_subtract::test_ac{number}_{name}",
            "before": "failed",
            "after": "passed",
            "base": base,
        }
        for number, name in enumerate(("five_less_three_is_two", "three_less_three_is_zero"), 1)
    ]
    assert [dict(row) for row in rows] == [
        {
            "commit": branch.head,
            "files": 3,
            "branch": "story/US-subtracts",
            "head": branch.head,
        }
    ]
