"""What went wrong in Neo4j or Valkey, as Temporal's retries and the Web UI need it.

Storing is retried without limit, so an error is final only where the data itself can never be
stored; a server, a credential or a setting can be mended while the activity waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from neo4j import exceptions as neo4j
from redis import exceptions as redis
from temporalio.exceptions import ApplicationError

TABLE: tuple[tuple[type[BaseException], str, str, bool], ...] = (
    # error, type, what it means and what mends it, retryable; the first that fits counts
    (neo4j.AuthError, "GraphCredentials", "Neo4j refused NEO4J_USER or NEO4J_PASSWORD", True),
    (neo4j.NotALeader, "GraphUnavailable", "Neo4j has no leader for writes now", True),
    (neo4j.DatabaseUnavailable, "GraphUnavailable", "Neo4j's database is not available now", True),
    (neo4j.ForbiddenOnReadOnlyDatabase, "GraphUnavailable", "Neo4j is read-only now", True),
    (neo4j.TransientError, "GraphBusy", "Neo4j could not do it now", True),
    (neo4j.ConstraintError, "GraphConstraint", "the graph's constraints refuse it", False),
    (neo4j.CypherSyntaxError, "GraphStatement", "Neo4j cannot read the statement", False),
    (neo4j.CypherTypeError, "GraphValue", "Neo4j cannot hold the value", False),
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
    """Turn errors of the two stores into ApplicationErrors by TABLE; others pass."""
    try:
        yield
    except tuple(row[0] for row in TABLE) as error:
        raise store_error(error) from None


def store_error(error: BaseException) -> ApplicationError:
    """The error by TABLE, its cause cut to 500 characters."""
    kind, meaning, retryable = next(row[1:] for row in TABLE if isinstance(error, row[0]))
    cause = getattr(error, "message", None) or str(error) or type(error).__name__
    return ApplicationError(
        f"{meaning} ({type(error).__name__}: {cause[:500]})", type=kind, non_retryable=not retryable
    )
