"""TLS in front of a server that has none, for clients that must check a certificate."""

from __future__ import annotations

import asyncio
import ssl
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.support.authority import Pair


@asynccontextmanager
async def tls_proxy(port: int, pair: Pair, client_ca: str | None = None) -> AsyncIterator[int]:
    """Serve TLS on a free port of 127.0.0.1, and pass everything on to `port` there.

    Args:
        port: Where the server listens.
        pair: The certificate that clients see.
        client_ca: The CA of the certificate that clients must show; None: they need none.

    Yields:
        The port of the proxy.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pair.cert, pair.key)
    context.set_alpn_protocols(["h2", "http/1.1"])
    if client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(client_ca)

    async def copy(source: StreamReader, target: StreamWriter) -> None:
        try:
            while data := await source.read(65_536):
                target.write(data)
                await target.drain()
        except OSError:
            pass  # one of the two went away
        finally:
            target.close()

    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        there, sender = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, sender), copy(there, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
