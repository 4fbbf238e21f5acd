"""The choice of the winner: scores from checks, near ties, and a final order.

Pure and independent of the order of the inputs: the same candidates always have the same winner.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from workflows.models.agents import Contender, Critique, Proposal
from workflows.models.deliberation import CheckReport

NEAR_TIE = 0.05
"""Scores no further apart than this are too close for the checks to distinguish."""


@dataclass(frozen=True)
class Candidate:
    """A checked proposal.

    Attributes:
        score: 0 to 1.
        open_points: see the function `open_points`.
        verified: every check that applied was made, and passed.
        unchecked: a check that applied was not made.
        policy: 0 to 1, of a change in a repository.
        size: the lines that a change adds and removes.
    """

    agent_id: str
    score: float
    barred: bool
    open_points: int
    verified: bool = False
    unchecked: bool = False
    policy: float = 1.0
    size: int = 0


def score(report: CheckReport) -> float:
    """Return the weighted mean, 0 to 1, over the checks that applied; 0 if none did.

    A check that did not apply, or could not be made, counts neither for nor against.
    """
    applied = [
        (report.weights.get(check.name, 0.0), check.score)
        for check in report.checks
        if check.score is not None
    ]
    total = sum(weight for weight, _ in applied)
    return sum(weight * value for weight, value in applied) / total if total else 0.0


def barred(report: CheckReport) -> bool:
    """Return whether a finding bars the proposal from winning, whatever its score."""
    return any(check.blocking and check.outcome == "failed" for check in report.checks)


def verified(report: CheckReport) -> bool:
    """Return whether every check that applied was made, and passed."""
    return all(check.outcome in ("passed", "not_applicable") for check in report.checks)


def unchecked(report: CheckReport) -> bool:
    """Return whether a check that applied was not made."""
    return any(check.outcome == "not_checked" for check in report.checks)


def open_points(critiques: Iterable[Critique]) -> int:
    """Return the number of points against a proposal from critics that did not accept it."""
    return sum(len(critique.points) for critique in critiques if critique.verdict != "accept")


def order(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Sort by score, the best first; then fewest open points; then agent id. Barred ones come last.

    An unchecked candidate never comes before a verified one: it counts for no more than the
    verified one with the lowest score, and comes after it.
    """
    known = list(candidates)
    limit = min((c.score for c in known if c.verified and not c.barred), default=1.0)

    def key(c: Candidate) -> tuple[bool, float, bool, int, str]:
        score = min(c.score, limit) if c.unchecked else c.score
        return c.barred, -score, c.unchecked, c.open_points, c.agent_id

    return sorted(known, key=key)


def near_tie(candidates: Iterable[Candidate]) -> list[str]:
    """Return the agent ids within NEAR_TIE of the best score, in `order`, without barred ones.

    One id: it has won. Several: they need a judge. None: every candidate is barred.
    """
    fit = [candidate for candidate in order(candidates) if not candidate.barred]
    if any(candidate.verified for candidate in fit):
        fit = [candidate for candidate in fit if not candidate.unchecked]
    # Rounded, so that 1.0 and 0.95 are 0.05 apart in spite of binary fractions.
    return [c.agent_id for c in fit if round(fit[0].score - c.score, 9) <= NEAR_TIE]


def fewest_open_points(candidates: Iterable[Candidate], tied: Sequence[str]) -> str:
    """Return who of the `tied` wins without a judge: fewest open points, then agent id.

    Raises:
        ValueError: `tied` names no candidate.
    """
    return min((c.open_points, c.agent_id) for c in candidates if c.agent_id in tied)[1]


def rank(candidates: Sequence[Candidate], winner_id: str | None) -> list[Candidate]:
    """Return the final order: the winner, then the others in `order`.

    Args:
        candidates: all candidates.
        winner_id: None if there is no winner because every candidate is barred.

    Raises:
        ValueError: `winner_id` is not one of the near tie.
    """
    ranked = order(candidates)
    if winner_id is None:
        return ranked
    if winner_id not in near_tie(candidates):
        raise ValueError(f"{winner_id!r} cannot win; one of {near_tie(candidates)} can")
    return sorted(ranked, key=lambda candidate: candidate.agent_id != winner_id)


def contender(candidate: Candidate, proposal: Proposal) -> Contender:
    """Return what a judge is shown of a candidate in a near tie."""
    return Contender(agent_id=candidate.agent_id, score=candidate.score, proposal=proposal)
