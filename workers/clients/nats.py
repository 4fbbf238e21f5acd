"""NATS with JetStream."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import nats
import structlog
from nats.aio.client import Client as Nats
from nats.errors import Error as NatsError
from nats.js.errors import Error as JetStreamError

from workers.clients.connection import (
    ANSWER_WITHIN_S,
    StartError,
    one_line,
    raise_if_not_trusted,
    redact_url,
    require_encryption,
    secret_value,
)
from workers.settings import Settings

RECONNECT_EVERY_S = 1
ENCRYPTED = ("tls", "wss")

INBOX = "_INBOX_fleet"
"""Prefix of the subjects on which the fleet gets what it asked for, so that users who may read
`_INBOX.>` do not get it too."""

log = structlog.stdlib.get_logger(__name__)


def log_failed(where: str, error: Exception) -> None:
    """Log a failed attempt to connect."""
    log.warning("NATS connection failed", where=where, error=repr(error))


@asynccontextmanager
async def open_nats(
    settings: Settings,
    lost: asyncio.Future[None] | None = None,
    failed: Callable[[str, Exception], None] = log_failed,
    at_once: bool = True,
) -> AsyncIterator[Nats]:
    """Connect to JetStream; the client reconnects without limit and buffers nothing.

    A publish fails at once while the server is unavailable, so that the caller can retry it
    visibly.

    Args:
        settings: The address, and the credentials.
        lost: Gets a StartError when no retry can restore the connection.
        failed: Called with the address and the error of every failed attempt.
        at_once: If false, the yielded client connects in the background, however long the server is
            unavailable, for a process that has other work to do.

    Yields:
        The client.

    Raises:
        StartError: wrong address or credential, or no JetStream.
    """
    where = f"NATS at {redact_url(settings.nats_url)}"
    address = urlsplit(settings.nats_url)
    if address.scheme not in ENCRYPTED:
        # With `nats://` a CA does not help: the client takes a server that offers no TLS.
        require_encryption(settings, "NATS_URL", address.hostname or "", "use tls://")
    refused = f"{where}: authentication failed. Check {_credential(settings)}"
    closing = False

    def give_up(why: str) -> None:
        if lost and not closing and not lost.done():
            lost.set_exception(StartError(why))

    async def note(error: Exception) -> None:
        failed(where, error)
        if _is_refusal(error):  # no retry helps when a credential is not valid any more
            give_up(refused)

    async def closed() -> None:
        error = client.last_error  # the client closes on it, without a call of `note`
        if error and _is_refusal(error):
            give_up(refused)
        else:
            give_up(f"{where} closed the connection for good. Look at its log")

    client = Nats()

    async def connect() -> None:
        await client.connect(
            settings.nats_url,
            **_login(settings),
            name="swe-ai-fleet",
            inbox_prefix=INBOX,
            error_cb=note,
            closed_cb=closed,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RECONNECT_EVERY_S,
            ping_interval=10,
            pending_size=0,
        )

    if not at_once:
        connecting = asyncio.create_task(connect())
        try:
            yield client
        finally:
            closing = True
            while not connecting.done():  # the client may miss a cancellation
                connecting.cancel()
                await asyncio.wait([connecting], timeout=1)
            if client.is_connected or client.is_reconnecting:  # otherwise there is nothing to close
                await client.close()
        return
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            await _probe_nats(settings)
            await connect()
            await client.jetstream().account_info()
    except JetStreamError as error:
        raise StartError(
            f"{where} has no JetStream: {one_line(error)}. Start it with -js and a store directory"
        ) from error
    except (TimeoutError, OSError, NatsError) as error:
        if _is_refusal(error):
            raise StartError(refused) from error
        raise_if_not_trusted(where, error, "NATS_CA_FILE", "NATS_URL")
        raise StartError(
            f"{where} is not reachable: {one_line(error)}. Start it, or set NATS_URL"
        ) from error
    try:
        yield client
    finally:
        closing = True
        await client.close()


async def _probe_nats(settings: Settings) -> None:
    """Connect once and report why it fails: the lasting connection would retry forever."""
    errors: list[Exception] = []

    async def note(error: Exception) -> None:
        errors.append(error)

    try:
        probe = await nats.connect(
            settings.nats_url,
            **_login(settings),
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            error_cb=note,
        )
    except NatsError as error:
        cause = errors[-1] if errors else error
        raise next(filter(_is_refusal, errors), error) from cause
    await probe.close()


def _is_refusal(error: Exception) -> bool:
    """Return whether the server rejected the credential.

    The client has a class for this error on some paths only, so its message decides.
    """
    return "authorization" in f"{error}".lower()


def _credential(settings: Settings) -> str:
    """Return the names of the settings that the client authenticates with."""
    if settings.nats_creds_file:
        return "NATS_CREDS_FILE"
    return "NATS_NKEY_SEED_FILE" if settings.nats_nkey_seed_file else "NATS_USER and NATS_PASSWORD"


def _login(settings: Settings) -> dict[str, Any]:
    """Return the arguments of `connect` for authentication and TLS."""
    creds, seed = settings.nats_creds_file, settings.nats_nkey_seed_file
    return {
        "user": settings.nats_user,
        "password": secret_value(settings.nats_password),
        "user_credentials": str(creds) if creds else None,
        "nkeys_seed": str(seed) if seed else None,
        "tls": _nats_tls(settings),
    }


def _nats_tls(settings: Settings) -> ssl.SSLContext | None:
    if settings.nats_ca_file or urlsplit(settings.nats_url).scheme in ENCRYPTED:
        return ssl.create_default_context(cafile=settings.nats_ca_file)
    return None
