"""Logs, traces and metrics of a process: JSON lines on stdout, OTLP and Prometheus where set."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import structlog
from structlog.typing import EventDict, Processor
from temporalio import activity, workflow
from temporalio.client import Plugin
from temporalio.runtime import (
    LogForwardingConfig,
    LoggingConfig,
    PrometheusConfig,
    Runtime,
    TelemetryConfig,
    TelemetryFilter,
)
from temporalio.worker import (
    ActivityInboundInterceptor,
    ExecuteActivityInput,
    Interceptor,
)

from workers.clients.connection import require_encryption
from workers.settings import Settings
from workflows.models.ids import story_of

STORY_WORKFLOW_PREFIX = "story-"
LOOPBACK = "127.0.0.1"
QUIET = ("httpx", "httpx2", "httpcore", "openai")
"""Loggers that report on INFO, for every call, what a trace shows better."""


@contextmanager
def started(settings: Settings, process: str) -> Iterator[tuple[Runtime, list[Plugin]]]:
    """Set up logging, metrics and tracing; at the end, send the spans that are left.

    Yields:
        The Temporal client's runtime and plugins.
    """
    configure_logs(settings.log_level, process, settings.log_format)
    with traced(settings, process) as plugins:
        yield _runtime(settings), plugins


@contextmanager
def traced(settings: Settings, process: str) -> Iterator[list[Plugin]]:
    """Trace if OTEL_EXPORTER_OTLP_ENDPOINT is set; at the end, send the spans that are left.

    Yields:
        The Temporal client's plugins.

    Raises:
        StartError: plain text to another machine.
    """
    if settings.otel_exporter_otlp_endpoint is None:
        yield []
        return
    url = urlsplit(settings.otel_exporter_otlp_endpoint)
    if url.scheme != "https":
        require_encryption(
            settings, "OTEL_EXPORTER_OTLP_ENDPOINT", url.hostname or "", "use https://"
        )
    from workers.tracing import start_tracing  # it loads the exporter, which takes time

    provider, plugin = start_tracing(
        settings.otel_exporter_otlp_endpoint, process, settings.worker_build_id
    )
    try:
        yield [plugin]
    finally:
        provider.shutdown()


def configure_logs(level: str, process: str, form: str = "json") -> None:
    """Send all logs of the process to stdout, from every library.

    Args:
        level: The lowest level that is logged.
        process: The name of the process.
        form: JSON lines, or text for a `console`.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        bind_execution,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,  # no local variables: they may hold secrets
                _renderer(form),
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def _renderer(form: str) -> Processor:
    if form == "console":
        return structlog.dev.ConsoleRenderer(
            colors=sys.stdout.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    return structlog.processors.JSONRenderer(default=str)


def bind_execution(_: Any, __: str, event: EventDict) -> EventDict:
    """Add the ids of the workflow or activity that logs to the line."""
    for key, value in _execution_ids():
        event.setdefault(key, value)
    return event


def _execution_ids() -> Iterator[tuple[str, str]]:
    if activity.in_activity():
        info = activity.info()
        yield "activity", info.activity_type
        yield "attempt", str(info.attempt)
        yield from _workflow_ids(info.workflow_id or "", info.workflow_run_id or "")
    elif workflow.in_workflow():
        running = workflow.info()
        yield from _workflow_ids(running.workflow_id, running.run_id)
        if running.root:
            yield from _story_id(running.root.workflow_id)


def _workflow_ids(workflow_id: str, run_id: str) -> Iterator[tuple[str, str]]:
    yield "workflow_id", workflow_id
    yield "run_id", run_id
    yield from _story_id(workflow_id)


def _story_id(workflow_id: str) -> Iterator[tuple[str, str]]:
    if workflow_id.startswith(STORY_WORKFLOW_PREFIX):
        yield "story_id", story_of(workflow_id)


class LogContext(Interceptor):
    """An interceptor that adds the story and task of an activity's request to all its log lines."""

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        """Wrap the activity."""
        return _BindRequest(next)


class _BindRequest(ActivityInboundInterceptor):
    async def execute_activity(self, input: ExecuteActivityInput) -> Any:
        # Bound for the rest of the activity's asyncio task, because the SDK logs failures there,
        # too.
        structlog.contextvars.bind_contextvars(**request_ids(input.args))
        return await super().execute_activity(input)


def request_ids(args: Any) -> dict[str, str]:
    """Return `story_id` and `task_id` of an activity's request, or of the task inside it."""
    ids = {}
    for request in args:
        for holder in (request, getattr(request, "task", None)):
            for name in ("story_id", "task_id"):
                if value := getattr(holder, name, None):
                    ids[name] = str(value)
    return ids


def sdk_metrics(settings: Settings) -> str:
    """Return the address of the Temporal SDK's own metrics; empty if it serves none."""
    port = settings.temporal_metrics_port
    return f"http://{LOOPBACK}:{port}/metrics" if port else ""


def _runtime(settings: Settings) -> Runtime:
    port = settings.temporal_metrics_port
    metrics = PrometheusConfig(bind_address=f"{LOOPBACK}:{port}") if port else None
    return Runtime(
        telemetry=TelemetryConfig(
            logging=LoggingConfig(
                filter=TelemetryFilter(core_level="WARN", other_level="ERROR"),
                forwarding=LogForwardingConfig(logger=logging.getLogger("temporalio.core")),
            ),
            metrics=metrics,
        )
    )
