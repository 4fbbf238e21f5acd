"""The context service over a real channel, on the real stack."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nats.aio.client import Client as Nats
from nats.js import JetStreamContext
from neo4j import AsyncDriver
from redis.asyncio import Redis
from temporalio.client import Client
from temporalio.worker import Worker

from activities.cache import pack_key
from activities.graph.activities import Graph
from activities.graph.context_update.payloads import PAYLOADS
from activities.heartbeats import Heartbeats
from bridge.grpc.context.servicer import ContextServicer
from bridge.grpc.requests import Requests
from bridge.grpc.server import Served
from bridge.grpc.wire import context_pb2 as pb
from bridge.grpc.wire import context_pb2_grpc
from bridge.jetstream.streams import reconcile
from bridge.mirror.announcer import Announcer
from bridge.mirror.publisher import Mirror
from bridge.mirror.source import Source
from deploy.local.parts import DEVELOPER_ROLES
from tests.support.fleet import connect
from tests.support.grpc_service import bearer, problem, serving
from tests.support.polling import WITHIN_S, until
from tests.support.servers import Servers
from tests.support.stories import batch, deliberation, new_story, plan, rows, spec
from workers.processes.context import CALLS_AT_ONCE
from workers.workflow_runner import Runner
from workflows.context_update import ContextUpdateWorkflow
from workflows.models.context import ContextChange, ContextUpdate, ContextWrite, PackQuery
from workflows.models.events import ContextUpdated
from workflows.story import StoryWorkflow
from workflows.stubs import BRIDGE_QUEUE, CONTEXT_QUEUE, STORY_QUEUE


class Service:
    """A client of the four methods with a developer's token; keyword arguments form the request."""

    def __init__(self, channel: grpc.aio.Channel, actor: str = "ana") -> None:
        self.stub: Any = context_pb2_grpc.ContextServiceStub(channel)
        self.metadata = bearer(actor, *DEVELOPER_ROLES)

    async def get(self, story_id: str, role: str = "DEV", phase: str = "BUILD", **more: Any) -> Any:
        request = pb.GetContextRequest(story_id=story_id, role=role, phase=phase, **more)
        return await self.stub.GetContext(request, metadata=self.metadata)

    async def update(
        self,
        story_id: str,
        *changes: pb.ContextChange,
        request_id: str = "",
        timeout: float | None = WITHIN_S,
        **more: Any,
    ) -> Any:
        request = pb.UpdateContextRequest(story_id=story_id, changes=changes, **more)
        metadata = (*self.metadata, *([("x-request-id", request_id)] if request_id else []))
        return await self.stub.UpdateContext(request, metadata=metadata, timeout=timeout)

    async def rehydrate(self, case_id: str, *roles: str, **more: Any) -> Any:
        options = {"include_timeline": True, "include_summaries": True} | more
        request = pb.RehydrateSessionRequest(case_id=case_id, roles=roles, **options)
        return await self.stub.RehydrateSession(request, metadata=self.metadata)

    async def validate(self, role: str, phase: str, *provided: str) -> Any:
        request = pb.ValidateScopeRequest(role=role, phase=phase, provided_scopes=provided)
        return await self.stub.ValidateScope(request, metadata=self.metadata)


def change(operation: str, entity_type: str, entity_id: str = "", **payload: Any) -> Any:
    return pb.ContextChange(
        operation=operation,
        entity_type=entity_type,
        entity_id=entity_id,
        payload=json.dumps(payload),
        reason="a test",
    )


def created(**payload: Any) -> Any:
    return change("CREATE", "CASE", **({"title": "Log in", "description": "A form"} | payload))


def planned() -> list[Any]:
    """Return the changes that create a plan, two tasks, three decisions and a milestone."""
    return [
        change("CREATE", "PLAN", "plan-1", status="APPROVED"),
        change("CREATE", "SUBTASK", "t-1", title="The schema", role="DATA", priority=1),
        change(
            "CREATE", "SUBTASK", "t-2", title="The form", role="developer", dependencies=["t-1"]
        ),
        change("CREATE", "DECISION", "d-1", title="One table", rationale="Enough", affects=["t-1"]),
        change("CREATE", "DECISION", "d-2", title="No SMS", rationale="Cost"),
        change("CREATE", "DECISION", "d-3", title="An index", affects=["The Form", "one table"]),
        change("CREATE", "MILESTONE", "m-1", event_type="DEMO", description="Shown", actor="bo"),
    ]


@pytest.fixture
async def temporal_client(servers: Servers, namespace: str) -> Client:
    return await connect(servers.temporal.address, namespace)


@pytest.fixture
async def bus(nats_client: Nats, jetstream: JetStreamContext) -> JetStreamContext:
    await reconcile(jetstream, replicas=1)
    return jetstream


def storing(temporal: Client, graph: Graph) -> list[Worker]:
    """Return workers for the queues `story` and `context`, which is all that an answer needs."""
    return [
        Worker(
            temporal,
            task_queue=STORY_QUEUE,
            workflows=[ContextUpdateWorkflow, StoryWorkflow],
            workflow_runner=Runner(),
        ),
        Worker(
            temporal,
            task_queue=CONTEXT_QUEUE,
            activities=[graph.update_context, graph.record],
            max_concurrent_activities=CALLS_AT_ONCE,
            interceptors=[Heartbeats()],
        ),
    ]


def mirroring(temporal: Client, nats: Nats, graph: Graph) -> Worker:
    mirror = Mirror(nats, Source("c-1", temporal.namespace))
    return Worker(
        temporal,
        task_queue=BRIDGE_QUEUE,
        activities=[Announcer(graph, mirror).announce, mirror.publish],
        interceptors=[Heartbeats()],
    )


@pytest.fixture
async def service(temporal_client: Client, graph: Graph, client: Redis) -> AsyncIterator[Service]:
    """Serve the service with the workers that its answers need; no events are published."""
    story, context = storing(temporal_client, graph)
    requests = Requests(client)
    server = serving(served(temporal_client, graph), requests=requests)
    async with server as channel, story, context:
        yield Service(channel)


def served(temporal: Client, graph: Graph) -> Served:
    return Served(
        "fleet.context.v1.ContextService",
        ContextServicer(temporal, graph),
        context_pb2_grpc.add_ContextServiceServicer_to_server,
    )


@pytest.fixture
def story() -> str:
    return new_story()


async def nodes(driver: AsyncDriver, story_id: str) -> int:
    """Count the nodes that belong to the story, including its own."""
    found = await rows(
        driver,
        "MATCH (n) WHERE $story IN [n.case_id, n.story_id, n.id] RETURN count(n)",
        story=story_id,
    )
    return int(found[0][0])


async def entities(driver: AsyncDriver, story_id: str) -> list[str]:
    """Return the ids of the story's plans, subtasks, decisions and milestones, deleted or not."""
    found = await rows(
        driver,
        "MATCH (n:PlanVersion|Subtask|Decision|Event {case_id: $story}) "
        "WHERE coalesce(n.event_type, '') <> 'context.updated' RETURN n.id ORDER BY n.id",
        story=story_id,
    )
    return [row[0] for row in found]


async def settled(client: Redis, story_id: str, updates: int) -> None:
    """Wait until that many updates have dropped the story's packs: when stored, when published."""
    await until(
        lambda: client.get(f"context:{story_id}:generation"),
        lambda generation: int(generation or 0) >= 2 * updates,
    )


async def refusal(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


# --- UpdateContext --------------------------------------------------------------------------------


async def test_a_case_its_plan_subtasks_decisions_and_milestones_are_stored(
    service: Service, driver: AsyncDriver, story: str
) -> None:
    answer = await service.update(story, created(), *planned())

    assert (answer.version, list(answer.warnings)) == (1, [])
    assert len(answer.hash) == 16
    case = await rows(
        driver,
        "MATCH (s:Case:Story {id: $story})-[:HAS_PLAN]->(p)-[:HAS_SUBTASK]->(t) "
        "RETURN s.title, s.status, s.created_by, p.id, p.version, p.status, t.id, t.role, t.status "
        "ORDER BY t.id",
        story=story,
    )
    begun = ["Log in", "DRAFT", "ana", "plan-1", 1, "APPROVED"]
    assert case == [[*begun, "t-1", "DATA", "PENDING"], [*begun, "t-2", "DEV", "PENDING"]]
    edges = await rows(
        driver,
        "MATCH (d:Decision {case_id: $story})-[e:AFFECTS|DEPENDS_ON]->(o) "
        "RETURN d.id, type(e), o.id ORDER BY d.id, o.id",
        story=story,
    )
    assert edges == [
        ["d-1", "AFFECTS", "t-1"],
        ["d-3", "DEPENDS_ON", "d-1"],
        ["d-3", "AFFECTS", "t-2"],
    ]
    kept = await rows(
        driver,
        "MATCH (u:ContextUpdate)-[:OF]->(:Story {id: $story}) RETURN u.version, u.actor, u.changes",
        story=story,
    )
    assert [row[:2] for row in kept] == [[1, "ana"]]
    assert "CREATE DECISION d-2: a test" in kept[0][2]


async def test_a_version_grows_with_every_update_of_clients_and_workflows(
    service: Service, graph: Graph, story: str
) -> None:
    first = await service.update(story, created())
    second = await service.update(story, change("UPDATE", "CASE", title="Sign in"))
    await graph.record(
        batch(story, ContextUpdated(story_id=story, version=7, changed=["CASE"], timestamp=NOW))
    )
    await graph.record(
        batch(story, ContextUpdated(story_id=story, version=2**40, changed=[], timestamp=NOW))
    )
    third = await service.update(story, change("UPDATE", "CASE", title="Sign on"))

    assert [first.version, second.version, third.version] == [1, 2, 8]
    assert len({first.hash, second.hash, third.hash}) == 3


NOW = "2026-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (pb.ContextChange(operation="CREATE", entity_type="DECISION", entity_id="d-9",
                          payload="{not json"), "payload"),
        (pb.ContextChange(operation="CREATE", entity_type="DECISION", entity_id="d-9",
                          payload="[1]"), "payload"),
        (pb.ContextChange(operation="CREATE", entity_type="DECISION", entity_id="d-9",
                          payload='{"title": "\\ud800"}'), "payload"),
        (change("CREATE", "DECISION", "d-9"), "payload.title: required"),
        (change("CREATE", "DECISION", "d-9", title=7), "title"),
        (change("CREATE", "DECISION", "d-9", title="x" * 301), "title"),
        (change("CREATE", "DECISION", "d-9", title="x", status="DELETED"), "status"),
        (change("CREATE", "DECISION", "a  b", title="x"), "entity_id"),
        (change("CREATE", "DECISION", "", title="x"), "entity_id"),
        (change("INVENT", "DECISION", "d-9", title="x"), "operation: 'INVENT'"),
        (change("CREATE", "EPIC", "d-9", title="x"), "entity_type: 'EPIC'"),
        (change("UPDATE", "MILESTONE", "m-9", event_type="x"), "no MILESTONE m-9"),
        (change("DELETE", "DECISION", "d-9"), "no DECISION d-9"),
        (change("CREATE", "SUBTASK", "t-9", title="x", depends_on=["t-9"]), "itself"),
        (change("UPDATE", "CASE"), "nothing to change"),
        (change("CREATE", "MILESTONE", "m-9", event_type="x", timestamp_ms=2**70), "timestamp_ms"),
        (pb.ContextChange(operation="CREATE", entity_type="DECISION", entity_id="d-9",
                          payload='{"title": "a" "b"}'), "payload: is not JSON"),
        (change("CREATE", "DECISION", "d-9", title="x", decided_at="{error}"), "ISO 8601"),
    ],
)  # fmt: skip
async def test_a_bad_change_is_one_warning_and_the_others_are_stored(
    service: Service, driver: AsyncDriver, story: str, bad: Any, words: str
) -> None:
    good = change("CREATE", "DECISION", "d-1", title="One table")

    answer = await service.update(story, created(), bad, good)

    (warning,) = answer.warnings
    assert warning.startswith(f"change 1 ({bad.operation} {bad.entity_type}")
    assert words in warning
    stored = await rows(
        driver,
        "MATCH (d:Decision {case_id: $story}) RETURN d.id",
        story=story,
    )
    assert stored == [["d-1"]]


async def test_an_unknown_story_is_not_found_and_nothing_is_stored(
    service: Service, driver: AsyncDriver, story: str
) -> None:
    error = await refusal(service.update(story, *(planned()[-2:])))

    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert "not found" in (error.details() or "")
    assert story in (error.details() or "")
    assert problem(error)[0] == "UnknownStory"
    assert await nodes(driver, story) == 0


async def test_a_case_that_cannot_be_created_gives_the_reason(
    service: Service, driver: AsyncDriver, story: str
) -> None:
    error = await refusal(service.update(story, change("CREATE", "CASE"), *(planned()[-2:])))

    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert "payload.title: required" in (error.details() or "")
    assert await nodes(driver, story) == 0


async def test_the_case_may_come_after_what_belongs_to_it(
    service: Service, driver: AsyncDriver, story: str
) -> None:
    answer = await service.update(story, *planned(), created())

    assert list(answer.warnings) == []
    assert (await service.get(story)).blocks.context.startswith("## Story\n**Log in**")


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"story_id": ""}, "story_id"),
        ({"story_id": "a/story"}, "story_id"),
        ({"task_id": "no/id"}, "task_id"),
        ({"timestamp": "yesterday"}, "timestamp"),
        ({"timestamp": "2999-01-01T00:00:00Z"}, "timestamp"),
        ({"timestamp": "1066-01-01T00:00:00Z"}, "timestamp"),
        ({"role": "x" * 101}, "role"),
    ],
)
async def test_a_request_that_breaks_a_rule_is_refused_whole(
    service: Service, driver: AsyncDriver, story: str, more: dict[str, Any], field: str
) -> None:
    request = {"story_id": story} | more

    error = await refusal(service.update(request.pop("story_id"), created(), **request))

    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = problem(error)[1][1].field_violations
    assert violation.field == field
    assert "InvalidEntry" not in violation.description
    assert await nodes(driver, story) == 0


async def test_a_request_sent_again_gets_its_answer_and_another_one_is_refused(
    service: Service, driver: AsyncDriver, story: str, temporal_client: Client
) -> None:
    await service.update(story, created())
    decision = change("CREATE", "DECISION", "d-1", title="One table")

    answers = await asyncio.gather(
        *(service.update(story, decision, request_id=f"{story} 1") for _ in range(5))
    )
    again = await service.update(story, decision, request_id=f"{story} 1")
    other = await refusal(service.update(story, created(), request_id=f"{story} 1"))

    assert {answer.version for answer in (*answers, again)} == {2}
    assert all(answer == again for answer in answers)
    assert other.code() == grpc.StatusCode.ALREADY_EXISTS
    assert "x-request-id" in (other.details() or "")


async def test_a_refused_request_is_tried_again_or_corrected_under_its_id(
    service: Service, story: str
) -> None:
    decision = change("CREATE", "DECISION", "d-1", title="One table")
    refused = [
        await refusal(service.update(story, decision, request_id=name))
        for name in (f"{story} 1", f"{story} 2")
    ]
    await service.update(story, created())

    again = await service.update(story, decision, request_id=f"{story} 1")
    corrected = await service.update(
        story, change("CREATE", "DECISION", "d-2", title="Two tables"), request_id=f"{story} 2"
    )

    assert {error.code() for error in refused} == {grpc.StatusCode.NOT_FOUND}
    assert (again.version, corrected.version) == (2, 3)


async def test_a_retry_after_the_commit_answers_the_same(graph: Graph, story: str) -> None:
    update = ContextUpdate(story_id=story, actor="ana", changes=[as_model(created())])
    write = ContextWrite(update_id=f"context-{story}-1", at=NOW, started_ms=1, update=update)

    first = await graph.update_context(write)
    second = await graph.update_context(write.model_copy(update={"started_ms": 9}))

    assert first == second
    assert first.version == 1


def as_model(change: Any) -> ContextChange:
    return ContextChange(
        operation=change.operation,
        entity_type=change.entity_type,
        entity_id=change.entity_id,
        payload=change.payload,
        reason=change.reason,
    )


async def test_an_older_update_replaces_nothing_newer(
    service: Service, driver: AsyncDriver, story: str
) -> None:
    await service.update(story, created(), timestamp="2026-03-01T10:00:00Z")
    await service.update(
        story,
        change("UPDATE", "CASE", title="Newer", status="BUILD"),
        timestamp="2026-03-01T12:00:00Z",
    )

    answer = await service.update(
        story, change("UPDATE", "CASE", title="Older"), timestamp="2026-03-01T11:00:00Z"
    )

    assert "newer" in answer.warnings[0]
    found = await rows(driver, "MATCH (s:Story {id: $story}) RETURN s.title, s.status", story=story)
    assert found == [["Newer", "BUILD"]]


async def test_a_delete_is_soft_and_a_create_brings_it_back(
    service: Service, driver: AsyncDriver, story: str
) -> None:
    await service.update(story, created(), *planned())

    await service.update(story, *(change("DELETE", kind, name) for kind, name in EACH))
    stored = await entities(driver, story)
    gone = await service.rehydrate(story, "DEV", "DATA")
    await service.update(story, *planned())
    back = await service.rehydrate(story, "DEV", "DATA")

    for pack in gone.packs.values():
        assert not pack.HasField("plan_header")
        assert not any((pack.subtasks, pack.decisions, pack.impacted, pack.milestones))
    assert gone.stats.decisions == 0
    assert [each.subtask_id for each in back.packs["DEV"].subtasks] == ["t-2"]
    assert back.stats.decisions == 3
    assert back.packs["DEV"].milestones[0].event_type == "DEMO"
    assert await entities(driver, story) == stored == sorted(name for _, name in EACH)


async def test_what_is_created_again_has_nothing_of_what_was_deleted(
    service: Service, driver: AsyncDriver, story: str
) -> None:
    await service.update(story, created(acceptance_criteria=["It works"]), *planned())
    await service.update(story, change("CREATE", "PLAN", "plan-2"))
    gone = [("SUBTASK", "t-2"), ("DECISION", "d-1"), ("DECISION", "d-3"), ("MILESTONE", "m-1")]
    await service.update(story, *(change("DELETE", *each) for each in [*gone, ("CASE", "")]))

    answer = await service.update(
        story,
        change("CREATE", "CASE", title="Anew"),
        change("CREATE", "SUBTASK", "t-2"),
        change("CREATE", "DECISION", "d-1", title="New"),
        change("CREATE", "DECISION", "d-3", title="New too"),
        change("CREATE", "MILESTONE", "m-1", event_type="END"),
    )

    assert list(answer.warnings) == []
    left = await rows(
        driver,
        "MATCH (n {case_id: $story}) WHERE n.id IN $ids RETURN n.id, [key IN keys(n) "
        "WHERE n[key] IN ['The form', 'DEV', 'Enough', 'Shown', 'bo', ['t-1']]], "
        "COLLECT { MATCH (n)-[e]-(o) WHERE NOT o:ContextUpdate RETURN type(e) + ' ' + o.id "
        "ORDER BY type(e), o.id } ORDER BY n.id",
        story=story,
        ids=["t-2", "d-1", "d-3", "m-1"],
    )
    assert left == [
        ["d-1", [], ["CONTAINS_DECISION plan-2", f"OF {story}"]],
        ["d-3", [], ["CONTAINS_DECISION plan-2", f"OF {story}"]],
        ["m-1", [], [f"OF {story}"]],
        ["t-2", [], ["HAS_SUBTASK plan-2"]],
    ]
    header = (await service.rehydrate(story, "DEV")).packs["DEV"].case_header
    assert (header.title, header.description) == ("Anew", "")


async def test_a_ring_of_subtasks_is_not_closed_by_a_later_request_either(
    service: Service, story: str
) -> None:
    await service.update(story, created(), *planned())  # t-2 depends on t-1

    ring = await service.update(story, change("UPDATE", "SUBTASK", "t-1", depends_on=["t-2"]))
    await service.update(story, change("DELETE", "SUBTASK", "t-2"))
    line = await service.update(story, change("UPDATE", "SUBTASK", "t-1", depends_on=["t-2"]))

    assert "ring" in ring.warnings[0]
    assert list(line.warnings) == []


async def test_who_made_a_case_never_changes_and_the_rest_of_the_change_is_stored(
    service: Service, story: str
) -> None:
    await service.update(story, created())

    answer = await service.update(
        story, change("UPDATE", "CASE", title="Sign in", createdBy="eve", createdAt="2026-01-01")
    )

    (warning,) = answer.warnings
    assert "payload.created_by, payload.created_at: never changes" in warning
    header = (await service.rehydrate(story, "DEV")).packs["DEV"].case_header
    assert (header.title, header.created_by) == ("Sign in", "ana")


EACH = [
    ("PLAN", "plan-1"),
    ("SUBTASK", "t-1"),
    ("SUBTASK", "t-2"),
    ("DECISION", "d-1"),
    ("DECISION", "d-2"),
    ("DECISION", "d-3"),
    ("MILESTONE", "m-1"),
]


async def test_a_deleted_case_is_not_found_until_it_is_created_again(
    service: Service, story: str
) -> None:
    await service.update(story, created())
    await service.get(story)

    await service.update(story, change("DELETE", "CASE"))

    for call in (
        service.get(story),
        service.rehydrate(story),
        service.update(story, change("UPDATE", "CASE", title="x")),
    ):
        error = await refusal(call)
        assert error.code() == grpc.StatusCode.NOT_FOUND
        assert (error.details() or "").startswith(f"case not found: {story}")
    await service.update(story, created(title="Again"))
    assert "**Again**" in (await service.get(story)).context


async def test_two_hundred_clients_at_once_have_no_error_and_distinct_versions(
    service: Service, story: str
) -> None:
    await service.update(story, created())

    answers = await asyncio.gather(
        *(
            service.update(story, change("CREATE", "DECISION", f"d-{n}", title=f"Decision {n}"))
            for n in range(200)
        )
    )

    assert sorted(answer.version for answer in answers) == list(range(2, 202))
    assert not any(answer.warnings for answer in answers)


async def test_it_answers_while_nats_is_away_and_announces_when_it_is_back(
    service: Service,
    story: str,
    temporal_client: Client,
    nats_client: Nats,
    bus: JetStreamContext,
    driver: AsyncDriver,
    graph: Graph,
) -> None:
    answer = await service.update(story, created(), change("CREATE", "DECISION", "d", title="D"))

    assert (await bus.stream_info("CONTEXT")).state.messages == 0  # no mirror runs yet
    subscription = await bus.subscribe("context.updated")
    async with mirroring(temporal_client, nats_client, graph):
        message = await subscription.next_msg(timeout=WITHIN_S)
        recorded = await rows(
            driver,
            "MATCH (e:Event {case_id: $story})-[:OF]->(s) RETURN e.event_type, s.context_version",
            story=story,
        )

    body = json.loads(message.data)
    body.pop("timestamp")
    assert body == {"story_id": story, "version": answer.version, "changed": ["CASE", "DECISION"]}
    assert recorded == [["context.updated", 1]]
    assert (message.headers or {})["ce-subject"] == story


async def test_a_call_ends_by_its_deadline_and_its_work_goes_on(
    temporal_client: Client, graph: Graph, story: str
) -> None:
    async with serving(served(temporal_client, graph)) as channel:
        service = Service(channel)

        error = await refusal(service.update(story, created(), request_id="late", timeout=5))

        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        story_worker, context_worker = storing(temporal_client, graph)
        async with story_worker, context_worker:
            answer = await service.update(story, created(), request_id="late")
    assert answer.version == 1


async def test_a_running_story_receives_new_decisions_and_milestones(
    service: Service, temporal_client: Client, story: str
) -> None:
    running = await temporal_client.start_workflow(
        "StoryWorkflow",
        {"story_id": story, "title": "Log in"},
        id=f"story-{story}",
        task_queue="no-worker-takes-it",
    )

    await service.update(story, *planned())

    async def signals() -> list[str]:
        history = await running.fetch_history()
        return [
            event.workflow_execution_signaled_event_attributes.signal_name
            for event in history.events
            if event.HasField("workflow_execution_signaled_event_attributes")
        ]

    received = await until(signals, lambda names: len(names) >= 4)
    assert received == ["context_updated", "add_decisions", "add_milestones", "hand_on"]


# --- GetContext -----------------------------------------------------------------------------------


async def test_a_pack_has_blocks_scopes_tokens_and_a_version(service: Service, story: str) -> None:
    await service.update(story, created(), *planned())

    pack = await service.get(story, "developer", "build")

    assert "DEV" in pack.blocks.system
    assert "**The form**" in pack.blocks.context
    assert "no tools" in pack.blocks.tools
    assert all(
        block in pack.context
        for block in (pack.blocks.system, pack.blocks.context, pack.blocks.tools)
    )
    assert list(pack.scopes[:3]) == ["CASE_HEADER", "PLAN_HEADER", "SUBTASKS_ROLE"]
    assert 0 < pack.token_count <= 700
    assert len(pack.version) == 16
    small = await service.get(story, "DEV", "BUILD", token_budget=60, subtask_id="t-2")
    assert small.token_count < pack.token_count
    assert small.version != pack.version


async def test_a_pack_is_cached_until_the_context_is_updated(
    service: Service, driver: AsyncDriver, client: Redis, story: str
) -> None:
    await service.update(story, created())
    await settled(client, story, updates=1)
    first = await service.get(story)
    await rows(driver, "MATCH (s:Story {id: $story}) SET s.title = 'Unseen'", story=story)

    assert await service.get(story) == first
    assert await client.exists(pack_key(story, "DEV", "BUILD"))

    await service.update(story, change("CREATE", "DECISION", "d-1", title="One table"))

    assert "One table" in (await service.get(story)).context


async def test_an_unknown_or_placeholder_story_has_no_context(
    service: Service, graph: Graph, client: Redis, story: str
) -> None:
    unknown = await refusal(service.get(story))
    await graph.record(
        batch(story, ContextUpdated(story_id=story, version=1, changed=[], timestamp=NOW))
    )
    placeholder = await refusal(service.get(story))
    workflows_own = await graph.build_pack(query_of(story))
    after = await refusal(service.get(story))

    for error in (unknown, placeholder, after):
        assert error.code() == grpc.StatusCode.NOT_FOUND
        assert error.details() == f"case not found: {story}"
    assert "Nothing is recorded of this story." in workflows_own.context
    assert not await client.exists(pack_key(story, "DEV", "BUILD"))


async def test_only_packs_of_known_roles_and_phases_are_cached(
    service: Service, client: Redis, story: str
) -> None:
    await service.update(story, created())
    await settled(client, story, updates=1)

    for role, phase in (("COOK", "BUILD"), ("DEV", "LUNCH"), ("developer", "BUILD")):
        assert "**Log in**" in (await service.get(story, role, phase)).context

    assert await client.smembers(f"context:{story}:packs") == {
        pack_key(story, "DEV", "BUILD").encode()
    }


def query_of(story: str) -> PackQuery:
    return PackQuery(story_id=story, role="DEV", phase="BUILD")


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"story_id": ""}, "story_id"),
        ({"story_id": "../x"}, "story_id"),
        ({"role": ""}, "role"),
        ({"phase": " "}, "phase"),
        ({"subtask_id": "a  b"}, "subtask_id"),
        ({"token_budget": -1}, "token_budget"),
        ({"token_budget": 100_001}, "token_budget"),
    ],
)
async def test_a_pack_asked_for_wrongly_is_refused(
    service: Service, story: str, more: dict[str, Any], field: str
) -> None:
    error = await refusal(service.get(**({"story_id": story} | more)))

    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert [each.field for each in problem(error)[1][1].field_violations] == [field]


# --- RehydrateSession -----------------------------------------------------------------------------


async def test_each_role_gets_its_own_and_stats_count_each_thing_once(
    service: Service, graph: Graph, story: str
) -> None:
    await graph.record(batch(story, spec(story), plan(story)))
    await graph.record_deliberation(deliberation(story))
    await service.update(
        story,
        change("CREATE", "DECISION", "d-9", title="No SMS"),
        change("UPDATE", "SUBTASK", f"{story}-t1", status="DONE"),
    )

    answer = await service.rehydrate(story, "developer", "DATA", "QA", "ARCHITECT", "COOK")

    assert set(answer.packs) == {"developer", "DATA", "QA", "ARCHITECT", "COOK"}
    dev, data, cook = (answer.packs[role] for role in ("developer", "DATA", "COOK"))
    assert dev.role == "DEV"
    assert (dev.case_header.case_id, dev.case_header.title) == (story, "Log in")
    assert (dev.case_header.description, dev.case_header.created_by) == ("With a password", "ana")
    header = dev.plan_header
    assert (header.plan_id, header.version, header.status) == ("plan-1", 1, "DRAFT")
    assert (header.total_subtasks, header.completed_subtasks) == (2, 1)
    (task,) = dev.subtasks
    assert (task.subtask_id, task.role, list(task.dependencies)) == (
        f"{story}-t2",
        "DEV",
        [f"{story}-t1"],
    )
    assert [each.subtask_id for each in data.subtasks] == [f"{story}-t1"]
    assert not answer.packs["QA"].subtasks
    # d1 affects the form (a DEV task); d2 and d-9 name no subtask; d2 depends on d1.
    assert {each.id for each in dev.decisions} == {f"{story}-d1", f"{story}-d2", "d-9"}
    assert [(each.src_id, each.dst_id) for each in dev.decision_deps] == [
        (f"{story}-d2", f"{story}-d1")
    ]
    assert {(each.decision_id, each.subtask_id) for each in dev.impacted} == {
        (f"{story}-d1", f"{story}-t1"),
        (f"{story}-d1", f"{story}-t2"),
    }
    assert dev.last_summary == "approach 1"
    assert dev.token_budget_hint == 700
    assert cook.case_header == dev.case_header
    assert not any((cook.subtasks, cook.decisions, cook.milestones, cook.last_summary))
    stats = answer.stats
    assert (stats.decisions, stats.decision_edges, stats.impacts) == (3, 1, 2)
    assert list(stats.roles) == sorted(answer.packs)
    assert abs(answer.generated_at_ms / 1000 - datetime.now(UTC).timestamp()) < 60


async def test_a_role_gets_decisions_that_its_own_build_on_but_not_those_that_affect_only_others(
    service: Service, story: str
) -> None:
    await service.update(story, created(), *planned())

    answer = await service.rehydrate(story, "DEV", "DATA", "DEVOPS", "QA")

    ids = {role: {each.id for each in pack.decisions} for role, pack in answer.packs.items()}
    assert ids == {
        "DEV": {"d-1", "d-2", "d-3"},  # d-3 affects a DEV task and depends on d-1
        "DATA": {"d-1", "d-2"},
        "DEVOPS": {"d-2"},
        "QA": {"d-1", "d-2", "d-3"},
    }


async def test_packs_and_sessions_count_the_same_subtasks_as_done(
    service: Service, story: str
) -> None:
    await service.update(story, created(), *planned())
    await service.update(story, change("UPDATE", "SUBTASK", "t-1", status="completed"))

    header = (await service.rehydrate(story, "DEV")).packs["DEV"].plan_header

    assert (header.completed_subtasks, header.total_subtasks) == (1, 2)
    assert "1 of 2 tasks done" in (await service.get(story)).context


async def test_roles_are_at_most_twenty(service: Service, story: str) -> None:
    await service.update(story, created())

    answer = await service.rehydrate(story, *(f"R{n}" for n in range(20)))
    error = await refusal(service.rehydrate(story, *(f"R{n}" for n in range(21))))

    assert len(answer.packs) == 20
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert [each.field for each in problem(error)[1][1].field_violations] == ["roles"]


async def test_no_roles_are_all_of_them(service: Service, story: str) -> None:
    await service.update(story, created())

    answer = await service.rehydrate(story)

    assert sorted(answer.packs) == ["ARCHITECT", "DATA", "DEV", "DEVOPS", "QA"]


AT_MS = 1_767_225_600_000
"""2026-01-01 in milliseconds; the number is too large to be seconds."""


async def test_the_timeline_and_the_summary_are_included_on_request(
    service: Service, graph: Graph, story: str
) -> None:
    await graph.record_deliberation(deliberation(story))
    await service.update(
        story,
        created(),
        *(
            change("CREATE", "MILESTONE", f"m-{n}", event_type=f"E{n}", ts_ms=AT_MS + n, actor="bo")
            for n in range(60)
        ),
    )

    default = (await service.rehydrate(story, "DEV")).packs["DEV"]
    three = await service.rehydrate(story, "DEV", timeline_events=3)
    none = await service.rehydrate(story, "DEV", include_timeline=False, include_summaries=False)

    assert len(default.milestones) == 50
    found = [(m.event_type, m.ts_ms, m.actor) for m in three.packs["DEV"].milestones]
    assert found == [(f"E{n}", AT_MS + n, "bo") for n in (59, 58, 57)]
    assert three.stats.events == 3
    assert three.packs["DEV"].last_summary == "approach 1"
    assert not none.packs["DEV"].milestones
    assert not none.packs["DEV"].last_summary


async def test_a_session_is_kept_for_as_long_as_was_asked(
    service: Service, client: Redis, story: str
) -> None:
    await service.update(story, created())

    answer = await service.rehydrate(story, "DEV", persist_bundle=True, ttl_seconds=120)
    await service.rehydrate(story, "DEV", persist_bundle=True, ttl_seconds=120)
    await service.rehydrate(story, "DEV", persist_bundle=False)

    (key,) = [key async for key in client.scan_iter(f"swe:case:{story}:session:*")]
    assert 0 < await client.ttl(key) <= 120
    kept = json.loads(await client.get(key) or "")
    assert kept["packs"]["DEV"]["case_header"]["title"] == "Log in"
    assert answer.packs["DEV"].case_header.title == "Log in"


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"case_id": ""}, "case_id"),
        ({"timeline_events": -1}, "timeline_events"),
        ({"timeline_events": 501}, "timeline_events"),
        ({"ttl_seconds": -1}, "ttl_seconds"),
        ({"ttl_seconds": 2**31 - 1}, "ttl_seconds"),
    ],
)
async def test_a_session_asked_for_wrongly_is_refused(
    service: Service, story: str, more: dict[str, Any], field: str
) -> None:
    error = await refusal(service.rehydrate(**({"case_id": story} | more)))

    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert [each.field for each in problem(error)[1][1].field_violations] == [field]


async def test_an_unknown_case_has_no_session(service: Service, story: str) -> None:
    error = await refusal(service.rehydrate(story))

    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert error.details() == f"case not found: {story}"


# --- ValidateScope --------------------------------------------------------------------------------

DEV_BUILD = (
    "CASE_HEADER",
    "PLAN_HEADER",
    "SUBTASKS_ROLE",
    "DECISIONS_RELEVANT_ROLE",
    "DEPS_RELEVANT",
)


async def test_scopes_are_held_against_the_scopes_file(service: Service) -> None:
    right = await service.validate("developer", "build", *DEV_BUILD)
    wrong = await service.validate("DEV", "BUILD", *DEV_BUILD[1:], "SUBTASKS_ALL", "SECRETS")
    cook = await service.validate("COOK", "BUILD", "CASE_HEADER", "PLAN_HEADER", "MILESTONES")

    assert (right.allowed, list(right.missing), list(right.extra)) == (True, [], [])
    assert right.reason == "these are the scopes of DEV in BUILD"
    assert not wrong.allowed
    assert list(wrong.missing) == ["CASE_HEADER"]
    assert list(wrong.extra) == ["SECRETS", "SUBTASKS_ALL"]
    assert wrong.reason == (
        "DEV in BUILD lacks CASE_HEADER; DEV in BUILD is not given SUBTASKS_ALL; "
        "there is no scope SECRETS"
    )
    assert list(cook.extra) == ["MILESTONES"]
    assert "COOK is not a role" in cook.reason


@pytest.mark.parametrize(("role", "phase", "field"), [("", "BUILD", "role"), ("DEV", "", "phase")])
async def test_scopes_without_a_role_or_phase_are_refused(
    service: Service, role: str, phase: str, field: str
) -> None:
    error = await refusal(service.validate(role, phase))

    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert [each.field for each in problem(error)[1][1].field_violations] == [field]


# --- a complete scenario --------------------------------------------------------------------------


async def test_a_team_plans_withdraws_a_decision_and_resumes_after_a_restart(
    temporal_client: Client, graph: Graph, client: Redis, servers: Servers, story: str
) -> None:
    roles = ("ARCHITECT", "DEV", "QA", "DATA")
    workers = storing(temporal_client, graph)
    async with serving(served(temporal_client, graph)) as channel, workers[0], workers[1]:
        service = Service(channel)
        await service.update(story, created())
        await service.update(story, *planned())
        before = await service.rehydrate(story, *roles)
        gone = await service.update(story, change("DELETE", "DECISION", "d-1"))
        after = await service.rehydrate(story, *roles)
        pack = await service.get(story, "ARCHITECT", "BUILD")

    # Restart the service, the workers and the servers, and lose the cached packs.
    stores = (servers.temporal, servers.neo4j, servers.valkey, servers.nats)
    await asyncio.gather(*(store.kill() for store in stores))
    await asyncio.gather(*(store.start() for store in stores))
    async for key in client.scan_iter(f"context:{story}:*"):
        await client.delete(key)
    workers = storing(temporal_client, graph)
    async with serving(served(temporal_client, graph)) as channel, workers[0], workers[1]:
        service = Service(channel)
        resumed = await service.rehydrate(story, *roles)
        next_update = await service.update(story, change("UPDATE", "SUBTASK", "t-1", status="DONE"))
        same = await service.get(story, "ARCHITECT", "DESIGN")

    assert before.stats.decisions == 3
    assert (after.stats.decisions, after.stats.decision_edges) == (2, 0)
    assert all("d-1" not in {each.id for each in pack.decisions} for pack in after.packs.values())
    assert "One table" not in pack.context
    for role in roles:  # nothing but `context.updated` has happened meanwhile
        assert resumed.packs[role] == after.packs[role]
    assert next_update.version == gone.version + 1
    assert "1 of 2 tasks done" in same.context


# --- arbitrary requests ---------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
INT32 = st.integers(-(2**31), 2**31 - 1)
KNOWN = "US-known"
"""The id of a story that exists and has a plan."""
STORIES = st.one_of(TEXT, st.just(KNOWN), st.builds(lambda: f"US-{uuid.uuid4().hex[:8]}"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    sorted({name for payload in PAYLOADS.values() for name in payload.model_fields} | {"ts_ms"})
)
WORDS = st.one_of(JSON, st.sampled_from(["Log in", "DONE", "DEV", ["t-1"], 3, NOW, "plan-1"]))
CHANGES = st.builds(
    pb.ContextChange,
    operation=st.one_of(st.sampled_from(["CREATE", "UPDATE", "DELETE", "create"]), TEXT),
    entity_type=st.one_of(
        st.sampled_from(["CASE", "PLAN", "SUBTASK", "DECISION", "MILESTONE"]), TEXT
    ),
    entity_id=st.one_of(st.sampled_from(["t-1", "d-1", "plan-1", "", KNOWN]), TEXT),
    payload=st.one_of(st.dictionaries(FIELDS, WORDS, max_size=4).map(json.dumps), TEXT),
    reason=TEXT,
)
REQUESTS: dict[str, st.SearchStrategy[Any]] = {
    "GetContext": st.builds(
        pb.GetContextRequest,
        story_id=STORIES,
        role=st.one_of(TEXT, st.just("DEV")),
        phase=st.one_of(TEXT, st.just("BUILD")),
        subtask_id=st.one_of(TEXT, st.just("")),
        token_budget=st.one_of(INT32, st.just(0)),
    ),
    "UpdateContext": st.builds(
        pb.UpdateContextRequest,
        story_id=STORIES,
        task_id=st.one_of(TEXT, st.just("")),
        role=TEXT,
        changes=st.lists(CHANGES, max_size=5),
        timestamp=st.one_of(TEXT, st.just(""), st.just(NOW)),
    ),
    "RehydrateSession": st.builds(
        pb.RehydrateSessionRequest,
        case_id=STORIES,
        roles=st.lists(st.one_of(TEXT, st.just("DEV")), max_size=3),
        include_timeline=st.booleans(),
        include_summaries=st.booleans(),
        timeline_events=st.one_of(INT32, st.integers(0, 60)),
        persist_bundle=st.booleans(),
        ttl_seconds=st.one_of(INT32, st.integers(0, 60)),
    ),
    "ValidateScope": st.builds(
        pb.ValidateScopeRequest,
        role=TEXT,
        phase=TEXT,
        provided_scopes=st.lists(st.one_of(TEXT, st.just("CASE_HEADER")), max_size=5),
    ),
}


@pytest.mark.parametrize("method", REQUESTS)
@given(data=st.data())
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_any_request_is_answered_or_refused_and_nothing_is_half_written(
    service: Service, driver: AsyncDriver, method: str, data: st.DataObject
) -> None:
    request = data.draw(REQUESTS[method])
    story_id = request.story_id if method == "UpdateContext" else KNOWN
    status = "MATCH (s:Story {id: $story}) WHERE s.status <> 'DELETED' RETURN s.status"
    if not await rows(driver, status, story=KNOWN):
        await service.update(KNOWN, created(), *planned())
    before = await updates(driver, story_id)
    all_before = await whole(driver, KNOWN)

    call = getattr(service.stub, method)(request, metadata=service.metadata)
    code = await call.code()

    if code is not grpc.StatusCode.OK:
        assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
        assert await updates(driver, story_id) == before
        assert await whole(driver, KNOWN) == all_before
        assert not story_id or before != (0, 0) or await nodes(driver, story_id) == 0
    elif method == "UpdateContext":
        answer = await call
        assert answer.version == before[1] + 1
        assert await updates(driver, story_id) == (before[0] + 1, answer.version)
        refused = {warning.split(" ")[1] for warning in answer.warnings}
        assert len(refused) <= len(request.changes)
        if story_id != KNOWN or len(refused) == len(request.changes):
            in_part = any("left out" in warning for warning in answer.warnings)
            assert in_part or await whole(driver, KNOWN) == all_before
    else:
        assert await updates(driver, story_id) == before
        assert await whole(driver, KNOWN) == all_before


async def whole(driver: AsyncDriver, story_id: str) -> list[Any]:
    """Return all that updates can write to a story: nodes and edges, without update counters."""
    return await rows(
        driver,
        "MATCH (n:Story|PlanVersion|Subtask|Decision|Event {case_id: $story}) "
        "WHERE coalesce(n.event_type, '') <> 'context.updated' "
        "RETURN labels(n), n {.*, context_version: null, context_by: null}, "
        "COLLECT { MATCH (n)-[e]->(o) RETURN type(e) + ' ' + o.id ORDER BY type(e), o.id } "
        "ORDER BY labels(n), n.id",
        story=story_id,
    )


async def updates(driver: AsyncDriver, story_id: str) -> tuple[int, int]:
    """Return the number of stored updates of the story, and its version."""
    found = await rows(
        driver,
        "OPTIONAL MATCH (s:Story {id: $story}) "
        "RETURN COUNT { (s)<-[:OF]-(:ContextUpdate) }, coalesce(s.context_version, 0)",
        story=story_id,
    )
    return int(found[0][0]), int(found[0][1])
