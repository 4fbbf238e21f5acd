"""The classification of the stores' errors, by the drivers' own error objects."""

from __future__ import annotations

import pytest
from nats import errors as nats
from nats.js import errors as jetstream
from neo4j.exceptions import Neo4jError
from redis import exceptions as redis
from redis._parsers import BaseParser
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from activities.graph.errors import store_error
from bridge.outages import is_unavailable
from workflows.models.errors import ErrorType, application_error

AWAY, RETRIED, FINAL = "away", "retried", "final"

NEO4J = [
    ("Neo.ClientError.Cluster.NotALeader", AWAY),
    ("Neo.ClientError.General.ForbiddenOnReadOnlyDatabase", AWAY),
    ("Neo.ClientError.General.ReadOnly", AWAY),
    ("Neo.ClientError.Statement.AccessMode", AWAY),
    ("Neo.ClientError.Database.DatabaseNotFound", AWAY),
    ("Neo.ClientError.Security.Unauthorized", AWAY),
    ("Neo.ClientError.Security.AuthorizationExpired", AWAY),
    ("Neo.ClientError.Security.TokenExpired", AWAY),
    ("Neo.ClientError.Security.CredentialsExpired", AWAY),
    ("Neo.ClientError.Security.Forbidden", AWAY),
    ("Neo.TransientError.General.DatabaseUnavailable", AWAY),
    ("Neo.TransientError.Cluster.ReplicationFailure", AWAY),
    ("Neo.TransientError.Transaction.DeadlockDetected", RETRIED),
    ("Neo.TransientError.General.MemoryPoolOutOfMemoryError", RETRIED),
    ("Neo.ClientError.Transaction.TransactionTimedOut", RETRIED),
    ("Neo.ClientError.Transaction.Terminated", RETRIED),
    ("Neo.ClientError.Statement.EntityNotFound", RETRIED),
    ("Neo.DatabaseError.General.UnknownError", RETRIED),
    ("Neo.DatabaseError.Statement.ExecutionFailed", RETRIED),
    ("not a code", RETRIED),
    ("Neo.ClientError.Schema.ConstraintValidationFailed", FINAL),
    ("Neo.ClientError.Schema.TokenNameError", FINAL),
    ("Neo.ClientError.Statement.SyntaxError", FINAL),
    ("Neo.ClientError.Statement.TypeError", FINAL),
    ("Neo.ClientError.Statement.ArgumentError", FINAL),
    ("Neo.ClientError.Statement.ArithmeticError", FINAL),
    ("Neo.ClientError.Statement.ParameterMissing", FINAL),
    ("Neo.ClientError.Statement.SemanticError", FINAL),
    ("Neo.ClientError.Statement.ConstraintVerificationFailed", FINAL),
    ("Neo.ClientError.Procedure.ProcedureNotFound", FINAL),
    ("Neo.ClientError.Request.Invalid", FINAL),
    ("Neo.ClientError.General.InvalidArguments", FINAL),
]
VALKEY = [
    ("READONLY You can't write against a read only replica.", AWAY),
    ("MASTERDOWN Link with MASTER is down", AWAY),
    ("CLUSTERDOWN The cluster is down", AWAY),
    ("LOADING Valkey is loading the dataset in memory", AWAY),
    ("TRYAGAIN Multiple keys request during rehashing of slot", AWAY),
    ("BUSY Valkey is busy running a script.", AWAY),
    ("NOREPLICAS Not enough good replicas to write.", AWAY),
    ("MISCONF Errors writing to the AOF file: No space left on device", AWAY),
    ("WRONGTYPE Operation against a key holding the wrong kind of value", RETRIED),
    ("ERR a text with BUSY in it", RETRIED),
]


def classed(error: Exception) -> str:
    found = store_error(error)
    if is_unavailable(found):
        assert not found.non_retryable
        return AWAY
    return FINAL if found.non_retryable else RETRIED


@pytest.mark.parametrize(("code", "expected"), NEO4J)
def test_an_error_of_neo4j_is_away_retried_or_final_by_its_code(code: str, expected: str) -> None:
    assert classed(Neo4jError._hydrate_neo4j(code=code, message="m")) == expected


@pytest.mark.parametrize(("reply", "expected"), VALKEY)
def test_an_error_of_valkey_is_away_or_retried_by_its_reply(reply: str, expected: str) -> None:
    assert classed(BaseParser.parse_error(reply)) == expected  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "error",
    [
        RPCError("down", RPCStatusCode.UNAVAILABLE, b""),
        RPCError("a broken connection", RPCStatusCode.UNKNOWN, b""),
        RPCError("an expired key", RPCStatusCode.UNAUTHENTICATED, b""),
        application_error(ErrorType.GRAPH_UNAVAILABLE, "down"),
        application_error(ErrorType.STORE_UNREACHABLE, "down"),
        application_error(ErrorType.NO_ACK, "no answer"),
        nats.ConnectionClosedError(),
        nats.NoServersError(),
        jetstream.NoStreamResponseError(),
        jetstream.ServiceUnavailableError(),
        redis.ConnectionError(),
        redis.OutOfMemoryError(),
        ConnectionRefusedError(),
        TimeoutError(),
    ],
    ids=repr,
)
def test_an_outage_is_waited_for(error: Exception) -> None:
    assert is_unavailable(error)


@pytest.mark.parametrize(
    "error",
    [
        RPCError("no such workflow", RPCStatusCode.NOT_FOUND, b""),
        RPCError("too large", RPCStatusCode.INVALID_ARGUMENT, b""),
        application_error(ErrorType.GRAPH_BUSY, "a deadlock"),
        application_error(ErrorType.EVENT_TOO_LARGE, "raise max_payload"),
        ApplicationError("of another program"),
        nats.MaxPayloadError(),
        redis.DataError(),
        KeyError("a bug"),
    ],
    ids=repr,
)
def test_an_error_that_a_request_may_cause_is_not_an_outage(error: Exception) -> None:
    assert not is_unavailable(error)
