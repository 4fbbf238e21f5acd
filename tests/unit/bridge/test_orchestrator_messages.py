"""The result and the history of a deliberation, as gRPC clients read them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent

from bridge.grpc.orchestrator.messages import (
    VERSION,
    Updates,
    check_suite,
    result_metadata,
    results,
)
from bridge.grpc.orchestrator.metrics import mean, percentile, since
from bridge.grpc.wire import orchestrator_pb2 as pb
from tests.support.stories import deliberation
from workflows.models.deliberation import Check, DeliberationResult, FailedAgent

Outcome = Literal["passed", "failed", "not_checked", "not_applicable"]


def check(name: str, outcome: Outcome, *findings: str) -> Check:
    score = {"passed": 1.0, "failed": 0.0}.get(outcome)
    return Check(name=name, outcome=outcome, score=score, findings=list(findings))


def a_result() -> DeliberationResult:
    record = deliberation("US-1")
    return DeliberationResult(
        task_id=record.task_id,
        deliberation_id=record.deliberation_id,
        story_id="US-1",
        role="DATA",
        status="completed",
        winner_id="agent-data-1",
        judged="agent-architect-1: clearer",
        ranked=record.ranked[::-1],
        failed_agents=[FailedAgent(agent_id="agent-data-3", act="revise", cause="no model")],
    )


# --- checks ---------------------------------------------------------------------------------------


def test_what_was_not_checked_is_not_passed_and_gives_the_reason() -> None:
    suite = check_suite(
        [
            check("policy", "passed"),
            check("lint", "not_checked", "not checked: no sandbox"),
            check("dry_run", "not_checked", "not checked: no sandbox"),
        ]
    )

    assert suite.policy.passed
    assert not suite.lint.passed
    assert list(suite.lint.errors) == ["not checked: no sandbox"]
    assert suite.lint.error_count == 0
    assert not suite.dryrun.passed
    assert "not checked: no sandbox" in suite.dryrun.message
    assert suite.dryrun.exit_code == -1
    assert not suite.all_passed
    assert [each.message for each in suite.additional_checks][1:] == ["not checked: no sandbox"] * 2


def test_a_check_with_no_input_has_not_passed_and_does_not_block() -> None:
    suite = check_suite(
        [
            check("policy", "passed"),
            check("lint", "not_applicable"),
            check("dry_run", "not_applicable"),
        ]
    )

    assert not suite.lint.passed
    assert list(suite.lint.errors) == ["not applicable"]
    assert not suite.dryrun.passed
    assert suite.dryrun.message == "not applicable"
    assert suite.all_passed


def test_a_failed_check_shows_its_findings() -> None:
    failed = check("policy", "failed", "blocking secret: content line 3: a key")
    suite = check_suite([failed.model_copy(update={"blocking": True, "errors": 1})])

    assert not suite.policy.passed
    assert list(suite.policy.violations) == ["blocking secret: content line 3: a key"]
    (each,) = suite.additional_checks
    assert (each.check_type, each.passed, each.score) == ("policy", False, 0.0)
    assert dict(each.details) == {
        "outcome": "failed",
        "blocking": "true",
        "findings": "blocking secret: content line 3: a key",
    }


@given(st.lists(st.sampled_from(["passed", "failed", "not_checked", "not_applicable"]), max_size=3))
def test_all_passed_requires_a_passed_check_and_no_other_outcome(
    outcomes: list[Outcome],
) -> None:
    names: list[str] = ["policy", "lint", "dry_run"]
    suite = check_suite([check(n, o) for n, o in zip(names, outcomes, strict=False)])

    assert suite.all_passed == (
        "passed" in outcomes and "failed" not in outcomes and "not_checked" not in outcomes
    )
    assert [each.passed for each in suite.additional_checks] == [o == "passed" for o in outcomes]


# --- results --------------------------------------------------------------------------------------


def test_results_come_by_rank_with_all_that_was_drafted() -> None:
    ranked = results(a_result())

    assert [each.rank for each in ranked] == [1, 2]
    assert ranked[0].proposal.author_id == "agent-data-1"
    assert ranked[0].proposal.content == "```sql\nSELECT 1\n```"
    assert list(ranked[0].proposal.revisions) == ["first draft"]
    assert ranked[0].score == pytest.approx(0.9)
    assert ranked[0].checks.lint.passed


def test_metadata_shows_why_and_who_failed() -> None:
    metadata = result_metadata(a_result(), "deliberation-x", 17)

    assert (metadata.orchestrator_version, metadata.execution_id) == (VERSION, "deliberation-x")
    assert metadata.timestamp_ms == 17
    assert metadata.tags["judged"] == "agent-architect-1: clearer"
    assert metadata.tags["failed_agents"] == "agent-data-3 (revise): no model"
    assert metadata.tags["models"] == "smol"
    assert "story_id" in metadata.tags
    assert (
        "judged" not in result_metadata(a_result().model_copy(update={"judged": ""}), "x", 1).tags
    )


# --- updates --------------------------------------------------------------------------------------


class History:
    """A writer of history events, as a deliberation produces them."""

    def __init__(self, rounds: int) -> None:
        self.updates = Updates(rounds)
        self.seen = [self.updates.accepted()]
        self._number = 0

    def ask(self, act: str, summary: str) -> int:
        self._number += 1
        event = HistoryEvent(
            event_id=self._number, event_type=EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED
        )
        event.activity_task_scheduled_event_attributes.activity_type.name = act
        self.seen += self.updates.read(event, summary)
        return self._number

    def answer(self, scheduled: int, end: str = "completed") -> None:
        self._number += 1
        event = HistoryEvent(
            event_id=self._number,
            event_type=EventType.Value(f"EVENT_TYPE_ACTIVITY_TASK_{end.upper()}"),
        )
        getattr(event, f"activity_task_{end}_event_attributes").scheduled_event_id = scheduled
        self.seen += self.updates.read(event, "")

    def wave(self, act: str, summary: str) -> None:
        """Call two agents, of which the second answers first."""
        calls = [self.ask(act, summary.format(agent)) for agent in ("a-1", "a-2")]
        for each in reversed(calls):
            self.answer(each)


def test_each_wave_and_each_answer_is_an_update() -> None:
    history = History(rounds=1)
    history.answer(history.ask("load_council", "council DEV"))
    history.wave("propose", "{} proposes")
    history.wave("criticise", "{} criticises")
    history.wave("revise", "{} revises")
    history.wave("check_proposal", "check {}")
    history.answer(history.ask("record_deliberation", "record proposals"))
    last = history.updates.complete(a_result())

    assert [(each.status, each.current_step, each.current_agent) for each in history.seen] == [
        ("generating", "gather", ""),
        ("generating", "propose", ""),
        ("generating", "propose: 1 of 2 answered", "a-2"),
        ("generating", "propose: 2 of 2 answered", "a-1"),
        ("reviewing", "criticise", ""),
        ("reviewing", "criticise: 1 of 2 answered", "a-2"),
        ("reviewing", "criticise: 2 of 2 answered", "a-1"),
        ("reviewing", "revise", ""),
        ("reviewing", "revise: 1 of 2 answered", "a-2"),
        ("reviewing", "revise: 2 of 2 answered", "a-1"),
        ("scoring", "check", ""),
        ("scoring", "check: 1 of 2 answered", "a-2"),
        ("scoring", "check: 2 of 2 answered", "a-1"),
        ("scoring", "record", ""),
    ]
    assert [each.progress_percent for each in history.seen] == [
        *(0, 0, 10, 20, 20, 30, 40, 40, 50, 60, 60, 70, 80, 80)
    ]
    assert (last.status, last.progress_percent) == ("complete", 100)
    assert last.partial_result == results(a_result())[0]


def test_a_check_of_all_proposals_is_an_update_for_each_agent_that_is_left() -> None:
    history = History(rounds=0)
    history.wave("propose", "{} proposes")
    history.answer(history.ask("propose", "a-3 proposes"))
    history.answer(history.ask("criticise", "a-3 criticises"), "failed")

    history.answer(history.ask("check_council", "check 2 proposals"))

    assert [(each.status, each.current_step, each.current_agent) for each in history.seen[-3:]] == [
        ("scoring", "check", ""),
        ("scoring", "check: 1 of 2 answered", "a-1"),
        ("scoring", "check: 2 of 2 answered", "a-2"),
    ]


def test_proposals_that_are_checked_one_by_one_after_all_are_counted_once() -> None:
    history = History(rounds=0)
    history.wave("propose", "{} proposes")

    history.answer(history.ask("check_council", "check 2 proposals"), "failed")
    history.wave("check_proposal", "check {}")

    assert [each.current_step for each in history.seen[-3:]] == [
        "check",
        "check: 1 of 2 answered",
        "check: 2 of 2 answered",
    ]


@pytest.mark.parametrize("end", ["failed", "timed_out"])
def test_an_agent_that_fails_is_named(end: str) -> None:
    history = History(rounds=1)

    history.answer(history.ask("propose", "a-1 proposes"), end)

    assert history.seen[-1].current_step == "propose: a-1 failed"
    assert history.seen[-1].current_agent == "a-1"


@given(
    st.integers(0, 3),
    st.lists(
        st.sampled_from(
            ["propose", "criticise", "revise", "check_council", "check_proposal", "judge"]
        ),
        max_size=40,
    ),
)
def test_progress_never_goes_back_and_ends_only_at_the_end(rounds: int, acts: list[str]) -> None:
    history = History(rounds)
    for act in acts:
        history.answer(history.ask(act, "a-1 acts"))

    percent = [each.progress_percent for each in history.seen]

    assert percent == sorted(percent)
    assert all(0 <= each < 100 for each in percent)
    assert {each.status for each in history.seen} <= {"generating", "reviewing", "scoring"}
    assert isinstance(history.seen[0], pb.DeliberationUpdate)


# --- figures --------------------------------------------------------------------------------------


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(each) for each in range(100, 0, -1)]

    assert [percentile(values, each) for each in (50, 95, 99)] == [50, 95, 99]
    assert percentile([7.0], 99) == 7
    assert percentile([], 50) == mean([]) == 0
    assert mean([1.0, 2.0]) == 1.5


@given(st.integers(0, 2**63 - 1))
def test_a_time_range_of_any_length_is_a_query(time_range_ms: int) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)

    query = since("Q", time_range_ms, now)

    if query != "Q":
        begin = now - timedelta(milliseconds=time_range_ms)
        assert query == f"Q AND CloseTime >= '{begin.isoformat(timespec='milliseconds')}'"
    else:
        assert time_range_ms == 0 or time_range_ms >= now.timestamp() * 1000
