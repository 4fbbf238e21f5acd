"""Councils: read from councils.yaml into the graph once, and seated from the graph.

The graph is the truth. A council that is there already is never changed by the file, so what
operators changed (agents, models, personas, a removed agent) stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from neo4j import AsyncDriver, AsyncManagedTransaction
from pydantic import Field, ValidationError, field_validator, model_validator
from temporalio.exceptions import ApplicationError

from workflows.models import (
    Agent,
    AgentType,
    Council,
    CouncilQuery,
    Id,
    Part,
    Role,
    invalid_input,
)

MOCK_REFUSED = "Mock agents not allowed in production"
MOCK_AGENT = "MockAgent"
INVALID_CONFIG = "InvalidConfig"
UNKNOWN_COUNCIL = "UnknownCouncil"
COUNCIL_TOO_SMALL = "CouncilTooSmall"
INVALID_AGENT = "InvalidAgent"

JUDGES = "ARCHITECT"
"""The council whose agents judge near ties (design section 3)."""


class Seat(Part):
    """An agent of councils.yaml. `agent_type` None, `model` empty: the fleet's default."""

    agent_id: Id
    agent_type: AgentType | None = None
    model: str = ""
    persona: Annotated[str, Field(min_length=1, max_length=2_000)]

    @field_validator("agent_type", mode="before")
    @classmethod
    def _no_mock(cls, value: Any) -> Any:
        return refuse_mock(value)


class Councils(Part):
    """councils.yaml: the agents of each role's council."""

    councils: dict[Role, Annotated[list[Seat], Field(min_length=1, max_length=50)]]

    @model_validator(mode="after")
    def _each_agent_once(self) -> Councils:
        ids = [seat.agent_id for seats in self.councils.values() for seat in seats]
        twice = sorted({agent_id for agent_id in ids if ids.count(agent_id) > 1})
        if twice:
            raise ValueError(f"an agent sits in one council, once; not so {', '.join(twice)}")
        return self


def refuse_mock(agent_type: Any) -> Any:
    """The agent type as it was, unless it asks for a mock.

    Raises:
        ApplicationError: `MockAgent`, not retryable.
    """
    if isinstance(agent_type, str) and agent_type.strip().upper() == "MOCK":
        raise ApplicationError(MOCK_REFUSED, type=MOCK_AGENT, non_retryable=True)
    return agent_type


def load_councils(path: Path) -> Councils:
    """Read and check councils.yaml.

    Raises:
        ApplicationError: `InvalidConfig` with the file, the field and the rule; `MockAgent`.
    """
    try:
        return Councils.model_validate(yaml.safe_load(path.read_text()))
    except ValidationError as error:
        what = invalid_input(str(path), error).message
    except (OSError, yaml.YAMLError) as error:
        what = f"{path} cannot be read: {error}"
    raise ApplicationError(what, type=INVALID_CONFIG, non_retryable=True)


SEED = """
UNWIND $councils AS row
CALL (row) {
  MERGE (c:Council {role: row.role}) ON CREATE SET c.id = row.id, c.seeding = true
  WITH c, row WHERE c.seeding
  REMOVE c.seeding
  WITH c, row UNWIND row.agents AS seat
  MERGE (a:Agent {id: seat.id})
  SET a.role = row.role, a.agent_type = seat.agent_type, a.model = seat.model,
      a.persona = seat.persona
  MERGE (c)-[:HAS_AGENT]->(a)
}
"""

COUNCILS = """
MATCH (c:Council) WHERE coalesce(c.status, '') <> 'DELETED'
OPTIONAL MATCH (c)-[:HAS_AGENT]->(a:Agent) WHERE coalesce(a.status, '') <> 'DELETED'
WITH c, a ORDER BY a.id
RETURN c.role AS role, c.id AS id,
       collect(a {.agent_type, .model, .persona, agent_id: a.id, role: c.role}) AS agents
ORDER BY role
"""


async def seed_councils(
    driver: AsyncDriver, path: Path, agent_type: AgentType = "RAY_VLLM"
) -> None:
    """Make the councils of the file that the graph does not have yet; safe for many at once.

    `agent_type`: of the agents that name none.

    Raises:
        ApplicationError: as `load_councils`.
        neo4j.exceptions.Neo4jError, neo4j.exceptions.DriverError: where Neo4j did not do it.
    """
    councils = [
        {
            "role": role,
            "id": f"council-{role.lower()}",
            "agents": [
                {
                    **seat.model_dump(),
                    "id": seat.agent_id,
                    "agent_type": seat.agent_type or agent_type,
                }
                for seat in seats
            ],
        }
        for role, seats in load_councils(path).councils.items()
    ]
    async with driver.session() as session:
        await session.execute_write(_seed, councils)


async def _seed(tx: AsyncManagedTransaction, councils: list[dict[str, Any]]) -> None:
    await (await tx.run(SEED, councils=councils)).consume()


def seat(rows: Sequence[dict[str, Any]], query: CouncilQuery) -> Council:
    """The council that is asked for, of COUNCILS' rows.

    Its agents are the first by id. The judge is the first architect who does not sit in it; where
    all do, the first of them.

    Raises:
        ApplicationError: not retryable: `UnknownCouncil` names the roles there are,
            `CouncilTooSmall` the size, `InvalidAgent` the agent and field, `MockAgent`.
    """
    councils = {row["role"]: row for row in rows}
    if query.role not in councils:
        there = ", ".join(sorted(councils)) or "none"
        raise ApplicationError(
            f"no council for role {query.role!r}; there are: {there}",
            type=UNKNOWN_COUNCIL,
            non_retryable=True,
        )
    row = councils[query.role]
    agents = [_agent(each) for each in row["agents"]]
    size = len(agents) if query.size is None else query.size
    if size > len(agents) or not agents:
        raise ApplicationError(
            f"the {query.role} council has {len(agents)} agents, {max(size, 1)} were asked for; "
            "ask for fewer, or add agents to it",
            type=COUNCIL_TOO_SMALL,
            non_retryable=True,
        )
    seated = agents[:size]
    judges = [_agent(each) for each in councils.get(JUDGES, {"agents": []})["agents"]]
    free = [judge for judge in judges if judge not in seated]
    return Council(
        council_id=row["id"] or f"council-{query.role.lower()}",
        role=query.role,
        agents=seated,
        judge=next(iter(free or judges), None),
        roles=sorted(councils),
    )


def _agent(row: dict[str, Any]) -> Agent:
    refuse_mock(row["agent_type"])
    try:
        return Agent.model_validate({name: value for name, value in row.items() if value})
    except ValidationError as error:
        raise ApplicationError(
            invalid_input(f"agent {row['agent_id']}", error).message,
            type=INVALID_AGENT,
            non_retryable=True,
        ) from None
