"""Rendering of models for the CLI with rich. Text from outside is never markup."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from workers.cli.snapshot import AgentWork, Council, Snapshot
from workflows.models.acceptance import Acceptance
from workflows.models.agents import UsageLine
from workflows.models.base import Model
from workflows.models.implementation import ImplementationProgress
from workflows.models.outbox import OutboxStuck
from workflows.models.plan import Plan
from workflows.models.story import Move, StoryView, TimelineEntry
from workflows.models.workspace import Change, LoggedCommit
from workflows.rules.acceptance import evidence

if TYPE_CHECKING:
    from activities.graph.provenance import (  # its driver is slow to import
        Checked,
        Objection,
        Passed,
        Proved,
        Why,
    )
    from bridge.jetstream.dead_letters import DeadLetter

FRAME = 3
"""Characters between two columns of a table."""

LONGEST_WORD = 40
"""Characters that a column keeps for its longest word; longer words may be broken."""

SHORTEST = 8

ACTION_SHOWN = 80
"""Characters of an agent's last action."""


class StoryRow(Model):
    """A story in a list. started: ISO 8601."""

    story_id: str
    state: str = ""
    pending_gate: str = ""
    gate_role: str = ""
    rigor: str = ""
    dor_score: int | None = None
    status: str
    started: str
    stuck: str = ""
    """The kind of the outbox entry that is refused for good."""


class StoryPage(Model):
    """Everything that a story shows about itself."""

    story: StoryView
    moves: list[Move]
    plan: Plan | None
    timeline: list[TimelineEntry]
    usage: list[UsageLine]


def plain(value: object, keep: str = "") -> str:
    """Return the text with a space for every character that would control a terminal.

    The characters in `keep` stay.
    """
    return "".join(c if c.isprintable() or c in keep else " " for c in str(value))


def text(value: object, style: str = "") -> Text:
    """Return plain text: no markup, and no control characters except line breaks."""
    return Text(plain(value, keep="\n"), style=style, overflow="fold")


@dataclass(frozen=True)
class Column:
    """A table's column.

    drop: of several columns, the one with the highest number is dropped first in a narrow terminal;
    0: never.
    """

    title: str
    drop: int = 0


class FittingTable:
    """A table of plain texts: it drops columns before it breaks words, and never its first one."""

    def __init__(
        self, title: str, columns: Sequence[str | Column], rows: Iterable[Sequence[object]]
    ) -> None:
        self.title = title
        self.columns = [Column(each) if isinstance(each, str) else each for each in columns]
        self.rows = [[c if isinstance(c, Text) else text(c) for c in row] for row in rows]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Print the columns that fit, and the names of those that do not."""
        shown = list(range(len(self.columns)))
        least, most = zip(*map(self._widths, shown), strict=True)
        while sum(least[i] + FRAME for i in shown) >= options.max_width:
            drop = max(shown, key=lambda i: self.columns[i].drop)
            if not self.columns[drop].drop:
                break
            shown.remove(drop)
        left = options.max_width - 1 - sum(least[i] + FRAME for i in shown)
        widths = dict(zip(shown, shared(left, [(least[i], most[i]) for i in shown]), strict=True))
        drawn = Table(title=text(self.title, "bold"), title_justify="left", expand=False)
        for i in shown:
            drawn.add_column(self.columns[i].title, overflow="fold", width=widths[i])
        for row in self.rows:
            drawn.add_row(*(row[i] for i in shown))
        yield drawn
        hidden = [column.title for i, column in enumerate(self.columns) if i not in shown]
        if hidden and self.rows:
            yield text(f"hidden: {', '.join(hidden)} (see --wide)", "dim")

    def _widths(self, place: int) -> tuple[int, int]:
        """Return the width of a column's longest word, and that of its longest line."""
        cells = [self.columns[place].title, *(row[place].plain for row in self.rows)]
        word = max(cell_len(word) for cell in cells for word in [*cell.split(), ""])
        line = max(cell_len(line) for cell in cells for line in [*cell.split("\n"), ""])
        return (line if place == 0 else min(word, LONGEST_WORD)), line


def shared(left: int, columns: Sequence[tuple[int, int]]) -> list[int]:
    """Return each column's width: its minimum and a share of `left`, up to its maximum.

    Args:
        left: Free columns of the terminal. Below 0 if not even the minimum widths fit; the widest
            columns are then narrowed.
        columns: The minimum and the maximum width of each column.
    """
    widths = [least for least, _ in columns]
    if left < 0:
        while left < 0 and max(widths) > SHORTEST:
            widths[widths.index(max(widths))] -= 1
            left += 1
        return widths
    by_want = sorted(range(len(columns)), key=lambda i: columns[i][1] - columns[i][0])
    for place, i in enumerate(by_want):
        least, most = columns[i]
        more = min(most - least, left // (len(columns) - place))
        widths[i] += more
        left -= more
    return widths


def stories(rows: Sequence[StoryRow]) -> RenderableType:
    """Render stories, one per line."""
    if not rows:
        return text("No story fits. Start one: fleet start STORY.json")
    stuck = any(row.stuck for row in rows)
    return FittingTable(
        "Stories",
        (
            "story",
            "state",
            "waits at gate",
            Column("for", drop=1),
            Column("rigor", drop=5),
            Column("ready", drop=4),
            Column("status", drop=2),
            *(["stuck on"] if stuck else []),
            Column("started", drop=3),
        ),
        (
            (
                text(row.story_id, "bold"),
                row.state,
                text(row.pending_gate, "yellow"),
                row.gate_role,
                row.rigor,
                "" if row.dor_score is None else row.dor_score,
                row.status,
                *([text(row.stuck, "red")] if stuck else []),
                local_time(row.started),
            )
            for row in rows
        ),
    )


def letters(found: Sequence[DeadLetter]) -> RenderableType:
    """Render dead letters, one per line."""
    return FittingTable(
        f"{len(found)} dead letters",
        ("number", Column("stored", drop=1), "subject", Column("consumer", drop=2), "reason"),
        (
            (each.number, each.stored[:19], each.subject, each.consumer, each.reason)
            for each in found
        ),
    )


def stuck(entries: Sequence[OutboxStuck]) -> RenderableType:
    """Render the stuck entries of outboxes, one per line."""
    return FittingTable(
        f"{len(entries)} stuck entries",
        ("story", "entry", Column("kind", drop=2), Column("step", drop=1), "error"),
        ((each.story_id, each.entry_id, each.kind, each.step, each.error) for each in entries),
    )


def local_time(at: str) -> str:
    """Return an ISO 8601 time in the reader's own time zone, to the second."""
    try:
        return f"{datetime.fromisoformat(at).astimezone():%Y-%m-%d %H:%M:%S}"
    except ValueError:
        return at


def how_to_open(view: StoryView) -> str:
    """Return the command that opens the gate the story waits at."""
    story_id = shlex.quote(view.story_id)
    if view.pending_gate == "budget":
        return f"fleet raise-budget {story_id} TOKENS --role {view.gate_role}"
    return f"fleet approve {story_id} {view.pending_gate} --role {view.gate_role}"


def story(view: StoryView) -> RenderableType:
    """Render where a story stands."""
    lines = Table.grid(padding=(0, 2))
    lines.add_row("state", text(view.state + (" (cancelled)" if view.cancelled else ""), "bold"))
    if view.pending_gate:
        waits = f"{view.pending_gate} waits for {view.gate_role}"
        lines.add_row("gate", text(waits, "yellow"))
        lines.add_row("", text(how_to_open(view), "dim"))
        lines.add_row("revision", text(view.revision))
    if view.branch:
        at = view.branch.head or "created once the scope is approved"
        lines.add_row("repository", text(view.branch.repository))
        lines.add_row("branch", text(f"{view.branch.branch}: {at}"))
        lines.add_row("base", text(view.branch.base))
        if view.pending_gate and (note := view.branch.base_note(view.story_id)):
            lines.add_row("", text(note, "yellow"))
        for glob in view.branch.unmatched:
            lines.add_row("", text(f"paths: no file matches {glob}", "yellow"))
    if view.acceptance:
        proved = f"{view.acceptance.proved} of {len(view.acceptance.criteria)} proved"
        lines.add_row("criteria", text(proved))
    if view.working_on:
        lines.add_row("working on", text(view.working_on))
    lines.add_row("readiness", text(f"{view.dor_score} of 100 at rigor {view.rigor}"))
    for finding in view.findings:
        lines.add_row("", text(f"{finding.code} -{finding.weight}: {finding.message}"))
    if view.report:
        lines.add_row("report", text(f"{view.report.score}: {view.report.gating_decision}"))
        for note in view.report.notes:
            lines.add_row("look at", text(note))
        for reason in view.report.reasons:
            lines.add_row("", text(reason))
    budget = f" of {view.token_budget:,}" if view.token_budget else ""
    lines.add_row("tokens", text(f"{view.tokens_used:,}{budget}"))
    return Panel.fit(lines, title=text(f"{view.story_id}: {view.title}"), title_align="left")


def acceptance(shown: Acceptance) -> RenderableType:
    """Render each criterion with its tests: their outcome on the base and on the branch."""
    notes = [f"The branch changes the test {path}" for path in shown.changed_tests]
    notes += [f"Not run: {why}" for why in shown.not_run]
    return Group(
        FittingTable(
            f"Acceptance criteria at {shown.commit[:12]}",
            ("criterion", Column("text", drop=1), "test", "before", "after", "verdict"),
            evidence(shown),
        ),
        *(text(note, "yellow") for note in notes),
    )


def commits(branch: str, found: Sequence[LoggedCommit]) -> RenderableType:
    """Render the commits of a branch."""
    return FittingTable(
        branch,
        (Column("commit"), Column("time", drop=2), Column("author", drop=1), "task", "subject"),
        (
            (
                commit.commit[:12],
                f"{commit.at:%Y-%m-%d %H:%M:%S}",
                commit.author,
                commit.trailers.get("Task", ""),
                commit.subject,
            )
            for commit in found
        ),
    )


def diff_stat(change: Change) -> RenderableType:
    """Render the files of a change, each with its added and removed lines, as `git diff --stat`."""
    lines = Table.grid(padding=(0, 1))
    for file in change.files:
        name = f"{file.old_path} => {file.path}" if file.old_path else file.path
        size = "binary" if file.binary else f"+{file.insertions} -{file.deletions}"
        lines.add_row(text(name), "|", text(size, "green" if file.insertions else "red"))
    total = (
        f"{_counted(len(change.files), 'file')} changed, {_counted(change.insertions, 'insertion')}"
        f"(+), {_counted(change.deletions, 'deletion')}(-)"
    )
    return Group(lines, text(total))


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def snapshot(now: Snapshot) -> RenderableType:
    """Render the live view: the story, and every council with who has answered."""
    parts: list[RenderableType] = [story(now.story)]
    if now.councils:
        parts.append(
            FittingTable(
                "Councils at work",
                ("task", "wave", "answered", "still thinking", "failed", "tokens"),
                map(_council, now.councils),
            )
        )
    if now.implementations:
        parts.append(
            FittingTable(
                "Agents at work in the repository",
                (
                    "task and agent",
                    "step",
                    Column("now", drop=3),
                    "last action",
                    "exit",
                    Column("files", drop=1),
                    Column("tokens", drop=2),
                ),
                map(_implementation, now.implementations),
            )
        )
    return Group(*parts)


def _council(council: Council) -> Sequence[object]:
    progress = council.progress
    return (
        council.task_id,
        progress.wave,
        text(" ".join(progress.answered), "green"),
        text(" ".join(progress.waiting), "dim"),
        text(" ".join(f"{each.agent_id}: {each.cause}" for each in progress.failed), "red"),
        f"{progress.tokens:,}",
    )


def _implementation(work: AgentWork) -> Sequence[object]:
    progress = work.progress
    return (
        work.agent,
        f"{progress.step} of {progress.steps}" if progress.steps else "",
        text(progress.status, "dim"),
        cut(progress.last),
        text(ended(progress), "red" if progress.exit_code else ""),
        len(progress.changed),
        f"{progress.tokens:,}",
    )


def ended(progress: ImplementationProgress) -> str:
    """Return how the last command ended; empty if the last action was not a command."""
    if not progress.last_command:
        return ""
    return "stopped" if progress.exit_code is None else str(progress.exit_code)


def cut(action: str) -> str:
    """Return the beginning of an action, which may be long."""
    return action if len(action) <= ACTION_SHOWN else f"{action[: ACTION_SHOWN - 1]}…"


def line(now: Snapshot) -> str:
    """Return the snapshot on one line, for a log."""
    view = now.story
    parts = [view.state if not view.cancelled else f"{view.state} cancelled"]
    if view.pending_gate:
        parts.append(f"gate {view.pending_gate} waits for {view.gate_role}")
    elif view.working_on:
        parts.append(view.working_on)
    parts += [
        f"{council.task_id} {council.progress.wave} "
        f"{len(council.progress.answered)}/{_seats(council)} {council.progress.tokens:,} tokens"
        for council in now.councils
    ]
    parts += [_step(each) for each in now.implementations]
    return plain(f"{view.story_id}  {'  |  '.join(parts)}  |  {view.tokens_used:,} in all")


def _step(work: AgentWork) -> str:
    progress = work.progress
    exit_code = f" exit {ended(progress)}" if ended(progress) else ""
    last = f": {cut(progress.last)}{exit_code}" if progress.last else ""
    step = f" step {progress.step}/{progress.steps}" if progress.steps else ""
    return f"{work.agent}{step} {progress.status}{last}"


def _seats(council: Council) -> int:
    progress = council.progress
    return len(progress.answered) + len(progress.waiting)


def page(shown: StoryPage) -> RenderableType:
    """Render everything about a story."""
    parts: list[RenderableType] = [
        story(shown.story),
        FittingTable(
            "What may happen now",
            ("event", "to", Column("kind", drop=1), "role", "blocked by"),
            (
                (move.event, move.to, move.kind, " ".join(move.roles), " ".join(move.blocked_by))
                for move in shown.moves
            ),
        ),
    ]
    if shown.story.acceptance:
        parts.append(acceptance(shown.story.acceptance))
    if shown.plan:
        parts.append(
            FittingTable(
                f"Plan {shown.plan.plan_id}",
                ("task", "role", "title", "after"),
                (
                    (task.task_id, task.role, task.title, " ".join(task.depends_on))
                    for task in shown.plan.tasks
                ),
            )
        )
    parts += [
        FittingTable(
            "Timeline",
            ("at", "event"),
            ((local_time(entry.at), _event(entry)) for entry in shown.timeline),
        ),
        FittingTable(
            "Usage",
            (
                "phase",
                "role",
                "model",
                "calls",
                "tokens in",
                "out",
                Column("cached", drop=2),
                Column("seconds", drop=1),
            ),
            (
                (
                    use.phase,
                    use.role,
                    use.model,
                    use.calls,
                    f"{'~' if use.estimated else ''}{use.tokens_in:,}",
                    f"{'~' if use.estimated else ''}{use.tokens_out:,}",
                    f"{use.cached_tokens:,}",
                    f"{use.seconds:.1f}",
                )
                for use in shown.usage
            ),
        ),
    ]
    return Group(*parts)


def _event(entry: TimelineEntry) -> Text:
    """Render an event and its actor, with the details below in full width."""
    shown = text(entry.event, "bold")
    if entry.actor:
        shown.append_text(text(f"  by {_known(entry.actor, entry.via)}"))
    if entry.text:
        shown.append_text(text(f"\n{entry.text}"))
    return shown


def reasons(found: Sequence[Why]) -> RenderableType:
    """Render decisions with their provenance."""
    return Group(*(_why(each) for each in found))


def _known(actor: str, via: str) -> str:
    """Return the actor, with how it is known."""
    return f"{actor} ({via})" if via else actor


def _why(found: Why) -> RenderableType:
    lines = Table.grid(padding=(0, 2))
    lines.add_row("why", text(found.rationale))
    lines.add_row("proposed by", text(f"{found.proposed_by} ({found.role})"))
    if found.recorded_by:
        lines.add_row("recorded by", text(found.recorded_by))
    lines.add_row("on", text(f"model {found.model}, prompt {found.prompt_hash}"))
    lines.add_row("deliberation", text(found.deliberation_id))
    score = "" if found.score is None else f"score {found.score:.2f}"
    lines.add_row("won with", text(f"{score}, revised {found.revision} times"))
    if found.judged:
        lines.add_row("judged", text(found.judged))
    if found.affects:
        lines.add_row("affects", text(", ".join(found.affects)))
    panel = Panel.fit(
        lines,
        title=text(f"{found.decision_id}: {found.title}"),
        title_align="left",
        subtitle=text(f"story {found.story_id or 'none'}, decided {local_time(found.decided_at)}"),
    )
    return Group(panel, *review(found.critiques, found.checks, found.passed_by, found.criteria))


def review(
    critiques: Iterable[Objection],
    checks: Iterable[Checked],
    approvals: Iterable[Passed],
    criteria: Sequence[Proved],
) -> list[RenderableType]:
    """Render what followed a proposal.

    Args:
        critiques: what critics objected to.
        checks: what was checked.
        approvals: who approved it.
        criteria: those of the story, with what proves them.
    """
    proofs = FittingTable(
        "Acceptance criteria",
        ("criterion", "text", "proved by"),
        (
            (f"AC-{each.number}", each.text, "\n".join(each.tests) or f"not proved: {each.why}")
            for each in criteria
        ),
    )
    return [
        text("Critiques", "bold"),
        *map(_critique, critiques),
        FittingTable(
            "Checks",
            ("check", "outcome", "score", "findings"),
            (
                (
                    each.name,
                    each.outcome,
                    "" if each.score is None else f"{each.score:.2f}",
                    "\n".join(each.findings),
                )
                for each in checks
            ),
        ),
        FittingTable(
            "Approvals",
            ("gate", "who", "role", Column("when", drop=1), "comment"),
            (
                (
                    each.gate,
                    _known(each.actor, each.via),
                    each.role,
                    local_time(each.at),
                    each.comment,
                )
                for each in approvals
            ),
        ),
        *([proofs] if criteria else []),
    ]


def _critique(each: Objection) -> RenderableType:
    """Render a critique in full width."""
    lines = Table.grid(padding=(0, 1))
    lines.add_row("", text(f"{each.critic}, round {each.round}: {each.verdict}", "bold"))
    for point in each.points:
        lines.add_row("-", text(point))
    if each.suggestion:
        lines.add_row(">", text(each.suggestion))
    return lines
