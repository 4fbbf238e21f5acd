"""Traces: spans by OTLP over gRPC, without what people, agents and models wrote.

The exporter and the SDK also read OpenTelemetry's own variables, such as
OTEL_EXPORTER_OTLP_HEADERS and OTEL_TRACES_SAMPLER.
"""

from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.semconv.attributes.exception_attributes import (
    EXCEPTION_MESSAGE,
    EXCEPTION_STACKTRACE,
)
from opentelemetry.trace import Status
from temporalio.client import Plugin
from temporalio.contrib.opentelemetry import (
    OpenTelemetryPlugin,
    ReplaySafeTracerProvider,
    create_tracer_provider,
)

QUOTING = (EXCEPTION_MESSAGE, EXCEPTION_STACKTRACE)
"""Attributes that may quote a story or an answer. The type of an exception stays."""


def start_tracing(
    endpoint: str, process: str, build_id: str | None
) -> tuple[ReplaySafeTracerProvider, Plugin]:
    """Make the provider of the process's tracers, and the Temporal client's plugin.

    Args:
        endpoint: The collector's address, such as http://127.0.0.1:4317; `https` for TLS.
        process: The name of the process.
        build_id: The version of its code.
    """
    provider = create_tracer_provider(
        resource=Resource.create(
            {SERVICE_NAME: f"swe-ai-fleet-{process}", SERVICE_VERSION: build_id or ""}
        ),
        shutdown_on_exit=False,  # processes leave by os._exit
    )
    provider.add_span_processor(
        BatchSpanProcessor(WithoutContent(OTLPSpanExporter(endpoint=endpoint)))
    )
    trace.set_tracer_provider(provider)
    return provider, OpenTelemetryPlugin(add_temporal_spans=True)


class WithoutContent(SpanExporter):
    """An exporter that leaves out the messages of errors."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Export the spans without content."""
        return self._exporter.export([without_content(span) for span in spans])

    def shutdown(self) -> None:
        """Shut the exporter down."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Send what the exporter holds."""
        return self._exporter.force_flush(timeout_millis)


def without_content(span: ReadableSpan) -> ReadableSpan:
    """Return the span with the types of its errors, but without their messages."""
    return ReadableSpan(
        name=span.name,
        context=span.get_span_context(),
        parent=span.parent,
        resource=span.resource,
        attributes=span.attributes,
        events=[
            Event(
                event.name,
                {k: v for k, v in (event.attributes or {}).items() if k not in QUOTING},
                event.timestamp,
            )
            for event in span.events
        ],
        links=span.links,
        kind=span.kind,
        status=Status(span.status.status_code),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )
