"""`fleet why`: where a decision or a line of a story's branch comes from."""

from __future__ import annotations

import posixpath
import re
import shlex
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from temporalio.exceptions import ApplicationError

from workers.cli import render
from workers.cli.branches import opened
from workers.cli.session import CommandError, Json, Wide, emit, run
from workers.settings import load
from workflows.models.errors import ErrorType
from workflows.models.events import ContextDecisionAdded, example
from workflows.models.workspace import BlamedLine, LoggedCommit

if TYPE_CHECKING:
    from activities.graph.line_provenance import ChangedBy, LineReason
    from activities.workspace.store import Store

LINE = re.compile(r"(.+):([1-9][0-9]{0,8})")

EXAMPLES = (
    f"Examples:  fleet why {example(ContextDecisionAdded)['decision_id']}  ·  "
    "fleet why src/app.py:12 --story US-101"
)

app = typer.Typer(add_completion=False)


@app.command(epilog=EXAMPLES)
def why(
    what: Annotated[
        str,
        typer.Argument(
            metavar="DECISION|FILE:LINE",
            help="The decision's id, or a line of a file in the story's branch.",
        ),
    ],
    story: Annotated[
        str,
        typer.Option(help="The line's story; of a decision, where several have one of that id."),
    ] = "",
    as_json: Json = False,
    wide: Wide = False,
) -> None:
    """Show who proposed a decision or wrote a line, by which prompt and model, and what followed.

    What critics objected to, what was checked and measured, and who approved it.
    """

    async def work() -> None:
        # The driver is slow to import.
        from activities.graph.provenance import find_why
        from workers.clients.neo4j import open_neo4j

        async with open_neo4j(load()) as driver:
            found = await find_why(driver, what, story)
        line = LINE.fullmatch(what)
        if found:
            emit(found, render.reasons(found), as_json, wide)
        elif line and story:
            reason = await why_line(story, posixpath.normpath(line[1]), int(line[2]))
            emit(reason, line_reason(reason), as_json, wide)
        elif line:
            raise CommandError(
                f"The graph has no decision {what}. For line {line[2]} of {line[1]}, name its "
                "story: --story US-101"
            )
        else:
            of = f" of story {story}" if story else ""
            raise CommandError(
                f"The graph has no decision {what}{of}. `fleet show STORY` names decisions"
            )

    run(work())


# --- lines ----------------------------------------------------------------------------------------


async def why_line(story_id: str, path: str, number: int) -> LineReason:
    """Return where a line of a story's branch comes from.

    Args:
        story_id: the story.
        path: the file, from the repository's root.
        number: the line; the first is 1.

    Raises:
        CommandError: the line does not exist, or the story did not write it.
    """
    from activities.graph.line_provenance import LineReason, find_changes
    from workers.clients.neo4j import open_neo4j

    async with opened(story_id) as (branch, store, head):
        line = await _blamed(store, head, path, number, branch.branch)
        commit, trailers = line.origin, line.origin.trailers
        if await store.contains(branch.base, commit.commit) or trailers.get("Story") != story_id:
            raise CommandError(_not_the_storys(story_id, f"{path}:{number}", commit))
        async with open_neo4j(load()) as driver:
            changes = await find_changes(
                driver, story_id, trailers.get("Task", ""), trailers.get("Agent", "")
            )
        parts = [
            each
            for each in changes
            if each.commit and await _has(store, each.commit, commit.commit)
        ]
    return LineReason(story_id=story_id, line=line, change=parts[0] if parts else None)


async def _blamed(store: Store, head: str, path: str, number: int, branch: str) -> BlamedLine:
    try:
        lines = (await store.read(head, path)).decode(errors="replace").splitlines()
        if number <= len(lines):
            return await store.blame(head, path, number)
    except ApplicationError as error:
        if error.type != ErrorType.NOT_FOUND:
            raise
        raise CommandError(
            f"{branch} has no file {path} at {head[:12]}; give its path from the root of the "
            "repository, and the file as it is after the story"
        ) from None
    raise CommandError(f"{path} has {len(lines)} lines in {branch} at {head[:12]}, not {number}")


async def _has(store: Store, commit: str, ancestor: str) -> bool:
    """Return whether a commit continues another; False if the store has it no more."""
    try:
        return await store.contains(commit, ancestor)
    except ApplicationError as error:
        if error.type != ErrorType.NOT_FOUND:
            raise
        return False


def _not_the_storys(story_id: str, line: str, commit: LoggedCommit) -> str:
    other = commit.trailers.get("Story", "")
    hint = (
        f". Story {other} wrote it: `fleet why {shlex.quote(line)} --story {shlex.quote(other)}`"
        if other not in ("", story_id)
        else ""
    )
    return (
        f"Story {story_id} did not write {line}: it comes from commit {commit.commit[:12]} of "
        f"{commit.author}, {render.local_time(commit.at.isoformat())}: {commit.subject}{hint}"
    )


def line_reason(reason: LineReason) -> RenderableType:
    """Render a line with its provenance."""
    line, change = reason.line, reason.change
    commit, trailers = line.origin, line.origin.trailers
    rows = Table.grid(padding=(0, 2))
    rows.add_row("line", render.text(line.text))
    rows.add_row("commit", render.text(f"{commit.commit[:12]}: {commit.subject}"))
    rows.add_row("task", render.text(f"{trailers.get('Task')}, step {trailers.get('Step')}"))
    rows.add_row("written by", render.text(trailers.get("Agent", commit.author)))
    rows.add_row(
        "on",
        render.text(f"model {trailers.get('Model')}, prompt {trailers.get('Prompt-Hash')}"),
    )
    if change:
        rows.add_row("deliberation", render.text(change.deliberation_id))
        rows.add_row("approach", render.text(change.approach))
        rows.add_row("won with", render.text(_outcome(change)))
        for each in change.decisions:
            rows.add_row("decision", render.text(f"{each.id}: {each.title}: {each.rationale}"))
    panel = Panel.fit(
        rows,
        title=render.text(f"{line.path}:{line.line}"),
        title_align="left",
        subtitle=render.text(
            f"story {reason.story_id}, committed {render.local_time(commit.at.isoformat())}"
        ),
    )
    if change is None:
        return Group(panel, render.text("The graph has no proposal of this commit", "yellow"))
    return Group(
        panel,
        *render.review(change.critiques, change.checks, change.passed_by, change.criteria),
    )


def _outcome(change: ChangedBy) -> str:
    """Return how the change was measured and judged."""
    parts = [
        "" if change.score is None else f"score {change.score:.2f}",
        f"revised {change.revision} times",
        f"gate {change.report.gating_decision}" if change.report.gating_decision else "",
        *change.report.reasons,
        f"judged: {change.judged}" if change.judged else "",
    ]
    return ", ".join(filter(None, parts))
