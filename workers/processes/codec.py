"""The process `codec`: Temporal's codec server, by which the Web UI and the `temporal` CLI read.

It needs a token in each request, serves pages of the same address and of CODEC_ORIGINS only, and
leaves nothing in caches. See https://docs.temporal.io/codec-server for the protocol.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path

import structlog
import uvicorn
from google.protobuf.json_format import MessageToJson, Parse, ParseError
from prometheus_client import Counter
from redis.exceptions import RedisError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from temporalio.api.common.v1 import Payload, Payloads
from temporalio.common import RawValue
from temporalio.converter import DataConverter
from temporalio.exceptions import ApplicationError

from activities.revoked import RevokedTokens
from bridge.grpc.auth import Access
from workers.clients.connection import StartError, is_loopback
from workers.external_storage import PayloadDamaged, PayloadMissing
from workers.payload_codec import PayloadAltered, encrypting_converter, unreadable
from workers.processes.process import ProcessContext, RunningProcess, certificate, token_keys
from workers.same_site import SameSite, own_hosts
from workers.settings import Settings
from workflows.models.errors import ErrorType

REQUEST_BYTES = 16 * 1024 * 1024
"""The largest request: a page of a history in base64."""

DECODED_BYTES = 64 * 1024 * 1024
"""The largest answer before it is written as JSON. Compressed payloads are small requests."""

REQUEST_WITHIN_S = 30.0
CONNECTIONS = 128

STATUS = {
    ErrorType.UNAUTHENTICATED: 401,
    ErrorType.RATE_LIMIT: 429,
    ErrorType.PAYLOAD_KEY_MISSING: 422,
}
"""The HTTP status of each type of error; of all others 503."""

HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

REQUESTS = Counter("fleet_codec_requests", "Requests to the codec server", ["endpoint", "status"])

log = structlog.stdlib.get_logger(__name__)


@asynccontextmanager
async def process(base: ProcessContext) -> AsyncIterator[RunningProcess]:
    """Serve until the process ends."""
    settings = base.settings
    if not settings.encryption_keys:
        raise StartError(
            "PAYLOAD_KEYS (keys that payloads are encrypted with) is not set: the codec server has "
            "nothing to decrypt. Set it to the keys of the workers"
        )
    access = Access(
        token_keys(settings), settings.grpc_calls_per_second, RevokedTokens(base.valkey)
    )
    app = codec_app(settings, access, base.temporal.data_converter)
    server = CodecServer(app, settings)
    log.info("serves", service="codec", host=settings.codec_host, port=server.port)
    yield RunningProcess({"codec": server})


class TooLarge(Exception):
    """A request or its answer is larger than the server takes."""


def codec_app(settings: Settings, access: Access, converter: DataConverter) -> Starlette:
    """Return the application: /encode, /decode and /download, also with a namespace before.

    Args:
        settings: Host, port, origins and keys.
        access: Admits callers by their tokens.
        converter: The workers' converter, with their external storage.
    """
    endpoints = Endpoints(converter, encrypting_converter(settings.encryption_keys))
    work = {
        "encode": endpoints.encode,
        "decode": endpoints.decode,
        "download": endpoints.decode,
    }
    routes = [
        Route(path, _endpoint(name, access, work[name]), methods=["POST"])
        for name in work
        for path in (f"/{name}", f"/{{namespace}}/{name}")
    ]
    on_loopback = is_loopback(settings.codec_host)
    own = own_hosts(settings.codec_port) if on_loopback else None
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(SameSite, own=own, origins=settings.web_ui_origins),
            Middleware(
                CORSMiddleware,
                allow_origins=settings.web_ui_origins,
                allow_credentials=True,
                allow_methods=["POST"],
                allow_headers=["authorization", "authorization-extras", "x-namespace"],
            ),
        ],
    )


Work = Callable[[Request, Sequence[Payload]], Awaitable[list[Payload]]]


class Endpoints:
    """What the endpoints do with payloads."""

    def __init__(self, converter: DataConverter, codec: DataConverter) -> None:
        """Read with the first converter, external storage included; write with the second."""
        self._converter, self._codec = converter, codec

    async def encode(self, request: Request, payloads: Sequence[Payload]) -> list[Payload]:
        """Encrypt the payloads. They are not stored externally, so the sender's limits count."""
        return await self._codec.encode([RawValue(payload) for payload in payloads])

    async def decode(self, request: Request, payloads: Sequence[Payload]) -> list[Payload]:
        """Decrypt the payloads; the Web UI asks for large ones to be left out, and downloads them.

        Raises:
            ApplicationError: `PayloadKeyMissing`.
            PayloadAltered, PayloadMissing, PayloadDamaged: a payload cannot be read.
            TooLarge: they are larger than DECODED_BYTES together.
        """
        keep = request.query_params.get("preserveStorageRefs") == "true"
        decoded, size = [], 0
        for payload in payloads:
            if not (keep and payload.external_payloads):
                payload = await self._read(payload)
            size += payload.ByteSize()
            if size > DECODED_BYTES:
                raise TooLarge(f"the payloads have more than {DECODED_BYTES} bytes: ask for fewer")
            decoded.append(payload)
        return decoded

    async def _read(self, payload: Payload) -> Payload:
        (value,) = await self._converter.decode([payload], [RawValue])
        if error := unreadable(value.payload):
            raise error
        return Payload.FromString(value.payload.SerializeToString())


def _endpoint(name: str, access: Access, work: Work) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        status, content = await _answer(request, access, work)
        REQUESTS.labels(name, status).inc()
        kind = "application/json" if status == 200 else "text/plain; charset=utf-8"
        return Response(content, status, HEADERS, media_type=kind)

    return answer


async def _answer(request: Request, access: Access, work: Work) -> tuple[int, str]:
    try:
        await access.admit(request.headers.items())
        payloads = await _payloads(request)
        result = await work(request, payloads)
    except ApplicationError as error:
        status = STATUS.get(ErrorType(error.type), 503) if error.type else 503
        return status, error.message
    except (PayloadAltered, PayloadMissing, PayloadDamaged) as error:
        return 422, f"the payload cannot be read: {error}"
    except TooLarge as error:
        return 413, str(error)
    except (ParseError, UnicodeDecodeError, RecursionError) as error:
        return 400, f'the body is not {{"payloads": [...]}} in JSON: {error}'[:500]
    except TimeoutError:
        return 408, f"the request has not arrived in {REQUEST_WITHIN_S:g} s"
    except RedisError as error:
        return 503, f"Valkey, which keeps large payloads, does not answer: {error}"
    return 200, MessageToJson(Payloads(payloads=result), indent=None)


async def _payloads(request: Request) -> Sequence[Payload]:
    body = bytearray()
    async with asyncio.timeout(REQUEST_WITHIN_S):
        async for chunk in request.stream():
            body += chunk
            if len(body) > REQUEST_BYTES:
                raise TooLarge(f"the request has more than {REQUEST_BYTES} bytes: ask for less")
    return Parse(body.decode(), Payloads(), ignore_unknown_fields=True).payloads


class CodecServer:
    """The HTTP server, as a job of the process."""

    def __init__(self, app: Starlette, settings: Settings) -> None:
        """Listen.

        Raises:
            StartError: the address cannot be listened on, or beyond loopback there is no TLS.
        """
        host, port = settings.codec_host, settings.codec_port
        pair = certificate("CODEC", host, settings.codec_tls_cert, settings.codec_tls_key)
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, port), family=family)
        except OSError as error:
            raise StartError(
                f"The codec server cannot listen on {host}:{port}: {error.strerror}. "
                "Set CODEC_HOST and CODEC_PORT"
            ) from error
        self._server = _Server(_config(app, pair, settings.drain_seconds))

    @property
    def port(self) -> int:
        """The port that it listens on."""
        port: int = self._socket.getsockname()[1]
        return port

    @property
    def is_running(self) -> bool:
        return self._server.started and not self._server.should_exit

    async def run(self) -> None:
        """Serve until `shutdown`."""
        await self._server.serve(sockets=[self._socket])

    async def shutdown(self) -> None:
        """Answer the requests in progress, take no further ones."""
        self._server.should_exit = True


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process."""
        yield


def _config(app: Starlette, pair: tuple[Path, Path] | None, drain: timedelta) -> uvicorn.Config:
    cert, key = pair or (None, None)
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(drain.total_seconds()),
        ssl_certfile=cert,
        ssl_keyfile=key,
    )
