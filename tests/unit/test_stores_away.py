"""Which errors of the stores mean that a store is away, by the drivers' own error objects."""

from __future__ import annotations

import pytest
from neo4j.exceptions import Neo4jError
from redis._parsers import BaseParser

from activities.graph.errors import store_error
from bridge.inbox import AWAY

NEO4J = [
    ("Neo.ClientError.Cluster.NotALeader", True),
    ("Neo.ClientError.General.ForbiddenOnReadOnlyDatabase", True),
    ("Neo.TransientError.General.DatabaseUnavailable", True),
    ("Neo.TransientError.Transaction.DeadlockDetected", False),
    ("Neo.ClientError.Schema.ConstraintValidationFailed", False),
]
VALKEY = [
    ("READONLY You can't write against a read only replica.", True),
    ("MASTERDOWN Link with MASTER is down", True),
    ("CLUSTERDOWN The cluster is down", True),
    ("LOADING Valkey is loading the dataset in memory", True),
    ("TRYAGAIN Multiple keys request during rehashing of slot", True),
    ("WRONGTYPE Operation against a key holding the wrong kind of value", False),
]


@pytest.mark.parametrize(("code", "away"), NEO4J)
def test_an_error_of_neo4j_pauses_consumption_only_if_it_is_away(code: str, away: bool) -> None:
    error = store_error(Neo4jError._hydrate_neo4j(code=code, message="m"))
    assert (error.type in AWAY) is away
    assert not (away and error.non_retryable)


@pytest.mark.parametrize(("reply", "away"), VALKEY)
def test_an_error_of_valkey_pauses_consumption_only_if_it_is_away(reply: str, away: bool) -> None:
    error = store_error(BaseParser.parse_error(reply))  # type: ignore[no-untyped-call]
    assert (error.type in AWAY) is away
    assert not (away and error.non_retryable)
