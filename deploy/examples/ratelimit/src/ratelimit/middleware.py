"""The limit as WSGI middleware: 429 with Retry-After for a client that is over it."""

from __future__ import annotations

import math
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
        wait = limiter.wait_for(environ.get("REMOTE_ADDR", ""))
        if wait == 0:
            return application(environ, start_response)
        seconds = str(math.ceil(wait))
        headers = [("Content-Type", "text/plain; charset=utf-8"), ("Retry-After", seconds)]
        start_response("429 Too Many Requests", headers)
        return [f"Too many requests; try again in {seconds} s.\n".encode()]

    return serve
