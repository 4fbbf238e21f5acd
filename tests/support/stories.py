"""Stories as their outboxes record them, and the resulting graph."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import neo4j
import pytest
from temporalio.exceptions import ApplicationError

from workflows.models.acceptance import AcceptanceTest, Criterion
from workflows.models.agents import Critique, CritiquePoint, PlannedTask, Proposal
from workflows.models.deliberation import (
    Check,
    DeliberationRecord,
    RankedProposal,
    RecordedDecision,
)
from workflows.models.entries import Entry, RecordBatch
from workflows.models.events import (
    ContextDecisionAdded,
    ContextMilestoneReached,
    ContextUpdated,
    CriteriaTested,
    DeliberationCompleted,
    DeliberationFailed,
    DeliberationStarted,
    EntrySkipped,
    EventBody,
    GateApproved,
    GateClosed,
    GateOpened,
    PlanApproved,
    PlanDerived,
    PlanFinished,
    RequestRefused,
    RoundCompleted,
    StoryCancelled,
    StoryCreated,
    StoryDelivered,
    StorySpec,
    StoryTransitioned,
    TaskCompleted,
    TaskCreated,
    TaskDispatched,
    TaskFailed,
    TaskFinished,
)
from workflows.models.measurement import (
    CoverageResult,
    LintResult,
    Measurement,
    Step,
    SuiteResult,
)
from workflows.models.report import ReportScore
from workflows.models.workspace import Change, ChangedFile

STARTED_MS = 1_767_225_600_000


def new_story() -> str:
    return f"US-{uuid.uuid4().hex[:12]}"


def at(second: int) -> str:
    return f"2026-01-01T00:{second // 60:02d}:{second % 60:02d}.000Z"


def batch(story: str, *bodies: EventBody, first: int = 0) -> RecordBatch:
    """Return the batch that the story's outbox would pass to `record`, numbered from `first`."""
    return RecordBatch(
        owner=f"story-{story}",
        owner_started_ms=STARTED_MS,
        first=first,
        entries=[
            Entry(
                id=f"story-{story}/run/{number}",
                kind=type(body).__name__,
                subject=body.SUBJECT,
                source=f"story-{story}",
                story_id=story,
                time=body.timestamp,
                body=body.model_dump(mode="json", exclude_none=True),
            )
            for number, body in enumerate(bodies, first)
        ],
    )


def moved(story: str, source: str, target: str, second: int) -> StoryTransitioned:
    return StoryTransitioned(
        story_id=story,
        from_phase=source,
        to_phase=target,
        event="approve_scope",
        actor="ana",
        timestamp=at(second),
    )


def spec(story: str, title: str = "Log in", second: int = 0) -> StorySpec:
    return StorySpec(
        story_id=story,
        title=title,
        brief="With a password",
        acceptance_criteria=["A wrong password is refused"],
        rigor="L1",
        created_by="ana",
        revision="abc",
        timestamp=at(second),
    )


def plan(story: str, second: int = 10) -> PlanDerived:
    tasks = [
        PlannedTask(task_id=f"{story}-t1", role="DATA", title="The schema", description="Tables"),
        PlannedTask(
            task_id=f"{story}-t2",
            role="DEV",
            title="The form",
            description="HTML",
            depends_on=[f"{story}-t1"],
            priority=2,
        ),
    ]
    return PlanDerived(
        story_id=story, plan_id="plan-1", version=1, tasks=tasks, timestamp=at(second)
    )


def one_of_each(story: str) -> list[EventBody]:
    """Return the event bodies of a whole story, with every kind of entry."""
    decision = RecordedDecision(
        id=f"{story}-e1", title="Cookies", rationale="Simple", affects=["the form"]
    )
    task: Any = {"story_id": story, "task_id": f"{story}-t1", "role": "DATA"}
    return [
        spec(story),
        StoryCreated(story_id=story, title="Log in", rigor="L1", created_by="ana", timestamp=at(0)),
        GateOpened(story_id=story, gate="approve_scope", role="PO", timestamp=at(1)),
        GateApproved(
            story_id=story,
            id=f"{story}/gate/1",
            gate="approve_scope",
            actor="ana",
            role="PO",
            revision="abc",
            comment="good",
            timestamp=at(2),
        ),
        GateClosed(story_id=story, gate="approve_scope", role="PO", actor="ana", timestamp=at(2)),
        moved(story, "DRAFT", "DESIGN", 2),
        RequestRefused(story_id=story, request="approve", reason="not open", timestamp=at(3)),
        EntrySkipped(
            story_id=story,
            actor="ana",
            reason="never fits",
            error="no",
            entry='{"id": "e"}',
            timestamp=at(3),
        ),
        DeliberationStarted(**task, timestamp=at(4)),
        RoundCompleted(**task, round=1, timestamp=at(5)),
        DeliberationCompleted(
            **task,
            winner_id="agent-data-1",
            score=0.9,
            decisions=[decision],
            duration_ms=5,
            timestamp=at(6),
        ),
        plan(story),
        TaskCreated(**task, plan_id="plan-1", timestamp=at(10)),
        PlanApproved(story_id=story, plan_id="plan-1", approved_by="ana", timestamp=at(11)),
        moved(story, "DESIGN", "BUILD", 11),
        TaskDispatched(**task, agent_id="council-data", timestamp=at(12)),
        DeliberationFailed(**task, error="no quorum", duration_ms=1, timestamp=at(13)),
        TaskFinished(
            story_id=story,
            plan_id="plan-1",
            task_id=f"{story}-t1",
            status="done",
            assignee="agent-data-2",
            timestamp=at(14),
        ),
        ContextDecisionAdded(
            story_id=story,
            decision_id="D-7",
            title="No SMS",
            rationale="Cost",
            decided_by="bo",
            timestamp=at(15),
        ),
        ContextMilestoneReached(
            story_id=story,
            milestone_id="M-1",
            event_type="DEMO",
            description="Shown",
            timestamp=at(16),
        ),
        ContextUpdated(story_id=story, version=2, changed=["D-7"], timestamp=at(17)),
        TaskFailed(
            story_id=story,
            plan_id="plan-1",
            task_id=f"{story}-t2",
            role="DATA",
            status="cancelled",
            timestamp=at(17),
        ),
        TaskCompleted(
            story_id=story,
            plan_id="plan-1",
            task_id=f"{story}-t2",
            role="DATA",
            status="done",
            assignee="agent-data-1",
            timestamp=at(18),
        ),
        PlanFinished(story_id=story, plan_id="plan-1", status="COMPLETED", timestamp=at(18)),
        CriteriaTested(
            story_id=story,
            repository="sample",
            commit="9" * 40,
            base="e" * 40,
            criteria=[
                Criterion(
                    number=1,
                    text="A wrong password is refused",
                    proved=True,
                    tests=[
                        AcceptanceTest(
                            name="tests.test_login::test_ac1_wrong",
                            criteria=[1],
                            before="failed",
                            after="passed",
                        )
                    ],
                )
            ],
            timestamp=at(18),
        ),
        StoryDelivered(
            story_id=story,
            repository="sample",
            branch=f"story/{story}",
            commit="9" * 40,
            base="e" * 40,
            files_changed=2,
            insertions=5,
            deletions=1,
            timestamp=at(18),
        ),
        StoryCancelled(story_id=story, actor="ana", timestamp=at(19)),
    ]


def deliberation(story: str, plan_id: str = "plan-1", **changes: Any) -> DeliberationRecord:
    proposals = [
        RankedProposal(
            proposal_id=f"{story}-p{rank}",
            agent_id=f"agent-data-{rank}",
            role="DATA",
            proposal=Proposal(approach=f"approach {rank}", content="```sql\nSELECT 1\n```"),
            drafts=["first draft"],
            critiques=[
                Critique(
                    verdict="revise",
                    points=[CritiquePoint(severity="high", text="No index")],
                    suggestion="Add one",
                ),
                Critique(verdict="accept"),
            ],
            critics=["agent-data-3", "agent-data-3"],
            checks=[Check(name="lint", outcome="passed", score=1.0, findings=["fine"])],
            score=1 - rank / 10,
            rank=rank,
            prompt_hash="f00d",
            model="smol",
        )
        for rank in (1, 2)
    ]
    record = DeliberationRecord(
        story_id=story,
        plan_id=plan_id,
        task_id=f"{story}-t1",
        deliberation_id=f"deliberation-{story}-t1",
        run_id="run",
        role="DATA",
        phase="BUILD",
        ranked=proposals,
        winner_id="agent-data-1",
        judged="clearer",
        decisions=[
            RecordedDecision(
                id=f"{story}-d1",
                title="One table",
                rationale="Enough",
                affected_subtask=f"{story}-t1",
                affects=["The Form "],
            ),
            RecordedDecision(id=f"{story}-d2", title="An index", affects=["one table"]),
        ],
        timestamp=at(6),
    )
    return record.model_copy(update=changes)


def with_change(record: DeliberationRecord) -> DeliberationRecord:
    """Return a record whose first proposal is a change in a repository, with its report."""
    commit, base = "c" * 40, "b" * 40
    measurement = Measurement(
        commit=commit,
        base=base,
        build=Step(command="make", exit_code=0, seconds=1.5),
        unit=SuiteResult(command="pytest", exit_code=1, passed=2, failed=1, broken=["t.test_a"]),
        e2e=SuiteResult(not_measured="no command"),
        coverage=CoverageResult(percent=80),
        lint=LintResult(),
        static=LintResult(),
    )
    change = Change(
        commit=commit,
        base=base,
        files=[ChangedFile(path="README.md", status="modified", insertions=2, deletions=1)],
        insertions=2,
        deletions=1,
    )
    scored = ReportScore(score=0, rigor="L1", gating_decision="block", reasons=["unit: failed"])
    more = {"change": change, "measurement": measurement, "scored": scored}
    first, *others = record.ranked
    return record.model_copy(update={"ranked": [first.model_copy(update=more), *others]})


async def rows(driver: neo4j.AsyncDriver, cypher: Any, **parameters: Any) -> list[Any]:
    async with driver.session() as session:
        return await (await session.run(cypher, parameters)).values()


@contextmanager
def refused(kind: str, *, retryable: bool) -> Iterator[pytest.ExceptionInfo[ApplicationError]]:
    with pytest.raises(ApplicationError) as caught:
        yield caught
    assert (caught.value.type, caught.value.non_retryable) == (kind, not retryable)
