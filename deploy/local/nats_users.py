"""The users of the local NATS beside the fleet's, and what each may do.

An agent takes commands and answers them. A subscriber reads events. A publisher sends the events
that the inbox reads. None of them may change a stream, or touch a consumer of the fleet.

NATS delivers what a client asked for to the client's inbox, so who may read all inboxes reads what
others get. The fleet and the agents therefore have separate inboxes.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from bridge.jetstream.consumers import CONSUMERS

AGENT_INBOX = "_INBOX_agent"
INBOX = "_INBOX"

EVENT_STREAMS = ("PLANNING_EVENTS", "CONTEXT", "ORCHESTRATOR_EVENTS")
EVENTS = ("planning.>", "context.>", "orchestration.>")


def _reading(streams: Iterable[str]) -> list[str]:
    """Return the subjects by which a client makes consumers on the streams and reads by them.

    `$JS.API.CONSUMER.CREATE.{stream}` alone is missing: there, the body may name any consumer,
    also one of the fleet.
    """
    return [
        "$JS.API.INFO",
        "$JS.API.STREAM.NAMES",
        *(
            subject
            for stream in streams
            for subject in (
                f"$JS.API.STREAM.INFO.{stream}",
                f"$JS.API.CONSUMER.CREATE.{stream}.>",
                f"$JS.API.CONSUMER.DURABLE.CREATE.{stream}.*",
                f"$JS.API.CONSUMER.INFO.{stream}.*",
                f"$JS.API.CONSUMER.MSG.NEXT.{stream}.*",
                f"$JS.ACK.{stream}.>",
                f"$JS.FC.{stream}.>",
            )
        ),
    ]


def _of_the_fleet() -> list[str]:
    """Return the subjects by which the fleet's own consumers are changed, read or acknowledged."""
    return [
        subject
        for consumer in CONSUMERS
        for stream, name in [(consumer.stream, consumer.name)]
        for subject in (
            f"$JS.API.CONSUMER.CREATE.{stream}.{name}",
            f"$JS.API.CONSUMER.CREATE.{stream}.{name}.>",
            f"$JS.API.CONSUMER.DURABLE.CREATE.{stream}.{name}",
            f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}",
            f"$JS.ACK.{stream}.{name}.>",
        )
    ]


PERMISSIONS: Mapping[str, Mapping[str, Any]] = {
    "agent": {
        "publish": {"allow": ["agent.response.>", *_reading(["AGENT_COMMANDS"])]},
        "subscribe": {"allow": [f"{AGENT_INBOX}.>"]},
    },
    "subscriber": {
        "publish": {"allow": _reading(EVENT_STREAMS), "deny": _of_the_fleet()},
        "subscribe": {"allow": [*EVENTS, f"{INBOX}.>"]},
    },
    "publisher": {
        "publish": {"allow": sorted({consumer.subject for consumer in CONSUMERS})},
        "subscribe": {"allow": [f"{INBOX}.>"]},
    },
}
"""What each user may publish and subscribe to, as in the server's configuration."""
