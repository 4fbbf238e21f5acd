"""Checks of a proposal, each made or reported as not made.

Nothing passes unchecked, and code runs in a sandbox or not at all (docs/design/0006-sandbox.md).
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from temporalio import activity

from activities.checks.base import ParsedProposal, find_checks, texts_of
from activities.checks.sandbox import Sandbox
from activities.config import CONFIG, InvalidConfig, read_config
from activities.heartbeats import heartbeats
from workflows.models.agents import Proposal
from workflows.models.deliberation import (
    Check,
    CheckInput,
    CheckReport,
    CouncilCheckInput,
    CouncilCheckReport,
)
from workflows.stubs import CheckStub

CHECKS_FILE = "checks.yaml"

MAX_CHARACTERS = 100_000
"""Total length of a proposal's texts; a longer proposal is reported as not checked."""


class CheckWeights(BaseModel):
    """The content of deploy/config/checks.yaml: each check's weight, 0 or more."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]


class Checks(CheckStub):
    """The implementation of CheckStub with the rules and weights of a directory.

    Raises:
        InvalidConfig: a file is missing, not YAML, or inconsistent.
    """

    def __init__(self, directory: Path = CONFIG, sandbox: Sandbox | None = None) -> None:
        checks = find_checks()
        self._weights = _load_weights(directory / CHECKS_FILE, list(checks))
        sandbox = sandbox or Sandbox()
        self._checks = [checks[name](directory, sandbox) for name in self._weights]

    @activity.defn
    async def check_proposal(self, request: CheckInput) -> CheckReport:
        """Check a proposal; the same proposal gets the same report on the same machine."""
        async with heartbeats():
            return CheckReport(
                checks=await self._made(request.proposal, request.task, request.about),
                weights=dict(self._weights),
            )

    @activity.defn
    async def check_council(self, request: CouncilCheckInput) -> CouncilCheckReport:
        """Check the proposals of a council at once; each gets the report that it gets alone."""
        async with heartbeats():
            return CouncilCheckReport(
                checks=await self._made_at_once(request),
                weights=dict(self._weights),
            )

    async def _made(self, proposal: Proposal, task: str, about: str) -> list[Check]:
        if why := _too_large(proposal):
            return [check.not_checked(why) for check in self._checks]
        parsed = await _parsed(proposal, task, about)
        return [await check.run(parsed) for check in self._checks]

    async def _made_at_once(self, request: CouncilCheckInput) -> dict[str, list[Check]]:
        proposals = request.proposals
        made = {
            agent_id: [check.not_checked(why) for check in self._checks]
            for agent_id, proposal in proposals.items()
            if (why := _too_large(proposal))
        }
        read = [agent_id for agent_id in proposals if agent_id not in made]
        parsed = await asyncio.gather(
            *(_parsed(proposals[agent_id], request.task, request.about) for agent_id in read)
        )
        by_check = await asyncio.gather(*(check.run_all(parsed) for check in self._checks))
        made |= {
            agent_id: [results[number] for results in by_check]
            for number, agent_id in enumerate(read)
        }
        return {agent_id: made[agent_id] for agent_id in proposals}


def _too_large(proposal: Proposal) -> str:
    size = sum(len(text) for text in texts_of(proposal).values())
    if size <= MAX_CHARACTERS:
        return ""
    return f"the proposal has {size} characters; at most {MAX_CHARACTERS} are read"


async def _parsed(proposal: Proposal, task: str, about: str) -> ParsedProposal:
    return await asyncio.to_thread(ParsedProposal.parse, texts_of(proposal), task, about)


def _load_weights(file: Path, checks: list[str]) -> dict[str, float]:
    weights = read_config(file, CheckWeights).weights
    unknown = [name for name in weights if name not in checks]
    missing = [name for name in checks if name not in weights]
    problems = [f"weights.{name}: is not a check; use {', '.join(checks)}" for name in unknown]
    if missing:
        problems.append(f"weights: add {', '.join(missing)}")
    if not any(weights.values()):
        problems.append("weights: one must be above 0")
    if problems:
        raise InvalidConfig(file, problems)
    return weights
