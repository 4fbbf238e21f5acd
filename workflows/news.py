"""What comes from outside while agents work: decisions and milestones, merged and bounded. Pure.

The graph keeps all of them. A workflow keeps the newest, for agents whose context pack is older.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from workflows.models import DecisionAdded, MilestoneReached

KEPT = 100
"""The newest decisions, and the newest milestones, that a workflow keeps."""

MILESTONES_KNOWN = 1_000
"""The newest milestones whose ids a story keeps, to take each once."""


def decisions_with(
    known: Sequence[DecisionAdded], added: Iterable[DecisionAdded]
) -> list[DecisionAdded]:
    """The newest KEPT decisions; one with a known id takes the place of the earlier text.

    A correction without title (its id stands there) or rationale leaves that part as it was.
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
    """Those that were not withdrawn."""
    return [decision for decision in decisions if not decision.withdrawn]


def milestones_with(
    known: Sequence[MilestoneReached], added: Iterable[MilestoneReached]
) -> list[MilestoneReached]:
    """The newest KEPT milestones, each once."""
    by_id = {milestone.milestone_id: milestone for milestone in [*known, *added]}
    return list(by_id.values())[-KEPT:]
