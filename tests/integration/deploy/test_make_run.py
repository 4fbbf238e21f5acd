"""`make run` with a story of one's own: to DONE, and to a branch, on real servers."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path

import pytest

from deploy.local.parts import SAMPLE_VARIABLE
from deploy.local.sample import make_repository
from tests.support.capable_model import PLAN, CapableModel
from tests.support.fleet import Environment, new_environment, whole_fleet
from tests.support.fleet_cli import done
from tests.support.llm_server import LlmServer
from tests.support.repositories import in_store
from tests.support.servers import Servers
from workers.environment import ROOT

STORY = "deploy/examples/stories/retry-after.json"


async def make_run(environment: Environment, story: str, log: Path) -> tuple[int, str]:
    """Run what `make run` runs once the stack is up; its output is in `log` while it runs."""
    with log.open("w") as file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "deploy.local.demo"),
            env=os.environ | environment | {"STORY": story, "COLUMNS": "200"},
            cwd=ROOT,
            stdout=file,
            stderr=STDOUT,
        )
        code = await process.wait()
    return code, await asyncio.to_thread(log.read_text)


@pytest.mark.timeout(900)
async def test_a_capable_model_takes_a_code_story_to_a_branch_whose_tests_pass(
    servers: Servers, tmp_path: Path
) -> None:
    base = make_repository(tmp_path / "sample.git")
    async with LlmServer(window=32_768) as llm:
        llm.documents["next_action"] = CapableModel()
        llm.documents["derive_plan"] = lambda _: PLAN
        environment = await new_environment(
            servers,
            llm,
            FLEET_HOME=str(tmp_path),
            WORKSPACE_STORE=str(tmp_path / "store"),
            **{SAMPLE_VARIABLE: (tmp_path / "sample.git").as_uri()},
        )
        async with whole_fleet(environment):
            code, output = await make_run(environment, STORY, tmp_path / "log")
            commits = (await done(environment, "log", "US-201", "--json")).json
            await done(environment, "checkout", "US-201", str(tmp_path / "clone"))
        prompts = [call.prompt for call in llm.calls if call.act == "next_action"]

    assert code == 0, output
    lines = output.splitlines()
    assert "US-201 is DONE." in lines
    assert lines.index("$ fleet log US-201") < lines.index("$ fleet diff US-201 --stat")
    assert any(line.split()[:2] == ["src/ratelimit/middleware.py", "|"] for line in lines)
    assert "Retry-After" in in_store(
        tmp_path / "store" / "sample.git", "show", "story/US-201:src/ratelimit/middleware.py"
    )
    assert {commit["trailers"]["Story"] for commit in commits if commit["trailers"]} == {"US-201"}
    assert any("agent-dev-1 step " in line for line in lines)  # the live view
    assert any(" passed in " in prompt for prompt in prompts)  # what a command really printed
    assert in_store(tmp_path / "sample.git", "rev-parse", "main") == base
    assert await passes(tmp_path / "clone")


async def passes(project: Path) -> bool:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit"),
        cwd=project,
        stdout=PIPE,
        stderr=STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return b" passed" in output
