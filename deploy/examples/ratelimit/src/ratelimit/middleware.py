"""The limit as WSGI middleware: 429 for a client that is over it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ratelimit.bucket import RateLimiter

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment


def limited(application: WSGIApplication, limiter: RateLimiter) -> WSGIApplication:
    """`application`, of which each client gets no more than `limiter` lets through.

    A client is known by its address, REMOTE_ADDR.
    """

    def serve(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if limiter.wait_for(environ.get("REMOTE_ADDR", "")) == 0:
            return application(environ, start_response)
        headers = [("Content-Type", "text/plain; charset=utf-8")]
        start_response("429 Too Many Requests", headers)
        return [b"Too many requests; try again later.\n"]

    return serve
