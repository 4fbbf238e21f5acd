"""The process `agents`: calls to agents, the external ones' answers, and checks."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial

import structlog
from nats.aio.client import Client as Nats
from redis.asyncio import Redis
from temporalio.client import Client
from temporalio.worker import Worker

from activities.agents.activities import AgentBackend, Agents, VllmAgents
from activities.agents.kept_packs import KeptPacks
from activities.agents.openai_client import served_models
from activities.agents.profiles import Profiles
from activities.agents.prompts import InvalidPrompt, Prompts
from activities.checks.activities import Checks
from activities.checks.sandbox import Sandbox
from activities.config import InvalidConfig
from activities.redaction import load_redaction
from bridge.agents.activity import NatsAgents
from bridge.agents.responses import AgentResponses
from bridge.mirror.source import Source, read_source
from workers.clients.engine import Engine, open_engine
from workers.clients.nats import open_nats
from workers.payload_codec import text_cipher
from workers.processes.process import ProcessContext, RunningProcess, options, valid_config
from workers.settings import Settings
from workflows.stubs import AGENTS_QUEUE

HEARTBEATS_AT_MOST = timedelta(seconds=2)
"""The time within which tokens are shown and a cancellation reaches the engine."""

log = structlog.stdlib.get_logger(__name__)

RESPONSES = "agent-responses"
"""The job that completes the calls to external agents."""


def agents_worker(
    client: Client, settings: Settings, engine: Engine, valkey: Redis, nats: Nats, source: Source
) -> Worker:
    """Return a worker for agent calls and checks, no more at once than the engine can serve."""
    prompts = Prompts.load(settings.fleet_config / "prompts", load_redaction(settings.fleet_config))
    cipher, per_hour = text_cipher(settings.encryption_keys), settings.grpc_tokens_per_hour
    profiles = Profiles.load(settings.fleet_config)
    llms = VllmAgents(engine.client, valkey, engine.model, prompts, profiles, per_hour, cipher)
    external = NatsAgents(
        nats, valkey, prompts, source, profiles, settings.external_window, per_hour, cipher
    )
    by_type: dict[str, AgentBackend] = {"RAY_VLLM": llms, "VLLM": llms, "NATS": external}
    agents = Agents(by_type, KeptPacks(valkey, cipher))
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
            agents.write_story,
            agents.next_action,
            checks.check_proposal,
            checks.check_council,
        ],
        max_concurrent_activities=settings.llm_concurrency,
        max_heartbeat_throttle_interval=HEARTBEATS_AT_MOST,
        **options(settings),
    )


async def _known(problem: str) -> str:
    return problem


@asynccontextmanager
async def process(base: ProcessContext) -> AsyncIterator[RunningProcess]:
    """Check that the model is served, then run.

    NATS may connect later, because only some agents need it.
    """
    settings = base.settings
    async with (
        open_engine(settings) as engine,
        open_nats(settings, base.lost, at_once=False) as nats,
    ):
        source = await read_source(base.temporal)
        sandbox = Sandbox()
        if no_sandbox := await sandbox.problem():
            log.warning("code of proposals is not checked", reason=no_sandbox)
        elif sandbox.no_groups:
            log.warning("the kernel does not limit the whole sandbox", reason=sandbox.no_groups)
        with valid_config(InvalidConfig, InvalidPrompt):
            worker = agents_worker(base.temporal, settings, engine, base.valkey, nats, source)
            prompts = Prompts.load(
                settings.fleet_config / "prompts", load_redaction(settings.fleet_config)
            )
        responses = AgentResponses(
            nats,
            settings.nats_replicas,
            base.temporal,
            base.valkey,
            prompts,
            text_cipher(settings.encryption_keys),
        )
        yield RunningProcess(
            {AGENTS_QUEUE: worker, RESPONSES: responses},
            {
                "llm": partial(served_models, engine.client),
                "sandbox": partial(_known, no_sandbox or sandbox.no_groups),
            },
        )
