"""Changes in repositories, and the fleet's reports of them, in the graph."""

from __future__ import annotations

import json

import neo4j
import pytest

from activities.graph.activities import Graph
from tests.support.stories import deliberation, new_story, rows, with_change

FOUND = """
MATCH (r:Report)-[:OF]->(c:Change)-[:FROM]->(p:Proposal {story_id: $story})
MATCH (c)-[:OF]->(s:Story {id: $story})
RETURN p.rank, c {.*} AS change, r {.*} AS report
"""


async def test_a_change_comes_from_its_proposal_and_has_a_report(
    graph: Graph, driver: neo4j.AsyncDriver
) -> None:
    story = new_story()
    record = with_change(deliberation(story))

    await graph.record_deliberation(record)
    await graph.record_deliberation(record)

    [[rank, change, report]] = await rows(driver, FOUND, story=story)
    assert rank == 1
    assert change == {
        "id": f"{story}-p1/change",
        "story_id": story,
        "commit": "c" * 40,
        "base": "b" * 40,
        "files": ["README.md"],
        "insertions": 2,
        "deletions": 1,
    }
    assert {name: value for name, value in report.items() if name != "dimensions"} == {
        "id": f"{story}-p1/report",
        "commit": "c" * 40,
        "base": "b" * 40,
        "measured_by": "fleet",
        "score": 0,
        "rigor": "L1",
        "gating_decision": "block",
        "reasons": ["unit: failed"],
        "broken": ["t.test_a"],
        "seconds": 0.0,
    }
    dimensions = {each["dimension"]: each for each in map(json.loads, report["dimensions"])}
    assert list(dimensions) == ["build", "unit", "e2e", "coverage", "lint", "static"]
    assert (dimensions["build"]["command"], dimensions["build"]["seconds"]) == ("make", 1.5)
    assert dimensions["e2e"]["not_measured"] == "no command"


async def test_a_text_has_neither_change_nor_report(
    graph: Graph, driver: neo4j.AsyncDriver
) -> None:
    story = new_story()
    await graph.record_deliberation(deliberation(story))

    assert await rows(driver, FOUND, story=story) == []


@pytest.mark.parametrize("label", ["Change", "Report"])
async def test_a_change_and_its_report_are_unique(driver: neo4j.AsyncDriver, label: str) -> None:
    found = await rows(
        driver,
        "SHOW CONSTRAINTS YIELD labelsOrTypes, properties, type "
        "WHERE labelsOrTypes = [$label] RETURN properties, type",
        label=label,
    )

    assert found == [[["id"], "UNIQUENESS"]]
