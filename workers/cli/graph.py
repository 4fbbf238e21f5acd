"""`fleet graph`: rebuild the context graph from what Temporal stores; remove what is old."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from temporalio.client import Client
from temporalio.exceptions import ApplicationError

from bridge.mirror.histories import all_stories
from workers.cli import render
from workers.cli.session import (
    CommandError,
    Json,
    checked,
    command_errors,
    complete_story,
    emit,
    progress_bar,
    run,
    temporal,
)
from workers.clients.temporal import retention
from workers.clients.valkey import valkey_client
from workers.settings import Settings, load
from workflows.models.base import Model
from workflows.timestamps import format_timestamp

if TYPE_CHECKING:
    from activities.graph.activities import Graph
    from bridge.mirror.rebuild import Rebuilt

AT_ONCE = 4
"""How many stories are rebuilt at the same time."""

NO_STORY = "(no story)"

app = typer.Typer(
    help="Rebuild the context graph, or remove old stories from it.",
    no_args_is_help=True,
    add_completion=False,
)


class RebuiltStory(Model):
    """What a rebuild did for one story.

    Attributes:
        runs: Histories that were read.
        writes: Transactions that were repeated.
        refused: Writes that the graph rejects for good.
        unanswered: Runs that ended early, and for which no worker answered what they had left
            unrecorded.
        lost: Payloads that Valkey has lost, with the run; they are left out.
    """

    story_id: str
    runs: int
    writes: int
    refused: list[str]
    unanswered: list[str]
    lost: list[str]


@app.callback()
def graph() -> None:
    """Rebuild the context graph, or remove old stories from it."""


@app.command(epilog="Examples:  fleet graph rebuild US-101  ·  fleet graph rebuild")
def rebuild(
    story_id: Annotated[
        str | None,
        typer.Argument(
            metavar="[STORY]",
            help="The story's id; without it, every story that Temporal knows.",
            autocompletion=complete_story,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a story's graph and timeline again from its histories.

    It may be repeated, and interrupted: what is stored already stays as it is. Councils are left
    alone. What came from outside on the bus is in no history, and is not rebuilt.
    """

    async def work() -> list[RebuiltStory]:
        settings = load()
        stories = None if story_id is None else [checked(story_id)]
        async with (
            temporal(settings) as client,
            command_errors(story_id or "*", client),
            open_graph(settings) as graph,
        ):
            found = await _rebuild(client, graph, stories)
        if story_id is not None and not found[0].runs:
            raise CommandError(
                f"There is no story {story_id} in namespace {client.namespace}; Temporal keeps the "
                "history of a story that has ended for the namespace's retention only. "
                "`fleet list --all` lists those there are"
            )
        return found

    done = run(work())
    emit(done, _shown(done), as_json)
    if any(each.refused or each.lost for each in done):
        raise typer.Exit(1)


class Pruned(Model):
    """What a prune removed, or would remove. nodes: 0 with `--dry-run`."""

    stories: list[str]
    nodes: int
    before: str


@app.command(epilog="Examples:  fleet graph prune --older-than 365d --dry-run")
def prune(
    older_than: Annotated[
        str, typer.Option(help="Age of a story's last event, in days, such as 365d.")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Name the stories, and remove nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove stories that ended long ago from graph and cache, for good.

    Councils stay. A story that Temporal still knows stays too, because its histories could no
    longer be compared with the graph.
    """
    if not dry_run and not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("this removes stories for good: say --yes, or --dry-run")
        question = f"Remove every story that ended and had no event for {older_than}?"
        typer.confirm(question, abort=True)

    async def work() -> Pruned:
        age = _age(older_than)
        settings = load()
        async with temporal(settings) as client, open_graph(settings) as graph:
            async with command_errors("*", client):
                kept_for = await retention(client)
            if age < kept_for:
                raise CommandError(
                    f"--older-than: {older_than} is less than the {kept_for.days} days for which "
                    f"the namespace {client.namespace} keeps histories; give {kept_for.days}d or "
                    "more"
                )
            before = datetime.now(UTC) - age
            stories, nodes = await graph.ended_before(before), 0
            if not dry_run:
                for story_id in stories:
                    nodes += await graph.prune(story_id, before)
                nodes += await graph.prune_without_story(before)
        return Pruned(stories=stories, nodes=nodes, before=format_timestamp(before))

    done = run(work())
    verb = "would be removed" if dry_run else f"removed, with {done.nodes} nodes"
    table = render.FittingTable(
        f"{len(done.stories)} stories {verb}", ("story",), ((each,) for each in done.stories)
    )
    emit(done, table, as_json)


def _age(text: str) -> timedelta:
    if not (days := re.fullmatch(r"([1-9][0-9]{0,4})d", text)):
        raise CommandError(f"--older-than: {text[:60]!r} is not a number of days, such as 365d")
    return timedelta(days=int(days[1]))


@asynccontextmanager
async def open_graph(settings: Settings) -> AsyncIterator[Graph]:
    """Open the graph and its cache, as the workers write them."""
    # The driver is slow to import, and rarely needed.
    from activities.cache import Cache
    from activities.graph.activities import Graph
    from activities.graph.scopes import load_scopes
    from workers.clients.neo4j import open_neo4j

    valkey = valkey_client(settings)
    try:
        async with open_neo4j(settings) as driver:
            yield Graph(driver, Cache(valkey), load_scopes(settings.fleet_config / "scopes.yaml"))
    finally:
        await valkey.aclose()


async def _rebuild(client: Client, graph: Graph, stories: list[str] | None) -> list[RebuiltStory]:
    from bridge.mirror.rebuild import rebuild

    slots = asyncio.Semaphore(AT_ONCE)
    done: list[RebuiltStory] = []
    with progress_bar() as progress:
        step = progress.add_task("stories", total=None)
        wanted = await all_stories(client) if stories is None else stories
        progress.update(step, total=len(wanted))

        async def one(story_id: str) -> None:
            async with slots:
                name = story_id or NO_STORY
                bar = progress.add_task(name, total=None)
                rebuilt = await rebuild(
                    client,
                    graph,
                    story_id,
                    lambda what, done, of: progress.update(
                        bar, description=f"{name}: {what}", completed=done, total=of
                    ),
                )
                progress.remove_task(bar)
                progress.advance(step)
                done.append(_summary(story_id, rebuilt))

        try:
            async with asyncio.TaskGroup() as tasks:
                for story_id in wanted:
                    tasks.create_task(one(story_id))
        except ExceptionGroup as group:
            error = group.exceptions[0]
            if not isinstance(error, ApplicationError):
                raise error from None
            raise CommandError(
                f"{error.message}. {len(done)} of {len(wanted)} stories are rebuilt; run the "
                "command again when the store is back: what is stored is not stored twice"
            ) from None
    return sorted(done, key=lambda each: each.story_id)


def _summary(story_id: str, rebuilt: Rebuilt) -> RebuiltStory:
    found = rebuilt.found
    return RebuiltStory(
        story_id=story_id,
        runs=len(found.runs),
        writes=rebuilt.writes,
        refused=rebuilt.refused,
        unanswered=[f"{each.workflow_id} {each.run_id}" for each in found.unanswered],
        lost=found.lost,
    )


def _shown(done: list[RebuiltStory]) -> RenderableType:
    lines: list[RenderableType] = [
        render.FittingTable(
            f"{len(done)} stories rebuilt",
            ("story", "runs", "writes", "refused"),
            (
                (each.story_id or NO_STORY, each.runs, each.writes, len(each.refused))
                for each in done
            ),
        )
    ]
    lines += [render.text(f"Refused: {reason}", "red") for each in done for reason in each.refused]
    lines += [render.text(f"Lost: {reason}", "red") for each in done for reason in each.lost]
    if unanswered := [name for each in done for name in each.unanswered]:
        lines.append(
            render.text(
                f"{len(unanswered)} runs ended early, and no story worker answers what they had "
                "left. Start one (`python -m workers story`) and run this again: "
                + ", ".join(unanswered),
                "yellow",
            )
        )
    return Group(*lines)
