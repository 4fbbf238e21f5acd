"""Spans of messages that are sent to NATS."""

from contextlib import AbstractContextManager

from opentelemetry import trace
from opentelemetry.semconv._incubating.attributes.messaging_attributes import (
    MESSAGING_DESTINATION_NAME,
    MESSAGING_MESSAGE_ID,
    MESSAGING_OPERATION_NAME,
    MESSAGING_OPERATION_TYPE,
    MESSAGING_SYSTEM,
)

tracer = trace.get_tracer(__name__)


def send_span(subject: str, message_id: str) -> AbstractContextManager[trace.Span]:
    """Return the span of a message; its headers get the trace inside it."""
    return tracer.start_as_current_span(
        f"publish {subject}",
        kind=trace.SpanKind.PRODUCER,
        attributes={
            MESSAGING_SYSTEM: "nats",
            MESSAGING_OPERATION_NAME: "publish",
            MESSAGING_OPERATION_TYPE: "send",
            MESSAGING_DESTINATION_NAME: subject,
            MESSAGING_MESSAGE_ID: message_id,
        },
    )
