"""Substance: whether a proposal says something, and says it about its task."""

from __future__ import annotations

import asyncio

from activities import substance
from activities.checks.base import ParsedProposal, ProposalCheck, shown
from workflows.models.deliberation import Check

NO_TASK = "what the proposal is for is not known"


class SubstanceCheck(ProposalCheck):
    """The measures of `activities.substance`. A proposal that says nothing is barred.

    The score of one that says something is its relevance.
    """

    name = "substance"

    async def run(self, proposal: ParsedProposal) -> Check:
        return await asyncio.to_thread(self._check, proposal)

    def _check(self, proposal: ParsedProposal) -> Check:
        text = "\n".join(substance.without_contained(each.text for each in proposal.texts))
        if problem := _says_nothing(proposal.texts[0].text, text, proposal.task):
            return self._failed(problem, blocking=True)
        if not proposal.task:
            return self.not_checked(NO_TASK)
        score = substance.relevance(text, proposal.about)
        if not score:
            return self._failed("has none of the task's words: it is about something else")
        return Check(name=self.name, outcome="passed", score=score)

    def _failed(self, problem: str, *, blocking: bool = False) -> Check:
        return Check(
            name=self.name,
            outcome="failed",
            score=0.0,
            blocking=blocking,
            findings=shown([problem]),
            errors=1,
        )


def _says_nothing(content: str, text: str, task: str) -> str:
    """Return why a proposal has no substance, or an empty text.

    Args:
        content: the main text.
        text: all texts.
        task: what the proposal is for.
    """
    size = substance.size(content)
    if size < substance.MIN_CHARACTERS:
        return f"has {size} characters; {substance.MIN_CHARACTERS} are the least"
    if substance.repeats_itself(text):
        return "repeats itself"
    if task and substance.copied(content, [task]) > substance.MAX_COPIED_OF_ALL:
        return "only repeats its task"
    return ""
