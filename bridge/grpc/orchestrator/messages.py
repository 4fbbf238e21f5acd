"""A deliberation as gRPC clients read it: its result, and its updates while it runs.

All functions are pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent

from bridge.grpc.wire import orchestrator_pb2 as pb
from workflows.models.deliberation import Check, DeliberationResult, RankedProposal

VERSION = version("swe-ai-fleet")

NOTHING_RAN = -1
"""The exit code of a dry run that did not take place."""

OUTCOMES = {"not_checked": "not checked", "not_applicable": "not applicable"}

STATUS = {
    "propose": "generating",
    "criticise": "reviewing",
    "revise": "reviewing",
    "check_council": "scoring",
    "check_proposal": "scoring",
    "judge": "scoring",
    "announce_outcome": "scoring",
    "record_deliberation": "scoring",
}
"""The activity of a wave -> the status in its updates."""

TOGETHER = "check_council"
"""The activity that works for all agents; if it fails, each proposal is checked by its own."""

WAVES = {
    TOGETHER: "check",
    "check_proposal": "check",
    "announce_outcome": "record",
    "record_deliberation": "record",
}
"""Activities whose names differ from those of their waves."""

LAST_WAVES = 3
"""The number of waves without rounds: propose, check and record.

Each round has two more, and near ties are also judged.
"""

FAILED = (
    EventType.EVENT_TYPE_ACTIVITY_TASK_FAILED,
    EventType.EVENT_TYPE_ACTIVITY_TASK_TIMED_OUT,
)


# --- results --------------------------------------------------------------------------------------


def results(found: DeliberationResult) -> list[pb.DeliberationResult]:
    """Return every proposal, the winner first."""
    ranked = sorted(found.ranked, key=lambda each: each.rank)
    return [_result(each) for each in ranked]


def result_metadata(
    found: DeliberationResult, execution_id: str, timestamp_ms: int, agents: str = ""
) -> pb.OrchestratorMetadata:
    """Build the metadata with its tags.

    The tags are role, task_id, story_id, judged (the reason in a near tie), failed_agents, models,
    and `agents`, such as `3 of 5`, if more agents were requested than the council has.
    """
    failed = "; ".join(
        f"{each.agent_id} ({each.act}): {each.cause}" for each in found.failed_agents
    )
    tags = {
        "role": found.role,
        "task_id": found.task_id,
        "story_id": found.story_id,
        "judged": found.judged,
        "failed_agents": failed,
        "agents": agents,
        "models": ", ".join(sorted({each.model for each in found.ranked if each.model})),
    }
    return pb.OrchestratorMetadata(
        orchestrator_version=VERSION,
        timestamp_ms=timestamp_ms,
        execution_id=execution_id,
        tags={name: value for name, value in tags.items() if value},
    )


def check_suite(checks: Sequence[Check]) -> pb.CheckSuite:
    """Build the checks of one proposal.

    Only a check that was made and passed has `passed`. One that was not made reports "not checked",
    and one that had nothing to check "not applicable" (in `message`; lint has none, and uses
    `errors`). all_passed: something was checked, all checks that applied passed, and none was left
    out.
    """
    by_name = {check.name: check for check in checks}
    suite = pb.CheckSuite(
        additional_checks=[_check(each) for each in checks], all_passed=_all_passed(checks)
    )
    if policy := by_name.get("policy"):
        suite.policy.CopyFrom(
            pb.PolicyResult(
                passed=_passed(policy), violations=policy.findings, message=_check_message(policy)
            )
        )
    if lint := by_name.get("lint"):
        made = lint.outcome not in OUTCOMES
        suite.lint.CopyFrom(
            pb.LintResult(
                passed=_passed(lint),
                error_count=lint.errors,
                warning_count=lint.warnings,
                errors=lint.findings if made else [_check_message(lint)],
            )
        )
    if dry_run := by_name.get("dry_run"):
        suite.dryrun.CopyFrom(
            pb.DryRunResult(
                passed=_passed(dry_run),
                output=dry_run.output,
                exit_code=NOTHING_RAN if dry_run.exit_code is None else dry_run.exit_code,
                message="\n".join(dry_run.findings) or _check_message(dry_run),
            )
        )
    return suite


def _result(ranked: RankedProposal) -> pb.DeliberationResult:
    return pb.DeliberationResult(
        proposal=pb.Proposal(
            author_id=ranked.agent_id,
            author_role=ranked.role,
            content=ranked.proposal.content,
            created_at_ms=ranked.created_at_ms,
            revisions=ranked.drafts,
        ),
        checks=check_suite(ranked.checks),
        score=ranked.score,
        rank=ranked.rank,
    )


def _check(check: Check) -> pb.CheckResult:
    details = {"outcome": check.outcome, "blocking": str(check.blocking).lower()}
    if check.findings:
        details["findings"] = "\n".join(check.findings)
    return pb.CheckResult(
        check_type=check.name,
        passed=_passed(check),
        score=check.score or 0.0,
        message=_check_message(check),
        details=details,
    )


def _passed(check: Check) -> bool:
    return check.outcome == "passed"


def _check_message(check: Check) -> str:
    """Describe the outcome; if a check was not made, with the reason."""
    outcome = OUTCOMES.get(check.outcome, check.outcome)
    reasons = [finding.removeprefix(f"{outcome}: ") for finding in check.findings]
    return f"{outcome}: {'; '.join(reasons)}" if check.outcome in OUTCOMES and reasons else outcome


def _all_passed(checks: Sequence[Check]) -> bool:
    outcomes = [check.outcome for check in checks if check.outcome != "not_applicable"]
    return bool(outcomes) and all(outcome == "passed" for outcome in outcomes)


# --- updates --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PendingCall:
    """Work for agents in a wave.

    `agents` is empty if it is for none, as when the deliberation is recorded.
    """

    act: str
    wave: str
    agents: Sequence[str]


class Updates:
    """A deliberation's history, event by event, as updates: one for each wave and each answer.

    Updates depend only on the history, so none is missed however fast the deliberation goes, and a
    client that connects later gets the same ones.
    """

    def __init__(self, rounds: int) -> None:
        self._waves = LAST_WAVES + 2 * rounds
        self._begun = 0
        self._wave = ""
        self._status = "generating"
        self._scheduled: dict[int, PendingCall] = {}
        self._seats: set[str] = set()
        """The agents whose last call was answered."""
        self._asked = 0
        self._answered = 0
        self._percent = 0

    def accepted(self) -> pb.DeliberationUpdate:
        """Build the first update: council and context pack are gathered."""
        return self._update("gather")

    def read(self, event: HistoryEvent, summary: str) -> Iterator[pb.DeliberationUpdate]:
        """Yield the updates that the event causes.

        `summary` is that of the activity that the event schedules, else empty.
        """
        if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED:
            yield from self._schedule(event, summary)
        elif event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED:
            place = event.activity_task_completed_event_attributes.scheduled_event_id
            for agent in self._answer(place):
                self._seats.add(agent)
                self._answered += 1
                yield self._update(
                    f"{self._wave}: {self._answered} of {self._asked} answered", agent
                )
        elif event.event_type in FAILED:
            failed = event.activity_task_failed_event_attributes
            timed_out = event.activity_task_timed_out_event_attributes
            place = failed.scheduled_event_id or timed_out.scheduled_event_id
            if self._is_together(place):
                self._asked -= len(self._answer(place))
            for agent in self._answer(place):
                self._seats.discard(agent)
                self._answered += 1
                yield self._update(f"{self._wave}: {agent} failed", agent)

    def complete(self, found: DeliberationResult) -> pb.DeliberationUpdate:
        """Build the last update, with the winner."""
        return pb.DeliberationUpdate(
            status="complete",
            progress_percent=100,
            current_step="done",
            current_agent=found.winner_id,
            partial_result=next(iter(results(found)), None),
        )

    def _schedule(self, event: HistoryEvent, summary: str) -> Iterator[pb.DeliberationUpdate]:
        act = event.activity_task_scheduled_event_attributes.activity_type.name
        if act not in STATUS:
            return
        wave = WAVES.get(act, act)
        begins = wave != self._wave
        if begins:
            self._wave, self._status = wave, STATUS[act]
            self._begun += 1
            self._asked = self._answered = 0
        agents = sorted(self._seats) if act == TOGETHER else _agents(wave, summary)
        self._asked += len(agents)
        self._scheduled[event.event_id] = PendingCall(act, wave, agents)
        if begins:
            yield self._update(wave)

    def _answer(self, scheduled_event_id: int) -> Sequence[str]:
        """Return the agents for which an activity of the current wave has ended."""
        call = self._scheduled.pop(scheduled_event_id, None)
        return call.agents if call and call.wave == self._wave else ()

    def _is_together(self, scheduled_event_id: int) -> bool:
        call = self._scheduled.get(scheduled_event_id)
        return call is not None and call.act == TOGETHER

    def _update(self, step: str, agent: str = "") -> pb.DeliberationUpdate:
        done = max(0, self._begun - 1) + (self._answered / self._asked if self._asked else 0)
        self._percent = max(self._percent, min(99, int(100 * done / self._waves)))
        return pb.DeliberationUpdate(
            status=self._status,
            progress_percent=self._percent,
            current_step=step,
            current_agent=agent,
        )


def _agents(wave: str, summary: str) -> list[str]:
    """Return the agent that the activity's summary names; none if it names none.

    Summaries are such as `check agent-dev-1` and `agent-dev-1 proposes`.
    """
    words = summary.split()
    if not words or wave == "record":
        return []
    return [words[-1] if wave == "check" else words[0]]
