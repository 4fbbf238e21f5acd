"""What a deliberation returns, records and announces at its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from workflows.models.agents import Proposal
    from workflows.models.deliberation import (
        DeliberationRecord,
        DeliberationResult,
        RankedProposal,
        RecordedDecision,
    )
    from workflows.models.events import (
        ContextDecisionAdded,
        DeliberationCompleted,
        DeliberationFailed,
        EventBody,
    )
    from workflows.rules.ranking import Candidate
    from workflows.timestamps import timestamp

if TYPE_CHECKING:
    from workflows.deliberation import DeliberationWorkflow


class CouncilResults:
    """The results of a deliberation, from its state."""

    def __init__(self, council: DeliberationWorkflow) -> None:
        self.council = council

    def completed(self, order: Sequence[Candidate], judged: str) -> DeliberationResult:
        """Return the result of a deliberation with a winner.

        Args:
            order: the candidates, the winner first.
            judged: why the winner was chosen among near ties; empty if there was no tie.
        """
        council = self.council
        ranked = self._ranked(order)
        winner = ranked[0]
        return DeliberationResult(
            **self._about(),
            status="completed",
            winner_id=winner.agent_id,
            score=winner.score,
            winner=winner.proposal,
            judged=judged,
            decisions=self._decisions(winner.proposal),
            ranked=ranked,
            failed_agents=council.failed,
            usage=council.usage,
            duration_ms=self._duration_ms(),
            change=winner.change,
            measurement=winner.measurement,
        )

    def failed(self, error: str) -> DeliberationResult:
        """Return the result of a deliberation without a winner, with the calls it paid for."""
        council = self.council
        return DeliberationResult(
            **self._about(),
            status="failed",
            failed_agents=council.failed,
            error=error[:4000],
            usage=council.all_usage(),
            duration_ms=self._duration_ms(),
        )

    def record_of(self, outcome: DeliberationResult) -> DeliberationRecord:
        """Return what the graph stores of a completed deliberation."""
        task = self.council.input
        return DeliberationRecord(
            story_id=outcome.story_id,
            plan_id=task.plan_id,
            task_id=outcome.task_id,
            deliberation_id=outcome.deliberation_id,
            run_id=workflow.info().run_id,
            role=outcome.role,
            phase=task.phase,
            ranked=outcome.ranked,
            winner_id=outcome.winner_id,
            judged=outcome.judged,
            failed_agents=outcome.failed_agents,
            decisions=outcome.decisions,
            timestamp=timestamp(),
        )

    def events_of(self, outcome: DeliberationResult) -> Iterator[EventBody]:
        """Yield the events of a completed deliberation: its end, then each decision."""
        yield DeliberationCompleted(
            task_id=outcome.task_id,
            role=outcome.role,
            winner_id=outcome.winner_id,
            score=outcome.score,
            decisions=outcome.decisions,
            duration_ms=outcome.duration_ms,
        )
        for decision in outcome.decisions:
            yield ContextDecisionAdded(
                decision_id=decision.id,
                title=decision.title,
                rationale=decision.rationale,
                decided_by=outcome.winner_id,
            )

    def failed_event(self, cause: str, error_type: str) -> DeliberationFailed:
        """Return the event of a deliberation that fails."""
        task = self.council.input
        return DeliberationFailed(
            task_id=task.task_id,
            role=task.role,
            error=cause,
            error_type=error_type,
            failed_agents=self.council.failed,
            duration_ms=self._duration_ms(),
        )

    def findings(self) -> str:
        """Return why proposals are barred, by agent."""
        return "; ".join(
            f"{seat.agent.agent_id}: {', '.join(check.findings)}"
            for seat in self.council.seats
            for check in seat.checks
            if check.blocking
        )[:1500]

    def _about(self) -> dict[str, Any]:
        task = self.council.input
        return {
            "task_id": task.task_id,
            "deliberation_id": workflow.info().workflow_id,
            "story_id": task.story_id or "",
            "role": task.role,
        }

    def _ranked(self, order: Sequence[Candidate]) -> list[RankedProposal]:
        council = self.council
        seats = {seat.agent.agent_id: seat for seat in council.seats}
        prefix = f"{workflow.info().workflow_id}-{council.outbox.run[-8:]}"
        found = [
            RankedProposal(
                proposal_id=f"{prefix}-{candidate.agent_id}",
                agent_id=candidate.agent_id,
                role=council.input.role,
                proposal=seats[candidate.agent_id].proposal,
                drafts=seats[candidate.agent_id].drafts,
                critiques=seats[candidate.agent_id].critiques,
                critics=seats[candidate.agent_id].critics,
                checks=seats[candidate.agent_id].checks,
                score=candidate.score,
                rank=place,
                barred=candidate.barred,
                prompt_hash=seats[candidate.agent_id].usage.prompt_hash,
                model=seats[candidate.agent_id].usage.model,
                created_at_ms=seats[candidate.agent_id].created_at_ms,
            )
            for place, candidate in enumerate(order, start=1)
        ]
        return council.changes.with_changes(found) if council.changes else found

    def _decisions(self, winner: Proposal) -> list[RecordedDecision]:
        task, run = self.council.input, self.council.outbox.run[-8:]
        return [
            RecordedDecision(
                id=f"{task.task_id}-{run}-d{number}",
                type=task.phase,
                title=decision.title,
                rationale=decision.rationale,
                affected_subtask=task.task_id if task.plan_id else "",
                affects=decision.affects,
            )
            for number, decision in enumerate(winner.decisions, start=1)
        ]

    def _duration_ms(self) -> int:
        return int((workflow.now() - workflow.info().start_time).total_seconds() * 1000)
