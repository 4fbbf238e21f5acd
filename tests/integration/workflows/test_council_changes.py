"""A council in a repository on real servers: real git, real tests, and a scripted model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from neo4j import AsyncGraphDatabase

from activities.graph.councils import load_councils
from tests.support.fleet import new_environment, whole_fleet
from tests.support.llm_server import Call, LlmServer
from tests.support.repositories import PROJECT, config_with, in_store, make_repository
from tests.support.scripted_model import ScriptedModel, replace, run, write
from tests.support.servers import Servers
from workers.environment import ROOT
from workflows.models.deliberation import DeliberationResult, RankedProposal

ADDER = "def add(left: int, right: int) -> int:\n    return left + right\n"
SUBTRACTS = "\n\ndef subtract(left: int, right: int) -> int:\n    return left - right\n"
NEW_TEST = (
    "from adder import subtract\n\n\n"
    "def test_it_subtracts() -> None:\n    assert subtract(5, 3) == 2\n"
)

SCRIPTS: dict[str, list[dict[str, Any]]] = {
    "agent-dev-1": [replace("adder/__init__.py", "left + right", "left - right")],
    "agent-dev-2": [run("ls"), run("cat README.md")],
    "agent-dev-3": [
        write("adder/__init__.py", ADDER + SUBTRACTS),
        write("tests/test_subtract.py", NEW_TEST),
        run("python -m pytest -q -p no:cacheprovider"),
    ],
}


class ScriptedCouncil:
    """A model that plays each agent by its script; it knows an agent by its persona."""

    def __init__(self) -> None:
        agents = load_councils(ROOT / "deploy" / "config" / "councils.yaml").councils["DEV"]
        self.personas = {agent.persona: agent.agent_id for agent in agents}

    def __call__(self, call: Call) -> dict[str, Any]:
        persona = next(persona for persona in self.personas if persona in call.prompt)
        return ScriptedModel(SCRIPTS[self.personas[persona]])(call)


@pytest.fixture(scope="module")
async def council(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what a council's deliberation ended with, its prompts, and the store."""
    home = tmp_path_factory.mktemp("council")
    url = make_repository(home / "adder", PROJECT | {"adder/__init__.py": ADDER})
    entry = {"url": url, "limits": {"seconds": 120, "steps": 8}}
    config = config_with(home / "config", adder=entry)
    base = in_store(home / "adder" / ".git", "rev-parse", "main")
    async with LlmServer(window=32_768) as llm:
        llm.documents["next_action"] = ScriptedCouncil()
        environment = await new_environment(
            servers,
            llm,
            FLEET_CONFIG=str(config),
            FLEET_HOME=str(home),
            WORKSPACE_STORE=str(home / "store"),
        )
        async with whole_fleet(environment) as client:
            request = {
                "task_id": "T-subtract",
                "role": "DEV",
                "description": "Let the adder subtract too, with a test.",
                "timeout": 900,
                "work": {
                    "repository": {"key": "adder", **entry},
                    "story_id": "US-subtract",
                    "base": base,
                },
            }
            result = await client.execute_workflow(
                "DeliberationWorkflow",
                json.loads(json.dumps(request)),
                id="deliberation-T-subtract",
                task_queue="story",
                result_type=DeliberationResult,
            )
            yield result, list(llm.calls), home / "store" / "adder.git"


def by_agent(result: DeliberationResult) -> dict[str, RankedProposal]:
    return {each.agent_id: each for each in result.ranked}


async def test_the_good_change_wins_and_the_others_are_barred_with_reasons(council: Any) -> None:
    result, _, store = council

    ranked = by_agent(result)
    assert result.winner_id == "agent-dev-3"
    assert {agent for agent, each in ranked.items() if each.barred} == {
        "agent-dev-1",
        "agent-dev-2",
    }
    (broken,) = ranked["agent-dev-1"].checks[0].findings
    assert broken.startswith("breaks what passed on the base: ")
    assert broken.endswith("test_it_adds")
    assert ranked["agent-dev-2"].checks[0].findings == ["changes nothing"]
    assert [file.path for file in result.change.files] == [
        "adder/__init__.py",
        "tests/test_subtract.py",
    ]
    assert (result.measurement.unit.passed, result.measurement.unit.failed) == (2, 0)
    best = ranked["agent-dev-3"].scored
    assert best is not None
    assert best.score == round(100 * result.score) > 0
    ref = "refs/fleet/US-subtract/T-subtract/agent-dev-3"
    assert in_store(store, "rev-parse", ref) == result.change.commit


async def test_a_critic_reads_the_diff_and_what_the_fleet_measured(council: Any) -> None:
    _, calls, _ = council

    read = [call.prompt for call in calls if call.act == "criticise"]
    (about_the_winner,) = (prompt for prompt in read if "+def subtract" in prompt)
    assert "unit tests: 2 passed, 0 failed" in about_the_winner
    assert any("passed on the base and fail now" in prompt for prompt in read)
    assert any("It changes no file." in prompt for prompt in read)


async def test_every_call_is_counted_once(council: Any) -> None:
    result, calls, _ = council

    assert sum(each.asks for each in result.usage) == len(calls)


async def test_the_graph_has_each_change_and_its_report(council: Any, servers: Servers) -> None:
    result, _, _ = council
    neo4j = servers.neo4j
    auth = (neo4j.user or "", neo4j.password or "")
    async with AsyncGraphDatabase.driver(neo4j.address, auth=auth) as driver:
        rows, _, _ = await driver.execute_query(
            "MATCH (r:Report)-[:OF]->(c:Change)-[:FROM]->(p:Proposal {deliberation_id: $id}) "
            "RETURN p.agent_id AS agent, p.rank AS rank, c {.*} AS change, r {.*} AS report "
            "ORDER BY rank",
            id=result.deliberation_id,
        )

    assert len(rows) == 3
    winner = rows[0]
    assert winner["agent"] == "agent-dev-3"
    assert winner["change"]["commit"] == winner["report"]["commit"] == result.change.commit
    assert winner["change"]["base"] == result.change.base
    assert winner["change"]["files"] == ["adder/__init__.py", "tests/test_subtract.py"]
    assert winner["change"]["insertions"] == result.change.insertions
    assert winner["report"]["measured_by"] == "fleet"
    assert winner["report"]["rigor"] == "L1"
    steps = {each["dimension"]: each for each in map(json.loads, winner["report"]["dimensions"])}
    assert steps["unit"]["passed"] == 2
    assert "pytest" in steps["unit"]["command"]
    broken = next(row["report"] for row in rows if row["agent"] == "agent-dev-1")
    assert [name.endswith("test_it_adds") for name in broken["broken"]] == [True]
