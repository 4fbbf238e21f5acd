"""A process's health over HTTP: `/health` and `/metrics`.

`/health` answers 200 only while every worker runs and every server it needs answers, and else 503;
its JSON says what is wrong. It is served by a thread of its own, so that a process whose event
loop is stuck says so.
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

from prometheus_client import make_wsgi_app

from workers.clients import StartError

Check = Callable[[], Awaitable[object]]
"""Returns while what it checks is well, and raises otherwise."""

OK = "ok"
CHECK_WITHIN_S = 3.0
STUCK_AFTER_S = 2 * CHECK_WITHIN_S


async def examine(checks: Mapping[str, Check]) -> dict[str, str]:
    """Run all checks at once: `ok`, or what is wrong, by name."""
    words = await asyncio.gather(*(_word(check) for check in checks.values()))
    return dict(zip(checks, words, strict=True))


async def _word(check: Check) -> str:
    try:
        async with asyncio.timeout(CHECK_WITHIN_S):
            await check()
    except TimeoutError:
        return f"no answer in {CHECK_WITHIN_S:g} s"
    except Exception as error:  # whatever a check raises is what /health answers  # noqa: BLE001
        return f"{type(error).__name__}: {error}"[:300]
    return OK


@contextmanager
def serve(host: str, port: int, checks: Mapping[str, Check]) -> Iterator[str]:
    """Serve until the block ends; the address that it listens on. port 0: any free one.

    Raises:
        StartError: the port is taken, or the address is not this machine's.
    """
    app = _App(asyncio.get_running_loop(), checks)
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
        """A probe every few seconds is no news."""


class _App:
    def __init__(self, loop: asyncio.AbstractEventLoop, checks: Mapping[str, Check]) -> None:
        self._loop = loop
        self._checks = checks
        self._metrics: Callable[..., Iterable[bytes]] = make_wsgi_app()

    def __call__(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/health":
                return self._health(start)
            case "/metrics":
                return self._metrics(environ, start)
            case _:
                return _answer(start, HTTPStatus.NOT_FOUND, {"paths": ["/health", "/metrics"]})

    def _health(self, start: StartResponse) -> Iterable[bytes]:
        examination = asyncio.run_coroutine_threadsafe(examine(self._checks), self._loop)
        try:
            found = examination.result(STUCK_AFTER_S)
        except TimeoutError:
            found = {"process": f"its event loop is stuck: no turn in {STUCK_AFTER_S:g} s"}
        well = all(word == OK for word in found.values())
        status = HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE
        return _answer(start, status, {"status": OK if well else "failing", "checks": found})


def _answer(start: StartResponse, status: HTTPStatus, body: object) -> Iterable[bytes]:
    start(f"{status.value} {status.phrase}", [("Content-Type", "application/json")])
    return [json.dumps(body, indent=1).encode() + b"\n"]
