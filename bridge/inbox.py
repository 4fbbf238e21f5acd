"""JetStream -> graph and workflows: what nine durable consumers bring (design section 5).

A message is acknowledged after the commit, or after Temporal's acceptance. What cannot be
understood, or has failed its last delivery, becomes a dead letter. A store that is away is not the
message's fault: the consumer keeps what it holds, fetches nothing, and tries again until the store
is back.

`context-*` stores in the graph, in the stream's order within a batch. Batches of several replicas
may overtake each other: every write carries its time, and the later in time wins. `orch-*` tells
the story's workflow; what no `context-*` stores (milestones, decisions), it stores first.
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
from temporalio.common import WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from activities.graph import Graph
from activities.graph.statements import Change, Claim
from bridge import consumers, streams
from bridge.consumers import CONSUMERS, DECISION, MILESTONE, UPDATED, Consumer
from bridge.dead_letters import DeadLetters
from bridge.envelopes import NotUnderstood, in_lower_case
from bridge.inbound import MAX_DECISIONS, Received, news, understand
from bridge.plan_runs import require_plan
from bridge.source import has_sent, read_source
from workflows.events import DeliberationCompleted, PlanApproved
from workflows.models import (
    DecisionAdded,
    DecisionsAdded,
    MilestoneReached,
    MilestonesAdded,
    PlanInput,
    plan_workflow_id,
    story_workflow_id,
)
from workflows.plan import PlanWorkflow
from workflows.story import StoryWorkflow
from workflows.stubs import STORY_QUEUE

BATCH = 256
AT_ONCE = 2
"""Batches of a consumer at work: one is read while the stores are busy with the other."""

FETCH_WITHIN_S = 5.0
GATHERED_WITHIN_S = 0.25
"""How long a message waits for those that are there too, to be stored with them."""

SIGNAL_BYTES = 512 * 1024
"""Of messages whose content goes to a story in one signal: Temporal takes 2 MB."""

TELLING = 16
"""Stories that are told something at once."""

NAK_AFTER_S = (1.0, 5.0, 30.0, 120.0)
"""How long a failed message rests, after its first delivery, its second, and so on."""

LAST_DELIVERY = 6
"""A message that fails now is buried: some three minutes after it first failed."""

UNAPPLIED_AFTER = 50
"""Deliveries without any settlement: its replicas died of it, and the next shall not."""

STORE_AGAIN_S = (0.5, 1.0, 2.0, 5.0, 10.0)
LAG_EVERY_S = 5.0

AWAY = frozenset(
    {
        *("GraphUnavailable", "GraphCredentials", "GraphSettings", "StoreUnavailable"),
        *("CacheUnavailable", "CacheCredentials", "CacheFull"),
    }
)
"""Errors of `activities.graph.errors` that are nobody's message's fault."""

TEMPORAL_AWAY = frozenset(
    {
        RPCStatusCode.UNAVAILABLE,
        RPCStatusCode.DEADLINE_EXCEEDED,
        RPCStatusCode.CANCELLED,
        RPCStatusCode.RESOURCE_EXHAUSTED,
        RPCStatusCode.UNAUTHENTICATED,
        RPCStatusCode.PERMISSION_DENIED,
    }
)

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
    """What was to be applied could not be. final: and never can be."""

    def __init__(self, why: str, final: bool) -> None:
        super().__init__(why)
        self.final = final


class Stopping(Exception):
    """The inbox shuts down while a server is away: what it holds goes to another replica."""


@dataclass(frozen=True)
class Held:
    """A message that is not settled yet, and the change that it brings.

    content: the hash of what its sender wrote; empty where the sender gave it no id.
    """

    message: Msg
    change: Change
    content: str = ""

    @property
    def claim(self) -> Claim:
        """The id that the message has, and what for."""
        entry = self.change.entry
        return Claim(entry.id, self.content, self.change.story_id, entry.time)


class Inbox:
    """The job of the process `inbox`; any number of them share the consumers."""

    def __init__(
        self,
        nats: Nats,
        graph: Graph,
        temporal: Client,
        nats_replicas: int,
        deliberation_timeout: timedelta | None = None,
    ) -> None:
        """deliberation_timeout: of each task of a plan that it starts; None: an hour."""
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
        """Consume until `shutdown`; what was fetched by then is settled.

        Raises:
            StreamError, ConsumerError: a stream or consumer was removed and cannot be made again.
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
            self._stopping.set()  # a cancellation alone may end in the client as a time-out
            await asyncio.gather(watching, *consuming, return_exceptions=True)

    async def shutdown(self) -> None:
        """Fetch nothing more."""
        self._stopping.set()

    # --- fetching and settling ----------------------------------------------------------------

    async def _consume(self, consumer: Consumer) -> None:
        while not self._stopping.is_set():
            try:
                shared = await self._jetstream.pull_subscribe_bind(
                    consumer=consumer.name, stream=consumer.stream
                )
                try:
                    while not self._stopping.is_set():
                        if messages := await self._fetched(shared):
                            await self._settle(consumer, messages)
                        else:  # nothing comes either where somebody has removed the consumer
                            await self._jetstream.consumer_info(consumer.stream, consumer.name)
                finally:
                    await shared.unsubscribe()
            except Stopping:
                return
            except js_errors.NotFoundError:
                await streams.reconcile(self._jetstream, self._nats_replicas)
                await consumers.reconcile(self._jetstream)
            except (nats_errors.Error, OSError) as error:
                # What was fetched is not acknowledged, and comes again.
                log.warning("NATS does not answer", consumer=consumer.name, error=repr(error))
                await self._wait(STORE_AGAIN_S[1])

    async def _fetched(self, shared: JetStreamContext.PullSubscription) -> list[Msg]:
        """The next messages; none where none came in time, or the inbox shuts down."""
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
            # In the order of the stories: two replicas then take their nodes' locks alike.
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
                await self._tell_all(consumer, held)

    async def _read(self, consumer: Consumer, message: Msg) -> Held | None:
        """The message, understood; None where it is settled already."""
        about, headers = message.metadata, in_lower_case(message.headers)
        if await self._is_own(consumer, headers):
            await message.ack()
            HANDLED.labels(consumer.name, "own").inc()
            return None
        if (about.num_delivered or 1) > UNAPPLIED_AFTER:
            await self._bury(consumer, message, f"{about.num_delivered} deliveries, none settled")
            return None
        received = Received(
            subject=message.subject,
            stream=about.stream,
            sequence=about.sequence.stream,
            time=about.timestamp,
            headers=headers,
            data=message.data,
        )
        try:
            understood = understand(received)
            return Held(message, understood.change, understood.content)
        except NotUnderstood as error:
            await self._bury(consumer, message, str(error))
        except Exception as error:  # a fault of ours: one message's matter, not the inbox's end  # noqa: BLE001
            await self._failed(consumer, message, Failed(repr(error), final=False))
        return None

    async def _is_own(self, consumer: Consumer, headers: Mapping[str, str]) -> bool:
        """Whether this fleet mirrored it; an older release named no cluster: Temporal is asked."""
        if self._source.may_own(headers):
            return await self._patiently(consumer, partial(has_sent, self._temporal, headers))
        return self._source.owns(headers)

    async def _done(self, consumer: Consumer, held: Held, outcome: str) -> None:
        await held.message.ack()
        HANDLED.labels(consumer.name, outcome).inc()

    async def _failed(self, consumer: Consumer, message: Msg, failure: Failed) -> None:
        """Again after a while; for the last time, a dead letter."""
        deliveries = message.metadata.num_delivered or 1
        if failure.final:
            await self._bury(consumer, message, "it can never be applied", str(failure))
        elif deliveries >= LAST_DELIVERY:
            await self._bury(consumer, message, f"failed {deliveries} times", str(failure))
        else:
            await message.nak(delay=NAK_AFTER_S[min(deliveries, len(NAK_AFTER_S)) - 1])
            HANDLED.labels(consumer.name, "again").inc()

    async def _bury(self, consumer: Consumer, message: Msg, reason: str, error: str = "") -> None:
        await self._dead_letters.bury(message, consumer=consumer.name, reason=reason, error=error)
        await message.ack()
        HANDLED.labels(consumer.name, "buried").inc()

    # --- graph and cache ----------------------------------------------------------------------

    async def _with_own_ids(self, consumer: Consumer, held: Sequence[Held]) -> list[Held]:
        """Those whose id no other message has; the others are settled."""
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
                await self._bury(consumer, each.message, reason)
        return [each for each in held if not (each.content and each.claim in taken)]

    async def _stored(self, consumer: Consumer, held: Sequence[Held]) -> list[Held]:
        """Store in one transaction; where that fails, in halves, until the faulty one is alone.

        Answers what is stored; the others are settled.
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

    async def _tell_all(self, consumer: Consumer, held: Sequence[Held]) -> None:
        """Several stories at once, each of them in the stream's order."""
        free = asyncio.Semaphore(TELLING)

        async def tell(story: Sequence[Held]) -> None:
            async with free:
                for part in _parts(story):
                    await self._tell_part(consumer, part)

        stories = groupby(held, key=lambda each: each.change.story_id)
        telling = [tell(list(story)) for _, story in stories]
        for ended in await asyncio.gather(*telling, return_exceptions=True):
            if ended:
                raise ended

    async def _tell_part(self, consumer: Consumer, held: Sequence[Held]) -> None:
        """Signal the story once; where that fails, in halves, until the faulty one is alone."""
        changes = [each.change for each in held]
        try:
            if not await self._patiently(consumer, partial(self._tell, changes)):
                for each in held:
                    await self._settle_alone(consumer, each)
                return
        except Failed as failure:
            if len(held) == 1:
                await self._failed(consumer, held[0].message, failure)
                return
            half = len(held) // 2
            await self._tell_part(consumer, held[:half])
            await self._tell_part(consumer, held[half:])
            return
        for each in held:
            await self._done(consumer, each, "told")

    async def _settle_alone(self, consumer: Consumer, held: Held) -> None:
        """The story does not run: a plan of its may."""
        try:
            await self._patiently(consumer, partial(self._run_alone, held.change))
        except Failed as failure:
            await self._failed(consumer, held.message, failure)
        else:
            await self._done(consumer, held, "told")

    async def _tell(self, changes: Sequence[Change]) -> bool:
        """Signal one story's workflow; whether it runs."""
        story = self._temporal.get_workflow_handle_for(
            StoryWorkflow.run, story_workflow_id(changes[0].story_id)
        )
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
        """Run an approved plan whose story no workflow knows; one that has ended knows it."""
        if not isinstance(change.body, PlanApproved):
            return
        story_id, plan_id = change.story_id, change.body.plan_id
        try:
            await self._temporal.get_workflow_handle(story_workflow_id(story_id)).describe()
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
        else:
            return
        try:
            await self._temporal.start_workflow(
                PlanWorkflow.run,
                PlanInput(
                    story_id=story_id,
                    plan_id=plan_id,
                    task_timeout=self._timeout_s,
                    roles=[self._graph.scopes.role(role) for role in change.body.roles],
                ),
                id=plan_workflow_id(story_id, plan_id),
                task_queue=STORY_QUEUE,
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                static_summary=f"plan {plan_id} of {story_id}, approved on the bus",
            )
        except WorkflowAlreadyStartedError:  # by an earlier message, or delivery
            await require_plan(self._temporal, story_id, plan_id)

    # --- patience -----------------------------------------------------------------------------

    async def _patiently(self, consumer: Consumer, apply: Callable[[], Awaitable[T]]) -> T:
        """Apply, however long a server is away.

        Raises:
            Failed: it is not the servers' fault.
            Stopping: shut down meanwhile.
        """
        for again_s in chain(STORE_AGAIN_S, repeat(STORE_AGAIN_S[-1])):
            try:
                answer = await apply()
            except ApplicationError as error:
                if error.type not in AWAY:
                    raise Failed(error.message, final=error.non_retryable) from None
                why = error.message
            except RPCError as error:
                if error.status not in TEMPORAL_AWAY:
                    final = error.status == RPCStatusCode.INVALID_ARGUMENT
                    raise Failed(f"Temporal refuses: {error.message}", final) from None
                why = f"Temporal does not answer: {error.message}"
            except Exception as error:  # as above
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
        """Wait so long, or until the shutdown; whether it is that."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
        return self._stopping.is_set()

    # --- lag ----------------------------------------------------------------------------------

    async def _watch_lag(self) -> None:
        """What the consumers have before them, for Prometheus."""
        while True:
            for consumer in CONSUMERS:
                # While NATS is away the last figures stand; `_consume` tells of it.
                with suppress(nats_errors.Error, OSError):
                    told = await self._jetstream.consumer_info(consumer.stream, consumer.name)
                    PENDING.labels(consumer.name).set(told.num_pending or 0)
                    OUTSTANDING.labels(consumer.name).set(told.num_ack_pending or 0)
                    REDELIVERED.labels(consumer.name).set(told.num_redelivered or 0)
            if await self._wait(LAG_EVERY_S):
                return


def _transactions(held: Sequence[Held]) -> Iterator[list[Held]]:
    """The messages in parts that one transaction can store: by how many decisions they hold."""
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
    """What there is, as soon as there is one: for a batch, the client waits until it is whole."""
    try:
        (first,) = await shared.fetch(1, timeout=FETCH_WITHIN_S)
        more = min(first.metadata.num_pending or 0, BATCH - 1)
    except nats_errors.TimeoutError:
        return []
    try:
        rest = await shared.fetch(more, timeout=GATHERED_WITHIN_S) if more else []
    except nats_errors.TimeoutError:  # other replicas had them
        rest = []
    return [first, *rest]


def _parts(held: Sequence[Held]) -> Iterator[list[Held]]:
    """One story's messages in parts that are small enough for one signal each."""
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
    """Say thrice in every `ack_wait` that those not settled are at work."""

    async def say() -> None:
        while True:
            await asyncio.sleep(ack_wait.total_seconds() / 3)
            for message in messages:
                if not message.is_acked:
                    # Unsaid, it is delivered again, and applied once all the same.
                    with suppress(nats_errors.Error, OSError):
                        await message.in_progress()

    saying = asyncio.create_task(say())
    try:
        yield
    finally:
        saying.cancel()
