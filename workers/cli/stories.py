"""The commands that start, steer and show stories.

A command is one Temporal call, or one read of the graph: whatever it does can be done without it.
"""

import asyncio
import json
import re
import shlex
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.live import Live
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from temporalio.client import WorkflowExecution, WorkflowExecutionStatus, WorkflowHandle

from bridge.executions import require_no_failure, summary
from bridge.story_list import WORD, stories_query
from workers.cli import render
from workers.cli.session import (
    UPDATE_WITHIN_S,
    Actor,
    CommandError,
    Json,
    Role,
    StoryId,
    Wide,
    checked,
    command_errors,
    emit,
    ended,
    err,
    file_text,
    handle,
    out,
    person,
    run,
    signed,
    temporal,
)
from workers.cli.snapshot import QUERY_WITHIN, Snapshot, Story, follow
from workers.settings import load
from workflows.models.errors import invalid_input
from workflows.models.events import GateOpened, example
from workflows.models.ids import story_of, story_workflow_id
from workflows.models.readiness import StoryText
from workflows.models.story import (
    Amend,
    Approve,
    RaiseBudget,
    Reject,
    StoryInput,
    StoryResult,
    StoryView,
)
from workflows.search_attributes import (
    DOR_SCORE,
    OUTBOX_STUCK,
    PENDING_GATE,
    RIGOR,
    STORY_ROLE,
    STORY_STATE,
)
from workflows.story import StoryWorkflow
from workflows.stubs import STORY_QUEUE

app = typer.Typer(add_completion=False)

BEGUN_WITHIN_S, BEGUN_EVERY_S = 10.0, 0.1
"""How long `start` waits for the first state of a story, and how often it looks, in seconds."""


# --- steering -------------------------------------------------------------------------------------


@app.command(
    epilog="Examples:  fleet start story.json  ·  echo '{...}' | fleet start -  ·  as temporal: "
    "temporal workflow start --type StoryWorkflow --task-queue story "
    "--workflow-id story-US-101 --input-file story.json"
)
def start(
    file: Annotated[Path, typer.Argument(metavar="STORY.json", help="The story; `-` for stdin.")],
    as_json: Json = False,
) -> None:
    """Start a story from a JSON file.

    Its fields are story_id, title, brief, acceptance_criteria, rigor (L0 to L3; L1), created_by,
    approvals (human or auto), token_budget; for one in a repository also repository, paths, steps.
    """

    async def work() -> None:
        story, settings = _read_story(file), load()
        text = StoryText.model_validate(story, from_attributes=True)
        text.require_fits("StoryInput", settings.story_text_bytes)
        async with temporal(settings) as client, command_errors(story.story_id, client):
            handle = await client.start_workflow(
                StoryWorkflow.run,
                story,
                id=story_workflow_id(story.story_id),
                task_queue=STORY_QUEUE,
                static_summary=summary(story.title),
            )
            has_begun = await begun(handle)
        started = {
            "story_id": story.story_id,
            "workflow_id": handle.id,
            "run_id": handle.result_run_id,
        }
        if as_json:
            print(json.dumps(started))
            return
        out.print(
            render.text(
                f"Started {handle.id}.  Follow it: fleet watch {shlex.quote(story.story_id)}"
                if has_begun
                else f"{handle.id} waits for a story worker: `make status` shows what runs"
            )
        )

    run(work())


async def begun(story: WorkflowHandle[StoryWorkflow, StoryResult]) -> bool:
    """Wait until a story is in its first state; return whether it is, after BEGUN_WITHIN_S.

    Raises:
        WorkflowFailureError: it cannot begin, for example because its repository is not known.
    """
    until = time.monotonic() + BEGUN_WITHIN_S
    while time.monotonic() < until:
        found = await require_no_failure(story)
        if found.typed_search_attributes.get(STORY_STATE):
            return True
        await asyncio.sleep(BEGUN_EVERY_S)
    return False


@app.command(
    epilog="Examples:  fleet approve US-101 --role PO  ·  fleet approve US-101 approve_scope "
    f"--role PO --revision {example(GateOpened)['revision']}  ·  as temporal: "
    "temporal workflow update execute --workflow-id story-US-101 --name approve --input "
    '\'{"gate": "approve_scope", "actor": "ana", "role": "PO"}\''
)
def approve(
    story_id: StoryId,
    actor: Actor,
    role: Role,
    gate: Annotated[
        str | None, typer.Argument(help="The gate; without it, the one the story waits at.")
    ] = None,
    comment: Annotated[str, typer.Option("--comment", "-c", help="Kept with the approval.")] = "",
    revision: Annotated[
        str | None,
        typer.Option(
            help="The revision that you looked at; the approval is refused if the gate shows "
            "another one."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Open a gate."""

    async def decide(story: Story) -> StoryView:
        at = gate or await _pending_gate(story)
        who = person(actor, role)
        request = Approve(gate=at, actor=who, role=role, comment=comment, revision=revision)
        return await story.execute_update(StoryWorkflow.approve, signed(story.id, request))

    update(story_id, decide, as_json)


@app.command(epilog="Example:  fleet reject US-101 reject_design --role PO --reason 'no undo'")
def reject(
    story_id: StoryId,
    actor: Actor,
    event: Annotated[str, typer.Argument(help="The rejection: `fleet show` lists them.")],
    role: Role,
    reason: Annotated[str, typer.Option("--reason", help="What the agents are to change.")],
    as_json: Json = False,
) -> None:
    """Send a story back, with a reason that the next council is given."""

    async def decide(story: Story) -> StoryView:
        request = Reject(event=event, actor=person(actor, role), role=role, reason=reason)
        return await story.execute_update(StoryWorkflow.reject, signed(story.id, request))

    update(story_id, decide, as_json)


@app.command(epilog="Example:  fleet amend US-101 --title 'Undo a delete' --criterion 'Given …'")
def amend(
    story_id: StoryId,
    actor: Actor,
    title: Annotated[str | None, typer.Option(help="The new title.")] = None,
    brief: Annotated[str | None, typer.Option(help="The new brief.")] = None,
    criterion: Annotated[
        list[str] | None,
        typer.Option(help="A new acceptance criterion; repeat it: they replace the old ones."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Change a story's text; approvals of the old text become invalid."""

    async def decide(story: Story) -> StoryView:
        request = Amend(
            title=title, brief=brief, acceptance_criteria=criterion or None, actor=person(actor)
        )
        return await story.execute_update(StoryWorkflow.amend, signed(story.id, request))

    update(story_id, decide, as_json)


@app.command(epilog="Example:  fleet raise-budget US-101 200000 --role PO")
def raise_budget(
    story_id: StoryId,
    actor: Actor,
    tokens: Annotated[int, typer.Argument(help="How many tokens more.")],
    role: Role,
    as_json: Json = False,
) -> None:
    """Give a story more tokens."""

    async def decide(story: Story) -> StoryView:
        request = RaiseBudget(tokens=tokens, actor=person(actor, role), role=role)
        return await story.execute_update(StoryWorkflow.raise_budget, signed(story.id, request))

    update(story_id, decide, as_json)


@app.command(epilog="Example:  fleet report US-101 deploy/examples/ratelimit")
def report(
    story_id: StoryId,
    actor: Actor,
    directory: Annotated[
        Path, typer.Argument(help="The project.", exists=True, file_okay=False, resolve_path=True)
    ],
    setup: Annotated[
        str,
        typer.Option(
            help="A shell command that runs first, with the network. What it installs in the folder"
            " $PACKAGES can be imported."
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Build, test and measure a project, and send the report to its story."""
    from workers.cli.workspace_report import CannotMeasure, measure, require_commit

    async def require_open() -> None:
        async with handle(story_id) as story:
            found = await require_no_failure(story)
        if found.status is not WorkflowExecutionStatus.RUNNING:
            raise CommandError(ended(story_id))

    try:
        require_commit(directory)
    except CannotMeasure as error:
        err.print(render.text(error), soft_wrap=True)
        raise typer.Exit(1) from None
    run(require_open())
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=err,
        transient=True,
    ) as progress:
        step = progress.add_task("looking at the project", total=None)
        try:
            measured = measure(
                directory, lambda name: progress.update(step, description=name), setup
            )
        except CannotMeasure as error:
            err.print(render.text(error), soft_wrap=True)
            raise typer.Exit(1) from None

    async def send(story: Story) -> StoryView:
        request = measured.model_copy(update={"actor": person(actor)})
        return await story.execute_update(StoryWorkflow.report, signed(story.id, request))

    update(story_id, send, as_json)


# --- looking --------------------------------------------------------------------------------------


@app.command(epilog="Example:  fleet watch US-101 --until-gate")
def watch(
    story_id: StoryId,
    until_gate: Annotated[
        bool, typer.Option("--until-gate", help="End as soon as a gate waits for a person.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Follow a story live, until it is done.

    Shows the phase, the wave, who has answered, tokens and the gate.
    """

    async def work() -> None:
        async with temporal(load()) as client, command_errors(story_id, client):
            with showing(as_json) as show:
                async for now in follow(client, checked(story_id)):
                    show(now)
                    waits = isinstance(now, Snapshot) and now.story.pending_gate
                    if until_gate and waits:
                        return

    run(work())


@app.command("list", epilog="Example:  fleet list --waiting --role PO")
def list_stories(
    waiting: Annotated[
        bool, typer.Option("--waiting", help="Only those that wait for a person.")
    ] = False,
    role: Annotated[
        str | None, typer.Option("--role", "-r", help="Only those that wait for this role.")
    ] = None,
    state: Annotated[str | None, typer.Option(help="Only those in this state.")] = None,
    closed: Annotated[bool, typer.Option("--all", help="Include those that have ended.")] = False,
    as_json: Json = False,
    wide: Wide = False,
) -> None:
    """List stories, newest first."""

    async def work() -> None:
        _require_words(role=role, state=state)
        query = stories_query(running=not closed, waiting=waiting, role=role, state=state)
        async with temporal(load()) as client, command_errors("", client):
            newest: dict[str, WorkflowExecution] = {}
            async for each in client.list_workflows(query):
                newest.setdefault(each.id, each)  # the runs of an id come newest first
            rows = [_row(each) for each in newest.values()]
        emit(rows, render.stories(rows), as_json, wide)

    run(work())


@app.command(epilog="Example:  fleet show US-101 --json | jq .story.revision")
def show(story_id: StoryId, as_json: Json = False, wide: Wide = False) -> None:
    """Show a story: state, gate, what may happen now, plan, timeline, usage."""

    async def work() -> None:
        async with handle(story_id) as story:
            # First, so that the answers below are never older than the state that they explain.
            state = await story.query(StoryWorkflow.state, rpc_timeout=QUERY_WITHIN)
            if not state.state:
                await require_no_failure(story)
            moves, plan, timeline, usage = await asyncio.gather(
                story.query(StoryWorkflow.transitions, rpc_timeout=QUERY_WITHIN),
                story.query(StoryWorkflow.plan, rpc_timeout=QUERY_WITHIN),
                story.query(StoryWorkflow.timeline, rpc_timeout=QUERY_WITHIN),
                story.query(StoryWorkflow.usage, rpc_timeout=QUERY_WITHIN),
            )
        page = render.StoryPage(story=state, moves=moves, plan=plan, timeline=timeline, usage=usage)
        emit(page, render.page(page), as_json, wide)

    run(work())


Decision = Callable[[Story], Awaitable[StoryView]]


def update(story_id: str, decide: Decision, as_json: bool) -> None:
    """Send an update and show the story's new state."""

    async def work() -> None:
        async with handle(story_id) as story, asyncio.timeout(UPDATE_WITHIN_S):
            after = await decide(story)
        emit(after, render.story(after), as_json)

    run(work())


async def _pending_gate(story: Story) -> str:
    now = await story.query(StoryWorkflow.state, rpc_timeout=QUERY_WITHIN)
    if not now.pending_gate:
        raise CommandError(
            f"Story {now.story_id} is in {now.state} and waits at no gate. "
            f"`fleet show {shlex.quote(now.story_id)}` says what may happen now"
        )
    return now.pending_gate


def _read_story(file: Path) -> StoryInput:
    text = file_text(file, "STORY.json")
    try:
        return StoryInput.model_validate_json(text)
    except ValidationError as error:  # not JSON at all
        raise invalid_input("StoryInput", error) from None


# --- lists ----------------------------------------------------------------------------------------


def _require_words(**options: str | None) -> None:
    for name, value in options.items():
        if value is not None and not re.fullmatch(WORD, value):
            raise CommandError(
                f"--{name}: must be letters, digits, '_' or '-', such as PO or DESIGN"
            )


def _row(execution: WorkflowExecution) -> render.StoryRow:
    known = execution.typed_search_attributes
    return render.StoryRow(
        story_id=story_of(execution.id),
        state=known.get(STORY_STATE, ""),
        pending_gate=known.get(PENDING_GATE, ""),
        gate_role=known.get(STORY_ROLE, ""),
        rigor=known.get(RIGOR, ""),
        dor_score=known.get(DOR_SCORE),
        status=execution.status.name if execution.status else "",
        started=execution.start_time.isoformat(),
        stuck=known.get(OUTBOX_STUCK, ""),
    )


@contextmanager
def showing(as_json: bool) -> Iterator[Callable[[Snapshot | str], None]]:
    """Return how `watch` prints: live on a terminal, otherwise one line for each change."""
    if out.is_terminal and not as_json:
        with Live(console=out, auto_refresh=False) as live:
            yield lambda now: live.update(
                render.text(now, "red") if isinstance(now, str) else render.snapshot(now),
                refresh=True,
            )
        return
    last = ""

    def show(now: Snapshot | str) -> None:
        nonlocal last
        if isinstance(now, str):
            line = json.dumps({"error": now}) if as_json else now
        else:
            line = now.model_dump_json() if as_json else render.line(now)
        if line != last:
            print(line, flush=True)
        last = line

    yield show
