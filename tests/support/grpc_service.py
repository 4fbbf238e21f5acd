"""A gRPC service in this process, and calls of it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from activities.tokens import Caller, create_token
from bridge.grpc.auth import Access
from bridge.grpc.requests import Requests
from bridge.grpc.server import GrpcServer, Served
from tests.support.fleet import TOKEN_KEY

Metadata = tuple[tuple[str, str], ...]


def bearer(actor: str = "ana", *roles: str, valid_for: timedelta = timedelta(hours=1)) -> Metadata:
    """Return the metadata of a call with a token for that actor."""
    token = create_token(TOKEN_KEY, Caller(actor=actor, roles=frozenset(roles)), valid_for)
    return (("authorization", f"Bearer {token}"),)


@asynccontextmanager
async def serving(
    served: Served,
    calls_per_second: float = 10_000,
    port: int = 0,
    requests: Requests | None = None,
    options: Sequence[tuple[str, int]] = (),
) -> AsyncIterator[grpc.aio.Channel]:
    """Serve the service until the block ends; yield a channel to it, with `options`."""
    access = Access([TOKEN_KEY], calls_per_second)
    server = GrpcServer(
        served, "127.0.0.1", port, access, drain=timedelta(seconds=5), requests=requests
    )
    runs = asyncio.create_task(server.run())
    address = f"127.0.0.1:{server.port}"
    try:
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            yield channel
    finally:
        await server.shutdown()
        await runs


def problem(error: grpc.aio.AioRpcError) -> tuple[str, list[Any]]:
    """Return the reason in a failed call's google.rpc.ErrorInfo, and all its details unpacked."""
    trailers = dict(error.trailing_metadata())
    status = Status.FromString(trailers["grpc-status-details-bin"])
    assert status.message == error.details()
    details = []
    for packed in status.details:
        kind = {each.DESCRIPTOR.full_name: each for each in (ErrorInfo, BadRequest, RetryInfo)}[
            packed.TypeName()
        ]
        detail = kind()
        packed.Unpack(detail)
        details.append(detail)
    return details[0].reason, details
