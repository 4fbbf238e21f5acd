"""Random requests to every method of the five services, over channels to the real process.

`make test` sends a few; `make fuzz` sends CALLS=200 to each method. A run is repeated by its SEED.
"""

import asyncio
import os
import random
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from neo4j import AsyncDriver

from bridge.grpc.wire import (
    context_pb2,
    orchestrator_pb2,
    planning_pb2,
    storycoach_pb2,
    workspace_pb2,
)
from tests.support.councils import councils_kept
from tests.support.fleet import Environment, new_environment, whole_fleet
from tests.support.grpc_service import bearer, problem
from tests.support.llm_server import LlmServer
from tests.support.mutations import damaged, filled
from tests.support.servers import Servers

SEED = int(os.environ.get("SEED", "12"))
CALLS = int(os.environ.get("CALLS", "40"))
AT_ONCE = 16
ANSWERED_WITHIN_S = 120.0
"""On a busy machine: a request may happen to be valid, and its council then deliberates."""

METHODS = [
    (service.full_name, method)
    for module in (context_pb2, orchestrator_pb2, planning_pb2, storycoach_pb2, workspace_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
BROKEN = {
    *(grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED),
    *(grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DATA_LOSS),
}
CALLERS = (bearer("ana", "PO", "OPERATOR", "DEV"), bearer("quinn", "QA"), bearer("nell"))
NOTES = (
    ("x-request-id", "r-1"),
    ("x-request-id", "x" * 500),
    ("x-reason-bin", b"\xff\xfe"),
    ("x-comment-bin", "zu groß".encode()),
    ("x-revision", "' OR 1=1 --"),
    ("x-page-size", "-1"),
    ("x-page-token", "AAAA"),
    ("x-state", "x' OR WorkflowType = 'y"),
    ("traceparent", "00-zz"),
)


@pytest.fixture(scope="module")
async def fleet(servers: Servers, driver: AsyncDriver) -> AsyncIterator[Environment]:
    """Run a whole fleet."""
    async with LlmServer() as llm, councils_kept(driver):
        environment = await new_environment(servers, llm, GRPC_CALLS_PER_SECOND="100000")
        async with whole_fleet(environment):
            yield environment


def port(fleet: Environment, service: str) -> str:
    name = service.rpartition(".")[2].removesuffix("Service").upper()
    return fleet[f"GRPC_{name}_PORT"]


def request(random: random.Random, method: Any) -> bytes:
    """Return a request with random fields, in some cases damaged."""
    message = filled(random, GetMessageClass(method.input_type)())
    return damaged(random, bytearray(message.SerializeToString()))


async def fault_of(channel: grpc.aio.Channel, path: str, method: Any, number: int) -> str | None:
    """Send a request; return what is wrong with its answer."""
    chosen = random.Random(f"{SEED}/{path}/{number}")
    data = request(chosen, method)
    metadata = (*chosen.choice(CALLERS), *chosen.sample(NOTES, chosen.choice([0, 0, 1, 2])))
    kind: Any = channel.unary_stream if method.server_streaming else channel.unary_unary
    call = kind(path)(data, metadata=metadata, timeout=ANSWERED_WITHIN_S)
    try:
        if method.server_streaming:
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        words = error.details() or ""
        if error.code() in BROKEN or len(words) < 4:
            return f"{number}: {error.code().name}: {words}"
        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or "proto" not in words:
            reason, _ = problem(error)
            return None if reason else f"{number}: without a reason: {words}"
    return None


@pytest.mark.timeout(1_800)
@pytest.mark.parametrize(("service", "method"), METHODS, ids=lambda each: getattr(each, "name", ""))
async def test_every_request_is_answered_or_refused_with_a_reason(
    fleet: Environment, service: str, method: Any
) -> None:
    places = asyncio.Semaphore(AT_ONCE)

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port(fleet, service)}") as channel:

        async def send(number: int) -> str | None:
            async with places:
                return await fault_of(channel, f"/{service}/{method.name}", method, number)

        faults = await asyncio.gather(*(send(number) for number in range(CALLS)))

        assert [each for each in faults if each] == []
        health: Any = health_pb2_grpc.HealthStub(channel)  # typed for synchronous channels
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
