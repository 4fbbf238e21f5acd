"""NATS with JetStream."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import nats
import structlog
from nats.aio.client import Client as Nats
from nats.errors import AuthorizationError
from nats.errors import Error as NatsError
from nats.js.errors import Error as JetStreamError

from workers.clients import ANSWER_WITHIN_S, StartError, plain, words
from workers.settings import Settings

RECONNECT_EVERY_S = 1

log = structlog.stdlib.get_logger(__name__)


@asynccontextmanager
async def open_nats(
    settings: Settings, lost: asyncio.Future[None] | None = None
) -> AsyncIterator[Nats]:
    """Connect to JetStream; it reconnects without limit and buffers nothing.

    What is published while the server is away fails at once, so that whoever asked can retry it
    in sight of people. `lost` gets a StartError when the connection is closed for good.

    Raises:
        StartError: wrong address or credential, or no JetStream.
    """
    where = f"NATS at {settings.nats_url}"
    errors: list[Exception] = []
    closing = False

    async def note(error: Exception) -> None:
        errors[:] = [error]
        log.warning("NATS connection failed", where=settings.nats_url, error=repr(error))

    async def closed() -> None:
        if lost and not closing and not lost.done():
            last = errors[-1] if errors else "no reason given"
            lost.set_exception(StartError(f"{where} closed the connection for good: {last}"))

    client = Nats()
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            await _probe_nats(settings)
            await client.connect(
                settings.nats_url,
                user=settings.nats_user,
                password=plain(settings.nats_password),
                tls=_nats_tls(settings),
                name="swe-ai-fleet",
                error_cb=note,
                closed_cb=closed,
                max_reconnect_attempts=-1,
                reconnect_time_wait=RECONNECT_EVERY_S,
                ping_interval=10,
                pending_size=0,
            )
            await client.jetstream().account_info()
    except JetStreamError as error:
        raise StartError(
            f"{where} has no JetStream: {words(error)}. Start it with -js and a store directory"
        ) from error
    except AuthorizationError as error:
        raise StartError(f"{where} does not let us in. Mend NATS_USER and NATS_PASSWORD") from error
    except (TimeoutError, OSError, NatsError) as error:
        raise StartError(
            f"{where} is not reachable: {words(error)}. Start it, or set NATS_URL"
        ) from error
    try:
        yield client
    finally:
        closing = True
        await client.close()


async def _probe_nats(settings: Settings) -> None:
    """Connect once and say why not: the lasting connection would try for ever."""
    errors: list[Exception] = []

    async def note(error: Exception) -> None:
        errors.append(error)

    try:
        probe = await nats.connect(
            settings.nats_url,
            user=settings.nats_user,
            password=plain(settings.nats_password),
            tls=_nats_tls(settings),
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            error_cb=note,
        )
    except NatsError as error:
        raise next((e for e in errors if isinstance(e, AuthorizationError)), error) from error
    await probe.close()


def _nats_tls(settings: Settings) -> ssl.SSLContext | None:
    if settings.nats_ca_file or settings.nats_url.startswith(("tls://", "wss://")):
        return ssl.create_default_context(cafile=settings.nats_ca_file)
    return None
