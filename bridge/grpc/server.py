"""A gRPC service on its port: tokens, limits, deadlines, errors, logs, metrics, traces, drain.

Every method runs inside `AuthInterceptor`. Each port also serves reflection and the standard health
checks (grpc.health.v1), which report SERVING until the drain begins.
"""

from __future__ import annotations

import asyncio
import collections
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import Counter, Gauge, Histogram

from bridge.grpc.auth import PUBLIC_METHODS, Access
from bridge.grpc.errors import code_of, status_of
from bridge.grpc.requests import Requests
from bridge.grpc.roles import require_method_role
from workflows.models.errors import InvalidInput

CALLS_AT_ONCE = 4_000
"""Maximum number of concurrent calls by all callers, including those that wait for councils.

Further calls get RESOURCE_EXHAUSTED.
"""

PUBLIC_AT_ONCE = 400
PUBLIC_OF_A_HOST = 40
"""Maximum number of concurrent calls without a token (health, reflection), of all hosts and of one.

They leave the other calls most of CALLS_AT_ONCE: a Watch of health lasts as long as its caller
wants.
"""

LARGEST_MESSAGE = 4 * 1024 * 1024
"""Maximum size of a request and of an answer, in bytes."""

DETAILS = "grpc-status-details-bin"
"""The trailer that holds the google.rpc.Status."""

OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", LARGEST_MESSAGE),
    ("grpc.max_send_message_length", LARGEST_MESSAGE),
    # A connection that is silent for long is pinged, so that one without a client is closed.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A client that sends more than two pings faster than this is disconnected.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 2),
    # Clients reconnect through the load balancer from time to time, and so reach new replicas.
    ("grpc.max_connection_age_ms", 300_000),
    ("grpc.max_connection_age_grace_ms", 3_600_000),  # a council may take this long
    ("grpc.so_reuseport", 0),  # two servers on one port would silently share its calls
]

CALLS = Counter("fleet_grpc_calls", "Calls by method and status", ["method", "code"])
SECONDS = Histogram("fleet_grpc_seconds", "How long calls take", ["method"])
UNDER_WAY = Gauge("fleet_grpc_under_way", "Calls at work", ["method"])

Add = Callable[[Any, grpc.aio.Server], None]
"""A generated `add_…Servicer_to_server`."""

log = structlog.stdlib.get_logger(__name__)
tracer = trace.get_tracer(__name__)


class CannotListen(Exception):
    """An error for an address that is in use, or is not on this machine."""


@dataclass(frozen=True)
class Served:
    """One service: its full name, and the function that adds its servicer to a server."""

    name: str
    servicer: object
    add: Add


class GrpcServer:
    """A job that serves one service on one address.

    `port` is known after construction.
    """

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
        """Listen on the address.

        Args:
            served: The service.
            host: The address.
            port: 0 means any free one.
            access: Authenticates callers and limits their rates.
            drain: How long calls in progress may take after `shutdown`.
            credentials: For TLS; None: without TLS.
            requests: Keeps request ids; None: for a service that takes none.

        Raises:
            CannotListen: the address is in use, or is not on this machine.
        """
        self._served = served
        self._drain = drain
        self._stopping = asyncio.Event()
        self._running = False
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[AuthInterceptor(access, requests)],
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
        """Whether the server takes calls."""
        return self._running

    async def run(self) -> None:
        """Serve until `shutdown`; then let calls in progress end, for at most the drain time."""
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
        """Stop taking new calls."""
        self._stopping.set()


def readable(read: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """Return a reader of requests that returns its error: raised there, it would be UNKNOWN."""

    def request_or_error(data: bytes) -> Any:
        try:
            return read(data) if read else data
        except DecodeError as error:
            return error

    return request_or_error


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """An interceptor that authenticates each call and turns its exceptions into a status."""

    def __init__(self, access: Access, requests: Requests | None = None) -> None:
        self._access = access
        self._requests = requests
        self._public: collections.Counter[str] = collections.Counter()
        """Host -> the number of its calls without a token."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler in the guard."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return handler  # no such method: grpc answers UNIMPLEMENTED
        if method.startswith(PUBLIC_METHODS):
            return self._limited(handler)
        metadata = handler_call_details.invocation_metadata

        if handler.unary_unary:

            async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
                async with self._guard(method, metadata, request, context):
                    return await handler.unary_unary(request, context)

            return grpc.unary_unary_rpc_method_handler(
                answer, readable(handler.request_deserializer), handler.response_serializer
            )

        async def stream(
            request: Any, context: grpc.aio.ServicerContext[Any, Any]
        ) -> AsyncIterator[Any]:
            async with self._guard(method, metadata, request, context):
                async for each in handler.unary_stream(request, context):
                    yield each

        return grpc.unary_stream_rpc_method_handler(
            stream, readable(handler.request_deserializer), handler.response_serializer
        )

    def _limited(self, handler: grpc.RpcMethodHandler[Any, Any]) -> Any:
        """Limit the concurrent calls of a public method, in all and by host."""
        behavior: Any = (
            handler.unary_unary
            or handler.unary_stream
            or handler.stream_unary
            or handler.stream_stream
        )

        async def limited(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            host = context.peer().rpartition(":")[0]
            of_all, of_host = self._public.total(), self._public[host]
            if of_all >= PUBLIC_AT_ONCE or of_host >= PUBLIC_OF_A_HOST:
                await context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"{of_host} calls without a token are under way from this host, and {of_all} "
                    f"in all; at most {PUBLIC_OF_A_HOST} and {PUBLIC_AT_ONCE} are taken: end some",
                )
            self._public[host] += 1
            try:
                answer = behavior(request, context)
                if inspect.isawaitable(answer):
                    return await answer
                async for each in answer:
                    await context.write(each)
            finally:
                self._public[host] -= 1
                if not self._public[host]:
                    del self._public[host]

        kind = (
            f"{'stream' if handler.request_streaming else 'unary'}_"
            f"{'stream' if handler.response_streaming else 'unary'}_rpc_method_handler"
        )
        return getattr(grpc, kind)(
            limited, handler.request_deserializer, handler.response_serializer
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
                caller = await self._access.admit(metadata)
                actor = caller.actor
                require_method_role(caller, method)
                if isinstance(request, DecodeError):
                    raise InvalidInput(method, [("(the whole)", f"{request}; send one")])
                if self._requests is None:
                    yield
                else:
                    async with self._requests.claim(actor, method, metadata, request):
                        yield
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED  # by the client, the deadline or the end of the drain
            raise
        except grpc.aio.AbortError:
            code = grpc.StatusCode(context.code())
            raise
        except Exception as error:  # every call ends with a status; internal errors are logged
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
