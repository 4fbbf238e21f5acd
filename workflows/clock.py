"""The workflow's time as the wire writes it."""

from __future__ import annotations

from datetime import datetime

from temporalio import workflow


def iso(moment: datetime) -> str:
    """ISO 8601 in UTC with milliseconds: 2026-01-31T12:00:00.000Z."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def timestamp() -> str:
    """The present workflow time: the same on every replay."""
    return iso(workflow.now())
