"""orchestrator.v1 over a real channel, against the real stack: Temporal, Neo4j, Valkey, an LLM."""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from grpc import StatusCode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from neo4j import AsyncDriver
from redis.asyncio import Redis
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import DeleteWorkflowExecutionRequest
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowFailureError
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError

from activities.graph.activities import Graph
from activities.quota import TokenQuota
from bridge.grpc.limits import Limits
from bridge.grpc.orchestrator.servicer import OrchestratorServicer
from bridge.grpc.server import Served
from bridge.grpc.wire import orchestrator_pb2 as pb
from bridge.grpc.wire import orchestrator_pb2_grpc
from tests.support.councils import councils_kept
from tests.support.fleet import (
    Environment,
    connect,
    new_environment,
    whole_fleet,
)
from tests.support.grpc_service import bearer, problem, serving
from tests.support.llm_server import LlmServer
from tests.support.polling import WITHIN_S, until, until_early_in_the_hour
from tests.support.servers import Servers
from tests.support.site import SAMPLE_STORY
from tests.support.stories import batch, new_story, one_of_each, rows, spec
from tests.support.stories import plan as a_plan
from workers.clients.engine import DefaultModel
from workers.environment import ROOT
from workers.external_storage import data_converter
from workers.settings import Settings
from workflows.models.deliberation import DeliberationInput, DeliberationResult
from workflows.models.ids import called_deliberation_workflow_id, task_of

SERVICE = "orchestrator.v1.OrchestratorService"
TIMEOUT = timedelta(seconds=150)
"""The value of the setting DELIBERATION_TIMEOUT."""

TASK = "Write a function that adds two numbers"


@dataclass
class Fleet:
    """A whole fleet, and the orchestrator service in this process."""

    temporal: Client
    graph: Graph
    driver: AsyncDriver
    llm: LlmServer
    environment: Environment
    default_model: DefaultModel

    def served(self) -> Served:
        servicer = OrchestratorServicer(
            self.temporal, self.graph, self.driver, "RAY_VLLM", TIMEOUT, self.default_model
        )
        add = orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server
        return Served(SERVICE, servicer, add)

    @asynccontextmanager
    async def stub(self) -> AsyncIterator[Any]:
        async with serving(self.served()) as channel:
            yield orchestrator_pb2_grpc.OrchestratorServiceStub(channel)

    async def status(self, task_id: str) -> WorkflowExecutionStatus | None:
        handle = self.temporal.get_workflow_handle(called_deliberation_workflow_id(task_id))
        return (await handle.describe()).status

    async def deliberations(self) -> list[str]:
        query = "WorkflowType = 'DeliberationWorkflow'"
        return [each.id async for each in self.temporal.list_workflows(query)]


@asynccontextmanager
async def a_replica(environment: Environment) -> AsyncIterator[tuple[Process, Any]]:
    """Run the service in its own process; yield the process and a stub of the service."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.orchestrator_replica"),
        env=environment,
        cwd=ROOT,
        stdout=PIPE,
    )
    try:
        assert process.stdout
        port = int(await asyncio.wait_for(process.stdout.readline(), WITHIN_S))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield process, orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture(scope="module")
async def whole(
    servers: Servers, graph: Graph, driver: AsyncDriver, client: Redis
) -> AsyncIterator[Fleet]:
    async with LlmServer() as llm:
        environment = await new_environment(servers, llm, LLM_CONCURRENCY="16")
        async with whole_fleet(environment):
            temporal = await connect(
                servers.temporal.address,
                environment["TEMPORAL_NAMESPACE"],
                data_converter(client),
            )
            url = Settings.model_validate({"vllm_url": llm.url})
            async with councils_kept(driver):
                yield Fleet(temporal, graph, driver, llm, environment, DefaultModel(url))


@pytest.fixture
def fleet(whole: Fleet) -> Iterator[Fleet]:
    whole.llm.calls.clear()
    yield whole
    whole.llm.delay_ms = whole.llm.token_ms = 0
    whole.llm.faults.clear()
    whole.llm.answering.set()


@pytest.fixture
async def stub(fleet: Fleet) -> AsyncIterator[Any]:
    async with fleet.stub() as stub:
        yield stub


@contextmanager
def fails(code: StatusCode, *words: str) -> Iterator[pytest.ExceptionInfo[grpc.aio.AioRpcError]]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield caught
    assert caught.value.code() is code, caught.value.details()
    for word in words:
        assert word in (caught.value.details() or "")


def violated(caught: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> list[str]:
    _, details = problem(caught.value)
    (bad,) = [each for each in details if isinstance(each, BadRequest)]
    return sorted(each.field for each in bad.field_violations)


def a_role() -> str:
    return f"R{uuid.uuid4().hex[:8].upper()}"


def a_task() -> str:
    return f"T-{uuid.uuid4().hex[:10]}"


ANA = bearer("ana", "DEV")
PO = bearer("paula", "PO")
OPERATOR = bearer("otto", "OPERATOR")


# --- deliberations --------------------------------------------------------------------------------


async def test_deliberate_answers_with_ranked_results_their_checks_and_where_they_come_from(
    fleet: Fleet, stub: Any
) -> None:
    call = stub.Deliberate(
        pb.DeliberateRequest(task_description=TASK, role="DEV", num_agents=2),
        metadata=ANA,
        timeout=WITHIN_S,
    )
    answer = await call

    assert [each.rank for each in answer.results] == [1, 2]
    winner = answer.results[0]
    assert answer.winner_id == winner.proposal.author_id
    assert winner.score >= answer.results[1].score
    for each in answer.results:
        assert each.proposal.author_role == "DEV"
        assert each.proposal.content
        assert len(each.proposal.revisions) == 1
        assert each.proposal.created_at_ms > 1_700_000_000_000
        assert {check.check_type for check in each.checks.additional_checks} == {
            "policy",
            "lint",
            "dry_run",
            "substance",
        }
        assert each.checks.policy.message == "passed"
    assert answer.duration_ms > 0
    details = answer.metadata
    assert details.orchestrator_version
    assert details.tags["role"] == "DEV"
    assert details.execution_id == called_deliberation_workflow_id(details.tags["task_id"])
    initial = dict(await call.initial_metadata())
    assert initial["x-task-id"] == details.tags["task_id"]
    described = await fleet.temporal.get_workflow_handle(details.execution_id).describe()
    assert described.status is WorkflowExecutionStatus.COMPLETED


@pytest.mark.parametrize(
    ("wrong", "fields"),
    [
        ({"task_description": " "}, ["task_description"]),
        ({"role": ""}, ["role"]),
        ({"rounds": -1}, ["rounds"]),
        ({"rounds": 11}, ["rounds"]),
        ({"num_agents": -1}, ["num_agents"]),
        ({"num_agents": 51}, ["num_agents"]),
        (
            {"constraints": {"timeout_seconds": -1, "max_iterations": -1}},
            ["constraints.max_iterations", "constraints.timeout_seconds"],
        ),
    ],
)
async def test_a_request_that_breaks_a_rule_names_its_fields_and_begins_nothing(
    fleet: Fleet, stub: Any, wrong: dict[str, Any], fields: list[str]
) -> None:
    before = await fleet.deliberations()
    request = {"task_description": TASK, "role": "DEV"} | wrong

    with fails(StatusCode.INVALID_ARGUMENT) as caught:
        await stub.Deliberate(pb.DeliberateRequest(**request), metadata=ANA)

    assert violated(caught) == fields
    assert await fleet.deliberations() == before


async def test_a_council_that_does_not_exist_is_not_found_with_the_roles_that_do(stub: Any) -> None:
    request = pb.DeliberateRequest(task_description=TASK, role="POET")

    with fails(StatusCode.NOT_FOUND, "'POET'", "ARCHITECT", "DATA", "DEV", "DEVOPS", "QA"):
        await stub.Deliberate(request, metadata=ANA)
    with fails(StatusCode.NOT_FOUND, "ARCHITECT"):
        async for _ in stub.StreamDeliberation(request, metadata=ANA):
            pass


async def test_a_request_for_more_agents_than_exist_gets_all_and_a_notice(
    fleet: Fleet, stub: Any
) -> None:
    request = pb.DeliberateRequest(task_description=TASK, role="DEV", num_agents=5)

    call = stub.Deliberate(request, metadata=ANA, timeout=WITHIN_S)
    answer = await call
    stream = stub.StreamDeliberation(request, metadata=ANA, timeout=WITHIN_S)
    updates = [update async for update in stream]

    assert len(answer.results) == 3
    assert answer.metadata.tags["agents"] == "3 of 5"
    assert dict(await call.trailing_metadata())["x-agents"] == "3 of 5"
    assert updates[-1].status == "complete"
    assert dict(await stream.trailing_metadata())["x-agents"] == "3 of 5"
    started = await begun_with(fleet, answer.metadata.execution_id)
    assert started.timeout == TIMEOUT.total_seconds()


async def begun_with(fleet: Fleet, workflow_id: str) -> DeliberationInput:
    """Return the input that a deliberation was started with."""
    async for event in fleet.temporal.get_workflow_handle(workflow_id).fetch_history_events():
        payloads = event.workflow_execution_started_event_attributes.input.payloads
        (begun,) = await fleet.temporal.data_converter.decode(payloads, [DeliberationInput])
        assert isinstance(begun, DeliberationInput)
        return begun
    raise AssertionError(workflow_id)


async def test_the_options_of_orchestrate_have_their_effect(fleet: Fleet, stub: Any) -> None:
    story = new_story()
    await fleet.graph.record(batch(story, *one_of_each(story)))
    ask: dict[str, Any] = {"task_description": TASK, "role": "DEV", "story_id": story}

    unreviewed = await stub.Orchestrate(
        pb.OrchestrateRequest(
            **ask,
            options=pb.OrchestratorOptions(enable_architect_selection=True),
            context_options=pb.ContextOptions(include_timeline=True, scopes=["SUBTASKS_ALL"]),
        ),
        metadata=ANA,
        timeout=WITHIN_S,
    )

    begun = await begun_with(fleet, unreviewed.execution_id)
    assert (begun.rounds, begun.judged) == (0, True)
    assert {call.act for call in fleet.llm.calls} <= {"propose", "judge"}
    prompts = [str(call.messages) for call in fleet.llm.calls if call.act == "propose"]
    assert len(prompts) == 3
    assert all("What happened, newest first" in prompt for prompt in prompts)
    assert all("## Tasks" in prompt for prompt in prompts)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (
            {"options": {"enable_architect_selection": True, "deliberation_rounds": 2}},
            "options.enable_peer_review",
        ),
        ({"context_options": {"include_timeline": True}}, "context_options"),
        ({"context_options": {"scopes": ["GOSSIP"]}}, "context_options.scopes.0"),
        ({"context_options": {"max_events": -1}}, "context_options.max_events"),
        ({"options": {"custom_params": {"temperature": "0"}}}, "options.custom_params"),
    ],
)
async def test_an_option_that_cannot_be_met_is_refused_by_its_name(
    stub: Any, wrong: dict[str, Any], field: str
) -> None:
    with fails(StatusCode.INVALID_ARGUMENT) as caught:
        await stub.Orchestrate(
            pb.OrchestrateRequest(task_description=TASK, role="DEV", **wrong), metadata=ANA
        )

    assert violated(caught) == [field]


async def test_the_councils_name_the_model_that_is_served(fleet: Fleet, stub: Any) -> None:
    listed = await stub.ListCouncils(pb.ListCouncilsRequest(role_filter="DEV"), metadata=ANA)
    named = Settings.model_validate({"vllm_url": "http://127.0.0.1:1", "vllm_model": "mine"})
    away = Settings.model_validate({"vllm_url": "http://127.0.0.1:1"})

    assert [each.model for each in listed.councils] == ["test-model"]
    assert await DefaultModel(named)() == "mine"
    assert await DefaultModel(away)() == ""


async def test_orchestrate_joins_the_deliberation_of_its_task(fleet: Fleet, stub: Any) -> None:
    task_id = a_task()
    request = pb.OrchestrateRequest(
        task_id=task_id,
        task_description=TASK,
        role="QA",
        story_id=new_story(),
        options=pb.OrchestratorOptions(deliberation_rounds=2),
    )

    first, second = await asyncio.gather(
        stub.Orchestrate(request, metadata=ANA, timeout=WITHIN_S),
        stub.Orchestrate(request, metadata=bearer("bo", "DEV"), timeout=WITHIN_S),
    )
    calls = len(fleet.llm.calls)
    third = await stub.Orchestrate(request, metadata=ANA, timeout=WITHIN_S)

    assert first.execution_id == called_deliberation_workflow_id(task_id)
    assert list(first.candidates) == list(second.candidates) == list(third.candidates)
    assert first.winner == first.candidates[0]
    assert len(first.winner.proposal.revisions) == 2
    assert len(fleet.llm.calls) == calls
    if "judged" in first.metadata.tags:
        assert len(first.metadata.tags["judged"]) > 10


async def test_a_failed_deliberation_is_started_again(fleet: Fleet, stub: Any) -> None:
    task_id = a_task()
    request = pb.OrchestrateRequest(task_id=task_id, task_description=TASK, role="QA")
    fleet.llm.fail("status", times=3, status=400, text="no such thing")

    with fails(StatusCode.ABORTED, "a quorum is more than half"):
        await stub.Orchestrate(request, metadata=ANA, timeout=WITHIN_S)
    failed = await stub.GetDeliberationResult(
        pb.GetDeliberationResultRequest(task_id=task_id), metadata=ANA
    )
    again = await stub.Orchestrate(request, metadata=ANA, timeout=WITHIN_S)

    assert failed.status == pb.DELIBERATION_STATUS_FAILED
    assert "a quorum is more than half" in failed.error_message
    assert "propose" in failed.metadata.tags["failed_agents"]
    assert again.winner.rank == 1


@pytest.mark.parametrize("story", ["", "of a story"])
async def test_why_a_deliberation_failed_is_known_after_temporal_has_forgotten_it(
    fleet: Fleet, stub: Any, story: str
) -> None:
    late, lost = a_task(), a_task()
    story_id = new_story() if story else ""
    fleet.llm.fail("status", times=3, status=400, text="no such thing")
    with fails(StatusCode.ABORTED):
        await stub.Orchestrate(
            pb.OrchestrateRequest(
                task_id=lost, task_description=TASK, role="QA", story_id=story_id
            ),
            metadata=ANA,
            timeout=WITHIN_S,
        )
    fleet.llm.delay_ms = 3_000
    with fails(StatusCode.DEADLINE_EXCEEDED):
        await stub.Orchestrate(
            pb.OrchestrateRequest(
                task_id=late,
                task_description=TASK,
                role="QA",
                constraints=pb.TaskConstraints(timeout_seconds=1),
            ),
            metadata=ANA,
            timeout=WITHIN_S,
        )
    await forget(fleet, lost)
    await forget(fleet, late)

    found = await stub.GetDeliberationResult(
        pb.GetDeliberationResultRequest(task_id=lost), metadata=ANA
    )
    timed_out = await stub.GetDeliberationResult(
        pb.GetDeliberationResultRequest(task_id=late), metadata=ANA
    )

    assert found.status == pb.DELIBERATION_STATUS_FAILED
    assert "a quorum is more than half" in found.error_message
    assert "no such thing" in found.error_message
    assert found.metadata.tags["failed_agents"].count("(propose)") == 3
    assert (found.metadata.tags["role"], found.metadata.tags["task_id"]) == ("QA", lost)
    assert found.metadata.tags.get("story_id", "") == story_id
    assert timed_out.status == pb.DELIBERATION_STATUS_TIMEOUT
    assert timed_out.duration_ms >= 1000


async def test_a_deliberation_that_timed_out_counts_the_calls_that_it_stopped(
    fleet: Fleet, stub: Any
) -> None:
    fleet.llm.token_ms = 1_000
    task_id = a_task()

    with fails(StatusCode.DEADLINE_EXCEEDED):
        await stub.Orchestrate(
            pb.OrchestrateRequest(
                task_id=task_id,
                task_description=TASK,
                role="DEV",
                constraints=pb.TaskConstraints(timeout_seconds=15),
            ),
            metadata=ANA,
            timeout=WITHIN_S,
        )

    handle = fleet.temporal.get_workflow_handle(called_deliberation_workflow_id(task_id))
    with pytest.raises(WorkflowFailureError) as late:
        await handle.result()
    assert isinstance(late.value.cause, ApplicationError)
    stopped = DeliberationResult.model_validate(late.value.cause.details[0]).usage
    assert len(stopped) == 3
    assert all(call.estimated and call.tokens_in and call.tokens_out for call in stopped)


async def forget(fleet: Fleet, task_id: str) -> None:
    """Delete a deliberation from Temporal, as happens after its retention period."""
    await fleet.temporal.workflow_service.delete_workflow_execution(
        DeleteWorkflowExecutionRequest(
            namespace=fleet.temporal.namespace,
            workflow_execution=WorkflowExecution(
                workflow_id=called_deliberation_workflow_id(task_id)
            ),
        )
    )

    async def forgotten() -> bool:
        try:
            await fleet.status(task_id)
        except RPCError:
            return True
        return False

    await until(forgotten)


async def test_a_result_is_there_while_temporal_knows_it_and_after_that_in_the_graph(
    fleet: Fleet, stub: Any
) -> None:
    task_id = a_task()
    ask = pb.GetDeliberationResultRequest(task_id=task_id)
    with fails(StatusCode.NOT_FOUND, task_id):
        await stub.GetDeliberationResult(ask, metadata=ANA)
    fleet.llm.answering.clear()
    fleet.llm.fail("status", status=400, text="no such thing")
    asking = asyncio.ensure_future(
        stub.Orchestrate(
            pb.OrchestrateRequest(
                task_id=task_id, task_description=TASK, role="DEV", story_id=new_story()
            ),
            metadata=ANA,
            timeout=WITHIN_S,
        )
    )

    async def begun() -> Any:
        try:
            return await stub.GetDeliberationResult(ask, metadata=ANA)
        except grpc.aio.AioRpcError as error:
            if error.code() is not StatusCode.NOT_FOUND:
                raise
            return None

    meanwhile = await until(begun)
    fleet.llm.answering.set()
    answered = await asking
    first = await stub.GetDeliberationResult(ask, metadata=ANA)
    await forget(fleet, task_id)
    kept = await stub.GetDeliberationResult(ask, metadata=ANA)

    assert meanwhile.status == pb.DELIBERATION_STATUS_IN_PROGRESS
    assert first.status == kept.status == pb.DELIBERATION_STATUS_COMPLETED
    assert list(first.results) == list(answered.candidates)
    assert first.duration_ms == answered.duration_ms
    assert kept.winner_id == first.winner_id
    assert kept.metadata.tags == first.metadata.tags
    assert "no such thing" in kept.metadata.tags["failed_agents"]
    for then, now in zip(first.results, kept.results, strict=True):
        assert now.proposal.content == then.proposal.content
        assert list(now.proposal.revisions) == list(then.proposal.revisions)
        assert now.checks == then.checks
        assert (now.score, now.rank) == (then.score, then.rank)


async def test_a_stream_reports_every_wave_and_every_answer_and_ends_with_the_winner(
    stub: Any,
) -> None:
    request = pb.DeliberateRequest(task_description=TASK, role="DEV")

    updates = [
        each async for each in stub.StreamDeliberation(request, metadata=ANA, timeout=WITHIN_S)
    ]

    words = list(dict.fromkeys(each.status for each in updates))
    assert words == ["generating", "reviewing", "scoring", "complete"]
    percent = [each.progress_percent for each in updates]
    assert percent == sorted(percent)
    assert (percent[0], percent[-1]) == (0, 100)
    assert 99 not in percent[: len(percent) // 2]
    steps = [each.current_step for each in updates]
    for wave in ("propose", "criticise", "revise", "check"):
        answers = [each for each in updates if each.current_step.startswith(f"{wave}: ")]
        assert wave in steps
        assert {each.current_agent for each in answers} == {f"agent-dev-{n}" for n in (1, 2, 3)}
    assert updates[-1].partial_result.rank == 1
    assert updates[-1].current_agent == updates[-1].partial_result.proposal.author_id


async def test_a_stream_whose_deliberation_fails_ends_with_the_error(
    fleet: Fleet, stub: Any
) -> None:
    fleet.llm.fail("status", times=3, status=400, text="no such thing")
    steps = []

    with fails(StatusCode.ABORTED, "a quorum is more than half"):
        async for each in stub.StreamDeliberation(
            pb.DeliberateRequest(task_description=TASK, role="DEV"),
            metadata=ANA,
            timeout=WITHIN_S,
        ):
            steps.append(each.current_step)  # noqa: PERF401  # those before the error too

    assert [step for step in steps if "failed" in step]


async def test_a_client_that_loses_a_replica_in_mid_stream_goes_on_with_the_other(
    fleet: Fleet,
) -> None:
    fleet.llm.delay_ms = 400
    request = pb.DeliberateRequest(task_description=TASK, role="DEV")
    mine = (*ANA, ("x-request-id", uuid.uuid4().hex))
    before = len(await fleet.deliberations())

    async with a_replica(fleet.environment) as (process, one), fleet.stub() as other:
        lost = one.StreamDeliberation(request, metadata=mine)
        first = [await lost.read() for _ in range(3)]
        task_id = dict(await lost.initial_metadata())["x-task-id"]
        fleet.llm.answering.clear()  # so that the stream does not end before the kill
        process.kill()
        with fails(StatusCode.UNAVAILABLE):
            for _ in range(40):  # what arrived before the kill can still be read
                await lost.read()
        fleet.llm.answering.set()
        again = [each async for each in other.StreamDeliberation(request, metadata=mine)]
        answer = await other.Deliberate(request, metadata=mine)

    assert again[: len(first)] == first
    assert again[-1].status == "complete"
    assert answer.metadata.tags["task_id"] == task_id
    assert answer.results[0] == again[-1].partial_result
    acts = [call.act for call in fleet.llm.calls]
    assert acts.count("propose") == 3

    async def seen() -> bool:
        return len(await fleet.deliberations()) == before + 1

    await until(seen)


async def test_a_cancelled_call_cancels_work_that_no_other_call_waits_for(
    fleet: Fleet, stub: Any
) -> None:
    fleet.llm.answering.clear()
    task = f"{TASK} {uuid.uuid4().hex}"
    request = pb.DeliberateRequest(task_description=task, role="DEV")
    shared = pb.OrchestrateRequest(task_id=a_task(), task_description=task, role="QA")
    before = set(await fleet.deliberations())
    calls = [
        stub.Deliberate(request, metadata=ANA),
        stub.StreamDeliberation(request, metadata=ANA),
        stub.Orchestrate(shared, metadata=ANA),
    ]

    def ends() -> list[str]:
        return sorted(call.end for call in fleet.llm.calls if task in call.prompt)

    async def is_called() -> bool:
        return len(ends()) == 9

    await until(is_called)

    async def begun() -> set[str]:
        found = set(await fleet.deliberations()) - before
        return found if len(found) == 3 else set()

    own = await until(begun) - {called_deliberation_workflow_id(shared.task_id)}
    for call in calls:
        call.cancel()

    async def gone() -> bool:
        status = [await fleet.status(task_of(each)) for each in own]
        return status == [WorkflowExecutionStatus.CANCELED] * 2

    await until(gone)
    assert await fleet.status(shared.task_id) is WorkflowExecutionStatus.RUNNING
    assert ends() == ["aborted"] * 6 + ["open"] * 3
    await fleet.temporal.get_workflow_handle(
        called_deliberation_workflow_id(shared.task_id)
    ).cancel()


async def test_a_deadline_reaches_the_workflow(fleet: Fleet, stub: Any) -> None:
    fleet.llm.delay_ms = 120_000
    request = pb.OrchestrateRequest(task_id=a_task(), task_description=TASK, role="DEV")

    with fails(StatusCode.DEADLINE_EXCEEDED):
        await stub.Orchestrate(request, metadata=ANA, timeout=10)

    async def ended() -> bool:
        return await fleet.status(request.task_id) is not WorkflowExecutionStatus.RUNNING

    await until(ended)
    result = await stub.GetDeliberationResult(
        pb.GetDeliberationResultRequest(task_id=request.task_id), metadata=ANA
    )
    assert result.status == pb.DELIBERATION_STATUS_TIMEOUT
    assert "not done after" in result.error_message


# --- councils -------------------------------------------------------------------------------------


async def test_a_council_is_made_used_changed_and_kept(fleet: Fleet, stub: Any) -> None:
    role = a_role()
    made = await stub.CreateCouncil(
        pb.CreateCouncilRequest(
            role=role,
            num_agents=2,
            config=pb.CouncilConfig(deliberation_rounds=2, model_profile="test-model"),
        ),
        metadata=OPERATOR,
    )
    assert made.agents_created == 2
    assert list(made.agent_ids) == [f"agent-{role.lower()}-{n:03d}" for n in (1, 2)]

    answer = await stub.Deliberate(
        pb.DeliberateRequest(task_description=TASK, role=role), metadata=ANA, timeout=WITHIN_S
    )
    assert {each.proposal.author_id for each in answer.results} == set(made.agent_ids)
    assert [len(each.proposal.revisions) for each in answer.results] == [2, 2]

    registered = await stub.RegisterAgent(
        pb.RegisterAgentRequest(
            agent_id=f"{role.lower()}-guest",
            role=role,
            capabilities=pb.AgentCapabilities(
                supported_tasks=["review"], languages=["python"], max_concurrent_tasks=4
            ),
            metadata={"persona": "You look for races"},
        ),
        metadata=PO,
    )
    assert registered.success
    assert registered.council_id == made.council_id
    left = await stub.UnregisterAgent(
        pb.UnregisterAgentRequest(agent_id=made.agent_ids[0], role=role), metadata=OPERATOR
    )
    assert left.success

    async with fleet.stub() as another:  # a replica that has not seen any of it
        listed = await another.ListCouncils(
            pb.ListCouncilsRequest(role_filter=role, include_agents=True), metadata=ANA
        )
    (council,) = listed.councils
    assert (council.role, council.num_agents, council.model) == (role, 2, "test-model")
    assert [each.agent_id for each in council.agents] == [
        made.agent_ids[1],
        f"{role.lower()}-guest",
    ]
    assert {each.status for each in council.agents} == {"ready"}
    assert list(council.agents[1].capabilities.supported_tasks) == ["review"]
    fleet.llm.calls.clear()
    answer = await stub.Deliberate(
        pb.DeliberateRequest(task_description=TASK, role=role, rounds=1),
        metadata=ANA,
        timeout=WITHIN_S,
    )
    assert {each.proposal.author_id for each in answer.results} == {
        each.agent_id for each in council.agents
    }
    assert any("You look for races" in call.prompt for call in fleet.llm.calls)

    back = await stub.RegisterAgent(
        pb.RegisterAgentRequest(agent_id=made.agent_ids[0], role=role), metadata=OPERATOR
    )
    assert back.success
    listed = await stub.ListCouncils(pb.ListCouncilsRequest(role_filter=role), metadata=ANA)
    assert listed.councils[0].num_agents == 3
    assert not listed.councils[0].agents


async def test_a_council_that_exists_already_is_refused_however_many_ask_at_once(
    stub: Any, driver: AsyncDriver
) -> None:
    role = a_role()
    request = pb.CreateCouncilRequest(role=role)

    outcomes = await asyncio.gather(
        *(stub.CreateCouncil(request, metadata=OPERATOR) for _ in range(6)), return_exceptions=True
    )

    refused = [each for each in outcomes if isinstance(each, grpc.aio.AioRpcError)]
    assert [each.code() for each in refused] == [StatusCode.ALREADY_EXISTS] * 5
    assert problem(refused[0])[0] == "AlreadyExists"
    found = await rows(
        driver, "MATCH (c:Council {role: $role})-[:HAS_AGENT]->(a) RETURN count(a)", role=role
    )
    assert found == [[3]]


@pytest.mark.parametrize("kind", ["MOCK", "mock", "Mock", " mock "])
async def test_a_mock_agent_is_refused(stub: Any, driver: AsyncDriver, kind: str) -> None:
    role = a_role()

    with fails(StatusCode.FAILED_PRECONDITION) as caught:
        await stub.CreateCouncil(
            pb.CreateCouncilRequest(role=role, config=pb.CouncilConfig(agent_type=kind)),
            metadata=OPERATOR,
        )
    with fails(StatusCode.FAILED_PRECONDITION):
        await stub.RegisterAgent(
            pb.RegisterAgentRequest(agent_id="agent-x", role="DEV", metadata={"agent_type": kind}),
            metadata=OPERATOR,
        )

    assert caught.value.details() == "Mock agents not allowed in production"
    assert not await rows(driver, "MATCH (c:Council {role: $role}) RETURN c", role=role)


async def test_only_roles_that_may_change_councils_do(stub: Any) -> None:
    qa = bearer("quinn", "QA")
    agent: dict[str, Any] = {"agent_id": "agent-x", "role": "DEV"}

    with fails(StatusCode.PERMISSION_DENIED, "OPERATOR or PO", "quinn has QA"):
        await stub.CreateCouncil(pb.CreateCouncilRequest(role=a_role()), metadata=qa)
    with fails(StatusCode.PERMISSION_DENIED):
        await stub.RegisterAgent(pb.RegisterAgentRequest(**agent), metadata=qa)
    with fails(StatusCode.PERMISSION_DENIED):
        await stub.UnregisterAgent(pb.UnregisterAgentRequest(**agent), metadata=ANA)


async def test_a_council_takes_no_parameter_that_nothing_reads(
    stub: Any, driver: AsyncDriver
) -> None:
    role = a_role()
    config = pb.CouncilConfig(custom_params={"vllm_url": "http://gpu:8000"})

    with fails(StatusCode.INVALID_ARGUMENT, "vllm_url", "model_profile") as caught:
        await stub.CreateCouncil(
            pb.CreateCouncilRequest(role=role, config=config), metadata=OPERATOR
        )

    assert violated(caught) == ["config.custom_params"]
    assert not await rows(driver, "MATCH (c:Council {role: $role}) RETURN c", role=role)


@pytest.mark.parametrize(
    ("config", "rounds"),
    [({"enable_peer_review": True}, 1), ({}, 0), ({"deliberation_rounds": 2}, 2)],
)
async def test_peer_review_of_a_council_is_a_round_at_least(
    stub: Any, driver: AsyncDriver, config: dict[str, Any], rounds: int
) -> None:
    role = a_role()

    await stub.CreateCouncil(
        pb.CreateCouncilRequest(role=role, config=pb.CouncilConfig(**config)),
        metadata=OPERATOR,
    )

    read = "MATCH (c:Council {role: $role}) RETURN c.rounds"
    assert await rows(driver, read, role=role) == [[rounds]]


async def test_a_callers_notes_reach_every_agent(fleet: Fleet, stub: Any) -> None:
    notes = {"ticket": "OPS-17", "deploy_token": "ghp_" + "a1B2" * 9}
    request = pb.DeliberateRequest(
        task_description=TASK, role="DEV", constraints=pb.TaskConstraints(metadata=notes)
    )

    await stub.Deliberate(request, metadata=ANA, timeout=WITHIN_S)

    prompts = [call.prompt for call in fleet.llm.calls if call.act in ("propose", "revise")]
    assert len(prompts) == 6
    assert all("- ticket: OPS-17" in prompt for prompt in prompts)
    assert not any("a1B2" in prompt for prompt in prompts)


async def test_a_council_must_follow_the_rules(stub: Any) -> None:
    role, other = a_role(), a_role()
    for each in (role, other):
        await stub.CreateCouncil(
            pb.CreateCouncilRequest(role=each, num_agents=1), metadata=OPERATOR
        )
    (agent, guest) = (f"agent-{role.lower()}-001", f"guest-{role.lower()}")

    with fails(StatusCode.INVALID_ARGUMENT) as caught:
        await stub.CreateCouncil(
            pb.CreateCouncilRequest(
                role="dev council", num_agents=51, config=pb.CouncilConfig(agent_type="GPT")
            ),
            metadata=OPERATOR,
        )
    assert violated(caught) == ["config.agent_type", "num_agents", "role"]
    with fails(StatusCode.NOT_FOUND, "no council for role 'NOBODY'", role):
        await stub.RegisterAgent(
            pb.RegisterAgentRequest(agent_id=guest, role="NOBODY"), metadata=OPERATOR
        )
    with fails(StatusCode.ALREADY_EXISTS, f"sits in the {role} council"):
        await stub.RegisterAgent(
            pb.RegisterAgentRequest(agent_id=agent, role=other), metadata=OPERATOR
        )
    with fails(StatusCode.FAILED_PRECONDITION, "the last agent"):
        await stub.UnregisterAgent(
            pb.UnregisterAgentRequest(agent_id=agent, role=role), metadata=OPERATOR
        )
    with fails(StatusCode.NOT_FOUND, guest):
        await stub.UnregisterAgent(
            pb.UnregisterAgentRequest(agent_id=guest, role=role), metadata=OPERATOR
        )
    for _ in range(2):
        register = pb.RegisterAgentRequest(agent_id=guest, role=role, endpoint="nats://there")
        assert (await stub.RegisterAgent(register, metadata=OPERATOR)).success
    leaving = await asyncio.gather(
        *(
            stub.UnregisterAgent(pb.UnregisterAgentRequest(agent_id=each), metadata=OPERATOR)
            for each in (agent, guest)
        ),
        return_exceptions=True,
    )

    assert sorted(isinstance(each, grpc.aio.AioRpcError) for each in leaving) == [False, True]
    listed = await stub.ListCouncils(pb.ListCouncilsRequest(role_filter=role), metadata=ANA)
    assert listed.councils[0].num_agents == 1


async def test_an_agent_that_is_registered_again_keeps_the_type_that_the_request_does_not_name(
    stub: Any, driver: AsyncDriver
) -> None:
    role = a_role()
    await stub.CreateCouncil(pb.CreateCouncilRequest(role=role, num_agents=1), metadata=OPERATOR)
    guest = f"guest-{role.lower()}"

    async def registered(**fields: Any) -> Any:
        request = pb.RegisterAgentRequest(agent_id=guest, role=role, **fields)
        await stub.RegisterAgent(request, metadata=OPERATOR)
        ((kind,),) = await rows(driver, "MATCH (a:Agent {id: $id}) RETURN a.agent_type", id=guest)
        return kind

    assert await registered(endpoint="nats://there") == "NATS"
    assert await registered(metadata={"persona": "You look for races"}) == "NATS"
    with fails(StatusCode.INVALID_ARGUMENT, "an agent with an endpoint is NATS") as caught:
        await registered(endpoint="nats://there", metadata={"agent_type": "VLLM"})
    assert violated(caught) == ["metadata"]
    assert await registered(metadata={"agent_type": "vllm"}) == "VLLM"


async def test_roles_are_read_as_everywhere_and_an_unknown_one_is_refused(stub: Any) -> None:
    listed = await stub.ListCouncils(pb.ListCouncilsRequest(role_filter="dev"), metadata=ANA)
    with fails(StatusCode.INVALID_ARGUMENT, "'COOK' is unknown; roles are", "QA") as caught:
        await stub.ListCouncils(pb.ListCouncilsRequest(role_filter="cook"), metadata=ANA)
    deriving = pb.DeriveSubtasksRequest(case_id=new_story(), roles=["cook"])
    deriving.strategy.dependency_order.append("tester")
    with fails(StatusCode.INVALID_ARGUMENT) as underived:
        await stub.DeriveSubtasks(deriving, metadata=ANA)

    assert [each.role for each in listed.councils] == ["DEV"]
    assert violated(caught) == ["role_filter"]
    assert violated(underived) == ["roles", "strategy.dependency_order"]


async def test_a_council_is_busy_while_it_deliberates(fleet: Fleet, stub: Any) -> None:
    fleet.llm.answering.clear()
    ask = pb.ListCouncilsRequest(role_filter="QA", include_agents=True)
    call = stub.Deliberate(
        pb.DeliberateRequest(task_description=TASK, role="QA", num_agents=2), metadata=ANA
    )
    listed = None

    async def busy() -> bool:
        nonlocal listed
        listed = (await stub.ListCouncils(ask, metadata=ANA)).councils[0]
        return bool(listed.status == "busy" and listed.agents[0].status == "busy")

    await until(busy)
    call.cancel()

    assert listed is not None
    assert [each.status for each in listed.agents][:2] == ["busy", "busy"]

    async def idle() -> bool:
        return bool((await stub.ListCouncils(ask, metadata=ANA)).councils[0].status == "idle")

    await until(idle)


# --- planning -------------------------------------------------------------------------------------


async def a_story_at_its_first_gate(fleet: Fleet) -> str:
    story = new_story()
    handle = await fleet.temporal.start_workflow(
        "StoryWorkflow",
        json.loads(SAMPLE_STORY.read_text()) | {"story_id": story, "approvals": "human"},
        id=f"story-{story}",
        task_queue="story",
    )

    async def waits() -> bool:
        return bool((await handle.query("state"))["pending_gate"] == "approve_scope")

    await until(waits)
    return story


async def test_a_caller_cannot_take_the_id_of_a_storys_next_council(
    fleet: Fleet, stub: Any, driver: AsyncDriver
) -> None:
    story = await a_story_at_its_first_gate(fleet)
    next_council = f"{story}-design-1"
    squatting = pb.OrchestrateRequest(task_id=next_council, task_description=TASK, role="QA")
    asked = pb.GetDeliberationResultRequest(task_id=next_council)

    mine = await stub.Orchestrate(squatting, metadata=ANA, timeout=WITHIN_S)
    found = await stub.GetDeliberationResult(asked, metadata=ANA)
    await stub.ProcessPlanningEvent(
        pb.PlanningEventRequest(event_type="approve_scope", case_id=story), metadata=PO
    )
    running = fleet.temporal.get_workflow_handle(f"story-{story}")

    async def designed() -> bool:
        return bool((await running.query("state"))["pending_gate"] == "approve_design")

    await until(designed)
    of_story = await stub.GetDeliberationResult(asked, metadata=ANA)
    await forget(fleet, next_council)
    stored = await rows(
        driver,
        "MATCH (p:Proposal {task_id: $task}) RETURN DISTINCT p.role, p.story_id ORDER BY p.role",
        task=next_council,
    )

    assert found.winner_id == mine.winner.proposal.author_id
    assert list(found.results) == list(mine.candidates)
    assert of_story.metadata.execution_id == f"deliberation-{next_council}"
    assert of_story.metadata.tags["story_id"] == story
    assert stored == [["ARCHITECT", story], ["QA", ""]]


@pytest.fixture
async def limited(fleet: Fleet, client: Redis) -> AsyncIterator[Any]:
    """Serve with small limits: 100 tokens an hour, 2 agents, 1 round, 1,024 bytes of text."""
    limits = Limits(TokenQuota(client, 100), agents=2, rounds=1, text_bytes=1_024)
    servicer = OrchestratorServicer(
        fleet.temporal, fleet.graph, fleet.driver, "RAY_VLLM", TIMEOUT, limits=limits
    )
    add = orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server
    async with serving(Served(SERVICE, servicer, add)) as channel:
        yield orchestrator_pb2_grpc.OrchestratorServiceStub(channel)


async def test_an_actor_who_has_used_the_tokens_of_the_hour_starts_nothing_more(
    fleet: Fleet, limited: Any
) -> None:
    await until_early_in_the_hour()
    eve = bearer(f"eve-{uuid.uuid4().hex}", "DEV")
    mine = (*eve, ("x-request-id", uuid.uuid4().hex))
    request = pb.DeliberateRequest(task_description=TASK, role="QA")
    story = new_story()
    await fleet.graph.record(batch(story, spec(story)))

    first = await limited.Deliberate(request, metadata=mine, timeout=WITHIN_S)
    calls = len(fleet.llm.calls)
    with fails(StatusCode.RESOURCE_EXHAUSTED, "of 100 tokens in this hour, 0 are left") as refused:
        await limited.Deliberate(request, metadata=eve)
    with fails(StatusCode.RESOURCE_EXHAUSTED, "0 are left"):
        await limited.StreamDeliberation(request, metadata=eve).read()
    with fails(StatusCode.RESOURCE_EXHAUSTED, "0 are left"):
        await limited.DeriveSubtasks(pb.DeriveSubtasksRequest(case_id=story), metadata=eve)
    again = await limited.Deliberate(request, metadata=mine, timeout=WITHIN_S)
    assert len(fleet.llm.calls) == calls
    another = await limited.Deliberate(
        request, metadata=bearer(f"bo-{uuid.uuid4().hex}", "DEV"), timeout=WITHIN_S
    )

    reason, details = problem(refused.value)
    (retry,) = [each for each in details if isinstance(each, RetryInfo)]
    assert reason == "QuotaUsed"
    assert 0 < retry.retry_delay.ToSeconds() <= 3_600
    assert list(again.results) == list(first.results)
    assert another.winner_id
    assert len(first.results) == 2, "the council has three agents, the limit is two"


@pytest.mark.parametrize(
    ("method", "request_of", "field"),
    [
        (
            "Deliberate",
            lambda: pb.DeliberateRequest(task_description=TASK, role="QA", num_agents=3),
            "num_agents",
        ),
        (
            "Deliberate",
            lambda: pb.DeliberateRequest(task_description=TASK, role="QA", rounds=2),
            "rounds",
        ),
        (
            "Orchestrate",
            lambda: pb.OrchestrateRequest(
                task_description=TASK,
                role="QA",
                options=pb.OrchestratorOptions(deliberation_rounds=2),
            ),
            "options.deliberation_rounds",
        ),
        (
            "CreateCouncil",
            lambda: pb.CreateCouncilRequest(role=a_role(), num_agents=3),
            "num_agents",
        ),
        (
            "CreateCouncil",
            lambda: pb.CreateCouncilRequest(
                role=a_role(), config=pb.CouncilConfig(deliberation_rounds=2)
            ),
            "config.deliberation_rounds",
        ),
        (
            "ProcessPlanningEvent",
            lambda: pb.PlanningEventRequest(
                event_type="CASE_CREATED",
                case_id=new_story(),
                metadata={"description": "x" * 1_025},
            ),
            "metadata.description",
        ),
    ],
)
async def test_no_call_passes_the_limits_of_the_settings(
    fleet: Fleet, limited: Any, method: str, request_of: Callable[[], Any], field: str
) -> None:
    with fails(StatusCode.INVALID_ARGUMENT) as refused:
        await getattr(limited, method)(request_of(), metadata=OPERATOR)

    assert violated(refused) == [field]
    assert fleet.llm.calls == []


@pytest.mark.parametrize("field", ["story_id", "case_id"])
async def test_agents_work_on_a_running_story_for_its_roles_only(
    fleet: Fleet, stub: Any, driver: AsyncDriver, field: str
) -> None:
    story = await a_story_at_its_first_gate(fleet)
    task = a_task()
    foreign = pb.OrchestrateRequest(task_id=task, task_description=TASK, role="QA")
    setattr(foreign, field, story)
    derived = pb.DeriveSubtasksRequest(case_id=story)

    with fails(StatusCode.PERMISSION_DENIED, "has a workflow", "OPERATOR or PO", "ana has DEV"):
        await stub.Orchestrate(foreign, metadata=ANA)
    with fails(StatusCode.PERMISSION_DENIED, "has a workflow", "OPERATOR or PO", "ana has DEV"):
        await stub.DeriveSubtasks(derived, metadata=ANA)
    with pytest.raises(RPCError, match="not found"):
        await fleet.status(task)
    nothing = await rows(
        driver, "MATCH (n:Proposal|PlanVersion {story_id: $story}) RETURN n.id", story=story
    )
    allowed = await stub.Orchestrate(foreign, metadata=OPERATOR, timeout=WITHIN_S)

    assert nothing == []
    assert allowed.metadata.tags["story_id"] == story


async def test_an_event_moves_its_story_as_the_tokens_roles_allow(fleet: Fleet, stub: Any) -> None:
    story = await a_story_at_its_first_gate(fleet)
    event = pb.PlanningEventRequest(event_type="approve_scope", case_id=story)

    with fails(StatusCode.PERMISSION_DENIED, "needs the role PO"):
        await stub.ProcessPlanningEvent(event, metadata=bearer("quinn", "QA"))
    with fails(StatusCode.FAILED_PRECONDITION, "is in DRAFT"):
        await stub.ProcessPlanningEvent(
            pb.PlanningEventRequest(event_type="approve_scope", case_id=story, from_state="BUILD"),
            metadata=PO,
        )
    with fails(StatusCode.FAILED_PRECONDITION):
        await stub.ProcessPlanningEvent(
            pb.PlanningEventRequest(event_type="docs_ready", case_id=story), metadata=PO
        )
    unknown = await stub.ProcessPlanningEvent(
        pb.PlanningEventRequest(event_type="story.sneezed", case_id=story), metadata=PO
    )
    mine = (*PO, ("x-request-id", uuid.uuid4().hex))
    with fails(StatusCode.FAILED_PRECONDITION, "legal now: approve_scope to DESIGN"):
        await stub.ProcessPlanningEvent(
            pb.PlanningEventRequest(event_type="TRANSITION", case_id=story, to_state="DOCS"),
            metadata=PO,
        )
    transition = pb.PlanningEventRequest(
        event_type="TRANSITION",
        case_id=story,
        from_state="DRAFT",
        to_state="DESIGN",
        metadata={"comment": "good"},
    )
    moved = await stub.ProcessPlanningEvent(transition, metadata=mine)
    again = await stub.ProcessPlanningEvent(transition, metadata=mine)
    with fails(StatusCode.INVALID_ARGUMENT) as caught:
        await stub.ProcessPlanningEvent(
            pb.PlanningEventRequest(event_type="reject_design", case_id=story), metadata=PO
        )
    back = await stub.ProcessPlanningEvent(
        pb.PlanningEventRequest(
            event_type="reject_design", case_id=story, metadata={"reason": "too big"}
        ),
        metadata=PO,
    )

    assert not unknown.processed
    assert again == moved
    assert "planning.plan.approved" in unknown.message
    assert (moved.processed, moved.message) == (True, f"story {story} is in DESIGN")
    assert violated(caught) == ["metadata.reason"]
    assert back.message == f"story {story} is in DRAFT"
    timeline = await fleet.temporal.get_workflow_handle(f"story-{story}").query("timeline")
    assert [line["actor"] for line in timeline if line["event"] == "planning.gate.approved"] == [
        "paula"
    ]
    await fleet.temporal.get_workflow_handle(f"story-{story}").terminate()


async def test_an_event_of_an_unknown_story_is_not_found(stub: Any) -> None:
    story = new_story()

    with fails(StatusCode.NOT_FOUND, story):
        await stub.ProcessPlanningEvent(
            pb.PlanningEventRequest(event_type="approve_scope", case_id=story), metadata=PO
        )
    with fails(StatusCode.INVALID_ARGUMENT) as caught:
        await stub.ProcessPlanningEvent(pb.PlanningEventRequest(case_id=story), metadata=PO)

    assert violated(caught) == ["event_type"]


async def test_a_case_and_its_transitions_from_outside_are_stored(
    fleet: Fleet, stub: Any, driver: AsyncDriver
) -> None:
    story = new_story()
    create = pb.PlanningEventRequest(
        event_type="CASE_CREATED", case_id=story, metadata={"title": "Log in", "description": "d"}
    )
    move = pb.PlanningEventRequest(
        event_type="TRANSITION", case_id=story, from_state="DRAFT", to_state="DESIGN"
    )

    with fails(StatusCode.NOT_FOUND, "not found"):
        await stub.ProcessPlanningEvent(move, metadata=PO)
    with fails(StatusCode.PERMISSION_DENIED):
        await stub.ProcessPlanningEvent(create, metadata=bearer("quinn", "QA"))
    for field, text in (("title", "a\0b"), ("description", "x" * 20_001)):
        wrong = pb.PlanningEventRequest(
            event_type="CASE_CREATED", case_id=story, metadata={"title": "Log in", field: text}
        )
        with fails(StatusCode.INVALID_ARGUMENT) as caught:
            await stub.ProcessPlanningEvent(wrong, metadata=PO)
        assert violated(caught) == [f"metadata.{field}"]
    made = await stub.ProcessPlanningEvent(create, metadata=PO)
    again = await stub.ProcessPlanningEvent(create, metadata=PO)
    with fails(StatusCode.INVALID_ARGUMENT) as caught:
        await stub.ProcessPlanningEvent(
            pb.PlanningEventRequest(event_type="TRANSITION", case_id=story), metadata=PO
        )
    moved = await stub.ProcessPlanningEvent(move, metadata=PO)
    with fails(StatusCode.INVALID_ARGUMENT, "is newer than"):
        await stub.ProcessPlanningEvent(
            pb.PlanningEventRequest(
                event_type="TRANSITION", case_id=story, to_state="DRAFT", timestamp_ms=1
            ),
            metadata=PO,
        )

    assert made.processed
    assert made.message == f"case {story} is stored"
    assert again.processed
    assert "known already" in again.message
    assert violated(caught) == ["to_state"]
    assert moved.processed
    found = await rows(
        driver, "MATCH (s:Story {id: $id}) RETURN s.title, s.description, s.status", id=story
    )
    assert found == [["Log in", "d", "DESIGN"]]
    transitions = "MATCH (t:PhaseTransition {story_id: $id}) RETURN t.from_phase, t.to_phase"
    await until(
        lambda: rows(driver, transitions, id=story), lambda found: found == [["DRAFT", "DESIGN"]]
    )


async def test_two_stories_whose_plans_have_one_workflow_id_are_distinguished(
    fleet: Fleet, stub: Any
) -> None:
    story = new_story()
    for story_id in (story, f"{story}-b"):
        await fleet.graph.record(batch(story_id, spec(story_id)))
    approved: dict[str, Any] = {"event_type": "planning.plan.approved"}
    first = pb.PlanningEventRequest(**approved, case_id=story, plan_id="b-c")
    second = pb.PlanningEventRequest(**approved, case_id=f"{story}-b", plan_id="c")

    assert (await stub.ProcessPlanningEvent(first, metadata=PO)).processed
    with fails(StatusCode.ALREADY_EXISTS, f"is the workflow of plan b-c of {story}"):
        await stub.ProcessPlanningEvent(second, metadata=PO)


async def test_a_plan_that_was_approved_outside_is_stored_and_run_once(
    fleet: Fleet, stub: Any, driver: AsyncDriver
) -> None:
    story = new_story()
    await fleet.graph.record(batch(story, spec(story), a_plan(story)))
    event = pb.PlanningEventRequest(
        event_type="planning.plan.approved", case_id=story, plan_id="plan-1"
    )

    with fails(StatusCode.PERMISSION_DENIED):
        await stub.ProcessPlanningEvent(event, metadata=bearer("quinn", "QA"))
    first = await stub.ProcessPlanningEvent(event, metadata=PO)
    again = await stub.ProcessPlanningEvent(event, metadata=PO)

    assert first.processed
    assert again.processed
    assert list(first.derived_task_ids) == [f"{story}-t1", f"{story}-t2"]
    done = await fleet.temporal.get_workflow_handle(f"plan-{story}-plan-1").result()
    assert done["status"] == "COMPLETED"
    found = await rows(
        driver, "MATCH (a:PlanApproval {story_id: $id}) RETURN a.approved_by", id=story
    )
    assert found == [["paula"]]


async def test_tasks_are_derived_once_and_recorded(
    fleet: Fleet, stub: Any, driver: AsyncDriver
) -> None:
    story = new_story()
    with fails(StatusCode.NOT_FOUND, story):
        await stub.DeriveSubtasks(pb.DeriveSubtasksRequest(case_id=story), metadata=ANA)
    await fleet.graph.record(batch(story, spec(story)))
    request = pb.DeriveSubtasksRequest(
        case_id=story, plan_id="plan-7", strategy=pb.DerivationStrategy(auto_publish_to_nats=True)
    )

    one, other = await asyncio.gather(
        stub.DeriveSubtasks(request, metadata=ANA), stub.DeriveSubtasks(request, metadata=ANA)
    )
    newest = await stub.DeriveSubtasks(pb.DeriveSubtasksRequest(case_id=story), metadata=ANA)
    role = one.tasks[0].role
    of_role = await stub.DeriveSubtasks(
        pb.DeriveSubtasksRequest(case_id=story, plan_id="plan-7", roles=[role]), metadata=ANA
    )

    assert one.total_tasks == len(one.tasks) >= 1
    assert {each.task_id for each in one.tasks} == {each.task_id for each in other.tasks}
    assert {each.task_id for each in one.tasks} == {each.task_id for each in newest.tasks}
    assert one.derivation_id == f"derivation-{story}.plan-7"
    # Other councils of this fleet may still ask; the plan was asked for once.
    assert [call.act for call in fleet.llm.calls].count("derive_plan") == 1
    assert {each.role for each in of_role.tasks} == {role}
    assert all((each.case_id, each.plan_id) == (story, "plan-7") for each in one.tasks)
    stored = await rows(
        driver,
        "MATCH (:PlanVersion {case_id: $id, id: 'plan-7'})-[:HAS_SUBTASK]->(t) RETURN t.id",
        id=story,
    )
    assert sorted(row[0] for row in stored) == sorted(each.task_id for each in one.tasks)


async def test_the_tasks_that_a_plan_has_are_its_tasks(fleet: Fleet, stub: Any) -> None:
    story = new_story()
    await fleet.graph.record(batch(story, spec(story), a_plan(story)))
    request = pb.DeriveSubtasksRequest(case_id=story, plan_id="plan-1")

    found = await stub.DeriveSubtasks(request, metadata=ANA)
    request.strategy.dependency_order.extend(["dev"])
    ordered = await stub.DeriveSubtasks(request, metadata=ANA)
    request.strategy.parallel_execution = True
    in_waves = await stub.DeriveSubtasks(request, metadata=ANA)
    request.strategy.max_tasks_per_role = 1
    assert (await stub.DeriveSubtasks(request, metadata=ANA)).total_tasks == 2

    assert [(each.role, list(each.dependencies)) for each in found.tasks] == [
        ("DATA", []),
        ("DEV", [f"{story}-t1"]),
    ]
    assert found.tasks[1].description == "The form\n\nHTML"
    assert [each.role for each in ordered.tasks] == ["DEV", "DATA"]
    assert [each.role for each in in_waves.tasks] == ["DATA", "DEV"]
    assert not fleet.llm.calls


async def test_a_task_has_the_context_of_its_story(fleet: Fleet, stub: Any) -> None:
    story = new_story()
    ask: dict[str, Any] = {"case_id": story, "role": "developer", "phase": "BUILD"}
    with fails(StatusCode.NOT_FOUND, "not found", story):
        await stub.GetTaskContext(pb.GetTaskContextRequest(**ask), metadata=ANA)
    await fleet.graph.record(batch(story, *one_of_each(story)))

    plain = await stub.GetTaskContext(pb.GetTaskContextRequest(**ask), metadata=ANA)
    options = pb.ContextOptions(include_timeline=True, include_decisions=True, max_events=5)
    full = await stub.GetTaskContext(
        pb.GetTaskContextRequest(**ask, task_id=f"{story}-t2", options=options), metadata=ANA
    )
    scoped = await stub.GetTaskContext(
        pb.GetTaskContextRequest(**ask, options=pb.ContextOptions(scopes=["SUBTASKS_ALL"])),
        metadata=ANA,
    )
    with fails(StatusCode.INVALID_ARGUMENT) as caught:
        await stub.GetTaskContext(
            pb.GetTaskContextRequest(**ask, options=pb.ContextOptions(scopes=["GOSSIP"])),
            metadata=ANA,
        )

    assert "Log in" in plain.blocks.context
    assert "DEV council" in plain.blocks.system
    assert plain.context_text.startswith(plain.blocks.system)
    assert plain.token_count > 0
    assert not plain.blocks.history
    assert "## Tasks" in scoped.blocks.history
    assert plain.version_hash != full.version_hash
    timeline, _, decisions = full.blocks.history.partition("\n\n")
    assert len(timeline.splitlines()) == 6  # a heading, and the five requested lines
    assert "Cookies" in decisions
    assert full.context_text.endswith(full.blocks.history)
    assert violated(caught) == ["options.scopes.0"]


# --- metrics --------------------------------------------------------------------------------------


async def test_figures_are_counted_and_measured(stub: Any) -> None:
    ask = pb.GetStatusRequest(include_stats=True)
    before = (await stub.GetStatus(ask, metadata=ANA)).stats
    await stub.Deliberate(
        pb.DeliberateRequest(task_description=TASK, role="DATA"), metadata=ANA, timeout=WITHIN_S
    )
    await stub.Orchestrate(
        pb.OrchestrateRequest(task_description=TASK, role="DATA"), metadata=ANA, timeout=WITHIN_S
    )

    async def counted() -> bool:
        now = (await stub.GetStatus(ask, metadata=ANA)).stats
        return bool(
            now.total_deliberations == before.total_deliberations + 2
            and now.total_orchestrations == before.total_orchestrations + 1
            and now.role_counts["DATA"] == before.role_counts["DATA"] + 2
            and now.avg_deliberation_time_ms > 0
        )

    await until(counted)
    plain = await stub.GetStatus(pb.GetStatusRequest(), metadata=ANA)
    every = await stub.GetMetrics(pb.GetMetricsRequest(metric_type="all"), metadata=ANA)
    recent = await stub.GetMetrics(
        pb.GetMetricsRequest(metric_type="performance", time_range_ms=1), metadata=ANA
    )

    assert plain.status == "healthy"
    assert plain.uptime_seconds >= 0
    assert not plain.HasField("stats")
    performance = every.performance
    assert 0 < performance.p50_latency_ms <= performance.p95_latency_ms
    assert performance.p95_latency_ms <= performance.p99_latency_ms
    assert performance.avg_deliberation_ms > 0
    assert performance.avg_orchestration_ms > 0
    assert every.agents.agents_per_role["DATA"] == 3
    assert every.agents.active_agents == every.agents.total_agents
    assert every.agents.avg_agent_response_time_ms > 0
    assert every.councils.total_councils == every.councils.active_councils
    assert every.councils.health_per_council["DATA"].success_rate == 1.0
    assert every.councils.health_per_council["DATA"].available_agents == 3
    assert recent.performance.p50_latency_ms == 0
    assert not recent.HasField("agents")


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"metric_type": "vibes"}, "metric_type"),
        ({"metric_type": "all", "time_range_ms": -1}, "time_range_ms"),
    ],
)
async def test_unknown_metrics_are_refused(stub: Any, wrong: dict[str, Any], field: str) -> None:
    with fails(StatusCode.INVALID_ARGUMENT) as caught:
        await stub.GetMetrics(pb.GetMetricsRequest(**wrong), metadata=ANA)

    assert violated(caught) == [field]


# --- arbitrary requests ---------------------------------------------------------------------------

EXPECTED_CODES = {
    *(StatusCode.OK, StatusCode.INVALID_ARGUMENT, StatusCode.NOT_FOUND),
    *(StatusCode.FAILED_PRECONDITION, StatusCode.ALREADY_EXISTS),
}
"""The codes that bad input may end in: neither INTERNAL nor UNKNOWN."""

WORDS = ["", "DEV", "dev", "US-1", "plan-1", "approve_scope", "planning.plan.approved", "all", "\0"]
TEXTS = st.one_of(st.sampled_from(WORDS), st.text(max_size=40))


def messages(descriptor: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Generate messages of that type, as keyword arguments."""
    return st.fixed_dictionaries(
        {}, optional={field.name: values(field) for field in descriptor.fields}
    )


def values(field: Any) -> st.SearchStrategy[Any]:
    if field.message_type and field.message_type.GetOptions().map_entry:
        return st.dictionaries(TEXTS, TEXTS, max_size=3)
    one: st.SearchStrategy[Any]
    match field.type:
        case field.TYPE_MESSAGE:
            one = messages(field.message_type)
        case field.TYPE_STRING:
            one = TEXTS
        case field.TYPE_BOOL:
            one = st.booleans()
        case field.TYPE_INT64:
            one = st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 3)
        case _:
            one = st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 3)
    return st.lists(one, max_size=3) if field.is_repeated else one


METHODS = list(pb.DESCRIPTOR.services_by_name["OrchestratorService"].methods)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
async def test_no_message_causes_an_internal_error(
    fleet: Fleet, stub: Any, driver: AsyncDriver, method: Any
) -> None:
    request_type = getattr(pb, method.input_type.name)
    councils = "MATCH (c:Council)-[:HAS_AGENT]->(a) RETURN count(DISTINCT c), count(a)"
    halves = (
        "MATCH (c:Council) WHERE NOT (c)-[:HAS_AGENT]->() RETURN c.role "
        "UNION MATCH (a:Agent)<-[:HAS_AGENT]-(c:Council) WITH a, count(c) AS seats "
        "WHERE seats > 1 RETURN a.id AS `c.role`"
    )
    loop = asyncio.get_running_loop()
    codes: list[StatusCode] = []

    async def ask(fields: dict[str, Any]) -> None:
        request = request_type(**fields)
        call = getattr(stub, method.name)(
            request, metadata=bearer("ana", "PO", "OPERATOR"), timeout=WITHIN_S
        )
        try:
            if method.server_streaming:
                async for _ in call:
                    pass
            else:
                await call
        except grpc.aio.AioRpcError as error:
            code, words = error.code(), error.details()
        else:
            code, words = StatusCode.OK, ""
        codes.append(code)
        assert code in EXPECTED_CODES, (fields, words)

    @settings(max_examples=40, suppress_health_check=list(HealthCheck), database=None)
    @given(messages(request_type.DESCRIPTOR))
    def any_message(fields: dict[str, Any]) -> None:
        asyncio.run_coroutine_threadsafe(ask(fields), loop).result(WITHIN_S)

    before = await rows(driver, councils)
    await asyncio.to_thread(any_message)

    assert codes
    assert not await rows(driver, halves)
    if method.name not in ("CreateCouncil", "RegisterAgent", "UnregisterAgent"):
        assert await rows(driver, councils) == before
