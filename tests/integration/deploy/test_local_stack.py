"""The local stack with its four data servers: started, stopped, broken and started again."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import nats
import pytest
import redis.asyncio as redis
from dotenv import dotenv_values
from nats.js.api import StorageType, StreamConfig
from neo4j import AsyncDriver, AsyncGraphDatabase
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest

from deploy.local.settings import StackSettings
from deploy.local.stack import OtherSettings, Stack
from tests.support.fleet import connect
from tests.support.listeners import addresses_of, is_loopback
from tests.support.polling import until

STACK_WITHIN_S = 600
"""Several cold starts of Neo4j on a machine that is also busy with other work, in seconds."""

pytestmark = pytest.mark.timeout(STACK_WITHIN_S)


@pytest.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TEMPORAL_ADDRESS", "NATS_URL", "NEO4J_URI", "REDIS_HOST", "VLLM_URL"):
            patch.delenv(name, raising=False)
        settings = StackSettings.load(home=tmp_path_factory.mktemp("stack"), pick_free_ports=True)
        stack = Stack(settings, without=("ray", "workers"))
        try:
            await stack.up()
            yield stack
        finally:
            await stack.down()


def env(stack: Stack) -> dict[str, str]:
    return {name: value or "" for name, value in dotenv_values(stack.env_file).items()}


async def write_everywhere(stack: Stack, key: str) -> None:
    """Write something to each of the four servers, with the settings that the stack wrote."""
    at = env(stack)
    temporal = await connect(at["TEMPORAL_ADDRESS"])
    await temporal.start_workflow("NobodyRunsThis", id=key, task_queue="nobody")
    bus = await nats.connect(
        at["NATS_URL"], user=at["NATS_USER"], password=at["NATS_PASSWORD"], allow_reconnect=False
    )
    stream = StreamConfig(name=key, subjects=[f"{key}.>"], storage=StorageType.FILE)
    await bus.jetstream().add_stream(stream)
    await bus.jetstream().publish(f"{key}.one", b"kept")
    await bus.close()
    valkey = open_valkey(at)
    await valkey.set(key, "kept")
    await valkey.aclose()
    async with open_neo4j(at) as graph:
        await graph.execute_query("CREATE (:Kept {key: $key})", key=key)


async def read_everywhere(stack: Stack, key: str) -> dict[str, bool]:
    at = env(stack)
    temporal = await connect(at["TEMPORAL_ADDRESS"])
    workflow = await temporal.get_workflow_handle(key).describe()
    bus = await nats.connect(at["NATS_URL"], user=at["NATS_USER"], password=at["NATS_PASSWORD"])
    message = await bus.jetstream().get_last_msg(key, f"{key}.one")
    await bus.close()
    valkey = open_valkey(at)
    value = await valkey.get(key)
    await valkey.aclose()
    async with open_neo4j(at) as graph:
        found = await graph.execute_query(
            "MATCH (k:Kept {key: $key}) RETURN count(k) AS n", key=key
        )
    return {
        "temporal": workflow.id == key,
        "nats": message.data == b"kept",
        "valkey": value == b"kept",
        "neo4j": found.records[0]["n"] == 1,
    }


def open_valkey(at: dict[str, str]) -> redis.Redis:
    return redis.Redis(
        host=at["REDIS_HOST"], port=int(at["REDIS_PORT"]), password=at["REDIS_PASSWORD"]
    )


def open_neo4j(at: dict[str, str]) -> AsyncDriver:
    return AsyncGraphDatabase.driver(at["NEO4J_URI"], auth=(at["NEO4J_USER"], at["NEO4J_PASSWORD"]))


ALL_KEPT = {"temporal": True, "nats": True, "valkey": True, "neo4j": True}


async def test_every_part_is_healthy_and_a_second_up_starts_nothing(stack: Stack) -> None:
    before = {part.name: stack.pid(part.name) for part in stack.wanted}

    started = await stack.up()

    assert started is False
    assert {part.name: stack.pid(part.name) for part in stack.wanted} == before
    assert all(one.healthy for one in await stack.status())


async def test_an_up_with_other_settings_is_refused_while_everything_runs(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stack.env_file.read_text()
    monkeypatch.setenv("VLLM_URL", "http://llm.example:8000/v1")
    monkeypatch.setenv("VLLM_MODEL", "our-model")
    other = Stack(StackSettings.load(home=stack.home), without=("ray", "workers"))

    with pytest.raises(
        OtherSettings, match=r"VLLM_MODEL, VLLM_URL would differ from .*env; stop it first"
    ):
        await other.up()

    assert stack.env_file.read_text() == before


async def test_closed_workflows_are_kept_for_months(stack: Stack) -> None:
    client = await connect(env(stack)["TEMPORAL_ADDRESS"])

    namespace = await client.workflow_service.describe_namespace(
        DescribeNamespaceRequest(namespace="default")
    )

    assert namespace.config.workflow_execution_retention_ttl.ToTimedelta().days == 90


async def test_nothing_of_the_stack_listens_beyond_loopback(stack: Stack) -> None:
    addresses = addresses_of(stack.supervisor.stray_pids())

    assert len(addresses) >= 5  # Temporal and its Web UI, NATS, Valkey, Neo4j
    assert [address for address in addresses if not is_loopback(address[0])] == []


async def test_a_part_that_dies_is_started_again(stack: Stack) -> None:
    first = stack.pid("valkey")
    assert first

    os.kill(first, signal.SIGKILL)

    await until(lambda: stack.pid("valkey") not in (None, first))
    await until(stack.status, lambda status: all(one.healthy for one in status))


async def test_everything_stored_is_there_after_down_and_up(stack: Stack) -> None:
    await write_everywhere(stack, "stopped")

    assert await stack.down()
    assert stack.supervisor.stray_pids() == set()
    assert await stack.up()

    assert await read_everywhere(stack, "stopped") == ALL_KEPT


async def test_everything_stored_is_there_after_all_was_killed_at_once(stack: Stack) -> None:
    await write_everywhere(stack, "killed")

    assert len(stack.kill()) >= 5
    assert stack.supervisor.stray_pids() == set()
    assert await stack.up()

    assert await read_everywhere(stack, "killed") == ALL_KEPT


async def test_servers_that_outlived_their_supervisor_are_replaced(stack: Stack) -> None:
    orphan, supervisor = (
        stack.pid("nats"),
        int((stack.supervisor.folder / "supervisord.pid").read_text()),
    )

    os.kill(supervisor, signal.SIGKILL)
    await until(lambda: not stack.supervisor.running())
    assert await stack.up()

    assert stack.pid("nats") not in (None, orphan)
    assert all(one.healthy for one in await stack.status())


async def test_the_command_line_names_what_runs(stack: Stack, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.local", "status"),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "FLEET_HOME": str(stack.home), "COLUMNS": "200"},
    )
    output = (await process.communicate())[0].decode()

    rows = {line.split()[0]: line for line in output.splitlines()[1:]}
    assert all(f" {stack.pid(name)} " in rows[name] for name in ("temporal", "nats", "neo4j"))
    assert "stopped" in rows["ray"]
    assert process.returncode == 1
