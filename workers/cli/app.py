"""`fleet`: what the `temporal` CLI can do with a story, in fewer words.

Exit code 0; 1 if the request is refused or a server does not answer, with the reason on stderr;
2 if the command line cannot be parsed. A command's module is imported when the command is run, so
that help and completion are fast.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from workers.data_frames import leave_out_data_frames
from workers.exit import leave

STORIES = "workers.cli.stories"
BRANCHES = "workers.cli.branches"

COMMANDS = {
    "start": (STORIES, "Start a story from a JSON file."),
    "show": (STORIES, "Show a story: state, gate, what may happen now, plan, timeline, usage."),
    "watch": (STORIES, "Follow a story live, until it is done."),
    "list": (STORIES, "List stories, newest first."),
    "approve": (STORIES, "Open a gate."),
    "reject": (STORIES, "Send a story back, with a reason that the next council is given."),
    "amend": (STORIES, "Change a story's text; approvals of the old text become invalid."),
    "raise-budget": (STORIES, "Give a story more tokens."),
    "report": (STORIES, "Build, test and measure a project, and send the report to its story."),
    "diff": (BRANCHES, "Show what a story changes in its repository, as a diff."),
    "log": (BRANCHES, "List the commits of a story's branch, newest first."),
    "checkout": (BRANCHES, "Clone a story's branch into a new folder."),
    "rebase": (BRANCHES, "Merge the project's base branch into a story's branch."),
    "why": (
        "workers.cli.provenance",
        "Show who proposed a decision or wrote a line, by which prompt and model, and what "
        "followed.",
    ),
    "eval": (
        "workers.cli.evaluation",
        "Let agents solve tasks, and print how many each configuration resolves.",
    ),
    "events": ("workers.cli.events", "Follow the events of the streams, one line for each."),
    "dead-letters": (
        "workers.cli.dead_letters",
        "Look at messages that could not be understood or applied; put them back, or drop them.",
    ),
    "outbox": (
        "workers.cli.outbox",
        "Entries of outboxes that are refused for good: skip them.",
    ),
    "mirror": ("workers.cli.mirror", "Publish events again that the streams have lost."),
    "graph": ("workers.cli.graph", "Rebuild the context graph, or remove old stories from it."),
    "doctor": (
        "workers.cli.doctor",
        "Check servers, streams, graph, stories and sandbox, and name the remedies.",
    ),
    "token": ("workers.cli.token", "Tokens for the gRPC services, and for `fleet` itself."),
}
"""The module of each command, and the first line of its help."""


class Commands(TyperGroup):
    """A group that lists its commands without importing them, and imports the one that runs."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands in the order of COMMANDS."""
        return [*COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:
        """Return a command's name and help, for lists."""
        if cmd_name not in COMMANDS:
            return None
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name][1])

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return the command to run."""
        name = args[0]
        if name not in COMMANDS:
            return super().resolve_command(ctx, args)
        return name, load(name), args[1:]


def load(name: str) -> TyperCommand | TyperGroup:
    """Import a command, or a group of commands."""
    found: Any = get_command(import_module(COMMANDS[name][0]).app)
    command: TyperCommand | TyperGroup = getattr(found, "commands", {}).get(name, found)
    return command


app = typer.Typer(
    name="fleet",
    cls=Commands,
    help="Start, steer and watch the stories of SWE AI Fleet.",
    epilog="Addresses and credentials: `python -m workers settings` lists them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(metadata.version("swe-ai-fleet"))
        raise typer.Exit


@app.callback()
def fleet(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Start, steer and watch the stories of SWE AI Fleet."""


def main() -> NoReturn:
    """Run a command, flush, leave with its exit code."""
    leave_out_data_frames()
    try:
        app()
    except SystemExit as ended:
        leave(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
    leave(0)
