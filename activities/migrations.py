"""The graph's schema, in versions that every worker applies at its start.

A version, once released, never changes: a later one mends it. Applying is repeatable and safe for
any number of workers at once: each statement says IF NOT EXISTS, and a version is noted as a
`(:Migration {version})` node when all of it is there. Neo4j Community has all that is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import LiteralString, NamedTuple

from neo4j import AsyncDriver, AsyncManagedTransaction, AsyncSession
from neo4j.exceptions import ClientError

MADE_MEANWHILE = "Neo.ClientError.Schema.EquivalentSchemaRuleAlreadyExists"


class Migration(NamedTuple):
    """Schema statements. Each one must be repeatable: IF NOT EXISTS."""

    version: int
    name: str
    statements: tuple[LiteralString, ...]


NOTES_ARE_UNIQUE: LiteralString = (
    "CREATE CONSTRAINT migration_version IF NOT EXISTS "
    "FOR (n:Migration) REQUIRE n.version IS UNIQUE"
)

MIGRATIONS = (
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
            # People and other systems name these within their story: two stories may have a plan-1.
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
)


async def migrate(driver: AsyncDriver, migrations: Sequence[Migration] = MIGRATIONS) -> list[int]:
    """Bring the graph's schema up to date; return the versions that this call applied.

    Raises:
        neo4j.exceptions.Neo4jError: where the data already there breaks a constraint, or the user
            may not change the schema.
    """
    async with driver.session() as session:
        # The note itself must be unique before two workers write it.
        await _make(session, NOTES_ARE_UNIQUE)
        applied = await session.execute_read(_applied)
        new = [each for each in migrations if each.version not in applied]
        for migration in new:
            for statement in migration.statements:
                await _make(session, statement)
            await session.execute_write(_note, migration)
    return [migration.version for migration in new]


async def _applied(tx: AsyncManagedTransaction) -> set[int]:
    result = await tx.run("MATCH (m:Migration) RETURN m.version AS version")
    return {record["version"] async for record in result}


async def _make(session: AsyncSession, statement: LiteralString) -> None:
    try:
        await session.execute_write(_change_schema, statement)
    except ClientError as error:
        # Another worker made it after Neo4j had looked whether it exists.
        if error.code != MADE_MEANWHILE:
            raise


async def _change_schema(tx: AsyncManagedTransaction, statement: LiteralString) -> None:
    """One statement in a managed transaction: workers at once wait for each other's locks."""
    await (await tx.run(statement)).consume()


async def _note(tx: AsyncManagedTransaction, migration: Migration) -> None:
    result = await tx.run(
        "MERGE (m:Migration {version: $version}) ON CREATE SET m.name = $name, m.applied_at = $at",
        version=migration.version,
        name=migration.name,
        at=datetime.now(UTC).isoformat(),
    )
    await result.consume()
