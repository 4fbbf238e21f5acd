"""An example subscriber: opens a pull request for each story that is delivered.

It uses none of the fleet's code, only the subject `planning.story.delivered` and the REST API that
Gitea, Forgejo and GitHub share (see README.md). An event is acknowledged after the forge has the
pull request, and one that is there already is found, so each story gets one.

    python -m deploy.examples.pull_requests.subscriber --repository sample=team/ratelimit
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import nats
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeout
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import NotFoundError

STREAM = "PLANNING_EVENTS"
SUBJECT = "planning.story.delivered"
CONSUMER = "pull-requests"
"""The durable consumer that all replicas of this subscriber share."""
ACK_WAIT_S = 60.0
"""An event whose subscriber has been silent for so long goes to another one."""
AGAIN_S = 5.0
"""How soon the forge is asked again after it did not answer, unless it says when."""
LONGEST_WAIT_S = 600.0
ANSWER_WITHIN_S = 20.0
PAGE = 50

FIELDS = ("story_id", "repository", "branch", "commit", "base")
"""The fields that an event must have; it may have more."""


class Refused(Exception):
    """The forge refuses this pull request; another try would not help."""


class Misconfigured(Exception):
    """The forge refuses every request: the token, or the name of a repository, is wrong."""


class Later(Exception):
    """The forge is away or asks to wait. `seconds`: until the next try."""

    def __init__(self, why: str, seconds: float = AGAIN_S) -> None:
        super().__init__(why)
        self.seconds = seconds


@dataclass(frozen=True)
class Target:
    """A repository at the forge, and the branch that pull requests are for."""

    owner: str
    name: str
    base: str


class Forge:
    """The part of a forge's REST API that is needed."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def find(self, target: Target, branch: str, commit: str) -> str | None:
        """Return the URL of the branch's open pull request, or of any for this very commit."""
        page = 1
        while found := await self._pulls(target, branch, page):
            for pull in found:
                if pull["head"]["ref"] != branch or pull["base"]["ref"] != target.base:
                    continue  # Gitea lists those of all branches
                if pull["state"] == "open" or pull["head"]["sha"] == commit:
                    return str(pull["html_url"])
            page += 1
        return None

    async def open(self, target: Target, event: Mapping[str, Any]) -> str:
        """Open a pull request; return its URL.

        Raises:
            Refused: the forge says why.
        """
        pull = {
            "title": f"{event['story_id']}: {event['branch']}",
            "head": event["branch"],
            "base": target.base,
            "body": description(event),
        }
        answer = await self._call("POST", pulls(target), json=pull)
        if answer.status_code in (409, 422):  # it exists, or cannot
            raise Refused(f"{answer.status_code}: {message_of(answer)}")
        return str(answer.json()["html_url"])

    async def _pulls(self, target: Target, branch: str, page: int) -> list[dict[str, Any]]:
        query = {"state": "all", "head": f"{target.owner}:{branch}", "page": page}
        sizes = {"limit": PAGE, "per_page": PAGE}  # Gitea's name, and GitHub's
        answer = await self._call("GET", pulls(target), params=query | sizes)
        found: list[dict[str, Any]] = answer.json()
        return found

    async def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request.

        Raises:
            Later: the forge does not answer, or asks to wait.
            Misconfigured: the forge does not let this token do it.
        """
        try:
            answer = await self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise Later(f"the forge does not answer: {type(error).__name__}") from None
        if answer.status_code == 429 or answer.status_code >= 500 or limited(answer):
            after = answer.headers.get("Retry-After", "")
            seconds = float(after) if after.isdigit() else AGAIN_S
            raise Later(f"the forge answers {answer.status_code}", min(seconds, LONGEST_WAIT_S))
        if answer.status_code in (401, 403):
            raise Misconfigured(
                f"FORGE_TOKEN: the forge answers {answer.status_code} to {method} {path}: "
                f"{message_of(answer)}. The token must be valid and may open pull requests there"
            )
        if answer.is_redirect:
            raise Misconfigured(
                f"--repository: {path} has moved to {answer.headers.get('Location', 'elsewhere')}"
            )
        if answer.status_code == 404:
            raise Misconfigured(
                f"--repository: the forge has no {path}, or the token may not see it"
            )
        if not answer.is_success and answer.status_code not in (409, 422):
            raise Refused(f"{answer.status_code}: {message_of(answer)}")
        return answer


class Subscriber:
    """Takes one event after the other. `targets`: by the fleet's keys of repositories."""

    def __init__(self, forge: Forge, targets: Mapping[str, Target]) -> None:
        self._forge = forge
        self._targets = targets

    async def run(self, jetstream: JetStreamContext) -> None:
        """Work until cancelled.

        Raises:
            Misconfigured: no event can be handled; this one is kept.
        """
        events = await bind(jetstream)
        say(f"waits for {SUBJECT}")
        while True:
            try:
                (message,) = await events.fetch(1, timeout=30)
                await self._handle(message)
            except NatsTimeout:
                continue
            except NatsError as error:
                say(f"waits for NATS: {error!r}")
                await asyncio.sleep(AGAIN_S)

    async def _handle(self, message: Msg) -> None:
        """Acknowledge an event once the forge has its pull request; else return it."""
        try:
            event = json.loads(message.data)
            named = {name: str(event[name]) for name in FIELDS}
        except (ValueError, TypeError, KeyError) as error:
            say(f"drops what is not a delivery: {error!r}")
            await message.term()
            return
        try:
            say(await self.ensure(named | event))
            await message.ack()
        except Later as error:
            say(f"{named['story_id']}: {error}; again in {error.seconds:g} s")
            await message.nak(error.seconds)
        except Refused as error:
            say(f"{named['story_id']}: refused: {error}")
            await message.term()
        except (Misconfigured, asyncio.CancelledError):
            with contextlib.suppress(NatsError):
                await message.nak()
            raise

    async def ensure(self, event: Mapping[str, Any]) -> str:
        """Find or open the pull request of a delivery; return a line about it."""
        story, branch, commit = event["story_id"], event["branch"], event["commit"]
        target = self._targets.get(event["repository"])
        if target is None:
            return f"{story}: leaves {event['repository']}, which no --repository names"
        if found := await self._forge.find(target, branch, commit):
            return f"{story}: found {found}"
        try:
            return f"{story}: opened {await self._forge.open(target, event)}"
        except Refused:
            # Another replica may have opened it meanwhile.
            if found := await self._forge.find(target, branch, commit):
                return f"{story}: found {found}"
            raise


def description(event: Mapping[str, Any]) -> str:
    """Return the text of a pull request; what comes from outside is in code spans."""
    size = ", ".join(
        f"{event[name]} {words}"
        for name, words in (
            ("files_changed", "files"),
            ("insertions", "insertions"),
            ("deletions", "deletions"),
        )
        if isinstance(event.get(name), int)
    )
    return "\n".join(
        [
            f"Story {code(event['story_id'])}, approved at commit {code(event['commit'])}.",
            "",
            f"- base: {code(event['base'])}",
            *([f"- changes: {size}"] if size else []),
            f"- evidence: `fleet show {shown(event['story_id'])}`",
        ]
    )


def shown(value: object) -> str:
    return " ".join(str(value).replace("`", "'").split())


def code(value: object) -> str:
    return f"`{shown(value)}`"


def pulls(target: Target) -> str:
    """Return the path of a repository's pull requests."""
    return f"repos/{quote(target.owner, safe='')}/{quote(target.name, safe='')}/pulls"


def limited(answer: httpx.Response) -> bool:
    """Return whether an answer 403 is GitHub's limit of requests."""
    return answer.status_code == 403 and (
        "Retry-After" in answer.headers or answer.headers.get("X-RateLimit-Remaining") == "0"
    )


def message_of(answer: httpx.Response) -> str:
    """Return what the forge says about an error, in a line."""
    try:
        body = answer.json()
        details = [each.get("message", "") for each in body.get("errors") or []]
        text = "; ".join(filter(None, [body.get("message", ""), *details]))
    except (ValueError, AttributeError):
        text = answer.text
    return " ".join(text.split())[:300] or answer.reason_phrase


def say(line: str) -> None:
    print(line, flush=True)


async def bind(jetstream: JetStreamContext) -> JetStreamContext.PullSubscription:
    """Create the durable consumer that all replicas share, and subscribe to it.

    It begins with the stories that are delivered after its creation.
    """
    try:
        await jetstream.consumer_info(STREAM, CONSUMER)
    except NotFoundError:
        try:
            await jetstream.add_consumer(
                STREAM,
                ConsumerConfig(
                    durable_name=CONSUMER,
                    ack_policy=AckPolicy.EXPLICIT,
                    ack_wait=ACK_WAIT_S,
                    deliver_policy=DeliverPolicy.NEW,
                    filter_subject=SUBJECT,
                ),
            )
        except NotFoundError:
            raise Misconfigured(
                f"NATS has no stream {STREAM}: start the fleet's bridge first"
            ) from None
    return await jetstream.pull_subscribe_bind(CONSUMER, STREAM)


async def main(given: argparse.Namespace, token: str) -> None:
    """Connect, and work until SIGTERM or SIGINT.

    Raises:
        Misconfigured: as Subscriber.run.
    """
    connection = await nats.connect(
        given.nats_url,
        user=given.nats_user,
        password=os.environ.get("NATS_PASSWORD"),
        name=CONSUMER,
        max_reconnect_attempts=-1,
    )
    headers = {"Authorization": f"token {token}", "Accept": "application/json"}
    async with httpx.AsyncClient(
        base_url=given.forge_url, headers=headers, timeout=ANSWER_WITHIN_S
    ) as http:
        subscriber = Subscriber(Forge(http), dict(given.repository))
        working = asyncio.create_task(subscriber.run(connection.jetstream()))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, working.cancel)
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await working
        finally:
            await connection.close()


def target(text: str) -> tuple[str, Target]:
    """Read KEY=OWNER/NAME or KEY=OWNER/NAME:BASE."""
    key, _, rest = text.partition("=")
    path, _, base = rest.partition(":")
    owner, _, name = path.partition("/")
    if not key or not owner or not name or "/" in name:
        raise argparse.ArgumentTypeError(f"{text!r} must be KEY=OWNER/NAME or KEY=OWNER/NAME:BASE")
    return key, Target(owner, name, base or "main")


def api_url(text: str) -> str:
    """Read the URL of a forge's API; a token does not go over plain text to another machine."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError(f"{text!r} must be a URL such as https://HOST/api/v1")
    if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "::1", "localhost"):
        raise argparse.ArgumentTypeError(f"{text!r} is plain text; use https")
    return text.rstrip("/") + "/"


def arguments() -> argparse.Namespace:
    """Read the command line and the environment; secrets come from the environment alone."""
    parser = argparse.ArgumentParser(
        description="An example: opens a pull request for each story that the fleet delivers.",
        epilog="NATS_PASSWORD and FORGE_TOKEN are read from the environment only.",
    )
    parser.add_argument(
        "--repository",
        action="append",
        required=True,
        type=target,
        metavar="KEY=OWNER/NAME[:BASE]",
        help="a key of repositories.yaml and the repository at the forge; may be repeated",
    )
    for name, default, words in (
        ("NATS_URL", "nats://127.0.0.1:4222", "the fleet's NATS"),
        ("NATS_USER", None, "user at NATS"),
        ("FORGE_URL", None, "the forge's API, such as https://HOST/api/v1"),
    ):
        value = os.environ.get(name, default)
        parser.add_argument(
            f"--{name.lower().replace('_', '-')}",
            default=value,
            required=name == "FORGE_URL" and value is None,
            type=api_url if name == "FORGE_URL" else str,
            help=f"{words}; else ${name}" + (f", else {default}" if default else ""),
        )
    return parser.parse_args()


if __name__ == "__main__":
    read = arguments()
    secret = os.environ.get("FORGE_TOKEN", "")
    if not secret:
        sys.exit("FORGE_TOKEN: is not set; it must be a token that may open pull requests")
    try:
        asyncio.run(main(read, secret))
    except Misconfigured as failure:
        sys.exit(str(failure))
