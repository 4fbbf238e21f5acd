"""Implementations on real servers: a scripted model, real git, and commands in bubblewrap."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats
import nats.errors
import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from nats.js import JetStreamContext
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import EventType
from temporalio.api.workflowservice.v1 import ResetWorkflowExecutionRequest
from temporalio.client import Client, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError, CancelledError

from tests.support.fleet import new_environment, whole_fleet
from tests.support.llm_server import LlmServer
from tests.support.polling import until
from tests.support.repositories import config_with, in_store, make_repository
from tests.support.scripted_model import ScriptedModel, replace, run, write
from tests.support.servers import Servers
from workflows.models.agent_messages import AgentCommand
from workflows.models.ids import encode_id
from workflows.models.implementation import ImplementationResult, StepRecord

PYTEST = "python -m pytest -q -p no:cacheprovider"


@dataclass
class Workshop:
    """A fleet that works in one repository, and its scripted model."""

    client: Client
    llm: LlmServer
    store: Path
    number: int = 0

    async def start(
        self, actions: list[dict[str, Any]], **fields: Any
    ) -> WorkflowHandle[Any, ImplementationResult]:
        self.number += 1
        task_id = f"T-{self.number}"
        task = {"task_id": task_id, "role": "DEV", "description": "Let it add."}
        agent = {"agent_id": "agent-dev-1", "role": "DEV"} | fields.pop("agent", {})
        self.llm.documents["next_action"] = ScriptedModel(
            actions, first_step=fields.get("first_step", 1)
        )
        return await self.client.start_workflow(
            "ImplementationWorkflow",
            {"repository": "adder", "task": task, "agent": agent} | fields,
            id=f"implementation-{task_id}-{agent['agent_id']}",
            task_queue="story",
            result_type=ImplementationResult,
        )

    async def work(self, actions: list[dict[str, Any]], **fields: Any) -> ImplementationResult:
        return await (await self.start(actions, **fields)).result()

    async def steps(self, task_id: str = "") -> list[StepRecord]:
        name = f"implementation-{task_id or f'T-{self.number}'}-agent-dev-1"
        handle = self.client.get_workflow_handle(name)
        steps: list[StepRecord] = await handle.query("transcript", result_type=list[StepRecord])
        return steps

    def git(self, *arguments: str) -> str:
        return in_store(self.store / "adder.git", *arguments)


@pytest.fixture(scope="module")
async def workshop(
    servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Workshop]:
    home = tmp_path_factory.mktemp("workshop")
    entry = {"url": make_repository(home / "adder"), "limits": {"seconds": 60, "steps": 12}}
    hasty = entry | {"limits": {"seconds": 10}}
    config = config_with(home / "config", adder=entry, hasty=hasty)
    async with LlmServer(window=32_768) as llm:
        environment = await new_environment(
            servers,
            llm,
            FLEET_CONFIG=str(config),
            FLEET_HOME=str(home),
            WORKSPACE_STORE=str(home / "store"),
        )
        async with whole_fleet(environment) as client:
            yield Workshop(client, llm, home / "store")


async def test_an_agent_explores_edits_tests_and_finishes(workshop: Workshop) -> None:
    result = await workshop.work(
        [
            run(PYTEST),
            replace("adder/__init__.py", "left - right", "left + right"),
            write(
                "tests/test_zero.py",
                "from adder import add\n\n\ndef test_zero() -> None:\n    assert add(0, 0) == 0\n",
            ),
            run(PYTEST),
        ]
    )

    first, second, third, fourth = await workshop.steps()
    assert (first.exit_code, first.changed) == (1, False)
    assert "1 failed" in first.observation
    assert second.observation == "adder/__init__.py is changed: 1 line replaced by 1 line"
    assert (fourth.exit_code, fourth.changed) == (0, False)
    assert "2 passed" in fourth.observation
    assert (result.ended_by, result.steps, result.summary) == ("finish", 5, "All is done.")
    assert [(file.path, file.status) for file in result.changed] == [
        ("adder/__init__.py", "modified"),
        ("tests/test_zero.py", "added"),
    ]
    ref = f"refs/fleet/no-story/T-{workshop.number}/agent-dev-1"
    assert workshop.git("rev-parse", ref) == result.commit == third.commit
    message = workshop.git("log", "-1", "--format=%B", ref)
    for line in (
        f"Task: T-{workshop.number}",
        "Agent: agent-dev-1",
        "Model: test-model",
        "Step: 3",
    ):
        assert line in message
    assert "Prompt-Hash: " in message
    assert "__pycache__" not in workshop.git("ls-tree", "-r", "--name-only", ref)


async def test_what_cannot_be_done_is_what_the_agent_reads_next(workshop: Workshop) -> None:
    result = await workshop.work(
        [
            replace("README.md", "no such text", "x"),
            replace("README.md", "dd", "x"),
            write("setup.py", "import os"),
            write("../outside", "x"),
            run("echo changed > adder/__init__.py; echo new >> README.md; rm -r tests"),
            run("read answer; echo got:$answer:"),
        ],
        paths=["README.md"],
    )

    steps = await workshop.steps()
    absent, twice, outside, above, ran, asked = (step.observation for step in steps)
    assert "not in README.md" in absent
    assert "2 times" in twice
    assert "setup.py" in outside
    assert "nothing was changed" in outside
    assert "nothing was changed" in above
    assert "adder/__init__.py" in ran
    assert "tests/test_adder.py" in ran
    assert "got::" in asked
    assert [file.path for file in result.changed] == ["README.md"]
    assert workshop.git("show", f"{result.commit}:README.md").endswith("new")


async def test_a_command_that_hangs_is_stopped_and_changes_nothing(workshop: Workshop) -> None:
    result = await workshop.work([run("echo x > README.md; sleep 600 & wait")], repository="hasty")

    (step,) = await workshop.steps()
    assert step.exit_code is None
    assert step.stopped
    assert result.changed == []


async def test_a_revision_continues_from_a_commit(workshop: Workshop) -> None:
    first = await workshop.work([write("NEWS.md", "one\n")], paths=["*.md"])

    second = await workshop.work(
        [replace("NEWS.md", "one", "two")],
        paths=["*.md"],
        base=first.base,
        head=first.commit,
        first_step=2,
        limits={"steps": 1},
    )

    assert workshop.git("rev-parse", f"{second.commit}^") == first.commit
    assert workshop.git("show", f"{second.commit}:NEWS.md") == "two"
    assert [(file.path, file.status) for file in second.changed] == [("NEWS.md", "added")]
    assert second.ended_by == "steps"


async def test_cancelling_ends_the_sandbox(workshop: Workshop) -> None:
    handle = await workshop.start([run("sleep 4321")])
    await until(lambda: sleeping("4321"))

    await handle.cancel()

    with pytest.raises(WorkflowFailureError) as failed:
        await handle.result()
    assert isinstance(failed.value.cause, CancelledError)
    await until(lambda: not sleeping("4321"))


async def test_a_reset_continues_with_the_same_commits(workshop: Workshop) -> None:
    script = [write(f"docs/{name}.md", f"{name}\n") for name in ("one", "two", "three")]
    handle = await workshop.start(script, paths=["docs/**"])
    before = await handle.result()

    reset = await workshop.client.workflow_service.reset_workflow_execution(
        ResetWorkflowExecutionRequest(
            namespace=workshop.client.namespace,
            workflow_execution=WorkflowExecution(workflow_id=handle.id),
            workflow_task_finish_event_id=await first_task_after(handle, "run_action"),
            reason="test",
            request_id=uuid.uuid4().hex,
        )
    )
    after = await workshop.client.get_workflow_handle(
        handle.id, run_id=reset.run_id, result_type=ImplementationResult
    ).result()

    assert (after.commit, after.transcript_digest) == (before.commit, before.transcript_digest)
    ref = f"refs/fleet/no-story/T-{workshop.number}/agent-dev-1"
    assert workshop.git("rev-parse", ref) == after.commit
    assert workshop.git("rev-list", "--count", f"{after.base}..{ref}") == "3"


async def first_task_after(handle: WorkflowHandle[Any, Any], activity: str) -> int:
    """Return the id of the first completed workflow task after an activity of that type."""
    began = False
    async for event in handle.fetch_history_events():
        began |= event.activity_task_scheduled_event_attributes.activity_type.name == activity
        if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED and began:
            completed = event.event_id
            break
    return completed + 3  # it is scheduled, started, completed


def sleeping(seconds: str) -> bool:
    """Return whether a process sleeps for so many seconds."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if command.read_bytes().split(b"\0")[:2] == [b"sleep", seconds.encode()]:
                return True
        except OSError:
            continue
    return False


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"repository": "nowhere"}, "UnknownRepository", "repositories.yaml has no 'nowhere'"),
        ({"base": "c" * 40}, "NotFound", "is not found in the store"),
    ],
)
async def test_a_repository_or_commit_that_is_not_there_fails_the_work(
    workshop: Workshop, fields: dict[str, Any], kind: str, words: str
) -> None:
    handle = await workshop.start([], **fields)

    with pytest.raises(WorkflowFailureError) as failed:
        await handle.result()

    error: BaseException = failed.value
    while error.__cause__ is not None:
        error = error.__cause__
    assert isinstance(error, ApplicationError)
    assert error.type == kind
    assert words in error.message


async def answer_from_nats(servers: Servers, model: ScriptedModel) -> None:
    """Be an external agent of the role DEV: answer every command by the script."""
    server = servers.nats
    connection = await nats.connect(server.address, user=server.user, password=server.password)
    try:
        jetstream = connection.jetstream()
        commands = await jetstream.pull_subscribe("agent.cmd.DEV", stream="AGENT_COMMANDS")
        while True:
            with suppress(nats.errors.TimeoutError):
                (message,) = await commands.fetch(1, timeout=1)
                await message.ack()
                await respond(jetstream, AgentCommand.model_validate_json(message.data), model)
    finally:
        await connection.close()


async def respond(jetstream: JetStreamContext, command: AgentCommand, model: ScriptedModel) -> None:
    assert command.act == "next_action"
    document = model.next(command.prompt)
    Draft202012Validator(command.answer_schema).validate(document)
    answer = {
        "task_id": command.task_id,
        "agent_id": command.agent_id,
        "call_id": command.call_id,
        "status": "done",
        "content": json.dumps(document),
        "tokens_in": 11,
        "tokens_out": 7,
    }
    subject = f"agent.response.{encode_id(command.task_id)}"
    await jetstream.publish(subject, json.dumps(answer).encode())


async def test_an_external_agent_works_by_the_same_schema(
    workshop: Workshop, servers: Servers
) -> None:
    script = [write("docs/usage.md", "Use it.\n"), run("cat docs/usage.md")]
    answering = asyncio.create_task(answer_from_nats(servers, ScriptedModel(script)))

    result = await workshop.work([], agent={"agent_type": "NATS"}, paths=["docs/**"])

    answering.cancel()
    assert [file.path for file in result.changed] == ["docs/usage.md"]
    assert [(line.calls, line.tokens) for line in result.usage] == [(3, 54)]
    assert (await workshop.steps())[1].observation == "Use it.\n"
