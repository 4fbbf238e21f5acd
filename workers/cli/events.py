"""`fleet events`: the streams, followed live."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from nats import errors as nats_errors
from nats.js import errors as js_errors
from rich.text import Text

from bridge.jetstream.follow import Following, Seen, StreamMissing
from workers.cli import render
from workers.cli.event_line import headline
from workers.cli.session import CommandError, Json, checked, complete_story, err, out, run
from workers.clients.connection import redact_url
from workers.clients.nats import open_nats
from workers.settings import load

app = typer.Typer(add_completion=False)

SPAN = re.compile(r"([1-9][0-9]{0,5})([smhd])")
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
SINCE_RULE = (
    "a time such as 2026-03-01T10:00 (of your zone, where it names none), or how long ago: a "
    "number with s, m, h or d, such as 10m, 2h, 1d"
)


def since_time(text: str, now: datetime) -> datetime:
    """Return the time that `--since` means, in UTC.

    Raises:
        Refused: it is not a time, or is in the future.
    """
    if span := SPAN.fullmatch(text):
        count, unit = int(span[1]), UNITS[span[2]]
        try:
            return now - timedelta(**{unit: count})
        except OverflowError:
            raise CommandError(f"--since: {text} is before the calendar begins") from None
    try:
        moment = datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise CommandError(f"--since: {text[:60]!r} is not {SINCE_RULE}") from None
    if moment > now:
        raise CommandError(f"--since: {text} is yet to come; give {SINCE_RULE}")
    return moment


@app.command(epilog="Examples:  fleet events --story US-101 --since 2h  ·  fleet events --json")
def events(
    story: Annotated[
        str | None,
        typer.Option("--story", "-s", help="Of this story only.", autocompletion=complete_story),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Begin there: an ISO time, or 10m, 2h, 1d ago. Without it: now; with "
            "--no-follow: the first event.",
        ),
    ] = None,
    no_follow: Annotated[
        bool, typer.Option("--no-follow", help="End when what is there has been shown.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Follow the events of the streams, one line for each."""

    async def work() -> None:
        begin = since_time(since, datetime.now(UTC)) if since is not None else None
        of = checked(story) if story is not None else ""
        async with following(begin, from_first=no_follow) as streams:
            async for each in streams.events(live=not no_follow):
                if not of or each.story == of:
                    show(each, as_json)

    try:
        run(work())
    except BrokenPipeError:
        # The reader has gone (`| head`): print nothing, and do not flush at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit from None


@asynccontextmanager
async def following(since: datetime | None, *, from_first: bool) -> AsyncIterator[Following]:
    """Open the event streams of the NATS server that the settings name."""
    settings = load()
    where = f"NATS at {redact_url(settings.nats_url)}"

    def notify(line: str) -> None:
        err.print(render.text(line, "yellow"), soft_wrap=True)

    async with open_nats(settings, failed=lambda _where, _error: None) as nats:
        try:
            yield Following(
                nats,
                since=since,
                from_first=from_first,
                on_away=lambda: notify(f"{where} is away; this goes on when it is back"),
                on_back=lambda: notify(f"{where} is back"),
            )
        except StreamMissing as error:
            raise CommandError(str(error)) from None
        except (nats_errors.Error, js_errors.Error) as error:
            raise CommandError(f"{where} failed: {type(error).__name__} {error}") from None


def show(event: Seen, as_json: bool) -> None:
    """Print an event on one line, at once."""
    if as_json:
        fields = {
            "subject": event.subject,
            "id": event.id,
            "time": event.time,
            "story": event.story,
            "body": event.body,
        }
        print(json.dumps(fields), flush=True)
        return
    words, style = headline(event.subject, event.body, event.read)
    line = Text.assemble(
        (render.plain(render.local_time(event.time)), "dim"),
        "  ",
        (f"{render.plain(event.story) or '-':<12}", "bold"),
        "  ",
        (words, style),
    )
    out.print(line, soft_wrap=True, highlight=False)
