"""Refusal of requests that a web page of another site sends to a server on this machine.

A page may send requests to 127.0.0.1, and a name that its owner resolves to 127.0.0.1 makes it the
same site. The browser then names the page in `Origin`, and the owner's name in `Host`.
"""

from collections.abc import Awaitable, Callable, Collection, MutableMapping, Sequence
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def own_hosts(port: int) -> frozenset[str]:
    """Return the values of `Host` by which a browser on this machine reaches the port."""
    return frozenset(f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]"))


def refusal(
    hosts: Sequence[str],
    origins: Sequence[str],
    own: Collection[str] | None,
    allowed: Collection[str] = (),
) -> str:
    """Return why a request is refused, or ''.

    Args:
        hosts: The values of its `Host`.
        origins: The values of its `Origin`.
        own: The values of `Host` that are served; None: all.
        allowed: Origins whose pages are served, in addition to those of the same host.
    """
    if len(hosts) != 1 or (own is not None and hosts[0].lower() not in own):
        served = ", ".join(sorted(own)) if own else "one"
        return f"Host is {', '.join(hosts) or 'missing'}: must be {served}"
    here = hosts[0].lower()
    served_origins = {f"http://{here}", f"https://{here}", *allowed}
    if any(origin.lower() not in served_origins for origin in origins):
        return f"Origin is {', '.join(origins)}: pages of other sites are not served"
    return ""


class SameSite:
    """ASGI middleware: answers 403 to what `refusal` refuses."""

    def __init__(
        self, app: App, own: Collection[str] | None, origins: Collection[str] = ()
    ) -> None:
        self._app = app
        self._own, self._origins = own, origins

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection of the server."""
        if scope["type"] == "http":
            given = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
            hosts = [value for name, value in given if name == b"host"]
            origins = [value for name, value in given if name == b"origin"]
            if why := refusal(hosts, origins, self._own, self._origins):
                text = (b"content-type", b"text/plain; charset=utf-8")
                await send({"type": "http.response.start", "status": 403, "headers": [text]})
                await send({"type": "http.response.body", "body": why.encode()})
                return
        await self._app(scope, receive, send)
