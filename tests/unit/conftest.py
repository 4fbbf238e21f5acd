"""Workflows on a Temporal server, with activities that answer at once.

The activities here are the world of a unit test: each answers from the data of the test that owns
the calling workflow. The whole run shares the workers. Apart from Temporal, real servers (Neo4j,
NATS, Valkey, an LLM over HTTP) are used only in tests/integration and tests/e2e.
"""

from __future__ import annotations

import asyncio
import gc
import uuid
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from temporalio import activity
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest
from temporalio.client import Client, WorkflowHandle
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.exceptions import ApplicationError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from activities.children import Children
from activities.heartbeats import Heartbeats
from activities.workspace.branches import Branches
from activities.workspace.reports import workspace_report
from activities.workspace.stores import Stores
from deploy.local.server import script
from tests.support.fleet import TOKEN_KEY, connect
from tests.support.polling import until
from tests.support.sandbox import sandboxed_runner
from tests.support.servers import RunningServer
from workers.processes.story import WORKFLOWS
from workers.search_attributes import register
from workflows.models.acceptance import AcceptanceQuery, AcceptanceRuns, AcceptanceTest
from workflows.models.access import ActorCheck, CheckedActor
from workflows.models.agents import (
    Agent,
    AgentCall,
    CallUsage,
    Council,
    CouncilQuery,
    CriticiseInput,
    Critique,
    CritiqueAnswer,
    CritiquePoint,
    Decision,
    DerivePlanAnswer,
    DerivePlanInput,
    DraftTask,
    JudgeAnswer,
    JudgeInput,
    Proposal,
    ProposalAnswer,
    ProposeInput,
    ReviseInput,
    Verdict,
    WriteStoryAnswer,
    WriteStoryInput,
)
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
from workflows.models.context import (
    ContextAnswer,
    ContextPack,
    ContextWrite,
    DecisionAdded,
    MilestoneReached,
    PackQuery,
)
from workflows.models.deliberation import (
    Check,
    CheckInput,
    CheckReport,
    CouncilCheckInput,
    CouncilCheckReport,
    DeliberationRecord,
)
from workflows.models.entries import Announced, Entry, OutcomeBatch, PublishBatch, RecordBatch
from workflows.models.errors import ErrorType, application_error
from workflows.models.evaluation import EvaluatedCommit, EvaluateInput, SuiteCount
from workflows.models.gathering import Gathered, GatherInput
from workflows.models.ids import story_workflow_id
from workflows.models.implementation import (
    Action,
    ActionResult,
    Finish,
    ImplementationInput,
    NextActionAnswer,
    NextActionInput,
    Outline,
    RunActionInput,
    RunCommand,
    WorkQuery,
    WorkStart,
)
from workflows.models.measurement import (
    CoverageResult,
    LintResult,
    Measurement,
    Step,
    SuiteResult,
)
from workflows.models.plan import PlanQuery, StoredPlan
from workflows.models.process import Process
from workflows.models.readiness import STORY_TEXT_BYTES, Readiness, StoryText
from workflows.models.story import StoryResult, StoryRuns, StoryView
from workflows.models.workspace import Change, ChangedFile, Repository
from workflows.rules import rigor
from workflows.rules.machine_file import parse_machine
from workflows.search_attributes import ALL
from workflows.story import StoryWorkflow
from workflows.stubs import (
    STORY_QUEUE,
    AcceptanceStub,
    AccessStub,
    AgentStub,
    AnnounceStub,
    BranchStub,
    CheckStub,
    EvaluationStub,
    GraphStub,
    MirrorStub,
    PlanningStub,
    WorkspaceStub,
)

CONFIG = Path(__file__).parents[2] / "deploy" / "config"
ROLES = ["ARCHITECT", "DATA", "DEV", "DEVOPS", "QA"]
GARBAGE = 200_000
"""Objects that are allocated and not freed before they are searched for cycles."""

QUEUES = ("story", "agents", "context", "bridge", "workspace")


def pytest_sessionstart() -> None:
    """Collect garbage between tests: to the SDK, a pause in a workflow task is a deadlock."""
    gc.disable()


def pytest_runtest_logfinish() -> None:
    if gc.get_count()[0] > GARBAGE:
        gc.collect()


def machine_document() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((CONFIG / "agile.fsm.yaml").read_text())
    return document


@dataclass
class World:
    """The answers of the activities, and the requests that they received.

    `key` is part of the ids of the test's workflows; an activity finds its world by it.
    """

    key: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    readiness: int = 95
    drafts: list[DraftTask] = field(
        default_factory=lambda: [
            DraftTask(role="DEV", title="Build it", description="Write the code."),
            DraftTask(role="QA", title="Test it", description="Write tests.", depends_on=[1]),
        ]
    )
    scores: dict[str, float] = field(default_factory=dict)
    blocking: set[str] = field(default_factory=set)
    unchecked: set[str] = field(default_factory=set)
    """Ids of agents whose code cannot be run, so that it has no dry run."""
    failing: dict[str, str] = field(default_factory=dict)
    lost_packs: set[str] = field(default_factory=set)
    """Packs that Valkey no longer has."""
    problems: dict[str, str] = field(default_factory=dict)
    """Agent -> why its revisions say nothing."""
    """Agent id, `act/agent id`, task id or activity name -> text of a permanent error."""
    failures_cost: bool = False
    """Whether a failed call costs tokens, as an answered one does."""
    judge: bool = True
    stored: StoredPlan = field(default_factory=StoredPlan)
    machine: dict[str, Any] = field(default_factory=machine_document)
    tokens: int = 10
    bus_open: asyncio.Event = field(default_factory=asyncio.Event)
    """An event that is cleared while NATS is unavailable."""
    graph_open: asyncio.Event = field(default_factory=asyncio.Event)
    config_open: asyncio.Event = field(default_factory=asyncio.Event)
    hold: dict[str, asyncio.Event] = field(default_factory=dict)
    """Act -> the event that its calls wait for."""

    actions: list[Action] = field(default_factory=list)
    """What an agent does in a repository, step by step; then it finishes."""
    actions_of: dict[str, list[Action]] = field(default_factory=dict)
    """Agent id -> what that agent does instead."""
    broken: set[str] = field(default_factory=set)
    """Paths whose change breaks a test."""
    repairs: str = ""
    """The path whose change solves an evaluated task."""
    measured_commits: list[MeasureInput] = field(default_factory=list)
    output: str = "1 passed"
    """The output of every command."""
    folder: Path = Path("/nonexistent")
    """Where the stores of `repositories` are."""
    repositories: dict[str, Repository] = field(default_factory=dict)
    acceptance_tests: list[AcceptanceTest] = field(default_factory=list)
    builds: bool = True
    """Whether the build of every commit passes."""
    failing_builds: int = 0
    """The build fails in so many measurements more."""
    revisions: list[ImplementationInput] = field(default_factory=list)
    """What authors were asked to revise; see tests/support/branches.py."""
    edits: dict[str, dict[str, str]] = field(default_factory=dict)
    """Title of a task, or a phase -> the files that its council writes (support/branches.py)."""

    calls: list[AgentCall] = field(default_factory=list)
    acts: list[str] = field(default_factory=list)
    recorded: list[Entry] = field(default_factory=list)
    published: list[Entry] = field(default_factory=list)
    deliberations: list[DeliberationRecord] = field(default_factory=list)
    packs: list[PackQuery] = field(default_factory=list)
    updates: list[ContextWrite] = field(default_factory=list)
    ran: list[RunActionInput] = field(default_factory=list)
    runs: StoryRuns = field(default_factory=StoryRuns)
    require_tokens: bool = False
    known: bool = False
    """Whether the graph already has the story."""

    def __post_init__(self) -> None:
        self.bus_open.set()
        self.graph_open.set()
        self.config_open.set()

    def subjects(self, story_id: str | None = None) -> list[str]:
        return [e.subject for e in self.published if story_id in (None, e.story_id)]

    def transitions(self) -> list[tuple[str, str, str]]:
        return [
            (e.body["from_phase"], e.body["event"], e.body["to_phase"])
            for e in self.published
            if e.kind == "StoryTransitioned"
        ]


WORLDS: dict[str, World] = {}


class InWorld:
    @property
    def world(self) -> World:
        workflow_id = activity.info().workflow_id or ""
        return next(world for key, world in WORLDS.items() if key in workflow_id)


class InstantAgents(InWorld, AgentStub):
    async def answer(self, act: str, call: AgentCall) -> CallUsage:
        if call.pack.kept_at in self.world.lost_packs:
            raise application_error(ErrorType.PACK_MISSING, call.pack.kept_at)
        self.world.calls.append(call)
        self.world.acts.append(f"{act}/{call.agent.agent_id}")
        if act in self.world.hold:
            heartbeat = asyncio.create_task(self.beat())
            try:
                await self.world.hold[act].wait()
            finally:
                heartbeat.cancel()
        usage = CallUsage(
            act=act,
            agent_id=call.agent.agent_id,
            role=call.agent.role,
            model="instant",
            tokens_in=self.world.tokens,
            tokens_out=self.world.tokens,
            latency_ms=5,
            prompt_hash="p" * 8,
        )
        for key in (call.agent.agent_id, f"{act}/{call.agent.agent_id}", call.task.task_id, act):
            if cause := self.world.failing.get(key):
                costs = [usage] if self.world.failures_cost else []
                raise ApplicationError(cause, *costs, type="LlmRefused", non_retryable=True)
        return usage

    async def beat(self) -> None:
        while True:
            activity.heartbeat()
            await asyncio.sleep(0.05)

    @activity.defn
    async def propose(self, request: ProposeInput) -> ProposalAnswer:
        usage = await self.answer("propose", request)
        agent_id = request.agent.agent_id
        return ProposalAnswer(
            proposal=Proposal(
                approach=f"{agent_id}'s way",
                content=f"draft of {agent_id}",
                decisions=[Decision(title=f"{agent_id} decides", rationale="so")],
            ),
            usage=usage,
        )

    @activity.defn
    async def criticise(self, request: CriticiseInput) -> CritiqueAnswer:
        usage = await self.answer("criticise", request)
        point = CritiquePoint(severity="low", text=f"of {request.author_id}")
        return CritiqueAnswer(critique=Critique(verdict="revise", points=[point]), usage=usage)

    @activity.defn
    async def revise(self, request: ReviseInput) -> ProposalAnswer:
        usage = await self.answer("revise", request)
        agent_id = request.agent.agent_id
        revised = request.proposal.model_copy(update={"content": f"revision of {agent_id}"})
        problem = self.world.problems.get(agent_id, "")
        return ProposalAnswer(proposal=revised, usage=usage, problem=problem)

    @activity.defn
    async def judge(self, request: JudgeInput) -> JudgeAnswer:
        usage = await self.answer("judge", request)
        winner = request.contenders[-1].agent_id
        return JudgeAnswer(verdict=Verdict(winner_id=winner, reason="it is simpler"), usage=usage)

    @activity.defn
    async def derive_plan(self, request: DerivePlanInput) -> DerivePlanAnswer:
        usage = await self.answer("derive_plan", request)
        return DerivePlanAnswer(tasks=self.world.drafts, usage=usage)

    @activity.defn
    async def write_story(self, request: WriteStoryInput) -> WriteStoryAnswer:
        usage = await self.answer("write_story", request)
        title = f"Story {request.wave}: {request.goal or 'better'}"
        return WriteStoryAnswer(story=StoryText(title=title), usage=usage)

    @activity.defn
    async def next_action(self, request: NextActionInput) -> NextActionAnswer:
        usage = await self.answer("next_action", request)
        actions = self.world.actions_of.get(request.agent.agent_id, self.world.actions)
        left = actions[request.wave - 1 :]
        return NextActionAnswer(action=left[0] if left else Finish(summary="done"), usage=usage)


class InstantWorkspace(InWorld, WorkspaceStub):
    """A repository whose commits are numbered by step."""

    @activity.defn
    async def begin_work(self, query: WorkQuery) -> WorkStart:
        if cause := self.world.failing.get("begin_work"):
            raise ApplicationError(cause, type="UnknownRepository", non_retryable=True)
        key = query.repository
        return WorkStart(
            repository=key if isinstance(key, Repository) else Repository(key=key, url="file:///r"),
            base=query.base or "0" * 40,
            head=query.head or query.base or "0" * 40,
            outline=Outline(text="README.md", editable=["README.md"]),
        )

    @activity.defn
    async def run_action(self, request: RunActionInput) -> ActionResult:
        world, step, action = self.world, request.trailers.step, request.action
        if "run_action" in world.hold:
            await world.hold["run_action"].wait()
        if held := world.hold.get(f"run_action/{request.trailers.agent}/{step}"):
            await held.wait()
        if cause := world.failing.get(f"run_action/{step}"):
            raise ApplicationError(cause, type="PreparationFailed", non_retryable=True)
        world.ran.append(request)
        mine = [ran for ran in world.ran if ran.trailers.agent == request.trailers.agent]
        paths = {p: None for ran in mine if (p := getattr(ran.action, "path", ""))}
        changed = [ChangedFile(path=path, status="modified", insertions=1) for path in paths]
        if isinstance(action, RunCommand):
            return ActionResult(
                exit_code=0, observation=world.output, commit=request.parent, changed=changed
            )
        commit = f"{step:040x}"
        if request.trailers.agent in world.actions_of:
            commit = self._prefix(request) + f"{step:02x}"
        return ActionResult(observation="written", commit=commit, changed=changed)

    @activity.defn
    async def measure_change(self, request: MeasureInput) -> MeasuredChange:
        world, commit = self.world, request.commit
        if "measure_change" in world.hold:
            await world.hold["measure_change"].wait()
        if cause := world.failing.get("measure_change"):
            raise ApplicationError(cause, type="PreparationFailed", non_retryable=True)
        world.measured_commits.append(request)
        builds = world.builds and world.failing_builds == 0
        world.failing_builds = max(world.failing_builds - 1, 0)
        acts = [ran.action for ran in world.ran if commit.startswith(self._prefix(ran))]
        paths = {path: None for act in acts if (path := getattr(act, "path", ""))}
        files = [ChangedFile(path=path, status="modified", insertions=2) for path in paths]
        if request.repository.key in world.repositories:
            store = await Stores(world.folder / "stores").of(request.repository)
            files = await store.changed(request.base, commit)
        broken = sorted(world.broken.intersection(file.path for file in files))
        measurement = Measurement(
            commit=commit,
            base=request.base,
            build=Step(
                command="make", exit_code=0 if builds else 2, tail="" if builds else "no rule"
            ),
            unit=SuiteResult(
                command="test", exit_code=bool(broken), passed=3, failed=len(broken), broken=broken
            ),
            e2e=SuiteResult(not_measured="no command"),
            coverage=CoverageResult(percent=90),
            lint=LintResult(exit_code=0),
            static=LintResult(exit_code=0),
        )
        return MeasuredChange(
            change=Change(commit=commit, base=request.base, files=files, insertions=2 * len(files)),
            diff="".join(f"+++ b/{path}\n+text\n" for path in paths),
            checks=[Check(name="policy", outcome="passed", score=1.0)],
            measurement=measurement,
            report=workspace_report(measurement, commit, request.repository.key),
        )

    @staticmethod
    def _prefix(ran: RunActionInput) -> str:
        """Return what the ids of all commits of an agent begin with."""
        return ran.trailers.agent.encode().hex().ljust(38, "0")[:38]


class InstantBranches(InWorld, BranchStub):
    """Branches in real stores of the test's repositories."""

    @property
    def branches(self) -> Branches:
        folder = self.world.folder
        folder.joinpath("stores").mkdir(exist_ok=True)
        return Branches(self.world.repositories, Stores(folder / "stores"))

    @activity.defn
    async def pin_repository(self, query: PinQuery) -> PinnedRepository:
        return await self.branches.pin_repository(query)

    @activity.defn
    async def place_branch(self, point: BranchPoint) -> None:
        if held := self.world.hold.get("place_branch"):
            await held.wait()
        await self.branches.place_branch(point)

    @activity.defn
    async def branch_head(self, query: BranchQuery) -> str:
        return await self.branches.branch_head(query)

    @activity.defn
    async def merge_change(self, request: MergeRequest) -> MergeAnswer:
        return await self.branches.merge_change(request)

    @activity.defn
    async def base_now(self, query: BaseQuery) -> BaseNow:
        if held := self.world.hold.get("base_now"):
            await held.wait()
        return await self.branches.base_now(query)

    @activity.defn
    async def merged_base(self, request: MergeRequest) -> MergedBase:
        return await self.branches.merged_base(request)

    @activity.defn
    async def branch_size(self, span: BranchSpan) -> BranchSize:
        return await self.branches.branch_size(span)

    @activity.defn
    async def push_branch(self, point: BranchPoint) -> None:
        if held := self.world.hold.get("push_branch"):
            await held.wait()
        await self.branches.push_branch(point)


class InstantAcceptance(InWorld, AcceptanceStub):
    """Tests that end as the test chose."""

    @activity.defn
    async def test_criteria(self, query: AcceptanceQuery) -> AcceptanceRuns:
        if cause := self.world.failing.get("test_criteria"):
            raise ApplicationError(cause, type="PreparationFailed", non_retryable=True)
        return AcceptanceRuns(
            base=query.base, commit=query.commit, tests=self.world.acceptance_tests
        )


class InstantChecks(InWorld, CheckStub):
    @activity.defn
    async def check_council(self, request: CouncilCheckInput) -> CouncilCheckReport:
        if cause := self.world.failing.get("check_council"):
            raise ApplicationError(cause, type="Unexpected", non_retryable=True)
        reports = {
            agent_id: await self.check_proposal(CheckInput(agent_id=agent_id, proposal=proposal))
            for agent_id, proposal in request.proposals.items()
        }
        checks = {agent_id: report.checks for agent_id, report in reports.items()}
        return CouncilCheckReport(checks=checks, weights={"policy": 0.4})

    @activity.defn
    async def check_proposal(self, request: CheckInput) -> CheckReport:
        if cause := self.world.failing.get(f"check/{request.agent_id}"):
            raise ApplicationError(cause, type="Unexpected", non_retryable=True)
        blocking = request.agent_id in self.world.blocking
        score = self.world.scores.get(request.agent_id, 1.0)
        check = Check(
            name="policy",
            outcome="failed" if blocking else "passed",
            score=score,
            blocking=blocking,
            findings=["secret: a key"] if blocking else [],
        )
        checks = [check]
        if request.agent_id in self.world.unchecked:
            checks.append(Check(name="dry_run", outcome="not_checked"))
        return CheckReport(checks=checks, weights={"policy": 0.4})


class InstantGraph(InWorld, GraphStub):
    @activity.defn
    async def record(self, batch: RecordBatch) -> None:
        await self.world.graph_open.wait()
        for entry in batch.entries:
            if cause := self.world.failing.get(f"record/{entry.kind}"):
                raise ApplicationError(cause, type="InvalidEntry", non_retryable=True)
        known = {entry.id for entry in self.world.recorded}
        self.world.recorded += [entry for entry in batch.entries if entry.id not in known]

    @activity.defn
    async def record_deliberation(self, record: DeliberationRecord) -> None:
        self.world.deliberations.append(record)

    @activity.defn
    async def load_council(self, query: CouncilQuery) -> Council:
        if query.role not in ROLES:
            raise ApplicationError(
                f"council {query.role} is unknown", type="UnknownCouncil", non_retryable=True
            )
        agents = [
            Agent(agent_id=f"agent-{query.role.lower()}-{n}", role=query.role)
            for n in range(1, (query.size or 3) + 1)
        ]
        judge = Agent(agent_id="agent-architect-9", role="ARCHITECT") if self.world.judge else None
        return Council(
            council_id=f"council-{query.role.lower()}",
            role=query.role,
            agents=agents,
            judge=judge,
            roles=ROLES,
        )

    @activity.defn
    async def gather(self, request: GatherInput) -> Gathered:
        council = await self.load_council(request.council)
        return Gathered(council=council, pack=await self.keep_pack(request.pack))

    @activity.defn
    async def load_plan(self, query: PlanQuery) -> StoredPlan:
        return self.world.stored

    @activity.defn
    async def story_runs(self, story_id: str) -> StoryRuns:
        return self.world.runs

    @activity.defn
    async def build_pack(self, query: PackQuery) -> ContextPack:
        self.world.packs.append(query)
        return ContextPack(system=f"You are {query.role}.", context="the story", version="v")

    @activity.defn
    async def keep_pack(self, query: PackQuery) -> ContextPack:
        self.world.packs.append(query)
        return ContextPack(version="v", kept_at=f"pack-{len(self.world.packs)}")

    @activity.defn
    async def update_context(self, write: ContextWrite) -> ContextAnswer:
        await self.world.graph_open.wait()
        if cause := self.world.failing.get("update_context"):
            raise application_error(ErrorType.UNKNOWN_STORY, cause)
        if write.update.if_absent and self.world.known:
            return ContextAnswer(version=2, hash="")
        after = self.world.updates[-1].update_id if self.world.updates else ""
        self.world.updates.append(write)
        version = 2 + len(self.world.updates)
        if write.update.changed:
            return ContextAnswer(
                version=version, hash="h" * 16, changed=write.update.changed, after=after
            )
        decision = DecisionAdded(decision_id="D-1", title="No SMS", decided_by=write.update.actor)
        milestone = MilestoneReached(milestone_id="M-1", event_type="DEMO", description="Shown")
        return ContextAnswer(
            version=version,
            hash="h" * 16,
            changed=["DECISION", "MILESTONE"],
            after=after,
            decisions=[decision],
            milestones=[milestone],
        )


class InstantPlanning(InWorld, PlanningStub):
    @activity.defn
    async def load_process(self, level: str) -> Process:
        await self.world.config_open.wait()
        levels = rigor.parse_rigor(yaml.safe_load((CONFIG / "rigor.yaml").read_text()))
        return Process(
            machine=parse_machine(self.world.machine),
            rigor=levels[level],
            version="test",
            text_bytes=STORY_TEXT_BYTES,
        )

    @activity.defn
    async def score_story(self, text: StoryText) -> Readiness:
        return Readiness(total=self.world.readiness)


class InstantAccess(InWorld, AccessStub):
    @activity.defn
    async def check_actor(self, check: ActorCheck) -> CheckedActor:
        from activities.access import Access

        return await Access([TOKEN_KEY], self.world.require_tokens).check_actor(check)


class InstantMirror(InWorld, MirrorStub, AnnounceStub):
    @activity.defn
    async def announce_outcome(self, batch: OutcomeBatch) -> Announced:
        answer = await self.announce(batch)
        self.world.deliberations.append(batch.deliberation)
        return answer

    @activity.defn
    async def announce(self, batch: RecordBatch) -> Announced:
        await InstantGraph().record(batch)
        if not self.world.bus_open.is_set():
            return Announced(published=0)
        for published, entry in enumerate(batch.entries):
            if entry.subject:
                try:
                    await self.publish(PublishBatch(entries=[entry]))
                except ApplicationError:
                    return Announced(published=published)
        return Announced(published=len(batch.entries))

    @activity.defn
    async def publish(self, batch: PublishBatch) -> None:
        await self.world.bus_open.wait()
        for entry in batch.entries:
            if cause := self.world.failing.get(f"publish/{entry.kind}"):
                raise ApplicationError(cause, type="EventTooLarge", non_retryable=True)
        recorded = {entry.id for entry in self.world.recorded}
        assert all(entry.id in recorded for entry in batch.entries), "announced before recorded"
        known = {entry.id for entry in self.world.published}
        self.world.published += [entry for entry in batch.entries if entry.id not in known]


class InstantEvaluations(InWorld, EvaluationStub):
    """The tests of a task pass on a commit that changes what `world.repairs` names."""

    @activity.defn
    async def evaluate_commit(self, request: EvaluateInput) -> EvaluatedCommit:
        world = self.world
        if cause := world.failing.get("evaluate_commit"):
            raise ApplicationError(cause, type="InvalidInput", non_retryable=True)
        paths = {getattr(ran.action, "path", "") for ran in world.ran}
        resolved = world.repairs in paths
        wanted = len(request.fail_to_pass)
        return EvaluatedCommit(
            resolved=resolved,
            run=Step(command="test", exit_code=int(not resolved)),
            fail_to_pass=SuiteCount(tests=wanted, passed=wanted if resolved else 0),
            pass_to_pass=SuiteCount(),
            change=Change(commit=request.commit, base=request.base),
        )


def activities() -> list[Any]:
    agents, checks, graph = InstantAgents(), InstantChecks(), InstantGraph()
    planning, mirror, workspace = InstantPlanning(), InstantMirror(), InstantWorkspace()
    branches = InstantBranches()
    return [
        InstantAccess().check_actor,
        agents.propose,
        agents.criticise,
        agents.revise,
        agents.judge,
        agents.derive_plan,
        agents.write_story,
        agents.next_action,
        workspace.begin_work,
        workspace.run_action,
        branches.pin_repository,
        branches.place_branch,
        branches.branch_head,
        branches.merge_change,
        branches.base_now,
        branches.merged_base,
        branches.branch_size,
        branches.push_branch,
        InstantAcceptance().test_criteria,
        workspace.measure_change,
        InstantEvaluations().evaluate_commit,
        checks.check_proposal,
        checks.check_council,
        graph.record,
        graph.record_deliberation,
        graph.load_council,
        graph.gather,
        graph.load_plan,
        graph.keep_pack,
        graph.story_runs,
        graph.build_pack,
        graph.update_context,
        planning.load_process,
        planning.score_story,
        mirror.announce,
        mirror.announce_outcome,
        mirror.publish,
    ]


@asynccontextmanager
async def instant_workers(
    client: Client, cached: int = 200, queues: Collection[str] = QUEUES
) -> AsyncIterator[None]:
    """Run the workers of the queues with instant activities."""
    workers = [
        Worker(
            client,
            task_queue=queue,
            workflows=WORKFLOWS if queue == STORY_QUEUE else [],
            activities=[*activities(), Children(client).follow],
            workflow_runner=sandboxed_runner(),
            interceptors=[Heartbeats()],
            max_cached_workflows=cached,
            graceful_shutdown_timeout=timedelta(seconds=1),
        )
        for queue in queues
    ]
    async with AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the settings of a stack that was started in this checkout out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEET_HOME", str(tmp_path_factory.mktemp("no-stack")))
        yield


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    WORLDS[world.key] = world
    yield world
    # Workflows that the test left waiting continue and end.
    world.bus_open.set()
    world.graph_open.set()
    world.config_open.set()
    for held in world.hold.values():
        held.set()


@pytest.fixture(scope="session")
async def fleet(temporal: RunningServer) -> AsyncIterator[Client]:
    """Return a client of a real server on which the fleet's workflows run."""
    client = await connect(temporal.address)
    await register(client)
    async with instant_workers(client):
        yield client


@pytest.fixture
async def skipping_fleet(fleet_without_workers: Client) -> AsyncIterator[Client]:
    """Return a client of a time-skipping server, for workflows with long waits."""
    async with instant_workers(fleet_without_workers):
        yield fleet_without_workers


@pytest.fixture
async def fleet_without_workers() -> AsyncIterator[Client]:
    """Return a client of a time-skipping server; a test runs the workers it needs."""
    environment = await WorkflowEnvironment.start_time_skipping(
        test_server_existing_path=str(script("temporal-test-server")),
        data_converter=pydantic_data_converter,
    )
    async with environment:
        await environment.client.operator_service.add_search_attributes(
            AddSearchAttributesRequest(
                namespace="default",
                search_attributes={
                    key.name: cast("IndexedValueType.ValueType", key.indexed_value_type.value)
                    for key in ALL
                },
            )
        )
        yield environment.client


GOOD_REPORT: dict[str, Any] = {
    "job_id": "job-1",
    "commit": "c0ffee1",
    "actor": "ana",
    "build": {"ok": True},
    "unit": {"ok": True, "passed": 10, "failed": 0, "coverage": 95.0},
    "static": {"ok": True, "sonar": {"quality_gate": "OK", "new_critical": 0, "new_major": 0}},
    "e2e": {"ok": True, "passed": 3, "failed": 0},
}


class RunningStory:
    """A story under test, with the actions of a person."""

    def __init__(self, handle: WorkflowHandle[StoryWorkflow, StoryResult], story_id: str) -> None:
        self.handle = handle
        self.story_id = story_id

    async def update(self, name: str, **request: Any) -> StoryView:
        view: StoryView = await self.handle.execute_update(name, request, result_type=StoryView)
        return view

    async def approve(self, gate: str, role: str = "PO", **more: Any) -> StoryView:
        return await self.update("approve", gate=gate, actor="ana", role=role, **more)

    async def reject(self, event: str, role: str = "PO", reason: str = "no") -> StoryView:
        return await self.update("reject", event=event, actor="ana", role=role, reason=reason)

    async def report(self, **changes: Any) -> StoryView:
        job = {"job_id": f"job-{uuid.uuid4().hex[:8]}"}
        return await self.update("report", **(GOOD_REPORT | job | changes))

    async def state(self) -> StoryView:
        view: StoryView = await self.handle.query("state", result_type=StoryView)
        return view

    async def until(self, *, state: str = "", gate: str | None = None, **fields: Any) -> StoryView:
        """Poll the query `state` until it has these values."""
        wanted = fields | ({"state": state} if state else {})
        if gate is not None:
            wanted["pending_gate"] = gate
        return await until(
            self.state,
            lambda view: all(getattr(view, name) == value for name, value in wanted.items()),
        )

    @asynccontextmanager
    async def skipping_time(self) -> AsyncIterator[None]:
        """Let a time-skipping server skip; it does so only while a result is waited for."""
        result = asyncio.create_task(self.handle.result())
        try:
            yield
        finally:
            result.cancel()

    async def to(self, state: str) -> StoryView:
        """Bring the story to `state` by approvals."""
        steps = {
            "DRAFT": None,
            "DESIGN": ("approve_scope", "PO"),
            "BUILD": ("approve_design", "PO"),
            "TEST": None,
            "DOCS": ("qa_passed", "QA"),
            "DONE": ("docs_ready", "PO"),
        }
        for name, step in steps.items():
            if step:
                await self.until(gate=step[0])
                await self.approve(*step)
            elif name == "TEST":
                await self.report()
                await self.until(state="TEST")
            if name == state:
                break
        return await self.state()

    async def finish(self) -> RunningStory:
        """Bring the story from its current state to DONE, gate by gate."""
        while (view := await self.state()).state != "DONE":
            if view.pending_gate:
                await self.approve(view.pending_gate, role=view.gate_role)
            elif view.state == "BUILD" and view.report is None:
                await self.report()
            await asyncio.sleep(0.05)
        await self.handle.result()
        return self


class StartStory:
    def __init__(self, client: Client, world: World, task_queue: str = "story") -> None:
        self.client = client
        self.world = world
        self.task_queue = task_queue

    async def __call__(self, **fields: Any) -> RunningStory:
        story_id = fields.pop("story_id", f"US-{self.world.key}")
        request = {"story_id": story_id, "title": "Shorten links"} | fields
        handle = await self.client.start_workflow(
            "StoryWorkflow",
            request,
            id=story_workflow_id(story_id),
            task_queue=self.task_queue,
            result_type=StoryResult,
        )
        return RunningStory(handle, story_id)


@pytest.fixture
def start_story(fleet: Client, world: World) -> StartStory:
    return StartStory(fleet, world)


@pytest.fixture
def start_skipping_story(skipping_fleet: Client, world: World) -> StartStory:
    return StartStory(skipping_fleet, world)
