"""The example that opens pull requests, as a process, with a forge that records its requests."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from nats.js import JetStreamContext

from bridge.jetstream import streams
from deploy.local.servers import Nats
from tests.support.forge import Forge
from tests.support.polling import WITHIN_S, until
from tests.support.servers import RunningServer
from workers.environment import ROOT
from workflows.models.events import StoryDelivered

SUBJECT = StoryDelivered.SUBJECT
COMMIT = "9fceb02d0ae598e95dc970b74767f19372d61af8"


class Example:
    """The subscriber as a process, and the `lines` that it has printed."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout
        while line := await self.process.stdout.readline():
            self.lines.append(line.decode().rstrip())

    async def printed(self, words: str, times: int = 1) -> None:
        async def there() -> bool:
            assert self.process.returncode is None, self.lines
            return sum(words in line for line in self.lines) >= times

        await until(there)

    async def ended(self) -> str:
        """Wait for its end, and return its last line."""
        assert await asyncio.wait_for(self.process.wait(), WITHIN_S) == 1
        await self._reading
        return self.lines[-1]


@pytest.fixture
async def bus(jetstream: JetStreamContext) -> JetStreamContext:
    await streams.reconcile(jetstream, 1)
    return jetstream


@pytest.fixture
async def forge() -> AsyncIterator[Forge]:
    async with Forge() as forge:
        yield forge


@asynccontextmanager
async def example(
    nats_server: RunningServer, forge: Forge, token: str = "", target: str = "team/ratelimit"
) -> AsyncIterator[Example]:
    """Run the example with the credentials of a subscriber."""
    server = nats_server.process.server
    assert isinstance(server, Nats)
    given = {"FORGE_URL": forge.url, "FORGE_TOKEN": token or forge.token}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.examples.pull_requests.subscriber"),
        *("--repository", f"sample={target}"),
        env=os.environ | server.env("subscriber") | given,
        cwd=ROOT,
        stdout=PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield Example(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def deliver(bus: JetStreamContext, story_id: str, **fields: Any) -> None:
    """Publish a delivery as the fleet does."""
    body = {
        "story_id": story_id,
        "repository": "sample",
        "branch": f"story/{story_id}",
        "commit": COMMIT,
        "base": "e83c5163316f89bfbde7d9ab23ca2e25604af290",
        "files_changed": 2,
        "insertions": 5,
        "deletions": 1,
        "timestamp": "2026-03-01T10:00:00.000Z",
    }
    await bus.publish(SUBJECT, json.dumps(body | fields).encode())


async def unsettled(bus: JetStreamContext) -> int:
    found = await bus.consumer_info("PLANNING_EVENTS", "pull-requests")
    return (found.num_pending or 0) + (found.num_ack_pending or 0)


async def settled(bus: JetStreamContext) -> None:
    await until(lambda: unsettled(bus), lambda left: left == 0)


async def test_a_delivered_story_gets_one_pull_request(
    nats_server: RunningServer, bus: JetStreamContext, forge: Forge
) -> None:
    async with example(nats_server, forge) as subscriber:
        await subscriber.printed("waits for planning.story.delivered")
        await deliver(bus, "US-101")
        await subscriber.printed("US-101: opened https://forge.example/team/ratelimit/pulls/1")
        await deliver(bus, "US-101")
        await subscriber.printed("US-101: found https://forge.example/team/ratelimit/pulls/1")
        await settled(bus)

    (pull,) = forge.opened
    assert (pull["head"], pull["base"]) == ("story/US-101", "main")
    assert pull["title"].startswith("US-101")
    assert COMMIT in pull["body"]
    assert "2 files, 5 insertions, 1 deletions" in pull["body"]
    assert {each.token for each in forge.requests} == {f"token {forge.token}"}
    assert forge.requests[0].query["head"] == "team:story/US-101"
    assert forge.token not in "".join(subscriber.lines)


async def test_a_pull_request_is_found_among_many(
    nats_server: RunningServer, bus: JetStreamContext, forge: Forge
) -> None:
    for number in range(60):
        forge.add(f"feature/{number}")
    forge.add("story/US-101", base="other")
    forge.add("story/US-101", state="closed", commit="0" * 40)
    forge.add("story/US-101", state="closed", commit=COMMIT)
    async with example(nats_server, forge) as subscriber:
        await subscriber.printed("waits for")
        await deliver(bus, "US-101")
        await subscriber.printed("US-101: found https://forge.example/team/ratelimit/pulls/63")
        await deliver(bus, "US-101", commit="1" * 40)
        await subscriber.printed("US-101: opened")

    assert len(forge.opened) == 1


async def test_a_forge_that_is_away_is_asked_again(
    nats_server: RunningServer, bus: JetStreamContext, forge: Forge
) -> None:
    away = web.Response(status=503, headers={"Retry-After": "1"})
    busy = web.Response(status=429, headers={"Retry-After": "1"})
    forge.failures += [away, busy]
    async with example(nats_server, forge) as subscriber:
        await subscriber.printed("waits for")
        await deliver(bus, "US-101")
        await subscriber.printed("US-101: opened")
        await settled(bus)

    assert [line for line in subscriber.lines if "again in 1 s" in line] == [
        "US-101: the forge answers 503; again in 1 s",
        "US-101: the forge answers 429; again in 1 s",
    ]
    assert len(forge.opened) == 1


async def test_a_wrong_token_ends_it_and_loses_no_story(
    nats_server: RunningServer, bus: JetStreamContext, forge: Forge
) -> None:
    async with example(nats_server, forge, token="another") as subscriber:
        await subscriber.printed("waits for")
        await deliver(bus, "US-101")
        why = await subscriber.ended()
    async with example(nats_server, forge) as subscriber:
        await subscriber.printed("US-101: opened")

    assert why.startswith("FORGE_TOKEN: the forge answers 401")
    assert "token is invalid" in why
    assert len(forge.opened) == 1


async def test_an_unknown_repository_of_the_forge_is_named(
    nats_server: RunningServer, bus: JetStreamContext, forge: Forge
) -> None:
    async with example(nats_server, forge, target="team/gone") as subscriber:
        await subscriber.printed("waits for")
        await deliver(bus, "US-101")
        why = await subscriber.ended()

    assert why.startswith("--repository: the forge has no repos/team/gone/pulls")


async def test_a_repository_that_has_moved_is_named_and_no_story_is_lost(
    nats_server: RunningServer, bus: JetStreamContext, forge: Forge
) -> None:
    forge.failures += [web.Response(status=301, headers={"Location": "/repositories/7"})]
    async with example(nats_server, forge) as subscriber:
        await subscriber.printed("waits for")
        await deliver(bus, "US-101")
        why = await subscriber.ended()
    async with example(nats_server, forge) as subscriber:
        await subscriber.printed("US-101: opened")

    assert why.startswith("--repository: repos/team/ratelimit/pulls has moved to /repositories/7")


async def test_what_no_pull_request_can_be_made_of_is_settled_with_the_reason(
    nats_server: RunningServer, bus: JetStreamContext, forge: Forge
) -> None:
    async with example(nats_server, forge) as subscriber:
        await subscriber.printed("waits for")
        await bus.publish(SUBJECT, b"not JSON")
        await subscriber.printed("drops what is not a delivery")
        await deliver(bus, "US-102", repository="another")
        await subscriber.printed("US-102: leaves another, which no --repository names")
        empty = web.json_response({"message": "no commits between"}, status=422)
        forge.failures += [web.json_response([]), empty]
        await deliver(bus, "US-103")
        await subscriber.printed("US-103: refused: 422: no commits between")
        await settled(bus)

    assert [each["head"] for each in forge.opened] == ["story/US-103"]
    assert forge.pulls == []


@pytest.mark.parametrize(
    ("url", "target", "rule"),
    [
        ("http://forge.example/api/v1", "sample=team/x", "is plain text; use https"),
        ("forge.example", "sample=team/x", "must be a URL"),
        ("https://forge.example/api/v1", "team/x", "must be KEY=OWNER/NAME"),
    ],
)
async def test_wrong_arguments_are_named(url: str, target: str, rule: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.examples.pull_requests.subscriber"),
        *("--repository", target, "--forge-url", url),
        cwd=ROOT,
        stderr=PIPE,
    )
    _, err = await process.communicate()

    assert process.returncode == 2
    assert rule in err.decode()
