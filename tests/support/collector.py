"""A collector of traces: OTLP over gRPC, as any other would receive them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue


@dataclass(frozen=True)
class Span:
    """A span as it was received. service: the process that sent it."""

    service: str
    trace: str
    id: str
    parent: str
    name: str
    kind: int
    attributes: dict[str, Any]
    is_error: bool


@dataclass
class Collector(TraceServiceServicer):
    """A collector that keeps what it receives: the spans, and the bytes of the requests."""

    endpoint: str = ""
    spans: list[Span] = field(default_factory=list)
    received: bytes = b""

    async def Export(self, request: ExportTraceServiceRequest, context: Any) -> Any:  # noqa: N802
        self.received += request.SerializeToString()
        for resource in request.resource_spans:
            service = _values(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                self.spans += [
                    Span(
                        service=service,
                        trace=each.trace_id.hex(),
                        id=each.span_id.hex(),
                        parent=each.parent_span_id.hex(),
                        name=each.name,
                        kind=each.kind,
                        attributes=_values(each.attributes),
                        is_error=each.status.code == each.status.STATUS_CODE_ERROR,
                    )
                    for each in scope.spans
                ]
        return ExportTraceServiceResponse()

    def of(self, trace: str) -> list[Span]:
        """Return the spans of a trace."""
        return [span for span in self.spans if span.trace == trace]


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    """Run a collector until the block ends."""
    collector = Collector()
    server = grpc.aio.server()
    add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield collector
    await server.stop(None)


def chain(span: Span, spans: list[Span]) -> list[str]:
    """Return the names from the root of the trace to a span."""
    by_id = {each.id: each for each in spans}
    names = [span.name]
    while span.parent in by_id:
        span = by_id[span.parent]
        names.insert(0, span.name)
    return names


def without_parent(spans: list[Span]) -> list[Span]:
    """Return the spans whose parent was not received, or that have none."""
    ids = {span.id for span in spans}
    return [span for span in spans if span.parent not in ids]


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in attributes}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None
