"""The common behavior of gRPC services: tokens, statuses, limits, deadlines, health, draining."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import REGISTRY
from redis.asyncio import Redis

from activities.tokens import Caller
from bridge.grpc.auth import Access, caller
from bridge.grpc.calls import call_metadata
from bridge.grpc.requests import Requests
from bridge.grpc.server import LARGEST_MESSAGE, PUBLIC_OF_A_HOST, CannotListen, GrpcServer, Served
from bridge.grpc.wire import orchestrator_pb2 as orchestrator
from bridge.grpc.wire import orchestrator_pb2_grpc
from tests.support.fleet import TOKEN_KEY
from tests.support.grpc_service import bearer, problem, serving
from tests.support.polling import WITHIN_S, until
from workflows.models.errors import ErrorType, InvalidInput, application_error

# The generated stubs are typed for synchronous channels only.
Health: Any = health_pb2_grpc.HealthStub
Reflection: Any = reflection_pb2_grpc.ServerReflectionStub

NAME = "orchestrator.v1.OrchestratorService"
TASK = orchestrator.DeliberateRequest(task_description="x", role="DEV")
STATUS = f"/{NAME}/GetStatus"


class Behaving(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """A service whose behavior its test controls."""

    def __init__(self) -> None:
        self.raises: Exception | None = None
        self.stays = asyncio.Event()
        self.stays.set()
        self.began = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.callers: list[Caller] = []
        self.metadata: dict[str, str] = {}

    async def ProcessPlanningEvent(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.callers.append(caller())
        if self.raises:
            raise self.raises
        return orchestrator.PlanningEventResponse(processed=True)

    async def GetStatus(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        self.callers.append(caller())
        self.metadata = call_metadata(context)
        self.began.set()
        try:
            await self.stays.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self.raises:
            raise self.raises
        return orchestrator.GetStatusResponse(status="here")

    async def StreamDeliberation(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        yield orchestrator.DeliberationUpdate(status="generating")
        if self.raises:
            raise self.raises
        yield orchestrator.DeliberationUpdate(status="complete")


@pytest.fixture
async def service() -> Behaving:
    return Behaving()


@pytest.fixture
def served(service: Behaving) -> Served:
    add = orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server
    return Served(NAME, service, add)


@pytest.fixture
async def channel(served: Served) -> AsyncIterator[grpc.aio.Channel]:
    async with serving(served) as channel:
        yield channel


def stub(channel: grpc.aio.Channel) -> Any:
    return orchestrator_pb2_grpc.OrchestratorServiceStub(channel)


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return failed.value


async def test_a_call_with_a_token_is_answered_and_its_caller_known(
    channel: grpc.aio.Channel, service: Behaving
) -> None:
    answer = await stub(channel).GetStatus(
        orchestrator.GetStatusRequest(), metadata=bearer("ana", "PO")
    )

    assert answer.status == "here"
    assert [(each.actor, each.roles) for each in service.callers] == [("ana", frozenset({"PO"}))]


@pytest.mark.parametrize(
    "metadata",
    [(), (("authorization", "Bearer x.y.z"),), bearer("ana", valid_for=timedelta(seconds=-10))],
)
async def test_a_call_without_a_valid_token_reaches_no_service(
    channel: grpc.aio.Channel, service: Behaving, metadata: Any
) -> None:
    error = await failure(
        stub(channel).GetStatus(orchestrator.GetStatusRequest(), metadata=metadata)
    )

    assert error.code() == grpc.StatusCode.UNAUTHENTICATED
    assert problem(error)[0] == "Unauthenticated"
    assert service.callers == []


async def test_what_a_service_raises_is_a_status_with_details_and_a_count(
    channel: grpc.aio.Channel, service: Behaving
) -> None:
    service.raises = application_error(ErrorType.GRAPH_UNAVAILABLE, "Neo4j does not answer")
    labels = {"method": STATUS, "code": "UNAVAILABLE"}
    before = REGISTRY.get_sample_value("fleet_grpc_calls_total", labels) or 0

    error = await failure(
        stub(channel).GetStatus(orchestrator.GetStatusRequest(), metadata=bearer())
    )

    assert (error.code(), error.details()) == (
        grpc.StatusCode.UNAVAILABLE,
        "Neo4j does not answer",
    )
    reason, details = problem(error)
    assert reason == "GraphUnavailable"
    assert details[-1].retry_delay.seconds == 1
    # The call is counted when it ends, which its client may notice earlier.
    await until(lambda: REGISTRY.get_sample_value("fleet_grpc_calls_total", labels) == before + 1)
    assert REGISTRY.get_sample_value("fleet_grpc_under_way", {"method": STATUS}) == 0


async def test_an_internal_error_reveals_no_secret(
    channel: grpc.aio.Channel, service: Behaving
) -> None:
    service.raises = KeyError("password")

    error = await failure(
        stub(channel).GetStatus(orchestrator.GetStatusRequest(), metadata=bearer())
    )

    assert error.code() == grpc.StatusCode.INTERNAL
    assert "password" not in (error.details() or "")


async def test_a_stream_ends_with_the_status_of_what_it_raises(
    channel: grpc.aio.Channel, service: Behaving
) -> None:
    service.raises = application_error(ErrorType.QUORUM_LOST, "1 of 3 left")
    call = stub(channel).StreamDeliberation(
        orchestrator.DeliberateRequest(), metadata=bearer("ana", "DEV")
    )

    assert (await call.read()).status == "generating"
    error = await failure(call.read())

    assert error.code() == grpc.StatusCode.ABORTED


async def test_a_deadline_that_passes_cancels_what_the_call_does(
    channel: grpc.aio.Channel, service: Behaving
) -> None:
    service.stays.clear()

    call = stub(channel).GetStatus(orchestrator.GetStatusRequest(), metadata=bearer(), timeout=5)
    async with asyncio.timeout(WITHIN_S):
        await service.began.wait()
    error = await failure(call)

    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(WITHIN_S):
        await service.cancelled.wait()


async def test_an_actor_that_calls_too_often_must_wait(served: Served) -> None:
    async with serving(served, calls_per_second=2) as channel:
        calls = [
            stub(channel).GetStatus(orchestrator.GetStatusRequest(), metadata=bearer())
            for _ in range(12)
        ]
        answers = await asyncio.gather(*calls, return_exceptions=True)

    refused = [each for each in answers if isinstance(each, grpc.aio.AioRpcError)]
    assert refused
    assert len(refused) < len(answers)
    assert {each.code() for each in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert {problem(each)[0] for each in refused} == {"RateLimit"}


async def test_a_silent_call_outlives_the_pings_of_its_client(
    served: Served, service: Behaving
) -> None:
    """A client may ping every 10 s, or as often as once per second, and still gets its response."""
    service.stays.clear()
    pings = (
        ("grpc.keepalive_time_ms", 1_200),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    )
    async with serving(served, options=pings) as channel:
        call = stub(channel).GetStatus(orchestrator.GetStatusRequest(), metadata=bearer())
        answer = asyncio.ensure_future(call)
        await service.began.wait()

        ended, _ = await asyncio.wait([answer], timeout=6)  # five pings: strikes are counted to two
        service.stays.set()

        assert not ended, answer.exception()
        assert (await answer).status == "here"


async def test_a_request_id_stands_for_one_request_of_its_caller(
    served: Served, service: Behaving, client: Redis
) -> None:
    mine = (("x-request-id", uuid.uuid4().hex),)
    event = orchestrator.PlanningEventRequest(event_type="a", case_id="US-1")
    another = orchestrator.PlanningEventRequest(event_type="a", case_id="US-2")
    async with serving(served, requests=Requests(client)) as channel:
        moves = stub(channel).ProcessPlanningEvent
        for _ in range(2):
            assert (await moves(event, metadata=bearer() + mine)).processed

        reused = [
            await failure(moves(another, metadata=bearer() + mine)),
            await failure(stub(channel).Deliberate(TASK, metadata=bearer("ana", "DEV") + mine)),
            await failure(
                stub(channel).StreamDeliberation(TASK, metadata=bearer("ana", "DEV") + mine).read()
            ),
        ]

        assert {each.code() for each in reused} == {grpc.StatusCode.ALREADY_EXISTS}
        assert {problem(each)[0] for each in reused} == {"RequestReused"}
        assert len(service.callers) == 2
        # Another caller's request id is a different one, and reading methods record none.
        assert (await moves(another, metadata=bearer("bo") + mine)).processed
        await stub(channel).GetStatus(orchestrator.GetStatusRequest(), metadata=bearer() + mine)


async def test_a_request_that_was_refused_may_be_corrected_under_its_id(
    served: Served, service: Behaving, client: Redis
) -> None:
    mine = (("x-request-id", uuid.uuid4().hex),)
    wrong = orchestrator.PlanningEventRequest(event_type="a", case_id="US 1")
    right = orchestrator.PlanningEventRequest(event_type="a", case_id="US-1")
    async with serving(served, requests=Requests(client)) as channel:
        service.raises = InvalidInput("PlanningEventRequest", [("case_id", "is wrong")])
        moves = stub(channel).ProcessPlanningEvent
        first = await failure(moves(wrong, metadata=bearer() + mine))
        service.raises = application_error(ErrorType.GUARD_BLOCKED, "no")
        second = await failure(moves(right, metadata=bearer() + mine))
        third = await failure(moves(wrong, metadata=bearer() + mine))

    assert [each.code().name for each in (first, second, third)] == [
        "INVALID_ARGUMENT",
        "FAILED_PRECONDITION",
        "ALREADY_EXISTS",
    ]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ((("x-reason", "too big"),), "too big"),
        ((("x-reason-bin", "zu groß".encode()), ("x-reason", "ignored")), "zu groß"),
    ],
)
async def test_what_people_write_may_be_utf_8(
    channel: grpc.aio.Channel, service: Behaving, metadata: Any, words: str
) -> None:
    await stub(channel).GetStatus(orchestrator.GetStatusRequest(), metadata=bearer() + metadata)

    assert service.metadata["x-reason"] == words


async def test_what_is_not_utf_8_is_refused(channel: grpc.aio.Channel) -> None:
    broken = (("x-comment-bin", b"\xff\xfe"),)

    error = await failure(
        stub(channel).GetStatus(orchestrator.GetStatusRequest(), metadata=bearer() + broken)
    )

    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "x-comment-bin: must be UTF-8" in (error.details() or "")


async def test_a_message_that_is_too_large_is_refused(channel: grpc.aio.Channel) -> None:
    large = orchestrator.DeliberateRequest(task_description="x" * (LARGEST_MESSAGE + 1))

    error = await failure(stub(channel).Deliberate(large, metadata=bearer("ana", "DEV")))

    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_bytes_that_are_not_a_message_are_refused(channel: grpc.aio.Channel) -> None:
    call: Any = channel.unary_unary(STATUS)

    stranger = await failure(call(b"\xff\xff"))
    error = await failure(call(b"\xff\xff", metadata=bearer()))

    assert stranger.code() == grpc.StatusCode.UNAUTHENTICATED
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "send one" in (error.details() or "")


async def test_an_unknown_method_is_unimplemented(channel: grpc.aio.Channel) -> None:
    call: Any = channel.unary_unary(f"/{NAME}/NoSuchMethod")

    error = await failure(call(b"", metadata=bearer()))

    assert error.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_health_is_public_and_ends_with_the_drain(served: Served, service: Behaving) -> None:
    server = GrpcServer(served, "127.0.0.1", 0, Access([TOKEN_KEY], 10), timedelta(seconds=20))
    runs = asyncio.create_task(server.run())
    service.stays.clear()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        health = Health(channel)
        for name in ("", NAME):
            answer = await health.Check(
                health_pb2.HealthCheckRequest(service=name), wait_for_ready=True
            )
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watched = health.Watch(health_pb2.HealthCheckRequest(service=NAME))
        assert (await watched.read()).status == health_pb2.HealthCheckResponse.SERVING
        under_way = stub(channel).GetStatus(orchestrator.GetStatusRequest(), metadata=bearer())
        under_way = asyncio.ensure_future(under_way)
        await service.began.wait()

        await server.shutdown()

        assert (await watched.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watched.cancel()
        service.stays.set()
        assert (await under_way).status == "here"
    await runs
    assert not server.is_running


async def test_reflection_lists_the_service_without_a_token(channel: grpc.aio.Channel) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = Reflection(channel).ServerReflectionInfo(iter([request]))

    listed = {
        each.name async for answer in answers for each in answer.list_services_response.service
    }

    assert listed == {NAME, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


async def test_a_port_that_is_taken_is_reported(served: Served) -> None:
    access = Access([TOKEN_KEY], 10)
    first = GrpcServer(served, "127.0.0.1", 0, access, timedelta(seconds=1))
    runs = asyncio.create_task(first.run())

    with pytest.raises(CannotListen, match=f"cannot listen on 127.0.0.1:{first.port}"):
        GrpcServer(served, "127.0.0.1", first.port, access, timedelta(seconds=1))

    await first.shutdown()
    await runs


async def test_watches_without_a_token_leave_room_for_other_calls(served: Served) -> None:
    async with serving(served) as channel:
        health = Health(channel)
        request = health_pb2.HealthCheckRequest(service=NAME)
        watches = [health.Watch(request) for _ in range(PUBLIC_OF_A_HOST)]
        for watch in watches:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING

        for refused in (health.Watch(request).read(), health.Check(request)):
            with pytest.raises(grpc.aio.AioRpcError, match="without a token") as error:
                await refused
            assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        watches.pop().cancel()

        async def answers() -> bool:
            try:
                await health.Check(request)
            except grpc.aio.AioRpcError:
                return False
            return True

        await until(answers)
        for watch in watches:
            watch.cancel()


async def test_thousands_of_watches_without_a_token_lock_no_caller_out(
    channel: grpc.aio.Channel,
) -> None:
    health = Health(channel)
    watches = [health.Watch(health_pb2.HealthCheckRequest(service=NAME)) for _ in range(4_000)]
    firsts = await asyncio.gather(*(each.read() for each in watches), return_exceptions=True)

    answer = await stub(channel).GetStatus(orchestrator.GetStatusRequest(), metadata=bearer())

    assert answer.status == "here"
    refused = [each for each in firsts if isinstance(each, grpc.aio.AioRpcError)]
    assert len(watches) - len(refused) <= PUBLIC_OF_A_HOST
    for watch in watches:
        watch.cancel()
