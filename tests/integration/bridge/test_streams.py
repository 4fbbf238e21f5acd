"""The streams on a real NATS: created, corrected, refused; the same from any number of replicas."""

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig

from bridge.jetstream.streams import (
    STREAMS,
    Stream,
    StreamError,
    declared,
    drift,
    reconcile,
    stream_of,
)
from deploy.local.ports import free_ports
from deploy.local.server import Command
from deploy.local.servers import Nats
from tests.support.servers import started
from workflows.models.events import PUBLISHED

DECLARED = {
    # subjects, days, messages, hours of the duplicate window
    "PLANNING_EVENTS": (["planning.>"], 30, 1_000_000, 1),
    "CONTEXT": (["context.>"], 7, 100_000, 1),
    "ORCHESTRATOR_EVENTS": (["orchestration.>"], 7, 50_000, 1),
    "AGENT_COMMANDS": (["agent.cmd.>"], 1 / 24, 10_000, 1),
    "AGENT_RESPONSES": (["agent.response.>"], 1 / 24, 10_000, 1),
    "DEAD_LETTERS": (["deadletter.>"], 30, -1, 1),
}


async def config(jetstream: JetStreamContext, name: str) -> StreamConfig:
    return (await jetstream.stream_info(name)).config


async def test_missing_streams_are_made_as_declared(jetstream: JetStreamContext) -> None:
    changes = await reconcile(jetstream, replicas=1)

    assert changes == {name: ["made"] for name in DECLARED}
    for name, (subjects, days, messages, hours) in DECLARED.items():
        found = await config(jetstream, name)
        assert found.subjects == subjects
        assert found.max_age == timedelta(days=days).total_seconds()
        assert found.max_msgs == messages
        assert 0 < (found.max_bytes or 0) <= 1024**3
        assert found.duplicate_window == timedelta(hours=hours).total_seconds()
        assert found.storage == StorageType.FILE
        assert found.retention == RetentionPolicy.LIMITS
        assert found.discard == DiscardPolicy.OLD
        assert found.num_replicas == 1


async def test_reconciling_again_changes_nothing(jetstream: JetStreamContext) -> None:
    await reconcile(jetstream, replicas=1)

    assert await reconcile(jetstream, replicas=1) == {}


@pytest.mark.parametrize(
    "drifted",
    [
        {"subjects": ["planning.story.>"]},
        {"subjects": ["planning.>", "elsewhere.>"]},
        {"max_age": 60.0, "duplicate_window": 30.0},
        {"max_msgs": 10},
        {"duplicate_window": 5.0},
        {"discard": DiscardPolicy.NEW},
        {"max_bytes": 1_000_000},
        {"max_msgs_per_subject": 1},
        {"max_msg_size": 100},
    ],
    ids=lambda drifted: "+".join(drifted),
)
async def test_a_drifted_stream_is_corrected_and_keeps_its_messages(
    jetstream: JetStreamContext, drifted: dict[str, Any]
) -> None:
    await reconcile(jetstream, replicas=1)
    await jetstream.publish("planning.story.created", b"{}")
    found = await config(jetstream, "PLANNING_EVENTS")
    await jetstream.update_stream(found.evolve(**drifted))

    changes = await reconcile(jetstream, replicas=1)

    assert changes == {"PLANNING_EVENTS": sorted(drifted)}
    assert await config(jetstream, "PLANNING_EVENTS") == found
    assert (await jetstream.stream_info("PLANNING_EVENTS")).state.messages == 1


async def test_a_flood_takes_no_more_than_the_streams_size(jetstream: JetStreamContext) -> None:
    small = Stream(
        name="FLOOD", subjects=("flood.>",), max_age=timedelta(hours=1), max_bytes=100_000
    )
    await jetstream.add_stream(
        StreamConfig(name="FLOOD", storage=StorageType.FILE).evolve(**declared(small, 1))
    )

    for number in range(50):
        await jetstream.publish("flood.x", b"%d " % number + b"x" * 10_000)

    state = (await jetstream.stream_info("FLOOD")).state
    newest = await jetstream.get_last_msg("FLOOD", "flood.x")
    await jetstream.delete_stream("FLOOD")
    assert state.bytes <= 100_000
    assert (newest.data or b"").startswith(b"49 ")


async def test_storage_that_is_too_small_is_refused_with_the_size_that_is_needed(
    tmp_path: Path,
) -> None:
    (port,) = free_ports(1)
    server = Cramped(tmp_path / "nats", port)
    async with started(server, server.url, port=port):
        client = await nats.connect(server.url, user=server.user, password=server.password)
        with pytest.raises(StreamError, match=r"PLANNING_EVENTS .* may take 2\.75 GiB"):
            await reconcile(client.jetstream(), replicas=1)
        await client.close()


class Cramped(Nats):
    """NATS with little storage."""

    def prepare(self) -> Command:
        command = super().prepare()
        conf = self.home / "nats.conf"
        conf.write_text(conf.read_text().replace("sync_interval", "max_file: 100MB, sync_interval"))
        return command


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"storage": StorageType.MEMORY}, "its storage is memory, and must be file"),
        ({"retention": RetentionPolicy.INTEREST}, "its retention is interest, and must be limits"),
        ({"retention": RetentionPolicy.WORK_QUEUE}, "retention is workqueue, and must be limits"),
    ],
)
async def test_a_stream_that_would_lose_events_is_refused_with_the_command_that_fixes_it(
    jetstream: JetStreamContext, setting: dict[str, Any], words: str
) -> None:
    made = {"name": "CONTEXT", "subjects": ["context.>"], "storage": StorageType.FILE}
    await jetstream.add_stream(StreamConfig(**(made | setting)))
    before = await jetstream.stream_info("CONTEXT")

    with pytest.raises(StreamError) as refused:
        await reconcile(jetstream, replicas=1)

    assert "Stream CONTEXT would lose events" in str(refused.value)
    assert words in str(refused.value)
    assert "`nats stream rm CONTEXT`" in str(refused.value)
    after = await jetstream.stream_info("CONTEXT")
    assert (after.config, after.created) == (before.config, before.created)


async def test_subjects_that_another_stream_takes_are_refused(
    jetstream: JetStreamContext,
) -> None:
    await jetstream.add_stream(StreamConfig(name="GREEDY", subjects=["planning.story.>"]))

    with pytest.raises(StreamError, match=r"PLANNING_EVENTS .* another stream already takes"):
        await reconcile(jetstream, replicas=1)

    await jetstream.delete_stream("GREEDY")


async def test_three_replicas_on_one_server_are_refused(jetstream: JetStreamContext) -> None:
    with pytest.raises(StreamError, match="NATS_REPLICAS is 3"):
        await reconcile(jetstream, replicas=3)


async def test_several_processes_may_reconcile_at_once(jetstream: JetStreamContext) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(reconcile(jetstream, replicas=1))

    for stream in STREAMS:
        assert drift(await config(jetstream, stream.name), stream, replicas=1) == {}


def test_every_event_has_a_stream() -> None:
    homeless = [subject for subject in PUBLISHED if stream_of(subject) is None]

    assert PUBLISHED
    assert homeless == []


@pytest.mark.parametrize("subject", ["planning", "planning2.x", "agent.x", "", ">"])
def test_a_foreign_subject_has_no_stream(subject: str) -> None:
    assert stream_of(subject) is None


def test_a_duplicate_window_is_never_longer_than_the_age() -> None:
    for stream in STREAMS:
        window = stream.model_copy(update={"max_age": timedelta(minutes=5)}).duplicate_window

        assert window == timedelta(minutes=5)
        assert declared(stream, 1)["duplicate_window"] == 3_600
