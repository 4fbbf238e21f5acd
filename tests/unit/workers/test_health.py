"""The health endpoint: its answers while servers or the process itself do not respond."""

import asyncio

import httpx
import pytest

from deploy.local.ports import free_ports
from workers import health
from workers.clients.connection import StartError


async def well() -> None:
    """Return at once, as a server that responds."""


async def away() -> None:
    raise ConnectionError("connection refused")


async def silent() -> None:
    await asyncio.Event().wait()


async def get(url: str) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
        return await http.get(url)


async def test_it_is_healthy_while_all_servers_answer() -> None:
    with health.serve("127.0.0.1", 0, "story", {"nats": well, "neo4j": well}) as url:
        answer = await get(f"{url}/health")

    assert answer.status_code == 200
    assert answer.json() == {
        "process": "story",
        "status": "ok",
        "checks": {"nats": "ok", "neo4j": "ok"},
    }


async def short() -> str:
    return "1 MiB of 1 MiB are used: raise maxmemory"


async def test_a_warning_is_shown_and_takes_no_process_out_of_service() -> None:
    with health.serve("127.0.0.1", 0, "story", {"nats": well, "valkey": short}) as url:
        answer = await get(f"{url}/health")
    with health.serve("127.0.0.1", 0, "story", {"nats": away, "valkey": short}) as url:
        failing = await get(f"{url}/health")

    assert answer.status_code == 200
    assert answer.json() == {
        "process": "story",
        "status": "warning",
        "checks": {"nats": "ok", "valkey": "warning: 1 MiB of 1 MiB are used: raise maxmemory"},
    }
    assert (failing.status_code, failing.json()["status"]) == (503, "failing")


async def test_it_reports_unreachable_and_silent_servers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health, "CHECK_WITHIN_S", 2)

    with health.serve("127.0.0.1", 0, "story", {"nats": away, "neo4j": well, "llm": silent}) as url:
        answer = await get(f"{url}/health")

    assert answer.status_code == 503
    assert answer.json() == {
        "process": "story",
        "status": "failing",
        "checks": {
            "nats": "ConnectionError: connection refused",
            "neo4j": "ok",
            "llm": "no answer in 2 s",
        },
    }


async def test_a_process_whose_event_loop_is_stuck_reports_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health, "STUCK_AFTER_S", 0.1)

    with health.serve("127.0.0.1", 0, "story", {"nats": well}) as url:
        # This call blocks the event loop on which the checks would run.
        answer = httpx.Client(trust_env=False, timeout=30).get(f"{url}/health")

    assert answer.status_code == 503
    assert "its event loop is stuck" in answer.json()["checks"]["process"]


async def test_a_process_whose_servers_are_away_is_live_and_a_stuck_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with health.serve("127.0.0.1", 0, "story", {"nats": away}) as url:
        well_enough = await get(f"{url}/live")
        monkeypatch.setattr(health, "STUCK_AFTER_S", 0.1)
        # This call blocks the event loop.
        stuck = httpx.Client(trust_env=False, timeout=30).get(f"{url}/live")

    assert (well_enough.status_code, stuck.status_code) == (200, 503)


async def test_it_serves_metrics_and_names_its_paths() -> None:
    with health.serve("127.0.0.1", 0, "story", {}) as url:
        metrics = await get(f"{url}/metrics")
        elsewhere = await get(f"{url}/")

    assert "python_info" in metrics.text
    assert elsewhere.status_code == 404
    assert elsewhere.json() == {"paths": ["/health", "/live", "/metrics"]}


async def test_it_includes_the_metrics_of_the_sdk() -> None:
    with health.serve("127.0.0.1", 0, "story", {}) as sdk:
        with health.serve("127.0.0.1", 0, "story", {}, f"{sdk}/metrics") as url:
            metrics = await get(f"{url}/metrics")
        with health.serve("127.0.0.1", 0, "story", {}, f"{sdk}/elsewhere") as url:
            failed = await get(f"{url}/metrics")

    assert metrics.text.count("# TYPE python_info gauge") == 2
    assert failed.status_code == 500


async def test_a_port_that_is_taken_is_refused_and_one_that_was_left_is_not() -> None:
    (port,) = free_ports(1)

    with (
        health.serve("127.0.0.1", port, "story", {}),
        pytest.raises(StartError, match=f"127.0.0.1:{port}: the port is taken. Set HEALTH_PORT"),
        health.serve("127.0.0.1", port, "story", {}),
    ):
        pass
    with health.serve("127.0.0.1", port, "story", {}) as url:
        assert (await get(f"{url}/health")).status_code == 200
