"""The clients of a process, opened with an answer or refused: which server, where, what to do."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import nats
import neo4j
import openai
import structlog
from nats.aio.client import Client as Nats
from nats.errors import AuthorizationError
from nats.errors import Error as NatsError
from neo4j.exceptions import AuthError, ConfigurationError, DriverError, Neo4jError
from pydantic import SecretStr
from redis.asyncio import Redis
from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    RedisError,
    ResponseError,
)
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import Client, Plugin
from temporalio.converter import DataConverter
from temporalio.runtime import Runtime
from temporalio.service import RPCError, RPCStatusCode, TLSConfig

from activities import llm
from workers.settings import Settings

ANSWER_WITHIN_S = 8.0
"""How long a server has to answer at start-up, in seconds."""

RECONNECT_EVERY_S = 1
KEEPS_EVERYTHING = ("noeviction", "volatile-lru", "volatile-lfu", "volatile-random", "volatile-ttl")

log = structlog.stdlib.get_logger(__name__)


class StartError(Exception):
    """A process cannot start, or go on: one line that says which server, where, what to do."""


@dataclass(frozen=True)
class Engine:
    """The LLM's client, and the model for agents that name none."""

    client: openai.AsyncOpenAI
    model: str


@contextmanager
def _refused(what: str, remedy: str, *kinds: type[Exception]) -> Iterator[None]:
    """Make a foreign error the one line that a person reads."""
    try:
        yield
    except kinds as error:
        raise StartError(f"{what}: {_words(error)}. {remedy}") from error


def _words(error: Exception) -> str:
    return " ".join(f"{error}".split())[:300] or type(error).__name__


# --- Temporal -------------------------------------------------------------------------------------


async def open_temporal(
    settings: Settings,
    converter: DataConverter,
    runtime: Runtime | None = None,
    plugins: list[Plugin] | None = None,
) -> Client:
    """Connect, and see that the namespace is there.

    Raises:
        StartError: wrong address, credential or namespace.
    """
    where = f"Temporal at {settings.temporal_address}"
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            client = await Client.connect(
                settings.temporal_address,
                namespace=settings.temporal_namespace,
                api_key=_plain(settings.temporal_api_key),
                tls=_temporal_tls(settings),
                data_converter=converter,
                runtime=runtime,
                plugins=plugins or [],
            )
            await client.workflow_service.describe_namespace(
                DescribeNamespaceRequest(namespace=settings.temporal_namespace)
            )
    except RPCError as error:
        raise StartError(f"{where} {_temporal_remedy(settings, error)}") from error
    except (TimeoutError, RuntimeError) as error:
        raise StartError(
            f"{where} is not reachable. Start it, or set TEMPORAL_ADDRESS (and TEMPORAL_TLS, "
            "where it serves TLS)"
        ) from error
    return client


def _temporal_remedy(settings: Settings, error: RPCError) -> str:
    if error.status == RPCStatusCode.NOT_FOUND:
        name = settings.temporal_namespace
        return (
            f"has no namespace {name}. Set TEMPORAL_NAMESPACE, or make it: "
            f"temporal operator namespace create --namespace {name}"
        )
    if error.status in (RPCStatusCode.UNAUTHENTICATED, RPCStatusCode.PERMISSION_DENIED):
        return f"does not let us in: {error.message}. Mend TEMPORAL_API_KEY or the certificate"
    return f"does not serve: {error.message}. Look at its log"


def _temporal_tls(settings: Settings) -> TLSConfig | bool:
    paths = (
        settings.temporal_tls_server_ca_cert_path,
        settings.temporal_tls_client_cert_path,
        settings.temporal_tls_client_key_path,
    )
    if not any(paths):
        return settings.temporal_tls or settings.temporal_api_key is not None
    authority, certificate, key = (path.read_bytes() if path else None for path in paths)
    return TLSConfig(server_root_ca_cert=authority, client_cert=certificate, client_private_key=key)


# --- NATS -----------------------------------------------------------------------------------------


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
                password=_plain(settings.nats_password),
                tls=_nats_tls(settings),
                name="swe-ai-fleet",
                error_cb=note,
                closed_cb=closed,
                max_reconnect_attempts=-1,
                reconnect_time_wait=RECONNECT_EVERY_S,
                ping_interval=10,
                pending_size=0,
            )
            with _refused(
                f"{where} has no JetStream", "Start it with -js and a store directory", NatsError
            ):
                await client.jetstream().account_info()
    except AuthorizationError as error:
        raise StartError(f"{where} does not let us in. Mend NATS_USER and NATS_PASSWORD") from error
    except (TimeoutError, OSError, NatsError) as error:
        raise StartError(
            f"{where} is not reachable: {_words(error)}. Start it, or set NATS_URL"
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
            password=_plain(settings.nats_password),
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


# --- Neo4j ----------------------------------------------------------------------------------------


@asynccontextmanager
async def open_neo4j(settings: Settings) -> AsyncIterator[neo4j.AsyncDriver]:
    """Open the driver and see that the server lets us in.

    Raises:
        StartError: wrong address or credential.
    """
    where = f"Neo4j at {settings.neo4j_uri}"
    with _refused(f"NEO4J_URI {settings.neo4j_uri}", "Mend it", ConfigurationError, ValueError):
        driver = neo4j.AsyncGraphDatabase.driver(
            settings.neo4j_uri,
            auth=(settings.neo4j_user, _plain(settings.neo4j_password) or ""),
            connection_timeout=ANSWER_WITHIN_S,
            connection_acquisition_timeout=ANSWER_WITHIN_S,
        )
    async with driver:
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                await driver.verify_connectivity()
        except AuthError as error:
            raise StartError(
                f"{where} does not let us in. Mend NEO4J_USER and NEO4J_PASSWORD"
            ) from error
        except (TimeoutError, OSError, DriverError, Neo4jError, ValueError) as error:
            raise StartError(f"{where} is not reachable. Start it, or set NEO4J_URI") from error
        yield driver


# --- Valkey ---------------------------------------------------------------------------------------


def valkey_client(settings: Settings) -> Redis:
    """The client, not connected yet."""
    return Redis(
        host=settings.redis_host,
        port=settings.redis_port,
        password=_plain(settings.redis_password),
        ssl=settings.redis_tls,
        socket_connect_timeout=ANSWER_WITHIN_S,
        health_check_interval=30,
    )


@asynccontextmanager
async def open_valkey(settings: Settings) -> AsyncIterator[Redis]:
    """Connect, and see that the server keeps what it is given.

    Raises:
        StartError: wrong address or credential, or a server that would lose payloads.
    """
    where = f"Valkey at {settings.redis_host}:{settings.redis_port}"
    client = valkey_client(settings)
    try:
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                await client.ping()
                await _keeps_everything(client, where)
        except (AuthenticationError, NoPermissionError) as error:
            raise StartError(f"{where} does not let us in. Mend REDIS_PASSWORD") from error
        except (TimeoutError, OSError, RedisError) as error:
            raise StartError(
                f"{where} is not reachable. Start it, or set REDIS_HOST and REDIS_PORT"
            ) from error
        yield client
    finally:
        await client.aclose()


async def _keeps_everything(client: Redis, where: str) -> None:
    """Histories refer to payloads kept here: a server that evicts them breaks stories."""
    try:
        policy = (await client.config_get("maxmemory-policy"))["maxmemory-policy"]
        append_only = (await client.config_get("appendonly"))["appendonly"]
    except (NoPermissionError, ResponseError, KeyError):
        return  # a managed server does not tell; its keeper answers for it
    if policy not in KEEPS_EVERYTHING:
        raise StartError(
            f"{where} evicts keys that have no TTL (maxmemory-policy {policy}). "
            "Set it: valkey-cli CONFIG SET maxmemory-policy noeviction"
        )
    if append_only != "yes":
        raise StartError(
            f"{where} loses its last writes in a crash (appendonly {append_only}). "
            "Set it: valkey-cli CONFIG SET appendonly yes"
        )


# --- the LLM --------------------------------------------------------------------------------------


@asynccontextmanager
async def open_engine(settings: Settings) -> AsyncIterator[Engine]:
    """Open the LLM's client and see that the model is served.

    Raises:
        StartError: wrong address, credential or model.
    """
    where = f"The LLM at {settings.vllm_url}"
    client = llm.connect(settings.vllm_url, _plain(settings.vllm_api_key) or "none")
    async with client:
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                served = [model.id async for model in client.models.list()]
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise StartError(f"{where} does not let us in. Mend VLLM_API_KEY") from error
        except openai.APIStatusError as error:
            raise StartError(
                f"{where} answers {error.status_code} to /models. Set VLLM_URL to an "
                "OpenAI-compatible API: it ends in /v1"
            ) from error
        except (TimeoutError, openai.APIConnectionError) as error:
            raise StartError(
                f"{where} is not reachable. Start it (loading a model takes minutes), "
                "or set VLLM_URL"
            ) from error
        except (openai.OpenAIError, ValueError, AttributeError, TypeError) as error:
            raise StartError(
                f"{where} does not answer /models as an OpenAI-compatible API does. "
                "Set VLLM_URL to one: it ends in /v1"
            ) from error
        yield Engine(client, _model(settings, where, served))


def _model(settings: Settings, where: str, served: list[str]) -> str:
    wanted = settings.vllm_model
    names = ", ".join(served) or "nothing"
    if wanted is None and len(served) == 1:
        return served[0]
    if wanted is None:
        raise StartError(f"{where} serves {names}. Set VLLM_MODEL to the one for the agents")
    if wanted not in served:
        raise StartError(
            f"{where} does not serve the model {wanted}, but {names}. Mend VLLM_MODEL or serve it"
        )
    return wanted


def _plain(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None
