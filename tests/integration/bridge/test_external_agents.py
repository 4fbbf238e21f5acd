"""External agents on NATS: commands, answers, refusals, timeouts, crashes, and a mixed council."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import sys
import time
import uuid
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig
from nats.js.errors import NotFoundError
from neo4j import AsyncDriver
from redis.asyncio import Redis
from structlog.testing import capture_logs
from temporalio.client import Client, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from activities.agents.prompts import Prompts
from bridge.agents.activity import EXPIRY
from bridge.agents.responses import LARGEST_RESPONSE, AgentResponses
from bridge.jetstream.consumers import AGENTS_RESPONSES
from bridge.jetstream.dead_letters import DeadLetter, DeadLetters
from bridge.jetstream.streams import reconcile
from deploy.local.servers import Nats as NatsServer
from tests.support.asking import Asking, AskWorkflow
from tests.support.fleet import Environment, connect, running
from tests.support.llm_server import LlmServer, document_of, markdown_of
from tests.support.polling import WITHIN_S, until, until_early_in_the_hour
from tests.support.servers import RunningServer
from workers.environment import ROOT
from workers.external_storage import data_converter
from workers.run import ready, run_until
from workers.settings import Settings
from workflows.models.agent_messages import AgentCommand
from workflows.models.agents import Agent, CallUsage, ProposalAnswer, ProposeInput, Task
from workflows.models.context import ContextPack
from workflows.models.deliberation import DeliberationInput, DeliberationResult
from workflows.models.ids import deliberation_workflow_id

QUEUE = "asking"

Asked = WorkflowHandle[AskWorkflow, ProposalAnswer]


def proposing(**agent: Any) -> ProposeInput:
    """Return a call to an external agent with its own task."""
    fields = {"agent_id": "dev-7", "role": "DEV", "agent_type": "NATS", "persona": "You doubt."}
    return ProposeInput(
        task=Task(
            task_id=f"t-{uuid.uuid4().hex[:8]}",
            story_id="US-7",
            role="DEV",
            description="Store every event.",
        ),
        agent=Agent.model_validate(fields | agent),
        pack=ContextPack(context="Decided: JetStream."),
        wave=1,
    )


def document(command: AgentCommand) -> str:
    """Return an answer that conforms to the command's schema and is about its task."""
    fields = document_of(command.answer_schema, random.Random(7))
    return json.dumps(fields | {"approach": "Store every event in the outbox."})


def markdown(command: AgentCommand) -> str:
    """Return an answer as the command's prompt asks for it."""
    return markdown_of(command.act, command.prompt, random.Random(7))


class Outside:
    """The outside of the fleet: an agent controlled by the test, and the clients that ask it."""

    def __init__(self, nats: Nats, temporal: Client) -> None:
        self.nats, self.temporal = nats, temporal
        self.jetstream = nats.jetstream()
        self.commands: list[AgentCommand] = []
        self.messages: list[Msg] = []
        self._taking: JetStreamContext.PullSubscription | None = None

    # --- the fleet's side -------------------------------------------------------------------------

    async def ask(self, request: ProposeInput | None = None, **asking: Any) -> Asked:
        request = request or proposing()
        return await self.temporal.start_workflow(
            AskWorkflow.run,
            Asking(request=request, **asking),
            id=f"ask-{request.task.task_id}",
            task_queue=QUEUE,
        )

    async def pending(self, handle: Asked) -> Any:
        """Return the pending activity as Temporal describes it, or None."""
        description = (await handle.describe()).raw_description
        return description.pending_activities[0] if description.pending_activities else None

    # --- the agent's side -------------------------------------------------------------------------

    async def take(self) -> AgentCommand:
        """Take and acknowledge the next command for the role DEV."""
        if self._taking is None:
            self._taking = await self.jetstream.pull_subscribe(
                "agent.cmd.DEV", stream="AGENT_COMMANDS"
            )
        (message,) = await self._taking.fetch(1, timeout=WITHIN_S)
        await message.ack()
        self.messages.append(message)
        self.commands.append(AgentCommand.model_validate_json(message.data))
        return self.commands[-1]

    async def call_count(self) -> int:
        """Count the commands published so far."""
        return (await self.jetstream.stream_info("AGENT_COMMANDS")).state.messages

    async def respond(self, command: AgentCommand, status: str, **fields: Any) -> None:
        body = {
            "task_id": command.task_id,
            "agent_id": command.agent_id,
            "call_id": command.call_id,
            "status": status,
            "model": "outside-model",
            "tokens_in": 11,
            "tokens_out": 7,
        }
        await self.publish(command.task_id, json.dumps(body | fields).encode())

    async def publish(self, task_id: str, body: bytes) -> None:
        await self.jetstream.publish(f"agent.response.{task_id}", body)

    async def answer(self, command: AgentCommand) -> None:
        await self.respond(command, "done", content=document(command))

    # --- refusals ---------------------------------------------------------------------------------

    async def letters(self) -> list[DeadLetter]:
        return [letter async for letter in DeadLetters(self.nats).list()]

    async def refused(self) -> DeadLetter:
        """Wait until all responses are settled, and return the only dead letter."""
        await self.settled()
        (letter,) = await self.letters()
        assert letter.consumer == AGENTS_RESPONSES.name
        return letter

    async def settled(self) -> None:
        """Wait until every response is acknowledged."""

        async def done() -> bool:
            try:
                info = await self.jetstream.consumer_info(
                    AGENTS_RESPONSES.stream, AGENTS_RESPONSES.name
                )
            except NotFoundError:
                return False  # the process has not created the consumer yet
            stream = await self.jetstream.stream_info("AGENT_RESPONSES")
            settled = info.ack_floor.stream_seq if info.ack_floor else 0
            return settled == stream.state.last_seq

        await until(done)


def settings_of(environment: Environment) -> Settings:
    values = {name.lower(): value for name, value in environment.items()}
    return Settings.model_validate({k: v for k, v in values.items() if k in Settings.model_fields})


@asynccontextmanager
async def agents_process(environment: Environment) -> AsyncIterator[None]:
    """Run the process `agents` inside this process."""
    stop = asyncio.Event()
    async with ready("agents", settings_of(environment)) as process:
        runs = asyncio.create_task(run_until(list(process.jobs.values()), stop, process.lost))
        yield
        stop.set()
        await runs


@pytest.fixture
async def outside(
    environment: Environment, nats_client: Nats, client: Redis
) -> AsyncIterator[Outside]:
    """Set up the fleet's streams and a worker that asks; no process serves the calls yet."""
    await reconcile(nats_client.jetstream(), replicas=1)
    temporal = await connect(
        environment["TEMPORAL_ADDRESS"], environment["TEMPORAL_NAMESPACE"], data_converter(client)
    )
    async with Worker(
        temporal,
        task_queue=QUEUE,
        workflows=[AskWorkflow],
        workflow_runner=UnsandboxedWorkflowRunner(),
    ):
        yield Outside(nats_client, temporal)


@pytest.fixture
async def fleet(outside: Outside, environment: Environment) -> AsyncIterator[Outside]:
    """Run the process `agents` as well."""
    async with agents_process(environment):
        yield outside


async def failure(handle: Asked) -> ApplicationError:
    """Return the error that the activity failed with."""
    with pytest.raises(WorkflowFailureError) as failed:
        await handle.result()
    cause = failed.value.cause.__cause__
    assert isinstance(cause, ApplicationError), repr(failed.value.cause)
    return cause


async def test_a_call_and_its_answer_are_kept_encrypted(
    outside: Outside, environment: Environment, client: Redis
) -> None:
    known = {key async for key in client.scan_iter()}

    async def kept(name: str) -> list[Any]:
        keys = {key async for key in client.scan_iter(f"{name}:*")} - known
        return [await client.get(key) or b"" for key in keys]

    async with agents_process(environment | {"PAYLOAD_KEYS": "a1" * 32}):
        await outside.ask()
        command = await outside.take()
        calls = await kept("swe:agent-call")
        await outside.answer(command)
        await outside.settled()
        answers = await kept("swe:answer")

    assert (len(calls), len(answers)) == (1, 1)
    content = json.loads(document(command))["content"]
    for word in ("Store every event.", command.agent_id, content):
        assert not any(word.encode() in value for value in (*calls, *answers))


# --- the consumer ---------------------------------------------------------------------------------


async def test_a_removed_consumer_is_created_again(fleet: Outside) -> None:
    handle = await fleet.ask()
    command = await fleet.take()
    await fleet.settled()
    await fleet.jetstream.delete_consumer(AGENTS_RESPONSES.stream, AGENTS_RESPONSES.name)

    await fleet.answer(command)

    assert (await handle.result()).usage.model == "outside-model"


async def test_a_consumer_of_another_kind_is_reported_with_its_fix_and_by_health(
    outside: Outside, client: Redis
) -> None:
    await outside.jetstream.add_consumer(
        AGENTS_RESPONSES.stream,
        ConsumerConfig(durable_name=AGENTS_RESPONSES.name, ack_policy=AckPolicy.ALL),
    )
    prompts = Prompts.load(ROOT / "deploy" / "config" / "prompts")
    responses = AgentResponses(outside.nats, 1, outside.temporal, client, prompts)
    runs = asyncio.create_task(responses.run())

    async def reported() -> bool:
        return any("nats consumer rm" in str(line.get("because")) for line in lines)

    with capture_logs() as lines:
        await until(reported)
    assert not responses.is_running
    await outside.jetstream.delete_consumer(AGENTS_RESPONSES.stream, AGENTS_RESPONSES.name)

    async def runs_again() -> bool:
        return responses.is_running

    await until(runs_again)
    await responses.shutdown()
    await runs


# --- answers --------------------------------------------------------------------------------------


async def test_an_answer_completes_the_activity_and_reports_its_cost(fleet: Outside) -> None:
    request = proposing()
    handle = await fleet.ask(request)
    command = await fleet.take()

    await fleet.answer(command)

    answer = await handle.result()
    assert answer.proposal.model_dump(mode="json") == json.loads(document(command))
    usage = answer.usage
    assert (usage.act, usage.agent_id, usage.role) == ("propose", "dev-7", "DEV")
    assert (usage.model, usage.tokens_in, usage.tokens_out) == ("outside-model", 11, 7)
    assert (usage.asks, usage.seed) == (1, command.seed)
    assert usage.prompt_hash
    await fleet.settled()
    assert await fleet.letters() == []


async def test_an_answer_may_be_markdown_as_the_prompt_asks_for(fleet: Outside) -> None:
    handle = await fleet.ask()
    command = await fleet.take()

    await fleet.respond(command, "done", content=markdown(command))

    proposal = (await handle.result()).proposal
    assert proposal.content in markdown(command)
    assert proposal.decisions
    assert all(decision.title in markdown(command) for decision in proposal.decisions)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("The events are stored in an outbox, and a job publishes them later.", "no decisions"),
        (
            "Rome was founded by two brothers on seven hills, as the legend has it. They were "
            "raised by a wolf.\n\n# Decisions\n- Name the town after the one who is left",
            "something else",
        ),
        ("An event is stored here. " * 40 + "\n\n# Decisions\n- Store events", "repeats itself"),
    ],
)
async def test_an_answer_that_says_too_little_is_asked_for_again(
    fleet: Outside, content: str, problem: str
) -> None:
    handle = await fleet.ask()
    command = await fleet.take()

    await fleet.respond(command, "done", content=content)

    again = await fleet.take()
    assert problem in again.prompt
    await fleet.answer(again)
    assert (await handle.result()).usage.asks == 2


async def test_a_command_has_all_that_an_agent_needs(fleet: Outside) -> None:
    request = proposing()
    await fleet.ask(request)

    command = await fleet.take()

    (message,) = fleet.messages
    body, headers = json.loads(message.data), message.headers or {}
    assert {"task_id", "story_id", "agent_id", "act", "prompt", "timestamp"} <= set(body)
    assert (command.task_id, command.story_id) == (request.task.task_id, "US-7")
    assert (command.agent_id, command.act) == ("dev-7", "propose")
    for text in ("Store every event.", "Decided: JetStream.", "You doubt."):
        assert text in command.prompt
    assert command.answer_format == "markdown"
    assert set(command.answer_schema["required"]) == {"approach", "content", "decisions"}
    assert command.max_tokens > 0
    assert headers["Nats-Msg-Id"] == headers["ce-id"] == command.call_id
    assert headers["ce-source"].endswith(f"/ask-{request.task.task_id}")
    assert (headers["ce-type"], headers["ce-subject"]) == ("agent.cmd.DEV", "US-7")
    assert datetime.fromisoformat(headers[EXPIRY]) > datetime.now(UTC)


async def test_a_kept_answer_is_not_asked_for_again(fleet: Outside, client: Redis) -> None:
    request = proposing()
    handle = await fleet.ask(request, attempts=2)
    command = await fleet.take()
    info = await handle.describe()
    key = f"swe:answer:{handle.id}:{info.run_id}:1:propose:dev-7"
    fields = json.loads(document(command))
    usage = {"act": "propose", "agent_id": "dev-7", "role": "DEV", "model": "kept"}
    kept = ProposalAnswer.model_validate({"proposal": fields, "usage": usage})

    await client.set(key, kept.model_dump_json())
    await fleet.respond(command, "failed", error="out of memory")  # so that it is tried again

    assert await handle.result() == kept
    assert await fleet.call_count() == 1


async def test_each_answer_counts_for_its_caller_who_is_refused_when_the_tokens_are_used(
    outside: Outside, environment: Environment, client: Redis
) -> None:
    actor = f"eve-{uuid.uuid4().hex}"

    def asked_by_actor() -> ProposeInput:
        request = proposing()
        return request.model_copy(update={"task": request.task.model_copy(update={"actor": actor})})

    await until_early_in_the_hour()
    async with agents_process(environment | {"GRPC_TOKENS_PER_HOUR": "30"}):
        handle = await outside.ask(asked_by_actor())
        await outside.respond(await outside.take(), "done", content="no JSON")
        await outside.answer(await outside.take())
        await handle.result()
        refused = await failure(await outside.ask(asked_by_actor()))

    assert refused.type == "QuotaUsed"
    assert "has used 36 of 30 tokens" in refused.message
    assert await outside.call_count() == 2


async def test_an_answer_that_comes_before_the_activity_has_ended_counts(
    outside: Outside, environment: Environment
) -> None:
    """Ten calls are each answered as soon as their command arrives."""
    async with agents_process(environment):
        handles = []
        for _ in range(10):
            handles.append(await outside.ask())
            await outside.answer(await outside.take())

        answers = [await handle.result() for handle in handles]

    assert len(answers) == 10
    assert await outside.call_count() == 10


# --- answers that cannot be used ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "it was empty"),
        ('{"approach": "half', "Invalid JSON"),
        ('{"answer": 42}', "approach: Field required"),
    ],
)
async def test_a_malformed_answer_is_asked_again_with_what_was_wrong(
    fleet: Outside, content: str | None, problem: str
) -> None:
    handle = await fleet.ask()
    first = await fleet.take()

    await fleet.respond(first, "done", content=content)
    second = await fleet.take()
    await fleet.answer(second)

    usage = (await handle.result()).usage
    assert problem in second.prompt
    assert second.prompt.startswith(first.prompt)
    assert second.call_id != first.call_id
    assert second.seed != first.seed
    assert (usage.asks, usage.tokens_in, usage.tokens_out) == (2, 22, 14)


async def test_three_malformed_answers_are_the_end(fleet: Outside) -> None:
    handle = await fleet.ask(attempts=5)

    for _ in range(3):
        await fleet.respond(await fleet.take(), "done", content='{"approach": "half')

    error = await failure(handle)
    assert (error.type, error.non_retryable) == ("BadAnswer", True)
    assert "Invalid JSON" in error.message
    assert await fleet.call_count() == 3


async def test_a_failed_agent_fails_the_attempt_with_its_message_and_another_is_asked(
    fleet: Outside,
) -> None:
    handle = await fleet.ask(attempts=2)
    first = await fleet.take()

    await fleet.respond(first, "failed", error="out of memory " * 1_000)
    second = await fleet.take()
    pending = await fleet.pending(handle)
    await fleet.respond(second, "failed", error="out of memory again")

    assert pending.attempt == 2
    assert "out of memory" in pending.last_failure.message
    assert len(pending.last_failure.message) < 700
    assert second.call_id != first.call_id
    error = await failure(handle)
    assert (error.type, error.message) == ("AgentFailed", "Agent dev-7 failed: out of memory again")
    usage = CallUsage.model_validate(error.details[0])
    assert (usage.asks, usage.tokens_in, usage.tokens_out) == (2, 22, 14)
    assert usage.model == "outside-model"


async def test_an_answer_counts_what_all_attempts_before_it_have_cost(fleet: Outside) -> None:
    handle = await fleet.ask(silence_s=10, attempts=3)
    await fleet.respond(await fleet.take(), "done", content="no JSON")
    await fleet.respond(await fleet.take(), "failed", error="out of memory")
    await fleet.respond(await fleet.take(), "working")  # no answer follows
    await fleet.answer(await fleet.take())

    usage = (await handle.result()).usage
    assert (usage.asks, usage.tokens_in, usage.tokens_out) == (4, 44, 28)


async def test_an_attempt_that_broke_off_is_counted_with_the_next(
    fleet: Outside, llm: LlmServer
) -> None:
    """The next attempt gets the last heartbeat, which holds the usage that was already paid for."""
    llm.fail("drop")

    answer = await (await fleet.ask(proposing(agent_type="VLLM"), attempts=2)).result()

    broken, whole = llm.calls
    assert answer.usage.asks == 2
    assert answer.usage.estimated
    assert answer.usage.tokens_out > whole.tokens + broken.tokens // 2


# --- refusals -------------------------------------------------------------------------------------


def forged(**fields: Any) -> Callable[[AgentCommand], dict[str, Any]]:
    return lambda _: fields


@pytest.mark.parametrize("status", ["done", "working", "failed"])
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"call_id": "0" * 32}, "forged or too late: no such call"),
        ({"agent_id": "dev-8"}, "forged: the call is another agent's"),
    ],
)
async def test_a_forged_message_is_refused_and_the_call_still_waits(
    fleet: Outside, status: str, fields: dict[str, Any], reason: str
) -> None:
    handle = await fleet.ask()
    command = await fleet.take()

    await fleet.respond(command, status, content=document(command), **fields)

    letter = await fleet.refused()
    assert letter.reason == reason
    assert letter.subject == f"agent.response.{command.task_id}"
    assert json.loads(letter.body)["status"] == status
    assert (await fleet.pending(handle)).attempt == 1
    await fleet.answer(command)
    assert (await handle.result()).proposal.content


async def test_an_answer_on_another_tasks_subject_is_refused(fleet: Outside) -> None:
    mine, other = await fleet.ask(), await fleet.ask()
    first, second = await fleet.take(), await fleet.take()
    body = {"call_id": first.call_id, "agent_id": "dev-7", "status": "done"}
    content = document(first)

    await fleet.publish(
        second.task_id,
        json.dumps(body | {"task_id": first.task_id, "content": content}).encode(),
    )

    assert (await fleet.refused()).reason == "forged: the subject is another task's"
    for command in (first, second):  # the activities publish in any order
        await fleet.answer(command)
    for handle in (mine, other):
        assert (await handle.result()).usage.asks == 1


@pytest.mark.parametrize(
    "written",
    [
        {"tokens_in": None, "model": None, "timestamp": None, "error": None},
        {"tokens_in": "11", "tokens_out": 7.4, "duration_ms": 41250.7},
        {"tokens_in": "many", "tokens_out": True, "duration_ms": "soon"},
        {"status": " DONE "},
        {"timestamp": 1760636821.25, "role": "DEV", "proposal": {}},
        {"as_object": True},
    ],
    ids=["null", "figures", "no figures", "capitals", "number", "document"],
)
async def test_an_answer_counts_however_its_fields_are_written(
    fleet: Outside, written: dict[str, Any]
) -> None:
    handle = await fleet.ask()
    command = await fleet.take()

    fields = {"status": "done", "content": document(command)} | written
    if fields.pop("as_object", False):
        fields["content"] = json.loads(document(command))
    await fleet.respond(command, **fields)

    assert (await handle.result()).proposal.content
    assert await fleet.call_count() == 1


async def test_an_answer_may_begin_with_a_byte_order_mark(fleet: Outside) -> None:
    handle = await fleet.ask()
    command = await fleet.take()
    body = {"task_id": command.task_id, "agent_id": command.agent_id, "call_id": command.call_id}
    answer = body | {"status": "done", "content": document(command)}

    await fleet.publish(command.task_id, b"\xef\xbb\xbf" + json.dumps(answer).encode())

    assert (await handle.result()).proposal.content


@pytest.mark.parametrize(
    ("body", "reason", "error"),
    [
        (b"{", "malformed: not JSON", "Expecting"),
        (b'{"task_id": "\\ud83d"}', "malformed: not JSON", "surrogates not allowed"),
        (b"\xff\xfe", "malformed: not JSON", ""),
        (b"[]", "malformed: not an agent's response", "(the whole)"),
        (b'{"task_id": "t"}', "malformed: not an agent's response", "agent_id: required"),
        (
            b'{"task_id": "t", "agent_id": "a", "call_id": "c", "status": "perhaps"}',
            "malformed: not an agent's response",
            "status: ",
        ),
        *(
            (
                b'{"task_id": "t", "agent_id": "a", "call_id": "c", "status": "done", '
                b'"content": "{}", "%b": %b}' % (field, number),
                "malformed: not an agent's response",
                f"{field.decode()}: ",
            )
            for field in (b"tokens_in", b"tokens_out", b"duration_ms")
            for number in (b"-1", b'"-5"', b"-0.5", b"-1e300")
        ),
        (b" " * (LARGEST_RESPONSE + 1), "malformed: too large", "524288 at most"),
    ],
    ids=lambda value: f"{value[:70]!r}" if isinstance(value, bytes) else "",
)
async def test_a_malformed_message_is_refused_with_what_was_wrong(
    fleet: Outside, body: bytes, reason: str, error: str
) -> None:
    await fleet.publish("t", body)

    letter = await fleet.refused()

    assert letter.reason == reason
    assert error in letter.error
    assert letter.body == body


async def test_the_second_of_two_answers_is_refused(fleet: Outside) -> None:
    handle = await fleet.ask()
    command = await fleet.take()

    await fleet.answer(command)
    await fleet.respond(command, "done", content="something else")

    assert (await handle.result()).proposal.model_dump(mode="json") == json.loads(document(command))
    letter = await fleet.refused()
    assert letter.reason == "double: the call has been answered"
    assert json.loads(letter.body)["content"] == "something else"


async def test_replicas_settle_a_call_once(
    fleet: Outside, outside: Outside, environment: Environment
) -> None:
    async with agents_process(environment), agents_process(environment):
        handles = [await fleet.ask() for _ in range(5)]
        commands = [await fleet.take() for _ in handles]

        await asyncio.gather(*(fleet.answer(command) for command in commands * 4))

        for handle in handles:
            assert (await handle.result()).proposal.content
        await fleet.settled()
    letters = await fleet.letters()
    assert [letter.reason for letter in letters] == ["double: the call has been answered"] * 15


async def test_an_agents_final_message_may_arrive_before_earlier_ones(fleet: Outside) -> None:
    handle = await fleet.ask()
    command = await fleet.take()

    await fleet.answer(command)
    await fleet.respond(command, "working")

    assert (await handle.result()).proposal.content
    await fleet.settled()
    assert await fleet.letters() == []


# --- silence --------------------------------------------------------------------------------------


async def test_a_silent_agents_command_goes_to_another_and_its_late_answer_is_refused(
    fleet: Outside,
) -> None:
    handle = await fleet.ask(silence_s=15, attempts=2)  # it is looked at within these seconds
    silent = await fleet.take()

    other = await fleet.take()
    await fleet.respond(silent, "done", content=document(silent))
    letter = await fleet.refused()
    pending = await fleet.pending(handle)
    await fleet.answer(other)

    assert other.call_id != silent.call_id
    assert letter.reason == "late: the call was given up"
    assert pending.attempt == 2
    assert (await handle.result()).proposal.content
    await fleet.respond(silent, "done", content=document(silent))
    await fleet.settled()
    assert [letter.reason for letter in await fleet.letters()] == [
        "late: the call was given up"
    ] * 2


async def test_an_agent_that_reports_progress_is_waited_for(fleet: Outside) -> None:
    handle = await fleet.ask(silence_s=6, attempts=2)
    command = await fleet.take()
    began = time.monotonic()

    while time.monotonic() - began < 9:
        await fleet.respond(command, "working", tokens_out=42)
        await asyncio.sleep(0.25)
    pending = await fleet.pending(handle)
    await fleet.answer(command)

    beat = json.loads(pending.heartbeat_details.payloads[0].data)
    assert (beat["tokens"], beat["state"]) == (42, "working")
    assert CallUsage.model_validate(beat).tokens_out == 42
    assert (await handle.result()).proposal.content
    assert await fleet.call_count() == 1


async def test_the_workflow_does_not_wait_for_a_cancelled_call_and_its_answer_is_refused(
    fleet: Outside,
) -> None:
    handle = await fleet.ask()
    command = await fleet.take()

    await handle.cancel()
    with pytest.raises(WorkflowFailureError):
        await asyncio.wait_for(handle.result(), WITHIN_S)
    await fleet.respond(command, "working")
    await fleet.settled()
    assert await fleet.letters() == []
    await fleet.answer(command)

    assert (await fleet.refused()).reason == "late: the call was given up"


# --- outages and crashes --------------------------------------------------------------------------


async def test_a_command_is_sent_after_a_reported_nats_outage(
    fleet: Outside, nats_server: RunningServer
) -> None:
    await fleet.settled()
    await nats_server.kill()
    handle = await fleet.ask(attempts=0)

    async def reported() -> bool:
        pending = await fleet.pending(handle)
        return bool(pending and pending.last_failure.message)

    await until(reported)
    last = (await fleet.pending(handle)).last_failure
    await nats_server.start()
    await until(lambda: fleet.nats.is_connected)
    await fleet.answer(await fleet.take())

    assert "The command to agent dev-7 on agent.cmd.DEV is not on JetStream" in last.message
    assert last.application_failure_info.type in ("NatsAway", "NoAck")
    assert not last.application_failure_info.non_retryable
    assert (await handle.result()).proposal.content


async def test_the_agents_start_without_nats_and_find_it_later(
    outside: Outside, environment: Environment, nats_server: RunningServer
) -> None:
    await nats_server.kill()
    async with agents_process(environment):
        handle = await outside.ask(attempts=0)

        await nats_server.start()
        await until(lambda: outside.nats.is_connected)
        await outside.answer(await outside.take())

        assert (await handle.result()).proposal.content


async def test_an_answer_outlives_the_process_that_was_completing_it(
    outside: Outside, environment: Environment, client: Redis
) -> None:
    """The process is killed after it stored the answer; the next one reports it to Temporal."""
    dying = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.agents_that_hang"),
        env=environment,
        cwd=ROOT,
        stdout=PIPE,
    )
    try:
        handle = await outside.ask()
        command = await outside.take()
        await outside.answer(command)
        assert dying.stdout
        async with asyncio.timeout(WITHIN_S):
            while b"completing" not in await dying.stdout.readline():
                assert not dying.stdout.at_eof()
    finally:
        dying.kill()
        await dying.wait()

    async with agents_process(environment):
        answer = await asyncio.wait_for(handle.result(), WITHIN_S)
        await outside.settled()

    assert answer.proposal.model_dump(mode="json") == json.loads(document(command))
    assert await outside.call_count() == 1
    assert await outside.letters() == []


# --- the example agent ----------------------------------------------------------------------------


class Example:
    """The example agent as a process, and the `lines` that it has printed."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout
        while line := await self.process.stdout.readline():
            self.lines.append(line.decode())

    async def printed(self, words: str) -> None:
        async def there() -> bool:
            assert self.process.returncode is None, self.lines
            return any(words in line for line in self.lines)

        await until(there)


@asynccontextmanager
async def example(nats_server: RunningServer, llm: LlmServer, role: str) -> AsyncIterator[Example]:
    """Run the example with the credentials of an agent."""
    server = nats_server.process.server
    assert isinstance(server, NatsServer)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.examples.external_agent.agent", "--role", role),
        env=os.environ | server.env("agent") | {"LLM_URL": llm.url, "LLM_MODEL": llm.models[-1]},
        cwd=ROOT,
        stdout=PIPE,
    )
    agent = Example(process)
    try:
        await agent.printed("takes commands from")
        yield agent
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def asks(llm: LlmServer) -> None:
    """Wait until an agent's LLM has received a call."""

    async def at_work() -> bool:
        return bool(llm.calls)

    await until(at_work)


async def test_two_agents_of_a_role_share_the_work(
    fleet: Outside, nats_server: RunningServer, llm: LlmServer
) -> None:
    llm.fail("slow", times=2, ms=5)
    async with example(nats_server, llm, "DEV") as one, example(nats_server, llm, "DEV") as two:
        handles = [await fleet.ask() for _ in range(6)]

        answers = [await handle.result() for handle in handles]

        for agent in (one, two):  # each takes one at a time, so both worked at once
            await agent.printed("is done with")
    assert {answer.usage.model for answer in answers} == {llm.model}
    assert await fleet.call_count() == len(llm.calls) == 6
    await fleet.settled()
    assert await fleet.letters() == []


async def test_a_command_of_a_killed_agent_goes_to_another_agent(
    fleet: Outside, nats_server: RunningServer, llm: LlmServer
) -> None:
    llm.fail("hang")
    handle = await fleet.ask()
    async with example(nats_server, llm, "DEV") as killed:
        await asks(llm)
        killed.process.kill()

    async with example(nats_server, llm, "DEV"):
        answer = await asyncio.wait_for(handle.result(), WITHIN_S)

    assert answer.usage.tokens_out > 0
    assert await fleet.call_count() == 1  # JetStream redelivered it; the fleet did not ask again
    assert (await fleet.letters()) == []


async def test_an_agent_that_ends_hands_its_command_back(
    fleet: Outside, nats_server: RunningServer, llm: LlmServer
) -> None:
    llm.fail("hang")
    handle = await fleet.ask()
    returned = await fleet.nats.subscribe("$JS.EVENT.ADVISORY.CONSUMER.MSG_NAKED.AGENT_COMMANDS.>")
    async with example(nats_server, llm, "DEV") as ended:
        await asks(llm)
        ended.process.terminate()
        assert await ended.process.wait() == 0
    await returned.next_msg(WITHIN_S)

    async with example(nats_server, llm, "DEV"):
        await handle.result()

    assert await fleet.call_count() == 1


async def test_an_agent_without_its_llm_reports_it(
    fleet: Outside, nats_server: RunningServer, llm: LlmServer
) -> None:
    llm.fail("status", status=503, times=1)
    handle = await fleet.ask(attempts=2)

    async with example(nats_server, llm, "DEV"):
        answer = await handle.result()

    assert answer.usage.asks == 1  # only those of the second attempt
    assert await fleet.call_count() == 2
    assert [call.end for call in llm.calls] == ["refused", "answered"]


# --- a council of external and LLM agents ---------------------------------------------------------


DECIDED = """
MATCH (d:Decision)-[:FROM]->(p:Proposal {deliberation_id: $id})-[:BY]->(a:Agent)
RETURN a.id AS agent, p.model AS model, count(d) AS decisions
"""
PROPOSED = """
MATCH (p:Proposal {deliberation_id: $id})-[:BY]->(a:Agent)
RETURN a.id AS agent, a.agent_type AS kind, p.model AS model
"""


async def test_a_council_of_llms_and_external_agents_decides(
    outside: Outside,
    environment: Environment,
    nats_server: RunningServer,
    llm: LlmServer,
    driver: AsyncDriver,
    tmp_path: Path,
) -> None:
    llm.models = (llm.model, "outside-model")
    role = f"MIXED{uuid.uuid4().hex[:6].upper()}"
    kinds = {"a": "RAY_VLLM", "b": "NATS", "c": "NATS"}
    config = a_config(tmp_path, role, kinds)
    task = DeliberationInput(task_id=f"T-{role}", role=role, description="Store events", agents=3)
    variables = environment | {"FLEET_CONFIG": str(config), "VLLM_MODEL": llm.model}

    async with running("all", variables), example(nats_server, llm, role):
        result = await outside.temporal.execute_workflow(
            "DeliberationWorkflow",
            task,
            id=deliberation_workflow_id(task.task_id),
            task_queue="story",
            result_type=DeliberationResult,
        )

    assert result.status == "completed"
    assert result.failed_agents == []
    served = {"RAY_VLLM": llm.model, "NATS": "outside-model"}
    models = {agent: served[kind] for agent, kind in kinds.items()}
    assert {(call.agent_id, call.model) for call in result.usage if call.act != "judge"} == {
        (f"{role}-{agent}", model) for agent, model in models.items()
    }
    async with driver.session() as session:
        about = {"id": result.deliberation_id}
        proposed = [dict(row) async for row in await session.run(PROPOSED, about)]
        (decided,) = [dict(row) async for row in await session.run(DECIDED, about)]
    assert {(row["agent"], row["kind"], row["model"]) for row in proposed} == {
        (f"{role}-{agent}", kind, models[agent]) for agent, kind in kinds.items()
    }
    assert decided["agent"] == result.winner_id
    assert decided["decisions"] == len(result.decisions) > 0


def a_config(folder: Path, role: str, kinds: dict[str, str]) -> Path:
    """Copy the shipped configuration and add a council for the role."""
    config = folder / "config"
    shutil.copytree(ROOT / "deploy" / "config", config)
    path = config / "councils.yaml"
    councils = yaml.safe_load(path.read_text())
    councils["councils"][role] = [
        {"agent_id": f"{role}-{agent}", "agent_type": kind, "persona": f"You are {agent}."}
        for agent, kind in kinds.items()
    ]
    path.write_text(yaml.safe_dump(councils))
    return config
