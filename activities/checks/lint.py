"""Lint: every block has to parse in its language, and ruff checks the Python.

Python is checked as a notebook, as in the dry run: a block may use definitions of earlier blocks.
"""

from __future__ import annotations

import json
import marshal
import re
import shutil
import signal
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from activities.checks import parsers
from activities.checks.base import ParsedProposal, ProposalCheck, shown, unclear_blocks
from activities.checks.fences import Block
from activities.checks.sandbox import CannotRun, Limits, Run, Sandbox, python_program
from workflows.models.deliberation import Check

MAX_BLOCKS = 200
"""Maximum number of code blocks; a proposal with more is reported as not checked."""

LANGUAGES = frozenset(parsers.PARSERS)
"""Languages that are checked; a block in another is not counted."""

ERROR_COST = 0.25
WARNING_COST = 0.05
_FAILING = 4  # errors that reduce a block's score to 0

_OVERFLOWED = (-signal.SIGSEGV, 128 + signal.SIGSEGV)
"""Exit codes of a parser after a stack overflow caused by the text."""

_GIB = 1024 * 1024 * 1024
PARSER_LIMITS = Limits(
    cpu_s=8,
    wall_s=25,
    memory_bytes=2 * _GIB,
    total_memory_bytes=2 * _GIB,
    processes=256,  # ruff starts a thread for each core
)
_PACKAGES = sysconfig.get_path("purelib")
_PARSERS = Path(parsers.__file__)

_RUFF = str(Path(sysconfig.get_path("scripts")) / "ruff")
_RULES = "E4,E7,E9,F"
_NOT_IN_A_NOTEBOOK = "F404"  # any block may begin with a future import, not only the first one
_RUFF_ARGUMENTS = (
    *("check", "--isolated", "--no-cache", "--quiet", "--output-format", "json"),
    *("--target-version", f"py{sys.version_info.major}{sys.version_info.minor}"),
    *("--select", _RULES, "--ignore", _NOT_IN_A_NOTEBOOK, "--ignore-noqa"),
)
_RUFF_ENDED = (0, 1)  # without findings, and with some
_ERROR = re.compile(r"E9|F63|F7|F82|invalid-syntax")
"""Findings that fail at run time; all others are warnings."""


@dataclass(frozen=True, order=True)
class Problem:
    """A lint finding. `line`: in the proposal's content, from 1."""

    line: int
    message: str
    error: bool


class LintCheck(ProposalCheck):
    """The code blocks of the content, in the languages that have a parser."""

    name = "lint"

    async def run(self, proposal: ParsedProposal) -> Check:
        if found := self._not_linted(proposal):
            return found
        try:
            result = await lint_code(proposal.blocks, self.sandbox)
        except CannotRun as error:
            return self.not_checked(str(error))
        return self._judged(proposal, result)

    async def run_all(self, proposals: Sequence[ParsedProposal]) -> list[Check]:
        """Lint all proposals in one sandbox; if one of them breaks it, each in another one."""
        linted = [each for each in proposals if not self._not_linted(each)]
        found = await lint_together([each.blocks for each in linted], self.sandbox)
        if found is None:
            return await super().run_all(proposals)
        results = iter(found)
        return [self._not_linted(each) or self._judged(each, next(results)) for each in proposals]

    def _not_linted(self, proposal: ParsedProposal) -> Check | None:
        """Return the result of a proposal that has nothing to lint, or too much."""
        known = _known(proposal.blocks)
        unclear = unclear_blocks(proposal.blocks)
        if not known:
            return self.not_checked(unclear) if unclear else self.not_applicable()
        if len(known) > MAX_BLOCKS:
            return self.not_checked(f"{len(known)} code blocks; at most {MAX_BLOCKS} are read")
        return None

    def _judged(self, proposal: ParsedProposal, result: Lint) -> Check:
        errors = sum(problem.error for problem in result.problems)
        unclear = unclear_blocks(proposal.blocks)
        if unclear and not errors:
            return self.not_checked(unclear)
        return Check(
            name=self.name,
            outcome="failed" if errors else "passed",
            score=result.score,
            findings=shown(
                f"{'error' if each.error else 'warning'}: content line {each.line}: {each.message}"
                for each in result.problems
            ),
            errors=errors,
            warnings=len(result.problems) - errors,
        )


@dataclass(frozen=True)
class Lint:
    """The result of linting. `score`: 0 to 1, the mean over the blocks.

    A block that does not parse scores 0. Any other block scores 1, minus ERROR_COST for each error
    and WARNING_COST for each warning, but at least 0.
    """

    score: float
    problems: list[Problem]


async def lint_code(
    blocks: Sequence[Block], sandbox: Sandbox, limits: Limits = PARSER_LIMITS
) -> Lint:
    """Lint the blocks whose language is in LANGUAGES; there must be at least one.

    Args:
        blocks: the code blocks.
        sandbox: runs the parsers and ruff.
        limits: of the parsers and of ruff.

    Raises:
        CannotRun: a parser, ruff or the sandbox is not available or gave up.
    """
    blocks = _known(blocks)
    parsers_argv, visible = _parsers(blocks)
    broken = _broken(blocks, await sandbox.run(parsers_argv, _sources(blocks), visible, limits))
    python = [block for block in blocks if block.language == "python" and not broken[block]]
    return _lint(broken, await _ruff(python, sandbox, limits) if python else {})


async def lint_together(
    proposals: Sequence[Sequence[Block]], sandbox: Sandbox, limits: Limits = PARSER_LIMITS
) -> list[Lint] | None:
    """Lint several proposals in one sandbox, each as `lint_code` does it.

    Args:
        proposals: the code blocks of each; at least one of their languages is in LANGUAGES.
        sandbox: runs the parsers, and then ruff.
        limits: of the parsers and of ruff.

    Returns:
        A result for each proposal; None if there is one proposal or none, or if any of them is too
        much for a parser, ruff or the limits, or cannot be linted here. Then each is linted alone.
    """
    if len(proposals) < 2:
        return None
    known = [_known(blocks) for blocks in proposals]
    try:
        argv, visible = _parsers([block for blocks in known for block in blocks])
        command = [*argv, _RUFF, *_RUFF_ARGUMENTS]
        sources = marshal.dumps(
            [[(*each, json.dumps(each[1])) for each in _texts(blocks)] for blocks in known]
        )
        run = await sandbox.run(command, sources, [*visible, _RUFF], limits)
    except CannotRun:
        return None
    if run.ended != "exit" or run.exit_code not in _RUFF_ENDED:
        return None
    return _read_together(known, run)


def _read_together(proposals: Sequence[Sequence[Block]], run: Run) -> list[Lint] | None:
    """Return each proposal's result, from a line for each block and ruff's findings."""
    blocks = sum(map(len, proposals))
    *lines, findings = run.output.decode(errors="replace").split("\n", blocks)
    if len(lines) < blocks:
        return None
    if run.exit_code == 0:
        findings = findings or "[]"  # without Python, ruff does not run
    try:
        answers = [json.loads(line) for line in lines]
        by_file = _by_file(json.loads(findings))
    except ValueError:
        return None
    found = iter(answers)
    return [
        _read_one(each, [next(found) for _ in each], by_file.get(f"{number}.ipynb", []))
        for number, each in enumerate(proposals)
    ]


def _read_one(blocks: Sequence[Block], answers: Sequence[Any], findings: Sequence[Any]) -> Lint:
    broken = _problems(blocks, answers)
    python = [block for block in blocks if block.language == "python" and not broken[block]]
    return _lint(broken, _found(python, findings))


def _by_file(findings: Sequence[Any]) -> dict[str, list[Any]]:
    by_file: dict[str, list[Any]] = {}
    for each in findings:
        by_file.setdefault(Path(each["filename"]).name, []).append(each)
    return by_file


def _known(blocks: Sequence[Block]) -> list[Block]:
    return [block for block in blocks if block.language in LANGUAGES]


def _parsers(blocks: Sequence[Block]) -> tuple[list[str], list[str]]:
    """Return the command that parses the blocks, and what it has to see.

    Raises:
        CannotRun: a parser is not available.
    """
    languages = {block.language for block in blocks}
    bare = languages <= parsers.STANDARD
    visible = [] if bare else [_PACKAGES]
    bash = ""
    if "shell" in languages:
        if (found_bash := shutil.which("bash")) is None:
            raise CannotRun("shell cannot be checked: bash is not installed")
        visible.append(bash := found_bash)
    return [*python_program(_PARSERS), bash, "" if bare else _PACKAGES], visible


def _lint(broken: dict[Block, list[Problem]], in_python: dict[Block, list[Problem]]) -> Lint:
    found = broken | in_python
    return Lint(
        score=sum(_score(found[block], bool(broken[block])) for block in found) / len(found),
        problems=sorted(problem for problems in found.values() for problem in problems),
    )


def _score(problems: Sequence[Problem], broken: bool) -> float:
    if broken:
        return 0.0
    errors = sum(problem.error for problem in problems)
    return max(0.0, 1 - ERROR_COST * errors - WARNING_COST * (len(problems) - errors))


def _sources(blocks: Sequence[Block]) -> bytes:
    return marshal.dumps(_texts(blocks))


def _texts(blocks: Sequence[Block]) -> list[tuple[str, str]]:
    return [(block.language, block.text) for block in blocks]


def _broken(blocks: Sequence[Block], run: Run) -> dict[Block, list[Problem]]:
    """Return each block's problems, from the output of the parsers."""
    answers = run.output.decode(errors="replace").split("\n")[:-1]  # complete lines
    if run.ended == "output" or run.exit_code in _OVERFLOWED:
        # The text itself is the cause, so it does not pass.
        answers += ['[[1, "its problems are too many, or it is nested too deeply"]]'] * (
            len(blocks) - len(answers)
        )
    elif run.exit_code != 0:
        at = blocks[min(len(answers), len(blocks) - 1)]
        raise CannotRun(
            f"line {at.line}: {at.language} that cannot be parsed within the limits on time and"
            f" memory (exit code {run.exit_code})"
        )
    return _problems(blocks, [json.loads(answer) for answer in answers])


def _problems(blocks: Sequence[Block], answers: Sequence[Any]) -> dict[Block, list[Problem]]:
    return {
        block: [Problem(_place(block, line), message, True) for line, message in answer]
        for block, answer in zip(blocks, answers, strict=True)
    }


async def _ruff(
    blocks: Sequence[Block], sandbox: Sandbox, limits: Limits
) -> dict[Block, list[Problem]]:
    notebook = parsers.notebook([json.dumps(block.text) for block in blocks]).encode()
    command = [_RUFF, *_RUFF_ARGUMENTS, "--stdin-filename", "proposal.ipynb", "-"]
    run = await sandbox.run(command, notebook, [_RUFF], limits)
    if run.ended == "output":  # more findings than are read: the text does not pass
        why = f"more lint findings than fit in {limits.output_bytes} bytes"
        return {block: [Problem(block.line, why, True)] * _FAILING for block in blocks}
    try:
        answer = json.loads(run.output)
    except ValueError:
        output = run.output[-500:].decode(errors="replace")
        raise CannotRun(f"ruff gave up (exit code {run.exit_code}): {output}") from None
    return _found(blocks, answer)


def _found(blocks: Sequence[Block], findings: Sequence[Any]) -> dict[Block, list[Problem]]:
    """Return each block's problems, from ruff's findings in a notebook of these blocks."""
    found: dict[Block, list[Problem]] = {block: [] for block in blocks}
    for each in findings:
        block, code = blocks[each["cell"] - 1], each["code"] or "invalid-syntax"
        if code == "F811" and _other_file(block, blocks, each["message"]):
            continue
        place = _place(block, each["location"]["row"])
        message = f"{code} {each['message']}"
        found[block].append(Problem(place, message, bool(_ERROR.match(code))))
    return found


def _other_file(block: Block, blocks: Sequence[Block], message: str) -> bool:
    """Return whether the redefined name belongs to another file, which is a separate module."""
    cell = re.search(r"from cell (\d+)", message)
    return cell is not None and blocks[int(cell[1]) - 1].file != block.file


def _place(block: Block, line: int) -> int:
    """Convert a block's line to the proposal's, limited to the last line of the block."""
    return block.line + min(line, max(1, block.text.count("\n"))) - 1
