"""`fleet events` on a real NATS: each event once, in order, across a server restart."""

import asyncio
import itertools
import json
import subprocess
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from nats.aio.client import Client as Nats
from nats.js import JetStreamContext
from typer.testing import CliRunner

from bridge.jetstream.streams import reconcile
from bridge.mirror.publisher import Mirror
from bridge.mirror.source import Source
from tests.support.fleet import Environment
from tests.support.polling import WITHIN_S, until
from tests.support.servers import RunningServer
from workers.cli import app as cli
from workers.environment import ROOT
from workflows.models.entries import Entry, PublishBatch

NUMBERS = itertools.count()

SUBJECTS = ("planning.gate.opened", "orchestration.round.completed", "context.updated")
"""One subject of each stream."""


def an_entry(subject: str, story: str = "US-1", **body: Any) -> Entry:
    number = next(NUMBERS)
    return Entry(
        id=f"story-{story}/run/{number}",
        kind="Any",
        subject=subject,
        source=f"story-{story}",
        story_id=story,
        time="2026-03-01T10:00:00+00:00",
        body={"story_id": story, "number": number, **body},
    )


@pytest.fixture
async def mirror(nats_client: Nats, jetstream: JetStreamContext) -> Mirror:
    await reconcile(jetstream, replicas=1)
    return Mirror(nats_client, Source("c-1", "default"))


@pytest.fixture
def environment(nats_server: RunningServer) -> Environment:
    return {
        "NATS_URL": nats_server.address,
        "NATS_USER": nats_server.user or "",
        "NATS_PASSWORD": nats_server.password or "",
        "COLUMNS": "200",
    }


async def publish(mirror: Mirror, *entries: Entry) -> list[str]:
    """Publish the entries to the streams and return their ids."""
    await mirror.publish(PublishBatch(entries=list(entries)))
    return [entry.id for entry in entries]


async def command(environment: Environment, *arguments: str) -> tuple[int, str, str]:
    ended = await asyncio.to_thread(CliRunner().invoke, cli.app, arguments, env=environment)
    if ended.exception and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    return ended.exit_code, ended.stdout, ended.stderr


async def there(environment: Environment, *arguments: str) -> list[dict[str, Any]]:
    """Return the events in the streams, as the command prints them."""
    code, out, err = await command(environment, "events", "--no-follow", "--json", *arguments)
    assert (code, err) == (0, "")
    return [json.loads(line) for line in out.splitlines()]


@asynccontextmanager
async def following(environment: Environment, *arguments: str) -> AsyncIterator[Process]:
    """Run the command as a process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "workers.cli", "events", "--json", *arguments,
        env=environment, cwd=ROOT, stdout=PIPE, stderr=PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def until_following(jetstream: JetStreamContext) -> None:
    """Wait until each stream has a consumer."""
    for stream in ("PLANNING_EVENTS", "CONTEXT", "ORCHESTRATOR_EVENTS"):
        await until(partial(jetstream.stream_info, stream), lambda info: info.state.consumer_count)


async def lines(process: Process, count: int) -> list[dict[str, Any]]:
    assert process.stdout
    async with asyncio.timeout(WITHIN_S):
        return [json.loads(await process.stdout.readline()) for _ in range(count)]


async def test_stored_events_are_shown_in_order_and_then_the_command_ends(
    mirror: Mirror, environment: Environment
) -> None:
    ids = await publish(mirror, *(an_entry(SUBJECTS[n % 3]) for n in range(300)))

    events = await there(environment)

    assert [event["id"] for event in events] == ids
    assert set(events[0]) == {"subject", "id", "time", "story", "body"}
    assert events[1]["subject"] == SUBJECTS[1]
    assert (events[0]["story"], events[0]["time"]) == ("US-1", "2026-03-01T10:00:00+00:00")
    assert events[0]["body"]["story_id"] == "US-1"


async def test_only_the_events_of_the_story_that_is_asked_for_are_shown(
    mirror: Mirror, environment: Environment
) -> None:
    await publish(mirror, an_entry(SUBJECTS[0], "US-10"))
    ids = await publish(mirror, an_entry(SUBJECTS[1], "US-1"), an_entry(SUBJECTS[2], "US-1"))

    events = await there(environment, "--story", "US-1")

    assert [event["id"] for event in events] == ids


@pytest.mark.parametrize("as_span", [True, False])
async def test_since_begins_with_what_was_stored_from_then_on(
    mirror: Mirror, environment: Environment, as_span: bool
) -> None:
    await publish(mirror, *(an_entry(subject) for subject in SUBJECTS))
    await asyncio.sleep(21 if as_span else 0.1)  # so that these are older than the requested period
    begin = datetime.now(UTC)
    ids = await publish(mirror, *(an_entry(subject) for subject in SUBJECTS))

    events = await there(environment, "--since", "20s" if as_span else begin.isoformat())

    assert [event["id"] for event in events] == ids


async def test_a_line_is_readable_and_commands_no_terminal(
    mirror: Mirror, environment: Environment, jetstream: JetStreamContext
) -> None:
    await publish(
        mirror,
        an_entry("planning.gate.opened", gate="approve_scope", role="PO"),
        an_entry(
            "planning.story.transitioned",
            from_phase="DRAFT",
            to_phase="DESIGN",
            event="approve_scope",
            actor="[bold]ana\x1b[31m",
        ),
    )
    await jetstream.publish("planning.story.renamed", b"\xff not JSON \x1b[2J")
    await jetstream.publish("planning.gate.opened", b'{"story_id": "US-2"}')

    code, out, err = await command(environment, "events", "--no-follow")

    shown = out.splitlines()
    assert (code, err, len(shown)) == (0, "", 4)
    assert shown[0].endswith("US-1          gate approve_scope waits for PO")
    assert "DRAFT -> DESIGN by approve_scope ([bold]ana" in shown[1]
    assert "planning.story.renamed" in shown[2]
    assert shown[3].endswith("US-2          gate ? waits for ?")
    assert "\x1b" not in out


async def test_what_others_wrap_and_name_in_their_own_ways_is_shown_with_its_story(
    mirror: Mirror, environment: Environment, jetstream: JetStreamContext
) -> None:
    fields = {"case_id": "US-7", "from_phase": "DRAFT", "to_phase": "DESIGN"}
    envelope = {
        "event_type": "planning.story.transitioned",
        "idempotency_key": "k-1",
        "timestamp": "2026-03-01T10:00:00Z",
        "payload": fields | {"from_phase": "DESIGN", "to_phase": "BUILD"},
    }
    for each in (fields, envelope, fields | {"case_id": "US-8"}):
        await jetstream.publish("planning.story.transitioned", json.dumps(each).encode())

    code, out, err = await command(environment, "events", "--no-follow", "--story", "US-7")

    shown = out.splitlines()
    assert (code, err, len(shown)) == (0, "", 2), out
    assert "DRAFT -> DESIGN" in shown[0]
    assert "DESIGN -> BUILD" in shown[1]


async def test_a_message_of_anyone_has_an_identity_and_its_text_as_body(
    mirror: Mirror, environment: Environment, jetstream: JetStreamContext
) -> None:
    ack = await jetstream.publish("context.updated", b"not JSON")

    (events,) = await there(environment)

    assert events["id"] == f"CONTEXT/{ack.seq}"
    assert events["body"] == "not JSON"
    assert events["story"] == ""
    assert datetime.fromisoformat(events["time"]).tzinfo


async def test_following_from_now_shows_only_new_events(
    mirror: Mirror, environment: Environment, jetstream: JetStreamContext
) -> None:
    await publish(mirror, *(an_entry(subject) for subject in SUBJECTS))

    async with following(environment) as process:
        await until_following(jetstream)
        ids = await publish(mirror, *(an_entry(subject) for subject in SUBJECTS))
        events = await lines(process, 3)

    assert [event["id"] for event in events] == ids


async def test_a_restart_of_nats_is_logged_once_and_nothing_is_lost_or_doubled(
    mirror: Mirror,
    environment: Environment,
    jetstream: JetStreamContext,
    nats_server: RunningServer,
    nats_client: Nats,
) -> None:
    before = await publish(mirror, *(an_entry(SUBJECTS[n % 3]) for n in range(6)))

    async with following(environment, "--since", "1h") as process:
        events = await lines(process, 6)
        await nats_server.kill()
        assert process.stderr
        async with asyncio.timeout(WITHIN_S):
            away = await process.stderr.readline()
        await asyncio.sleep(2)  # several connection attempts fail meanwhile
        await nats_server.start()
        await until(lambda: nats_client.is_connected)
        after = await publish(mirror, *(an_entry(SUBJECTS[n % 3]) for n in range(6)))
        events += await lines(process, 6)
        back = await process.stderr.readline()
        last = await publish(mirror, an_entry(SUBJECTS[0]))
        events += await lines(process, 1)
        process.terminate()
        rest = await process.stderr.read()

    assert [event["id"] for event in events] == before + after + last
    assert away.endswith(b"is away; this goes on when it is back\n")
    assert back.endswith(b"is back\n")
    assert rest == b""


async def test_a_stream_that_is_created_again_is_followed_from_its_first_event(
    mirror: Mirror, environment: Environment, jetstream: JetStreamContext
) -> None:
    await publish(mirror, *(an_entry(SUBJECTS[0]) for _ in range(3)))

    async with following(environment, "--since", "1h") as process:
        await lines(process, 3)
        await jetstream.delete_stream("PLANNING_EVENTS")
        await reconcile(jetstream, replicas=1)
        ids = await publish(mirror, an_entry(SUBJECTS[0]))
        events = await lines(process, 1)

    assert [event["id"] for event in events] == ids


@pytest.mark.parametrize(
    ("since", "rule"),
    [
        ("yesterday", "is not a time such as 2026-03-01T10:00"),
        ("10", "a number with s, m, h or d, such as 10m, 2h, 1d"),
        ("0m", "is not a time"),
        ("-5m", "is not a time"),
        ("10w", "is not a time"),
        ("999999d", "before the calendar begins"),
        ("2999-01-01T10:00", "is yet to come"),
        ("", "is not a time"),
    ],
)
async def test_a_bad_since_is_refused_with_the_rule(
    environment: Environment, since: str, rule: str
) -> None:
    code, out, err = await command(environment, "events", f"--since={since}")

    assert (code, out) == (1, "")
    assert rule in err


async def test_wrong_options_and_targets_are_refused(
    environment: Environment, nats_client: Nats
) -> None:
    unknown = await command(environment, "events", "--sinse", "2h")
    story = await command(environment, "events", "--story", "planning.>")
    streams = await command(environment, "events", "--no-follow")
    nowhere = await command(environment | {"NATS_URL": "nats://127.0.0.1:1"}, "events")

    assert (unknown[0], story[0], streams[0], nowhere[0]) == (2, 1, 1, 1)
    assert "No such option" in unknown[2]
    assert "is not a story id" in story[2]
    assert "NATS has no stream PLANNING_EVENTS: the bridge makes it" in streams[2]
    assert "is not reachable" in nowhere[2]


async def test_a_reader_may_disconnect(mirror: Mirror, environment: Environment) -> None:
    await publish(mirror, *(an_entry(SUBJECTS[n % 3]) for n in range(50)))

    ended = await asyncio.to_thread(
        subprocess.run,
        ["bash", "-c", f"'{sys.executable}' -m workers.cli events --no-follow --json | head -1"],
        env=environment, cwd=ROOT, capture_output=True, timeout=WITHIN_S, check=False,
    )  # fmt: skip

    assert (len(ended.stdout.splitlines()), ended.stderr) == (1, b"")
