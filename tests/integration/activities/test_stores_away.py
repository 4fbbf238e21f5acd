"""Errors of a real Neo4j and a real Valkey: which are retried, and which are final."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from neo4j import READ_ACCESS, AsyncDriver, AsyncGraphDatabase, Query
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError
from temporalio.exceptions import ApplicationError

from activities.cache import Cache
from activities.graph.activities import Graph
from activities.graph.errors import store_errors
from deploy.local.ports import free_ports
from deploy.local.servers import Valkey
from tests.support.polling import WITHIN_S
from tests.support.server_process import ServerProcess
from tests.support.servers import READY_WITHIN, RunningServer
from tests.support.stories import batch, new_story, one_of_each, refused
from workflows.models.context import PackQuery
from workflows.models.entries import RecordBatch
from workflows.models.errors import UNAVAILABLE

FINAL = {
    "a division by zero": ("UNWIND [0] AS x RETURN 1 / x", "GraphValue"),
    "a value of another type": ("CREATE (:Odd {x: {a: 1}})", "GraphValue"),
    "a statement that cannot be read": ("MATCH (", "GraphStatement"),
    "a parameter that is missing": ("RETURN $missing", "GraphStatement"),
    "a procedure that does not exist": ("CALL no.such.procedure()", "GraphStatement"),
    "an empty label": ("UNWIND [''] AS label CREATE (:$(label))", "GraphConstraint"),
}


@pytest.mark.parametrize("kind", FINAL)
async def test_a_permanent_error_of_neo4j_is_final(driver: AsyncDriver, kind: str) -> None:
    statement, expected = FINAL[kind]

    with refused(expected, retryable=False), store_errors():
        await driver.execute_query(statement)


async def test_a_transient_error_of_neo4j_is_retried(
    driver: AsyncDriver, neo4j_server: RunningServer
) -> None:
    with refused("GraphUnavailable", retryable=True), store_errors():
        async with driver.session(default_access_mode=READ_ACCESS) as session:
            await (await session.run("CREATE (:Odd)")).consume()
    with refused("GraphUnavailable", retryable=True), store_errors():
        await driver.execute_query("RETURN 1", database_="nowhere")
    slow = Query("UNWIND range(1, 1000000000) AS x RETURN count(x * x)", timeout=0.1)
    with refused("GraphBusy", retryable=True), store_errors():
        async with driver.session() as session:
            await (await session.run(slow)).consume()
    auth = ("neo4j", "not the password")
    async with AsyncGraphDatabase.driver(neo4j_server.address, auth=auth) as stranger:
        with refused("GraphCredentials", retryable=True), store_errors():
            await stranger.execute_query("RETURN 1")


@pytest.fixture
async def other(tmp_path: Path, driver: AsyncDriver) -> AsyncIterator[Redis]:
    """Run a second Valkey and yield a client of it."""
    (port,) = free_ports(1)
    server = Valkey(tmp_path / "valkey", port)
    process = ServerProcess(server, tmp_path / "valkey.log", READY_WITHIN)
    await process.start()
    # With a timeout and retries, the client would send a script that runs long a second time.
    once = Retry(NoBackoff(), 0)
    client = Redis(
        host=server.host, port=port, password=server.password, socket_timeout=None, retry=once
    )
    yield client
    await client.aclose()
    await process.kill()


async def test_a_valkey_that_runs_a_script_is_away(graph: Graph, other: Redis) -> None:
    busy = Graph(graph._driver, Cache(other), graph.scopes)
    await busy.record(begun(new_story()))
    await other.config_set("busy-reply-threshold", 1)
    loop: Any = other.eval("while true do end", 0)
    script = asyncio.create_task(loop)
    try:
        await _answers(other, "BUSY")
        await _is_away(busy)
    finally:
        await other.script_kill()
        with suppress(ResponseError):
            await script

    await busy.record(begun(new_story()))


async def test_a_valkey_that_is_a_replica_or_has_lost_its_master_is_away(
    graph: Graph, valkey: RunningServer, other: Redis
) -> None:
    replica = Graph(graph._driver, Cache(other), graph.scopes)
    await other.config_set("masterauth", valkey.password or "")
    await other.replicaof(valkey.host, valkey.port)
    await _is_away(replica)

    await other.config_set("replica-serve-stale-data", "no")
    await other.replicaof("127.0.0.1", free_ports(1)[0])
    await _answers(other, "MASTERDOWN")
    await _is_away(replica)
    with refused("CacheUnavailable", retryable=True):
        await replica.build_pack(PackQuery(story_id=new_story(), role="DEV", phase="BUILD"))

    await other.replicaof("NO", "ONE")
    await replica.record(begun(new_story()))


def begun(story: str) -> RecordBatch:
    """Return the batch of a story's beginning; Neo4j plans few statements within its time."""
    return batch(story, *one_of_each(story)[:1])


async def _answers(client: Redis, word: str) -> None:
    """Wait until Valkey responds with that error."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            try:
                await client.get("any")
            except Exception as error:
                if word in f"{getattr(error, 'status_code', '')} {error}":
                    return
                raise


async def _is_away(graph: Graph) -> None:
    """Check that pipelined and single writes are refused as by an unavailable store."""
    story = new_story()
    with pytest.raises(ApplicationError) as stored:
        await graph.record(begun(story))
    with pytest.raises(ApplicationError) as kept:
        await graph.keep_session(story, "hash", "text", 60)

    assert {stored.value.type, kept.value.type} <= UNAVAILABLE
