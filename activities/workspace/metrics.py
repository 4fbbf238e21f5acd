"""Metrics of the process `workspace`: actions, commands, working trees and the store."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from workflows.models.errors import ErrorType
from workflows.models.implementation import ActionResult

ACTIONS = Counter(
    "fleet_workspace_actions",
    "Actions of agents; outcome: done, failed (exit code not 0), stopped at a limit",
    ["action", "outcome"],
)
COMMAND_SECONDS = Histogram(
    "fleet_workspace_command_seconds",
    "How long commands of projects take; kind: command, or set-up of dependencies",
    ["kind"],
    buckets=(0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 900),
)
TREES_BYTES = Gauge("fleet_workspace_trees_bytes", "Size of the working trees on this machine")
TREES_REMOVED = Counter("fleet_workspace_trees_removed", "Unused working trees that were removed")
STORE_ERRORS = Counter(
    "fleet_workspace_store_errors", "Errors of git that are tried again, by type", ["type"]
)

REPEATED = (ErrorType.GIT_STORE_AWAY, ErrorType.REPOSITORY_AWAY, ErrorType.GIT_FAILED)

for _kind in ("command", "set-up"):
    COMMAND_SECONDS.labels(_kind)
for _action in ("run", "write", "replace"):
    ACTIONS.labels(_action, "done")
for _type in REPEATED:
    STORE_ERRORS.labels(_type)


def count_action(action: str, result: ActionResult) -> None:
    """Count an action that was carried out."""
    outcome = "stopped" if result.stopped else "failed" if result.exit_code else "done"
    ACTIONS.labels(action, outcome).inc()


def count_store_error(kind: ErrorType) -> None:
    """Count an error of git, if it is one that is tried again."""
    if kind in REPEATED:
        STORE_ERRORS.labels(kind).inc()
