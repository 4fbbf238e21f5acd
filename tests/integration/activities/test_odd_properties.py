"""Properties of any type, as other systems write them: every reader of the graph still answers."""

from collections.abc import AsyncIterator
from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
from neo4j import AsyncDriver
from rich.console import Console

from activities.graph.activities import Graph
from activities.graph.councils import find_councils
from activities.graph.deliberations import find_ended, find_plan, history, last_plan
from activities.graph.provenance import find_why
from bridge.grpc.orchestrator.servicer import OrchestratorServicer
from bridge.grpc.server import Served
from bridge.grpc.wire import (
    context_pb2,
    context_pb2_grpc,
    orchestrator_pb2,
    orchestrator_pb2_grpc,
)
from deploy.local.demo import APPROVALS, DECISIONS
from tests.integration.bridge.test_grpc_context import served
from tests.support.fleet import a_namespace, connect
from tests.support.grpc_service import bearer, serving
from tests.support.polling import WITHIN_S
from tests.support.servers import Servers
from tests.support.stories import batch, deliberation, new_story, one_of_each, rows
from tests.support.stories import plan as plan_of
from workers.cli import render
from workflows.models.agents import CouncilQuery
from workflows.models.context import PackQuery
from workflows.models.events import PlanDerived
from workflows.models.plan import PlanQuery

ODD = {
    "a native time with an offset": "datetime('2026-01-01T10:00:00+02:00')",
    "a native time with a zone": "datetime('2026-01-01T10:00:00[Europe/Madrid]')",
    "a native time without an offset": "localdatetime('2026-01-01T10:00:00')",
    "a date": "date('2026-01-01')",
    "a time of day": "time('10:00:00+02:00')",
    "a duration": "duration('P1DT2H')",
    "text without an offset": "'2026-01-01T10:00:00'",
    "text that is not a time": "'soon'",
    "an empty text": "''",
    "milliseconds": "1767225600000",
    "a large integer": "9223372036854775807",
    "a negative integer": "-7",
    "a float": "1767225600.5",
    "not a number": "0.0 / 0.0",
    "null": "null",
    "a boolean": "true",
    "a list of texts": "['a', 'b']",
    "a list of numbers": "[1, 2]",
    "an empty list": "[]",
    "a list of times": "[datetime('2026-01-01T10:00:00Z')]",
    "a point": "point({x: 1, y: 2})",
}

KEYS = ["id", "case_id", "story_id", "deliberation_id", "run_id", "rank", "name", "outcome"]
"""The properties that stay as they are: the keys of nodes, and three others.

`rank` decides which proposal is the winner, and a check without its name or outcome is left out.
"""

MAKE_ODD = """
MATCH (s:Case {{id: $story}})
CALL (s) {{ RETURN s AS n UNION MATCH (s)--(n) RETURN n UNION MATCH (s)--()--(n) RETURN n }}
WITH DISTINCT n WHERE NOT n:Agent
CALL (n) {{
  UNWIND [key IN keys(n) WHERE NOT key IN $keys] AS key
  SET n[key] = {value}
}}
"""


class Call:
    """A caller of any method of the services that read the graph."""

    def __init__(self, *stubs: Any) -> None:
        self._stubs = stubs

    async def __call__(self, method: str, request: Any) -> Any:
        stub = next(each for each in self._stubs if hasattr(each, method))
        return await getattr(stub, method)(request, metadata=bearer("ana", "PO"), timeout=WITHIN_S)


@pytest.fixture(scope="module")
async def call(servers: Servers, graph: Graph, driver: AsyncDriver) -> AsyncIterator[Call]:
    client = await connect(servers.temporal.address, await a_namespace(servers))
    councils = Served(
        "orchestrator.v1.OrchestratorService",
        OrchestratorServicer(client, graph, driver, "RAY_VLLM", timedelta(seconds=60)),
        orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server,
    )
    async with (
        serving(served(client, graph)) as context,
        serving(councils) as orchestrator,
    ):
        yield Call(
            context_pb2_grpc.ContextServiceStub(context),
            orchestrator_pb2_grpc.OrchestratorServiceStub(orchestrator),
        )


@pytest.fixture(params=ODD)
async def story(request: pytest.FixtureRequest, graph: Graph, driver: AsyncDriver) -> str:
    """Store a story with one node of each kind, all of whose properties have an odd type."""
    story = new_story()
    await graph.record(batch(story, *one_of_each(story)))
    own = plan_of(story).model_dump() | {"plan_id": f"{story}-plan-1"}
    for number, task in enumerate(own["tasks"], 1):
        task |= {"task_id": f"{story}-plan-1-t{number}", "depends_on": []}
    await graph.record(batch(story, PlanDerived.model_validate(own), first=50))
    await graph.record_deliberation(deliberation(story))
    await rows(driver, MAKE_ODD.format(value=ODD[request.param]), story=story, keys=KEYS)
    return story


async def test_the_cli_shows_why_a_decision_was_made(story: str, driver: AsyncDriver) -> None:
    found = await find_why(driver, f"{story}-d1", story)

    assert [each.decision_id for each in found] == [f"{story}-d1"]
    Console(file=StringIO()).print(render.reasons(found))
    assert found[0].model_dump_json()


async def test_the_demonstration_shows_what_was_decided(story: str, driver: AsyncDriver) -> None:
    decisions, _, _ = await driver.execute_query(DECISIONS, story_id=story)
    approvals, _, _ = await driver.execute_query(APPROVALS, story_id=story)

    assert decisions
    assert approvals
    shown = [list(record.values()) for record in (*decisions, *approvals)]
    Console(file=StringIO()).print(render.FittingTable("All", ["a", "b", "c", "d"], shown))


async def test_agents_get_their_packs_plans_and_history(
    story: str, graph: Graph, driver: AsyncDriver
) -> None:
    await graph.drop_packs([story])
    config = graph.scopes

    for phase, roles in config.scopes.items():
        for role in roles:
            query = PackQuery(story_id=story, role=role, phase=phase)
            assert (await graph.build_pack(query)).context
    await graph.load_plan(PlanQuery(story_id=story, plan_id=f"{story}-plan-1"))
    await graph.load_plan(PlanQuery(story_id=story, plan_id="plan-1"))
    await history(driver, PackQuery(story_id=story, role="QA", phase="TEST"), config.relevance, 5)


async def test_plans_deliberations_and_statuses_are_answered(
    story: str, graph: Graph, driver: AsyncDriver
) -> None:
    assert await last_plan(driver, story)
    plan = await find_plan(driver, story)
    assert plan
    assert [task.task_id for task in plan.tasks] == [f"{story}-plan-1-t1", f"{story}-plan-1-t2"]
    ended = await find_ended(driver, f"deliberation-{story}-t1")
    assert ended
    assert len(ended.result.ranked) == 2
    await graph.story_status(story)
    await graph.task_status(story, f"{story}-t1")
    await graph.live_stories([story])
    for node_type, node_id in (("STORY", story), ("TASK", f"{story}-t1")):
        assert await graph.neighbourhood(node_type, node_id, 3)


async def test_clients_of_the_services_are_answered(story: str, call: Call) -> None:
    pack = await call(
        "GetContext", context_pb2.GetContextRequest(story_id=story, role="DEV", phase="BUILD")
    )
    session = await call(
        "RehydrateSession",
        context_pb2.RehydrateSessionRequest(
            case_id=story, roles=["DEV", "ARCHITECT"], include_timeline=True, include_summaries=True
        ),
    )
    near = await call(
        "GetGraphRelationships",
        context_pb2.GetGraphRelationshipsRequest(node_id=story, node_type="Story", depth=3),
    )
    result = await call(
        "GetDeliberationResult",
        orchestrator_pb2.GetDeliberationResultRequest(task_id=f"{story}-t1"),
    )

    assert pack.context
    assert session.case_id == story
    assert near.node.id == story
    assert len(result.results) == 2


@pytest.mark.parametrize("odd", ODD)
async def test_councils_are_configured_or_refused_by_name(
    odd: str, graph: Graph, driver: AsyncDriver, call: Call
) -> None:
    await rows(
        driver,
        f"CREATE (c:Council {{role: 'ODD'}})-[:HAS_AGENT]->(a:Agent {{id: 'agent-odd'}}), "
        f"(:Council {{role: {ODD[odd]}}}) "
        f"WITH c, a, {ODD[odd]} AS odd SET c.rounds = odd, c.custom_params = odd, a.model = odd, "
        "a.persona = odd, a.endpoint = odd, a.supported_tasks = odd, a.languages = odd, "
        "a.max_concurrent_tasks = odd",
    )
    try:
        councils = await find_councils(driver)
        listed = await call(
            "ListCouncils", orchestrator_pb2.ListCouncilsRequest(include_agents=True)
        )
        seated = await graph.load_council(CouncilQuery(role="ODD"))
    finally:
        await rows(
            driver,
            "MATCH (c:Council) WHERE c.role IS NULL OR NOT c.role IN $known "
            "OPTIONAL MATCH (c)-[:HAS_AGENT]->(a {id: 'agent-odd'}) DETACH DELETE c, a",
            known=["DEV", "QA", "ARCHITECT", "DEVOPS", "DATA"],
        )

    assert "ODD" in {each.role for each in councils}
    assert "ODD" in {each.role for each in listed.councils}
    assert [each.agent_id for each in seated.agents] == ["agent-odd"]
