"""Councils: read from councils.yaml into the graph once, then changed and loaded there.

The graph is the source of truth. The file never changes a council that exists already, so the
changes of operators (agents, models, personas, a removed agent) stay.

Every change takes the locks of all councils first. Changes are rare and run one after the other,
so an agent never belongs to two councils, and no council is left empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any

from neo4j import AsyncDriver, AsyncManagedTransaction
from pydantic import Field, ValidationError, field_validator, model_validator

from activities.config import InvalidConfig, read_config
from activities.graph.errors import store_errors
from activities.graph.tracing import open_session
from activities.graph.values import Number, Row, Text, Texts
from workflows.models.agents import MAX_AGENTS, Agent, Council, CouncilQuery, refuse_mock
from workflows.models.base import AgentType, Model, Section
from workflows.models.errors import ErrorType, application_error, invalid_input
from workflows.models.ids import Id, Role, council_id

JUDGES = "ARCHITECT"
"""The role of the council whose agents judge near ties."""


class ConfiguredAgent(Section):
    """An agent of councils.yaml. `agent_type` None, `model` empty: the fleet's default."""

    agent_id: Id
    agent_type: AgentType | None = None
    model: str = ""
    persona: Annotated[str, Field(min_length=1, max_length=2_000)]

    @field_validator("agent_type", mode="before")
    @classmethod
    def _no_mock(cls, value: Any) -> Any:
        return refuse_mock(value)


class Councils(Section):
    """councils.yaml: the agents of each role's council."""

    councils: dict[Role, Annotated[list[ConfiguredAgent], Field(min_length=1, max_length=50)]]

    @model_validator(mode="after")
    def _each_agent_once(self) -> Councils:
        ids = [seat.agent_id for seats in self.councils.values() for seat in seats]
        twice = sorted({agent_id for agent_id in ids if ids.count(agent_id) > 1})
        if twice:
            raise ValueError(
                "an agent may be listed once, in one council; listed more than once: "
                + ", ".join(twice)
            )
        return self


def load_councils(path: Path) -> Councils:
    """Read and check councils.yaml.

    Raises:
        ApplicationError: `InvalidConfig` with the file, the field and the rule; `MockAgent`.
    """
    try:
        return read_config(path, Councils)
    except InvalidConfig as error:
        raise error.final() from error


class NewAgent(Section):
    """An agent to add to a council, or the changes of one that is in it.

    `agent_type` None: the agent keeps its type, and a new one gets the default. `endpoint` is the
    address that the agent gives; it is always called over the bus. `max_concurrent_tasks` 0 and
    empty texts mean that nothing was given.
    """

    agent_id: Id
    agent_type: AgentType | None
    model: str = ""
    persona: str = ""
    endpoint: str = ""
    supported_tasks: list[str] = []
    languages: list[str] = []
    max_concurrent_tasks: int = 0
    metadata: str = ""
    """JSON: more details from its owner; stored, but not used."""


class NewCouncil(Section):
    """A council to create with `size` identical agents. `rounds` 0: the default."""

    role: Role
    size: Annotated[int, Field(ge=1, le=MAX_AGENTS)]
    agent_type: AgentType
    model: str = ""
    rounds: int = 0


class StandingAgent(Model):
    """An agent of a council, as stored in the graph."""

    agent_id: str
    role: str
    agent_type: str = ""
    model: str = ""
    endpoint: str = ""
    supported_tasks: list[str] = []
    languages: list[str] = []
    max_concurrent_tasks: int = 0


class StoredCouncil(Model):
    """A council and its agents, ordered by id."""

    council_id: str
    role: str
    agents: list[StandingAgent] = []


class _SeatRow(Row):
    agent_id: Text
    role: Text
    agent_type: Text = ""
    model: Text = ""
    persona: Text = ""
    endpoint: Text = ""
    supported_tasks: Texts = []
    languages: Texts = []
    max_concurrent_tasks: Number = 0


class _CouncilRow(Row):
    role: Text
    id: Text
    rounds: Number
    agents: list[_SeatRow]


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
RETURN c.role AS role, c.id AS id, coalesce(c.rounds, 0) AS rounds,
       collect(a {.agent_type, .model, .persona, .endpoint, .supported_tasks, .languages,
                  .max_concurrent_tasks, agent_id: a.id, role: c.role}) AS agents
ORDER BY role
"""

LOCK = """
MATCH (c:Council) WITH c ORDER BY c.role SET c.id = c.id
"""

CREATE = """
MERGE (c:Council {role: $role}) ON CREATE SET c.status = 'DELETED'
SET c.id = coalesce(c.id, $id)
WITH c WHERE c.status = 'DELETED'
CALL (c) { MATCH (c)-[had:HAS_AGENT]->(:Agent) DELETE had }
REMOVE c.status
SET c.rounds = $rounds
RETURN c.id AS id
"""

NAMED_SO = """
MATCH (:Council)-[:HAS_AGENT]->(a:Agent)
WHERE a.id STARTS WITH $prefix AND coalesce(a.status, '') <> 'DELETED'
RETURN a.id AS id
"""

SEAT = """
MATCH (c:Council {role: $role})
UNWIND $agents AS seat
MERGE (a:Agent {id: seat.id})
SET a += seat.node, a.role = $role
REMOVE a.status
WITH c, a
CALL (a) { MATCH (:Council)-[had:HAS_AGENT]->(a) DELETE had }
MERGE (c)-[:HAS_AGENT]->(a)
"""

REMOVE = """
MATCH (:Council {role: $role})-[:HAS_AGENT]->(a:Agent {id: $agent_id}) SET a.status = 'DELETED'
"""


async def seed_councils(
    driver: AsyncDriver, path: Path, agent_type: AgentType = "RAY_VLLM"
) -> None:
    """Create the councils of the file that the graph does not have; safe to run concurrently.

    Args:
        driver: Neo4j.
        path: councils.yaml.
        agent_type: the type of agents that name none.

    Raises:
        ApplicationError: as in `load_councils`.
        neo4j.exceptions.Neo4jError, neo4j.exceptions.DriverError: if Neo4j fails.
    """
    councils = [
        {
            "role": role,
            "id": council_id(role),
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
    async with open_session(driver) as session:
        await session.execute_write(_seed, councils)


async def _seed(tx: AsyncManagedTransaction, councils: list[dict[str, Any]]) -> None:
    await (await tx.run(SEED, councils=councils)).consume()


def choose_council(rows: Sequence[dict[str, Any]], query: CouncilQuery) -> Council:
    """Return the requested council from the rows of `read_councils`.

    It has the first agents by id. The judge is the first architect who is not one of them; if all
    architects are, the first of them.

    Raises:
        ApplicationError: not retryable: `UnknownCouncil` names the existing roles,
            `CouncilTooSmall` the size, `InvalidAgent` the agent and field, `MockAgent`.
    """
    councils = {row["role"]: row for row in rows}
    row = _council(rows, query.role)
    agents = [_agent(each) for each in row["agents"]]
    size = len(agents) if query.size is None else query.size
    if size > len(agents) or not agents:
        raise application_error(
            ErrorType.COUNCIL_TOO_SMALL,
            f"the {query.role} council has {len(agents)} agents, {max(size, 1)} were asked for; "
            "ask for fewer, or add agents to it",
        )
    seated = agents[:size]
    judges = [_agent(each) for each in councils.get(JUDGES, {"agents": []})["agents"]]
    free = [judge for judge in judges if judge not in seated]
    return Council(
        council_id=row["id"] or council_id(query.role),
        role=query.role,
        agents=seated,
        judge=next(iter(free or judges), None),
        roles=sorted(councils),
        rounds=row["rounds"],
    )


def _council(rows: Sequence[dict[str, Any]], role: str) -> dict[str, Any]:
    for row in rows:
        if row["role"] == role:
            return row
    there = ", ".join(sorted(row["role"] for row in rows)) or "none"
    raise application_error(
        ErrorType.UNKNOWN_COUNCIL, f"no council for role {role[:100]!r}; there are: {there}"
    )


def _agent(row: dict[str, Any]) -> Agent:
    refuse_mock(row["agent_type"])
    try:
        return Agent.model_validate({name: value for name, value in row.items() if value})
    except ValidationError as error:
        raise application_error(
            ErrorType.INVALID_AGENT, invalid_input(f"agent {row['agent_id']}", error).message
        ) from None


# --- changes --------------------------------------------------------------------------------------


async def find_councils(driver: AsyncDriver) -> list[StoredCouncil]:
    """Return every council, ordered by role.

    Raises:
        ApplicationError: by `errors.TABLE`, as in every function here that takes a driver.
    """
    with store_errors():
        async with open_session(driver) as session:
            rows = await session.execute_read(read_councils)
    return [
        StoredCouncil(
            council_id=row["id"] or council_id(row["role"]),
            role=row["role"],
            agents=[StandingAgent.model_validate(agent) for agent in row["agents"]],
        )
        for row in rows
    ]


async def create_council(driver: AsyncDriver, council: NewCouncil) -> list[str]:
    """Create a council with its agents, and return the agents' ids.

    Raises:
        ApplicationError: `AlreadyExists`.
    """
    with store_errors():
        async with open_session(driver) as session:
            return await session.execute_write(_create, council)


async def register_agent(
    driver: AsyncDriver, role: str, agent: NewAgent, default_type: AgentType
) -> str:
    """Add an agent to a council or update it there, and return the council's id.

    `default_type` is the type of a new agent that names none.

    Raises:
        ApplicationError: `UnknownCouncil`; `AlreadyExists`: it belongs to another council;
            `InvalidAgent`: the council is full.
    """
    with store_errors():
        async with open_session(driver) as session:
            return await session.execute_write(_register, role, agent, default_type)


async def unregister_agent(driver: AsyncDriver, agent_id: str, role: str = "") -> str:
    """Remove an agent from its council, and return the council's role.

    An empty `role` stands for the agent's council, whichever that is.

    Raises:
        ApplicationError: `UnknownCouncil`; `NotFound`: the agent is not in it; `CouncilTooSmall`:
            no agent would be left.
    """
    with store_errors():
        async with open_session(driver) as session:
            return await session.execute_write(_unregister, agent_id, role)


async def read_councils(tx: AsyncManagedTransaction) -> list[dict[str, Any]]:
    """Read the councils by role, without those that have no role and agents that have no id."""
    rows = [_CouncilRow.model_validate(row) for row in await (await tx.run(COUNCILS)).data()]
    return [
        row.model_dump() | {"agents": [seat.model_dump() for seat in row.agents if seat.agent_id]}
        for row in rows
        if row.role
    ]


async def _locked(tx: AsyncManagedTransaction) -> list[dict[str, Any]]:
    """Lock the councils until the transaction ends, and read them."""
    await (await tx.run(LOCK)).consume()
    return await read_councils(tx)


async def _create(tx: AsyncManagedTransaction, council: NewCouncil) -> list[str]:
    await _locked(tx)
    made = await tx.run(
        CREATE,
        role=council.role,
        id=council_id(council.role),
        rounds=council.rounds,
    )
    if await made.single() is None:
        raise application_error(
            ErrorType.ALREADY_EXISTS,
            f"the {council.role} council exists already; add agents to it by RegisterAgent",
        )
    prefix = f"agent-{council.role.lower()}-"
    taken = {row["id"] for row in await (await tx.run(NAMED_SO, prefix=prefix)).data()}
    free = (name for number in count(1) if (name := f"{prefix}{number:03d}") not in taken)
    agents = [
        NewAgent(agent_id=name, agent_type=council.agent_type, model=council.model)
        for name in islice(free, council.size)
    ]
    await (
        await tx.run(SEAT, role=council.role, agents=[_new(agent) for agent in agents])
    ).consume()
    return [agent.agent_id for agent in agents]


async def _register(
    tx: AsyncManagedTransaction, role: str, agent: NewAgent, default_type: AgentType
) -> str:
    rows = await _locked(tx)
    council = _council(rows, role)
    seats = _seats(rows)
    elsewhere = seats.get(agent.agent_id, role)
    if elsewhere != role:
        raise application_error(
            ErrorType.ALREADY_EXISTS,
            f"agent {agent.agent_id} sits in the {elsewhere} council; give it another id, or "
            "unregister it there first",
        )
    if agent.agent_id in seats:
        changed = _new(agent)
        seat = {"id": changed["id"], "node": {k: v for k, v in changed["node"].items() if v}}
    elif len(council["agents"]) >= MAX_AGENTS:
        raise application_error(
            ErrorType.INVALID_AGENT,
            f"the {role} council has {MAX_AGENTS} agents, the most it may have; unregister one",
        )
    else:
        seat = _new(agent.model_copy(update={"agent_type": agent.agent_type or default_type}))
    await (await tx.run(SEAT, role=role, agents=[seat])).consume()
    return str(council["id"] or council_id(role))


async def _unregister(tx: AsyncManagedTransaction, agent_id: str, role: str) -> str:
    rows = await _locked(tx)
    if role:
        _council(rows, role)
    sits_in = _seats(rows).get(agent_id, "")
    if not sits_in or (role and sits_in != role):
        where = f"the {role} council" if role else "any council"
        sits = f"; it sits in the {sits_in} council" if sits_in else ""
        raise application_error(
            ErrorType.NOT_FOUND, f"agent {agent_id[:100]} not found in {where}{sits}"
        )
    if len(_council(rows, sits_in)["agents"]) == 1:
        raise application_error(
            ErrorType.COUNCIL_TOO_SMALL,
            f"{agent_id} is the last agent of the {sits_in} council; register another one first",
        )
    await (await tx.run(REMOVE, role=sits_in, agent_id=agent_id)).consume()
    return sits_in


def _seats(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the role of the council of each agent, by agent id."""
    return {agent["agent_id"]: row["role"] for row in rows for agent in row["agents"]}


def _new(agent: NewAgent) -> dict[str, Any]:
    node = agent.model_dump(exclude={"agent_id"})
    return {"id": agent.agent_id, "node": node}
