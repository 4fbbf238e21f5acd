"""Requests to a story: whether each is allowed now. Pure.

Each function raises an ApplicationError, with the remedy, if its request is not allowed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from workflows.models.access import request_content
from workflows.models.errors import ErrorType, application_error
from workflows.models.process import Transition
from workflows.models.readiness import StoryText
from workflows.models.report import WorkspaceReport
from workflows.models.story import Amend, Approve, RaiseBudget, Reject
from workflows.rules import machine as fsm
from workflows.rules.machine import BUDGET_GATE

if TYPE_CHECKING:
    from workflows.story_state import Story

COMMIT = re.compile(r"[0-9a-f]{7,40}")

BUDGET_ROLE = "PO"


def require_approve(story: Story, request: Approve) -> Transition:
    """Return the transition of the gate that the request opens."""
    if request.gate == BUDGET_GATE:
        raise application_error(
            ErrorType.GATE_NOT_OPEN, "gate: 'budget' is opened by the update raise_budget"
        )
    transition = fsm.gate_transition(story.machine, request.gate)
    if transition is None:
        gates = ", ".join(story.machine.gates)
        raise application_error(
            ErrorType.UNKNOWN_GATE,
            f"gate: {request.gate!r} is unknown; gates are {gates}; {story.legal()}",
        )
    if transition.source != story.state:
        raise application_error(
            ErrorType.GATE_NOT_OPEN,
            f"gate: {request.gate!r} opens in {transition.source}; {story.legal()}",
        )
    roles = fsm.gate_roles(story.machine, request.gate)
    if request.role not in roles:
        raise application_error(
            ErrorType.GATE_ROLE,
            f"role: {request.gate!r} is opened by {' or '.join(roles)}, not {request.role!r}",
        )
    if story.gate != request.gate:
        blocked = next((m.blocked_by for m in story.moves() if m.event == request.gate), [])
        computed = [reason for reason in blocked if reason.split(":")[0] in story.guards]
        raise application_error(
            ErrorType.GUARD_BLOCKED,
            f"gate: {request.gate!r} is not open yet: "
            f"{'; '.join(computed) or story.working_on or story.held or 'the fleet is at work'}",
        )
    if request.revision is not None and request.revision != story.revision:
        raise application_error(
            ErrorType.STALE_REVISION,
            f"revision: {request.revision!r} is stale: {story.since(request.revision)}; "
            f"the gate shows {story.revision!r}; look at it and approve that",
        )
    return transition


def require_new_approval(story: Story, request: Approve) -> None:
    """Refuse an approval in a role that has approved what the gate shows."""
    if by := story.approved_as(request.role):
        raise application_error(
            ErrorType.GATE_ROLE,
            f"role: {by} has approved {request.gate!r} as {request.role}; it waits for "
            f"{story.next_role(request.gate)}",
        )


def require_open(story: Story, request: str) -> None:
    """Refuse a request to a story that has ended or is being cancelled."""
    if story.ends:
        raise application_error(
            ErrorType.ILLEGAL_MOVE,
            f"{request}: the story {'is cancelled' if story.cancelling else 'has ended'}; start it "
            "again under its id, or start another one",
        )


def require_reject(story: Story, request: Reject) -> Transition:
    """Return the rejection that the request takes."""
    transition = fsm.rejection(story.machine, story.state, request.event)
    if transition is None:
        raise application_error(
            ErrorType.ILLEGAL_MOVE,
            f"event: {request.event!r} is not a rejection here; {story.legal()}",
        )
    if request.role not in transition.roles:
        raise application_error(
            ErrorType.GATE_ROLE,
            f"role: {request.event!r} is for {' or '.join(transition.roles)}, not {request.role!r}",
        )
    return transition


def require_report(story: Story) -> None:
    """Refuse a report where no guard reads one."""
    exits = [t for t in story.machine.transitions if t.source == story.state]
    if not story.rebased and not any(story.reads_report(transition) for transition in exits):
        raise application_error(
            ErrorType.ILLEGAL_MOVE, f"report: no guard reads one here; {story.legal()}"
        )


def require_commit(story: Story, report: WorkspaceReport) -> None:
    """Refuse a report whose commit cannot be compared with that of the story's branch."""
    if story.branch and not COMMIT.fullmatch(report.commit):
        raise application_error(
            ErrorType.INVALID_INPUT,
            f"WorkspaceReport refused. commit: {report.commit[:60]!r} is not 7 to 40 hexadecimal "
            "digits in lower case; commit all changes, and send what `git rev-parse HEAD` prints",
        )


def require_new_report(story: Story, report: WorkspaceReport) -> None:
    """Refuse a report without an actor or a commit, or one that was sent before."""
    for name in ("actor", "commit"):
        if not getattr(report, name).strip():
            raise application_error(
                ErrorType.INVALID_INPUT, f"WorkspaceReport refused. {name}: required; add it"
            )
    if report.measured_by:
        raise application_error(
            ErrorType.INVALID_INPUT,
            "WorkspaceReport refused. measured_by: only the fleet itself sets it; leave it out",
        )
    known = story.reported.get(report.job_id)
    current = story.report is not None and story.report.job_id == report.job_id
    if known and not (current and known == request_content(report)):
        raise application_error(
            ErrorType.ILLEGAL_MOVE,
            f"job_id: {report.job_id!r} was reported before; measure again, under a new job_id",
        )


def require_amend(story: Story, request: Amend) -> list[Transition]:
    """Return the rejections that lead back to the state that approved the text; [] if there."""
    assert story.process is not None
    if story.process.text_bytes is not None:
        story.text.model_copy(update=new_text(request)).require_fits(
            "Amend", story.process.text_bytes
        )
    if story.done:
        raise application_error(
            ErrorType.ILLEGAL_MOVE, f"amend: the story has ended; {story.legal()}"
        )
    home = next((s.name for s in story.machine.states if s.work == "readiness"), story.state)
    if story.state == home or story.visited(home) == 0:
        return []
    way = fsm.rejection_path(story.machine, story.state, home)
    if way is None:
        raise application_error(
            ErrorType.ILLEGAL_MOVE,
            f"amend: no rejections lead from {story.state} back to {home}, where the text is "
            f"approved; {story.legal()}",
        )
    return way


def require_raise_budget(story: Story, request: RaiseBudget) -> None:
    """Refuse to raise a budget that does not exist, or in a role that may not raise it."""
    if story.token_budget is None:
        raise application_error(
            ErrorType.NO_BUDGET, "tokens: this story has no token budget; nothing to raise"
        )
    if request.role != BUDGET_ROLE:
        raise application_error(
            ErrorType.GATE_ROLE,
            f"role: the budget is raised by {BUDGET_ROLE}, not {request.role!r}",
        )


def new_text(request: Amend) -> dict[str, Any]:
    """Return the fields of the text that an amendment changes."""
    return request.model_dump(include={*StoryText.model_fields}, exclude_none=True)
