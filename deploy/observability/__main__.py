"""Grafana's dashboards: `python -m deploy.observability` writes them to dashboards/.

A dashboard is a table of panels here: title, unit, and the expressions with their legends.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
DASHBOARDS = HERE / "dashboards"

COLUMNS = 2
WIDTH, HEIGHT = 24 // COLUMNS, 8
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


class Panel(NamedTuple):
    """A panel. unit: Grafana's name of it. queries: legend -> PromQL."""

    title: str
    unit: str
    queries: dict[str, str]


def rate(metric: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}[5m]))"


def quantile(metric: str, by: str, share: float = 0.95) -> str:
    return f"histogram_quantile({share}, {rate(f'{metric}_bucket', f'le, {by}')})"


PANELS: dict[str, list[Panel]] = {
    "stories": [
        Panel("Stories by state", "short", {"{{state}}": "max by (state) (fleet_stories)"}),
        Panel(
            "Stories that wait for a person",
            "short",
            {"{{gate}}": "max by (gate) (fleet_gates_waiting)"},
        ),
        Panel(
            "Waiting longer than",
            "short",
            {"{{longer_than}}": "max by (longer_than) (fleet_gates_waiting_long)"},
        ),
        Panel(
            "Events a second",
            "short",
            {"{{subject}}": rate("fleet_events_published_total", "subject")},
        ),
        Panel(
            "Stories that ended early, an hour",
            "short",
            {"ended early": "sum(increase(fleet_stories_closed_total[1h]))"},
        ),
        Panel(
            "gRPC calls a second",
            "short",
            {"{{method}} {{code}}": rate("fleet_grpc_calls_total", "method, code")},
        ),
        Panel("gRPC p95", "s", {"{{method}}": quantile("fleet_grpc_seconds", "method")}),
        Panel(
            "Workflow task p95",
            "ms",
            {
                "{{workflow_type}}": quantile(
                    "temporal_workflow_task_execution_latency", "workflow_type"
                )
            },
        ),
    ],
    "agents": [
        Panel(
            "Deliberations that run", "short", {"deliberations": "max(fleet_deliberations_running)"}
        ),
        Panel(
            "Waves a minute (requests by act)",
            "short",
            {"{{act}}": "sum by (act) (rate(fleet_agent_requests_total[5m])) * 60"},
        ),
        Panel(
            "Tokens a second",
            "short",
            {"{{model}} {{kind}}": rate("fleet_agent_tokens_total", "model, kind")},
        ),
        Panel(
            "Share of prompt tokens from the cache",
            "percentunit",
            {
                "{{model}}": 'sum by (model) (rate(fleet_agent_tokens_total{kind="cached"}[5m]))'
                ' / sum by (model) (rate(fleet_agent_tokens_total{kind="input"}[5m]))'
            },
        ),
        Panel(
            "Requests by outcome, a second",
            "short",
            {"{{model}} {{outcome}}": rate("fleet_agent_requests_total", "model, outcome")},
        ),
        Panel(
            "Request p95",
            "s",
            {"{{model}} {{act}}": quantile("fleet_agent_request_seconds", "model, act")},
        ),
        Panel(
            "Activity p95",
            "ms",
            {"{{activity_type}}": quantile("temporal_activity_execution_latency", "activity_type")},
        ),
        Panel(
            "Failed attempts of activities, a second",
            "short",
            {"{{activity_type}}": rate("temporal_activity_execution_failed", "activity_type")},
        ),
    ],
    "bus": [
        Panel(
            "Messages not read yet",
            "short",
            {"{{consumer}}": "max by (consumer) (fleet_consumer_pending)"},
        ),
        Panel(
            "Messages in work, and delivered again",
            "short",
            {
                "{{consumer}} in work": "max by (consumer) (fleet_consumer_outstanding)",
                "{{consumer}} again": "max by (consumer) (fleet_consumer_redelivered)",
            },
        ),
        Panel(
            "Messages by outcome, a second",
            "short",
            {"{{consumer}} {{outcome}}": rate("fleet_inbox_messages_total", "consumer, outcome")},
        ),
        Panel("Dead letters", "short", {"dead letters": "max(fleet_dead_letters)"}),
        Panel(
            "Outbox: entries that wait",
            "short",
            {"{{step}}": "sum by (step) (fleet_outbox_waiting)"},
        ),
        Panel(
            "Outbox: age of the oldest entry",
            "s",
            {"{{step}}": "max by (step) (fleet_outbox_oldest_seconds)"},
        ),
        Panel(
            "Outbox: from event to step, p95",
            "s",
            {"{{step}}": quantile("fleet_outbox_lag_seconds", "step")},
        ),
        Panel("Stuck outboxes", "short", {"stuck": "max(fleet_outbox_stuck)"}),
        Panel(
            "Consumers that wait for a store",
            "short",
            {"{{consumer}}": "max by (consumer) (fleet_consumer_paused)"},
        ),
    ],
    "stores": [
        Panel("Valkey's memory", "percentunit", {"used": "max(fleet_valkey_memory_ratio)"}),
        Panel(
            "Payloads renewed, and failures, a day",
            "short",
            {
                "renewed": "sum(increase(fleet_payloads_renewed_total[1d]))",
                "failures": "sum(increase(fleet_payload_renewal_failures_total[1d]))",
            },
        ),
        Panel(
            "Tasks that no worker has taken",
            "short",
            {"{{queue}}": "max by (queue) (fleet_task_queue_backlog)"},
        ),
        Panel(
            "Age of the oldest such task",
            "s",
            {"{{queue}}": "max by (queue) (fleet_task_queue_backlog_age_seconds)"},
        ),
        Panel(
            "Free slots of workers",
            "short",
            {
                "{{task_queue}} {{worker_type}}": "sum by (task_queue, worker_type) "
                "(temporal_worker_task_slots_available)"
            },
        ),
        Panel("Cached workflows", "short", {"{{instance}}": "temporal_sticky_cache_size"}),
        Panel(
            "Memory of processes",
            "bytes",
            {"{{instance}}": 'process_resident_memory_bytes{job="fleet"}'},
        ),
        Panel(
            "CPU of processes",
            "short",
            {"{{instance}}": 'rate(process_cpu_seconds_total{job="fleet"}[5m])'},
        ),
    ],
    "workspaces": [
        Panel(
            "Actions of agents a minute",
            "short",
            {
                "{{action}} {{outcome}}": "sum by (action, outcome) "
                "(rate(fleet_workspace_actions_total[5m])) * 60"
            },
        ),
        Panel(
            "Commands p95",
            "s",
            {"{{kind}}": quantile("fleet_workspace_command_seconds", "kind")},
        ),
        Panel("Size of working trees", "bytes", {"{{instance}}": "fleet_workspace_trees_bytes"}),
        Panel(
            "Working trees removed, an hour",
            "short",
            {"removed": "sum(increase(fleet_workspace_trees_removed_total[1h]))"},
        ),
        Panel(
            "Errors of store and repositories, a second",
            "short",
            {"{{type}}": rate("fleet_workspace_store_errors_total", "type")},
        ),
        Panel(
            "Refs collected, and failures, a day",
            "short",
            {
                "collected": "sum(increase(fleet_store_refs_collected_total[1d]))",
                "failures": "sum(increase(fleet_store_collection_failures_total[1d]))",
            },
        ),
    ],
}


def dashboard(name: str) -> dict[str, Any]:
    """Return the dashboard of that name, as Grafana imports it."""
    return {
        "uid": f"fleet-{name}",
        "title": f"Fleet: {name}",
        "tags": ["swe-ai-fleet"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]
        },
        "panels": [_panel(number, panel) for number, panel in enumerate(PANELS[name])],
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": DATASOURCE,
        "gridPos": {
            "x": number % COLUMNS * WIDTH,
            "y": number // COLUMNS * HEIGHT,
            "w": WIDTH,
            "h": HEIGHT,
        },
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(65 + n), "expr": expr, "legendFormat": legend, "datasource": DATASOURCE}
            for n, (legend, expr) in enumerate(panel.queries.items())
        ],
    }


def files() -> dict[Path, str]:
    """Return the content of each dashboard's file."""
    return {
        DASHBOARDS / f"{name}.json": json.dumps(dashboard(name), indent=1) + "\n" for name in PANELS
    }


if __name__ == "__main__":
    for file, content in files().items():
        file.write_text(content)
