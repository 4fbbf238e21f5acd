"""Temporal, and its namespace."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta

from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import Client, Plugin
from temporalio.converter import DataConverter
from temporalio.runtime import Runtime
from temporalio.service import RPCError, RPCStatusCode, TLSConfig

from workers.clients.connection import (
    ANSWER_WITHIN_S,
    StartError,
    raise_if_not_trusted,
    require_encryption,
    secret_value,
)
from workers.clients.queries import RepeatedQueries
from workers.settings import Settings


async def open_temporal(
    settings: Settings,
    converter: DataConverter,
    runtime: Runtime | None = None,
    plugins: Sequence[Plugin] = (),
) -> Client:
    """Connect, and check that the namespace exists.

    Raises:
        StartError: wrong address, credential or namespace, or plain text to another machine.
    """
    where = f"Temporal at {settings.temporal_address}"
    tls = _temporal_tls(settings)
    if not tls:
        host = settings.temporal_address.rpartition(":")[0]
        require_encryption(settings, "TEMPORAL_ADDRESS", host, "set TEMPORAL_TLS=true")
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            client = await Client.connect(
                settings.temporal_address,
                namespace=settings.temporal_namespace,
                api_key=secret_value(settings.temporal_api_key),
                tls=tls,
                data_converter=converter,
                runtime=runtime,
                plugins=plugins,
                interceptors=[RepeatedQueries()],
            )
            await client.workflow_service.describe_namespace(
                DescribeNamespaceRequest(namespace=settings.temporal_namespace)
            )
    except RPCError as error:
        raise StartError(f"{where} {_temporal_remedy(settings, error)}") from error
    except (TimeoutError, RuntimeError) as error:
        raise_if_not_trusted(where, error, "TEMPORAL_TLS_SERVER_CA_CERT_PATH", "TEMPORAL_ADDRESS")
        raise StartError(
            f"{where} is not reachable. Start it, or set TEMPORAL_ADDRESS (and TEMPORAL_TLS, "
            "where it serves TLS)"
        ) from error
    return client


async def retention(client: Client) -> timedelta:
    """Return how long the namespace keeps histories of runs that have ended.

    Raises:
        RPCError: Temporal does not answer.
    """
    answer = await client.workflow_service.describe_namespace(
        DescribeNamespaceRequest(namespace=client.namespace)
    )
    return answer.config.workflow_execution_retention_ttl.ToTimedelta()


def _temporal_remedy(settings: Settings, error: RPCError) -> str:
    if error.status == RPCStatusCode.NOT_FOUND:
        name = settings.temporal_namespace
        return (
            f"has no namespace {name}. Set TEMPORAL_NAMESPACE, or make it: "
            f"temporal operator namespace create --namespace {name}"
        )
    if error.status in (RPCStatusCode.UNAUTHENTICATED, RPCStatusCode.PERMISSION_DENIED):
        return (
            f"refuses the credentials: {error.message}. Check TEMPORAL_API_KEY or the certificate"
        )
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
