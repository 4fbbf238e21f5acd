"""A graph that other systems also write to: before the fleet starts, and while it runs."""

import asyncio
from typing import Any

import neo4j
import pytest

from activities.graph.activities import Graph
from activities.graph.migrations import migrate
from tests.support.stories import (
    at,
    batch,
    moved,
    new_story,
    one_of_each,
    refused,
    rows,
)
from workflows.models.context import ContextChange, ContextUpdate, ContextWrite, PackQuery
from workflows.models.events import ContextDecisionAdded, PlanApproved
from workflows.models.plan import PlanQuery

SEEDS = {
    "a case that is no story": "CREATE (:Case {id: $id, title: 'Seeded'})",
    "a story that is no case": "CREATE (:Story {id: $id, title: 'Seeded'})",
    "a case by case_id only": "CREATE (:Case {case_id: $id, title: 'Seeded'})",
    "a story by story_id only": "CREATE (:Story {story_id: $id, title: 'Seeded'})",
    "both, as two nodes": "CREATE (:Case {id: $id, title: 'Seeded'}), (:Story {id: $id})",
    "three nodes": "CREATE (:Case {id: $id}), (:Story {id: $id, title: 'Seeded'}), "
    "(:Case {case_id: $id})",
}
HANGING = """
MATCH (c:Case|Story) WHERE $id IN [c.id, c.case_id, c.story_id] WITH c LIMIT 1
CREATE (c)-[:HAS_PLAN]->(p:PlanVersion {id: 'plan-s', version: 1, status: 'DRAFT'}),
  (p)-[:HAS_SUBTASK]->(:Subtask {id: 'task-s', title: 'Planned', role: 'DEV'}),
  (c)-[:HAS_SUBTASK]->(:Subtask {sub_id: 'task-c', title: 'Of the case', role: 'DEV'}),
  (p)-[:CONTAINS_DECISION]->(:Decision {id: 'd-contained', title: 'Contained'}),
  (c)-[:HAS_DECISION]->(:Decision {id: 'd-has', title: 'Has'}),
  (c)<-[:OF]-(:Decision {id: 'd-of', title: 'Of'}),
  (c)-[:MADE]->(:Decision {id: 'd-made', title: 'Made'}),
  (c)-[:CONTAINS_DECISION]->(:Decision {id: 7, title: 'Seven'})
"""


async def seed(driver: neo4j.AsyncDriver, story: str, *statements: str) -> None:
    for statement in statements:
        await rows(driver, statement, id=story)


async def nodes_of(driver: neo4j.AsyncDriver, story: str) -> list[list[Any]]:
    return await rows(
        driver,
        "MATCH (n:Case|Story) WHERE $id IN [n.id, n.case_id, n.story_id] "
        "RETURN n:Case AND n:Story, n.id, n.case_id, n.title, "
        "COUNT { (n)-[:HAS_PLAN]->(:PlanVersion) }",
        id=story,
    )


@pytest.mark.parametrize("kind", SEEDS)
async def test_a_story_that_others_wrote_is_one_node_once_it_is_read(
    graph: Graph, driver: neo4j.AsyncDriver, kind: str
) -> None:
    story = new_story()
    await seed(driver, story, SEEDS[kind], HANGING)

    session = await graph.read_session(story, events=5, summary=True)
    pack = await graph.build_pack(PackQuery(story_id=story, role="ARCHITECT", phase="BUILD"))
    tasks = await graph.load_plan(PlanQuery(story_id=story, plan_id="plan-s"))

    assert await nodes_of(driver, story) == [[True, story, story, "Seeded", 1]]
    decided = {each.decision["title"] for each in session.decisions}
    assert decided == {"Contained", "Has", "Of", "Made", "Seven"}
    assert {task["subtask_id"] for task in session.tasks} == {"task-s", "task-c"}
    for text in ("Seeded", "Planned", "Of the case", *decided):
        assert text in pack.context
    assert [task.task_id for task in tasks.tasks] == ["task-s"]


@pytest.mark.parametrize("kind", SEEDS)
async def test_a_story_that_others_wrote_is_written_as_one_node(
    graph: Graph, driver: neo4j.AsyncDriver, kind: str
) -> None:
    story = new_story()
    await graph.record(batch(story, *one_of_each(story)[:4]))
    before = new_story()
    await seed(driver, before, SEEDS[kind], HANGING)

    await graph.record(batch(before, *one_of_each(before)))
    await graph.read_session(before, events=1, summary=False)

    [[both, identity, case_id, title, plans]] = await nodes_of(driver, before)
    assert (both, identity, case_id) == (True, before, before)
    assert title == "Log in"
    assert plans == 2


async def test_an_update_and_a_plan_of_a_seeded_story_find_its_nodes(
    graph: Graph, driver: neo4j.AsyncDriver
) -> None:
    story = new_story()
    await seed(
        driver,
        story,
        "CREATE (:Case {id: $id, title: 'Seeded'})-[:HAS_SUBTASK]->"
        "(:Subtask {id: 'task-c', title: 'Of the case', role: 'DEV'})",
        "CREATE (:Story {id: $id})-[:HAS_DECISION]->(:Decision {id: 'd-1', title: 'First'})",
    )
    change = ContextChange(
        operation="UPDATE", entity_type="DECISION", entity_id="d-1", payload='{"title": "Second"}'
    )
    update = ContextUpdate(story_id=story, actor="ana", role="PO", changes=[change])

    answer = await graph.update_context(
        ContextWrite(update_id=f"u-{story}", at=at(1), started_ms=1_767_225_600_000, update=update)
    )
    await graph.record(
        batch(story, PlanApproved(story_id=story, plan_id="p", approved_by="a", timestamp=at(2)))
    )

    assert answer.warnings == []
    found = await rows(
        driver,
        "MATCH (d:Decision {case_id: $id}) RETURN d.title, [(d)-[:HAS_REVISION]->(r) | r.title]",
        id=story,
    )
    assert found == [["Second", ["First"]]]
    tasks = await graph.load_plan(PlanQuery(story_id=story, plan_id="p"))
    assert [task.task_id for task in tasks.tasks] == ["task-c"]


async def test_a_migration_repairs_a_graph_that_others_made(driver: neo4j.AsyncDriver) -> None:
    for [name] in await rows(driver, "SHOW CONSTRAINTS YIELD name RETURN name"):
        await rows(driver, f"DROP CONSTRAINT {name}")
    await rows(driver, "MATCH (m:Migration) DELETE m")
    stories = {kind: new_story() for kind in SEEDS}
    for kind, story in stories.items():
        await seed(driver, story, SEEDS[kind], HANGING)
    doubled = new_story()
    await seed(
        driver,
        doubled,
        "CREATE (:Case {id: $id, title: 'Seeded'})-[:HAS_PLAN]->(:PlanVersion {id: 'plan-s'}), "
        "(:Case {id: $id}), (:Decision {id: 'd', case_id: $id, title: 'Once'}), "
        "(:Decision {id: 'd', case_id: $id, decided_by: 'ana', "
        "decided_at: '2026-01-01T02:00:00+02:00'})",
    )

    await asyncio.gather(*(migrate(driver) for _ in range(3)))

    for story in (*stories.values(), doubled):
        assert await nodes_of(driver, story) == [[True, story, story, "Seeded", 1]]
    [[decision]] = await rows(driver, "MATCH (d:Decision {case_id: $id}) RETURN d {.*}", id=doubled)
    assert decision["decided_at"] == at(0)
    assert decision["approved_by"] == decision["decided_by"] == "ana"
    assert decision["title"] == "Once"
    subtasks = await rows(
        driver,
        "MATCH (t:Subtask {case_id: $id}) RETURN t.sub_id, t.type, t.plan_id ORDER BY t.sub_id",
        id=stories["a case that is no story"],
    )
    assert subtasks == [["task-c", "task", None], ["task-s", "task", "plan-s"]]
    assert await migrate(driver) == []


async def test_what_the_graph_refuses_is_final(graph: Graph, driver: neo4j.AsyncDriver) -> None:
    story = new_story()
    approval = one_of_each(story)[3]
    keys = "(n.story_id, n.gate, n.comment, n.at)"
    await rows(driver, f"CREATE CONSTRAINT theirs FOR (n:GateApproval) REQUIRE {keys} IS UNIQUE")
    try:
        await graph.record(batch(story, approval))

        with refused("GraphConstraint", retryable=False) as caught:
            await graph.record(batch(story, approval.model_copy(update={"id": "other"}), first=1))
    finally:
        await rows(driver, "DROP CONSTRAINT theirs")
    assert "GateApproval" in caught.value.message


async def test_a_status_from_outside_never_replaces_that_of_a_workflow(
    graph: Graph, driver: neo4j.AsyncDriver
) -> None:
    from activities.graph.changes import changes

    story, alone = new_story(), new_story()

    def outside(of: str, target: str, second: int) -> Any:
        batched = batch(of, moved(of, "DRAFT", target, second), first=second)
        return [change._replace(workflow="") for change in changes(batched)]

    async def status(of: str) -> str:
        [[found]] = await rows(driver, "MATCH (s:Story {id: $id}) RETURN s.status", id=of)
        return str(found)

    await graph.store(outside(story, "TEST", 50))
    await graph.store(outside(alone, "TEST", 50))
    assert await status(story) == await status(alone) == "TEST"

    await graph.record(batch(story, *one_of_each(story)[:2]))
    assert await status(story) == "DRAFT"
    await graph.store(outside(story, "DONE", 60))
    await graph.store(outside(alone, "DONE", 60))
    assert await status(story) == "DRAFT"
    assert await status(alone) == "DONE"
    await graph.record(batch(story, moved(story, "DRAFT", "DESIGN", 2), first=2))
    assert await status(story) == "DESIGN"
    [[stored]] = await rows(
        driver, "MATCH (:Story {id: $id})<-[:OF]-(t:PhaseTransition) RETURN count(t)", id=story
    )
    assert stored == 3


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 3, 1)])
async def test_the_later_text_of_a_repeated_decision_is_kept(
    graph: Graph, driver: neo4j.AsyncDriver, order: tuple[int, ...]
) -> None:
    story = new_story()
    offsets = {1: "2026-01-01T03:00:00+02:00", 2: "2026-01-01T01:30:00", 3: "2026-01-01T02:00:00Z"}
    for number in [*order, order[0]]:
        added = ContextDecisionAdded(
            story_id=story,
            decision_id="D",
            title=f"Text {number}",
            rationale="r",
            decided_by=f"person {number}",
            timestamp=offsets[number],
        )
        await graph.record(batch(story, added, first=number))

    found = await rows(
        driver,
        "MATCH (d:Decision {case_id: $id}) RETURN d.title, d.decided_by, d.approved_by, "
        "d.decided_at, COLLECT { MATCH (d)-[:HAS_REVISION]->(r) RETURN r.title ORDER BY r.order }",
        id=story,
    )
    assert found == [
        ["Text 3", "person 3", "person 3", "2026-01-01T02:00:00.000Z", ["Text 1", "Text 2"]]
    ]
