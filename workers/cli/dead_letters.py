"""`fleet dead-letters`: messages that could not be parsed or applied."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer
from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError

from bridge.jetstream.dead_letters import DeadLetter, DeadLetters, NoSuchLetter
from workers.cli import render
from workers.cli.session import CommandError, Json, Wide, emit, err, out, run
from workers.clients.nats import open_nats
from workers.settings import load

BODY_SHOWN = 4_000

app = typer.Typer(
    name="dead-letters",
    help="Look at messages that could not be understood or applied; put them back, or drop them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)

Numbers = Annotated[
    list[int] | None, typer.Argument(metavar="NUMBER...", help="As `list` shows them.", min=1)
]
All = Annotated[bool, typer.Option("--all", help="All of them.")]


@app.command("list", epilog="Example:  fleet dead-letters list --json | jq '.[].reason'")
def list_letters(
    subject: Annotated[str | None, typer.Option(help="Only those of this subject.")] = None,
    as_json: Json = False,
    wide: Wide = False,
) -> None:
    """List the dead letters, oldest first."""

    async def work() -> None:
        async with opened() as letters:
            found = [each async for each in letters.list() if subject in (None, each.subject)]
        emit([_fields(each) for each in found], render.letters(found), as_json, wide)

    run(work())


@app.command(epilog="Example:  fleet dead-letters show 7")
def show(
    number: Annotated[int, typer.Argument(help="As `list` shows it.", min=1)],
    as_json: Json = False,
) -> None:
    """Show a dead letter: reason, error, headers and body."""

    async def work() -> None:
        async with opened() as letters:
            letter = await letters.get(number)
        fields = _fields(letter)
        if as_json:
            print(json.dumps(fields, indent=2))
            return
        body = fields.pop("body")
        for name, value in fields.items():
            out.print(render.text(f"{name:11} {value}"), soft_wrap=True)
        out.print(render.text(body[:BODY_SHOWN]), soft_wrap=True)
        if len(body) > BODY_SHOWN:
            out.print(render.text(f"... {len(body) - BODY_SHOWN} characters more: --json has all"))

    run(work())


@app.command(epilog="Examples:  fleet dead-letters replay 7 9  ·  fleet dead-letters replay --all")
def replay(numbers: Numbers = None, every: All = False, as_json: Json = False) -> None:
    """Publish dead letters again on their subjects, with their identity, and remove them."""
    _each(numbers, every, as_json, "replayed", DeadLetters.replay)


@app.command(epilog="Example:  fleet dead-letters drop 7")
def drop(numbers: Numbers = None, every: All = False, as_json: Json = False) -> None:
    """Remove dead letters for good."""
    _each(numbers, every, as_json, "dropped", DeadLetters.drop)


def _each(
    numbers: list[int] | None,
    every: bool,
    as_json: bool,
    done: str,
    act: Callable[[DeadLetters, int], Awaitable[object]],
) -> None:
    if bool(numbers) == every:
        err.print(render.text("NUMBER...: give the numbers, or --all"))
        raise typer.Exit(2)

    async def work() -> None:
        acted: list[int] = []
        try:
            async with opened() as letters:
                wanted = [each.number async for each in letters.list()] if every else numbers or []
                for number in wanted:
                    await act(letters, number)
                    acted.append(number)
        finally:  # what was done before an error stays done
            if as_json:
                print(json.dumps({done: acted}))
            else:
                out.print(render.text(f"{done} {len(acted)}: {', '.join(map(str, acted)) or '-'}"))

    run(work())


@asynccontextmanager
async def opened() -> AsyncIterator[DeadLetters]:
    """Open the dead letters, and report errors of NATS as Refused.

    Raises:
        Refused: the letter or the stream does not exist, or NATS fails.
    """
    async with open_nats(load()) as nats:
        try:
            yield DeadLetters(nats)
        except NoSuchLetter as error:
            raise CommandError(str(error)) from None
        except NotFoundError:
            raise CommandError(
                "NATS has no stream DEAD_LETTERS: `python -m workers inbox` makes it"
            ) from None
        except NatsError as error:
            raise CommandError(f"NATS refused the request: {error!r}. Try again") from None


def _fields(letter: DeadLetter) -> dict[str, Any]:
    return asdict(letter) | {"body": letter.body.decode(errors="backslashreplace")}
