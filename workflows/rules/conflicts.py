"""What the author of a change reads that conflicts with the story's branch. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from workflows.models.branches import MergedBase
from workflows.models.deliberation import Check
from workflows.rules.changes import fenced, named


def conflict_feedback(base: MergedBase) -> list[str]:
    """Return the feedback for the one revision of a change that conflicts."""
    files = named(base.files)
    return [
        f"Your change conflicts with the branch in {files}: other tasks have changed the same "
        "lines. You go on from the branch, with your change in all other files. In these files "
        "your change is missing: make it again, so that both sides hold.",
        f"The branch has changed in {files} since you began:\n{fenced('diff', base.branch_diff)}",
        f"You had changed in {files}:\n{fenced('diff', base.change_diff)}",
    ]


def still_in_conflict(files: Sequence[str]) -> str:
    """Return why a task fails that conflicts for a second time."""
    return (
        f"merge: conflicts in {named(files)}, also after a revision by its author on the merged "
        "branch; let the tasks that change these lines depend on each other"
    )


def barred(files: Sequence[str], checks: Sequence[Check]) -> str:
    """Return why the revision of a change that conflicted may not be merged; empty if it may."""
    findings = [
        finding
        for check in checks
        if check.blocking and check.outcome == "failed"
        for finding in check.findings
    ]
    if not findings:
        return ""
    return f"merge: the revision after the conflict in {named(files)} is barred: " + "; ".join(
        findings
    )
