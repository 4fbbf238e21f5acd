"""The graph's schema, in versions that every worker applies when it starts.

A released version never changes; later versions correct it, and none is undone. One worker applies
a version while the others wait. It may end in the middle of that: each schema statement has IF NOT
EXISTS, each repair does nothing when it runs again, and a version is recorded as a
`(:Migration {version})` node with the commit after all of it was applied. Older code ignores
versions that it does not know. Neo4j Community is sufficient.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, LiteralString, NamedTuple, TypeVar

from neo4j import AsyncDriver, AsyncManagedTransaction, AsyncSession, AsyncTransaction
from neo4j.exceptions import ClientError

from activities.graph.stories import LABELS, MERGE_NODES, READERS, adopt_all, all_unadopted
from activities.graph.values import instant
from workflows.timestamps import format_timestamp

T = TypeVar("T")

MADE_MEANWHILE = "Neo.ClientError.Schema.EquivalentSchemaRuleAlreadyExists"


class Migration(NamedTuple):
    """Schema statements, followed by a repair of the data; both must be repeatable."""

    version: int
    name: str
    statements: tuple[LiteralString, ...]
    repair: Callable[[AsyncSession], Awaitable[None]] | None = None


AT_ONCE = 1_000
"""Number of nodes that a repair changes in one transaction."""

DATA: LiteralString = "MATCH (n) WHERE NOT n:Migration RETURN 1 LIMIT 1"
"""Finds a row unless the graph is empty. An empty graph needs no repair, and Neo4j takes seconds to
plan the statements of a repair."""

OTHER_KEYS: LiteralString = """
SHOW CONSTRAINTS YIELD name, type, labelsOrTypes, properties
WHERE type = 'UNIQUENESS' AND properties = ['id'] AND labelsOrTypes[0] IN $labels
RETURN name
"""

TIMES: tuple[tuple[str, str], ...] = (
    ("Case", "created_at"),
    ("Decision", "decided_at"),
    ("PhaseTransition", "timestamp"),
    ("PlanApproval", "timestamp"),
    ("TaskDispatch", "timestamp"),
    ("GateApproval", "at"),
    ("Proposal", "recorded_at"),
    ("ContextUpdate", "at"),
)
"""Labels and properties that hold a time as text."""

UTC_TEXT = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


async def _remove_what_constraints_refuse(session: AsyncSession) -> None:
    """Prepare a graph that another system wrote for the first constraints.

    Such a system may have constraints that make ids globally unique, which are unique within their
    story here, and may have created a node twice.
    """
    names = await session.execute_read(_column, OTHER_KEYS, labels=list(LABELS))
    for name in names:
        await session.execute_write(_column, "DROP CONSTRAINT $name IF EXISTS", name=name)
    for label in ("Case", "Story", *LABELS):
        case_id = "" if label in ("Case", "Story") else "n.case_id"
        duplicates = (
            f"MATCH (n:{label}) WITH [{case_id or 'n.id'}, n.id] AS key, n ORDER BY elementId(n) "
            "WHERE all(part IN key WHERE part IS NOT NULL) "
            "WITH key, collect(n) AS nodes WHERE size(nodes) > 1 "
        )
        await session.execute_write(_column, duplicates + MERGE_NODES)


async def _adopt_everything(session: AsyncSession) -> None:
    """Adopt every story that others wrote, and complete nodes from older versions of the fleet."""
    unadopted = await session.execute_read(all_unadopted)
    for some in _chunks(sorted(unadopted), 100):
        await session.execute_write(adopt_all, some)
    for statement in READERS:
        counted = f"{statement} RETURN count(*) AS changed"
        while await session.execute_write(_column, counted, limit=AT_ONCE) != [0]:
            pass
    for label, name in TIMES:
        await _store_in_utc(session, label, name)


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[first : first + size] for first in range(0, len(items), size))


async def _store_in_utc(session: AsyncSession, label: str, name: str) -> None:
    """Rewrite the label's times that are not UTC in milliseconds; other values stay."""
    found = await session.execute_read(
        _rows,
        f"MATCH (n:{label}) WHERE n[$name] IS :: STRING NOT NULL AND NOT n[$name] =~ $utc "
        "RETURN elementId(n) AS node, n[$name] AS text",
        name=name,
        utc=UTC_TEXT,
    )
    times = [
        {"node": row["node"], "text": row["text"], "time": format_timestamp(at)}
        for row in found
        if (at := instant(row["text"])) is not None
    ]
    for some in _chunks(times, AT_ONCE):
        await session.execute_write(
            _column,
            f"UNWIND $times AS row MATCH (n:{label}) "
            "WHERE elementId(n) = row.node AND n[$name] = row.text SET n[$name] = row.time",
            name=name,
            times=some,
        )


NOTES_ARE_UNIQUE: LiteralString = (
    "CREATE CONSTRAINT migration_version IF NOT EXISTS "
    "FOR (n:Migration) REQUIRE n.version IS UNIQUE"
)

MIGRATIONS = (
    Migration(0, "what the constraints would refuse", (), _remove_what_constraints_refuse),
    Migration(
        1,
        "uniqueness of ids, and the indexes that reads use",
        (
            "CREATE CONSTRAINT case_id IF NOT EXISTS FOR (n:Case) REQUIRE n.id IS UNIQUE",
            "CREATE CONSTRAINT story_id IF NOT EXISTS FOR (n:Story) REQUIRE n.id IS UNIQUE",
            "CREATE CONSTRAINT phase_transition_id IF NOT EXISTS "
            "FOR (n:PhaseTransition) REQUIRE n.id IS UNIQUE",
            "CREATE CONSTRAINT plan_approval_id IF NOT EXISTS "
            "FOR (n:PlanApproval) REQUIRE n.id IS UNIQUE",
            "CREATE CONSTRAINT gate_approval_id IF NOT EXISTS "
            "FOR (n:GateApproval) REQUIRE n.id IS UNIQUE",
            "CREATE CONSTRAINT task_dispatch_id IF NOT EXISTS "
            "FOR (n:TaskDispatch) REQUIRE n.id IS UNIQUE",
            "CREATE CONSTRAINT proposal_id IF NOT EXISTS FOR (n:Proposal) REQUIRE n.id IS UNIQUE",
            "CREATE CONSTRAINT critique_id IF NOT EXISTS FOR (n:Critique) REQUIRE n.id IS UNIQUE",
            "CREATE CONSTRAINT check_id IF NOT EXISTS FOR (n:Check) REQUIRE n.id IS UNIQUE",
            "CREATE CONSTRAINT council_role IF NOT EXISTS FOR (n:Council) REQUIRE n.role IS UNIQUE",
            "CREATE CONSTRAINT agent_id IF NOT EXISTS FOR (n:Agent) REQUIRE n.id IS UNIQUE",
            # Unique within their story, because people name them: two stories may have a plan-1.
            "CREATE CONSTRAINT plan_version_id IF NOT EXISTS "
            "FOR (n:PlanVersion) REQUIRE (n.case_id, n.id) IS UNIQUE",
            "CREATE CONSTRAINT subtask_id IF NOT EXISTS "
            "FOR (n:Subtask) REQUIRE (n.case_id, n.id) IS UNIQUE",
            "CREATE CONSTRAINT decision_id IF NOT EXISTS "
            "FOR (n:Decision) REQUIRE (n.case_id, n.id) IS UNIQUE",
            "CREATE CONSTRAINT event_id IF NOT EXISTS "
            "FOR (n:Event) REQUIRE (n.case_id, n.id) IS UNIQUE",
            "CREATE INDEX subtask_case IF NOT EXISTS FOR (n:Subtask) ON (n.case_id)",
            "CREATE INDEX decision_case IF NOT EXISTS FOR (n:Decision) ON (n.case_id)",
            "CREATE INDEX decision_by_id IF NOT EXISTS FOR (n:Decision) ON (n.id)",
            "CREATE INDEX plan_by_id IF NOT EXISTS FOR (n:PlanVersion) ON (n.id)",
            "CREATE INDEX subtask_by_id IF NOT EXISTS FOR (n:Subtask) ON (n.id)",
            "CREATE INDEX proposal_deliberation IF NOT EXISTS "
            "FOR (n:Proposal) ON (n.deliberation_id)",
        ),
    ),
    Migration(
        2,
        "updates of the context by their id",
        (
            "CREATE CONSTRAINT context_update_id IF NOT EXISTS "
            "FOR (n:ContextUpdate) REQUIRE n.id IS UNIQUE",
        ),
    ),
    Migration(
        3,
        "stories that others wrote, times in UTC, decisions' revisions",
        (
            "CREATE INDEX case_by_case_id IF NOT EXISTS FOR (n:Case) ON (n.case_id)",
            "CREATE INDEX story_by_case_id IF NOT EXISTS FOR (n:Story) ON (n.case_id)",
            "CREATE INDEX story_by_story_id IF NOT EXISTS FOR (n:Story) ON (n.story_id)",
            "CREATE CONSTRAINT decision_revision_key IF NOT EXISTS "
            "FOR (n:DecisionRevision) REQUIRE (n.case_id, n.decision_id, n.order) IS UNIQUE",
        ),
        _adopt_everything,
    ),
    Migration(
        4,
        "deliberations, and the ids of what came on the bus",
        (
            "CREATE CONSTRAINT deliberation_id IF NOT EXISTS "
            "FOR (n:Deliberation) REQUIRE n.id IS UNIQUE",
            "CREATE CONSTRAINT received_id IF NOT EXISTS FOR (n:Received) REQUIRE n.id IS UNIQUE",
        ),
    ),
    Migration(
        5,
        "when messages were received",
        (
            "CREATE INDEX received_ms IF NOT EXISTS FOR (n:Received) ON (n.received_ms)",
            "MATCH (n:Received) WHERE n.received_ms IS NULL SET n.received_ms = timestamp()",
        ),
    ),
    Migration(
        6,
        "changes in repositories, and their reports",
        (
            "CREATE CONSTRAINT change_id IF NOT EXISTS FOR (n:Change) REQUIRE n.id IS UNIQUE",
            "CREATE CONSTRAINT report_id IF NOT EXISTS FOR (n:Report) REQUIRE n.id IS UNIQUE",
            "CREATE INDEX change_commit IF NOT EXISTS FOR (n:Change) ON (n.commit)",
        ),
    ),
    Migration(
        7,
        "acceptance criteria, and the tests of them",
        (
            "CREATE CONSTRAINT criterion_id IF NOT EXISTS FOR (n:Criterion) REQUIRE n.id IS UNIQUE",
            "CREATE CONSTRAINT acceptance_test_id IF NOT EXISTS "
            "FOR (n:AcceptanceTest) REQUIRE n.id IS UNIQUE",
        ),
    ),
)


async def migrate(driver: AsyncDriver, migrations: Sequence[Migration] = MIGRATIONS) -> list[int]:
    """Bring the graph's schema up to date; return the versions that this call applied.

    Raises:
        neo4j.exceptions.Neo4jError: the existing data violates a constraint, or the user may not
            change the schema.
    """
    applied_here = []
    async with driver.session() as session, driver.session() as notes:
        # Migration nodes must be unique before two workers write one.
        await _make(session, NOTES_ARE_UNIQUE)
        applied = await session.execute_read(_applied)
        for migration in migrations:
            if migration.version in applied:
                continue
            # Until its commit, the note is the lock: another worker's MERGE of it waits.
            async with await notes.begin_transaction() as lock:
                if not await _note(lock, migration):
                    continue  # another worker has applied it in the meantime
                for statement in migration.statements:
                    await _make(session, statement)
                if migration.repair is not None and await _has_data(session):
                    await migration.repair(session)
                await lock.commit()
            applied_here.append(migration.version)
    return applied_here


async def _has_data(session: AsyncSession) -> bool:
    found: list[Any] = await session.execute_read(_column, DATA)
    return bool(found)


async def _applied(tx: AsyncManagedTransaction) -> set[int]:
    result = await tx.run("MATCH (m:Migration) RETURN m.version AS version")
    return {record["version"] async for record in result}


async def _make(session: AsyncSession, statement: LiteralString) -> None:
    try:
        await session.execute_write(_change_schema, statement)
    except ClientError as error:
        # A worker created it after Neo4j checked whether it exists.
        if error.code != MADE_MEANWHILE:
            raise


async def _change_schema(tx: AsyncManagedTransaction, statement: LiteralString) -> None:
    """Run one statement in a managed transaction; concurrent workers wait for its locks."""
    await (await tx.run(statement)).consume()


async def _note(tx: AsyncTransaction, migration: Migration) -> bool:
    """Record the version; return False if it is recorded already."""
    result = await tx.run(
        "MERGE (m:Migration {version: $version}) ON CREATE SET m.name = $name, m.applied_at = $at",
        version=migration.version,
        name=migration.name,
        at=datetime.now(UTC).isoformat(),
    )
    return (await result.consume()).counters.nodes_created == 1


async def _column(tx: AsyncManagedTransaction, /, cypher: str, **parameters: Any) -> list[Any]:
    """Run a query and return the first value of each row."""
    return [record[0] async for record in await tx.run(cypher, parameters)]


async def _rows(tx: AsyncManagedTransaction, /, cypher: str, **parameters: Any) -> list[Any]:
    return await (await tx.run(cypher, parameters)).data()
