"""The workflow's time in the format used on the wire."""

from __future__ import annotations

from datetime import datetime

from temporalio import workflow


def format_timestamp(moment: datetime) -> str:
    """Format a time as ISO 8601 in UTC with milliseconds: 2026-01-31T12:00:00.000Z."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def timestamp() -> str:
    """Return the current workflow time, which is the same on every replay."""
    return format_timestamp(workflow.now())
