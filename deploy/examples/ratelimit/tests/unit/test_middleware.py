"""The middleware, called as a WSGI server does."""

from typing import Any

from ratelimit import RateLimiter, limited


def hello(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [b"hello"]


def get(application: Any, address: str) -> tuple[str, dict[str, str], bytes]:
    answer: list[Any] = []
    body = b"".join(application({"REMOTE_ADDR": address}, lambda *a: answer.extend(a)))
    return answer[0], dict(answer[1]), body


def test_a_request_within_the_limit_reaches_the_application() -> None:
    assert get(limited(hello, RateLimiter(1, 1.0)), "192.0.2.1") == ("200 OK", {}, b"hello")


def test_a_request_over_the_limit_is_refused() -> None:
    application = limited(hello, RateLimiter(1, 0.4, lambda: 0.0))
    get(application, "192.0.2.1")

    status, headers, body = get(application, "192.0.2.1")

    assert status == "429 Too Many Requests"
    assert headers["Content-Type"].startswith("text/plain")
    assert body == b"Too many requests; try again later.\n"
