"""The mirror on a real NATS: every event once and in order, whatever fails in between."""

import asyncio
import itertools
import json
import time
from typing import Any

import nats.errors
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.errors import APIError, NoStreamResponseError
from opentelemetry.sdk.trace import TracerProvider
from temporalio.exceptions import ApplicationError

from bridge.jetstream.streams import reconcile
from bridge.mirror.publisher import ACK_WITHIN_S, PUBLISH_FAILURES, REFUSALS, Mirror, entry_error
from bridge.mirror.source import Source
from tests.support.polling import WITHIN_S, until
from tests.support.servers import RunningServer
from workflows.models.entries import Entry, PublishBatch

RUNS = itertools.count()


def entries(*subjects: str) -> list[Entry]:
    """Return numbered entries of one story, with ids that no other call returns."""
    run = next(RUNS)
    return [
        Entry(
            id=f"story-US-1/{run}/{number}",
            kind="Any",
            subject=subject,
            source="story-US-1",
            story_id="US-1",
            time="2026-03-01T10:00:00+00:00",
            body={"story_id": "US-1", "number": number},
        )
        for number, subject in enumerate(subjects)
    ]


@pytest.fixture
async def mirror(nats_client: Nats, jetstream: JetStreamContext) -> Mirror:
    await reconcile(jetstream, replicas=1)
    return Mirror(nats_client, Source("c-1", "default"))


async def stored(jetstream: JetStreamContext, stream: str) -> list[Msg]:
    """Return every message of a stream, in the stream's order."""
    count = (await jetstream.stream_info(stream)).state.messages
    consumer = await jetstream.pull_subscribe(">", stream=stream)
    return [message for _ in range(count) for message in await consumer.fetch(1, WITHIN_S)]


async def numbers(jetstream: JetStreamContext, stream: str) -> list[int]:
    return [json.loads(message.data)["number"] for message in await stored(jetstream, stream)]


async def test_an_event_is_flat_json_with_its_cloud_event_in_the_headers(
    mirror: Mirror, jetstream: JetStreamContext
) -> None:
    (entry,) = entries("planning.story.created")

    await mirror.publish(PublishBatch(entries=[entry]))

    (message,) = await stored(jetstream, "PLANNING_EVENTS")
    assert message.subject == "planning.story.created"
    assert json.loads(message.data) == {"story_id": "US-1", "number": 0}
    sent = {
        name: value for name, value in (message.headers or {}).items() if "Expected" not in name
    }
    assert sent == {
        "Nats-Msg-Id": entry.id,
        "Content-Type": "application/json",
        "ce-specversion": "1.0",
        "ce-id": entry.id,
        "ce-source": "/swe-ai-fleet/c-1/default/story-US-1",
        "ce-type": "planning.story.created",
        "ce-time": "2026-03-01T10:00:00+00:00",
        "ce-subject": "US-1",
    }


async def test_an_event_carries_the_trace_it_was_published_in(
    mirror: Mirror, jetstream: JetStreamContext
) -> None:
    tracer = TracerProvider().get_tracer("test")

    with tracer.start_as_current_span("publish") as span:
        await mirror.publish(PublishBatch(entries=entries("context.updated")))

    (message,) = await stored(jetstream, "CONTEXT")
    trace = f"{span.get_span_context().trace_id:032x}"
    assert (message.headers or {})["traceparent"].split("-")[1] == trace


async def test_a_batch_published_twice_is_stored_once_and_in_order(
    mirror: Mirror, jetstream: JetStreamContext
) -> None:
    batch = PublishBatch(entries=entries(*["planning.story.transitioned"] * 20))

    await mirror.publish(batch)
    await mirror.publish(batch)

    assert await numbers(jetstream, "PLANNING_EVENTS") == list(range(20))


@pytest.mark.parametrize(
    ("forged", "differs"),
    [
        ({}, "Content-Type, ce-specversion"),
        ({"body": b'{"story_id":"US-1","number":7}'}, "body"),
        ({"headers": {"ce-source": "/elsewhere"}}, "ce-source"),
        ({"headers": {"ce-type": "planning.story.done"}}, "ce-type"),
        ({"subject": "planning.gate.closed"}, "subject"),
    ],
)
async def test_an_event_whose_id_someone_used_first_is_not_taken_for_published(
    mirror: Mirror, jetstream: JetStreamContext, forged: dict[str, Any], differs: str
) -> None:
    (entry,) = entries("planning.gate.approved")
    own = mirror.headers(entry) if forged else {"Nats-Msg-Id": entry.id}
    await jetstream.publish(
        forged.get("subject", entry.subject),
        forged.get("body", b'{"story_id":"US-1","number":0}'),
        headers=own | forged.get("headers", {}),
    )

    with pytest.raises(ApplicationError, match=differs) as failed:
        await mirror.publish(PublishBatch(entries=[entry]))

    assert (failed.value.type, failed.value.non_retryable) == ("EventIdTaken", False)
    assert "number 1" in str(failed.value)


async def test_an_event_that_was_deleted_from_its_stream_is_known_there(
    mirror: Mirror, jetstream: JetStreamContext
) -> None:
    (entry,) = entries("planning.gate.approved")
    await mirror.publish(PublishBatch(entries=[entry]))
    await jetstream.delete_msg("PLANNING_EVENTS", 1)

    assert not await mirror.store(entry)


@given(attempts=st.lists(st.integers(0, 8), max_size=4), at_once=st.booleans())
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
async def test_attempts_that_stopped_anywhere_leave_each_event_once_and_in_order(
    mirror: Mirror, jetstream: JetStreamContext, attempts: list[int], at_once: bool
) -> None:
    await jetstream.purge_stream("CONTEXT")
    batch = entries(*["context.decision.added"] * 8)
    tries = [PublishBatch(entries=batch[:stop]) for stop in [*attempts, 8]]

    if at_once:  # an earlier attempt that timed out may still be running
        await asyncio.gather(*(mirror.publish(attempt) for attempt in tries))
    else:
        for attempt in tries:
            await mirror.publish(attempt)

    assert await numbers(jetstream, "CONTEXT") == list(range(8))


async def test_a_failure_in_mid_batch_stops_there_and_the_retry_completes_it(
    mirror: Mirror, jetstream: JetStreamContext
) -> None:
    await jetstream.delete_stream("ORCHESTRATOR_EVENTS")
    planning, dispatch = "planning.task.created", "orchestration.task.dispatched"
    batch = PublishBatch(entries=entries(planning, planning, dispatch, planning))

    with pytest.raises(ApplicationError, match="no stream takes the subject") as failed:
        await mirror.publish(batch)
    assert (failed.value.type, failed.value.non_retryable) == ("NoStream", False)
    assert batch.entries[2].id in str(failed.value)
    assert await numbers(jetstream, "PLANNING_EVENTS") == [0, 1]

    await reconcile(jetstream, replicas=1)
    await mirror.publish(batch)

    assert await numbers(jetstream, "PLANNING_EVENTS") == [0, 1, 3]
    assert await numbers(jetstream, "ORCHESTRATOR_EVENTS") == [2]


async def test_a_stream_that_took_anothers_subject_is_noticed(
    mirror: Mirror, jetstream: JetStreamContext
) -> None:
    await jetstream.delete_stream("CONTEXT")
    await jetstream.add_stream(name="IMPOSTOR", subjects=["context.>"])

    with pytest.raises(ApplicationError) as failed:
        await mirror.publish(PublishBatch(entries=entries("context.updated")))

    assert failed.value.type == "StreamRefused"
    assert (await jetstream.stream_info("IMPOSTOR")).state.messages == 0
    await jetstream.delete_stream("IMPOSTOR")


async def test_an_event_that_no_declared_stream_takes_is_not_lost_silently(
    mirror: Mirror,
) -> None:
    with pytest.raises(ApplicationError, match="no declared stream takes it"):
        await mirror.publish(PublishBatch(entries=entries("elsewhere.happened")))


async def test_an_event_over_the_servers_limit_is_reported(
    mirror: Mirror, jetstream: JetStreamContext
) -> None:
    (entry,) = entries("context.updated")
    large = entry.model_copy(update={"body": {"text": "x" * 9_000_000}})

    with pytest.raises(ApplicationError, match="raise max_payload") as failed:
        await mirror.publish(PublishBatch(entries=[large]))

    assert failed.value.type == "EventTooLarge"
    assert await stored(jetstream, "CONTEXT") == []


async def test_while_nats_is_away_a_publish_fails_at_once_and_afterwards_nothing_is_missing(
    mirror: Mirror, jetstream: JetStreamContext, nats_client: Nats, nats_server: RunningServer
) -> None:
    batch = PublishBatch(entries=entries(*["planning.story.transitioned"] * 6))
    await mirror.publish(PublishBatch(entries=batch.entries[:3]))
    await nats_server.kill()
    await until(lambda: not nats_client.is_connected)

    began = time.monotonic()
    with pytest.raises(ApplicationError) as failed:
        await mirror.publish(batch)
    took = time.monotonic() - began

    assert (failed.value.type, failed.value.non_retryable) == ("NatsAway", False)
    assert took < ACK_WITHIN_S

    await nats_server.start()
    await until(lambda: nats_client.is_connected)
    await mirror.publish(batch)
    assert await numbers(jetstream, "PLANNING_EVENTS") == list(range(6))


def every_kind_of(error: type[Exception]) -> list[type[Exception]]:
    return [error, *(one for kind in error.__subclasses__() for one in every_kind_of(kind))]


def test_every_error_of_the_client_is_classed_and_only_malformed_events_are_given_up() -> None:
    (entry,) = entries("planning.story.created")
    given_up = []

    for kind in every_kind_of(nats.errors.Error):
        error = type(kind.__name__, (kind,), {"__str__": lambda _: "", "__init__": lambda _: None})
        failure = entry_error(entry, error())
        assert failure.type, kind
        given_up += [kind] * failure.non_retryable

    malformed = (nats.errors.BadSubjectError, nats.errors.BadHeaderError)
    assert {kind for kind in given_up if kind in malformed} == set(malformed)
    assert all(issubclass(kind, malformed) for kind in given_up)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NoStreamResponseError(), "NoStream"),
        (APIError(code=503, description="no leader"), "StreamRefused"),
        (nats.errors.MaxPayloadError(), "EventTooLarge"),
        (nats.errors.BadSubjectError(), "InvalidEvent"),
        (nats.errors.OutboundBufferLimitError(), "NatsAway"),
        (nats.errors.ConnectionClosedError(), "NatsAway"),
        (nats.errors.TimeoutError(), "NoAck"),
        (OSError("broken pipe"), "NatsAway"),
    ],
)
def test_an_errors_type_names_the_failure(error: Exception, kind: str) -> None:
    (entry,) = entries("planning.story.created")

    assert entry_error(entry, error).type == kind


def test_every_error_of_publish_is_in_the_table() -> None:
    known = [error for error, *_ in REFUSALS]

    assert all(issubclass(error, PUBLISH_FAILURES) for error in known)
    assert set(PUBLISH_FAILURES) <= set(known)


def test_an_internal_error_is_not_translated() -> None:
    (entry,) = entries("planning.story.created")

    with pytest.raises(KeyError):
        entry_error(entry, KeyError("a bug"))
