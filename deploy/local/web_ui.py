"""The proxy in front of Temporal's Web UI: it serves only its own pages, and decrypts payloads.

The Web UI answers to any `Host`, so a web page whose name resolves to 127.0.0.1 could steer
workflows. It listens on a secret loopback address, and this process is in front of it:

    python -m deploy.local.web_ui PORT ADDRESS_OF_THE_UI

The Web UI cannot send a token to the codec server. What its pages send to CODEC_PATH goes to the
codec server with FLEET_TOKEN.
"""

import asyncio
import io
import sys
from asyncio import StreamReader, StreamWriter
from http.client import HTTPException, parse_headers
from typing import NamedTuple

from workers.clients.connection import secret_value
from workers.same_site import own_hosts, refusal
from workers.settings import load

LOOPBACK = "127.0.0.1"
HEAD_BYTES = 64 * 1024
HEAD_WITHIN_S = 30.0
CODEC_PATH = "/codec"
"""Where the pages find the codec server: on the address of the Web UI, whatever its name is."""


class Codec(NamedTuple):
    """The codec server: its port on loopback, and the token for it."""

    port: int
    token: str


async def main(port: int, ui: str, codec: Codec) -> None:
    """Serve until cancelled."""
    own = own_hosts(port)

    async def handle(reader: StreamReader, writer: StreamWriter) -> None:
        try:
            await serve(reader, writer, ui, port, own, codec)
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            pass  # the browser or the Web UI went away
        finally:
            writer.close()

    server = await asyncio.start_server(handle, LOOPBACK, port, limit=HEAD_BYTES)
    async with server:
        await server.serve_forever()


async def serve(
    reader: StreamReader,
    writer: StreamWriter,
    ui: str,
    port: int,
    own: frozenset[str],
    codec: Codec,
) -> None:
    """Pass one request and its answer on, or answer 403.

    Args:
        reader: What the browser sends.
        writer: What it gets.
        ui: The address of the Web UI itself.
        port: Its port, and that of this proxy.
        own: The values of `Host` that are served.
        codec: Where requests to CODEC_PATH go.
    """
    async with asyncio.timeout(HEAD_WITHIN_S):
        head = await reader.readuntil(b"\r\n\r\n")
    request, _, rest = head.partition(b"\r\n")
    try:
        headers = parse_headers(io.BytesIO(rest))
        why = refusal(headers.get_all("Host", []), headers.get_all("Origin", []), own)
    except HTTPException as error:
        why = f"its headers are malformed: {error!r}"
    if why:
        body = why.encode()
        writer.write(
            b"HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain; charset=utf-8\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        await writer.drain()
        return
    del headers["Connection"]
    method, _, target = request.partition(b" ")
    if target.startswith(f"{CODEC_PATH}/".encode()):
        request = method + b" " + target.removeprefix(CODEC_PATH.encode())
        ui, port = LOOPBACK, codec.port
        for name in ("Host", "Origin", "Authorization", "Cookie"):
            del headers[name]
        headers["Host"] = f"{LOOPBACK}:{codec.port}"
        headers["Authorization"] = f"Bearer {codec.token}"
    kept = b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in headers.items())
    there, sender = await asyncio.open_connection(ui, port)
    try:
        # One request for each connection, so that each is checked.
        sender.write(request + b"\r\n" + kept + b"Connection: close\r\n\r\n")
        sending = asyncio.create_task(_copy(reader, sender))
        try:
            await _copy(there, writer)
        finally:
            sending.cancel()
            await asyncio.wait([sending])
    finally:
        sender.close()


async def _copy(source: StreamReader, target: StreamWriter) -> None:
    while data := await source.read(HEAD_BYTES):
        target.write(data)
        await target.drain()


def the_codec() -> Codec:
    """Return the codec server of the stack in FLEET_HOME."""
    settings = load()
    return Codec(settings.codec_port, secret_value(settings.fleet_token) or "")


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], the_codec()))
