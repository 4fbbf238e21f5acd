"""The classification of the stores' errors, by the drivers' own error objects."""

from __future__ import annotations

import pytest
from neo4j.exceptions import Neo4jError
from redis._parsers import BaseParser

from activities.graph.errors import store_error
from bridge.inbox import AWAY

AWAY_NOW, RETRIED, FINAL = "away", "retried", "final"

NEO4J = [
    ("Neo.ClientError.Cluster.NotALeader", AWAY_NOW),
    ("Neo.ClientError.General.ForbiddenOnReadOnlyDatabase", AWAY_NOW),
    ("Neo.ClientError.General.ReadOnly", AWAY_NOW),
    ("Neo.ClientError.Statement.AccessMode", AWAY_NOW),
    ("Neo.ClientError.Database.DatabaseNotFound", AWAY_NOW),
    ("Neo.ClientError.Security.Unauthorized", AWAY_NOW),
    ("Neo.ClientError.Security.AuthorizationExpired", AWAY_NOW),
    ("Neo.ClientError.Security.TokenExpired", AWAY_NOW),
    ("Neo.ClientError.Security.CredentialsExpired", AWAY_NOW),
    ("Neo.ClientError.Security.Forbidden", AWAY_NOW),
    ("Neo.TransientError.General.DatabaseUnavailable", AWAY_NOW),
    ("Neo.TransientError.Cluster.ReplicationFailure", AWAY_NOW),
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
    ("READONLY You can't write against a read only replica.", AWAY_NOW),
    ("MASTERDOWN Link with MASTER is down", AWAY_NOW),
    ("CLUSTERDOWN The cluster is down", AWAY_NOW),
    ("LOADING Valkey is loading the dataset in memory", AWAY_NOW),
    ("TRYAGAIN Multiple keys request during rehashing of slot", AWAY_NOW),
    ("BUSY Valkey is busy running a script.", AWAY_NOW),
    ("NOREPLICAS Not enough good replicas to write.", AWAY_NOW),
    ("MISCONF Errors writing to the AOF file: No space left on device", AWAY_NOW),
    ("WRONGTYPE Operation against a key holding the wrong kind of value", RETRIED),
    ("ERR a text with BUSY in it", RETRIED),
]


def classed(error: Exception) -> str:
    found = store_error(error)
    if found.type in AWAY:
        assert not found.non_retryable
        return AWAY_NOW
    return FINAL if found.non_retryable else RETRIED


@pytest.mark.parametrize(("code", "expected"), NEO4J)
def test_an_error_of_neo4j_is_away_retried_or_final_by_its_code(code: str, expected: str) -> None:
    assert classed(Neo4jError._hydrate_neo4j(code=code, message="m")) == expected


@pytest.mark.parametrize(("reply", "expected"), VALKEY)
def test_an_error_of_valkey_is_away_or_retried_by_its_reply(reply: str, expected: str) -> None:
    assert classed(BaseParser.parse_error(reply)) == expected  # type: ignore[no-untyped-call]
