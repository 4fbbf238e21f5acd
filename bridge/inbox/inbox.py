"""Consumption of JetStream events from nine durable consumers into the graph and the workflows.

A message is acknowledged after the graph has committed or Temporal has accepted it. A message that
cannot be parsed, or that failed at its last delivery, becomes a dead letter. An outage of a store
is not the message's fault: the consumer keeps its messages, fetches nothing, and retries until the
store is back. See docs/design/0004-inbox-settling.md.

`context-*` consumers store in the graph, in the stream's order within a batch. Batches of different
replicas may overtake each other: every write carries its time, and the later time wins. `orch-*`
consumers signal the story's workflow. Milestones and decisions, which no `context-*` consumer
stores, they store first.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import chain, groupby, repeat
from typing import TypeVar

import structlog
from nats import errors as nats_errors
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js import errors as js_errors
from prometheus_client import Counter, Gauge
from temporalio.client import Client
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from activities.graph.activities import Graph
from activities.graph.changes import Change, Claim
from bridge.inbox.envelopes import InvalidMessage, in_lower_case
from bridge.inbox.parsing import MAX_DECISIONS, Received, news, parse_event
from bridge.jetstream import consumers, streams
from bridge.jetstream.consumers import CONSUMERS, DECISION, MILESTONE, UPDATED, Consumer
from bridge.jetstream.dead_letters import DeadLetters
from bridge.mirror.source import has_sent, read_source
from bridge.outages import is_unavailable
from bridge.plan_runs import run_approved_plan
from workflows.models.agents import MAX_TASKS
from workflows.models.context import (
    DecisionAdded,
    DecisionsAdded,
    MilestoneReached,
    MilestonesAdded,
)
from workflows.models.errors import ErrorType
from workflows.models.events import DeliberationCompleted, PlanApproved
from workflows.models.ids import story_workflow_id
from workflows.models.plan import PlanInput
from workflows.story import StoryWorkflow

BATCH = 256
AT_ONCE = 2
"""Concurrent batches of a consumer: one is read while the stores are busy with the other."""

FETCH_WITHIN_S = 5.0
GATHERED_WITHIN_S = 0.25
"""How long to wait for the other available messages, so that they are stored together."""

SIGNAL_BYTES = 512 * 1024
"""Largest size of the messages that go to a story in one signal; Temporal's limit is 2 MB."""

SIGNALLED_AT_ONCE = 16
"""Stories that are signalled at the same time."""

NAK_AFTER_S = (1.0, 5.0, 30.0, 120.0)
"""Delay before a failed message is delivered again, by the number of its deliveries so far."""

LAST_DELIVERY = 6
"""Delivery at which a failure dead-letters the message: at the earliest 276 s after the first."""

UNAPPLIED_AFTER = 50
"""Deliveries without a settlement after which a message is dead-lettered unread: it probably
crashed the replicas that read it. A message that only finds the graph busy gets as many, for over
an hour."""

STORE_AGAIN_S = (0.5, 1.0, 2.0, 5.0, 10.0)
LAG_EVERY_S = 5.0

HANDLED = Counter(
    "fleet_inbox_messages", "Messages by what became of them", ["consumer", "outcome"]
)
PENDING = Gauge("fleet_consumer_pending", "Messages not delivered yet", ["consumer"])
OUTSTANDING = Gauge("fleet_consumer_outstanding", "Messages delivered, not settled", ["consumer"])
REDELIVERED = Gauge("fleet_consumer_redelivered", "Messages delivered again", ["consumer"])
PAUSED = Gauge(
    "fleet_consumer_paused", "1 while a store is away and nothing is fetched", ["consumer"]
)

T = TypeVar("T")

log = structlog.stdlib.get_logger(__name__)


class Failed(Exception):
    """Failure to apply a message.

    Attributes:
        final: it can never be applied.
        busy: the graph's load is to blame, such as a lock that was not free in time.
    """

    def __init__(self, why: str, *, final: bool, busy: bool = False) -> None:
        super().__init__(why)
        self.final = final
        self.busy = busy


class Stopping(Exception):
    """Shutdown of the inbox while a server is down: another replica gets its unsettled messages."""


@dataclass(frozen=True)
class Held:
    """A message that is not settled yet, and its change.

    content: the hash of the fields that the sender wrote; empty if the sender gave no id.
    """

    message: Msg
    change: Change
    content: str = ""

    @property
    def claim(self) -> Claim:
        """The message's id, with the content, story and time that it was used for."""
        entry = self.change.entry
        return Claim(entry.id, self.content, self.change.story_id, entry.time)


class Inbox:
    """The job of the process `inbox`; any number of replicas share the consumers."""

    def __init__(
        self,
        nats: Nats,
        graph: Graph,
        temporal: Client,
        nats_replicas: int,
        deliberation_timeout: timedelta | None = None,
        max_tasks: int = MAX_TASKS,
    ) -> None:
        """Create an inbox.

        Args:
            nats: the connection to the JetStream server.
            graph: where messages are stored.
            temporal: the client of the workflows that are signalled or started.
            nats_replicas: the number of replicas for a stream that has to be created again.
            deliberation_timeout: limit for each task of a plan that the inbox starts; None: an
                hour.
            max_tasks: the most tasks of such a plan, if it is derived.
        """
        self._max_tasks = max_tasks
        self._timeout_s = deliberation_timeout.total_seconds() if deliberation_timeout else None
        self._jetstream = nats.jetstream()
        self._graph = graph
        self._temporal = temporal
        self._nats_replicas = nats_replicas
        self._dead_letters = DeadLetters(nats)
        self._stopping = asyncio.Event()
        self._running = False

    @property
    def is_running(self) -> bool:
        return self._running

    async def run(self) -> None:
        """Consume until `shutdown`; messages fetched by then are settled.

        Raises:
            StreamError, ConsumerError: a stream or consumer was removed and cannot be created
                again.
        """
        self._source = await read_source(self._temporal)
        self._running = True
        watching = asyncio.create_task(self._watch_lag())
        consuming = [
            asyncio.create_task(self._consume(consumer))
            for consumer in CONSUMERS
            for _ in range(AT_ONCE)
        ]
        try:
            await asyncio.gather(*consuming)
        finally:
            self._running = False
            self._stopping.set()  # the client may turn a cancellation into a time-out
            await asyncio.gather(watching, *consuming, return_exceptions=True)

    async def shutdown(self) -> None:
        """Stop fetching messages."""
        self._stopping.set()

    # --- fetching and settling ----------------------------------------------------------------

    async def _consume(self, consumer: Consumer) -> None:
        away = False
        while not self._stopping.is_set():
            try:
                shared = await self._jetstream.pull_subscribe_bind(
                    consumer=consumer.name, stream=consumer.stream
                )
                try:
                    while not self._stopping.is_set():
                        if messages := await self._fetched(shared):
                            await self._settle(consumer, messages)
                        else:  # raises if the consumer was removed: no messages come then either
                            await self._jetstream.consumer_info(consumer.stream, consumer.name)
                        away = False
                finally:
                    await shared.unsubscribe()
            except Stopping:
                return
            except js_errors.NotFoundError:
                await streams.reconcile(self._jetstream, self._nats_replicas)
                await consumers.reconcile(self._jetstream)
            except (nats_errors.Error, OSError) as error:
                # Messages that were fetched are not acknowledged, and are delivered again.
                if not away:  # logged once; the connection logs each attempt to connect
                    log.warning("NATS does not answer", consumer=consumer.name, error=repr(error))
                away = True
                await self._wait(STORE_AGAIN_S[1])

    async def _fetched(self, shared: JetStreamContext.PullSubscription) -> list[Msg]:
        """Return the next messages; none if none came in time or the inbox shuts down."""
        fetching = asyncio.ensure_future(_next(shared))
        stopped = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait((fetching, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if fetching.done():
            return fetching.result()
        fetching.cancel()
        return []

    async def _settle(self, consumer: Consumer, messages: Sequence[Msg]) -> None:
        async with _in_progress(messages, consumer.ack_wait):
            held = [each for message in messages if (each := await self._read(consumer, message))]
            held = await self._with_own_ids(consumer, held)
            # Sorted by story, so that two replicas take the nodes' locks in the same order.
            held.sort(key=lambda each: each.change.story_id)
            if consumer.subject == UPDATED:
                await self._forget_packs(consumer, held)
            elif consumer.name.startswith("context-"):
                for some in _transactions(held):
                    for each in await self._stored(consumer, some):
                        await self._done(consumer, each, "stored")
            else:
                if consumer.subject in (MILESTONE, DECISION):  # no `context-*` stores these
                    held = await self._stored(consumer, held)
                await self._signal_all(consumer, held)

    async def _read(self, consumer: Consumer, message: Msg) -> Held | None:
        """Parse the message; return None if nothing remains to be done with it."""
        about, headers = message.metadata, in_lower_case(message.headers)
        if await self._is_own(consumer, headers):
            await message.ack()
            HANDLED.labels(consumer.name, "own").inc()
            return None
        if (about.num_delivered or 1) > UNAPPLIED_AFTER:
            await self._dead_letter(
                consumer, message, f"{about.num_delivered} deliveries, none settled"
            )
            return None
        try:
            parsed = parse_event(Received.of(message))
            return Held(message, parsed.change, parsed.content)
        except InvalidMessage as error:
            await self._dead_letter(consumer, message, str(error))
        except Exception as error:  # a bug must not stop the inbox  # noqa: BLE001
            await self._failed(consumer, message, Failed(repr(error), final=False))
        return None

    async def _is_own(self, consumer: Consumer, headers: Mapping[str, str]) -> bool:
        """Return whether this fleet published the message.

        Messages of older releases do not name a cluster: for them, Temporal is asked.
        """
        if self._source.may_own(headers):
            return await self._patiently(consumer, partial(has_sent, self._temporal, headers))
        return self._source.owns(headers)

    async def _done(self, consumer: Consumer, held: Held, outcome: str) -> None:
        await held.message.ack()
        HANDLED.labels(consumer.name, outcome).inc()

    async def _failed(self, consumer: Consumer, message: Msg, failure: Failed) -> None:
        """Have a failed message delivered again after a delay.

        It is dead-lettered if the failure is final or this was its last delivery.
        """
        deliveries = message.metadata.num_delivered or 1
        last = UNAPPLIED_AFTER if failure.busy else LAST_DELIVERY
        if failure.final:
            await self._dead_letter(consumer, message, "it can never be applied", str(failure))
        elif deliveries >= last:
            await self._dead_letter(consumer, message, f"failed {deliveries} times", str(failure))
        else:
            await message.nak(delay=NAK_AFTER_S[min(deliveries, len(NAK_AFTER_S)) - 1])
            HANDLED.labels(consumer.name, "again").inc()

    async def _dead_letter(
        self, consumer: Consumer, message: Msg, reason: str, error: str = ""
    ) -> None:
        await self._dead_letters.store(message, consumer=consumer.name, reason=reason, error=error)
        await message.ack()
        HANDLED.labels(consumer.name, "dead_lettered").inc()

    # --- graph and cache ----------------------------------------------------------------------

    async def _with_own_ids(self, consumer: Consumer, held: Sequence[Held]) -> list[Held]:
        """Return the messages whose id no other message has; settle the others."""
        claims = [each.claim for each in held if each.content]
        try:
            refused = await self._patiently(consumer, lambda: self._graph.claim(claims))
        except Failed as failure:
            for each in held:
                await self._failed(consumer, each.message, failure)
            return []
        taken = set(refused)
        for each in held:
            if each.content and each.claim in taken:
                reason = (
                    f"ce-id: {each.change.entry.id[:80]!r} was used for another body; give every "
                    "event an id (ce-id, or idempotency_key) that no other has"
                )
                await self._dead_letter(consumer, each.message, reason)
        return [each for each in held if not (each.content and each.claim in taken)]

    async def _stored(self, consumer: Consumer, held: Sequence[Held]) -> list[Held]:
        """Store in one transaction; if that fails, in halves, until the faulty message is alone.

        Returns:
            The messages that are stored; the others are settled.
        """
        if not held:
            return []
        try:
            await self._patiently(
                consumer, lambda: self._graph.store([each.change for each in held])
            )
        except Failed as failure:
            if len(held) == 1:
                await self._failed(consumer, held[0].message, failure)
                return []
            half = len(held) // 2
            return [
                *await self._stored(consumer, held[:half]),
                *await self._stored(consumer, held[half:]),
            ]
        return list(held)

    async def _forget_packs(self, consumer: Consumer, held: Sequence[Held]) -> None:
        stories = {each.change.story_id for each in held}
        try:
            await self._patiently(consumer, lambda: self._graph.drop_packs(stories))
        except Failed as failure:
            for each in held:
                await self._failed(consumer, each.message, failure)
            return
        for each in held:
            await self._done(consumer, each, "dropped")

    # --- workflows ----------------------------------------------------------------------------

    async def _signal_all(self, consumer: Consumer, held: Sequence[Held]) -> None:
        """Signal several stories concurrently, each in the stream's order."""
        free = asyncio.Semaphore(SIGNALLED_AT_ONCE)

        async def signal_story(story: Sequence[Held]) -> None:
            async with free:
                for part in _parts(story):
                    await self._signal_part(consumer, part)

        stories = groupby(held, key=lambda each: each.change.story_id)
        signals = [signal_story(list(story)) for _, story in stories]
        for ended in await asyncio.gather(*signals, return_exceptions=True):
            if ended:
                raise ended

    async def _signal_part(self, consumer: Consumer, held: Sequence[Held]) -> None:
        """Signal the story once; if that fails, in halves, until the faulty message is alone."""
        changes = [each.change for each in held]
        try:
            if not await self._patiently(consumer, partial(self._signal, changes)):
                for each in held:
                    await self._settle_alone(consumer, each)
                return
        except Failed as failure:
            if len(held) == 1:
                await self._failed(consumer, held[0].message, failure)
                return
            half = len(held) // 2
            await self._signal_part(consumer, held[:half])
            await self._signal_part(consumer, held[half:])
            return
        for each in held:
            await self._done(consumer, each, "delivered")

    async def _settle_alone(self, consumer: Consumer, held: Held) -> None:
        """Settle a message whose story does not run; an approved plan is started without it."""
        try:
            await self._patiently(consumer, partial(self._run_alone, held.change))
        except Failed as failure:
            await self._failed(consumer, held.message, failure)
        else:
            await self._done(consumer, held, "delivered")

    async def _signal(self, changes: Sequence[Change]) -> bool:
        """Signal one story's workflow; return False if it does not run."""
        story = self._temporal.get_workflow_handle(story_workflow_id(changes[0].story_id))
        found = [news(change) for change in changes]
        decisions = [each for each in found if isinstance(each, DecisionAdded)]
        milestones = [each for each in found if isinstance(each, MilestoneReached)]
        try:
            if decisions:
                request = DecisionsAdded(decisions=decisions)
                await story.signal(StoryWorkflow.add_decisions, request)
            if milestones:
                happened = MilestonesAdded(milestones=milestones)
                await story.signal(StoryWorkflow.add_milestones, happened)
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            return False
        return True

    async def _run_alone(self, change: Change) -> None:
        """Run an approved plan whose story has no workflow.

        A story workflow that has ended counts: then nothing is started.
        """
        if not isinstance(change.body, PlanApproved):
            return
        plan = PlanInput(
            story_id=change.story_id,
            plan_id=change.body.plan_id,
            task_timeout=self._timeout_s,
            max_tasks=self._max_tasks,
            roles=[self._graph.scopes.role(role) for role in change.body.roles],
        )
        await run_approved_plan(self._temporal, plan, "on the bus")

    # --- patience -----------------------------------------------------------------------------

    async def _patiently(self, consumer: Consumer, apply: Callable[[], Awaitable[T]]) -> T:
        """Call `apply`, and retry for as long as a server is down.

        Raises:
            Failed: `apply` failed for another reason than an outage.
            Stopping: the inbox shuts down.
        """
        for again_s in chain(STORE_AGAIN_S, repeat(STORE_AGAIN_S[-1])):
            try:
                answer = await apply()
            except ApplicationError as error:
                if not is_unavailable(error):
                    busy = error.type == ErrorType.GRAPH_BUSY
                    raise Failed(error.message, final=error.non_retryable, busy=busy) from None
                why = error.message
            except RPCError as error:
                if not is_unavailable(error):
                    final = error.status == RPCStatusCode.INVALID_ARGUMENT
                    raise Failed(f"Temporal refuses: {error.message}", final=final) from None
                why = f"Temporal does not answer: {error.message}"
            except Exception as error:  # a bug must not stop the inbox
                raise Failed(repr(error), final=False) from error
            else:
                PAUSED.labels(consumer.name).set(0)
                return answer
            PAUSED.labels(consumer.name).set(1)
            log.warning("consumption pauses", consumer=consumer.name, why=why, again_s=again_s)
            if await self._wait(again_s):
                raise Stopping
        raise AssertionError("repeat ends nowhere")

    async def _wait(self, seconds: float) -> bool:
        """Wait for `seconds` or until the shutdown; return whether it is the shutdown."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
        return self._stopping.is_set()

    # --- lag ----------------------------------------------------------------------------------

    async def _watch_lag(self) -> None:
        """Report the backlog of the consumers to Prometheus."""
        while True:
            for consumer in CONSUMERS:
                # While NATS is down, the last values stay; `_consume` logs the outage.
                with suppress(nats_errors.Error, OSError):
                    info = await self._jetstream.consumer_info(consumer.stream, consumer.name)
                    PENDING.labels(consumer.name).set(info.num_pending or 0)
                    OUTSTANDING.labels(consumer.name).set(info.num_ack_pending or 0)
                    REDELIVERED.labels(consumer.name).set(info.num_redelivered or 0)
            if await self._wait(LAG_EVERY_S):
                return


def _transactions(held: Sequence[Held]) -> Iterator[list[Held]]:
    """Split the messages into transactions of at most MAX_DECISIONS decisions."""
    part: list[Held] = []
    decisions = 0
    for each in held:
        body = each.change.body
        more = len(body.decisions) if isinstance(body, DeliberationCompleted) else 0
        if part and decisions + more > MAX_DECISIONS:
            yield part
            part, decisions = [], 0
        part.append(each)
        decisions += more
    if part:
        yield part


async def _next(shared: JetStreamContext.PullSubscription) -> list[Msg]:
    """Fetch the available messages as soon as there is one.

    A single fetch of a batch would wait until the batch is full.
    """
    try:
        (first,) = await shared.fetch(1, timeout=FETCH_WITHIN_S)
        more = min(first.metadata.num_pending or 0, BATCH - 1)
    except nats_errors.TimeoutError:
        return []
    try:
        rest = await shared.fetch(more, timeout=GATHERED_WITHIN_S) if more else []
    except nats_errors.TimeoutError:  # other replicas got them
        rest = []
    return [first, *rest]


def _parts(held: Sequence[Held]) -> Iterator[list[Held]]:
    """Split one story's messages into parts that are small enough for one signal each."""
    part: list[Held] = []
    size = 0
    for each in held:
        if part and size + len(each.message.data) > SIGNAL_BYTES:
            yield part
            part, size = [], 0
        part.append(each)
        size += len(each.message.data)
    if part:
        yield part


@asynccontextmanager
async def _in_progress(messages: Sequence[Msg], ack_wait: timedelta) -> AsyncIterator[None]:
    """Report three times per `ack_wait` that the unsettled messages are in progress."""

    async def report() -> None:
        while True:
            await asyncio.sleep(ack_wait.total_seconds() / 3)
            for message in messages:
                if not message.is_acked:
                    # Without the report it is delivered again, and still applied only once.
                    with suppress(nats_errors.Error, OSError):
                        await message.in_progress()

    reporting = asyncio.create_task(report())
    try:
        yield
    finally:
        reporting.cancel()
