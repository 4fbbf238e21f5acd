"""What a web page of another site can do to Temporal on this machine, by attacks."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from deploy.local.server import write_private
from deploy.local.servers import Temporal, WebUi
from tests.support.listeners import addresses_of
from tests.support.polling import WITHIN_S
from tests.support.servers import RunningServer, started

NAMESPACES = "/api/v1/namespaces"


@pytest.fixture
async def ui(temporal: RunningServer, tmp_path: Path) -> AsyncIterator[WebUi]:
    behind = temporal.process.server
    assert isinstance(behind, Temporal)
    server = WebUi(tmp_path / "ui", behind)
    async with started(server, server.url, port=behind.ui_port):
        yield server


@pytest.fixture
async def browser(ui: WebUi) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=ui.url, trust_env=False) as http:
        yield http


async def test_the_web_ui_serves_its_own_pages(browser: httpx.AsyncClient, ui: WebUi) -> None:
    page = await browser.get("/")
    own = await browser.get(NAMESPACES, headers={"Origin": ui.url})
    again = await browser.get(NAMESPACES, headers={"Host": f"localhost:{browser.base_url.port}"})

    assert "<html" in page.text
    assert "default" in own.text
    assert "default" in again.text


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8233"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
async def test_the_web_ui_refuses_pages_of_other_sites(
    browser: httpx.AsyncClient, method: str, headers: dict[str, str]
) -> None:
    answer = await browser.request(method, NAMESPACES, headers=headers, content=b"{}")

    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    assert "must be" in answer.text or "not served" in answer.text


async def test_a_second_request_of_a_connection_is_checked_too(ui: WebUi) -> None:
    port = ui.temporal.ui_port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    first = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: keep-alive\r\n\r\n"
    second = f"GET {NAMESPACES} HTTP/1.1\r\nHost: evil.example\r\n\r\n"

    writer.write((first + second).encode())
    answers = await asyncio.wait_for(reader.read(-1), WITHIN_S)

    assert answers.count(b"HTTP/1.1 ") == 1
    assert b"namespaceInfo" not in answers
    writer.close()


@pytest.mark.parametrize("request_bytes", [b"\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"x" * 70_000])
async def test_a_malformed_request_leaves_the_server_running(
    ui: WebUi, request_bytes: bytes
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", ui.temporal.ui_port)
    writer.write(request_bytes)
    try:
        answer = await asyncio.wait_for(reader.read(-1), WITHIN_S)
    except ConnectionResetError:
        answer = b""
    writer.close()

    assert answer == b"" or answer.startswith(b"HTTP/1.1 403")
    await ui.check()


async def test_temporals_http_api_is_closed_on_every_port(temporal: RunningServer) -> None:
    assert temporal.process.pid
    answers = []
    async with httpx.AsyncClient(trust_env=False) as http:
        for address, port in addresses_of({temporal.process.pid}):
            for host in (f"127.0.0.1:{port}", "evil.example"):
                if address.startswith("127.") and address != "127.0.0.1":
                    continue  # the Web UI, whose address is secret
                where = f"http://127.0.0.1:{port}{NAMESPACES}"
                try:
                    answer = await http.post(
                        f"{where}/default/workflows/w",
                        headers={"Host": host, "Content-Type": "text/plain"},
                        content=b"{}",
                    )
                except httpx.HTTPError:
                    continue  # gRPC
                answers.append(answer.status_code)

    assert 403 in answers
    assert set(answers) <= {403, 404, 415}


def test_the_web_uis_address_differs_in_each_stack(tmp_path: Path) -> None:
    found = {Temporal(tmp_path / name).ui_address for name in "abc"}

    assert len(found) == 3
    assert "127.0.0.1" not in found


# --- the codec server behind the proxy ------------------------------------------------------------


class StandIn:
    """An HTTP server on loopback that notes the requests, in the place of the codec server."""

    def __init__(self) -> None:
        self.requests: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        body = await reader.readexactly(int(length[1])) if length else b""
        self.requests.append((head + body).decode())
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        await writer.drain()
        writer.close()


@pytest.fixture
async def codec(temporal: RunningServer, tmp_path: Path) -> AsyncIterator[tuple[StandIn, str]]:
    """Run a proxy whose codec server notes what it gets; yield it with the proxy's URL."""
    behind = temporal.process.server
    assert isinstance(behind, Temporal)
    noting = StandIn()
    server = await asyncio.start_server(noting.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    write_private(tmp_path / "env", f"CODEC_PORT={port}\nFLEET_TOKEN=the.stacks.token\n")
    proxy = WebUi(tmp_path / "ui", behind, tmp_path)
    async with server, started(proxy, proxy.url, port=behind.ui_port):
        yield noting, proxy.url


async def test_the_door_sends_the_codec_server_its_own_token(codec: tuple[StandIn, str]) -> None:
    noting, url = codec
    theirs = {"Authorization": "Bearer theirs", "Cookie": "a=b", "Origin": url}
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        answer = await http.post("/codec/decode?preserveStorageRefs=true", json={}, headers=theirs)

    assert answer.text == "{}"
    (request,) = noting.requests
    assert request.startswith("POST /decode?preserveStorageRefs=true HTTP/1.1\r\n")
    assert "Authorization: Bearer the.stacks.token" in request
    assert not [word for word in ("theirs", "Cookie", "Origin") if word in request]


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://evil.example"}, {"Host": "evil.example"}], ids=str
)
async def test_pages_of_other_sites_get_nothing_decrypted(
    codec: tuple[StandIn, str], headers: dict[str, str]
) -> None:
    noting, url = codec
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        answer = await http.post("/codec/decode", json={}, headers=headers)

    assert answer.status_code == 403
    assert noting.requests == []
