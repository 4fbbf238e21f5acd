"""Errors of Valkey, translated for Temporal's retries and the Web UI.

Replies without an error class are classified by their first word (REPLIES), all others by their
class (TABLE). They are apart from Neo4j's, so that the story worker does not load its driver.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from redis import exceptions as redis
from temporalio.exceptions import ApplicationError

from workflows.models.errors import ErrorType, application_error

REPLIES: tuple[tuple[str, ErrorType, str], ...] = (
    # the reply's first word, type, meaning and remedy; the first match counts
    ("BUSY ", ErrorType.CACHE_UNAVAILABLE, "Valkey runs a script now"),
    ("NOREPLICAS ", ErrorType.CACHE_UNAVAILABLE, "Valkey has too few replicas for writes now"),
    ("MISCONF ", ErrorType.CACHE_UNAVAILABLE, "Valkey cannot write to its disk"),
    ("", ErrorType.CACHE_ERROR, "Valkey refused"),
)

TABLE: tuple[tuple[type[BaseException], ErrorType, str], ...] = (
    # error, type, meaning and remedy; the first match counts
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
def cache_errors() -> Iterator[None]:
    """Turn errors of Valkey into ApplicationErrors by REPLIES or TABLE; let others pass."""
    try:
        yield
    except tuple(row[0] for row in TABLE) as error:
        raise described(error, *classed(error)) from None


def classed(error: BaseException) -> tuple[ErrorType, str]:
    """Return the type of an error that is in TABLE, and its meaning."""
    if type(error) is redis.ResponseError:
        # A pipeline's error begins with the command that failed.
        reply = str(error).rpartition(" caused error: ")[2]
        return next(row[1:] for row in REPLIES if reply.startswith(row[0]))
    return next(row[1:] for row in TABLE if isinstance(error, row[0]))


def described(error: BaseException, kind: ErrorType, meaning: str) -> ApplicationError:
    """Return the ApplicationError of a store's error, with its cause cut to 500 characters."""
    cause = getattr(error, "message", None) or str(error) or type(error).__name__
    return application_error(kind, f"{meaning} ({type(error).__name__}: {cause[:500]})")
