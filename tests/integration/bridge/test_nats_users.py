"""What the users of NATS can do, by attacks: each does its own work and nothing else."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable

import nats
import pytest
from nats.aio.client import Client as NatsClient
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeout
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig, StreamConfig

from bridge.jetstream import consumers, streams
from deploy.local.nats_users import AGENT_INBOX, INBOX
from deploy.local.servers import Nats
from tests.support.polling import WITHIN_S, until
from tests.support.servers import RunningServer

STREAMS = [stream.name for stream in streams.STREAMS]
ANSWER_WITHIN_S = 0.1

Open = Callable[[str], Awaitable[tuple[NatsClient, list[str]]]]


@pytest.fixture
async def opened(nats_server: RunningServer, jetstream: JetStreamContext) -> AsyncIterator[Open]:
    """Create the fleet's streams and consumers; yield a function that connects as a user."""
    await streams.reconcile(jetstream, 1)
    await consumers.reconcile(jetstream)
    server = nats_server.process.server
    assert isinstance(server, Nats)
    clients = []

    async def connect(user: str) -> tuple[NatsClient, list[str]]:
        errors: list[str] = []

        async def note(error: Exception) -> None:
            errors.append(str(error).lower())

        env = server.env(user)
        client = await nats.connect(
            env["NATS_URL"],
            user=env["NATS_USER"],
            password=env["NATS_PASSWORD"],
            inbox_prefix=AGENT_INBOX if user == "agent" else INBOX,
            error_cb=note,
        )
        clients.append(client)
        return client, errors

    yield connect
    for client in clients:
        await client.close()


async def stored(jetstream: JetStreamContext) -> dict[str, int]:
    return {name: (await jetstream.stream_info(name)).state.messages for name in STREAMS}


async def attempt(client: NatsClient, subject: str, body: object = None) -> bytes | None:
    """Send a request; return the answer, None if no one answers."""
    data = json.dumps(body).encode() if body is not None else b""
    try:
        return (await client.request(subject, data, timeout=ANSWER_WITHIN_S)).data
    except (NatsTimeout, NoRespondersError):
        return None


@pytest.mark.parametrize("user", ["agent", "subscriber", "publisher"])
async def test_no_one_else_changes_a_stream(
    user: str, opened: Open, jetstream: JetStreamContext
) -> None:
    await jetstream.publish("planning.story.created", b"{}")
    await jetstream.publish("agent.cmd.DEV", b"{}")
    before = await stored(jetstream)
    client, errors = await opened(user)

    for name in STREAMS:
        loose = StreamConfig(name=name, subjects=["elsewhere.>"], max_msgs=1).as_dict()
        assert await attempt(client, f"$JS.API.STREAM.DELETE.{name}") is None
        assert await attempt(client, f"$JS.API.STREAM.PURGE.{name}") is None
        assert await attempt(client, f"$JS.API.STREAM.UPDATE.{name}", loose) is None
        assert await attempt(client, f"$JS.API.STREAM.MSG.DELETE.{name}", {"seq": 1}) is None
    assert await attempt(client, "$JS.API.STREAM.CREATE.X", {"name": "X"}) is None

    attacks = 4 * len(STREAMS) + 1
    await until(lambda: sum("permissions violation" in each for each in errors) == attacks)
    assert await stored(jetstream) == before


@pytest.mark.parametrize(
    ("user", "forged"),
    [
        *(
            ("agent", subject)
            for subject in (
                "planning.story.transitioned",
                "planning.plan.approved",
                "context.decision.added",
                "orchestration.deliberation.completed",
                "agent.cmd.DEV",
                "deadletter.planning.plan.approved",
            )
        ),
        *(
            ("subscriber", subject)
            for subject in (
                "planning.story.transitioned",
                "context.updated",
                "orchestration.task.dispatched",
                "agent.cmd.DEV",
                "agent.response.t-1",
            )
        ),
        *(
            ("publisher", subject)
            for subject in (
                "planning.story.created",
                "planning.gate.approved",
                "planning.story.delivered",
                "agent.cmd.DEV",
                "agent.response.t-1",
                "deadletter.planning.plan.approved",
            )
        ),
    ],
)
async def test_each_user_may_publish_only_its_own_subjects(
    user: str, forged: str, opened: Open, jetstream: JetStreamContext
) -> None:
    before = await stored(jetstream)
    client, errors = await opened(user)

    await client.publish(forged, b'{"story_id": "US-7"}')
    await client.flush()

    await until(lambda: any("permissions violation" in each for each in errors))
    assert await stored(jetstream) == before


@pytest.mark.parametrize("consumer", consumers.CONSUMERS, ids=lambda each: each.name)
async def test_a_subscriber_cannot_read_from_the_fleets_consumers(
    consumer: consumers.Consumer, opened: Open, jetstream: JetStreamContext
) -> None:
    before = await jetstream.consumer_info(consumer.stream, consumer.name)
    await jetstream.publish(consumer.subject, b'{"story_id": "US-7"}')
    client, _ = await opened("subscriber")
    path = f"{consumer.stream}.{consumer.name}"
    named = {"name": consumer.name}
    durable = {"durable_name": consumer.name}

    def deaf(**names: str) -> dict[str, object]:
        config = ConsumerConfig(filter_subject="planning.nothing").evolve(**names)
        return {"stream_name": consumer.stream, "config": config.as_dict()}

    for attack, body in (
        (f"$JS.API.CONSUMER.DELETE.{path}", None),
        (f"$JS.API.CONSUMER.PAUSE.{path}", {"pause_until": "2099-01-01T00:00:00Z"}),
        (f"$JS.API.CONSUMER.RESET.{path}", None),
        (f"$JS.API.CONSUMER.UNPIN.{path}", None),
        (f"$JS.API.CONSUMER.CREATE.{path}", deaf(**named)),
        (f"$JS.API.CONSUMER.CREATE.{path}", deaf(**named, **durable)),
        (f"$JS.API.CONSUMER.CREATE.{path}.planning.nothing", deaf(**named, **durable)),
        (f"$JS.API.CONSUMER.DURABLE.CREATE.{path}", deaf(**durable)),
        (f"$JS.API.CONSUMER.MSG.NEXT.{path}", {"batch": 1}),
        (f"$JS.API.CONSUMER.LEADER.STEPDOWN.{path}", None),
    ):
        assert await attempt(client, attack, body) is None, attack
    for names in (named, durable, named | durable):  # the subject names another, or none
        await attempt(client, f"$JS.API.CONSUMER.CREATE.{consumer.stream}", deaf(**names))
        other = f"$JS.API.CONSUMER.CREATE.{consumer.stream}.other"
        await attempt(client, other, deaf(**names))
        durable_other = f"$JS.API.CONSUMER.DURABLE.CREATE.{consumer.stream}.other"
        await attempt(client, durable_other, deaf(**names))

    after = await jetstream.consumer_info(consumer.stream, consumer.name)
    assert after.config == before.config
    assert after.num_pending == before.num_pending + 1


@pytest.mark.parametrize("user", ["subscriber", "publisher"])
@pytest.mark.parametrize("subject", [">", "_INBOX_fleet.>", "_INBOX_agent.>", "agent.>", "$JS.>"])
async def test_no_one_reads_what_others_asked_for(user: str, subject: str, opened: Open) -> None:
    client, errors = await opened(user)

    await client.subscribe(subject)
    await client.flush()

    await until(lambda: any("permissions violation for subscription" in each for each in errors))


async def test_an_agent_reads_no_events(opened: Open) -> None:
    client, errors = await opened("agent")

    for subject in ("planning.>", "agent.response.>", "_INBOX.>"):
        await client.subscribe(subject)
    await client.flush()

    await until(lambda: len(errors) == 3)
    with pytest.raises(NatsError):
        await client.jetstream(timeout=ANSWER_WITHIN_S).pull_subscribe(
            "agent.response.>", durable="spy", stream="AGENT_RESPONSES"
        )


async def test_a_subscriber_reads_events_with_a_separate_durable_consumer(
    opened: Open, jetstream: JetStreamContext
) -> None:
    await jetstream.publish("planning.story.created", b"first")
    client, errors = await opened("subscriber")
    live = await client.subscribe("planning.>")

    pushed = await client.jetstream().subscribe("planning.>", durable="me")
    pulled = await client.jetstream().pull_subscribe("planning.>", durable="me-too")

    for message in (await pushed.next_msg(WITHIN_S), (await pulled.fetch(1, WITHIN_S))[0]):
        assert message.data == b"first"
    await jetstream.publish("planning.story.created", b"second")
    second = await pushed.next_msg(WITHIN_S)
    await second.ack_sync()
    assert (await live.next_msg(WITHIN_S)).data == b"second"
    assert errors == []


async def test_a_publisher_sends_what_the_inbox_reads_and_gets_the_acknowledgement(
    opened: Open,
) -> None:
    client, errors = await opened("publisher")

    for consumer in consumers.CONSUMERS:
        ack = await client.jetstream().publish(consumer.subject, b'{"story_id": "US-7"}')
        assert ack.stream == consumer.stream
    assert errors == []
