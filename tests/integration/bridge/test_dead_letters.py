"""Dead letters on a real NATS: stored unchanged, and published again as the original messages."""

import asyncio
import json
from typing import Any

import pytest
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from typer.testing import CliRunner

from bridge.jetstream import streams
from bridge.jetstream.dead_letters import DeadLetters, NoSuchLetter
from bridge.mirror.publisher import Mirror
from bridge.mirror.source import Source
from tests.support.polling import WITHIN_S
from tests.support.servers import RunningServer
from workers.cli import app as cli
from workflows.models.entries import Entry
from workflows.models.events import EntrySkipped

SUBJECT = "planning.plan.approved"
CONSUMER = "context-planning-plan-approved"


@pytest.fixture
async def letters(nats_client: Nats, jetstream: JetStreamContext) -> DeadLetters:
    await streams.reconcile(jetstream, replicas=1)
    return DeadLetters(nats_client)


async def received(jetstream: JetStreamContext, body: bytes, **headers: str) -> Msg:
    """Publish a message and return it as a consumer receives it."""
    await jetstream.publish(SUBJECT, body, headers=headers or None)
    return await newest(jetstream)


async def newest(jetstream: JetStreamContext) -> Msg:
    state = (await jetstream.stream_info("PLANNING_EVENTS")).state
    reader = await jetstream.pull_subscribe(SUBJECT, stream="PLANNING_EVENTS")
    messages = await reader.fetch(state.messages, WITHIN_S)
    return messages[-1]


async def test_a_dead_letter_keeps_body_headers_and_what_happened(
    letters: DeadLetters, jetstream: JetStreamContext
) -> None:
    message = await received(jetstream, b"\x00not json", **{"ce-id": "s/1", "X-Sender": "us"})

    await letters.store(message, consumer=CONSUMER, reason="body: is\nno JSON ✗", error="E: 1")
    await letters.store(message, consumer=CONSUMER, reason="again, after a crash")

    (letter,) = [each async for each in letters.list()]
    assert letter.body == b"\x00not json"
    assert letter.headers == {"ce-id": "s/1", "X-Sender": "us"}
    assert (letter.subject, letter.stream, letter.sequence) == (SUBJECT, "PLANNING_EVENTS", 1)
    assert (letter.consumer, letter.deliveries) == (CONSUMER, 1)
    assert letter.reason == "body: is no JSON \\u2717"
    assert letter.error == "E: 1"
    assert (await jetstream.get_msg("DEAD_LETTERS", 1)).subject == f"deadletter.{SUBJECT}"


async def test_a_replayed_letter_is_the_original_again_even_within_the_duplicate_window(
    letters: DeadLetters, jetstream: JetStreamContext
) -> None:
    for_jetstream = {
        "Nats-Msg-Id": "s/1",
        "Nats-Expected-Last-Sequence": "0",
        "nats-expected-stream": "PLANNING_EVENTS",
    }
    sent = for_jetstream | {"ce-id": "s/1", "X-Sender": "us"}
    message = await received(jetstream, b"{}", **sent)
    await letters.store(message, consumer=CONSUMER, reason="r")

    await letters.replay(1)

    again = await newest(jetstream)
    assert again.metadata.sequence.stream == 2
    assert again.data == b"{}"
    assert {name: (again.headers or {})[name] for name in ("ce-id", "X-Sender")} == {
        "ce-id": "s/1",
        "X-Sender": "us",
    }
    kept = {name.lower() for name in again.headers or {}}
    assert {name for name in kept if name.startswith("nats-")} == {"nats-msg-id"}
    assert [each async for each in letters.list()] == []


async def test_a_replayed_envelope_is_identified_by_its_key(
    letters: DeadLetters, jetstream: JetStreamContext
) -> None:
    message = await received(jetstream, b'{"payload": {}, "idempotency_key": "k-1"}')
    await letters.store(message, consumer=CONSUMER, reason="r")

    await letters.replay(1)

    assert "ce-id" not in ((await newest(jetstream)).headers or {})


async def test_a_letter_without_an_id_uses_its_stream_position(
    letters: DeadLetters, jetstream: JetStreamContext
) -> None:
    message = await received(jetstream, b"{}")
    await letters.store(message, consumer=CONSUMER, reason="r")

    await letters.replay(1)

    again = await newest(jetstream)
    assert (again.headers or {})["ce-id"].startswith("PLANNING_EVENTS/1/")


async def test_a_body_that_fills_the_servers_limit_is_cut_and_still_replayed_whole(
    letters: DeadLetters, jetstream: JetStreamContext, nats_client: Nats
) -> None:
    body = b"x" * (nats_client.max_payload - 100)
    message = await received(jetstream, body)

    await letters.store(message, consumer=CONSUMER, reason="too large")
    letter = await letters.get(1)

    assert not letter.whole
    assert letter.size == len(body)
    await jetstream.delete_msg("PLANNING_EVENTS", 1)
    with pytest.raises(NoSuchLetter, match="has no message 1 any more"):
        await letters.replay(1)
    assert (await letters.get(1)).size == len(body)


async def fleet(server: RunningServer, *arguments: str) -> tuple[int, str, str]:
    env = {
        "NATS_URL": server.address,
        "NATS_USER": server.user or "",
        "NATS_PASSWORD": server.password or "",
    }
    ended = await asyncio.to_thread(CliRunner().invoke, cli.app, arguments, env=env)
    if ended.exception and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    return ended.exit_code, ended.stdout, ended.stderr


async def test_the_commands_list_show_replay_and_drop(
    letters: DeadLetters, jetstream: JetStreamContext, nats_server: RunningServer
) -> None:
    for number in range(3):
        message = await received(jetstream, json.dumps({"number": number}).encode())
        await letters.store(message, consumer=CONSUMER, reason=f"reason {number}")

    code, out, _ = await fleet(nats_server, "dead-letters", "list", "--json")
    listed: list[dict[str, Any]] = json.loads(out)
    assert (code, [each["reason"] for each in listed]) == (0, ["reason 0", "reason 1", "reason 2"])
    code, out, _ = await fleet(nats_server, "dead-letters", "list")
    assert "3 dead letters" in out
    assert "reason 1" in out
    code, out, _ = await fleet(nats_server, "dead-letters", "show", "2")
    assert (code, '{"number": 1}' in out) == (0, True)
    code, out, _ = await fleet(nats_server, "dead-letters", "replay", "2", "--json")
    assert (code, json.loads(out)) == (0, {"replayed": [2]})
    code, out, _ = await fleet(nats_server, "dead-letters", "drop", "--all")
    assert (code, out) == (0, "dropped 2: 1, 3\n")
    code, _, err = await fleet(nats_server, "dead-letters", "show", "2")
    assert (code, "There is no dead letter 2" in err) == (1, True)
    code, _, err = await fleet(nats_server, "dead-letters", "replay")
    assert (code, "give the numbers, or --all" in err) == (2, True)
    assert (await jetstream.stream_info("PLANNING_EVENTS")).state.messages == 4


def skipped(step: str, body: dict[str, Any]) -> Entry:
    """Return the record of an entry that a person has skipped."""
    entry = Entry(
        id="story-US-1/run/3",
        kind="StoryCreated",
        subject="planning.story.created",
        source="story-US-1",
        story_id="US-1",
        time="2026-01-01T00:00:00.000Z",
        body=body,
    )
    record = EntrySkipped(
        story_id="US-1",
        timestamp="2026-01-01T00:00:01.000Z",
        reason="it never fits",
        actor="ana",
        error=f"StoryCreated, {step}: no",
        step=step,
        entry=entry.model_dump_json(),
    )
    return Entry(
        id=f"{entry.id}/skipped",
        kind="EntrySkipped",
        subject="deadletter.outbox",
        source=entry.source,
        story_id="US-1",
        time=record.timestamp,
        body=record.model_dump(),
    )


async def test_a_skipped_entry_is_a_dead_letter_that_can_be_published_once_the_graph_has_it(
    letters: DeadLetters, jetstream: JetStreamContext, nats_client: Nats
) -> None:
    mirror = Mirror(nats_client, Source("fleet", "default"))
    body = {"title": "Undo"}

    assert await mirror.store(skipped("publish", body))
    assert not await mirror.store(skipped("publish", body))
    (letter,) = [each async for each in letters.list()]
    await letters.replay(letter.number)

    assert (letter.subject, letter.consumer) == ("planning.story.created", "outbox/publish")
    assert letter.reason == "skipped by ana: it never fits"
    event = await jetstream.get_msg("PLANNING_EVENTS", 1)
    assert json.loads(event.data or b"") == body
    assert (event.headers or {})["ce-id"] == "story-US-1/run/3"
    assert [each async for each in letters.list()] == []


async def test_a_skipped_entry_that_the_graph_refused_is_not_published(
    letters: DeadLetters, nats_client: Nats
) -> None:
    await Mirror(nats_client, Source("fleet", "default")).store(skipped("record", {}))

    with pytest.raises(NoSuchLetter, match="the graph refused"):
        await letters.replay(1)

    assert [each.number async for each in letters.list()] == [1]


async def test_a_skipped_entry_larger_than_a_message_is_kept_in_part(
    letters: DeadLetters, nats_client: Nats
) -> None:
    large = {"title": "x" * (nats_client.max_payload + 1)}

    await Mirror(nats_client, Source("fleet", "default")).store(skipped("publish", large))

    letter = await letters.get(1)
    assert letter.size > nats_client.max_payload
    assert not letter.whole


async def received_raw(nats: Nats, jetstream: JetStreamContext, headers: bytes, body: bytes) -> Msg:
    """As `received`, with headers that this client refuses to publish and other clients do not."""
    block = b"NATS/1.0\r\n" + headers + b"\r\n"
    sizes = f"{len(block)} {len(block) + len(body)}"
    await nats._send_command(f"HPUB {SUBJECT} {sizes}\r\n".encode() + block + body + b"\r\n")
    await nats.flush()
    return await newest(jetstream)


async def test_headers_that_cannot_be_published_are_left_out_and_named(
    letters: DeadLetters, jetstream: JetStreamContext, nats_client: Nats
) -> None:
    headers = b"X/1: a\r\na@b: c\r\n[x]: d\r\nce-id: s/1\r\nX-Sender: us\r\n"
    message = await received_raw(nats_client, jetstream, headers, b"not json")

    await letters.store(message, consumer=CONSUMER, reason="body: is not JSON")

    letter = await letters.get(1)
    assert letter.headers == {"ce-id": "s/1", "X-Sender": "us"}
    assert letter.reason == "body: is not JSON; headers left out: X/1, a@b, [x]"


async def test_of_headers_that_fill_the_servers_limit_the_shortest_are_kept(
    letters: DeadLetters, jetstream: JetStreamContext
) -> None:
    long = {f"X-{number}-{'n' * 100}": "v" * 900 for number in range(60)}
    message = await received(jetstream, b"not json", **long, **{"ce-id": "s/1", "X-Sender": "us"})

    await letters.store(message, consumer=CONSUMER, reason="no " * 900, error="E " * 900)

    letter = await letters.get(1)
    assert {"ce-id": "s/1", "X-Sender": "us"}.items() <= letter.headers.items()
    assert "; headers left out: X-" in letter.reason


async def test_a_letter_whose_headers_are_not_ascii_is_shown_and_replayed(
    letters: DeadLetters, jetstream: JetStreamContext, nats_server: RunningServer
) -> None:
    message = await received(jetstream, b"not json", **{"X-Sender": "José", "ce-id": "s/1"})
    await letters.store(message, consumer=CONSUMER, reason="body: is not JSON")

    code, shown, _ = await fleet(nats_server, "dead-letters", "show", "1", "--json")
    assert code == 0
    assert json.loads(shown)["headers"] == {"X-Sender": "José", "ce-id": "s/1"}

    await letters.replay(1)

    assert ((await newest(jetstream)).headers or {})["X-Sender"] == "José"
