"""Prometheus, as `make run OBSERVE=1` starts it: rules, alerts and dashboards on a real fleet."""

import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.local.ports import free_ports
from deploy.local.servers import PROMETHEUS, Prometheus
from deploy.observability.__main__ import HERE, PANELS
from tests.support.fleet import new_environment, whole_fleet
from tests.support.llm_server import LlmServer
from tests.support.polling import until
from tests.support.server_process import ServerProcess
from tests.support.servers import READY_WITHIN, Servers
from workers.environment import ROOT

ALERTS = [
    rule["alert"]
    for group in yaml.safe_load((HERE / "rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    """Install Prometheus as set-up does."""
    command = [sys.executable, "-m", "deploy.local.setup", "--only", "prometheus"]
    subprocess.run(command, check=True, cwd=ROOT)


def promtool(*arguments: str, within: Path) -> str:
    ended = subprocess.run(
        [PROMETHEUS / "promtool", *arguments],
        cwd=within,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_rules_are_valid_and_fire_when_they_should() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", "rules.yaml", within=HERE)
    promtool("test", "rules", "rules.test.yaml", within=HERE)


def test_the_configuration_for_the_cluster_is_valid(tmp_path: Path) -> None:
    """Debian's build knows no Kubernetes: its discovery is replaced, and the rest is checked."""
    config = yaml.safe_load((HERE / "prometheus.yaml").read_text())
    for job in config["scrape_configs"]:
        assert job.pop("kubernetes_sd_configs")
        job["static_configs"] = [{"targets": ["127.0.0.1:8080"]}]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(HERE / "rules.yaml", tmp_path)

    promtool("check", "config", "prometheus.yaml", within=tmp_path)


@pytest.fixture(scope="module")
async def prometheus(
    servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Prometheus]:
    """Run a fleet and a Prometheus that reads its metrics."""
    health, temporal, port = free_ports(3)
    home = tmp_path_factory.mktemp("prometheus")
    server = Prometheus(home, port, health)
    process = ServerProcess(server, home / "log", READY_WITHIN)
    async with LlmServer() as llm:
        environment = await new_environment(
            servers, llm, HEALTH_PORT=str(health), TEMPORAL_METRICS_PORT=str(temporal)
        )
        async with whole_fleet(environment):
            await process.start()
            yield server
            await process.kill()


async def asked(prometheus: Prometheus, path: str, **parameters: str) -> Any:
    async with httpx.AsyncClient(trust_env=False) as http:
        answer = await http.get(f"{prometheus.url}/api/v1/{path}", params=parameters)
        return answer.raise_for_status().json()["data"]


async def test_prometheus_reads_the_fleet_and_no_alert_fires(prometheus: Prometheus) -> None:
    up = await until(
        lambda: asked(prometheus, "query", query="up"),
        lambda found: [each["value"][1] for each in found["result"]] == ["1"],
    )
    await until(
        lambda: asked(prometheus, "query", query="fleet_stories"), lambda found: found["result"]
    )
    groups = (await asked(prometheus, "rules"))["groups"]

    assert up["result"][0]["metric"]["job"] == "fleet"
    assert [rule["name"] for rule in groups[0]["rules"]] == ALERTS
    alerts = (await asked(prometheus, "alerts"))["alerts"]
    assert [alert for alert in alerts if alert["state"] == "firing"] == []


@pytest.mark.parametrize("name", PANELS)
async def test_prometheus_understands_every_query_of_a_dashboard(
    prometheus: Prometheus, name: str
) -> None:
    dashboard = json.loads((HERE / "dashboards" / f"{name}.json").read_text())

    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            await asked(prometheus, "query", query=target["expr"])
