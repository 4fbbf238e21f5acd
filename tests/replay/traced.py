"""Replay recorded histories as a worker with tracing does; print the names of what it exports.

`python -m tests.replay.traced FILE…`. The tracer provider is global, so this is a process.
"""

import asyncio
import sys
from pathlib import Path

from opentelemetry import trace
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from temporalio.contrib.opentelemetry import OpenTelemetryPlugin, create_tracer_provider

from tests.replay.test_replay import replay


async def main(histories: list[str]) -> None:
    exporter, provider = InMemorySpanExporter(), create_tracer_provider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    for recorded in histories:
        await replay(recorded, [OpenTelemetryPlugin(add_temporal_spans=True)])
    for span in exporter.get_finished_spans():
        print(span.name)


if __name__ == "__main__":
    asyncio.run(main([Path(file).read_text() for file in sys.argv[1:]]))
