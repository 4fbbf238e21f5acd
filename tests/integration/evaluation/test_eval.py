"""`fleet eval` on real servers: a scripted model, commands that really run, and tests of tasks."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from temporalio.client import Client

from tests.evaluation.make import make
from tests.support.fleet import Environment, new_environment, whole_fleet
from tests.support.fleet_cli import Result, command, refused
from tests.support.llm_server import LlmServer
from tests.support.polling import until
from tests.support.repositories import config_with
from tests.support.servers import Servers
from tests.support.solver import Solver
from workers.environment import ROOT

SOLVED = ("stockroom-1", "stockroom-3")


@dataclass
class Fleet:
    """A fleet with its scripted model, and the file of the ten tasks."""

    client: Client
    llm: LlmServer
    env: Environment
    file: Path
    solver: Solver

    async def eval(self, *arguments: str) -> Result:
        return await command(self.env, "eval", str(self.file), *arguments)

    async def none_run(self) -> bool:
        query = "ExecutionStatus = 'Running'"
        return not [each async for each in self.client.list_workflows(query)]


@pytest.fixture(scope="module")
async def fleet(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    home = tmp_path_factory.mktemp("evaluation")
    async with LlmServer(window=32_768) as llm:
        llm.documents["next_action"] = solver = Solver(SOLVED)
        environment = await new_environment(
            servers,
            llm,
            FLEET_CONFIG=str(config_with(home / "config")),
            FLEET_HOME=str(home),
            WORKSPACE_STORE=str(home / "store"),
        )
        async with whole_fleet(environment) as client:
            yield Fleet(client, llm, environment, make(home), solver)


def cells(out: str) -> list[list[str]]:
    """Return the table's rows, as words."""
    return [line.split() for line in out.splitlines()[1:]]


async def test_a_run_prints_what_is_resolved_and_goes_on_where_it_stopped(
    fleet: Fleet, tmp_path: Path
) -> None:
    document = tmp_path / "results.json"
    first = await fleet.eval("--limit", "2", "--json", str(document))
    calls = len(fleet.llm.calls)
    again = await fleet.eval("--limit", "3", "--run", run_of(first), "--json", str(document))

    assert (first.code, again.code) == (0, 0), first.err + again.err
    assert [row[:4] for row in cells(first.out)] == [["one", "1", "of", "2"]]
    assert [row[:4] for row in cells(again.out)] == [["one", "2", "of", "3"]]
    resumed = {fleet.solver.task(call.prompt).instance_id for call in fleet.llm.calls[calls:]}
    assert resumed == {"stockroom-3"}
    assert "one  stockroom-2  not resolved: 0 of 1 to pass, 21 of 21 still pass" in again.err
    written = json.loads(document.read_text())
    solved, missed, _ = written["results"]
    assert (solved["resolved"], missed["resolved"]) == (True, False)
    assert solved["evaluated"]["change"]["files"][0]["path"] == "stockroom/money.py"
    assert solved["evaluated"]["commits"][0]["trailers"]["Step"] == "2"
    assert [line["calls"] for line in solved["usage"]] == [4]
    assert written["models"] == ["test-model"]
    assert written["inputs"][0]["base"] == solved["base"]
    assert len(written["prompt_hashes"]) == 3
    prompts = {call.prompt.count("test_one_digit_after_the_point") for call in fleet.llm.calls}
    assert prompts == {0}, "the agents do not see the tests of a solution"


def run_of(result: Result) -> str:
    """Return the name of the run that a command printed."""
    return result.err.split()[1].rstrip(":")


async def test_the_best_of_several_and_a_council_work_on_the_same_task(fleet: Fleet) -> None:
    ended = await fleet.eval(
        "--limit", "1", "--run", "councils", "-c", "best-of:2", "-c", "council:2x1"
    )

    assert ended.code == 0, ended.err
    best, council = cells(ended.out)
    assert best[:4] == ["best-of:2", "1", "of", "1"]
    assert council[:4] == ["council:2x1", "1", "of", "1"]
    assert int(council[6]) > int(best[6])


async def test_another_task_under_the_name_of_a_run_is_refused(fleet: Fleet) -> None:
    first = await fleet.eval("--limit", "1", "--run", "taken", "--steps", "1")
    error = await refused(
        fleet.env, "eval", str(fleet.file), "--limit", "1", "--run", "taken", "--steps", "2"
    )

    assert [row[:4] for row in cells(first.out)] == [["one", "0", "of", "1"]]
    assert "--run: taken has evaluated another stockroom-1, or with other limits" in error


async def test_an_interrupt_cancels_what_the_command_started(fleet: Fleet) -> None:
    fleet.llm.answering.clear()
    calls = len(fleet.llm.calls)
    arguments = ("eval", str(fleet.file), "--limit", "2", "--run", "interrupted")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "workers.cli", *arguments),
        cwd=ROOT,
        env=fleet.env,
        stdout=PIPE,
        stderr=PIPE,
    )
    await until(lambda: len(fleet.llm.calls) == calls + 2)

    process.send_signal(signal.SIGINT)
    _, errors = await process.communicate()

    assert process.returncode == 130, errors.decode()
    assert await until(fleet.none_run)
    fleet.llm.answering.set()
    resumed = await fleet.eval("--limit", "2", "--run", "interrupted")
    assert [row[:4] for row in cells(resumed.out)] == [["one", "1", "of", "2"]]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"base_commit": "c" * 40}, "repo: the base commits of stockroom cannot be put into"),
        ({"repo": "nowhere/project"}, "add the entry nowhere__project, or give a path"),
    ],
)
async def test_what_cannot_be_evaluated_is_refused_before_anything_starts(
    fleet: Fleet, fields: dict[str, Any], words: str
) -> None:
    rows = [json.loads(line) for line in fleet.file.read_text().splitlines()]
    file = fleet.file.parent / "wrong.json"
    file.write_text(json.dumps([rows[0] | fields]))

    assert words in await refused(fleet.env, "eval", str(file))
