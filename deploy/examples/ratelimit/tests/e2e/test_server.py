"""A real HTTP server with a limit, asked by real clients on two loopback addresses."""

import http.client
import threading
from collections.abc import Iterator
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest

from ratelimit import RateLimiter, limited


class Quiet(WSGIRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def hello(environ, start_response):
    start_response("200 OK", [("Content-Length", "5")])
    return [b"hello"]


@pytest.fixture
def port() -> Iterator[int]:
    application = limited(hello, RateLimiter(capacity=3, per_second=0.01))
    with make_server("127.0.0.1", 0, application, handler_class=Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def get(port: int, client: str = "127.0.0.1") -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(
        "127.0.0.1", port, timeout=10, source_address=(client, 0)
    )
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        response.read()
        return response
    finally:
        connection.close()


def test_requests_over_the_limit_are_answered_429(port: int) -> None:
    answers = [get(port) for _ in range(5)]

    assert [answer.status for answer in answers] == [200, 200, 200, 429, 429]


def test_a_greedy_client_does_not_starve_another(port: int) -> None:
    for _ in range(5):
        get(port, "127.0.0.1")

    assert get(port, "127.0.0.2").status == 200
