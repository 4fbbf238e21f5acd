"""`fleet doctor`: what is wrong with an installation, or with a story, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from workers.cli import render
from workers.cli.session import Json, Wide, checked, complete_story, emit, run
from workers.settings import load

if TYPE_CHECKING:
    from workers.diagnosis import Finding, Outcome

app = typer.Typer(add_completion=False)

STYLES: dict[Outcome, str] = {"ok": "green", "warning": "yellow", "failing": "red"}


@app.command(epilog="Examples:  fleet doctor  ·  fleet doctor US-101 --json")
def doctor(
    story_id: Annotated[
        str | None,
        typer.Argument(
            metavar="[STORY]",
            help="Check the payloads of this story's histories too.",
            autocompletion=complete_story,
        ),
    ] = None,
    as_json: Json = False,
    wide: Wide = False,
) -> None:
    """Check servers, streams, graph, stories and sandbox, and name the remedies.

    The exit code is 1 if anything fails. Warnings do not change it.
    """

    async def work() -> list[Finding]:
        from workers.diagnosis import diagnose  # it needs every client, and they are slow to import

        return await diagnose(load(), checked(story_id) if story_id else "")

    found = run(work())
    rows = [
        (
            each.check,
            Text(each.outcome, style=STYLES[each.outcome]),
            each.found,
            each.remedy,
        )
        for each in found
    ]
    emit(
        found,
        render.FittingTable("Findings", ("check", "outcome", "found", "remedy"), rows),
        as_json,
        wide,
    )
    if any(each.outcome == "failing" for each in found):
        raise typer.Exit(1)
