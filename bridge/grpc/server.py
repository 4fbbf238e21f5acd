"""A gRPC service on its port: tokens, limits, deadlines, errors, logs, metrics, traces, drain.

Every method runs inside `Guarded`. Beside the service, each port answers reflection and the
standard health checks (grpc.health.v1): SERVING until the drain begins.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import Counter, Gauge, Histogram

from bridge.grpc.access import OPEN, Access
from bridge.grpc.errors import code_of, status_of
from bridge.grpc.requests import Requests

CALLS_AT_ONCE = 4_000
"""Of all callers together, the ones that wait for councils too; more are RESOURCE_EXHAUSTED."""

LARGEST_MESSAGE = 4 * 1024 * 1024
"""Bytes of a request, and of an answer."""

DETAILS = "grpc-status-details-bin"
"""The trailer that holds the google.rpc.Status."""

OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", LARGEST_MESSAGE),
    ("grpc.max_send_message_length", LARGEST_MESSAGE),
    # A connection that is silent for long is pinged, so that one whose client is gone ends.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A client's pings: more than two that come faster than this end its connection.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 2),
    # Clients come back by the load balancer now and then, and so reach new replicas too.
    ("grpc.max_connection_age_ms", 300_000),
    ("grpc.max_connection_age_grace_ms", 3_600_000),  # a council may take so long
    ("grpc.so_reuseport", 0),  # two on one port would share its calls unseen
]

CALLS = Counter("fleet_grpc_calls", "Calls by method and status", ["method", "code"])
SECONDS = Histogram("fleet_grpc_seconds", "How long calls take", ["method"])
UNDER_WAY = Gauge("fleet_grpc_under_way", "Calls at work", ["method"])

Add = Callable[[Any, grpc.aio.Server], None]
"""A generated `add_…Servicer_to_server`."""

log = structlog.stdlib.get_logger(__name__)
tracer = trace.get_tracer(__name__)


class CannotListen(Exception):
    """The address is taken, or not this machine's."""


@dataclass(frozen=True)
class Served:
    """One service: its full name, and how its servicer is added to a server."""

    name: str
    servicer: object
    add: Add


class GrpcServer:
    """A job: one service on one address; `port` is known when it is made."""

    def __init__(
        self,
        served: Served,
        host: str,
        port: int,
        access: Access,
        drain: timedelta,
        credentials: grpc.ServerCredentials | None = None,
        requests: Requests | None = None,
    ) -> None:
        """Port 0: any free one. drain: how long calls under way get at the end.

        requests: keeps request ids; None: a service that takes none.

        Raises:
            CannotListen: somebody else listens there.
        """
        self._served = served
        self._drain = drain
        self._stopping = asyncio.Event()
        self._running = False
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[Guarded(access, requests)],
            options=OPTIONS,
            maximum_concurrent_rpcs=CALLS_AT_ONCE,
        )
        served.add(served.servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (served.name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if credentials is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise CannotListen(f"{served.name} cannot listen on {address}") from error

    @property
    def is_running(self) -> bool:
        """Whether it takes calls."""
        return self._running

    async def run(self) -> None:
        """Serve until `shutdown`; then calls under way are finished, as long as the drain lasts."""
        await self._server.start()
        for name in ("", self._served.name):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._running = True
        try:
            await self._stopping.wait()
            await self._health.enter_graceful_shutdown()
        finally:
            self._running = False
            await self._server.stop(self._drain.total_seconds())

    async def shutdown(self) -> None:
        """Take no new calls."""
        self._stopping.set()


class Guarded(grpc.aio.ServerInterceptor):
    """Lets a call in or refuses it, and makes a status of what it raises."""

    def __init__(self, access: Access, requests: Requests | None = None) -> None:
        self._access = access
        self._requests = requests

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler with the guard round it."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(OPEN):
            return handler  # None: no such method, and grpc says UNIMPLEMENTED
        metadata = handler_call_details.invocation_metadata

        if handler.unary_unary:

            async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
                async with self._guard(method, metadata, request, context):
                    return await handler.unary_unary(request, context)

            return grpc.unary_unary_rpc_method_handler(
                answer, handler.request_deserializer, handler.response_serializer
            )

        async def stream(
            request: Any, context: grpc.aio.ServicerContext[Any, Any]
        ) -> AsyncIterator[Any]:
            async with self._guard(method, metadata, request, context):
                async for each in handler.unary_stream(request, context):
                    yield each

        return grpc.unary_stream_rpc_method_handler(
            stream, handler.request_deserializer, handler.response_serializer
        )

    @asynccontextmanager
    async def _guard(
        self,
        method: str,
        metadata: Any,
        request: Any,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[None]:
        began = time.monotonic()
        code, actor = grpc.StatusCode.OK, ""
        parent = TraceContextTextMapPropagator().extract(dict(metadata))
        UNDER_WAY.labels(method).inc()
        try:
            with tracer.start_as_current_span(method, parent, kind=trace.SpanKind.SERVER):
                actor = self._access.admit(metadata).actor
                if self._requests is None:
                    yield
                else:
                    async with self._requests.claim(actor, method, metadata, request):
                        yield
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED  # by client, deadline, or the drain's end
            raise
        except grpc.aio.AbortError:
            code = grpc.StatusCode(context.code())
            raise
        except Exception as error:  # every call ends with a status; a fault of ours is logged too
            status = status_of(error)
            code = code_of(status)
            if code is grpc.StatusCode.INTERNAL:
                log.error("a call failed", method=method, exc_info=error)
            await context.abort(code, status.message, ((DETAILS, status.SerializeToString()),))
        finally:
            UNDER_WAY.labels(method).dec()
            CALLS.labels(method, code.name).inc()
            seconds = time.monotonic() - began
            SECONDS.labels(method).observe(seconds)
            log.debug(
                "called", method=method, code=code.name, actor=actor, ms=round(seconds * 1000)
            )
