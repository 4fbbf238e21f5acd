"""Checks of a proposal: policy, lint and a dry run, each made or reported as not made.

Nothing passes unchecked, and code runs in a sandbox or not at all (docs/design/0006-sandbox.md).
"""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from temporalio import activity

from activities.checks.dry_run import failure, run_code
from activities.checks.fences import UNCLEAR, Block, code_blocks
from activities.checks.lint import LANGUAGES, lint_code
from activities.checks.policy import Policy, PolicyRules
from activities.checks.sandbox import CannotRun, Sandbox
from activities.config import CONFIG, InvalidConfig, read_config
from activities.heartbeats import heartbeats
from workflows.models.agents import Proposal
from workflows.models.deliberation import Check, CheckInput, CheckReport
from workflows.stubs import CheckStub

POLICY_FILE = "policy.yaml"
CHECKS_FILE = "checks.yaml"

MAX_CHARACTERS = 100_000
"""Total length of a proposal's texts; the rest is not read, and reported as not checked."""

MAX_BLOCKS = 200
"""Number of code blocks; the rest are not linted, and reported as not checked."""

_FINDINGS = 50
_OUTPUT = 4_000  # characters kept of a program's output, from its start and its end

_Name = Literal["policy", "lint", "dry_run"]


class CheckWeights(BaseModel):
    """The content of deploy/config/checks.yaml: each check's weight, 0 or more."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: dict[_Name, Annotated[float, Field(ge=0, allow_inf_nan=False)]]


class Checks(CheckStub):
    """The implementation of CheckStub with the rules and weights of a directory.

    Raises:
        InvalidConfig: a file is missing, not YAML, or inconsistent.
    """

    def __init__(self, directory: Path = CONFIG, sandbox: Sandbox | None = None) -> None:
        self._policy = Policy(load_policy(directory))
        self._weights = _load_weights(directory / CHECKS_FILE)
        self._sandbox = sandbox or Sandbox()

    @activity.defn
    async def check_proposal(self, request: CheckInput) -> CheckReport:
        """Check a proposal; the same proposal gets the same report on the same machine."""
        async with heartbeats():
            return CheckReport(
                checks=await self._checks(request.proposal), weights=dict(self._weights)
            )

    async def _checks(self, proposal: Proposal) -> list[Check]:
        texts = _texts(proposal)
        size = sum(len(text) for text in texts.values())
        if size > MAX_CHARACTERS:
            why = f"the proposal has {size} characters; at most {MAX_CHARACTERS} are read"
            return [_not_checked(name, why) for name in ("policy", "lint", "dry_run")]
        policy, blocks = await asyncio.to_thread(self._read, texts)
        return [policy, await self._lint(blocks), await self._dry_run(blocks)]

    def _read(self, texts: dict[str, str]) -> tuple[Check, list[Block]]:
        """Check all texts against the policy; also return the content's code blocks."""
        blocks = {part: code_blocks(text) for part, text in texts.items()}
        findings, blocking, warnings = [], 0, 0
        for part, text in texts.items():
            for each in self._policy.violations(text, blocks[part]):
                blocking += each.severity == "blocking"
                warnings += each.severity == "warning"
                findings.append(f"{each.severity} {each.rule}: {part} {each.line}: {each.reason}")
        check = Check(
            name="policy",
            outcome="failed" if blocking else "passed",
            score=0.0 if blocking else max(0.0, 1 - self._policy.warning_cost * warnings),
            blocking=blocking > 0,
            findings=_shown(findings),
            errors=blocking,
            warnings=warnings,
        )
        return check, blocks["content line"]

    async def _lint(self, blocks: Sequence[Block]) -> Check:
        known = [block for block in blocks if block.language in LANGUAGES]
        unclear = [block for block in blocks if block.language == UNCLEAR]
        if not known and unclear:
            return _not_checked("lint", _unclear(unclear))
        if not known:
            return Check(name="lint", outcome="not_applicable")
        if len(known) > MAX_BLOCKS:
            return _not_checked("lint", f"{len(known)} code blocks; at most {MAX_BLOCKS} are read")
        try:
            result = await lint_code(known, self._sandbox)
        except CannotRun as error:
            return _not_checked("lint", str(error))
        errors = sum(problem.error for problem in result.problems)
        if unclear and not errors:
            return _not_checked("lint", _unclear(unclear))
        return Check(
            name="lint",
            outcome="failed" if errors else "passed",
            score=result.score,
            findings=_shown(
                f"{'error' if each.error else 'warning'}: content line {each.line}: {each.message}"
                for each in result.problems
            ),
            errors=errors,
            warnings=len(result.problems) - errors,
        )

    async def _dry_run(self, blocks: Sequence[Block]) -> Check:
        python = any(block.language == "python" for block in blocks)
        unclear = [block for block in blocks if block.language == UNCLEAR]
        if not python and unclear:
            return _not_checked("dry_run", _unclear(unclear))
        if not python:
            return Check(name="dry_run", outcome="not_applicable")
        try:
            run = await run_code(blocks, self._sandbox)
        except CannotRun as error:
            return _not_checked("dry_run", str(error))
        passed = run.exit_code == 0
        if unclear and passed:
            return _not_checked("dry_run", _unclear(unclear))
        return Check(
            name="dry_run",
            outcome="passed" if passed else "failed",
            score=1.0 if passed else 0.0,
            findings=[] if passed else _shown([failure(run, self._sandbox.limits)]),
            errors=0 if passed else 1,
            output=_kept(run.output),
            exit_code=run.exit_code,
        )


def _unclear(blocks: Sequence[Block]) -> str:
    lines = ", ".join(str(block.line) for block in blocks[:10])
    return f"the language of the code at line {lines} cannot be determined; label it"


def _texts(proposal: Proposal) -> dict[str, str]:
    """Return every text of a proposal, by the words that precede a finding's line number."""
    texts = {"content line": proposal.content, "approach line": proposal.approach}
    for number, decision in enumerate(proposal.decisions, start=1):
        texts[f"decision {number} line"] = "\n".join(
            (decision.title, decision.rationale, *decision.affects)
        )
    return texts


def _not_checked(name: _Name, why: str) -> Check:
    return Check(name=name, outcome="not_checked", findings=_shown([f"not checked: {why}"]))


def _shown(findings: Any) -> list[str]:
    """Prepare findings for a terminal: no control characters, limited number and length."""
    lines = [_printable(finding)[:1000] for finding in findings]
    left_out = len(lines) - _FINDINGS
    return [*lines[:_FINDINGS], f"and {left_out} more"] if left_out > 0 else lines


def _kept(output: bytes) -> str:
    text = _printable(output.decode(errors="replace"))
    if len(text) <= _OUTPUT:
        return text
    return f"{text[: _OUTPUT // 2]}\n...\n{text[-_OUTPUT // 2 :]}"


def _printable(text: str) -> str:
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


def load_policy(directory: Path = CONFIG) -> PolicyRules:
    """Load the rules of a directory's policy.yaml.

    Raises:
        InvalidConfig: the file is missing, not YAML, or inconsistent.
    """
    return read_config(directory / POLICY_FILE, PolicyRules)


def _load_weights(file: Path) -> dict[str, float]:
    weights = read_config(file, CheckWeights).weights
    missing = [name for name in ("policy", "lint", "dry_run") if name not in weights]
    if missing:
        raise InvalidConfig(file, [f"weights: add {', '.join(missing)}"])
    if not any(weights.values()):
        raise InvalidConfig(file, ["weights: one must be above 0"])
    return {str(name): weight for name, weight in weights.items()}
