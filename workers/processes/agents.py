"""The process `agents`: LLM calls and checks."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

from redis.asyncio import Redis
from temporalio.client import Client
from temporalio.worker import Worker

from activities.agents import VllmAgents
from activities.checks import Checks
from activities.planning import InvalidConfig
from activities.prompts import InvalidPrompt, Prompts
from workers.clients.engine import Engine, open_engine
from workers.processes import Base, Running, options, valid_config
from workers.settings import Settings
from workflows.stubs import AGENTS_QUEUE

HEARTBEATS_AT_MOST = timedelta(seconds=2)
"""Tokens are shown, and a cancellation reaches the engine, within this time."""


def agents_worker(client: Client, settings: Settings, engine: Engine, valkey: Redis) -> Worker:
    """Runs LLM calls and checks, no more at once than the engine can."""
    agents = VllmAgents(
        engine.client, valkey, engine.model, Prompts.load(settings.fleet_config / "prompts")
    )
    checks = Checks(settings.fleet_config)
    return Worker(
        client,
        task_queue=AGENTS_QUEUE,
        activities=[
            agents.propose,
            agents.criticise,
            agents.revise,
            agents.judge,
            agents.derive_plan,
            checks.check_proposal,
        ],
        max_concurrent_activities=settings.llm_concurrency,
        max_heartbeat_throttle_interval=HEARTBEATS_AT_MOST,
        **options(settings),
    )


@asynccontextmanager
async def process(base: Base) -> AsyncIterator[Running]:
    """See that the model is served, then run."""
    async with open_engine(base.settings) as engine:
        with valid_config(InvalidConfig, InvalidPrompt):
            worker = agents_worker(base.temporal, base.settings, engine, base.valkey)
        yield Running({AGENTS_QUEUE: worker}, {"llm": engine.client.models.list})
