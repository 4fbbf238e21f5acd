"""Errors of Neo4j and Valkey, translated for Temporal's retries and the Web UI.

An error is final only if the data itself can never be stored. Neo4j's server errors are classified
by status code (CODES), Valkey's as in `activities.cache_errors`, all others by their class (TABLE).

https://neo4j.com/docs/status-codes/5/errors/all-errors/
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from neo4j import exceptions as neo4j
from temporalio.exceptions import ApplicationError

from activities import cache_errors
from workflows.models.errors import ErrorType

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

TABLE: tuple[tuple[type[BaseException], ErrorType, str], ...] = (
    # error, then as in CODES
    (neo4j.AuthError, ErrorType.GRAPH_CREDENTIALS, "Neo4j refused NEO4J_USER or NEO4J_PASSWORD"),
    (neo4j.ConfigurationError, ErrorType.GRAPH_SETTINGS, "NEO4J_URI does not fit the server"),
    (neo4j.DriverError, ErrorType.GRAPH_UNAVAILABLE, "Neo4j at NEO4J_URI does not answer"),
    (neo4j.GqlError, ErrorType.GRAPH_ERROR, "Neo4j refused"),
    *cache_errors.TABLE,
)


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn errors of the two stores into ApplicationErrors by `store_error`; let others pass."""
    try:
        yield
    except tuple(row[0] for row in TABLE) as error:
        raise store_error(error) from None


def store_error(error: BaseException) -> ApplicationError:
    """Translate an error by CODES or TABLE, with its cause cut to 500 characters."""
    return cache_errors.described(error, *_classed(error))


def _classed(error: BaseException) -> tuple[ErrorType, str]:
    """Return the error's type and its meaning."""
    if isinstance(error, neo4j.Neo4jError) and error._from_server:
        return next(row[1:] for row in CODES if error.code.startswith(row[0]))
    if isinstance(error, neo4j.GqlError | neo4j.DriverError):
        return next(row[1:] for row in TABLE if isinstance(error, row[0]))
    return cache_errors.classed(error)
