"""The activities that workflows call: the name, signature and options of each, in one place.

`activities/` and `bridge/` implement them. LLM calls have limits; storing and publishing are
retried without limit, at most a minute apart.
"""

from __future__ import annotations

from datetime import timedelta

from temporalio import activity
from temporalio.common import Priority, RetryPolicy
from temporalio.workflow import ActivityCancellationType, ActivityConfig, LocalActivityConfig

from workflows.models.acceptance import AcceptanceQuery, AcceptanceRuns
from workflows.models.access import ActorCheck, CheckedActor
from workflows.models.agents import (
    Agent,
    Council,
    CouncilQuery,
    CriticiseInput,
    CritiqueAnswer,
    DerivePlanAnswer,
    DerivePlanInput,
    JudgeAnswer,
    JudgeInput,
    ProposalAnswer,
    ProposeInput,
    ReviseInput,
    WriteStoryAnswer,
    WriteStoryInput,
)
from workflows.models.base import content_hash
from workflows.models.branches import (
    BaseNow,
    BaseQuery,
    BranchPoint,
    BranchQuery,
    BranchSize,
    BranchSpan,
    MergeAnswer,
    MergedBase,
    MergeRequest,
    PinnedRepository,
    PinQuery,
)
from workflows.models.changes import MeasuredChange, MeasureInput
from workflows.models.context import ContextAnswer, ContextPack, ContextWrite, PackQuery
from workflows.models.deliberation import (
    CheckInput,
    CheckReport,
    CouncilCheckInput,
    CouncilCheckReport,
    DeliberationRecord,
)
from workflows.models.entries import Announced, OutcomeBatch, PublishBatch, RecordBatch
from workflows.models.evaluation import EvaluatedCommit, EvaluateInput
from workflows.models.gathering import Gathered, GatherInput
from workflows.models.implementation import (
    ActionResult,
    NextActionAnswer,
    NextActionInput,
    RunActionInput,
    WorkQuery,
    WorkStart,
)
from workflows.models.plan import PlanQuery, StoredPlan
from workflows.models.process import Process
from workflows.models.readiness import Readiness, StoryText
from workflows.models.story import StoryRuns
from workflows.models.workspace import Limits

STORY_QUEUE = "story"
AGENTS_QUEUE = "agents"
CONTEXT_QUEUE = "context"
BRIDGE_QUEUE = "bridge"
WORKSPACE_QUEUE = "workspace"

LLM_CALL = ActivityConfig(
    task_queue=AGENTS_QUEUE,
    start_to_close_timeout=timedelta(minutes=10),
    heartbeat_timeout=timedelta(seconds=5),
    retry_policy=RetryPolicy(
        initial_interval=timedelta(milliseconds=500),
        maximum_interval=timedelta(seconds=15),
        maximum_attempts=16,
    ),
    cancellation_type=ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
)
"""Options of an LLM call. Heartbeats report received tokens; a dead worker is noticed in 5 s.

16 attempts take about 3 minutes, in which a restarted engine becomes available again. The workflow
continues after a cancelled call only when the call has stopped in the engine.
"""

ANSWERED_WITHIN = timedelta(minutes=10)
MAX_SILENCE = timedelta(seconds=60)

NATS_CALL = ActivityConfig(
    task_queue=AGENTS_QUEUE,
    start_to_close_timeout=ANSWERED_WITHIN,
    heartbeat_timeout=MAX_SILENCE,
    retry_policy=LLM_CALL["retry_policy"],
    cancellation_type=ActivityCancellationType.TRY_CANCEL,
)
"""Options of a call to an external agent. After a minute of silence, another agent is asked.

External agents are not notified of a cancellation, so the workflow does not wait for it: the call
is given up at the agent's next message, and its answer is rejected.
"""

FAIRNESS_KEY_BYTES = 64
"""The longest key that Temporal accepts."""


def fair_priority(of: str) -> Priority:
    """Return a priority by which many calls of one story or caller do not delay the others'."""
    return Priority(fairness_key=of if len(of.encode()) <= FAIRNESS_KEY_BYTES else content_hash(of))


CHECK = ActivityConfig(
    task_queue=AGENTS_QUEUE,
    start_to_close_timeout=timedelta(minutes=5),
    heartbeat_timeout=timedelta(seconds=5),
    retry_policy=RetryPolicy(maximum_interval=timedelta(seconds=20), maximum_attempts=8),
)

CHECK_TOGETHER = CHECK | ActivityConfig(
    retry_policy=RetryPolicy(maximum_interval=timedelta(seconds=20), maximum_attempts=3)
)
"""Options of the check of a whole council: if it fails for good, each proposal is checked alone."""

WORKSPACE = ActivityConfig(
    task_queue=WORKSPACE_QUEUE,
    start_to_close_timeout=timedelta(minutes=15),
    heartbeat_timeout=timedelta(seconds=3),
    retry_policy=RetryPolicy(
        initial_interval=timedelta(milliseconds=500), maximum_interval=timedelta(minutes=1)
    ),
    cancellation_type=ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
)
"""Options of work in a repository: retried without limit while its store is away.

A dead worker is noticed in 3 s, while most steps take less than one; the worker heartbeats every
second. The workflow continues after a cancelled command only when its sandbox has ended.
"""

AROUND_A_COMMAND = timedelta(minutes=15)
"""Time for the preparation, the working tree and the commit."""


def workspace_call(limits: Limits) -> ActivityConfig:
    """Return the options of an activity that runs one command of a repository."""
    within = timedelta(seconds=limits.seconds) + AROUND_A_COMMAND
    return WORKSPACE | ActivityConfig(start_to_close_timeout=within)


PUSH = WORKSPACE | ActivityConfig(
    retry_policy=RetryPolicy(maximum_interval=timedelta(minutes=1), maximum_attempts=8)
)
"""Options of a push, or of a rebase's merge: about 4 minutes of attempts."""

LOOK = WORKSPACE | ActivityConfig(schedule_to_close_timeout=timedelta(seconds=10))
"""Options of a look at a branch, for which a person waits."""

FETCH = WORKSPACE | ActivityConfig(schedule_to_close_timeout=timedelta(seconds=20))
"""Options of a look at a project's own repository, which may not answer."""


STORE = ActivityConfig(
    task_queue=CONTEXT_QUEUE,
    start_to_close_timeout=timedelta(seconds=30),
    heartbeat_timeout=timedelta(seconds=5),
    retry_policy=RetryPolicy(
        initial_interval=timedelta(milliseconds=500), maximum_interval=timedelta(minutes=1)
    ),
)
"""Options for reading and writing graph and cache: retried without limit during an outage."""

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
"""Options for waiting for a workflow's end: renewed every hour and retried without limit."""

CHECK_ACTOR = ActivityConfig(
    task_queue=STORY_QUEUE,
    start_to_close_timeout=timedelta(seconds=6),
    schedule_to_close_timeout=timedelta(seconds=20),
    retry_policy=RetryPolicy(maximum_attempts=3),
)
"""Options of the check of an actor, for which the caller waits."""

CHECK_ACTOR_LOCALLY = LocalActivityConfig(
    start_to_close_timeout=timedelta(seconds=6),
    schedule_to_close_timeout=timedelta(seconds=20),
    retry_policy=RetryPolicy(maximum_attempts=3),
)
"""Options of the same in histories of older releases."""

MIRROR = ActivityConfig(
    task_queue=BRIDGE_QUEUE,
    start_to_close_timeout=timedelta(seconds=30),
    heartbeat_timeout=timedelta(seconds=5),
    retry_policy=RetryPolicy(
        initial_interval=timedelta(milliseconds=500), maximum_interval=timedelta(minutes=1)
    ),
)

ANNOUNCE = MIRROR | ActivityConfig(schedule_to_start_timeout=timedelta(seconds=10))
"""Options for recording and publishing at once: a batch that no mirror takes is only recorded."""


def agent_call(agent: Agent) -> ActivityConfig:
    """Return the options of a call to this agent."""
    return NATS_CALL if agent.agent_type == "NATS" else LLM_CALL


MEASURED_COMMANDS = 12
"""Build, both suites and their repetitions, lint and analysis, of the base and of the change."""


def measuring(limits: Limits) -> ActivityConfig:
    """Return the options of an activity that measures an agent's commit."""
    within = MEASURED_COMMANDS * timedelta(seconds=limits.seconds) + AROUND_A_COMMAND
    return WORKSPACE | ActivityConfig(start_to_close_timeout=within)


EVALUATED_COMMANDS = 2
"""Build and tests."""


def evaluating(limits: Limits) -> ActivityConfig:
    """Return the options of an activity that runs a task's tests: a few attempts."""
    within = EVALUATED_COMMANDS * timedelta(seconds=limits.seconds) + AROUND_A_COMMAND
    return WORKSPACE | ActivityConfig(
        start_to_close_timeout=within,
        retry_policy=RetryPolicy(maximum_interval=timedelta(minutes=1), maximum_attempts=8),
    )


def measure_head(limits: Limits) -> ActivityConfig:
    """Return the options of a measurement that a person's report can replace: a few attempts."""
    return measuring(limits) | ActivityConfig(
        retry_policy=RetryPolicy(maximum_interval=timedelta(minutes=1), maximum_attempts=5)
    )


class AgentStub:
    """Calls to agents. Each raises ApplicationError; its type decides whether it is retried."""

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

    @activity.defn
    async def next_action(self, request: NextActionInput) -> NextActionAnswer:
        raise NotImplementedError


class WorkspaceStub:
    """Work in a repository. Idempotent; each returns when the store has its effect."""

    @activity.defn
    async def begin_work(self, query: WorkQuery) -> WorkStart:
        """Find the repository and its commits.

        Raises:
            ApplicationError: `UnknownRepository` or `NotFound`, not retryable.
        """
        raise NotImplementedError

    @activity.defn
    async def measure_change(self, request: MeasureInput) -> MeasuredChange:
        """Check and measure a commit against its base, whose results are measured once.

        Raises:
            ApplicationError: `UnknownRepository` or `NotFound`; `PreparationFailed` if the base
                cannot be prepared; none is retryable.
        """
        raise NotImplementedError

    @activity.defn
    async def run_action(self, request: RunActionInput) -> ActionResult:
        """Carry out an action and commit what it changed; a repetition returns the first result."""
        raise NotImplementedError


class BranchStub:
    """The branch of a story in the store of its repository. Idempotent, as WorkspaceStub is."""

    @activity.defn
    async def pin_repository(self, query: PinQuery) -> PinnedRepository:
        """Find the repository that a story names, and the commit that it begins at.

        Raises:
            ApplicationError: `UnknownRepository`, `BaseMissing`, `InvalidInput` for a glob, and
                after a few attempts `RepositoryAway`; not retryable.
        """
        raise NotImplementedError

    @activity.defn
    async def place_branch(self, point: BranchPoint) -> None:
        """Let the branch be at a commit; what it names otherwise is kept under another ref."""
        raise NotImplementedError

    @activity.defn
    async def branch_head(self, query: BranchQuery) -> str:
        """Return the branch's commit; empty if it does not exist."""
        raise NotImplementedError

    @activity.defn
    async def merge_change(self, request: MergeRequest) -> MergeAnswer:
        """Merge a commit into the branch, which is at `head`, or as this merge has left it."""
        raise NotImplementedError

    @activity.defn
    async def base_now(self, query: BaseQuery) -> BaseNow:
        """Fetch the base branch, and count its commits since another one.

        Raises:
            ApplicationError: `RepositoryAway`; `BaseMissing`, not retryable.
        """
        raise NotImplementedError

    @activity.defn
    async def merged_base(self, request: MergeRequest) -> MergedBase:
        """Make the commit on which the author of a change that conflicts works once more."""
        raise NotImplementedError

    @activity.defn
    async def branch_size(self, span: BranchSpan) -> BranchSize:
        """Count what a branch changes."""
        raise NotImplementedError

    @activity.defn
    async def push_branch(self, point: BranchPoint) -> None:
        """Push the branch to the repository, if it is at exactly this commit.

        Raises:
            ApplicationError: `PushRefused`, not retryable; `RepositoryAway`.
        """
        raise NotImplementedError


class AcceptanceStub:
    """The tests of acceptance criteria. Idempotent, as WorkspaceStub is."""

    @activity.defn
    async def test_criteria(self, query: AcceptanceQuery) -> AcceptanceRuns:
        """Run the tests on a branch, and on its base with the branch's test files."""
        raise NotImplementedError


class EvaluationStub:
    """The tests of a task whose solution is known by them. Idempotent."""

    @activity.defn
    async def evaluate_commit(self, request: EvaluateInput) -> EvaluatedCommit:
        """Run a task's tests on a commit.

        Raises:
            ApplicationError: `InvalidInput` if the test patch does not apply;
                `UnknownRepository` or `NotFound`; none is retryable.
        """
        raise NotImplementedError


class CheckStub:
    """The check of proposals by policy, lint and dry run."""

    @activity.defn
    async def check_council(self, request: CouncilCheckInput) -> CouncilCheckReport:
        raise NotImplementedError

    @activity.defn
    async def check_proposal(self, request: CheckInput) -> CheckReport:
        raise NotImplementedError


class GraphStub:
    """Access to Neo4j and Valkey. Every write is idempotent and returns after its commit."""

    @activity.defn
    async def record(self, batch: RecordBatch) -> None:
        raise NotImplementedError

    @activity.defn
    async def record_deliberation(self, record: DeliberationRecord) -> None:
        raise NotImplementedError

    @activity.defn
    async def load_council(self, query: CouncilQuery) -> Council:
        """Load a council with its agents.

        Raises:
            ApplicationError: `UnknownCouncil`, not retryable, naming the existing roles.
        """
        raise NotImplementedError

    @activity.defn
    async def gather(self, request: GatherInput) -> Gathered:
        """Load a council as `load_council` does, and keep its context pack as `keep_pack` does."""
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
    async def keep_pack(self, query: PackQuery) -> ContextPack:
        raise NotImplementedError

    @activity.defn
    async def update_context(self, write: ContextWrite) -> ContextAnswer:
        """Store an update of a story's context.

        Raises:
            ApplicationError: `UnknownStory` or `RequestReused`, not retryable.
        """
        raise NotImplementedError


class PlanningStub:
    """Access to the process's configuration, and the scoring of stories."""

    @activity.defn
    async def load_process(self, rigor: str) -> Process:
        """Load the process's configuration at a rigor level.

        Raises:
            ApplicationError: `InvalidConfig` if a file is inconsistent.
        """
        raise NotImplementedError

    @activity.defn
    async def score_story(self, text: StoryText) -> Readiness:
        raise NotImplementedError


class AccessStub:
    """The check of who sends a request."""

    @activity.defn
    async def check_actor(self, check: ActorCheck) -> CheckedActor:
        """Return how the actor of a request is known.

        Raises:
            ApplicationError: `Unauthenticated` or `Permission`, not retryable.
        """
        raise NotImplementedError


FOLLOW_CHILD = "follow_child"
"""Called by name, because its result type is that of the followed workflow."""


class AnnounceStub:
    """Recording in graph and cache, then publishing to JetStream."""

    @activity.defn
    async def announce(self, batch: RecordBatch) -> Announced:
        raise NotImplementedError

    @activity.defn
    async def announce_outcome(self, batch: OutcomeBatch) -> Announced:
        raise NotImplementedError


class MirrorStub:
    """Publishing from Temporal to JetStream."""

    @activity.defn
    async def publish(self, batch: PublishBatch) -> None:
        raise NotImplementedError
