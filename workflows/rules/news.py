"""Decisions and milestones that arrive from outside while agents work, merged and bounded. Pure.

The graph keeps all of them. A workflow keeps the newest, for agents whose context pack is older.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from workflows.models.context import DecisionAdded, MilestoneReached

KEPT = 100
"""Number of newest decisions, and of newest milestones, that a workflow keeps."""

MILESTONES_KNOWN = 1_000
"""Number of newest milestones whose ids a story keeps, to take each one only once."""


def decisions_with(
    known: Sequence[DecisionAdded], added: Iterable[DecisionAdded]
) -> list[DecisionAdded]:
    """Return the newest KEPT decisions; one with a known id replaces the earlier text.

    A correction without a title (its id is there instead) or rationale keeps that part as it was.
    """
    by_id = {decision.decision_id: decision for decision in known}
    for decision in added:
        before = by_id.pop(decision.decision_id, decision)
        titled = decision.title != decision.decision_id
        by_id[decision.decision_id] = decision.model_copy(
            update={
                "title": decision.title if titled else before.title,
                "rationale": decision.rationale or before.rationale,
            }
        )
    return list(by_id.values())[-KEPT:]


def holding(decisions: Iterable[DecisionAdded]) -> list[DecisionAdded]:
    """Return the decisions that were not withdrawn."""
    return [decision for decision in decisions if not decision.withdrawn]


def milestones_with(
    known: Sequence[MilestoneReached], added: Iterable[MilestoneReached]
) -> list[MilestoneReached]:
    """Return the newest KEPT milestones, each of them once."""
    by_id = {milestone.milestone_id: milestone for milestone in [*known, *added]}
    return list(by_id.values())[-KEPT:]
