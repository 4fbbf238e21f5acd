"""The fleet's processes: what each needs, and the jobs it runs.

A process opens its clients, brings what it owns up to date, and yields its jobs with the checks of
the servers it needs. Each is a module that is loaded when it runs, so that a process does not load
the libraries of the others. Tests build the same workers.
"""

import asyncio
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Protocol, TypedDict

from redis.asyncio import Redis
from temporalio.client import Client
from temporalio.common import VersioningBehavior, WorkerDeploymentVersion
from temporalio.exceptions import ApplicationError
from temporalio.worker import Interceptor, WorkerDeploymentConfig

from workers.clients.connection import StartError, is_loopback, one_line
from workers.clients.valkey import check_valkey
from workers.health import Check
from workers.settings import Settings
from workers.telemetry import LogContext

DEPLOYMENT = "swe-ai-fleet"
UNVERSIONED = "unversioned"


@dataclass(frozen=True)
class ProcessContext:
    """The resources of every process: Temporal, and Valkey for its data converter's payloads.

    Attributes:
        service: The service of the process `grpc` that runs alone; empty: all of them.
        lost: Gets the error of a connection that is closed for good.
    """

    settings: Settings
    temporal: Client
    valkey: Redis
    service: str = ""
    lost: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def checks(self) -> dict[str, Check]:
        """The checks of its servers, by server."""
        return {
            "temporal": self.temporal.service_client.check_health,
            "valkey": partial(check_valkey, self.valkey),
        }


class Job(Protocol):
    """A task of a process that runs until it is shut down, such as Temporal's `Worker`."""

    @property
    def is_running(self) -> bool: ...

    async def run(self) -> None:
        """Run until `shutdown`; raise the error that ends it earlier."""

    async def shutdown(self) -> None:
        """Shut down: finish the work in progress, take no further tasks."""


@dataclass(frozen=True)
class RunningProcess:
    """A process's jobs by name (a worker's is its task queue), and the checks of its servers."""

    jobs: Mapping[str, Job]
    checks: Mapping[str, Check] = field(default_factory=dict)


Process = Callable[[ProcessContext], AbstractAsyncContextManager[RunningProcess]]

PROCESSES = {
    "story": "workers.processes.story",
    "agents": "workers.processes.agents",
    "context": "workers.processes.context",
    "bridge": "workers.processes.bridge",
    "inbox": "workers.processes.inbox",
    "grpc": "workers.processes.grpc",
    "workspace": "workers.processes.workspace",
}
"""The module of each process, which defines `process`. `all` runs every process in one."""

IF_ENCRYPTED = {"codec": "workers.processes.codec"}
"""Processes for encrypted payloads. `all` runs them too if there are keys."""


def load_process(name: str) -> Process:
    """Return the process of that name."""
    process: Process = import_module((PROCESSES | IF_ENCRYPTED)[name]).process
    return process


class Options(TypedDict):
    """Arguments of Worker that every process shares."""

    interceptors: list[Interceptor]
    graceful_shutdown_timeout: timedelta
    deployment_config: WorkerDeploymentConfig


def options(settings: Settings, *interceptors: Interceptor) -> Options:
    """Return the options of every worker; `interceptors` are added to the common ones."""
    return Options(
        interceptors=[LogContext(), *interceptors],
        graceful_shutdown_timeout=settings.drain_seconds,
        deployment_config=_deployment(settings.worker_build_id),
    )


def _deployment(build_id: str | None) -> WorkerDeploymentConfig:
    """Return the deployment: versioned only with a build id, otherwise it takes every story."""
    return WorkerDeploymentConfig(
        version=WorkerDeploymentVersion(DEPLOYMENT, build_id or UNVERSIONED),
        use_worker_versioning=build_id is not None,
        default_versioning_behavior=(
            VersioningBehavior.AUTO_UPGRADE if build_id else VersioningBehavior.UNSPECIFIED
        ),
    )


def token_keys(settings: Settings) -> list[str]:
    """Return the keys of the tokens.

    Raises:
        StartError: there is none; nothing is served without authentication.
    """
    if settings.grpc_token_key is None:
        raise StartError(
            "GRPC_TOKEN_KEY (key that gRPC's tokens are signed with) is not set: set it to 32 "
            "random characters or more, the same for all replicas"
        )
    return settings.token_keys


def certificate(
    prefix: str, host: str, cert: Path | None, key: Path | None
) -> tuple[Path, Path] | None:
    """Return the server's certificate and key; None on loopback, where they are optional.

    Args:
        prefix: The first part of the settings' names.
        host: The address that the server listens on.
        cert: `{prefix}_TLS_CERT`.
        key: `{prefix}_TLS_KEY`.

    Raises:
        StartError: tokens would cross a network in clear text, or the files are not a certificate
            and its key.
    """
    if (cert is None) != (key is None):
        raise StartError(f"{prefix}_TLS_CERT and {prefix}_TLS_KEY go together: set both, or none")
    if cert is None or key is None:
        if not is_loopback(host):
            raise StartError(
                f"{prefix}_HOST {host} is not a loopback address, and tokens would go "
                f"over the network in the clear: set {prefix}_TLS_CERT and {prefix}_TLS_KEY"
            )
        return None
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise StartError(
            f"{prefix}_TLS_CERT {cert} and {prefix}_TLS_KEY {key} are not a certificate and its "
            f"key: {one_line(error)}"
        ) from error
    return cert, key


@contextmanager
def valid_config(*invalid: type[Exception]) -> Iterator[None]:
    """Stop the process, with the file's message, if a configuration file is not valid."""
    try:
        yield
    except ApplicationError as error:
        raise StartError(f"{error.message}. Correct it in FLEET_CONFIG") from error
    except invalid as error:
        raise StartError(f"{error}. Correct it in FLEET_CONFIG") from error
