"""Traces of real processes: the chain from a call to the LLM, the graph and the bus."""

import asyncio
import secrets
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from nats.js import JetStreamContext

from bridge.grpc.wire import orchestrator_pb2 as pb
from bridge.grpc.wire import orchestrator_pb2_grpc
from tests.support.collector import Collector, Span, chain, collecting, without_parent
from tests.support.fleet import Environment, Log, connect, new_environment, running
from tests.support.grpc_service import bearer
from tests.support.llm_server import LlmServer
from tests.support.polling import WITHIN_S, until
from tests.support.servers import Servers
from tests.support.site import GOOD_REPORT, SAMPLE_STORY
from workers.environment import ROOT
from workflows.models.ids import story_workflow_id
from workflows.models.story import StoryInput
from workflows.story import StoryWorkflow
from workflows.stubs import STORY_QUEUE

SERVER, CLIENT, PRODUCER = 2, 3, 4
"""Kinds of spans in OTLP."""

NOWHERE = "http://127.0.0.1:1"


async def stopped(log: Log) -> None:
    """Stop the process gracefully, which sends the spans that are left."""
    log.process.terminate()
    async with asyncio.timeout(WITHIN_S):
        assert await log.ended() == 0


def named(spans: list[Span], start: str) -> list[Span]:
    return [span for span in spans if span.name.startswith(start)]


@pytest.fixture
async def traced(servers: Servers, llm: LlmServer, collector: Collector) -> Environment:
    return await new_environment(servers, llm, OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint)


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    async with collecting() as collector:
        yield collector


async def test_a_deliberation_is_one_trace_from_its_call_to_the_llm_the_graph_and_the_bus(
    traced: Environment, collector: Collector, llm: LlmServer, jetstream: JetStreamContext
) -> None:
    trace, caller = secrets.token_hex(16), secrets.token_hex(8)
    canary = f"canary{uuid.uuid4().hex}"
    llm.fail("status", status=500, text=f"cannot answer {canary}")
    task_id, story_id = f"task-{uuid.uuid4().hex[:8]}", f"US-{uuid.uuid4().hex[:8]}"

    async with running("all", traced) as log:
        address = f"127.0.0.1:{traced['GRPC_ORCHESTRATOR_PORT']}"
        async with grpc.aio.insecure_channel(address) as channel:
            stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
            answer = await stub.Orchestrate(
                pb.OrchestrateRequest(
                    task_id=task_id,
                    task_description=f"Write a function that adds two numbers. {canary}",
                    role="DEV",
                    story_id=story_id,
                ),
                metadata=(*bearer("ana", "DEV"), ("traceparent", f"00-{trace}-{caller}-01")),
                timeout=WITHIN_S,
            )
        messages = await jetstream.pull_subscribe("orchestration.>", stream="ORCHESTRATOR_EVENTS")
        [first] = await messages.fetch(1, timeout=WITHIN_S)
        await stopped(log)

    assert answer.winner.proposal.author_id
    spans = collector.of(trace)
    root, *others = without_parent(spans)
    assert (root.name, root.parent, others) == (
        "/orchestrator.v1.OrchestratorService/Orchestrate",
        caller,
        [],
    )
    called = [
        "/orchestrator.v1.OrchestratorService/Orchestrate",
        "StartWorkflow:DeliberationWorkflow",
        "RunWorkflow:DeliberationWorkflow",
    ]
    [failed] = [
        chat for chat in named(spans, "chat ") if "gen_ai.usage.input_tokens" not in chat.attributes
    ]
    chats = [chat for chat in named(spans, "chat ") if chat != failed]
    assert failed.is_error
    assert chain(failed, spans) == [
        *called,
        "StartActivity:propose",
        "RunActivity:propose",
        "chat test-model",
    ]
    for chat in chats:
        assert chat.kind == CLIENT
        assert {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "vllm",
            "gen_ai.request.model": "test-model",
            "gen_ai.output.type": "json",
            "gen_ai.response.finish_reasons": ["stop"],
            "server.address": "127.0.0.1",
        }.items() <= chat.attributes.items()
        assert chat.attributes["gen_ai.usage.output_tokens"] > 0
    assert len(chats) == sum(call.end == "answered" for call in llm.calls)
    agents = {each.attributes["gen_ai.agent.id"] for each in named(spans, "RunActivity:propose")}
    assert answer.winner.proposal.author_id in agents
    stored = [chain(each, spans) for each in named(spans, "neo4j")]
    for activity in ("gather", "announce", "announce_outcome"):
        assert [*called, f"StartActivity:{activity}", f"RunActivity:{activity}", "neo4j"] in stored
    sent = named(spans, "publish orchestration.deliberation.completed")
    assert [(each.kind, chain(each, spans)[:-2]) for each in sent] == [
        (PRODUCER, [*called, "StartActivity:announce_outcome"])
    ]
    assert (first.headers or {})["traceparent"].split("-")[1] == trace
    assert canary.encode() not in collector.received


async def test_a_story_from_the_cli_to_done_is_one_trace(
    traced: Environment, collector: Collector, llm: LlmServer, tmp_path: Path
) -> None:
    story_id = f"US-{uuid.uuid4().hex[:8]}"
    canary = f"canary{uuid.uuid4().hex}"
    sample = StoryInput.model_validate_json(SAMPLE_STORY.read_text())
    story = sample.model_copy(
        update={
            "story_id": story_id,
            "brief": f"{sample.brief} {canary}",
            "approvals": "auto",
        }
    )

    async with running("all", traced) as log:
        started = await asyncio.create_subprocess_exec(
            str(ROOT / ".venv/bin/fleet"),
            "start",
            "-",
            env=traced | {"FLEET_HOME": str(tmp_path)},
            stdin=asyncio.subprocess.PIPE,
        )
        await started.communicate(story.model_dump_json().encode())
        assert started.returncode == 0
        client = await connect(traced["TEMPORAL_ADDRESS"], traced["TEMPORAL_NAMESPACE"])
        handle = client.get_workflow_handle_for(StoryWorkflow.run, story_workflow_id(story_id))
        await until(lambda: handle.query(StoryWorkflow.state), lambda view: view.state == "BUILD")
        await handle.execute_update(StoryWorkflow.report, GOOD_REPORT)
        assert (await handle.result()).state == "DONE"
        await stopped(log)

    [start] = named(collector.spans, "StartWorkflow:StoryWorkflow")
    spans = collector.of(start.trace)
    assert start.service == "swe-ai-fleet-cli"
    assert without_parent(spans) == [start]
    run = ["StartWorkflow:StoryWorkflow", "RunWorkflow:StoryWorkflow"]
    council = ["StartChildWorkflow:DeliberationWorkflow", "RunWorkflow:DeliberationWorkflow"]
    plan = ["StartChildWorkflow:PlanWorkflow", "RunWorkflow:PlanWorkflow"]

    def calls(activity: str, last: str) -> list[str]:
        return [f"StartActivity:{activity}", f"RunActivity:{activity}", last]

    chats = [chain(each, spans) for each in named(spans, "chat ")]
    assert len(chats) == len(llm.calls)
    assert [*run, *council, *calls("propose", "chat test-model")] in chats  # DESIGN, TEST and DOCS
    assert [*run, *plan, *council, *calls("propose", "chat test-model")] in chats  # the tasks
    stored = [chain(each, spans) for each in named(spans, "neo4j")]
    for workflow, activity in (
        (run, "announce"),
        ([*run, *council], "record_deliberation"),
        ([*run, *plan, *council], "record_deliberation"),
    ):
        assert [*workflow, *calls(activity, "neo4j")] in stored
    moves = [chain(each, spans) for each in named(spans, "publish planning.story.transitioned")]
    assert moves == [[*run, *calls("announce", "publish planning.story.transitioned")]] * 6
    assert canary.encode() not in collector.received


async def test_a_process_ends_although_the_collector_is_away(
    servers: Servers, llm: LlmServer
) -> None:
    environment = await new_environment(servers, llm, OTEL_EXPORTER_OTLP_ENDPOINT=NOWHERE)

    async with running("story", environment) as log:
        client = await connect(environment["TEMPORAL_ADDRESS"], environment["TEMPORAL_NAMESPACE"])
        handle = await client.start_workflow(
            StoryWorkflow.run,
            StoryInput(story_id="US-1", title="Undo", brief="Undo.", created_by="ana"),
            id=story_workflow_id("US-1"),
            task_queue=STORY_QUEUE,
        )
        await handle.query(StoryWorkflow.state)  # which is a span, too
        await stopped(log)
