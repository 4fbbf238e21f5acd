"""Errors of Neo4j and Valkey, translated for Temporal's retries and the Web UI.

An error is final only if the data itself can never be stored. Neo4j's server errors are classified
by status code (CODES), Valkey's replies without an error class by their first word (REPLIES), all
others by their class (TABLE).

https://neo4j.com/docs/status-codes/5/errors/all-errors/
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from neo4j import exceptions as neo4j
from redis import exceptions as redis
from temporalio.exceptions import ApplicationError

from workflows.models.errors import ErrorType, application_error

CODES: tuple[tuple[str, ErrorType, str], ...] = (
    # status code or its prefix, type, meaning and remedy; the first match counts
    ("Neo.ClientError.Statement.AccessMode", ErrorType.GRAPH_UNAVAILABLE, "Neo4j is read-only now"),
    ("Neo.ClientError.Fabric.AccessMode", ErrorType.GRAPH_UNAVAILABLE, "Neo4j is read-only now"),
    (
        "Neo.ClientError.General.ForbiddenOnReadOnlyDatabase",
        ErrorType.GRAPH_UNAVAILABLE,
        "Neo4j is read-only now",
    ),
    ("Neo.ClientError.General.ReadOnly", ErrorType.GRAPH_UNAVAILABLE, "Neo4j is read-only now"),
    (
        "Neo.ClientError.Cluster.",
        ErrorType.GRAPH_UNAVAILABLE,
        "Neo4j has no leader for writes now",
    ),
    (
        "Neo.ClientError.Database.",
        ErrorType.GRAPH_UNAVAILABLE,
        "Neo4j's database is not available now",
    ),
    (
        "Neo.ClientError.Security.",
        *(ErrorType.GRAPH_CREDENTIALS, "Neo4j refused NEO4J_USER, NEO4J_PASSWORD or their rights"),
    ),
    # Caused by another transaction: deleted meanwhile, timed out, terminated.
    ("Neo.ClientError.Statement.EntityNotFound", ErrorType.GRAPH_BUSY, "Neo4j could not do it now"),
    ("Neo.ClientError.Transaction.", ErrorType.GRAPH_BUSY, "Neo4j could not do it now"),
    ("Neo.ClientError.Statement.TypeError", ErrorType.GRAPH_VALUE, "Neo4j cannot hold the value"),
    ("Neo.ClientError.Statement.Arg", ErrorType.GRAPH_VALUE, "Neo4j cannot use the value"),
    ("Neo.ClientError.Statement.Arithmetic", ErrorType.GRAPH_VALUE, "Neo4j cannot use the value"),
    (
        "Neo.ClientError.Statement.Constraint",
        ErrorType.GRAPH_CONSTRAINT,
        "the graph's constraints refuse it",
    ),
    ("Neo.ClientError.Schema.", ErrorType.GRAPH_CONSTRAINT, "the graph's constraints refuse it"),
    # "Changing the request might yield a successful outcome": the same request never succeeds.
    ("Neo.ClientError.", ErrorType.GRAPH_STATEMENT, "Neo4j cannot run the statement"),
    (
        "Neo.TransientError.General.DatabaseUnavailable",
        ErrorType.GRAPH_UNAVAILABLE,
        "Neo4j's database is not available now",
    ),
    (
        "Neo.TransientError.Database.",
        ErrorType.GRAPH_UNAVAILABLE,
        "Neo4j's database is not available now",
    ),
    ("Neo.TransientError.Cluster.", ErrorType.GRAPH_UNAVAILABLE, "Neo4j's cluster is not ready"),
    (
        "Neo.TransientError.Security.",
        ErrorType.GRAPH_CREDENTIALS,
        "Neo4j's authentication provider does not answer",
    ),
    ("Neo.TransientError.", ErrorType.GRAPH_BUSY, "Neo4j could not do it now"),
    ("", ErrorType.GRAPH_ERROR, "Neo4j failed"),
)

REPLIES: tuple[tuple[str, ErrorType, str], ...] = (
    # the reply's first word, then as in CODES
    ("BUSY ", ErrorType.CACHE_UNAVAILABLE, "Valkey runs a script now"),
    ("NOREPLICAS ", ErrorType.CACHE_UNAVAILABLE, "Valkey has too few replicas for writes now"),
    ("MISCONF ", ErrorType.CACHE_UNAVAILABLE, "Valkey cannot write to its disk"),
    ("", ErrorType.CACHE_ERROR, "Valkey refused"),
)

TABLE: tuple[tuple[type[BaseException], ErrorType, str], ...] = (
    # error, then as in CODES
    (neo4j.AuthError, ErrorType.GRAPH_CREDENTIALS, "Neo4j refused NEO4J_USER or NEO4J_PASSWORD"),
    (neo4j.ConfigurationError, ErrorType.GRAPH_SETTINGS, "NEO4J_URI does not fit the server"),
    (neo4j.DriverError, ErrorType.GRAPH_UNAVAILABLE, "Neo4j at NEO4J_URI does not answer"),
    (neo4j.GqlError, ErrorType.GRAPH_ERROR, "Neo4j refused"),
    (redis.AuthenticationError, ErrorType.CACHE_CREDENTIALS, "Valkey refused REDIS_PASSWORD"),
    (redis.AuthorizationError, ErrorType.CACHE_CREDENTIALS, "Valkey refused the user's rights"),
    (redis.ConnectionError, ErrorType.CACHE_UNAVAILABLE, "Valkey at REDIS_HOST does not answer"),
    (redis.TimeoutError, ErrorType.CACHE_UNAVAILABLE, "Valkey at REDIS_HOST does not answer"),
    (redis.ReadOnlyError, ErrorType.CACHE_UNAVAILABLE, "Valkey is a read-only replica now"),
    (redis.ClusterDownError, ErrorType.CACHE_UNAVAILABLE, "Valkey's master or cluster is down"),
    (redis.TryAgainError, ErrorType.CACHE_UNAVAILABLE, "Valkey's cluster moves the keys now"),
    (redis.OutOfMemoryError, ErrorType.CACHE_FULL, "Valkey is at its maxmemory: raise it"),
    (redis.DataError, ErrorType.CACHE_VALUE, "Valkey cannot hold the value"),
    (redis.RedisError, ErrorType.CACHE_ERROR, "Valkey refused"),
    (redis.RedisClusterException, ErrorType.CACHE_ERROR, "Valkey's cluster refused"),
    (OSError, ErrorType.STORE_UNAVAILABLE, "the network to Neo4j or Valkey failed"),
    (UnicodeEncodeError, ErrorType.GRAPH_VALUE, "the text is not Unicode"),
    (OverflowError, ErrorType.GRAPH_VALUE, "the number has more than 64 bits"),
)


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn errors of the two stores into ApplicationErrors by `store_error`; let others pass."""
    try:
        yield
    except tuple(row[0] for row in TABLE) as error:
        raise store_error(error) from None


def store_error(error: BaseException) -> ApplicationError:
    """Translate an error by CODES, REPLIES or TABLE, with its cause cut to 500 characters."""
    kind, meaning = _classed(error)
    cause = getattr(error, "message", None) or str(error) or type(error).__name__
    return application_error(kind, f"{meaning} ({type(error).__name__}: {cause[:500]})")


def _classed(error: BaseException) -> tuple[ErrorType, str]:
    """Return the error's type and its meaning."""
    if isinstance(error, neo4j.Neo4jError) and error._from_server:
        return next(row[1:] for row in CODES if error.code.startswith(row[0]))
    if type(error) is redis.ResponseError:
        # A pipeline's error begins with the command that failed.
        reply = str(error).rpartition(" caused error: ")[2]
        return next(row[1:] for row in REPLIES if reply.startswith(row[0]))
    return next(row[1:] for row in TABLE if isinstance(error, row[0]))
