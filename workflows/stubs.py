"""What workflows ask for: each activity's name, shape and options, once.

`activities/` and `bridge/` implement these. LLM calls are bounded; storing and mirroring are
retried without limit, at most a minute apart (design sections 3 and 6).
"""

from __future__ import annotations

from datetime import timedelta

from temporalio import activity
from temporalio.common import RetryPolicy
from temporalio.workflow import ActivityCancellationType, ActivityConfig

from workflows.events import PublishBatch, RecordBatch
from workflows.models import (
    Agent,
    CheckInput,
    CheckReport,
    ContextAnswer,
    ContextPack,
    ContextWrite,
    Council,
    CouncilQuery,
    CriticiseInput,
    CritiqueAnswer,
    DeliberationRecord,
    DerivePlanAnswer,
    DerivePlanInput,
    JudgeAnswer,
    JudgeInput,
    PackQuery,
    PlanQuery,
    Process,
    ProposalAnswer,
    ProposeInput,
    Readiness,
    ReviseInput,
    StoredPlan,
    StoryRuns,
    StoryText,
    WriteStoryAnswer,
    WriteStoryInput,
)

STORY_QUEUE = "story"
AGENTS_QUEUE = "agents"
CONTEXT_QUEUE = "context"
BRIDGE_QUEUE = "bridge"

LLM_CALL = ActivityConfig(
    task_queue=AGENTS_QUEUE,
    start_to_close_timeout=timedelta(minutes=10),
    heartbeat_timeout=timedelta(seconds=5),
    retry_policy=RetryPolicy(
        initial_interval=timedelta(seconds=1),
        maximum_interval=timedelta(seconds=15),
        maximum_attempts=15,
    ),
    cancellation_type=ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
)
"""An LLM call. Heartbeats say how many tokens have come; a dead worker is noticed in 5 s.

15 attempts take about 3 minutes: an engine that is started anew is back by then. A cancelled call
has stopped in the engine when its workflow goes on.
"""

ANSWERED_WITHIN = timedelta(minutes=10)
SILENT_AT_MOST = timedelta(seconds=60)

NATS_CALL = ActivityConfig(
    task_queue=AGENTS_QUEUE,
    start_to_close_timeout=ANSWERED_WITHIN,
    heartbeat_timeout=SILENT_AT_MOST,
    retry_policy=LLM_CALL["retry_policy"],
    cancellation_type=ActivityCancellationType.TRY_CANCEL,
)
"""A call to an external agent. One that is silent for a minute is given up: another is asked.

Nobody outside hears of a cancellation, so the workflow does not wait for it: the call is given up
at the agent's next word, and its answer is refused.
"""

CHECK = ActivityConfig(
    task_queue=AGENTS_QUEUE,
    start_to_close_timeout=timedelta(minutes=5),
    heartbeat_timeout=timedelta(seconds=5),
    retry_policy=RetryPolicy(maximum_interval=timedelta(seconds=20), maximum_attempts=8),
)

STORE = ActivityConfig(
    task_queue=CONTEXT_QUEUE,
    start_to_close_timeout=timedelta(seconds=30),
    heartbeat_timeout=timedelta(seconds=5),
    retry_policy=RetryPolicy(
        initial_interval=timedelta(milliseconds=500), maximum_interval=timedelta(minutes=1)
    ),
)
"""Reading and writing graph and cache: without limit, for a store that is away comes back."""

READ_CONFIG = ActivityConfig(
    task_queue=CONTEXT_QUEUE,
    start_to_close_timeout=timedelta(seconds=10),
    heartbeat_timeout=timedelta(seconds=5),
    retry_policy=RetryPolicy(maximum_interval=timedelta(minutes=1)),
)

FOLLOW = ActivityConfig(
    task_queue=STORY_QUEUE,
    start_to_close_timeout=timedelta(hours=1),
    heartbeat_timeout=timedelta(seconds=15),
    retry_policy=RetryPolicy(maximum_interval=timedelta(seconds=10)),
)
"""Waiting for a workflow's end: asked again each hour, and without limit."""

MIRROR = ActivityConfig(
    task_queue=BRIDGE_QUEUE,
    start_to_close_timeout=timedelta(seconds=30),
    heartbeat_timeout=timedelta(seconds=5),
    retry_policy=RetryPolicy(
        initial_interval=timedelta(milliseconds=500), maximum_interval=timedelta(minutes=1)
    ),
)


def agent_call(agent: Agent) -> ActivityConfig:
    """The options of a call to this agent."""
    return NATS_CALL if agent.agent_type == "NATS" else LLM_CALL


class AgentStub:
    """Calls to agents. Each raises ApplicationError; its type tells whether it is retried."""

    @activity.defn
    async def propose(self, request: ProposeInput) -> ProposalAnswer:
        raise NotImplementedError

    @activity.defn
    async def criticise(self, request: CriticiseInput) -> CritiqueAnswer:
        raise NotImplementedError

    @activity.defn
    async def revise(self, request: ReviseInput) -> ProposalAnswer:
        raise NotImplementedError

    @activity.defn
    async def judge(self, request: JudgeInput) -> JudgeAnswer:
        raise NotImplementedError

    @activity.defn
    async def derive_plan(self, request: DerivePlanInput) -> DerivePlanAnswer:
        raise NotImplementedError

    @activity.defn
    async def write_story(self, request: WriteStoryInput) -> WriteStoryAnswer:
        raise NotImplementedError


class CheckStub:
    """Policy, lint and dry run of a proposal."""

    @activity.defn
    async def check_proposal(self, request: CheckInput) -> CheckReport:
        raise NotImplementedError


class GraphStub:
    """Neo4j and Valkey. Every write is idempotent and returns after its commit."""

    @activity.defn
    async def record(self, batch: RecordBatch) -> None:
        raise NotImplementedError

    @activity.defn
    async def record_deliberation(self, record: DeliberationRecord) -> None:
        raise NotImplementedError

    @activity.defn
    async def load_council(self, query: CouncilQuery) -> Council:
        """Raises ApplicationError `UnknownCouncil` (not retryable), naming the roles there are."""
        raise NotImplementedError

    @activity.defn
    async def load_plan(self, query: PlanQuery) -> StoredPlan:
        raise NotImplementedError

    @activity.defn
    async def story_runs(self, story_id: str) -> StoryRuns:
        raise NotImplementedError

    @activity.defn
    async def build_pack(self, query: PackQuery) -> ContextPack:
        raise NotImplementedError

    @activity.defn
    async def update_context(self, write: ContextWrite) -> ContextAnswer:
        """Raises ApplicationError `UnknownStory` or `RequestReused`, not retryable."""
        raise NotImplementedError


class PlanningStub:
    """Reading the process's configuration, and scoring a story."""

    @activity.defn
    async def load_process(self, rigor: str) -> Process:
        """Raises ApplicationError `InvalidConfig` where a file does not hold together."""
        raise NotImplementedError

    @activity.defn
    async def score_story(self, text: StoryText) -> Readiness:
        raise NotImplementedError


FOLLOW_CHILD = "follow_child"
"""By its name: what it answers is what the followed workflow does."""

CHILD_ENDED = "ChildEnded"


class MirrorStub:
    """Temporal -> JetStream."""

    @activity.defn
    async def publish(self, batch: PublishBatch) -> None:
        raise NotImplementedError
