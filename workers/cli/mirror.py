"""`fleet mirror`: restore events on the streams from what Temporal stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from nats import errors as nats_errors
from nats.aio.client import Client as Nats
from nats.js import errors as js_errors
from rich.console import Group, RenderableType
from temporalio.client import Client
from temporalio.exceptions import ApplicationError

from bridge.jetstream.streams import StreamError, reconcile
from bridge.mirror.histories import StoryRuns, read
from bridge.mirror.publisher import Mirror
from bridge.mirror.recovered_events import in_order, unrecorded
from bridge.mirror.republish import ReplayCounts, published_ids, republish
from bridge.mirror.source import read_source
from workers.cli import render
from workers.cli.graph import open_graph
from workers.cli.session import (
    CommandError,
    Json,
    StoryId,
    checked,
    command_errors,
    emit,
    progress_bar,
    run,
    temporal,
)
from workers.clients.connection import redact_url
from workers.clients.nats import open_nats
from workers.settings import Settings, load
from workflows.models.base import Model
from workflows.models.entries import Entry

app = typer.Typer(
    help="Publish events again that the streams have lost.",
    no_args_is_help=True,
    add_completion=False,
)


class OnStream(Model):
    """The result of a replay for one stream.

    The counts have the meanings that `bridge.mirror.republish.ReplayCounts` gives them.
    """

    stream: str
    events: int
    published: int
    known: int
    suppressed_by_dedup: int


class Replayed(Model):
    """The result of a replay.

    Attributes:
        recorded: Entries that a run had left unrecorded; they were stored in the graph first.
        unanswered: Runs that ended early, and for which no worker answered what they had left.
        refused: Entries that NATS or the graph refuses for good, and why; they are left out.
        lost: Payloads that Valkey has lost, with the run; they are left out.
    """

    story_id: str
    runs: int
    streams: list[OnStream]
    recorded: int
    unanswered: list[str]
    refused: list[str]
    lost: list[str]


@app.callback()
def mirror() -> None:
    """Publish events again that the streams have lost."""


@app.command(epilog="Example:  fleet mirror replay US-101")
def replay(
    story_id: StoryId,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Also publish events that the streams have, with the same ids."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Publish a story's events again from its histories, with the same ids.

    Missing streams are created. Events that a stream has are not published again. What a
    terminated story had not yet recorded is recorded first.
    """

    async def work() -> Replayed:
        settings = load()
        async with (
            temporal(settings) as client,
            command_errors(checked(story_id), client),
            open_nats(settings, failed=lambda _where, _error: None) as nats,
        ):
            with _nats_errors(settings):
                return await _replay(settings, client, nats, story_id, everything)

    done = run(work())
    emit(done, _shown(done), as_json)
    if done.refused or done.lost:
        raise typer.Exit(1)


async def _replay(
    settings: Settings, client: Client, nats: Nats, story_id: str, everything: bool
) -> Replayed:
    jetstream = nats.jetstream()
    with progress_bar() as progress:
        step = progress.add_task("histories", total=None)
        found = await read(
            client,
            story_id,
            lambda done, of: progress.update(step, completed=done, total=of),
        )
        left = unrecorded(found.runs, story_id)
        if not in_order(found.runs, story_id) and not left:
            raise _unknown(story_id, client, found)
        await reconcile(jetstream, settings.nats_replicas)
        refused: list[str] = []
        stored: list[Entry] = []
        if left:
            async with open_graph(settings) as graph:  # an event is published after it is stored
                for batch in left:
                    try:
                        await graph.record(batch)
                    except ApplicationError as error:
                        if not error.non_retryable:
                            raise
                        refused.append(f"{batch.entries[0].id}: {error.message}")
                    else:
                        stored += batch.entries
        entries = [*in_order(found.runs, story_id), *(each for each in stored if each.subject)]
        known = await published_ids(jetstream, story_id, entries)
        step = progress.add_task("events", total=len(entries))
        counts = await republish(
            Mirror(nats, await read_source(client)),
            entries,
            known,
            everything,
            lambda done, of: progress.update(step, completed=done, total=of),
            refused,
        )
    return Replayed(
        story_id=story_id,
        runs=len(found.runs),
        streams=[_on_stream(name, counts[name]) for name in sorted(counts)],
        recorded=len(stored),
        unanswered=[f"{each.workflow_id} {each.run_id}" for each in found.unanswered],
        refused=refused,
        lost=found.lost,
    )


def _unknown(story_id: str, client: Client, found: StoryRuns) -> CommandError:
    if found.runs:
        return CommandError(f"Story {story_id} has no events yet: nothing to publish")
    return CommandError(
        f"There is no story {story_id} in namespace {client.namespace}, nor a plan of it; Temporal "
        "keeps the history of a story that has ended for the namespace's retention only. "
        "`fleet list --all` lists those there are"
    )


@contextmanager
def _nats_errors(settings: Settings) -> Iterator[None]:
    where = f"NATS at {redact_url(settings.nats_url)}"
    try:
        yield
    except StreamError as error:
        raise CommandError(str(error)) from None
    except (nats_errors.Error, js_errors.Error) as error:
        raise CommandError(
            f"{where} failed: {type(error).__name__} {error}. Run the command again: what is "
            "on the streams is not published twice"
        ) from None


def _on_stream(name: str, count: ReplayCounts) -> OnStream:
    return OnStream(stream=name, **dataclasses.asdict(count))


def _shown(done: Replayed) -> RenderableType:
    lines: list[RenderableType] = [
        render.FittingTable(
            f"Story {done.story_id}, from {done.runs} runs",
            ("stream", "events", "published", "there already", "suppressed_by_dedup"),
            (
                (each.stream, each.events, each.published, each.known, each.suppressed_by_dedup)
                for each in done.streams
            ),
        )
    ]
    lines += [render.text(f"Refused: {reason}", "red") for reason in done.refused]
    lines += [render.text(f"Lost: {reason}", "red") for reason in done.lost]
    if done.recorded:
        lines.append(render.text(f"Recorded in the graph first: {done.recorded}"))
    if any(each.suppressed_by_dedup for each in done.streams):
        lines.append(
            render.text(
                "Withheld: deleted from a stream that still knows their ids, for as long as its "
                "duplicate window lasts (1 h). Run this again then; or remove the stream "
                "(`nats stream rm STREAM`) and replay all its stories",
                "yellow",
            )
        )
    if done.unanswered:
        lines.append(
            render.text(
                f"{len(done.unanswered)} runs ended early, and no story worker answered what they "
                "had left. Start one (`python -m workers story`) and run this again: "
                + ", ".join(done.unanswered),
                "yellow",
            )
        )
    return Group(*lines)
