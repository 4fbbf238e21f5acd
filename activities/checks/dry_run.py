"""Dry run: the Python of a proposal, run in the sandbox (docs/design/0006-sandbox.md)."""

from __future__ import annotations

import marshal
from collections.abc import Sequence
from pathlib import Path

from activities.checks import notebook
from activities.checks.base import ParsedProposal, ProposalCheck, printable, shown, unclear_blocks
from activities.checks.fences import Block
from activities.checks.sandbox import CannotRun, Limits, Run, Sandbox, exceeded, python_program
from workflows.models.deliberation import Check

OUTPUT_CHARACTERS = 4_000
"""How much of a program's output is kept, from its start and its end."""

_SIGNALS = {
    137: "killed, for its memory or CPU time",
    139: "crashed with a segmentation fault",
    152: "used up its CPU time",
}


class DryRunCheck(ProposalCheck):
    """The Python of the content, run."""

    name = "dry_run"

    async def run(self, proposal: ParsedProposal) -> Check:
        unclear = unclear_blocks(proposal.blocks)
        if not any(block.language == "python" for block in proposal.blocks):
            return self.not_checked(unclear) if unclear else self.not_applicable()
        try:
            run = await run_code(proposal.blocks, self.sandbox)
        except CannotRun as error:
            return self.not_checked(str(error))
        passed = run.exit_code == 0
        if unclear and passed:
            return self.not_checked(unclear)
        return Check(
            name=self.name,
            outcome="passed" if passed else "failed",
            score=1.0 if passed else 0.0,
            findings=[] if passed else shown([failure(run, self.sandbox.limits)]),
            errors=0 if passed else 1,
            output=_kept(run.output),
            exit_code=run.exit_code,
        )


def _kept(output: bytes) -> str:
    text = printable(output.decode(errors="replace"))
    if len(text) <= OUTPUT_CHARACTERS:
        return text
    return f"{text[: OUTPUT_CHARACTERS // 2]}\n...\n{text[-OUTPUT_CHARACTERS // 2 :]}"


async def run_code(blocks: Sequence[Block], sandbox: Sandbox) -> Run:
    """Run Python blocks as a notebook: in order, in one namespace, as `__main__`.

    Blocks that name a file are stored under that name, by which Python blocks import each other.

    Raises:
        CannotRun: there is no sandbox, or the code needs a package that is not in it, a person's
            input, an argument, or a client.
    """
    cells = [
        (
            f"<code at line {block.line}>" if block.language == "python" else "",
            block.text,
            block.file,
        )
        for block in blocks
    ]
    run = await sandbox.run(python_program(Path(notebook.__file__)), marshal.dumps(cells))
    if run.exit_code == notebook.MISSING:
        raise CannotRun(
            f"it imports {last_line(run)}, and the sandbox has the standard library only"
        )
    if run.exit_code == notebook.WAITS:
        raise CannotRun(f"it waits for {last_line(run)}")
    return run


def last_line(run: Run) -> str:
    """Return the last line that a program wrote, or an empty text."""
    lines = run.output[-4096:].decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def failure(run: Run, limits: Limits) -> str:
    """Return the reason why a run failed, on one line."""
    if run.ended != "exit":
        return exceeded(run, limits)
    if run.exit_code == notebook.EARLY:
        return "ended with exit code 0 before the end of the code"
    if run.exit_code in _SIGNALS:
        return _SIGNALS[run.exit_code]
    return f"exit code {run.exit_code}: {last_line(run)}"[:500]
