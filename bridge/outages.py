"""Which errors mean that a server is down, so that the same request succeeds later."""

from __future__ import annotations

from nats.errors import Error as NatsError
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from activities.graph.errors import TABLE, store_error
from bridge.mirror.publisher import publish_error
from workflows.models.errors import UNAVAILABLE

TEMPORAL_UNAVAILABLE = frozenset(
    {
        RPCStatusCode.UNAVAILABLE,
        RPCStatusCode.DEADLINE_EXCEEDED,
        RPCStatusCode.CANCELLED,
        RPCStatusCode.RESOURCE_EXHAUSTED,
        RPCStatusCode.UNAUTHENTICATED,
        RPCStatusCode.PERMISSION_DENIED,
        RPCStatusCode.UNKNOWN,  # of a broken connection
    }
)


def is_unavailable(error: BaseException) -> bool:
    """Return whether Temporal, NATS, Neo4j or Valkey is down, or refuses our credentials.

    No request causes such an error, so a consumer waits and dead-letters nothing.
    """
    match error:
        case RPCError():
            return error.status in TEMPORAL_UNAVAILABLE
        case ApplicationError():
            return error.type in UNAVAILABLE
        case NatsError():
            return is_unavailable(publish_error("NATS", error))
    if isinstance(error, tuple(row[0] for row in TABLE)):
        return store_error(error).type in UNAVAILABLE
    return False
