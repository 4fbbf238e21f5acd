"""The process `story`: workflows, run once their search attributes are registered."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import structlog
from temporalio.client import Client
from temporalio.worker import Worker

from activities.children import Children
from activities.heartbeats import Heartbeats
from workers import search_attributes
from workers.payload_keeper import PayloadKeeper, require_kept
from workers.processes.process import ProcessContext, RunningProcess, options
from workers.settings import Settings
from workers.workflow_runner import workflow_runner
from workflows.closure import StoryClosureWorkflow
from workflows.coach import CoachWorkflow
from workflows.context_update import ContextUpdateWorkflow
from workflows.deliberation import DeliberationWorkflow
from workflows.derivation import DerivationWorkflow
from workflows.plan import PlanWorkflow
from workflows.story import StoryWorkflow
from workflows.stubs import STORY_QUEUE

STICKY_TIMEOUT = timedelta(seconds=5)
"""How long a story waits for the worker that has it in its cache, before another takes it."""

log = structlog.stdlib.get_logger(__name__)


def story_worker(client: Client, settings: Settings) -> Worker:
    """Return the worker that runs the workflows."""
    return Worker(
        client,
        task_queue=STORY_QUEUE,
        workflows=[
            StoryWorkflow,
            PlanWorkflow,
            DeliberationWorkflow,
            ContextUpdateWorkflow,
            DerivationWorkflow,
            StoryClosureWorkflow,
            CoachWorkflow,
        ],
        activities=[Children(client).follow],
        workflow_runner=workflow_runner(),
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
            STORY_QUEUE: story_worker(base.temporal, base.settings),
            "payloads": PayloadKeeper(base.temporal, base.valkey, keep_for),
        }
    )
