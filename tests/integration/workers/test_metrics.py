"""Metrics of a real fleet at work, as Prometheus reads them."""

import re
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta

import grpc
import httpx
import pytest
import yaml
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from temporalio.api.enums.v1 import EventType

from activities.planning import load_config
from bridge.fleet_metrics import FleetMetrics
from bridge.grpc.wire import orchestrator_pb2 as pb
from bridge.grpc.wire import orchestrator_pb2_grpc
from deploy.local.ports import free_ports
from deploy.observability.__main__ import HERE, PANELS
from tests.support.fleet import Environment, connect, new_environment, whole_fleet
from tests.support.grpc_service import bearer
from tests.support.llm_server import LlmServer
from tests.support.polling import WITHIN_S, until
from tests.support.servers import Servers
from tests.support.site import SAMPLE_STORY
from workers.clients.nats import open_nats
from workers.search_attributes import register
from workers.settings import Settings
from workflows.models.ids import story_workflow_id
from workflows.models.story import StoryInput
from workflows.story import StoryWorkflow
from workflows.stubs import STORY_QUEUE

METRIC = re.compile(r"\b(?:(?:fleet|temporal|process)_\w+|up\b)")


@dataclass(frozen=True)
class Scraped:
    """A fleet that has worked, and where its metrics are."""

    environment: Environment
    llm: LlmServer

    async def text(self) -> str:
        """Read the metrics as Prometheus does."""
        async with httpx.AsyncClient(trust_env=False) as http:
            url = f"http://127.0.0.1:{self.environment['HEALTH_PORT']}/metrics"
            return (await http.get(url)).raise_for_status().text

    async def value(self, name: str, **labels: str) -> float:
        """Return the sum of the samples that have these labels."""
        wanted = labels.items()
        families = text_string_to_metric_families(await self.text())
        samples = [sample for family in families for sample in family.samples]
        return sum(
            each.value for each in samples if each.name == name and wanted <= each.labels.items()
        )


@pytest.fixture(scope="module")
async def fleet(servers: Servers) -> AsyncIterator[Scraped]:
    """Run a fleet that has deliberated, and has a story at its first gate."""
    health, temporal = free_ports(2)
    async with LlmServer() as llm:
        llm.fail("status", status=500)
        environment = await new_environment(
            servers, llm, HEALTH_PORT=str(health), TEMPORAL_METRICS_PORT=str(temporal)
        )
        async with whole_fleet(environment):
            await deliberated(environment)
            await waiting_story(environment)
            await failed_workflow_task(environment)
            yield Scraped(environment, llm)


def nats_settings(servers: Servers) -> Settings:
    return Settings.model_validate(
        {
            "nats_url": servers.nats.address,
            "nats_user": servers.nats.user,
            "nats_password": servers.nats.password,
        }
    )


async def deliberated(environment: Environment) -> None:
    address = f"127.0.0.1:{environment['GRPC_ORCHESTRATOR_PORT']}"
    async with grpc.aio.insecure_channel(address) as channel:
        stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
        await stub.Deliberate(
            pb.DeliberateRequest(
                task_description="Write a function that adds two numbers", role="DEV"
            ),
            metadata=bearer("ana", "DEV"),
            timeout=WITHIN_S,
        )


async def waiting_story(environment: Environment) -> str:
    """Start a story and wait until it is at its first gate."""
    client = await connect(environment["TEMPORAL_ADDRESS"], environment["TEMPORAL_NAMESPACE"])
    story_id = f"US-{uuid.uuid4().hex[:8]}"
    sample = StoryInput.model_validate_json(SAMPLE_STORY.read_text())
    handle = await client.start_workflow(
        StoryWorkflow.run,
        sample.model_copy(update={"story_id": story_id}),
        id=story_workflow_id(story_id),
        task_queue=STORY_QUEUE,
    )
    await until(lambda: handle.query(StoryWorkflow.state), lambda view: view.pending_gate)
    return story_id


async def failed_workflow_task(environment: Environment) -> None:
    """Start a workflow that no worker knows: its workflow tasks fail."""
    client = await connect(environment["TEMPORAL_ADDRESS"], environment["TEMPORAL_NAMESPACE"])
    handle = await client.start_workflow("Unknown", id="unknown", task_queue=STORY_QUEUE)

    async def failed() -> bool:
        kinds = {event.event_type async for event in handle.fetch_history_events()}
        return EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED in kinds

    await until(failed)
    await handle.terminate()


@pytest.mark.parametrize("name", PANELS)
async def test_every_metric_of_a_dashboard_is_exported(fleet: Scraped, name: str) -> None:
    named = {
        metric
        for panel in PANELS[name]
        for each in panel.queries.values()
        for metric in METRIC.findall(each)
    }

    assert named
    assert named <= exported(await fleet.text())


async def test_every_metric_of_an_alert_is_exported(fleet: Scraped) -> None:
    rules = yaml.safe_load((HERE / "rules.yaml").read_text())["groups"][0]["rules"]
    named = {metric for rule in rules for metric in METRIC.findall(rule["expr"])}

    assert len(named) > 10
    assert named - {"up"} <= exported(await fleet.text())  # Prometheus makes `up` itself


def exported(text: str) -> set[str]:
    """Return the names of the samples."""
    return set(re.findall(r"^(\w+)[ {]", text, re.MULTILINE))


async def test_a_gate_that_waits_long_is_counted(
    fleet: Scraped, monkeypatch: pytest.MonkeyPatch, servers: Servers
) -> None:
    client = await connect(
        fleet.environment["TEMPORAL_ADDRESS"], fleet.environment["TEMPORAL_NAMESPACE"]
    )
    machine = load_config().machine
    waits = {"none": timedelta(), "long": timedelta(minutes=30)}
    monkeypatch.setattr("bridge.fleet_metrics.WAITED", waits)
    async with open_nats(nats_settings(servers)) as nats:
        metrics = FleetMetrics(client, nats.jetstream(), machine)

        async def counted() -> tuple[float | None, ...]:
            await metrics.measure()
            return tuple(
                REGISTRY.get_sample_value("fleet_gates_waiting_long", {"longer_than": name})
                for name in waits
            )

        await until(counted, lambda found: (found[0] or 0) >= 1 and found[1] == 0)


async def test_tasks_that_no_worker_takes_are_a_backlog(servers: Servers, namespace: str) -> None:
    client = await connect(servers.temporal.address, namespace)
    await register(client)
    await client.start_workflow("StoryWorkflow", id="story-US-1", task_queue=STORY_QUEUE)
    async with open_nats(nats_settings(servers)) as nats:
        metrics = FleetMetrics(client, nats.jetstream(), load_config().machine)

        async def counted() -> tuple[float | None, float | None]:
            await metrics.measure()
            queue = {"queue": STORY_QUEUE}
            return (
                REGISTRY.get_sample_value("fleet_task_queue_backlog", queue),
                REGISTRY.get_sample_value("fleet_task_queue_backlog_age_seconds", queue),
            )

        await until(counted, lambda found: found[0] == 1 and (found[1] or 0) > 0)


async def test_stories_are_counted_by_state_and_gate(fleet: Scraped) -> None:
    await until(lambda: fleet.value("fleet_stories", state="DRAFT"), lambda found: found >= 1)

    assert await fleet.value("fleet_gates_waiting", gate="approve_scope") >= 1
    assert await fleet.value("fleet_gates_waiting_long", longer_than="1h") == 0
    assert await fleet.value("fleet_stories", state="other") == 0


async def test_requests_to_agents_are_counted_with_their_tokens(fleet: Scraped) -> None:
    answered = sum(call.end == "answered" for call in fleet.llm.calls)

    assert await fleet.value("fleet_agent_requests_total", outcome="answered") == answered
    assert await fleet.value("fleet_agent_requests_total", outcome="LlmServerError") == 1
    assert await fleet.value("fleet_agent_request_seconds_count", act="propose") >= 2
    for kind in ("input", "output"):
        assert await fleet.value("fleet_agent_tokens_total", model="test-model", kind=kind) > 0


async def test_the_outbox_is_empty_once_its_events_are_published(fleet: Scraped) -> None:
    published = await fleet.value("fleet_events_published_total", subject="planning.story.created")

    assert published >= 1
    for step in ("record", "publish"):
        assert await fleet.value("fleet_outbox_lag_seconds_count", step=step) > 0
        await until(lambda: fleet.value("fleet_outbox_waiting", step=step), lambda n: n == 0)  # noqa: B023
        assert await fleet.value("fleet_outbox_oldest_seconds", step=step) == 0


async def test_the_outbox_shows_what_waits_for_nats(fleet: Scraped, servers: Servers) -> None:
    await servers.nats.stop()
    began = time.monotonic()
    try:
        await waiting_story(fleet.environment)
        await until(lambda: fleet.value("fleet_outbox_waiting", step="publish"))
        oldest = await fleet.value("fleet_outbox_oldest_seconds", step="publish")
        assert 0 < oldest <= time.monotonic() - began + 1
    finally:
        await servers.nats.start()
    await until(lambda: fleet.value("fleet_outbox_waiting", step="publish"), lambda n: n == 0)


async def test_dead_letters_are_counted(fleet: Scraped, servers: Servers) -> None:
    async with open_nats(nats_settings(servers)) as nats:
        await nats.jetstream().publish("planning.story.transitioned", b"not JSON")

    await until(lambda: fleet.value("fleet_dead_letters"), lambda found: found >= 1)
