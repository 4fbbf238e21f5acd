"""Migrations of the graph while several workers, and two versions of the code, are running."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import neo4j
import pytest

from activities.graph import migrations
from activities.graph.activities import Graph
from activities.graph.changes import Claim
from activities.graph.migrations import MIGRATIONS, Migration, migrate
from tests.support.stories import at, batch, deliberation, new_story, one_of_each, rows
from workflows.models.context import PackQuery

NEWEST = MIGRATIONS[-1].version

CLAIM_BEFORE_VERSION_5: Any = """
UNWIND $rows AS row
MERGE (n:Received {id: row.id})
  ON CREATE SET n.content = row.content, n.story_id = row.story_id, n.at = row.at
WITH n, row WHERE n.content <> row.content
RETURN row.id AS id
"""


@pytest.fixture(autouse=True)
async def up_to_date(driver: neo4j.AsyncDriver) -> AsyncIterator[None]:
    """Leave the schema of the newest version to other tests."""
    yield
    await rows(driver, "MATCH (m:Migration) WHERE m.version > $newest DELETE m", newest=NEWEST)
    await migrate(driver)


async def reduce_schema(driver: neo4j.AsyncDriver, version: int) -> None:
    """Give the graph the schema that it had with an earlier version of the code."""
    for [name] in await rows(driver, "SHOW CONSTRAINTS YIELD name RETURN name"):
        await rows(driver, f"DROP CONSTRAINT {name}")
    for [name] in await rows(
        driver, "SHOW INDEXES YIELD name, type WHERE type <> 'LOOKUP' RETURN name"
    ):
        await rows(driver, f"DROP INDEX {name}")
    await rows(driver, "MATCH (m:Migration) DELETE m")
    await migrate(driver, code_of(version))


def code_of(version: int) -> list[Migration]:
    """Return the migrations that the code had when this version was its newest."""
    return [each for each in MIGRATIONS if each.version <= version]


async def has_data(driver: neo4j.AsyncDriver) -> None:
    """Give the graph data that a migration repairs."""
    await rows(driver, "MERGE (:Case {id: $id})", id=new_story())


async def versions(driver: neo4j.AsyncDriver) -> list[int]:
    found = await rows(driver, "MATCH (m:Migration) RETURN m.version ORDER BY m.version")
    return [version for [version] in found]


async def nodes_of(driver: neo4j.AsyncDriver, story: str) -> list[list[Any]]:
    return await rows(
        driver,
        "MATCH (n) WHERE $story IN [n.id, n.case_id, n.story_id] "
        "RETURN labels(n)[0] AS label, count(*) ORDER BY label",
        story=story,
    )


async def test_any_number_of_workers_migrate_at_once(driver: neo4j.AsyncDriver) -> None:
    await reduce_schema(driver, -1)

    applied = await asyncio.gather(*(migrate(driver) for _ in range(6)))

    expected = [migration.version for migration in MIGRATIONS]
    assert sorted(version for some in applied for version in some) == expected
    assert await versions(driver) == expected
    assert await migrate(driver) == []


async def test_one_worker_repairs_while_the_others_wait(driver: neo4j.AsyncDriver) -> None:
    repairs = 0

    async def repair(session: neo4j.AsyncSession) -> None:
        nonlocal repairs
        repairs += 1
        for _ in range(20):  # round trips, in which the others could begin
            await (await session.run("RETURN 1")).consume()

    new = Migration(NEWEST + 1, "a repair", (), repair)
    await has_data(driver)
    await asyncio.gather(*(migrate(driver, [*MIGRATIONS, new]) for _ in range(6)))

    assert repairs == 1


async def test_a_migration_that_failed_is_applied_by_the_next_worker(
    driver: neo4j.AsyncDriver,
) -> None:
    async def fail(session: neo4j.AsyncSession) -> None:
        raise ConnectionResetError

    await has_data(driver)
    with pytest.raises(ConnectionResetError):
        await migrate(driver, [*MIGRATIONS, Migration(NEWEST + 1, "fails", (), fail)])

    assert NEWEST + 1 not in await versions(driver)
    again = [*MIGRATIONS, Migration(NEWEST + 1, "succeeds", ())]
    assert await migrate(driver, again) == [NEWEST + 1]


async def test_an_empty_graph_is_not_repaired(
    driver: neo4j.AsyncDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def repair(session: neo4j.AsyncSession) -> None:
        raise AssertionError("there is nothing to repair")

    monkeypatch.setattr(migrations, "DATA", "MATCH (n:NoSuchLabel) RETURN 1 LIMIT 1")
    new = Migration(NEWEST + 1, "a repair", (), repair)
    assert await migrate(driver, [*MIGRATIONS, new]) == [NEWEST + 1]


@pytest.mark.parametrize("version", range(NEWEST))
async def test_older_code_that_starts_leaves_the_newest_schema(
    driver: neo4j.AsyncDriver, version: int
) -> None:
    schema = "SHOW CONSTRAINTS YIELD name RETURN name UNION SHOW INDEXES YIELD name RETURN name"
    before = [await rows(driver, part) for part in schema.split(" UNION ")]

    assert await migrate(driver, code_of(version)) == []

    assert [await rows(driver, part) for part in schema.split(" UNION ")] == before
    assert await versions(driver) == [each.version for each in MIGRATIONS]


@pytest.mark.parametrize("schema", [4, 5])
async def test_two_versions_claim_the_ids_of_messages_side_by_side(
    graph: Graph, driver: neo4j.AsyncDriver, schema: int
) -> None:
    """Code before version 5 and today's, on the schema of either."""
    await reduce_schema(driver, schema)
    story = new_story()
    by_old, by_new = (Claim(f"{story}-{who}", "content", story, at(0)) for who in ("old", "new"))

    async def claim_with_old_code(claim: Claim) -> list[list[Any]]:
        return await rows(driver, CLAIM_BEFORE_VERSION_5, rows=[claim._asdict()])

    assert await claim_with_old_code(by_old) == []
    assert await graph.claim([by_new]) == []

    used_twice = by_old._replace(content="another")
    assert await graph.claim([by_old, used_twice]) == [used_twice]
    assert await claim_with_old_code(by_new) == []
    assert await claim_with_old_code(by_new._replace(content="another")) == [[by_new.id]]


@pytest.mark.parametrize("version", [1, NEWEST - 1])
async def test_todays_code_records_a_story_on_an_older_schema(
    graph: Graph, driver: neo4j.AsyncDriver, version: int
) -> None:
    """As after the restore of an old backup, until a worker starts again."""
    usual, story = new_story(), new_story()
    for each in (usual, story):
        if each == story:
            await reduce_schema(driver, version)
        for _ in range(2):  # an activity may be repeated
            for number, body in enumerate(one_of_each(each)):
                await graph.record(batch(each, body, first=number))
            await graph.record_deliberation(deliberation(each))
    recorded = await nodes_of(driver, story)
    query = PackQuery(story_id=story, role="ARCHITECT", phase="BUILD")
    pack = await graph.build_pack(query)

    assert recorded == await nodes_of(driver, usual)
    await migrate(driver)
    assert await nodes_of(driver, story) == recorded
    assert (await graph.build_pack(query)).context == pack.context
