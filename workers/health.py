"""A process's health over HTTP: `/health`, `/live` and `/metrics`.

`/health` answers 200 only while every worker runs and every server it needs answers, otherwise 503;
its JSON names the process and what is wrong. A warning is in the JSON too, and leaves the answer at
200. A separate thread serves it, so that it also reports a process whose event loop is stuck.

`/live` answers 503 only for such a process. A restart helps it, and does not bring back a server.
"""

import asyncio
import errno
import json
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

import httpx
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from workers.clients.connection import StartError

Check = Callable[[], Awaitable[object]]
"""A function that returns if what it checks is healthy, and raises otherwise. A text that it
returns is a warning."""

PATHS = ["/health", "/live", "/metrics"]
OK = "ok"
WARNING = "warning: "
CHECK_WITHIN_S = 3.0
STUCK_AFTER_S = 2 * CHECK_WITHIN_S


async def examine(checks: Mapping[str, Check]) -> dict[str, str]:
    """Run all checks at once; return `ok`, the warning or the error for each name."""
    words = await asyncio.gather(*(_word(check) for check in checks.values()))
    return dict(zip(checks, words, strict=True))


async def _word(check: Check) -> str:
    try:
        async with asyncio.timeout(CHECK_WITHIN_S):
            found = await check()
    except TimeoutError:
        return f"no answer in {CHECK_WITHIN_S:g} s"
    except Exception as error:  # /health reports whatever a check raises  # noqa: BLE001
        return f"{type(error).__name__}: {error}"[:300]
    return f"{WARNING}{found}" if isinstance(found, str) and found else OK


@contextmanager
def serve(
    host: str, port: int, process: str, checks: Mapping[str, Check], more_metrics: str = ""
) -> Iterator[str]:
    """Serve until the block ends.

    Args:
        host: The address to listen on.
        port: The port to listen on; 0: any free one.
        process: The name that `/health` answers with.
        checks: The checks that `/health` runs, by name.
        more_metrics: The address of metrics that `/metrics` includes; empty: none.

    Yields:
        The address that it listens on.

    Raises:
        StartError: the port is in use, or the address does not belong to this machine.
    """
    app = _App(asyncio.get_running_loop(), process, checks, more_metrics)
    try:
        server = make_server(host, port, app, server_class=_Server, handler_class=_Quiet)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        why = "the port is taken" if taken else str(error)
        raise StartError(
            f"The health endpoint cannot listen on {host}:{port}: {why}. "
            "Set HEALTH_PORT and HEALTH_HOST"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="health", daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: probes arrive every few seconds."""


class _App:
    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        process: str,
        checks: Mapping[str, Check],
        more_metrics: str,
    ) -> None:
        self._loop = loop
        self._process = process
        self._checks = checks
        self._more_metrics = more_metrics

    def __call__(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/health":
                return self._report(start, self._checks)
            case "/live":
                return self._report(start, {})
            case "/metrics":
                return self._metrics(start)
            case _:
                return _answer(start, HTTPStatus.NOT_FOUND, {"paths": PATHS})

    def _metrics(self, start: StartResponse) -> Iterable[bytes]:
        metrics = [generate_latest()]
        if self._more_metrics:
            more = httpx.get(self._more_metrics, timeout=CHECK_WITHIN_S, trust_env=False)
            metrics.append(more.raise_for_status().content)
        start("200 OK", [("Content-Type", CONTENT_TYPE_LATEST)])
        return metrics

    def _report(self, start: StartResponse, checks: Mapping[str, Check]) -> Iterable[bytes]:
        examination = asyncio.run_coroutine_threadsafe(examine(checks), self._loop)
        try:
            found = examination.result(STUCK_AFTER_S)
        except TimeoutError:
            found = {"process": f"its event loop is stuck: no turn in {STUCK_AFTER_S:g} s"}
        failing = [word for word in found.values() if word != OK and not word.startswith(WARNING)]
        status = HTTPStatus.SERVICE_UNAVAILABLE if failing else HTTPStatus.OK
        well = OK if all(word == OK for word in found.values()) else "warning"
        word = "failing" if failing else well
        return _answer(start, status, {"process": self._process, "status": word, "checks": found})


def _answer(start: StartResponse, status: HTTPStatus, body: object) -> Iterable[bytes]:
    start(f"{status.value} {status.phrase}", [("Content-Type", "application/json")])
    return [json.dumps(body, indent=1).encode() + b"\n"]
