"""`make run`: take a story to DONE, with the commands that a person would type.

The story is that of the file STORY, by default one for the sample project's repository. Each run
starts it under the next number that has not run yet, or continues a running one. It shows what
happens, and opens each gate with `temporal workflow update execute`; a story without a repository
gets the report of the sample project by `fleet report`. At the end it lists what was decided, by
whom, where to look, and the story's branch.
"""

import asyncio
import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import digits
from typing import Any

from dotenv import dotenv_values
from pydantic import ValidationError
from rich.console import Console, RenderableType
from rich.live import Live
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from deploy.local.server import ROOT
from deploy.local.settings import StackSettings
from workers.cli import render
from workers.cli.snapshot import Snapshot, follow, is_open
from workers.clients.neo4j import open_neo4j
from workers.clients.temporal import open_temporal
from workers.clients.valkey import valkey_client
from workers.exit import leave
from workers.external_storage import data_converter
from workers.settings import Settings, load
from workflows.models.errors import invalid_input
from workflows.models.ids import story_workflow_id
from workflows.models.story import StoryInput

SAMPLE = ROOT / "deploy/examples/ratelimit"
STORY = ROOT / "deploy/examples/stories/readme.json"
MOST_RUNS = 999
"""Stories are US-101, US-102 and so on: one for each `make run` of US-101."""

DECISIONS = """
MATCH (d:Decision)-[:OF]->(:Story {id: $story_id})
OPTIONAL MATCH (d)-[:FROM]->(p:Proposal)-[:BY]->(a:Agent)
RETURN d.id AS id, d.title AS title, coalesce(a.id, d.decided_by) AS agent, p.model AS model
ORDER BY d.decided_at, d.id
"""
APPROVALS = """
MATCH (g:GateApproval)-[:OF]->(:Story {id: $story_id})
RETURN g.gate AS gate, g.actor AS actor, g.role AS role, g.revision AS revision ORDER BY g.at
"""

out = Console(highlight=False)


class Failed(Exception):
    """The demonstration cannot continue; the message gives the reason and what to do."""


async def main() -> None:
    """Take a sample story to DONE.

    Raises:
        Failed: a command was refused, or the story did not reach DONE.
    """
    story = read_story(Path(os.environ.get("STORY") or STORY))
    settings = load()
    valkey = valkey_client(settings)
    try:
        client = await open_temporal(
            settings, data_converter(valkey, settings.keep_payloads_for, settings.encryption_keys)
        )
        story_id, running = await next_story(client, story["story_id"])
        if running:
            out.print(f"{story_id} is under way: going on with it")
        else:
            start(settings, story | {"story_id": story_id})
        branch = await lead(client, settings, story_id)
        await print_result(settings, story_id)
        if branch:
            print_branch(story_id)
    finally:
        await valkey.aclose()


def read_story(file: Path) -> dict[str, Any]:
    """Read a story's file.

    Raises:
        Failed: it cannot be read, or is not a story.
    """
    try:
        text = file.read_text("utf-8-sig")
        StoryInput.model_validate_json(text)
    except (OSError, UnicodeDecodeError) as error:
        raise Failed(f"STORY={file}: {error}") from None
    except ValidationError as error:  # not JSON at all
        raise Failed(f"STORY={file}: {invalid_input('StoryInput', error).message}") from None
    except ApplicationError as error:
        raise Failed(f"STORY={file}: {error.message}") from None
    story: dict[str, Any] = json.loads(text)
    return story


def following_ids(first: str) -> Iterator[str]:
    """Yield a story's id and those after it, if it ends in a number: US-101, US-102 and so on."""
    name = first.rstrip(digits)
    number = first.removeprefix(name)
    if not number:
        yield first
        return
    for each in range(int(number), int(number) + MOST_RUNS):
        yield f"{name}{each:0{len(number)}}"


async def next_story(client: Client, first: str) -> tuple[str, bool]:
    """Return the first id from `first` on that has not ended, and whether it already runs."""
    for story_id in following_ids(first):
        try:
            found = await client.get_workflow_handle(story_workflow_id(story_id)).describe()
        except RPCError as error:
            if error.status == RPCStatusCode.NOT_FOUND:
                return story_id, False
            raise
        if found.status == WorkflowExecutionStatus.RUNNING:
            return story_id, True
    raise Failed(
        f"{first} has run, and every id after it: give the story another story_id, or `make clean` "
        "forgets them"
    )


def start(settings: Settings, story: Mapping[str, Any]) -> None:
    story_id = story["story_id"]
    file = StackSettings.load().home / f"{story_id}.json"
    file.write_text(json.dumps(story, indent=2) + "\n")
    temporal(
        settings,
        ["workflow", "start", "--type", "StoryWorkflow", "--task-queue", "story"],
        ["--workflow-id", story_workflow_id(story_id), "--input-file", str(_short(file))],
    )


async def lead(client: Client, settings: Settings, story_id: str) -> bool:
    """Show the story live, open each gate as it comes, and send the report when it is requested.

    Returns:
        Whether the story has a branch.
    """
    opened: set[tuple[str, str]] = set()
    reported = ""
    with showing() as show:
        async for now in follow(client, story_id):
            show(now)
            if isinstance(now, str):
                continue
            if not is_open(now.status):
                if now.story.state != "DONE":
                    raise Failed(f"{story_id} ended as {now.status} in {now.story.state}")
                return now.story.branch is not None
            gate = (now.story.pending_gate, now.story.revision)
            if gate[0] and gate not in opened:
                opened.add(gate)
                await asyncio.to_thread(approve, settings, now)
            elif wants_report(now) and reported != now.story.plan_id:
                reported = now.story.plan_id
                command = [_program("fleet"), "report", story_id, str(_short(SAMPLE))]
                await asyncio.to_thread(run, command)
    raise Failed(f"{story_id} was not followed to its end")


def wants_report(now: Snapshot) -> bool:
    story = now.story
    return story.state == "BUILD" and story.report is None and story.branch is None


def approve(settings: Settings, now: Snapshot) -> None:
    story = now.story
    if story.pending_gate == "budget":
        raise Failed(f"{story.story_id} has used its tokens: {render.how_to_open(story)}")
    request = {
        "gate": story.pending_gate,
        "actor": "ana" if story.gate_role == "PO" else "quentin",
        "role": story.gate_role,
        "comment": "looked at in make run",
        "revision": story.revision,
    }
    temporal(
        settings,
        ["workflow", "update", "execute", "--workflow-id", story_workflow_id(story.story_id)],
        ["--name", "approve", "--input", json.dumps(request)],
    )


def temporal(settings: Settings, *arguments: Sequence[str]) -> None:
    """Run a command of the `temporal` CLI, with the codec server that `.fleet/env` names."""
    command = [_program("temporal"), *(word for part in arguments for word in part)]
    codec = {
        name: value
        for name, value in dotenv_values(StackSettings.load().home / "env").items()
        if value and name.startswith("TEMPORAL_CODEC_") and name not in os.environ
    }
    run([*command, "--address", settings.temporal_address], codec)


def run(command: list[str], more: Mapping[str, str] | None = None) -> None:
    """Print a command as a person would type it, and run it; `more` are variables for it.

    Raises:
        Failed: its exit code is not 0; the message contains its output.
    """
    shown = [Path(command[0]).name, *command[1:]]
    out.print(f"\n$ {shlex.join(shown)}", style="cyan", markup=False, soft_wrap=True)
    env = {**os.environ, **(more or {})}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    if ended.returncode != 0:
        raise Failed(f"{shlex.join(shown)}\nended with {ended.returncode}: {ended.stderr.strip()}")
    lines = ended.stdout.strip().splitlines()
    out.print("\n".join(f"  {line}" for line in lines), markup=False, soft_wrap=True)


@contextlib.contextmanager
def showing() -> Iterator[Any]:
    """Show a live view on a terminal, otherwise a line for each change."""
    if out.is_terminal:
        with Live(console=out, auto_refresh=False, transient=True) as live:
            yield lambda now: live.update(
                render.text(now, "red") if isinstance(now, str) else render.snapshot(now),
                refresh=True,
            )
        return
    last = ""

    def show(now: Snapshot | str) -> None:
        nonlocal last
        line = now if isinstance(now, str) else render.line(now)
        if line != last:
            out.print(line, markup=False, soft_wrap=True)
        last = line

    yield show


async def print_result(settings: Settings, story_id: str) -> None:
    """Print what was decided and by whom, from the graph; where to look; what to do next."""
    async with open_neo4j(settings) as driver:
        decisions, _, _ = await driver.execute_query(DECISIONS, story_id=story_id)
        approvals, _, _ = await driver.execute_query(APPROVALS, story_id=story_id)
    out.print(f"\n{story_id} is DONE.", style="bold green")
    if decisions:
        out.print(_table("What was decided", decisions, ["id", "title", "agent", "model"]))
    else:  # as a small model often does
        out.print("The councils have recorded no decisions.")
    out.print(_table("Approvals", approvals, ["gate", "actor", "role", "revision"]))
    stack = StackSettings.load()
    ui = f"http://127.0.0.1:{stack.temporal_ui_port}/namespaces/{settings.temporal_namespace}"
    first = decisions[0]["id"] if decisions else "DECISION"
    folder = _short(stack.home)
    rows = [
        ("Web UI", f"{ui}/workflows/{story_workflow_id(story_id)}"),
        ("this story", f"fleet show {story_id}"),
        ("why a decision", f"fleet why {first}"),
        ("Neo4j", f"{settings.neo4j_uri}, credentials in {folder}/env"),
        ("NATS", f"{settings.nats_url}, subjects planning.> orchestration.> context.>"),
        (
            "gRPC",
            f"{settings.grpc_host}, ports {settings.grpc_workspace_port} to "
            f"{settings.grpc_orchestrator_port}; FLEET_TOKEN in {folder}/env",
        ),
        ("logs", f"make logs, or {folder}/logs"),
        (
            "the next story",
            "temporal workflow start --type StoryWorkflow --task-queue story "
            "--workflow-id story-YOURS --input-file YOUR.json",
        ),
        ("what waits for me", "fleet list --waiting"),
        ("stop", "make stop (everything is kept; make run goes on)"),
    ]
    out.print()
    for name, value in rows:  # never wrapped, so that they can be copied
        out.print(render.text(f"{name:<19}", "bold"), render.text(value), soft_wrap=True, sep="")
    out.print("The commands are in .venv/bin: `. .venv/bin/activate` puts them on your PATH.")


def print_branch(story_id: str) -> None:
    """Print the commits of the story's branch, and what they change."""
    for command in (["log", story_id], ["diff", story_id, "--stat"]):
        run([_program("fleet"), *command])


def _table(title: str, rows: Sequence[Any], columns: Sequence[str]) -> RenderableType:
    shown = [render.Column(each, drop=int(each == "model")) for each in columns]
    return render.FittingTable(
        title, shown, [[row[column] or "" for column in columns] for row in rows]
    )


def _program(name: str) -> str:
    """Return the path of a command of this environment."""
    return str(Path(sys.executable).with_name(name))


def _short(path: Path) -> Path:
    """Return the path as a person in the repository would write it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except Failed as failure:
        print(f"make run: {failure}", file=sys.stderr)
        leave(1)
    except KeyboardInterrupt:
        leave(130)
    leave(0)
