"""Large payloads go to Valkey: a real workflow whose history holds only references."""

import asyncio
import hashlib
import json
import sysconfig
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from temporalio import activity, workflow
from temporalio.api.common.v1 import Payload
from temporalio.client import Client, WorkflowHandle
from temporalio.converter import (
    StorageDriverClaim,
    StorageDriverRetrieveContext,
    StorageDriverStoreContext,
)
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from tests.support.fleet import connect
from tests.support.polling import until
from tests.support.servers import RunningServer
from workers.clients.connection import StartError
from workers.external_storage import (
    THRESHOLD_BYTES,
    PayloadDamaged,
    PayloadMissing,
    ValkeyStorageDriver,
    data_converter,
    payload_key,
)
from workers.payload_keeper import PayloadKeeper, require_kept
from workers.settings import PAYLOAD_DAYS

STORE = StorageDriverStoreContext()
RETRIEVE = StorageDriverRetrieveContext()
RUNNING = "ExecutionStatus = 'Running'"
MEGABYTE = "brief " * 170_000


@activity.defn
async def shout(text: str) -> str:
    return text.upper()


@workflow.defn
class Shout:
    """A workflow that sends a text through an activity and returns the result."""

    @workflow.run
    async def run(self, text: str) -> str:
        return await workflow.execute_activity(
            shout, text, start_to_close_timeout=timedelta(seconds=20)
        )


@pytest.fixture
async def temporal_client(temporal: RunningServer, client: Redis) -> Client:
    return await connect(temporal.address, converter=data_converter(client))


@pytest.fixture
async def queue(temporal_client: Client) -> AsyncIterator[str]:
    """Return a task queue whose worker starts each task from the history instead of its cache."""
    name = f"shout-{uuid.uuid4().hex}"
    async with Worker(
        temporal_client,
        task_queue=name,
        workflows=[Shout],
        activities=[shout],
        workflow_runner=UnsandboxedWorkflowRunner(),
        max_cached_workflows=0,
    ):
        yield name


async def history_bytes(client: Client, workflow_id: str) -> int:
    history = await client.get_workflow_handle(workflow_id).fetch_history()
    return sum(event.ByteSize() for event in history.events)


async def test_a_megabyte_goes_through_a_workflow_and_its_history_holds_a_claim(
    temporal_client: Client, client: Redis, queue: str
) -> None:
    text = queue + MEGABYTE

    answer = await temporal_client.execute_workflow(
        Shout.run, text, id=f"{queue}-big", task_queue=queue
    )

    assert answer == text.upper()
    assert await history_bytes(temporal_client, f"{queue}-big") < 10_000
    payload = Payload(
        metadata={"encoding": b"json/plain"}, data=json.dumps(text).encode()
    ).SerializeToString(deterministic=True)
    key = f"swe:payload:{hashlib.sha256(payload).hexdigest()}"
    assert await client.get(key) == payload
    assert await client.ttl(key) > timedelta(days=PAYLOAD_DAYS - 1).total_seconds()


async def test_a_small_payload_stays_in_the_history(temporal_client: Client, queue: str) -> None:
    small = "s" * (THRESHOLD_BYTES - 1000)

    await temporal_client.execute_workflow(Shout.run, small, id=f"{queue}-small", task_queue=queue)

    # Four times: the input, the activity's input, its result and the workflow's result.
    assert await history_bytes(temporal_client, f"{queue}-small") > 4 * len(small)


async def test_the_temporal_cli_starts_a_workflow_with_a_large_payload_inline(
    temporal: RunningServer, temporal_client: Client, queue: str, tmp_path: Path
) -> None:
    (tmp_path / "input.json").write_text(json.dumps(MEGABYTE))
    temporal_cli = Path(sysconfig.get_path("scripts")) / "temporal"

    cli = await asyncio.create_subprocess_exec(
        *(temporal_cli, "workflow", "start", "--address", temporal.address),
        *("--type", "Shout", "--task-queue", queue, "--workflow-id", f"{queue}-cli"),
        *("--input-file", tmp_path / "input.json"),
        stdout=asyncio.subprocess.DEVNULL,
    )
    assert await cli.wait() == 0

    handle = temporal_client.get_workflow_handle(f"{queue}-cli", result_type=str)
    assert await handle.result() == MEGABYTE.upper()
    # The CLI's input is in the history; the worker's payloads are not.
    size = await history_bytes(temporal_client, f"{queue}-cli")
    assert len(MEGABYTE) < size < 1.1 * len(MEGABYTE)


async def test_a_workflow_waits_for_a_payload_that_valkey_has_lost(
    temporal_client: Client, client: Redis
) -> None:
    queue = f"shout-{uuid.uuid4().hex}"
    text = queue + MEGABYTE
    handle = await temporal_client.start_workflow(
        Shout.run,
        text,
        id=queue,
        task_queue=queue,
        task_timeout=timedelta(seconds=1),  # a failed task is retried after this time
    )
    key = f"swe:payload:{await claim_of(temporal_client, queue)}"
    payload = await client.getdel(key)
    assert payload is not None

    async with Worker(
        temporal_client,
        task_queue=queue,
        workflows=[Shout],
        activities=[shout],
        workflow_runner=UnsandboxedWorkflowRunner(),
    ):
        await until(lambda: first_failure(handle), lambda failure: "append-only file" in failure)
        await client.set(key, payload)

        assert await handle.result() == text.upper()


async def claim_of(client: Client, workflow_id: str) -> str:
    [started] = [
        event.workflow_execution_started_event_attributes
        for event in (await client.get_workflow_handle(workflow_id).fetch_history()).events
        if event.HasField("workflow_execution_started_event_attributes")
    ]
    claim = json.loads(started.input.payloads[0].data)
    return str(claim["claimData"]["sha256"])


async def first_failure(handle: WorkflowHandle[Any, Any]) -> str:
    for event in (await handle.fetch_history()).events:
        if event.HasField("workflow_task_failed_event_attributes"):
            return event.workflow_task_failed_event_attributes.failure.message
    return ""


async def test_one_content_is_kept_once_and_comes_back_as_it_was(client: Redis) -> None:
    driver = ValkeyStorageDriver(client)
    metadata = {f"key {number}": b"x" for number in range(20)}
    data = uuid.uuid4().bytes
    payload = Payload(metadata=metadata, data=data)
    same = Payload(metadata=dict(reversed(metadata.items())), data=data)
    other = Payload(data=uuid.uuid4().bytes)

    claims = await driver.store(STORE, [payload, other, same])

    assert claims[0] == claims[2] != claims[1]
    assert await driver.store(STORE, [payload]) == claims[:1]
    assert await driver.retrieve(RETRIEVE, claims) == [payload, other, payload]


async def test_a_missing_payload_names_what_to_restore(client: Redis) -> None:
    claim = StorageDriverClaim({"sha256": "0" * 64})

    with pytest.raises(PayloadMissing, match=r"swe:payload:000.*append-only file"):
        await ValkeyStorageDriver(client).retrieve(RETRIEVE, [claim])


async def test_a_damaged_payload_is_not_returned(client: Redis) -> None:
    driver = ValkeyStorageDriver(client)
    [claim] = await driver.store(STORE, [Payload(data=uuid.uuid4().bytes)])
    await client.append(f"swe:payload:{claim.claim_data['sha256']}", b"x")

    with pytest.raises(PayloadDamaged):
        await driver.retrieve(RETRIEVE, [claim])


async def test_storing_again_renews_the_life_of_a_payload(client: Redis) -> None:
    driver = ValkeyStorageDriver(client, keep_for=timedelta(days=30))
    payload = Payload(data=uuid.uuid4().bytes)
    [claim] = await driver.store(STORE, [payload])
    key = f"swe:payload:{claim.claim_data['sha256']}"
    await client.expire(key, 60)

    await driver.store(STORE, [payload])

    assert await client.ttl(key) > 60 * 60 * 24 * 29


# --- collecting -----------------------------------------------------------------------------------


async def test_no_payload_is_kept_forever_and_those_of_open_runs_are_renewed(
    temporal_client: Client, client: Redis, queue: str
) -> None:
    texts = {name: f"{queue} {name} " + MEGABYTE for name in ("closed", "open")}
    for name, text in texts.items():
        await temporal_client.start_workflow(
            Shout.run,
            text,
            id=f"{queue}-{name}",
            task_queue=queue if name == "closed" else f"{queue}-nobody",
        )
    await temporal_client.get_workflow_handle(f"{queue}-closed").result()
    keys = {name: payload_key(await claim_of(temporal_client, f"{queue}-{name}")) for name in texts}
    endless = payload_key("f" * 64)
    await client.set(endless, b"of an older release")
    every = [key async for key in client.scan_iter(match=payload_key("*"))]
    assert all([await client.ttl(key) > 0 for key in every if key != endless.encode()])
    for key in keys.values():
        await client.expire(key, 3_600)
    keep_for = timedelta(days=50)

    async def open_runs() -> list[str]:
        return [run.id async for run in temporal_client.list_workflows(RUNNING)]

    await until(open_runs, lambda runs: f"{queue}-open" in runs and f"{queue}-closed" not in runs)
    await PayloadKeeper(temporal_client, client, keep_for).renew()

    left = {name: await client.ttl(key) for name, key in keys.items()}
    assert left["closed"] <= 3_600
    assert left["open"] > timedelta(days=49).total_seconds()
    assert await client.ttl(endless) > timedelta(days=49).total_seconds()
    await temporal_client.get_workflow_handle(f"{queue}-open").terminate()
    await client.delete(endless)


async def test_one_of_the_replicas_renews_and_the_next_one_if_it_fails(
    temporal_client: Client, client: Redis
) -> None:
    turn = f"swe:payloads-renewed:{temporal_client.namespace}"
    await client.delete(turn)
    renewed: list[str] = []

    class Noting(PayloadKeeper):
        async def renew(self) -> int:
            renewed.append("tried")
            if len(renewed) == 1:
                raise ConnectionError("away")
            return 0

    for tries in (1, 2, 2):
        job = Noting(temporal_client, client, timedelta(days=8))
        running = asyncio.create_task(job.run())
        await until(lambda job=job: job.is_running)  # type: ignore[misc]
        await until(lambda tries=tries: len(renewed) == tries)  # type: ignore[misc]
        await job.shutdown()
        await running

    assert await client.exists(turn)
    await client.delete(turn)


async def test_payloads_must_outlive_the_histories(temporal_client: Client) -> None:
    await require_kept(temporal_client, timedelta(days=8))

    with pytest.raises(StartError, match=r"PAYLOAD_DAYS is 7, .*set it to 8 or more"):
        await require_kept(temporal_client, timedelta(days=7))
