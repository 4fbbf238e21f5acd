"""The worker processes as a supervisor sees them: start, refuse to start, be healthy, drain."""

import asyncio
import os
import re
import shutil
import signal
import uuid
from pathlib import Path

import httpx
import pytest
from nats.aio.client import Client as NatsClient
from nats.js import JetStreamContext
from nats.js.api import StorageType, StreamConfig
from psutil import Process
from temporalio.api.operatorservice.v1 import ListSearchAttributesRequest
from temporalio.common import VersioningBehavior, WorkerDeploymentVersion

from activities.checks.sandbox import Sandbox
from bridge.jetstream.consumers import CONSUMERS
from bridge.jetstream.streams import STREAMS
from deploy.local.ports import free_ports
from deploy.local.servers import Nats as NatsServer
from tests.support.fleet import Environment, connect, launch, running
from tests.support.git_server import GitServer, credentials
from tests.support.llm_server import LlmServer
from tests.support.polling import WITHIN_S, until
from tests.support.repositories import config_with, make_repository
from tests.support.server_process import ServerProcess
from tests.support.servers import READY_WITHIN, RunningServer, Servers
from workers.__main__ import NAMES
from workers.clients.connection import StartError
from workers.clients.valkey import valkey_client
from workers.environment import ROOT
from workers.processes.process import IF_ENCRYPTED, PROCESSES
from workers.processes.story import story_worker
from workers.run import ALL as ALL_PROCESSES
from workers.run import ready, run_until
from workers.settings import Settings
from workflows.deliberation import DeliberationWorkflow
from workflows.models.deliberation import DeliberationInput
from workflows.models.ids import deliberation_workflow_id
from workflows.search_attributes import ALL
from workflows.stubs import STORY_QUEUE

NOWHERE = "127.0.0.1:1"


async def refusal(name: str, environment: Environment) -> str:
    """Return the message that the process would exit with; nothing of it runs."""
    values = {name.lower(): value for name, value in environment.items()}
    settings = Settings.model_validate(
        {k: v for k, v in values.items() if k in Settings.model_fields}
    )
    with pytest.raises(StartError) as refused:
        async with asyncio.timeout(WITHIN_S), ready(name, settings):
            pass
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- refusing to start ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "wrong", "words"),
    [
        ("story", {"TEMPORAL_ADDRESS": NOWHERE}, f"Temporal at {NOWHERE} is not reachable"),
        ("agents", {"REDIS_PORT": "x"}, "REDIS_PORT (port of Valkey): must be a valid integer"),
    ],
)
async def test_a_process_that_cannot_start_exits_1_with_one_line_and_no_traceback(
    environment: Environment, process: str, wrong: Environment, words: str
) -> None:
    started = await launch(process, environment | wrong)

    try:
        stdout, stderr = await asyncio.wait_for(started.communicate(), WITHIN_S)
    finally:
        if started.returncode is None:
            started.kill()

    assert started.returncode == 1
    (line,) = stderr.decode().splitlines()
    assert words in line
    assert "Traceback" not in stdout.decode()


@pytest.mark.parametrize(
    ("process", "wrong", "words"),
    [
        ("story", {"TEMPORAL_NAMESPACE": "nope"}, "has no namespace nope. Set TEMPORAL_NAMESPACE"),
        ("story", {"REDIS_PORT": "1"}, "Valkey at 127.0.0.1:1 is not reachable"),
        (
            "story",
            {"REDIS_PASSWORD": "wrong"},
            "Check REDIS_USER and REDIS_PASSWORD",
        ),
        ("bridge", {"NATS_URL": f"nats://u:secret@{NOWHERE}"}, f"NATS at nats://{NOWHERE} is not"),
        ("bridge", {"NATS_PASSWORD": "wrong"}, "authentication failed. Check NATS_USER and NATS_P"),
        ("bridge", {"NATS_REPLICAS": "3"}, "NATS_REPLICAS is 3: it must be 1 on one server"),
        ("context", {"NEO4J_URI": f"bolt://{NOWHERE}"}, f"Neo4j at bolt://{NOWHERE} is not reach"),
        (
            "context",
            {"NEO4J_PASSWORD": "wrong"},
            "authentication failed. Check NEO4J_USER and NEO4J_P",
        ),
        ("agents", {"VLLM_URL": f"http://{NOWHERE}/v1"}, "is not reachable. Start it (loading a"),
        ("agents", {"VLLM_MODEL": "gpt"}, "does not serve the model gpt, but test-model. Correct"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
async def test_a_process_with_a_wrong_setting_is_refused_with_where_and_what_to_do(
    environment: Environment, process: str, wrong: Environment, words: str
) -> None:
    line = await refusal(process, environment | wrong)

    assert words in line
    assert "secret" not in line


async def test_an_address_that_is_not_an_llm_is_refused(
    environment: Environment, llm: LlmServer
) -> None:
    line = await refusal("agents", environment | {"VLLM_URL": f"{llm.url}/v2"})

    assert "answers 404 to /models" in line
    assert "it ends in /v1" in line


async def test_a_memory_stream_stops_the_bridge(
    environment: Environment, jetstream: JetStreamContext
) -> None:
    await jetstream.add_stream(
        StreamConfig(name="CONTEXT", subjects=["context.>"], storage=StorageType.MEMORY)
    )

    line = await refusal("bridge", environment)

    assert "Stream CONTEXT would lose events: its storage is memory, and must be file" in line
    assert "`nats stream rm CONTEXT`" in line


@pytest.mark.parametrize(
    ("process", "file", "content", "words"),
    [
        ("context", "agile.fsm.yaml", "states: [", "agile.fsm.yaml"),
        ("context", "councils.yaml", "councils: {DEV: []}", "councils.yaml"),
        ("context", "scopes.yaml", "{}", "scopes.yaml"),
        ("agents", "checks.yaml", "[]", "checks.yaml"),
        ("workspace", "repositories.yaml", "[]", "repositories.yaml"),
        (
            "workspace",
            "repositories.yaml",
            "repositories: {gone: {url: 'file:///nowhere/gone.git'}}",
            "repository gone: the repository does not answer; check its `url`",
        ),
        ("agents", "prompts/propose.md", "{{ nobody }}", "propose.md"),
    ],
    ids=lambda value: Path(value).name if isinstance(value, str) else "",
)
async def test_an_inconsistent_configuration_is_refused(
    environment: Environment, tmp_path: Path, process: str, file: str, content: str, words: str
) -> None:
    config = tmp_path / "config"
    shutil.copytree(ROOT / "deploy" / "config", config)
    (config / file).write_text(content)

    line = await refusal(process, environment | {"FLEET_CONFIG": str(config)})

    assert words in line
    assert "FLEET_CONFIG" in line


async def test_a_git_server_that_lacks_a_store_is_refused_with_what_to_create(
    environment: Environment, tmp_path: Path
) -> None:
    entry = {"url": make_repository(tmp_path / "adder")}
    (tmp_path / "server").mkdir()
    with GitServer(tmp_path / "server").serving() as server:
        line = await refusal(
            "workspace",
            environment
            | {
                "FLEET_CONFIG": str(config_with(tmp_path / "config", adder=entry)),
                "WORKSPACE_STORE": server.url,
                "REPOSITORY_CREDENTIALS": str(credentials(tmp_path / "credentials")),
            },
        )

    assert f"WORKSPACE_STORE: {server.url}/adder.git: the store's git server has no such" in line
    assert "create an empty one of that name there" in line


# --- running --------------------------------------------------------------------------------------


async def health(port: int) -> tuple[int, dict[str, str]]:
    async with httpx.AsyncClient(trust_env=False, timeout=WITHIN_S) as http:
        answer = await http.get(f"http://127.0.0.1:{port}/health")
    return answer.status_code, answer.json()["checks"]


async def until_health(port: int, status: int) -> dict[str, str]:
    _, checks = await until(lambda: health(port), lambda found: found[0] == status)
    return checks


async def test_all_processes_run_healthy_and_prepare_what_they_need(
    environment: Environment, jetstream: JetStreamContext, servers: Servers, namespace: str
) -> None:
    (port,) = free_ports(1)

    async with running("all", environment | {"HEALTH_PORT": str(port)}) as log:
        jobs = set(log.ready["queues"])
        assert jobs >= {"story", "agents", "agent-responses", "context", "bridge", "workspace"}
        checks = await until_health(port, 200)
        sandbox = Sandbox().no_groups
        assert checks == {
            **dict.fromkeys(
                ["temporal", "valkey", "workers", "llm", "neo4j", "nats", "store"], "ok"
            ),
            "sandbox": f"warning: {sandbox}" if sandbox else "ok",
        }
        warned = [line for line in log.lines if line.get("reason") == sandbox]
        assert len(warned) == 2 * bool(sandbox)  # of the processes `agents` and `workspace`
        mapped = "\n".join(each.path for each in Process(log.process.pid).memory_maps())
        assert not re.search("/(numpy|pandas|pyarrow)/", mapped)
        async with httpx.AsyncClient(trust_env=False) as http:
            metrics = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
            elsewhere = await http.get(f"http://127.0.0.1:{port}/elsewhere")
        assert "process_cpu_seconds_total" in metrics
        assert elsewhere.status_code == 404

    for stream in STREAMS:
        assert (await jetstream.stream_info(stream.name)).config.storage == StorageType.FILE
    client = await connect(servers.temporal.address)
    known = await client.operator_service.list_search_attributes(
        ListSearchAttributesRequest(namespace=namespace)
    )
    assert {key.name: int(key.indexed_value_type) for key in ALL}.items() <= dict(
        known.custom_attributes
    ).items()


async def test_a_process_that_only_prepares_leaves_what_it_needs_and_exits(
    environment: Environment, jetstream: JetStreamContext
) -> None:
    for stream in await jetstream.streams_info():
        await jetstream.delete_stream(str(stream.config.name))

    preparing = await launch("inbox", environment, "--prepare")
    async with asyncio.timeout(WITHIN_S):
        output, errors = await preparing.communicate()

    assert (preparing.returncode, errors) == (0, b"")
    assert b"workers run" not in output
    for consumer in CONSUMERS:
        info = await jetstream.consumer_info(consumer.stream, consumer.name)
        assert info.config.filter_subject == consumer.subject


async def test_replicas_may_start_at_once_and_each_ends_on_ctrl_c(
    environment: Environment, jetstream: JetStreamContext
) -> None:
    async def starts_and_ends() -> int:
        async with running("bridge", environment) as log:
            log.process.send_signal(signal.SIGINT)
            await log.until("workers stopped")
            return await log.process.wait()

    assert await asyncio.gather(*(starts_and_ends() for _ in range(3))) == [0, 0, 0]


async def test_health_reports_which_server_is_away_and_recovers(
    environment: Environment, nats_client: NatsClient, nats_server: RunningServer
) -> None:
    (port,) = free_ports(1)
    async with running("bridge", environment | {"HEALTH_PORT": str(port)}) as log:
        await until_health(port, 200)

        await nats_server.kill()
        checks = await until_health(port, 503)
        await nats_server.start()
        await until(lambda: nats_client.is_connected)

        assert checks["nats"] != "ok"
        assert {name for name, word in checks.items() if word != "ok"} == {"nats"}
        await until_health(port, 200)
        assert log.process.returncode is None


async def test_a_signal_lets_a_running_call_finish(
    environment: Environment, servers: Servers, namespace: str
) -> None:
    client = await connect(servers.temporal.address, namespace)
    async with LlmServer(delay_ms=2_000) as slow:
        async with running("all", environment | {"VLLM_URL": slow.url}) as log:
            task_id = f"drain-{uuid.uuid4().hex[:8]}"
            deliberation = await client.start_workflow(
                DeliberationWorkflow.run,
                DeliberationInput(task_id=task_id, role="DEV", description="Add two numbers."),
                id=deliberation_workflow_id(task_id),
                task_queue=STORY_QUEUE,
            )
            await until(lambda: len(slow.calls) == 3)

            log.process.send_signal(signal.SIGTERM)
            await log.until("workers stopped")

            assert await log.process.wait() == 0
        assert [call.end for call in slow.calls] == ["answered"] * 3
        await deliberation.terminate()


async def test_what_an_activity_logs_carries_its_ids(
    environment: Environment, servers: Servers, llm: LlmServer, namespace: str
) -> None:
    client = await connect(servers.temporal.address, namespace)
    task_id, story_id = f"log-{uuid.uuid4().hex[:8]}", "US-LOG"
    async with running("all", environment) as log:
        llm.fail("status", times=3, status=400)
        deliberation = await client.start_workflow(
            DeliberationWorkflow.run,
            DeliberationInput(
                task_id=task_id, story_id=story_id, role="DEV", description="Add two numbers."
            ),
            id=deliberation_workflow_id(task_id),
            task_queue=STORY_QUEUE,
        )
        line = await log.until("Completing activity as failed")
        await deliberation.terminate()

    assert line["level"] == "warning"
    assert (line["story_id"], line["task_id"]) == (story_id, task_id)
    assert line["workflow_id"] == deliberation.id
    assert line["activity"] == "propose"
    assert line["process"] == "all"


async def test_a_credential_that_is_withdrawn_stops_the_process(
    environment: Environment, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    server = NatsServer(tmp_path / "nats", port)
    nats = ServerProcess(server, tmp_path / "nats.log", READY_WITHIN)
    await nats.start()
    variables = {"NATS_URL": server.url, "NATS_PASSWORD": server.password}
    async with running("bridge", environment | variables) as log:
        (tmp_path / "nats" / "password").write_text("another\n")
        server.prepare()
        assert nats.pid
        os.kill(nats.pid, signal.SIGHUP)  # it reloads its configuration

        await log.until("workers drain")

        assert await log.ended() == 1
        assert log.errors[0].startswith(f"NATS at {server.url}: authentication failed")
    await nats.stop()


async def test_one_workers_failure_stops_the_others(temporal: RunningServer) -> None:
    good_client = await connect(temporal.address)
    bad_client = await connect(temporal.address, "nope")
    settings = Settings.model_validate({"drain_seconds": 1})
    valkey = valkey_client(settings)
    good, bad = (story_worker(each, settings, valkey) for each in (good_client, bad_client))

    with pytest.raises(Exception, match="nope"):
        await run_until([good, bad], asyncio.Event(), asyncio.get_running_loop().create_future())

    assert good.is_shutdown


def test_every_process_can_be_named_on_the_command_line() -> None:
    assert (*PROCESSES, *IF_ENCRYPTED, ALL_PROCESSES) == NAMES


async def test_a_build_id_switches_versioning_on(temporal: RunningServer) -> None:
    client = await connect(temporal.address)

    plain, built = (
        story_worker(client, settings, valkey_client(settings)).config()["deployment_config"]
        for settings in (Settings(), Settings.model_validate({"worker_build_id": "1.2.3"}))
    )

    assert plain is not None
    assert not plain.use_worker_versioning
    assert built is not None
    assert built.use_worker_versioning
    assert built.version == WorkerDeploymentVersion("swe-ai-fleet", "1.2.3")
    assert built.default_versioning_behavior == VersioningBehavior.AUTO_UPGRADE
