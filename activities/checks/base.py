"""What every check of a proposal shares.

A check is a subclass of ProposalCheck in any module of this package, with a weight in
deploy/config/checks.yaml. Nothing else lists the checks.
"""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from activities.checks.fences import UNCLEAR, Block, code_blocks
from activities.checks.sandbox import Sandbox
from workflows.models.agents import Proposal
from workflows.models.deliberation import Check

MAX_FINDINGS = 50
FINDING_CHARACTERS = 1_000


@dataclass(frozen=True)
class Text:
    """One text of a proposal. `place`: the words that precede a finding's line number."""

    place: str
    text: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class ParsedProposal:
    """Every text of a proposal with its code blocks; the content is the first.

    Attributes:
        task: what the proposal is for; empty: not known.
        about: what it has to be about; empty: not known.
    """

    texts: Sequence[Text]
    task: str = ""
    about: str = ""

    @classmethod
    def parse(cls, texts: Mapping[str, str], task: str = "", about: str = "") -> ParsedProposal:
        """Find the code blocks of texts by their places; long texts take seconds.

        Args:
            texts: of a proposal, by their places.
            task: what the proposal is for.
            about: what it has to be about; empty: `task`.
        """
        found = [Text(place, text, code_blocks(text)) for place, text in texts.items()]
        return cls(found, task, about or task)

    @property
    def blocks(self) -> Sequence[Block]:
        """The code blocks of the content."""
        return self.texts[0].blocks


class ProposalCheck(ABC):
    """One check. The same proposal gets the same result on the same machine.

    Attributes:
        name: its name in checks.yaml, in reports and in the graph.
    """

    name: ClassVar[str]

    def __init__(self, directory: Path, sandbox: Sandbox) -> None:
        """Create the check.

        Args:
            directory: the folder of the configuration files.
            sandbox: runs what must not harm the worker.

        Raises:
            InvalidConfig: a file of the check is missing, not YAML, or inconsistent.
        """
        self.sandbox = sandbox

    @abstractmethod
    async def run(self, proposal: ParsedProposal) -> Check:
        """Check a proposal."""

    async def run_all(self, proposals: Sequence[ParsedProposal]) -> list[Check]:
        """Check the proposals of a council; each gets the result that it gets alone."""
        return await asyncio.gather(*map(self.run, proposals))

    @classmethod
    def not_checked(cls, why: str) -> Check:
        """Return the result of a check that could not be made."""
        return Check(name=cls.name, outcome="not_checked", findings=shown([f"not checked: {why}"]))

    @classmethod
    def not_applicable(cls) -> Check:
        """Return the result for a proposal that has nothing to check."""
        return Check(name=cls.name, outcome="not_applicable")


def find_checks() -> dict[str, type[ProposalCheck]]:
    """Return every check of this package by its name."""
    package = importlib.import_module(__name__.rpartition(".")[0])
    modules = [
        importlib.import_module(f"{package.__name__}.{each.name}")
        for each in pkgutil.iter_modules(package.__path__)
    ]
    return {
        value.name: value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, ProposalCheck)
        and value.__module__ == module.__name__
        and value is not ProposalCheck
    }


def texts_of(proposal: Proposal) -> dict[str, str]:
    """Return every text of a proposal by its place, the content first."""
    texts = {"content line": proposal.content, "approach line": proposal.approach}
    for number, decision in enumerate(proposal.decisions, start=1):
        texts[f"decision {number} line"] = "\n".join(
            (decision.title, decision.rationale, *decision.affects)
        )
    return texts


def unclear_blocks(blocks: Sequence[Block]) -> str:
    """Return the reason if the language of blocks cannot be determined; empty if it can."""
    lines = [str(block.line) for block in blocks if block.language == UNCLEAR]
    if not lines:
        return ""
    return (
        f"the language of the code at line {', '.join(lines[:10])} cannot be determined; label it"
    )


def shown(findings: Iterable[str]) -> list[str]:
    """Prepare findings for a terminal: no control characters, limited number and length."""
    lines = [printable(finding)[:FINDING_CHARACTERS] for finding in findings]
    left_out = len(lines) - MAX_FINDINGS
    return [*lines[:MAX_FINDINGS], f"and {left_out} more"] if left_out > 0 else lines


def printable(text: str) -> str:
    """Remove control characters, but not line breaks and tabs."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))
