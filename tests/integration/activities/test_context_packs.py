"""Context packs from a real graph and cache."""

import asyncio
from typing import Any

import pytest
from neo4j import AsyncDriver
from redis.asyncio import Redis

from activities.cache import pack_key
from activities.graph.activities import Graph
from tests.support.stories import (
    at,
    batch,
    deliberation,
    moved,
    new_story,
    one_of_each,
    plan,
    rows,
    spec,
)
from workflows.models.context import ContextPack, PackQuery
from workflows.models.deliberation import DeliberationRecord, RecordedDecision
from workflows.models.events import ContextDecisionAdded


@pytest.fixture
def story() -> str:
    return new_story()


def query(story: str, role: str = "DEV", phase: str = "BUILD", **more: Any) -> PackQuery:
    return PackQuery(story_id=story, role=role, phase=phase, **more)


async def test_a_pack_shows_a_role_its_story_plan_tasks_and_decisions(
    graph: Graph, story: str
) -> None:
    await graph.record(batch(story, spec(story), plan(story)))
    await graph.record_deliberation(deliberation(story))

    pack = await graph.build_pack(query(story))

    assert (
        pack.system
        == f"You are an agent of the DEV council. It is about story {story}. Phase: BUILD."
    )
    assert pack.context.splitlines() == [
        "## Story",
        f"**Log in** ({story}, DRAFT, rigor L1)",
        "- must hold: A wrong password is refused",
        "With a password",
        "## Plan",
        "Plan plan-1 version 1: DRAFT, 0 of 2 tasks done",
        "## Your tasks",
        f"- {story}-t2 [DEV, PENDING] **The form** (after {story}-t1): HTML",
        "## What your tasks wait for",
        f"- {story}-t2 comes after {story}-t1 [DATA, PENDING] The schema",
        "## Decisions that bear on your work",
        "- **One table** (agent-data-1): Enough",
        "- **An index** (agent-data-1)",
    ]
    assert "no tools" in pack.tools
    assert pack.token_count <= 700
    assert len(pack.version) == 16


@pytest.mark.parametrize(
    ("role", "phase", "headings"),
    [
        ("ARCHITECT", "DESIGN", ["Decisions", "The last summary"]),
        ("QA", "TEST", ["Decisions", "Tasks", "What happened, newest first"]),
        ("DEV", "TEST", ["Your tasks"]),
        ("data", "TEST", []),
        ("developer", "BUILD", ["Your tasks", "What your tasks wait for"]),
        ("COOK", "BUILD", []),
        ("DEV", "LUNCH", []),
    ],
)
async def test_each_role_and_phase_has_its_own_scopes(
    graph: Graph, story: str, role: str, phase: str, headings: list[str]
) -> None:
    await graph.record(batch(story, *one_of_each(story)))
    await graph.record_deliberation(deliberation(story))

    pack = await graph.build_pack(query(story, role, phase, token_budget=4000))

    found = [line[3:] for line in pack.context.splitlines() if line.startswith("## ")]
    assert found[:2] == ["Story", "Plan"]
    assert set(headings) <= set(found[2:])
    assert bool(headings) == bool(found[2:])


async def test_every_scope_of_the_table_can_be_read(graph: Graph, story: str) -> None:
    await graph.record(batch(story, *one_of_each(story)))
    await graph.record_deliberation(deliberation(story))

    packs = await asyncio.gather(
        *(
            graph.build_pack(query(story, role, phase, token_budget=9000))
            for role in ("ARCHITECT", "DEV", "DEVOPS", "QA", "DATA")
            for phase in ("DESIGN", "BUILD", "TEST", "DOCS")
        )
    )

    texts = "\n".join(pack.context for pack in packs)
    assert "An index depends on One table" in texts
    assert "DATA in BUILD, by agent-data-1 (score 0.90): approach 1" in texts
    assert "- DEMO: Shown" in texts
    assert "- DRAFT -> DESIGN: approve_scope (ana)" in texts
    assert "- No SMS" in texts
    assert "round" not in texts


async def test_a_standalone_deliberation_has_the_system_block_only(graph: Graph) -> None:
    pack = await graph.build_pack(query(""))

    assert pack.system == "You are an agent of the DEV council. Phase: BUILD."
    assert (pack.context, pack.tools, pack.scopes) == ("", "", [])


async def test_an_unknown_story_is_reported_as_unknown(graph: Graph, story: str) -> None:
    pack = await graph.build_pack(query(story))

    assert "Nothing is recorded of this story." in pack.context
    assert "There is no plan yet." in pack.context


async def test_the_task_asked_for_comes_first(graph: Graph, story: str) -> None:
    await graph.record(batch(story, spec(story), plan(story)))

    pack = await graph.build_pack(query(story, "QA", "TEST", subtask_id=f"{story}-t2"))

    tasks = [line for line in pack.context.splitlines() if line.startswith(f"- {story}-t")]
    assert [task.split()[1] for task in tasks] == [f"{story}-t2", f"{story}-t1"]


async def test_a_pack_is_kept_and_dropped_when_its_story_changes(
    graph: Graph, driver: AsyncDriver, client: Redis, story: str
) -> None:
    await graph.record(batch(story, spec(story)))
    first = await graph.build_pack(query(story))
    await rows(driver, "MATCH (s:Story {id: $story}) SET s.title = 'Unseen'", story=story)

    assert await graph.build_pack(query(story)) == first
    assert await client.exists(pack_key(story, "DEV", "BUILD"))

    await graph.record(batch(story, moved(story, "DRAFT", "DESIGN", 5), first=1))

    assert not await client.exists(pack_key(story, "DEV", "BUILD"))
    again = await graph.build_pack(query(story))
    assert "Unseen" in again.context
    assert again.version != first.version


async def test_a_deliberation_and_a_decision_from_outside_reach_the_next_pack(
    graph: Graph, story: str
) -> None:
    await graph.record(batch(story, spec(story)))
    await graph.build_pack(query(story))

    await graph.record_deliberation(deliberation(story, plan_id=""))
    assert "One table" in (await graph.build_pack(query(story))).context
    added = ContextDecisionAdded(
        story_id=story,
        decision_id="D-9",
        title="No SMS",
        rationale="Cost",
        decided_by="bo",
        timestamp=at(9),
    )
    await graph.record(batch(story, added, first=1))

    assert "- **No SMS** (bo): Cost" in (await graph.build_pack(query(story))).context


async def test_decisions_of_tasks_do_not_push_those_of_the_design_out(
    graph: Graph, story: str
) -> None:
    def decided(role: str, number: int) -> DeliberationRecord:
        name = f"{story}-{role}-{number}"
        decision = RecordedDecision(id=name, title=f"{role} {number}", rationale="Enough " * 8)
        return deliberation(
            story, role=role, deliberation_id=name, decisions=[decision], timestamp=at(number)
        )

    await graph.record(batch(story, spec(story), plan(story)))
    await graph.record_deliberation(decided("ARCHITECT", 0))
    for number in range(1, 21):
        await graph.record_deliberation(decided("DEV", number))

    pack = await graph.build_pack(query(story, "ARCHITECT", "DOCS"))

    titles = [line.split("**")[1] for line in pack.context.splitlines() if "Enough" in line]
    assert titles[:3] == ["ARCHITECT 0", "DEV 20", "DEV 19"]
    assert len(titles) < 21


async def test_packs_of_another_task_or_budget_are_other_packs(graph: Graph, story: str) -> None:
    await graph.record(batch(story, spec(story), plan(story)))

    whole = await graph.build_pack(query(story, "QA", "TEST"))
    small = await graph.build_pack(query(story, "QA", "TEST", token_budget=150))
    of_task = await graph.build_pack(query(story, "QA", "TEST", subtask_id=f"{story}-t2"))

    assert small.token_count <= 150 < whole.token_count
    assert of_task.context != whole.context
    assert await graph.build_pack(query(story, "QA", "TEST")) == whole


async def test_a_brief_of_a_megabyte_leaves_room_for_the_rest(graph: Graph, story: str) -> None:
    brief = spec(story).model_copy(update={"brief": "wörd " * 200_000})
    await graph.record(batch(story, brief, plan(story)))

    pack = await graph.build_pack(query(story))

    assert pack.token_count <= 700
    assert "The form" in pack.context


async def test_a_deleted_decision_task_and_event_are_not_shown(
    graph: Graph, driver: AsyncDriver, story: str
) -> None:
    await graph.record(batch(story, *one_of_each(story)))
    await rows(
        driver,
        "MATCH (n {case_id: $story}) WHERE n:Decision OR n:Event OR n:Subtask "
        "SET n.status = 'DELETED'",
        story=story,
    )

    pack = await graph.build_pack(query(story, "QA", "TEST"))

    assert "## Decisions" not in pack.context
    assert "## Tasks" not in pack.context
    assert "DEMO" not in pack.context
    assert "DRAFT -> DESIGN" in pack.context


async def test_the_summary_that_another_system_keeps_is_in_packs_and_sessions_without_its_secrets(
    graph: Graph, client: Redis, story: str
) -> None:
    await graph.record(batch(story, spec(story), plan(story)))
    await graph.record_deliberation(deliberation(story))
    pack_query = query(story, "DEV", "DESIGN")
    secret = "ghp_" + "a1B2" * 9

    before = await graph.build_pack(pack_query)
    await client.set(f"swe:case:{story}:summaries:last", f"The form works.\n\nToken {secret}")
    after = await graph.build_pack(pack_query)
    session = await graph.read_session(story, events=0, summary=True)
    without = await graph.build_pack(query(story, "DEV", "BUILD"))
    await client.delete(f"swe:case:{story}:summaries:last")
    await client.rpush(f"swe:case:{story}:summaries:last", "of another type")
    other = await graph.build_pack(pack_query)

    assert "The form works" not in before.context
    lines = after.context.splitlines()
    place = lines.index("## The last summary")
    assert lines[place + 1] == "The form works. Token [REDACTED]"
    assert "approach 1" in lines[place + 2]
    assert session.summary == "The form works.\n\nToken [REDACTED]"
    assert "The form works" not in without.context
    assert other.context == before.context


async def test_a_pack_is_kept_for_the_calls_that_refer_to_it(
    graph: Graph, client: Redis, story: str
) -> None:
    built = await graph.build_pack(query(story))
    kept = await graph.keep_pack(query(story).model_copy(update={"background": "Before that: X."}))

    assert (kept.system, kept.context, kept.tools) == ("", "", "")
    assert kept.version == built.version
    text = await client.get(kept.kept_at)
    assert text is not None
    assert ContextPack.model_validate_json(text) == built.model_copy(
        update={"context": f"{built.context}\n\nBefore that: X."}
    )


async def test_a_pack_has_what_others_wrote_for_a_story_with_their_own_keys(
    graph: Graph, driver: AsyncDriver, story: str
) -> None:
    await rows(
        driver,
        "CREATE (c:Case {case_id: $story, title: 'Written by others', status: 'DRAFT'}) "
        "CREATE (c)-[:HAS_DECISION]->(:Decision {decision_id: 'd1', title: 'Keep their keys'})",
        story=story,
    )

    pack = await graph.known_pack(query(story, "ARCHITECT", "DESIGN"))

    assert "Written by others" in pack.context
    assert "Keep their keys" in pack.context
