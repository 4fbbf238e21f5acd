"""Errors of Neo4j and Valkey, translated for Temporal's retries and the Web UI.

Storing is retried without limit, so an error is final only if the data itself can never be stored;
a server, a credential or a setting can be fixed while the activity retries. Neo4j's server errors
are classified by status code (CODES), Valkey's replies without an error class by their first word
(REPLIES), all others by their class (TABLE).

https://neo4j.com/docs/status-codes/5/errors/all-errors/
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from neo4j import exceptions as neo4j
from redis import exceptions as redis
from temporalio.exceptions import ApplicationError

CODES: tuple[tuple[str, str, str, bool], ...] = (
    # status code or its prefix, type, meaning and remedy, retryable; the first match counts
    ("Neo.ClientError.Statement.AccessMode", "GraphUnavailable", "Neo4j is read-only now", True),
    ("Neo.ClientError.Fabric.AccessMode", "GraphUnavailable", "Neo4j is read-only now", True),
    (
        "Neo.ClientError.General.ForbiddenOnReadOnlyDatabase",
        *("GraphUnavailable", "Neo4j is read-only now", True),
    ),
    ("Neo.ClientError.General.ReadOnly", "GraphUnavailable", "Neo4j is read-only now", True),
    (
        "Neo.ClientError.Cluster.",
        *("GraphUnavailable", "Neo4j has no leader for writes now", True),
    ),
    (
        "Neo.ClientError.Database.",
        *("GraphUnavailable", "Neo4j's database is not available now", True),
    ),
    (
        "Neo.ClientError.Security.",
        *("GraphCredentials", "Neo4j refused NEO4J_USER, NEO4J_PASSWORD or their rights", True),
    ),
    # Caused by another transaction: deleted meanwhile, timed out, terminated.
    ("Neo.ClientError.Statement.EntityNotFound", "GraphBusy", "Neo4j could not do it now", True),
    ("Neo.ClientError.Transaction.", "GraphBusy", "Neo4j could not do it now", True),
    ("Neo.ClientError.Statement.TypeError", "GraphValue", "Neo4j cannot hold the value", False),
    ("Neo.ClientError.Statement.Arg", "GraphValue", "Neo4j cannot use the value", False),
    ("Neo.ClientError.Statement.Arithmetic", "GraphValue", "Neo4j cannot use the value", False),
    (
        "Neo.ClientError.Statement.Constraint",
        *("GraphConstraint", "the graph's constraints refuse it", False),
    ),
    ("Neo.ClientError.Schema.", "GraphConstraint", "the graph's constraints refuse it", False),
    # "Changing the request might yield a successful outcome": the same request never succeeds.
    ("Neo.ClientError.", "GraphStatement", "Neo4j cannot run the statement", False),
    (
        "Neo.TransientError.General.DatabaseUnavailable",
        *("GraphUnavailable", "Neo4j's database is not available now", True),
    ),
    (
        "Neo.TransientError.Database.",
        *("GraphUnavailable", "Neo4j's database is not available now", True),
    ),
    ("Neo.TransientError.Cluster.", "GraphUnavailable", "Neo4j's cluster is not ready", True),
    (
        "Neo.TransientError.Security.",
        *("GraphCredentials", "Neo4j's authentication provider does not answer", True),
    ),
    ("Neo.TransientError.", "GraphBusy", "Neo4j could not do it now", True),
    ("", "GraphError", "Neo4j failed", True),
)

REPLIES: tuple[tuple[str, str, str, bool], ...] = (
    # the reply's first word, then as in CODES
    ("BUSY ", "CacheUnavailable", "Valkey runs a script now", True),
    ("NOREPLICAS ", "CacheUnavailable", "Valkey has too few replicas for writes now", True),
    ("MISCONF ", "CacheUnavailable", "Valkey cannot write to its disk", True),
    ("", "CacheError", "Valkey refused", True),
)

TABLE: tuple[tuple[type[BaseException], str, str, bool], ...] = (
    # error, then as in CODES
    (neo4j.AuthError, "GraphCredentials", "Neo4j refused NEO4J_USER or NEO4J_PASSWORD", True),
    (neo4j.ConfigurationError, "GraphSettings", "NEO4J_URI does not fit the server", True),
    (neo4j.DriverError, "GraphUnavailable", "Neo4j at NEO4J_URI does not answer", True),
    (neo4j.GqlError, "GraphError", "Neo4j refused", True),
    (redis.AuthenticationError, "CacheCredentials", "Valkey refused REDIS_PASSWORD", True),
    (redis.AuthorizationError, "CacheCredentials", "Valkey refused the user's rights", True),
    (redis.ConnectionError, "CacheUnavailable", "Valkey at REDIS_HOST does not answer", True),
    (redis.TimeoutError, "CacheUnavailable", "Valkey at REDIS_HOST does not answer", True),
    (redis.ReadOnlyError, "CacheUnavailable", "Valkey is a read-only replica now", True),
    (redis.ClusterDownError, "CacheUnavailable", "Valkey's master or cluster is down", True),
    (redis.TryAgainError, "CacheUnavailable", "Valkey's cluster moves the keys now", True),
    (redis.OutOfMemoryError, "CacheFull", "Valkey is at its maxmemory: raise it", True),
    (redis.DataError, "CacheValue", "Valkey cannot hold the value", False),
    (redis.RedisError, "CacheError", "Valkey refused", True),
    (redis.RedisClusterException, "CacheError", "Valkey's cluster refused", True),
    (OSError, "StoreUnavailable", "the network to Neo4j or Valkey failed", True),
    (UnicodeEncodeError, "GraphValue", "the text is not Unicode", False),
    (OverflowError, "GraphValue", "the number has more than 64 bits", False),
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
    kind, meaning, retryable = _classed(error)
    cause = getattr(error, "message", None) or str(error) or type(error).__name__
    return ApplicationError(
        f"{meaning} ({type(error).__name__}: {cause[:500]})", type=kind, non_retryable=not retryable
    )


def _classed(error: BaseException) -> tuple[str, str, bool]:
    """Return the error's type, its meaning, and whether it is retryable."""
    if isinstance(error, neo4j.Neo4jError) and error._from_server:
        return next(row[1:] for row in CODES if error.code.startswith(row[0]))
    if type(error) is redis.ResponseError:
        # A pipeline's error begins with the command that failed.
        reply = str(error).rpartition(" caused error: ")[2]
        return next(row[1:] for row in REPLIES if reply.startswith(row[0]))
    return next(row[1:] for row in TABLE if isinstance(error, row[0]))
