"""The process `story`: workflows, run once their search attributes are registered."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import structlog
from redis.asyncio import Redis
from temporalio.client import Client
from temporalio.worker import Worker

from activities.access import Access
from activities.children import Children
from activities.heartbeats import Heartbeats
from activities.revoked import RevokedTokens
from workers import search_attributes
from workers.clients.connection import StartError
from workers.payload_keeper import PayloadKeeper, require_kept
from workers.processes.process import ProcessContext, RunningProcess, options
from workers.settings import Settings
from workers.workflow_runner import Runner
from workflows.closure import StoryClosureWorkflow
from workflows.coach import CoachWorkflow
from workflows.context_update import ContextUpdateWorkflow
from workflows.deliberation import DeliberationWorkflow
from workflows.derivation import DerivationWorkflow
from workflows.evaluation import EvaluationWorkflow
from workflows.implementation import ImplementationWorkflow
from workflows.plan import PlanWorkflow
from workflows.story import StoryWorkflow
from workflows.stubs import STORY_QUEUE

STICKY_TIMEOUT = timedelta(seconds=5)
"""How long a story waits for the worker that has it in its cache, before another takes it."""

WORKFLOWS: list[type] = [
    StoryWorkflow,
    PlanWorkflow,
    DeliberationWorkflow,
    ContextUpdateWorkflow,
    DerivationWorkflow,
    StoryClosureWorkflow,
    CoachWorkflow,
    ImplementationWorkflow,
    EvaluationWorkflow,
]
"""Every workflow of the fleet; the tests run and replay the same."""

log = structlog.stdlib.get_logger(__name__)


def story_worker(client: Client, settings: Settings, valkey: Redis) -> Worker:
    """Return the worker that runs the workflows.

    Raises:
        StartError: tokens are required, and no key is set that reads them.
    """
    keys = settings.token_keys
    if settings.require_tokens and not keys:
        raise StartError(
            "REQUIRE_TOKENS is set and GRPC_TOKEN_KEY (key that tokens are signed with) is not: "
            "set it to the key that the gRPC services have"
        )
    access = Access(keys, settings.require_tokens, RevokedTokens(valkey))
    return Worker(
        client,
        task_queue=STORY_QUEUE,
        workflows=WORKFLOWS,
        activities=[Children(client).follow, access.check_actor],
        workflow_runner=Runner(),
        max_cached_workflows=settings.cached_workflows,
        sticky_queue_schedule_to_start_timeout=STICKY_TIMEOUT,
        **options(settings, Heartbeats()),
    )


@asynccontextmanager
async def process(base: ProcessContext) -> AsyncIterator[RunningProcess]:
    """Register the search attributes, then run."""
    added = await search_attributes.register(base.temporal)
    log.info("search attributes registered", added=added)
    keep_for = base.settings.keep_payloads_for
    await require_kept(base.temporal, keep_for)
    yield RunningProcess(
        {
            STORY_QUEUE: story_worker(base.temporal, base.settings, base.valkey),
            "payloads": PayloadKeeper(base.temporal, base.valkey, keep_for),
        }
    )
