"""`fleet outbox`: entries of outboxes that are refused for good."""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Annotated

import typer
from temporalio.client import Client

from bridge.story_list import STUCK_RUNS
from workers.cli import render
from workers.cli.session import (
    UPDATE_WITHIN_S,
    Actor,
    CommandError,
    Json,
    Wide,
    command_errors,
    complete_story,
    emit,
    out,
    person,
    run,
    signed,
    temporal,
)
from workers.cli.snapshot import QUERY_WITHIN
from workers.settings import load
from workflows.models.base import Model
from workflows.models.outbox import OutboxStuck, SkipEntry
from workflows.outbox import SKIP_ENTRY, STUCK

app = typer.Typer(
    help="Entries of outboxes that are refused for good: skip them.",
    no_args_is_help=True,
    add_completion=False,
)


class StuckEntry(Model):
    """A stuck entry, and the workflow in whose outbox it is."""

    workflow_id: str
    entry: OutboxStuck


@app.callback()
def outbox() -> None:
    """Entries of outboxes that are refused for good: skip them."""


@app.command("list", epilog="Example:  fleet outbox list")
def list_stuck(
    story_id: Annotated[
        str | None,
        typer.Argument(
            metavar="[STORY]",
            help="Only of this story, or of the workflow with this id.",
            autocompletion=complete_story,
        ),
    ] = None,
    as_json: Json = False,
    wide: Wide = False,
) -> None:
    """List the stuck entries of all outboxes; those behind them wait."""

    async def work() -> list[StuckEntry]:
        async with temporal(load()) as client, command_errors(story_id or "*", client):
            return [
                each
                async for each in stuck_entries(client)
                if not story_id or _is_of(each, story_id)
            ]

    found = run(work())
    emit(found, render.stuck([each.entry for each in found]), as_json, wide)


@app.command(
    epilog="Example:  fleet outbox skip US-101 story-US-101/01a2.../3 --reason 'its id is too long'"
)
def skip(
    story_id: Annotated[
        str,
        typer.Argument(
            metavar="STORY",
            help="The story's id, or that of the workflow in whose outbox the entry is.",
            autocompletion=complete_story,
        ),
    ],
    entry_id: Annotated[str, typer.Argument(metavar="ENTRY", help="As `list` shows it.")],
    reason: Annotated[str, typer.Option("--reason", help="Why it is skipped.")],
    actor: Actor,
    as_json: Json = False,
) -> None:
    """Skip a stuck entry; a record and a dead letter keep it, and the rest goes on."""

    async def work() -> StuckEntry:
        async with temporal(load()) as client, command_errors(story_id, client):
            request = SkipEntry(entry_id=entry_id, actor=person(actor), reason=reason)
            async for each in stuck_entries(client):
                if each.entry.entry_id == entry_id and _is_of(each, story_id):
                    handle = client.get_workflow_handle(each.workflow_id)
                    await handle.execute_update(
                        SKIP_ENTRY,
                        signed(each.workflow_id, request),
                        result_type=OutboxStuck,
                        rpc_timeout=timedelta(seconds=UPDATE_WITHIN_S),
                    )
                    return each
        raise CommandError(
            f"ENTRY: {entry_id[:200]} is not a stuck entry of {story_id[:200]}; "
            f"`fleet outbox list {shlex.quote(story_id)}` lists those that are"
        )

    done = run(work())
    if as_json:
        emit(done, "", as_json)
    else:
        out.print(render.text(f"skipped {done.entry.kind} {entry_id}; see fleet dead-letters list"))


async def stuck_entries(client: Client) -> AsyncIterator[StuckEntry]:
    """Yield every stuck entry; a story worker must answer the queries."""
    async for each in client.list_workflows(STUCK_RUNS):
        entries = await client.get_workflow_handle(each.id).query(
            STUCK, result_type=list[OutboxStuck], rpc_timeout=QUERY_WITHIN
        )
        for entry in entries:
            yield StuckEntry(workflow_id=each.id, entry=entry)


def _is_of(stuck: StuckEntry, story_id: str) -> bool:
    return story_id in (stuck.entry.story_id, stuck.workflow_id)
