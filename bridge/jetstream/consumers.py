"""The durable pull consumers as data, and their reconciliation at start-up."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, ReplayPolicy
from nats.js.errors import APIError, NotFoundError
from pydantic import BaseModel, ConfigDict

ACK_WAIT = timedelta(seconds=30)
"""Time after which a killed replica's messages go to another one. A replica that is at work
reports progress three times in that time."""

MAX_ACK_PENDING = 2_048
"""Most unsettled messages of a consumer in all replicas: two batches for each of four replicas."""

MAX_DELIVER = 1_000
"""Deliveries after which JetStream would stop delivering a message, without a notice. The inbox
dead-letters it long before."""


class ConsumerError(Exception):
    """A consumer that start-up may not fix; the message names it, the rule and the remedy."""


class Consumer(BaseModel):
    """One durable consumer: explicit acknowledgement, any number of replicas."""

    model_config = ConfigDict(frozen=True)

    name: str
    stream: str
    subject: str
    ack_wait: timedelta = ACK_WAIT


def _consumer(name: str, stream: str, subject: str) -> Consumer:
    return Consumer(name=name, stream=stream, subject=subject)


TRANSITIONED = "planning.story.transitioned"
PLAN_APPROVED = "planning.plan.approved"
DELIBERATED = "orchestration.deliberation.completed"
DISPATCHED = "orchestration.task.dispatched"
UPDATED = "context.updated"
MILESTONE = "context.milestone.reached"
DECISION = "context.decision.added"

CONSUMERS = (
    _consumer("context-planning-story-transitions", "PLANNING_EVENTS", TRANSITIONED),
    _consumer("context-planning-plan-approved", "PLANNING_EVENTS", PLAN_APPROVED),
    _consumer("context-orch-deliberation-completed", "ORCHESTRATOR_EVENTS", DELIBERATED),
    _consumer("context-orch-task-dispatched", "ORCHESTRATOR_EVENTS", DISPATCHED),
    _consumer("orch-planning-story-transitions", "PLANNING_EVENTS", TRANSITIONED),
    _consumer("orch-planning-plan-approved", "PLANNING_EVENTS", PLAN_APPROVED),
    _consumer("orch-context-updated", "CONTEXT", UPDATED),
    _consumer("orch-context-milestone", "CONTEXT", MILESTONE),
    _consumer("orch-context-decision", "CONTEXT", DECISION),
)
"""The consumers of the inbox."""

AGENTS_RESPONSES = Consumer(
    name="agents-responses",
    stream="AGENT_RESPONSES",
    subject="agent.response.>",
    ack_wait=timedelta(seconds=10),  # an activity waits for the response
)
"""The consumer of the agents' process, for the responses of external agents."""


def declared(consumer: Consumer) -> dict[str, object]:
    """Return the settings of the consumer that JetStream can change, by ConsumerConfig's names."""
    return {
        "filter_subject": consumer.subject,
        "ack_wait": consumer.ack_wait.total_seconds(),
        # The inbox sets the delay of a failed message. With a list here, JetStream would count it
        # from the list's time: after its second delivery, a message would wait 30 s longer.
        "backoff": None,
        "max_ack_pending": MAX_ACK_PENDING,
        "max_deliver": MAX_DELIVER,
        "headers_only": None,
    }


FIXED: dict[str, object] = {
    "ack_policy": AckPolicy.EXPLICIT,
    "deliver_policy": DeliverPolicy.ALL,
    "replay_policy": ReplayPolicy.INSTANT,
    "deliver_subject": None,
}
"""Settings that JetStream cannot change: the consumer must be created again."""


def incompatibility(found: ConsumerConfig) -> str:
    """Return why no update gives this consumer the declared settings; or ''."""
    for setting, wanted in FIXED.items():
        has = getattr(found, setting)
        if has != wanted:
            return f"its {setting} is {_shown(has)}, and must be {_shown(wanted)}"
    return ""


def drift(found: ConsumerConfig, consumer: Consumer) -> dict[str, object]:
    """Return the settings that differ from the declared ones, with their declared values."""
    return {
        setting: wanted
        for setting, wanted in declared(consumer).items()
        if (getattr(found, setting) or None) != wanted
    }


async def reconcile(
    jetstream: JetStreamContext, consumers: Sequence[Consumer] = CONSUMERS
) -> dict[str, list[str]]:
    """Create missing consumers and update changed settings; repeatable and safe concurrently.

    The streams must exist (`bridge.jetstream.streams.reconcile`).

    Returns:
        What was changed: consumer -> `["made"]` or the names of the settings.

    Raises:
        ConsumerError: a consumer that cannot get the declared settings.
    """
    changes = {}
    for consumer in consumers:
        if changed := await _reconcile(jetstream, consumer):
            changes[consumer.name] = changed
    return changes


async def _reconcile(jetstream: JetStreamContext, consumer: Consumer) -> list[str]:
    try:
        found = (await jetstream.consumer_info(consumer.stream, consumer.name)).config
    except NotFoundError:
        made = ConsumerConfig(durable_name=consumer.name).evolve(**FIXED, **declared(consumer))
        await _put(jetstream, consumer, made)
        return ["made"]
    if why := incompatibility(found):
        raise _refused(consumer, why)
    changes = drift(found, consumer)
    if changes:
        await _put(jetstream, consumer, found.evolve(**changes))
    return sorted(changes)


async def _put(jetstream: JetStreamContext, consumer: Consumer, config: ConsumerConfig) -> None:
    try:
        await jetstream.add_consumer(consumer.stream, config)
    except APIError as error:
        raise _refused(consumer, f"NATS refuses it: {error.description}") from error


def _refused(consumer: Consumer, why: str) -> ConsumerError:
    return ConsumerError(
        f"Consumer {consumer.name} on {consumer.stream}: {why}. Remove it with "
        f"`nats consumer rm {consumer.stream} {consumer.name}` and start again: it is then created "
        "again and reads the stream from its beginning, which stores nothing twice"
    )


def _shown(value: object) -> str:
    return str(getattr(value, "value", value) or "none")
