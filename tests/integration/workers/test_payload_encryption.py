"""Encryption on real servers: what Temporal and Valkey store, and what cannot be read."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from temporalio.api.common.v1 import Payload
from temporalio.client import (
    Client,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowUpdateFailedError,
)
from temporalio.common import RawValue
from temporalio.exceptions import ApplicationError
from temporalio.worker import Worker

from tests.support.board import Board, refuse, shout
from tests.support.fleet import connect
from tests.support.polling import until
from tests.support.servers import RunningServer
from workers.external_storage import data_converter, payload_key
from workers.payload_codec import EncryptionCodec
from workers.workflow_runner import Runner
from workflows.models.errors import ErrorType

FIRST, SECOND = os.urandom(32), os.urandom(32)


async def a_client(temporal: RunningServer, valkey: Redis, *keys: bytes) -> Client:
    return await connect(temporal.address, converter=data_converter(valkey, keys=keys))


@asynccontextmanager
async def a_worker(client: Client, queue: str) -> AsyncIterator[None]:
    """Run a worker that starts each task from the history instead of its cache."""
    async with Worker(
        client,
        task_queue=queue,
        workflows=[Board],
        activities=[shout, refuse],
        workflow_runner=Runner(),
        max_cached_workflows=0,
    ):
        yield


@pytest.fixture
def queue() -> str:
    return f"board-{uuid.uuid4().hex}"


async def start(client: Client, queue: str, text: Any) -> WorkflowHandle[Any, Any]:
    return await client.start_workflow(
        Board.run,
        text,
        id=queue,
        task_queue=queue,
        task_timeout=timedelta(seconds=1),  # a failed task is retried after this time
        static_summary=text if isinstance(text, str) else None,
    )


async def failures(handle: WorkflowHandle[Any, Any], client: Client) -> list[str]:
    found = []
    for event in (await handle.fetch_history()).events:
        if event.HasField("workflow_task_failed_event_attributes"):
            failure = event.workflow_task_failed_event_attributes.failure
            found.append(str(await client.data_converter.decode_failure(failure)))
    return found


@pytest.mark.parametrize("length", [20, 100_000])
async def test_temporal_and_valkey_store_cipher_text_only(
    temporal: RunningServer, client: Redis, server_homes: Path, queue: str, length: int
) -> None:
    canary = f"canary {uuid.uuid4()} "
    text = canary + os.urandom(length).hex()
    here = await a_client(temporal, client, FIRST)

    async with a_worker(here, queue):
        handle = await start(here, queue, text)
        await until(lambda: handle.query(Board.all), lambda notes: len(notes) == 2)
        await handle.signal(Board.note, text)
        assert await handle.execute_update(Board.end, text) == text
        notes = await handle.result()
        described = await handle.describe()

    assert notes[0] == text.upper()
    assert canary in notes[1]
    assert notes[2] == text
    assert (await described.memo())["title"] == text
    assert await described.static_summary() == text
    history = (await handle.fetch_history()).to_json()
    stored = [await client.get(key) or b"" async for key in client.scan_iter(payload_key("*"))]
    files = [path.read_bytes() for path in (server_homes / "temporal").glob("temporal.sqlite*")]
    assert files
    for word in (canary, canary.upper()):
        assert word not in history
        assert not any(word.encode() in each for each in (*stored, *files))


async def test_keys_are_replaced_while_a_workflow_runs(
    temporal: RunningServer, client: Redis, queue: str
) -> None:
    """The new key is known everywhere before it encrypts; the old one goes when all has ended."""
    old = await a_client(temporal, client, FIRST)
    both = await a_client(temporal, client, FIRST, SECOND)
    new = await a_client(temporal, client, SECOND, FIRST)
    async with a_worker(old, queue):
        handle = await start(old, queue, "brief")
        await until(lambda: handle.query(Board.all), lambda notes: len(notes) == 2)
    async with a_worker(both, queue):
        await new.get_workflow_handle(queue).signal(Board.note, "by the new key")
        await until(lambda: handle_of(both, queue).query(Board.all), lambda notes: len(notes) == 3)
    async with a_worker(new, queue):
        await handle_of(both, queue).execute_update(Board.end, "by the old key")
        notes = await handle_of(new, queue).result()

    assert notes[0] == "BRIEF"
    assert notes[2] == "by the new key"


def handle_of(client: Client, queue: str) -> WorkflowHandle[Any, list[str]]:
    return client.get_workflow_handle(queue, result_type=list[str])


async def test_a_workflow_waits_for_the_key_that_a_worker_does_not_have(
    temporal: RunningServer, client: Redis, queue: str
) -> None:
    here = await a_client(temporal, client, FIRST)
    without = await a_client(temporal, client, SECOND)
    handle = await start(here, queue, "brief")
    async with a_worker(without, queue):
        await until(
            lambda: failures(handle, without),
            lambda found: "add that key to PAYLOAD_KEYS" in "".join(found),
        )
    async with a_worker(here, queue):
        await handle.execute_update(Board.end, "done")
        assert (await handle.result())[0] == "BRIEF"


async def test_an_update_by_an_unknown_key_is_rejected_and_the_workflow_goes_on(
    temporal: RunningServer, client: Redis, queue: str
) -> None:
    here = await a_client(temporal, client, FIRST)
    elsewhere = await a_client(temporal, client, SECOND)
    async with a_worker(here, queue):
        handle = await start(here, queue, "brief")
        await until(lambda: handle.query(Board.all), lambda notes: len(notes) == 2)
        with pytest.raises(ApplicationError, match="which this process does not have"):
            await elsewhere.get_workflow_handle(queue).execute_update(Board.end, "x")
        await handle.execute_update(Board.end, "done")
        assert len(await handle.result()) == 2
        assert await failures(handle, here) == []


async def altered(text: str) -> RawValue:
    (payload,) = await EncryptionCodec([FIRST]).encode(
        [Payload(metadata={"encoding": b"json/plain"}, data=f'"{text}"'.encode())]
    )
    payload.data = payload.data[:-1] + bytes([payload.data[-1] ^ 1])
    return RawValue(payload)


async def test_an_altered_start_fails_with_its_reason(
    temporal: RunningServer, client: Redis, queue: str
) -> None:
    here = await a_client(temporal, client, FIRST)
    plain = await a_client(temporal, client)
    async with a_worker(here, queue):
        await start(plain, queue, await altered("brief"))
        with pytest.raises(WorkflowFailureError) as failed:
            await handle_of(here, queue).result()

    cause = failed.value.cause
    assert isinstance(cause, ApplicationError)
    assert cause.type == ErrorType.INVALID_INPUT
    assert "altered after it was encrypted" in cause.message


async def test_an_altered_signal_or_update_is_refused_and_the_workflow_goes_on(
    temporal: RunningServer, client: Redis, queue: str
) -> None:
    here = await a_client(temporal, client, FIRST)
    plain = (await connect(temporal.address)).get_workflow_handle(queue)
    async with a_worker(here, queue):
        handle = await start(here, queue, "brief")
        await until(lambda: handle.query(Board.all), lambda notes: len(notes) == 2)
        await plain.signal("note", await altered("x"))
        notes = await until(lambda: handle.query(Board.all), lambda notes: len(notes) == 3)
        with pytest.raises(WorkflowUpdateFailedError):
            await plain.execute_update("end", await altered("x"))
        await handle.execute_update(Board.end, "done")
        assert len(await handle.result()) == 3
        assert await failures(handle, here) == []

    assert any("altered after it was encrypted" in note for note in notes)
