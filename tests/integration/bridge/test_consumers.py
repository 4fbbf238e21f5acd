"""The durable consumers on a real NATS: created, corrected, or refused with the remedy."""

import asyncio

import pytest
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig

from bridge.jetstream import streams
from bridge.jetstream.consumers import CONSUMERS, ConsumerError, drift, reconcile
from bridge.jetstream.streams import STREAMS
from tests.support.polling import WITHIN_S
from workflows.models.events import PUBLISHED

FIRST = CONSUMERS[0]


@pytest.fixture(autouse=True)
async def with_streams(jetstream: JetStreamContext) -> None:
    await streams.reconcile(jetstream, replicas=1)


async def config(jetstream: JetStreamContext, name: str, stream: str) -> ConsumerConfig:
    found: ConsumerConfig = (await jetstream.consumer_info(stream, name)).config
    return found


async def test_every_consumer_is_made_as_declared_and_then_left_alone(
    jetstream: JetStreamContext,
) -> None:
    changes = await reconcile(jetstream)

    assert changes == {consumer.name: ["made"] for consumer in CONSUMERS}
    for consumer in CONSUMERS:
        found = await config(jetstream, consumer.name, consumer.stream)
        assert found.durable_name == consumer.name
        assert found.ack_policy == AckPolicy.EXPLICIT
        assert found.deliver_subject is None
        assert found.filter_subject == consumer.subject
        assert found.max_ack_pending
        assert found.max_deliver
        assert found.ack_wait == consumer.ack_wait.total_seconds()
        assert not found.backoff  # with a list, a nak's delay would count from the list's time
    assert await reconcile(jetstream) == {}


async def test_a_drifted_consumer_is_updated_and_keeps_its_place(
    jetstream: JetStreamContext,
) -> None:
    await reconcile(jetstream)
    await jetstream.publish(FIRST.subject, b"{}")
    shared = await jetstream.pull_subscribe_bind(consumer=FIRST.name, stream=FIRST.stream)
    (message,) = await shared.fetch(1, WITHIN_S)
    await message.ack_sync()
    found = await config(jetstream, FIRST.name, FIRST.stream)
    await jetstream.add_consumer(
        FIRST.stream, found.evolve(max_ack_pending=7, ack_wait=9, backoff=[9, 60])
    )

    changes = await reconcile(jetstream)

    assert changes == {FIRST.name: ["ack_wait", "backoff", "max_ack_pending"]}
    assert drift(await config(jetstream, FIRST.name, FIRST.stream), FIRST) == {}
    info = await jetstream.consumer_info(FIRST.stream, FIRST.name)
    assert info.num_pending == 0


async def test_a_consumer_that_an_update_cannot_fix_is_refused_with_the_command_that_can(
    jetstream: JetStreamContext,
) -> None:
    await jetstream.add_consumer(
        FIRST.stream,
        ConsumerConfig(durable_name=FIRST.name, ack_policy=AckPolicy.NONE),
    )

    with pytest.raises(ConsumerError, match="its ack_policy is none") as refused:
        await reconcile(jetstream)

    assert f"nats consumer rm {FIRST.stream} {FIRST.name}" in str(refused.value)


async def test_several_replicas_may_reconcile_at_once(jetstream: JetStreamContext) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(reconcile(jetstream))

    for consumer in CONSUMERS:
        found = await config(jetstream, consumer.name, consumer.stream)
        assert drift(found, consumer) == {}


def test_consumers_read_what_is_published_from_the_stream_that_has_it() -> None:
    for consumer in CONSUMERS:
        (stream,) = [each for each in STREAMS if each.takes(consumer.subject)]

        assert consumer.stream == stream.name
        assert consumer.subject in PUBLISHED
