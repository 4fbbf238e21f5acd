"""`fleet graph prune`: what is removed, and what stays."""

import asyncio
import json
from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.duration_pb2 import Duration
from neo4j import AsyncDriver
from redis.asyncio import Redis
from temporalio.api.namespace.v1 import NamespaceConfig
from temporalio.api.workflowservice.v1 import UpdateNamespaceRequest
from typer.testing import CliRunner

from activities.graph.activities import Graph
from tests.support.fleet import Environment, a_namespace, connect, variables
from tests.support.llm_server import LlmServer
from tests.support.polling import until
from tests.support.servers import Servers
from tests.support.stories import batch, deliberation, new_story, one_of_each, rows, with_change
from workers.cli.graph import app

LONG_AGO = ("--older-than", "30d")


@pytest.fixture
async def environment(servers: Servers, llm: LlmServer) -> Environment:
    return variables(servers, llm) | {"TEMPORAL_NAMESPACE": await a_namespace(servers)}


async def prune(environment: Environment, *arguments: str) -> tuple[int, str, str]:
    """Run the command as a job would, without a terminal."""
    ended = await asyncio.to_thread(CliRunner().invoke, app, ["prune", *arguments], env=environment)
    return ended.exit_code, ended.stdout, ended.stderr


async def whole(graph: Graph, driver: AsyncDriver, status: str, last: datetime) -> str:
    """Store a whole story in its own graph; return its id."""
    story = new_story()
    await graph.record(batch(story, *one_of_each(story)))
    await graph.record_deliberation(with_change(deliberation(story)))
    await driver.execute_query(
        "MATCH (s:Story {id: $id})<-[:OF]-(e:Event) SET s.status = $status, e.timestamp_ms = $ms",
        id=story,
        status=status,
        ms=int(last.timestamp() * 1000),
    )
    return story


async def nodes_of(driver: AsyncDriver, story: str) -> int:
    found = "MATCH (n) WHERE any(k IN keys(n) WHERE toStringOrNull(n[k]) CONTAINS $id) "
    [[count]] = await rows(driver, found + "RETURN count(n)", id=story)
    return int(count)


async def test_only_stories_that_ended_long_ago_go_and_nothing_of_them_stays(
    graph: Graph, driver: AsyncDriver, client: Redis, environment: Environment
) -> None:
    [[councils]] = await rows(driver, "MATCH (n) WHERE n:Council OR n:Agent RETURN count(n)")
    old, recent = (datetime.now(UTC) - timedelta(days=days) for days in (40, 20))
    gone = [await whole(graph, driver, each, old) for each in ("DONE", "CANCELLED", "DELETED")]
    kept = [
        await whole(graph, driver, "DONE", recent),
        await whole(graph, driver, "DESIGN", old),
        await whole(graph, driver, "UNKNOWN", old),
    ]
    before = {story: await nodes_of(driver, story) for story in kept}
    assert [key async for key in client.scan_iter(match=f"*{gone[0]}*")]

    code, out, _ = await prune(environment, *LONG_AGO, "--dry-run", "--json")
    assert code == 0
    assert set(gone) <= set(json.loads(out)["stories"])
    assert not set(kept) & set(json.loads(out)["stories"])
    assert await nodes_of(driver, gone[0]) > 20

    code, out, _ = await prune(environment, *LONG_AGO, "--yes", "--json")

    assert code == 0
    assert set(gone) <= set(json.loads(out)["stories"])
    assert json.loads(out)["nodes"] > 60
    for story in gone:
        assert await nodes_of(driver, story) == 0
        assert [key async for key in client.scan_iter(match=f"*{story}*")] == []
    assert {story: await nodes_of(driver, story) for story in kept} == before
    [[after]] = await rows(driver, "MATCH (n) WHERE n:Council OR n:Agent RETURN count(n)")
    assert after >= councils


async def test_a_story_that_was_started_again_is_not_removed(
    graph: Graph, driver: AsyncDriver
) -> None:
    before = datetime.now(UTC) - timedelta(days=30)
    story = await whole(graph, driver, "DONE", before - timedelta(days=1))
    assert story in await graph.ended_before(before)
    await driver.execute_query("MATCH (s:Story {id: $id}) SET s.status = 'DRAFT'", id=story)
    held = await nodes_of(driver, story)

    assert await graph.prune(story, before) == 0
    assert await nodes_of(driver, story) == held


async def test_old_deliberations_of_no_story_go(graph: Graph, driver: AsyncDriver) -> None:
    mark = new_story()
    alone = with_change(deliberation(mark, story_id="", plan_id=""))
    await graph.record_deliberation(alone)
    assert await nodes_of(driver, mark) > 0

    assert await graph.prune_without_story(datetime(2025, 1, 1, tzinfo=UTC)) == 0
    held = await nodes_of(driver, mark)
    assert await graph.prune_without_story(datetime.now(UTC)) >= held
    assert await nodes_of(driver, mark) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--older-than", "1h", "--yes"), "not a number of days, such as 365d"),
        (("--older-than", "0d", "--yes"), "not a number of days"),
        (("--older-than", "365d"), "say --yes"),
    ],
)
async def test_a_prune_without_confirmation_is_refused(
    environment: Environment, arguments: tuple[str, ...], words: str
) -> None:
    code, _, err = await prune(environment, *arguments)

    assert code != 0
    assert words in " ".join(err.replace("│", " ").split())


async def test_what_temporal_still_knows_is_not_removed(environment: Environment) -> None:
    name = environment["TEMPORAL_NAMESPACE"]
    client = await connect(environment["TEMPORAL_ADDRESS"], name)
    await client.workflow_service.update_namespace(
        UpdateNamespaceRequest(
            namespace=name,
            config=NamespaceConfig(workflow_execution_retention_ttl=Duration(seconds=60 * 86_400)),
        )
    )

    async def refusal() -> str:
        _, _, err = await prune(environment, "--older-than", "59d", "--yes")
        return " ".join(err.split())

    await until(refusal, lambda err: f"the 60 days for which the namespace {name} keeps" in err)
    assert (await prune(environment, "--older-than", "60d", "--dry-run"))[0] == 0
