"""The lines that a diff adds, and the fleet's policy and substance applied to them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from activities import substance
from activities.checks.base import ParsedProposal, Text, shown
from activities.checks.fences import Block, code_blocks
from activities.checks.policy import PolicyCheck
from activities.checks.sandbox import Sandbox
from activities.checks.substance import SubstanceCheck
from workflows.models.deliberation import Check
from workflows.models.workspace import Repository
from workflows.rules.globs import matches
from workflows.rules.paths import allowed

PYTHON_FILES = {".py", ".pyi"}

_HUNK = re.compile(r"@@ -\d+(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


def added_lines(diff: str) -> dict[str, dict[int, str]]:
    """Return path -> line number in the new file -> text, of each line that a diff adds.

    A hunk's own counts say where it ends, so that no text in it is taken for a header.
    """
    files: dict[str, dict[int, str]] = {}
    added: dict[int, str] = {}
    old = new = number = 0
    for line in diff.split("\n"):
        if old > 0 or new > 0:
            if line.startswith("+"):
                added[number] = line[1:]
            old -= line[:1] in ("-", " ")
            new -= line[:1] in ("+", " ")
            number += line[:1] in ("+", " ")
        elif found := _HUNK.match(line):
            old, number, new = int(found[1] or 1), int(found[2]), int(found[3] or 1)
        elif line.startswith("+++ "):
            added = files.setdefault(_path(line), {})
    return {path: lines for path, lines in files.items() if lines}


def _path(line: str) -> str:
    """Return the path in a line such as `+++ b/README.md` or `+++ "b/caf\\303\\251.md"`."""
    return line[4:].rstrip("\t").strip('"').removeprefix("b/")


class ChangeChecks:
    """The checks of proposals that also apply to what a commit adds."""

    def __init__(self, directory: Path, sandbox: Sandbox) -> None:
        """Load the policy.

        Args:
            directory: the folder of the configuration files.
            sandbox: that of the worker; nothing is run in it.

        Raises:
            InvalidConfig: policy.yaml is missing, not YAML, or inconsistent.
        """
        self._policy = PolicyCheck(directory, sandbox)
        self._substance = SubstanceCheck(directory, sandbox)

    async def made(
        self,
        repository: Repository,
        diff: str | None,
        changed: Sequence[str],
        paths: Sequence[str],
        task: str,
    ) -> list[Check]:
        """Check a change by the policy; check the documentation in it for substance.

        Args:
            repository: its paths of documentation, and those that it opens.
            diff: of the change, whole; None if it is too long.
            changed: every path that the change touches.
            paths: globs that it may change.
            task: what the change is for.
        """
        foreign = [path for path in changed if not allowed(path, paths, repository.open_paths)]
        if diff is None or foreign:
            return [_refused(foreign)]
        added = added_lines(diff)
        names = Text("changed path", "\n".join(changed), [])
        texts = [_text(path, lines, repository) for path, lines in added.items()]
        policy = await self._policy.run(ParsedProposal([*texts, names], task))
        prose = "\n".join(
            text
            for path, lines in added.items()
            if _is_prose(path, repository)
            for text in lines.values()
        )
        if substance.size(prose) < substance.MIN_CHARACTERS:
            return [policy, SubstanceCheck.not_applicable()]
        said = ParsedProposal([Text("added line", prose, [])], task)
        return [policy, await self._substance.run(said)]


def _refused(foreign: Sequence[str]) -> Check:
    findings = [f"blocking path: {path}: the story may not change it" for path in foreign]
    too_long = "blocking size: the diff is longer than the policy reads; make a smaller change"
    return Check(
        name=PolicyCheck.name,
        outcome="failed",
        score=0.0,
        blocking=True,
        findings=shown(findings or [too_long]),
        errors=len(findings) or 1,
    )


def _is_prose(path: str, repository: Repository) -> bool:
    return matches(path, repository.docs_paths)


def _text(path: str, lines: Mapping[int, str], repository: Repository) -> Text:
    """Return a file's added lines at their numbers, the others empty; code is one block."""
    text = "\n".join(lines.get(number, "") for number in range(1, max(lines) + 1))
    if _is_prose(path, repository):
        return Text(f"{path} line", text, code_blocks(text))
    language = "python" if PurePosixPath(path).suffix in PYTHON_FILES else ""
    return Text(f"{path} line", text, [Block(language, text, 1, max(lines))])
